// What is done to whole planes: applying a norm, and P · X · Qᵀ, which is pyramid pooling's means and the resize back.
//
// Bytes a value: 8. A window of k rows costs 2k operations a value, which stays below the time to read the map up to k = 25.

#pragma once

#include "maps.h"

// The values, dropped out as channels first .. first + x.channels of a concatenation of `channels`.
template <class T>
void normalise(Map<T> x, long n, long size, Dropout dropout, long first, long channels, T* out, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < n * x.channels; i++) {
        const long image = i / x.channels, c = i % x.channels;
        normalise_row(out + i * size, x.raw + i * size, x.scale, x.offset, c, size);
        dropout_row(out + i * size, dropout, uint64_t(image * channels + first + c), 0, size);
    }
}

// grad_x.raw holds the gradient of the value and becomes that of the raw map.
template <class T>
void normalise_backward(Map<T> x, long n, long size, MapGradient<T> grad_x, int threads) {
    std::vector<double> scales(n * x.channels), offsets(n * x.channels);
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < n * x.channels; i++) {
        const long c = i % x.channels;
        normalise_row_backward(grad_x.raw + i * size, x.raw + i * size, x.scale[c], x.offset[c], size, &scales[i], &offsets[i]);
    }
    add_parts(scales, n, x.channels, grad_x.scale);
    add_parts(offsets, n, x.channels, grad_x.offset);
}

template <class T>
struct Banded {  // a matrix whose rows are zero outside of first .. last
    const T* values;
    long rows, columns;
    std::vector<long> first, last;

    Banded(const T* values, long rows, long columns) : values(values), rows(rows), columns(columns), first(rows), last(rows) {
        for (long i = 0; i < rows; i++) {
            const T* row = values + i * columns;
            while (first[i] < columns && row[first[i]] == 0) first[i]++;
            last[i] = columns;
            while (last[i] > first[i] && row[last[i] - 1] == 0) last[i]--;
        }
    }
};

// P · X · Qᵀ for every plane X of x: (N·C, H, W); rows P: (R, H), columns_t Qᵀ: (W, S) -> (N·C, R, S).
template <class T>
void plane_product(Map<T> x, const T* rows, const T* columns_t, long n, long height, long width, long out_height,
                   long out_width, T* out, int threads) {
    const Banded<T> p(rows, out_height, height), q(columns_t, width, out_width);
#pragma omp parallel num_threads(threads)
    {
        std::vector<T> buffer;
        T* plane = scratch(buffer, height * width + width);
        T* line = plane + height * width;
#pragma omp for
        for (long i = 0; i < n * x.channels; i++) {
            normalise_row(plane, x.raw + i * height * width, x.scale, x.offset, i % x.channels, height * width);
            for (long r = 0; r < out_height; r++) {
                std::fill(line, line + width, T(0));
                for (long y = p.first[r]; y < p.last[r]; y++) {
                    const T weight = p.values[r * height + y];
                    for (long c = 0; c < width; c++) line[c] += weight * plane[y * width + c];
                }
                T* to = out + (i * out_height + r) * out_width;
                std::fill(to, to + out_width, T(0));
                for (long c = 0; c < width; c++) {
                    const T* weight = q.values + c * out_width;
                    for (long s = q.first[c]; s < q.last[c]; s++) to[s] += line[c] * weight[s];
                }
            }
        }
    }
}
