// Vectors of the processor, written with the compiler's vector types: AVX2 or wider where -march=native says so.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, MR = 14;  // 28 of 32 registers accumulate
#else
constexpr int VECTOR_BYTES = 32, MR = 6;  // 12 of 16 registers accumulate
#endif
constexpr int NV = 2;                             // vectors in a tile's row
constexpr long K_BLOCK = 256;                     // a tile of the left operand and as many rows of the right fit the L1 cache
constexpr long LONG_SPAN = 16, SHORT_SPAN = 6;    // tiles side by side: blocks of both operands fit the L2 cache
constexpr long FORWARD_TASKS = 64;                // long spans are quicker, if there are so many; shorter ones keep threads busy
constexpr long WEIGHT_PARTS = 16;  // so many tasks share the sum of a weight's gradient, and at most twice as many

template <class T>
using V __attribute__((vector_size(VECTOR_BYTES))) = T;
template <class T>
constexpr int L = VECTOR_BYTES / sizeof(T);
template <class T>
constexpr long NR = NV * L<T>;
template <class T>
using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;  // of a mask
template <class T>
using Mask __attribute__((vector_size(VECTOR_BYTES))) = Lane<T>;
template <class T>
using Bits __attribute__((vector_size(VECTOR_BYTES))) = std::make_unsigned_t<Lane<T>>;  // sums and shifts may overflow

template <class T>
inline V<T> load(const T* p) {
    V<T> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class T, class Vector>
inline void store(T* p, Vector v) {
    std::memcpy(p, &v, sizeof v);
}
template <class T>
inline T sum(V<T> v) {  // halves, then quarters, ...: short chains of additions
    T part[L<T>];
    store(part, v);
#pragma GCC unroll 4
    for (int size = L<T> / 2; size > 0; size /= 2)
#pragma GCC unroll 16
        for (int i = 0; i < size; i++) part[i] += part[i + size];
    return part[0];
}
inline long ceil_div(long a, long b) { return (a + b - 1) / b; }
