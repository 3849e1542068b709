// 1×1 convolution of one or several maps as if concatenated:  y[o, p] = Σ_c weight[o, c] · value[c, p]
//
// Operations a position: 2 · C · C_out forward, twice that backward. Bound by arithmetic: operands are normalised, dropped out and
// packed while they are in the cache, the product runs in registers on tiles of 6 × 16 (AVX2; 14 × 32 with AVX-512), and
// statistics are taken of rows that are still in the cache.
//
// At 8×256×49×49 → 256 channels on two cores with AVX2 (Zen 3), peak 184 GFLOP/s. The library's product alone: 27 ms.
//   forward   packed blocks 23 ms; statistics in one pass, tiles of the output prefetched 17 ms; rows read where they were
//             normalised instead of packed panels, loop unrolled, longer spans: 0.87 of that
//   weight    products along positions, summed across vectors at the end 32 ms; both operands transposed while packing 24 ms
//   input     of five concatenated maps: each map by itself 180 ms; the gradient packed once for all 106 ms
//   both      one after the other 43 ms, of five maps 227 ms; both from one visit, the gradient alone transposed 38 and 205 ms;
//             loop unrolled, sums over parts by rows 35 and 176 ms
// The compiler must keep a tile's two vectors of the right operand in registers: inlined it read them twelve times from memory,
// which cost a third, so multiply_tile is not inlined. No gain: fetching the next operands into the L2 cache during a product,
// huge pages, twice as many parts.

#pragma once

#include "maps.h"

template <long VALUE>
using Constant = std::integral_constant<long, VALUE>;

// c (MR × NR) = or += a (MR × kc) · b (kc × NR). Element (i, k) of a lies at i · a_row + k · A_DEPTH; a row of b is NR values.
template <class T, long A_DEPTH, class Stride>
__attribute__((noinline)) void multiply_tile(long kc, const T* __restrict a, Stride a_row, const T* __restrict b, long b_stride,
                                             T* c, long c_stride, bool add) {
    V<T> acc[MR][NV] = {};
    for (int i = 0; i < MR; i++) __builtin_prefetch(c + i * c_stride, 1), __builtin_prefetch(c + i * c_stride + NR<T> - 1, 1);
#pragma GCC unroll 4
    for (long k = 0; k < kc; k++, a += A_DEPTH, b += b_stride) {
        const V<T> b0 = load(b), b1 = load(b + L<T>);
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) {
            acc[i][0] += a[i * long(a_row)] * b0;
            acc[i][1] += a[i * long(a_row)] * b1;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++) {
            T* p = c + i * c_stride + j * L<T>;
            store(p, add ? load(p) + acc[i][j] : acc[i][j]);
        }
}

// The same where only rows × columns of the tile exist.
template <class T, long A_DEPTH, class Stride>
inline void multiply_clipped_tile(long kc, const T* a, Stride a_row, const T* b, long b_stride, T* c, long c_stride, bool add,
                                  long rows, long columns) {
    if (rows >= MR && columns >= NR<T>) return multiply_tile<T, A_DEPTH>(kc, a, a_row, b, b_stride, c, c_stride, add);
    alignas(VECTOR_BYTES) T edge[MR * NR<T>];
    multiply_tile<T, A_DEPTH>(kc, a, a_row, b, b_stride, edge, NR<T>, false);
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

// out (left.rows × size) = or += left[:, block .. block + kc] · rows (kc × size)
template <class T>
void multiply_span(const Packed<T>& left, long block, long kc, const T* rows, long row_stride, long size, T* out, long stride,
                   bool add) {
    for (long j = 0; j < size; j += NR<T>)
        for (long i = 0; i < left.rows; i += MR)
            multiply_clipped_tile<T, MR>(kc, left.tile(block, i / MR), Constant<1>(), rows + j, row_stride,
                                         out + i * stride + j, stride, add, left.rows - i, size - j);
}

// Rows of a span lie an odd number of cache lines apart: a column of tiles then falls into all sets of the L1 cache.
template <class T>
constexpr long ROW_STRIDE = LONG_SPAN * NR<T> + 64 / long(sizeof(T));

// `size` positions, cut into `count` spans of tiles that differ by one tile at most.
template <class T>
struct Spans {
    long size, panels, count;
    Spans(long size, long count) : size(size), panels(ceil_div(size, NR<T>)), count(count) {}
    static Spans longest(long size) { return {size, ceil_div(ceil_div(size, NR<T>), LONG_SPAN)}; }
    static Spans for_tasks(long size, long wanted) {  // as long as so many allow
        const long panels = ceil_div(size, NR<T>);
        return {size, std::max(ceil_div(panels, LONG_SPAN), std::min(wanted, ceil_div(panels, SHORT_SPAN)))};
    }
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
        if (k + ROWS_AHEAD < channels) prefetch(raw(n, k + ROWS_AHEAD, first), 0, length);
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
    constexpr long STRIDE = ROW_STRIDE<T>;
    const Concat<T> x(maps, map_count, size, dropout);
    const Packed<T> packed(weight, out_channels, x.channels, x.channels, 1, threads);
    const Spans<T> spans = Spans<T>::for_tasks(size, ceil_div(FORWARD_TASKS, n));
    std::vector<Moments> moments(mean ? n * spans.count * out_channels : 0);
#pragma omp parallel num_threads(threads)
    {
        Scratch<T> rows(K_BLOCK * STRIDE);
#pragma omp for schedule(dynamic)
        for (long task = 0; task < n * spans.count; task++) {
            const long image = task / spans.count, first = spans.start(task % spans.count);
            const long length = spans.start(task % spans.count + 1) - first;
            T* c = out + image * out_channels * size + first;
            for (long block = 0; block < x.channels; block += K_BLOCK) {
                const long kc = std::min(K_BLOCK, x.channels - block);
                for (long k = 0; k < kc; k++) x.row(&rows[k * STRIDE], image, block + k, first, length);
                multiply_span(packed, block, kc, rows.data(), STRIDE, length, c, size, block > 0);
            }
            if (mean)
                for (long i = 0; i < out_channels; i++) moments[task * out_channels + i] = row_moments(c + i * size, length);
            if (scale)
                for (long i = 0; i < out_channels; i++) normalise_row(c + i * size, c + i * size, scale, offset, i, length);
        }
    }
    if (mean) combine_moments(moments, n * spans.count, out_channels, mean, var, threads);
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

// to[p · NR + i] = rows[i · stride + p], zero for rows beyond `count`. A row's last vector may be read beyond the length.
template <class T>
void pack_transposed(T* to, const T* rows, long stride, long count, long length) {
    for (long p = 0; p < length; p += L<T>)
        for (long g = 0; g < NV; g++) {
            V<T> block[L<T>];
            for (long i = 0; i < L<T>; i++) block[i] = g * L<T> + i < count ? load(rows + (g * L<T> + i) * stride + p) : V<T>{};
            transpose<T>(block);
            for (long l = 0; l < std::min<long>(L<T>, length - p); l++) store(to + (p + l) * NR<T> + g * L<T>, block[l]);
        }
}

// Who adds up which positions of which images: so many parts that threads have work, so few that their sums fit in memory.
template <class T>
struct Parts {
    long n, images, count;  // images of a part
    Spans<T> pieces;        // of an image
    Parts(long n, long size)
        : n(n), images(ceil_div(n, 2 * WEIGHT_PARTS)), count(0),
          pieces(size, std::min(ceil_div(WEIGHT_PARTS, n), ceil_div(size, LONG_SPAN * NR<T>))) {
        count = ceil_div(n, images) * pieces.count;
    }
    template <class Visit>
    void each_span(long part, Visit visit) const {
        const long begin = pieces.start(part % pieces.count), size = pieces.start(part % pieces.count + 1) - begin;
        const Spans<T> spans = Spans<T>::longest(size);
        const long first_image = part / pieces.count * images;
        for (long image = first_image; image < std::min(n, first_image + images); image++)
            for (long i = 0; i < spans.count; i++)
                visit(image, begin + spans.start(i), spans.start(i + 1) - spans.start(i));
    }
};

// What one thread holds of a span of positions: the gradient by rows, the same transposed, and rows of a map's value.
template <class T>
struct SpanOfGradient {
    static constexpr long STRIDE = ROW_STRIDE<T>, CHUNK = 16 * MR;
    long padded;
    Scratch<T> rows, transposed, values;
    explicit SpanOfGradient(long out_channels)
        : padded(ceil_div(out_channels, NR<T>) * NR<T>), rows(padded * STRIDE), transposed(padded * LONG_SPAN * NR<T>),
          values(CHUNK * STRIDE) {}
    void read(const Gradient<T>& grad, long out_channels, long image, long first, long length, long size) {
        for (long j = 0; j < out_channels; j += NR<T>) {
            const long count = std::min(NR<T>, out_channels - j);
            for (long k = j; k < j + count; k++)
                gradient_row(&rows[k * STRIDE], grad, (image * out_channels + k) * size + first, k, length, size);
            pack_transposed(&transposed[j * length], &rows[j * STRIDE], STRIDE, count, length);
        }
    }
};

// Wᵀ · gradient: what a map gets, back through dropout and norm.
template <class T>
void map_gradient(const Concat<T>& x, const SpanOfGradient<T>& grad, const Packed<T>& weight, long m, long begin, long image,
                  long first, long length, T* out, double* scales, double* offsets) {
    const Map<T>& map = x.maps[m];
    out += image * map.channels * x.size + first;
    for (long block = 0; block < weight.depth; block += K_BLOCK)
        multiply_span(weight, block, std::min(K_BLOCK, weight.depth - block), &grad.rows[block * grad.STRIDE], grad.STRIDE,
                      length, out, x.size, block > 0);
    for (long i = 0; i < map.channels; i++) {
        T* row = out + i * x.size;
        const T* raw = map.raw + (image * map.channels + i) * x.size + first;
        if (map.scale) prefetch(raw, ROWS_AHEAD * x.size, length);
        dropout_row(row, x.dropout, uint64_t(image * x.channels + begin + i), first, length);
        if (map.scale)
            normalise_row_backward(row, raw, map.scale[i], map.offset[i], length, &scales[begin + i], &offsets[begin + i]);
    }
}

// sums (channels × out_channels) = or += value · gradientᵀ, for channels `begin` and on
template <class T>
void weight_gradient(const Concat<T>& x, SpanOfGradient<T>& grad, long begin, long channels, long out_channels,
                     long image, long first, long length, T* sums, bool add) {
    constexpr long STRIDE = SpanOfGradient<T>::STRIDE, CHUNK = SpanOfGradient<T>::CHUNK;
    for (long chunk = 0; chunk < channels; chunk += CHUNK) {
        const long count = std::min(CHUNK, channels - chunk);
        for (long i = 0; i < count; i++) x.row(&grad.values[i * STRIDE], image, begin + chunk + i, first, length);
        for (long j = 0; j < out_channels; j += NR<T>)
            for (long i = 0; i < count; i += MR)
                multiply_clipped_tile<T, 1>(length, &grad.values[i * STRIDE], Constant<STRIDE>(), &grad.transposed[j * length],
                                            NR<T>, sums + (begin + chunk + i) * out_channels + j, out_channels, add, count - i,
                                            out_channels - j);
    }
}

// Gradients of the maps of a concatenation and of the weight: both read the gradient and the maps, so both are made at once.
template <class T>
void pointwise_backward(const Concat<T>& x, Gradient<T> grad, const T* weight, long out_channels, long n,
                        const MapGradient<T>* grad_maps, T* grad_weight, int threads) {
    const Parts<T> parts(n, x.size);
    const long weights = out_channels * x.channels;
    std::vector<long> begin(x.count);
    std::vector<Packed<T>> packed;
    for (long m = 0, channel = 0; m < x.count; channel += x.maps[m++].channels) {
        begin[m] = channel;
        packed.emplace_back(weight + channel, grad_maps[m].raw ? x.maps[m].channels : 0, out_channels, 1, x.channels, threads);
    }
    std::vector<double> scales(parts.count * x.channels), offsets(scales.size());
    const std::unique_ptr<T[]> sums(new T[parts.count * weights]);  // (part, channel, output channel), not initialised
#pragma omp parallel num_threads(threads)
    {
        SpanOfGradient<T> span(out_channels);
#pragma omp for schedule(dynamic)
        for (long part = 0; part < parts.count; part++) {
            bool add = false;
            parts.each_span(part, [&](long image, long first, long length) {
                span.read(grad, out_channels, image, first, length, x.size);
                for (long m = 0; m < x.count; m++) {
                    if (grad_maps[m].raw)
                        map_gradient(x, span, packed[m], m, begin[m], image, first, length, grad_maps[m].raw,
                                     &scales[part * x.channels], &offsets[part * x.channels]);
                    weight_gradient(x, span, begin[m], x.maps[m].channels, out_channels, image, first, length,
                                    &sums[part * weights], add);
                }
                add = true;
            });
        }
    }
#pragma omp parallel num_threads(threads)
    {
        std::vector<double> total(out_channels);
#pragma omp for
        for (long c = 0; c < x.channels; c++) {
            std::fill(total.begin(), total.end(), 0.0);
            for (long part = 0; part < parts.count; part++)
                for (long o = 0; o < out_channels; o++) total[o] += sums[part * weights + c * out_channels + o];
            for (long o = 0; o < out_channels; o++) grad_weight[o * x.channels + c] = T(total[o]);
        }
    }
    std::vector<T> all_scales(x.channels), all_offsets(x.channels);
    add_parts(scales, parts.count, x.channels, all_scales.data());
    add_parts(offsets, parts.count, x.channels, all_offsets.data());
    for (long m = 0; m < x.count; m++)
        if (grad_maps[m].raw && x.maps[m].scale) {
            std::copy_n(&all_scales[begin[m]], x.maps[m].channels, grad_maps[m].scale);
            std::copy_n(&all_offsets[begin[m]], x.maps[m].channels, grad_maps[m].offset);
        }
}
