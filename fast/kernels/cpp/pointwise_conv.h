// 1×1 convolution of one or several maps as if concatenated:  y[o, p] = Σ_c weight[o, c] · value[c, p]
//
// Operations a position: 2 · C · C_out forward, twice that backward. Bound by arithmetic: operands are normalised, dropped out and
// packed while they are in the cache, the product runs in registers on tiles of 6 × 16 (AVX2; 14 × 32 with AVX-512), and
// statistics are taken of rows that are still in the cache.
//
// At 8×256×49×49 → 256 channels on two cores with AVX2 (Zen 3), peak 184 GFLOP/s. The library's product alone: 27 ms.
//   forward   packed blocks 23 ms; statistics in one pass, tiles of the output prefetched 17 ms
//   weight    products along positions, summed across vectors at the end 32 ms; both operands transposed while packing 24 ms
//   input     of five concatenated maps: each map by itself 180 ms; the gradient packed once for all 106 ms

#pragma once

#include "maps.h"

// c (MR × NR) = or += a (kc × MR) · b (kc × NR), both packed.
template <class T>
inline void multiply_tile(long kc, const T* __restrict a, const T* __restrict b, T* c, long c_stride, bool add) {
    V<T> acc[MR][NV] = {};
    for (int i = 0; i < MR; i++) __builtin_prefetch(c + i * c_stride, 1), __builtin_prefetch(c + i * c_stride + NR<T> - 1, 1);
    for (long k = 0; k < kc; k++, a += MR, b += NR<T>) {
        const V<T> b0 = load(b), b1 = load(b + L<T>);
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) {
            acc[i][0] += a[i] * b0;
            acc[i][1] += a[i] * b1;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++) {
            T* p = c + i * c_stride + j * L<T>;
            store(p, add ? load(p) + acc[i][j] : acc[i][j]);
        }
}

// The same where only rows × columns of the tile exist; `edge` holds MR × NR values.
template <class T>
inline void multiply_clipped_tile(long kc, const T* a, const T* b, T* c, long c_stride, bool add, long rows, long columns,
                                  T* edge) {
    if (rows >= MR && columns >= NR<T>) return multiply_tile(kc, a, b, c, c_stride, add);
    multiply_tile(kc, a, b, edge, NR<T>, false);
    for (long y = 0; y < std::min<long>(rows, MR); y++)
        for (long x = 0; x < std::min(columns, NR<T>); x++)
            c[y * c_stride + x] = edge[y * NR<T> + x] + (add ? c[y * c_stride + x] : T(0));
}

// A left operand, packed once for all columns: [K_BLOCK of k][MR rows][k][row in tile]; rows beyond the last are zero.
template <class T>
struct Packed {
    long rows, depth;
    std::vector<T> values;

    // element (i, k) is weight[i · row_stride + k · depth_stride]
    Packed(const T* weight, long rows, long depth, long row_stride, long depth_stride, int threads)
        : rows(rows), depth(depth), values(ceil_div(rows, MR) * MR * depth) {
#pragma omp parallel for num_threads(threads)
        for (long tile = 0; tile < ceil_div(rows, MR); tile++)
            for (long k = 0; k < depth; k++) {
                const long block = k / K_BLOCK * K_BLOCK, kc = std::min(K_BLOCK, depth - block);
                T* to = &values[block * ceil_div(rows, MR) * MR + tile * MR * kc + (k - block) * MR];
                for (long i = 0; i < MR && tile * MR + i < rows; i++)
                    to[i] = weight[(tile * MR + i) * row_stride + k * depth_stride];
            }
    }
    const T* tile(long block, long index) const {
        return &values[block * ceil_div(rows, MR) * MR + index * MR * std::min(K_BLOCK, depth - block)];
    }
};

template <class T>
struct Product {  // a left operand, and where its product with some columns goes: (rows × columns), any row stride
    const Packed<T>* left;
    T* out;
};

// The products of several left operands with the same `size` columns; `fill(row, k)` writes row k of these columns.
template <class T, class Fill>
void multiply_columns(const std::vector<Product<T>>& products, long depth, long size, long stride, std::vector<T>& buffer,
                      Fill fill) {
    const long panels = ceil_div(size, NR<T>), padded = panels * NR<T>;
    T* packed = scratch(buffer, K_BLOCK * padded + padded + MR * NR<T>);
    T *row = packed + K_BLOCK * padded, *edge = row + padded;
    std::memset(row, 0, padded * sizeof(T));
    for (long block = 0; block < depth; block += K_BLOCK) {
        const long kc = std::min(K_BLOCK, depth - block);
        for (long k = 0; k < kc; k++) {
            fill(row, block + k);
            for (long j = 0; j < panels; j++)
                std::memcpy(packed + j * kc * NR<T> + k * NR<T>, row + j * NR<T>, NR<T> * sizeof(T));
        }
        for (const Product<T>& product : products)
            for (long j = 0; j < panels; j++)
                for (long i = 0; i < product.left->rows; i += MR)
                    multiply_clipped_tile(kc, product.left->tile(block, i / MR), packed + j * kc * NR<T>,
                                          product.out + i * stride + j * NR<T>, stride, block > 0, product.left->rows - i,
                                          size - j * NR<T>, edge);
    }
}

// The positions of a plane, cut into equal spans of at most COLUMN_PANELS panels.
template <class T>
struct Spans {
    long size, panels, count;
    explicit Spans(long size) : size(size), panels(ceil_div(size, NR<T>)), count(ceil_div(panels, COLUMN_PANELS)) {}
    long start(long i) const { return std::min(size, panels * i / count * NR<T>); }
};

template <class T>
struct Concat {  // several maps as one, and the dropout on it
    const Map<T>* maps;
    long count, channels = 0, size;
    Dropout dropout;
    std::vector<long> map_of, channel_of;

    Concat(const Map<T>* maps, long count, long size, Dropout dropout) : maps(maps), count(count), size(size), dropout(dropout) {
        for (long m = 0; m < count; m++)
            for (long c = 0; c < maps[m].channels; c++, channels++) map_of.push_back(m), channel_of.push_back(c);
    }
    const T* raw(long n, long k, long first) const {
        const Map<T>& map = maps[map_of[k]];
        return map.raw + (n * map.channels + channel_of[k]) * size + first;
    }
    void row(T* out, long n, long k, long first, long length) const {
        if (k + ROWS_AHEAD < channels) prefetch(raw(n, k + ROWS_AHEAD, first), length);
        const Map<T>& map = maps[map_of[k]];
        const long c = channel_of[k];
        normalise_row(out, raw(n, k, first), map.scale, map.offset, c, length);
        dropout_row(out, dropout, uint64_t(n * channels + k), first, length);
    }
};

// The raw output and its moments; or, with scale and offset of a frozen norm, the value.
template <class T>
void pointwise_forward(const Map<T>* maps, long map_count, const T* weight, long out_channels, long n, long size,
                       Dropout dropout, const T* scale, const T* offset, T* out, T* mean, T* var, int threads) {
    const Concat<T> x(maps, map_count, size, dropout);
    const Packed<T> packed(weight, out_channels, x.channels, x.channels, 1, threads);
    const Spans<T> spans(size);
    std::vector<Moments> moments(mean ? n * spans.count * out_channels : 0);
#pragma omp parallel num_threads(threads)
    {
        std::vector<T> buffer;
#pragma omp for schedule(dynamic)
        for (long task = 0; task < n * spans.count; task++) {
            const long image = task / spans.count, first = spans.start(task % spans.count);
            const long length = spans.start(task % spans.count + 1) - first;
            T* c = out + image * out_channels * size + first;
            multiply_columns<T>({{&packed, c}}, x.channels, length, size, buffer,
                                [&](T* row, long k) { x.row(row, image, k, first, length); });
            if (mean)
                for (long i = 0; i < out_channels; i++) moments[task * out_channels + i] = row_moments(c + i * size, length);
            if (scale)
                for (long i = 0; i < out_channels; i++) normalise_row(c + i * size, c + i * size, scale, offset, i, length);
        }
    }
    if (mean) combine_moments(moments, n * spans.count, out_channels, mean, var, threads);
}

// Gradients of the maps of a concatenation: Wᵀ · gradient, back through dropout and norm.
template <class T>
void pointwise_backward_input(const Concat<T>& x, Gradient<T> grad, const T* weight, long out_channels, long n,
                              const MapGradient<T>* grad_maps, int threads) {
    const long size = x.size;
    const Spans<T> spans(size);
    std::vector<Packed<T>> packed;
    std::vector<long> wanted, begin(x.count);
    for (long m = 0, channel = 0; m < x.count; channel += x.maps[m++].channels) {
        begin[m] = channel;
        if (!grad_maps[m].raw) continue;
        wanted.push_back(m);
        packed.emplace_back(weight + channel, x.maps[m].channels, out_channels, 1, x.channels, threads);
    }
    std::vector<double> scales(n * spans.count * x.channels), offsets(scales.size());
#pragma omp parallel num_threads(threads)
    {
        std::vector<T> buffer;
        std::vector<Product<T>> products(wanted.size());
#pragma omp for schedule(dynamic)
        for (long task = 0; task < n * spans.count; task++) {
            const long image = task / spans.count, first = spans.start(task % spans.count);
            const long length = spans.start(task % spans.count + 1) - first;
            for (size_t i = 0; i < wanted.size(); i++)
                products[i] = {&packed[i], grad_maps[wanted[i]].raw + image * packed[i].rows * size + first};
            multiply_columns(products, out_channels, length, size, buffer, [&](T* row, long k) {
                gradient_row(row, grad, (image * out_channels + k) * size + first, k, length, size);
            });
            for (const Product<T>& product : products) {
                const long m = wanted[&product - products.data()];
                const Map<T>& map = x.maps[m];
                for (long i = 0; i < map.channels; i++) {
                    T* row = product.out + i * size;
                    if (map.scale) prefetch(map.raw + (image * map.channels + i + ROWS_AHEAD) * size + first, length);
                    dropout_row(row, x.dropout, uint64_t(image * x.channels + begin[m] + i), first, length);
                    if (map.scale)
                        normalise_row_backward(row, map.raw + (image * map.channels + i) * size + first, map.scale[i],
                                               map.offset[i], length, &scales[task * x.channels + begin[m] + i],
                                               &offsets[task * x.channels + begin[m] + i]);
                }
            }
        }
    }
    std::vector<T> all_scales(x.channels), all_offsets(x.channels);
    add_parts(scales, n * spans.count, x.channels, all_scales.data());
    add_parts(offsets, n * spans.count, x.channels, all_offsets.data());
    for (long m : wanted)
        if (x.maps[m].scale) {
            std::copy_n(&all_scales[begin[m]], x.maps[m].channels, grad_maps[m].scale);
            std::copy_n(&all_offsets[begin[m]], x.maps[m].channels, grad_maps[m].offset);
        }
}

template <class T, size_t... I>
inline V<T> interleaved(V<T> a, V<T> b, long half, std::index_sequence<I...>) {  // half 0: of their first halves, 1: second
#ifdef __clang__
    return half ? __builtin_shufflevector(a, b, (L<T> / 2 + I / 2 + I % 2 * L<T>)...)
                : __builtin_shufflevector(a, b, (I / 2 + I % 2 * L<T>)...);
#else
    return half ? __builtin_shuffle(a, b, Mask<T>{Lane<T>(L<T> / 2 + I / 2 + I % 2 * L<T>)...})
                : __builtin_shuffle(a, b, Mask<T>{Lane<T>(I / 2 + I % 2 * L<T>)...});
#endif
}

template <class T>
inline void transpose(V<T>* rows) {  // L × L
    for (int step = 1; step < L<T>; step *= 2) {
        V<T> mixed[L<T>];
#pragma GCC unroll 16
        for (int i = 0; i < L<T> / 2; i++) {
            mixed[2 * i] = interleaved<T>(rows[i], rows[i + L<T> / 2], 0, std::make_index_sequence<L<T>>());
            mixed[2 * i + 1] = interleaved<T>(rows[i], rows[i + L<T> / 2], 1, std::make_index_sequence<L<T>>());
        }
        std::copy(mixed, mixed + L<T>, rows);
    }
}

// to[p · width + i] = rows[i · stride + p], zero for rows beyond `count`. A row's last vector may be read, and the last
// position's written, beyond the length: both buffers have room, and what is written there is written again or never read.
template <class T>
void pack_transposed(T* to, const T* rows, long stride, long count, long width, long length) {
    constexpr long GROUPS = 2;  // of L rows: MR and NR are at most 2 · L
    static_assert(MR <= GROUPS * L<T> && NR<T> <= GROUPS * L<T>);
    for (long p = 0; p < length; p += L<T>) {
        V<T> block[GROUPS][L<T>];
        for (long g = 0; g * L<T> < width; g++) {
            for (long i = 0; i < L<T>; i++)
                block[g][i] = g * L<T> + i < count ? load(rows + (g * L<T> + i) * stride + p) : V<T>{};
            transpose<T>(block[g]);
        }
        for (long l = 0; l < std::min<long>(L<T>, length - p); l++)
            for (long g = 0; g * L<T> < width; g++) store(to + (p + l) * width + g * L<T>, block[g][l]);
    }
}

// Σ over images and positions of gradient (rows: output channels) times value (rows: input channels), by parts of an image.
template <class T>
void pointwise_backward_weight(const Concat<T>& x, Gradient<T> grad, long out_channels, long n, T* grad_weight, int threads) {
    const long size = x.size, tiles = ceil_div(out_channels, MR), weights = out_channels * x.channels;
    const long pieces = std::min(ceil_div(WEIGHT_PARTS, n), ceil_div(size, K_BLOCK));
    std::vector<T> partial(n * pieces * weights);
#pragma omp parallel num_threads(threads)
    {
        std::vector<T> buffer;
        T* left = scratch(buffer, (tiles * MR + 2 * NR<T> + MR) * K_BLOCK + MR * NR<T> + L<T>);
        T *right = left + tiles * MR * K_BLOCK + L<T>, *rows = right + NR<T> * K_BLOCK, *edge = rows + NR<T> * K_BLOCK;
#pragma omp for schedule(dynamic)
        for (long task = 0; task < n * pieces; task++) {
            const long image = task / pieces, end = size * (task % pieces + 1) / pieces;
            for (long first = size * (task % pieces) / pieces; first < end; first += K_BLOCK) {
                const long length = std::min(K_BLOCK, end - first);
                for (long tile = 0; tile < tiles; tile++) {
                    const long count = std::min<long>(MR, out_channels - tile * MR);
                    for (long i = 0; i < count; i++) {
                        const long c = tile * MR + i;
                        gradient_row(rows + i * K_BLOCK, grad, (image * out_channels + c) * size + first, c, length, size);
                    }
                    pack_transposed(left + tile * MR * length, rows, K_BLOCK, count, MR, length);
                }
                for (long j = 0; j < x.channels; j += NR<T>) {
                    const long count = std::min(NR<T>, x.channels - j);
                    for (long i = 0; i < count; i++) x.row(rows + i * K_BLOCK, image, j + i, first, length);
                    pack_transposed(right, rows, K_BLOCK, count, NR<T>, length);
                    for (long tile = 0; tile < tiles; tile++)
                        multiply_clipped_tile(length, left + tile * MR * length, right,
                                              &partial[task * weights + tile * MR * x.channels + j], x.channels, true,
                                              out_channels - tile * MR, count, edge);
                }
            }
        }
    }
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < weights; i++) {
        double total = 0;
        for (long part = 0; part < n * pieces; part++) total += partial[part * weights + i];
        grad_weight[i] = T(total);
    }
}
