// Powers of two and sums of logarithms to base two, by way of how numbers are stored: their exponent and their mantissa apart.

#pragma once

#include "vectors.h"

constexpr double LOG2_E = 1.4426950408889634;

// 2^x for x up to about 100, to 2 units in the last place: 2^n · 2^r, r in [-1/2, 1/2], Cephes' polynomial. NaN stays NaN.
inline V<float> power_of_two(V<float> x) {
    x = x < -126.0f ? V<float>{} - 126.0f : x;    // 2^-126 is the least that has an exponent of its own
    const V<float> shifted = x + 12582912.0f;     // 1.5 · 2^23: the nearest integer n lands in the low bits
    const V<float> r = x - (shifted - 12582912.0f);
    V<float> y = r * 1.535336188319500e-4f + 1.339887440266574e-3f;
    y = y * r + 9.618437357674640e-3f;
    y = y * r + 5.550332471162809e-2f;
    y = y * r + 2.402264791363012e-1f;
    y = y * r + 6.931472028550421e-1f;
    y = y * r + 1.0f;
    Bits<float> n, bits;
    std::memcpy(&n, &shifted, sizeof n);
    std::memcpy(&bits, &y, sizeof bits);
    bits += n << 23;  // to the exponent's place; what was above it falls out
    std::memcpy(&y, &bits, sizeof y);
    return y;
}
inline V<double> power_of_two(V<double> x) {
    for (int i = 0; i < L<double>; i++) x[i] = std::exp2(x[i]);
    return x;
}

template <class T>
inline V<T> log_of_two(V<T> x) {
    for (int i = 0; i < L<T>; i++) x[i] = std::log2(x[i]);
    return x;
}

// Σ log2 of positive numbers as log2 of their product: one logarithm for all of them. After each factor the product's exponent
// is moved to a count of its own, which leaves a product in [1, 2) that cannot overflow.
template <class T>
struct LogSum {
    static constexpr int MANTISSA = std::numeric_limits<T>::digits - 1, BIAS = std::numeric_limits<T>::max_exponent - 1;
    V<T> product = V<T>{} + T(1);
    Mask<T> exponent{};  // 2^exponent · product is the product of all
    V<T> seen{};         // the sum of all, which a NaN among them turns into NaN

    void add(V<T> x) {
        seen += x;
        product *= x;
        Mask<T> bits;
        std::memcpy(&bits, &product, sizeof bits);
        exponent += (bits >> MANTISSA) - Lane<T>(BIAS);
        bits = (bits & ((Lane<T>(1) << MANTISSA) - 1)) | (Lane<T>(BIAS) << MANTISSA);
        std::memcpy(&product, &bits, sizeof bits);
    }
    double sum() const {
        double total = 0;
        for (int i = 0; i < L<T>; i++)
            total += seen[i] != seen[i] ? double(seen[i]) : double(exponent[i]) + std::log2(double(product[i]));
        return total;
    }
};
