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

// out = P · in, in: (H, width) -> (R, width)
template <class T>
void multiply_rows(const Banded<T>& p, const T* in, long width, T* out) {
    for (long r = 0; r < p.rows; r++) {
        T* to = out + r * width;
        std::fill(to, to + width, T(0));
        for (long y = p.first[r]; y < p.last[r]; y++) {
            const T weight = p.values[r * p.columns + y];
            for (long c = 0; c < width; c++) to[c] += weight * in[y * width + c];
        }
    }
}

// out = in · Qᵀ, in: (height, W) -> (height, S); by products of rows where there are few, else by rows of Qᵀ.
template <class T>
void multiply_columns(const Banded<T>& q, const Banded<T>& q_t, const T* in, long height, T* out) {
    const long wide = q.columns, narrow = q.rows;
    for (long y = 0; y < height; y++) {
        const T* from = in + y * wide;
        T* to = out + y * narrow;
        if (2 * narrow < wide) {
            for (long s = 0; s < narrow; s++) {
                T total = 0;
#pragma omp simd reduction(+ : total)
                for (long c = q.first[s]; c < q.last[s]; c++) total += from[c] * q.values[s * wide + c];
                to[s] = total;
            }
            continue;
        }
        std::fill(to, to + narrow, T(0));
        for (long c = 0; c < wide; c++) {
            const T* weight = q_t.values + c * narrow;
            for (long s = q_t.first[c]; s < q_t.last[c]; s++) to[s] += from[c] * weight[s];
        }
    }
}

// P · X · Qᵀ for every plane X of x: (N·C, H, W); rows P: (R, H), columns Q: (S, W) and its transpose -> (N·C, R, S).
template <class T>
void plane_product(Map<T> x, const T* rows, const T* columns, const T* columns_t, long n, long height, long width,
                   long out_height, long out_width, T* out, int threads) {
    const Banded<T> p(rows, out_height, height), q(columns, out_width, width), q_t(columns_t, width, out_width);
    const long size = height * width, out_size = out_height * out_width;
#pragma omp parallel num_threads(threads)
    {
        std::vector<T> buffer;
        T* plane = scratch(buffer, size + std::max(out_height * width, height * out_width));
        T* between = plane + size;
#pragma omp for
        for (long i = 0; i < n * x.channels; i++) {
            normalise_row(plane, x.raw + i * size, x.scale, x.offset, i % x.channels, size);
            if (out_height <= height) {  // the axis first that makes the map smaller
                multiply_rows(p, plane, width, between);
                multiply_columns(q, q_t, between, out_height, out + i * out_size);
            } else {
                multiply_columns(q, q_t, plane, height, between);
                multiply_rows(p, between, out_width, out + i * out_size);
            }
        }
    }
}
