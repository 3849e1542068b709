// What is done to whole planes: applying a norm, and P · X · Qᵀ, which is pyramid pooling's means and the resize back.
//
// Bytes a value: 8. Both are products with matrices that are zero outside of a band, made by the tiles of pointwise_conv.h: a tile
// of MR rows of P reads the rows of its windows alone. The axis comes first that leaves fewer operations.
//
// At 8×256×49×49 on two cores with AVX2 (Zen 3), means and resize of grid 8×8: by rows of the band 25 and 10 ms, by tiles 5 and 5;
// of grid 2×1: 9 and 2, then 3 and 2. Where a grid has a single column the tile is nearly empty; sums within vectors
// instead took twice as long. A value that is not finite may reach a few windows beside its own: those of its tile.

#pragma once

#include "pointwise_conv.h"

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

// A small matrix as an operand: rows in tiles, whose last one is filled up with zeros, and the columns first .. last of each
// tile outside of which it is zero: those of a pooling or a resize are zero nearly everywhere.
template <class T>
struct Banded {
    long rows, depth, tile, padded, operations = 0;
    bool is_left;  // of the product: kept by rows, tiles of MR; else the right operand: transposed, tiles of NR
    std::vector<T> values;
    std::vector<long> first, last;

    Banded(const T* matrix, long rows, long depth, bool is_left)
        : rows(rows), depth(depth), tile(is_left ? MR : NR<T>), padded(ceil_div(rows, tile) * tile), is_left(is_left),
          values(padded * depth), first(padded / tile, depth), last(padded / tile) {
        for (long i = 0; i < rows; i++)
            for (long k = 0; k < depth; k++) {
                const T value = matrix[i * depth + k];
                values[is_left ? i * depth + k : k * padded + i] = value;
                if (value == 0) continue;
                first[i / tile] = std::min(first[i / tile], k);
                last[i / tile] = std::max(last[i / tile], k + 1);
            }
        for (size_t t = 0; t < first.size(); t++) {
            first[t] = std::min(first[t], last[t]);
            operations += tile * (last[t] - first[t]);
        }
    }
};

// out (P.rows × width) = P · in (P.depth × width). Up to NR values behind `in` are read, and not used.
template <class T>
void multiply_rows(const Banded<T>& p, const T* in, long width, T* out) {
    for (long i = 0; i < p.rows; i += MR)
        for (long j = 0; j < width; j += NR<T>) {
            const long first = p.first[i / MR], depth = p.last[i / MR] - first;
            multiply_clipped_tile<T, 1>(depth, &p.values[i * p.depth + first], p.depth, in + first * width + j, width,
                                        out + i * width + j, width, false, p.rows - i, width - j);
        }
}

// out (height × Q.rows) = in (height × Q.depth) · Qᵀ. Up to MR rows behind `in` are read, and not used.
template <class T>
void multiply_columns(const Banded<T>& q, const T* in, long height, T* out) {
    for (long j = 0; j < q.rows; j += NR<T>)
        for (long i = 0; i < height; i += MR) {
            const long first = q.first[j / NR<T>], depth = q.last[j / NR<T>] - first;
            multiply_clipped_tile<T, 1>(depth, in + i * q.depth + first, q.depth, &q.values[first * q.padded + j], q.padded,
                                        out + i * q.rows + j, q.rows, false, height - i, q.rows - j);
        }
}

// P · X · Qᵀ for every plane X of x: (N·C, H, W), rows P: (R, H), columns Q: (S, W) -> (N·C, R, S).
template <class T>
void plane_product(Map<T> x, const T* rows, const T* columns, long n, long height, long width, long out_height, long out_width,
                   T* out, int threads) {
    const Banded<T> p(rows, out_height, height, true), q(columns, out_width, width, false);
    const bool rows_first = p.operations * (width - out_width) < q.operations * (height - out_height);
    const long size = height * width, out_size = out_height * out_width;
    const long plane_size = (height + MR) * width + NR<T>;
    const long between_size = rows_first ? (out_height + MR) * width : height * out_width + NR<T>;
#pragma omp parallel num_threads(threads)
    {
        Scratch<T> plane(plane_size), between(between_size);
#pragma omp for
        for (long i = 0; i < n * x.channels; i++) {
            normalise_row(plane.data(), x.raw + i * size, x.scale, x.offset, i % x.channels, size);
            if (rows_first) {
                multiply_rows(p, plane.data(), width, between.data());
                multiply_columns(q, between.data(), out_height, out + i * out_size);
            } else {
                multiply_columns(q, plane.data(), height, between.data());
                multiply_rows(p, between.data(), out_width, out + i * out_size);
            }
        }
    }
}
