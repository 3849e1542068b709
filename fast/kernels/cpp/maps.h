// Maps on their way between kernels, and what is done to a row of one whenever it is loaded.
//
//   value = dropout(relu(scale · raw + offset))      gradient = grad + slope · raw + intercept      (fast/kernels/__init__.py)
//
// Maps are (N, C, H, W), contiguous; a "plane" is the H·W values of one image and channel. Every sum is taken in an order that
// depends on shapes alone, never on the number of threads: tasks write partial sums to places of their own, added up afterwards.

#pragma once

#include "vectors.h"

template <class T>
struct Map {  // of the forward pass; scale is null where the value is raw itself
    const T *raw, *scale, *offset;
    long channels;
};
template <class T>
struct MapGradient {  // raw is null where no gradient is needed
    T *raw, *scale, *offset;
};
struct Dropout {
    double rate;
    uint64_t seed;
};
template <class T>
struct Gradient {  // of a raw output: grad + slope · raw + intercept; slope is null without statistics
    const T *grad, *raw, *slope, *intercept;
};

// A short piece of a row, `distance` behind `row`, that will be read soon: the processor's own prefetcher does not see from
// plane to plane. It may lie behind the map, where no pointer may point: hence an address.
template <class T>
inline void prefetch(const T* row, long distance, long size) {
    const auto address = reinterpret_cast<uintptr_t>(row) + distance * sizeof(T);
    for (long i = 0; i < size * long(sizeof(T)); i += 64) __builtin_prefetch(reinterpret_cast<const void*>(address + i));
}
constexpr long ROWS_AHEAD = 8;

// Calls of(x) for the first place x of each vector of a row. The last one overlaps the one before, where a row is long enough:
// what is stored there is stored twice, so that the row must not be read from where it is written.
template <class T, class Of>
inline void each_vector(long size, Of of) {
    long x = 0;
    for (; x + L<T> <= size; x += L<T>) of(x);
    if (x < size) of(size - L<T>);
}

template <class T>
inline void normalise_row(T* out, const T* raw, const T* scale, const T* offset, long c, long size) {
    if (!scale) {
        std::memcpy(out, raw, size * sizeof(T));
        return;
    }
    const T a = scale[c], b = offset[c];
    const auto value = [=](auto x, auto zero) {
        const auto y = a * x + b;
        return y < zero ? zero : y;  // so that NaN stays NaN
    };
    if (size < L<T> || out == raw)
        for (long i = 0; i < size; i++) out[i] = value(raw[i], T(0));
    else each_vector<T>(size, [&](long i) { store(out + i, value(load(raw + i), V<T>{})); });
}

template <class T>
inline void gradient_row(T* out, const Gradient<T>& g, long start, long c, long size, long row_stride = 0) {
    if (row_stride) prefetch(g.grad + start, ROWS_AHEAD * row_stride, size);
    if (row_stride && g.slope) prefetch(g.raw + start, ROWS_AHEAD * row_stride, size);
    if (!g.slope) {
        std::memcpy(out, g.grad + start, size * sizeof(T));
        return;
    }
    const T p = g.slope[c], q = g.intercept[c];
    const T *grad = g.grad + start, *raw = g.raw + start;
    if (size < L<T>)
        for (long i = 0; i < size; i++) out[i] = grad[i] + (p * raw[i] + q);
    else each_vector<T>(size, [&](long i) { store(out + i, load(grad + i) + (p * load(raw + i) + q)); });
}

// A sum along a row: of vectors by turns, since one chain of additions would wait for itself, and of what is left.
template <class T>
struct Sum {
    V<T> even{}, odd{};
    T rest = 0;
    T total() const { return sum<T>(even + odd) + rest; }
};

// From the gradient of a value to that of its raw map, in place; adds what scale and offset get.
template <class T>
inline void normalise_row_backward(T* grad, const T* raw, T a, T b, long size, double* grad_scale, double* grad_offset) {
    Sum<T> of_scale, of_offset;
    const auto back = [=](auto gradient, auto x, auto zero, auto& scale_sum, auto& offset_sum) {
        const auto g = a * x + b > zero ? gradient : zero;
        scale_sum += g * x;
        offset_sum += g;
        return g * a;
    };
    long i = 0;
    for (; i + 2 * L<T> <= size; i += 2 * L<T>) {
        store(grad + i, back(load(grad + i), load(raw + i), V<T>{}, of_scale.even, of_offset.even));
        store(grad + i + L<T>, back(load(grad + i + L<T>), load(raw + i + L<T>), V<T>{}, of_scale.odd, of_offset.odd));
    }
    for (; i < size; i++) grad[i] = back(grad[i], raw[i], T(0), of_scale.rest, of_offset.rest);
    *grad_scale += of_scale.total();
    *grad_offset += of_offset.total();
}

inline uint64_t mix(uint64_t x) {  // splitmix64's finaliser
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

// row: n · (all channels) + channel, first: position in the plane of values[0]
template <class T>
inline void dropout_row(T* values, Dropout dropout, uint64_t row, long first, long size) {
    if (dropout.rate == 0) return;
    const uint32_t key = uint32_t(mix(dropout.seed + 0x9e3779b97f4a7c15u * (row + 1)));
    const uint32_t threshold = uint32_t(std::min(dropout.rate * 4294967296.0, 4294967295.0));
    const T kept = dropout.rate < 1 ? T(1 / (1 - dropout.rate)) : T(0);
    uint32_t place = uint32_t(first) * 0x9e3779b9u + key;
    for (long i = 0; i < size; i++, place += 0x9e3779b9u) {
        uint32_t x = place;
        x = (x ^ (x >> 16)) * 0x7feb352du;
        x = (x ^ (x >> 15)) * 0x846ca68bu;
        x ^= x >> 16;
        values[i] = x < threshold ? T(0) : values[i] * kept;
    }
}

struct Moments {
    double mean, m2, count;  // m2: sum of squared deviations from the mean
};

template <class T>
inline Moments row_moments(const T* x, long size) {
    const T shift = x[0];  // one of the values: what is squared is then no larger than their spread
    Sum<T> sums, squares;
    const auto add = [](auto deviation, auto& s, auto& s2) { s += deviation, s2 += deviation * deviation; };
    long i = 0;
    for (; i + 2 * L<T> <= size; i += 2 * L<T>) {
        add(load(x + i) - shift, sums.even, squares.even);
        add(load(x + i + L<T>) - shift, sums.odd, squares.odd);
    }
    for (; i < size; i++) add(x[i] - shift, sums.rest, squares.rest);
    const double s = sums.total(), m2 = double(squares.total()) - s * s / size;
    return {double(shift) + s / size, m2 < 0 ? 0 : m2, double(size)};
}

inline void merge(Moments& all, const Moments& part) {  // Chan et al., 1979
    if (part.count == 0) return;
    const double count = all.count + part.count, delta = part.mean - all.mean;
    all.m2 += part.m2 + delta * delta * all.count * part.count / count;
    all.mean += delta * part.count / count;
    all.count = count;
}

// By pieces: in a long row one outlier as the shift would cost too many digits.
template <class T>
inline Moments plane_moments(const T* x, long size) {
    Moments all{0, 0, 0};
    for (long first = 0; first < size; first += 256) merge(all, row_moments(x + first, std::min(256L, size - first)));
    return all;
}

// Moments of `parts` rows of each channel, [part][channel], into mean and biased variance.
template <class T>
void combine_moments(const std::vector<Moments>& moments, long parts, long channels, T* mean, T* var, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long c = 0; c < channels; c++) {
        Moments all{0, 0, 0};
        for (long part = 0; part < parts; part++) merge(all, moments[part * channels + c]);
        mean[c] = T(all.mean);
        var[c] = T(all.m2 / all.count);
    }
}

template <class T>
void add_parts(const std::vector<double>& partial, long parts, long size, T* out) {  // [part][size] -> [size]
    for (long i = 0; i < size; i++) {
        double total = 0;
        for (long part = 0; part < parts; part++) total += partial[part * size + i];
        out[i] = T(total);
    }
}

// Memory of one thread, zero at first, from the beginning of a cache line to exactly its size: a sanitizer then sees what is
// read behind it.
template <class T>
struct AtCacheLine : std::allocator<T> {
    template <class U>
    struct rebind {
        using other = AtCacheLine<U>;
    };
    T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64))); }
    void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
};
template <class T>
using Scratch = std::vector<T, AtCacheLine<T>>;
