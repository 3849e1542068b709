// 3×3 depthwise convolution with run-time rates:  y[h, w] = Σ_{i,j} weight[i, j] · x[h + i·rate_h, w + j·rate_w]
//
// Bytes a value: forward 8 (read x, write y), backward 20 (read grad, raw and x, write grad_x; 16 without statistics). Operations:
// 18 forward, 36 backward. Bound by memory: a plane between margins of zeros stays in the L1 cache, and all else happens there.
//
// At 8×256×49×49 on two cores with AVX2 (Zen 3): the library 20.5 ms forward; a plane at a time, the norm applied on load and
// statistics taken on the way out, 2.5 ms; rows by whole vectors, the last of which overlaps, 0.8 of that. Backward, all gradients
// from one visit to each plane, 5.3 ms; the weight's nine sums at once 0.83 of that. Fetching the next plane early gains nothing.

#pragma once

#include "maps.h"

// A plane between margins of zeros wide enough for a tap to the left and right. Rows above and below are left out by taps().
template <class T>
struct PaddedPlane {
    long width, margin, stride;
    Scratch<T> values;

    PaddedPlane(long height, long width, long rate)
        : width(width), margin(rate < width ? rate : 0), stride(width + 2 * margin + L<T>), values(height * stride + L<T>) {}
    T* row(long y) { return values.data() + y * stride + margin; }
    const T* row(long y) const { return values.data() + y * stride + margin; }
};

// Up to three rows of a plane that a row of the output reads, with the weights of their taps.
template <class T>
struct Taps {
    int rows = 0, kernel_row[3];
    const T* row[3];
};
template <class T>
inline Taps<T> taps(const PaddedPlane<T>& plane, long y, long height, long rate) {
    Taps<T> found;
    rate = std::min(rate, height);  // reaches no row either, and its sums do not overflow
    for (int i = -1; i <= 1; i++)
        if (y + i * rate >= 0 && y + i * rate < height) {
            found.kernel_row[found.rows] = i + 1;
            found.row[found.rows++] = plane.row(y + i * rate);
        }
    return found;
}

// out[x] = Σ weight[i][j] · row_i[x + (j - 1) · margin]
template <class T, int ROWS>
inline void correlate_rows(T* out, const Taps<T>& t, const T (*weight)[3], long margin, long width) {
    T w[ROWS][3];
    const T* row[ROWS];
    for (int i = 0; i < ROWS; i++) {
        row[i] = t.row[i];
        for (int j = 0; j < 3; j++) w[i][j] = weight[t.kernel_row[i]][j];
    }
    const auto at = [&](auto place, auto zero) {  // of a vector, or of a single value
        auto y = zero;
        for (int i = 0; i < ROWS; i++) y += w[i][0] * place(row[i] - margin) + w[i][1] * place(row[i]) + w[i][2] * place(row[i] + margin);
        return y;
    };
    if (width < L<T>)
        for (long x = 0; x < width; x++) out[x] = at([x](const T* p) { return p[x]; }, T(0));
    else each_vector<T>(width, [&](long x) { store(out + x, at([x](const T* p) { return load(p + x); }, V<T>{})); });
}

template <class T>
void correlate_plane(T* out, const PaddedPlane<T>& plane, const T (*weight)[3], long height, long rate_h) {
    for (long y = 0; y < height; y++) {
        const Taps<T> t = taps(plane, y, height, rate_h);
        T* row = out + y * plane.width;
        if (t.rows == 3) correlate_rows<T, 3>(row, t, weight, plane.margin, plane.width);
        else if (t.rows == 2) correlate_rows<T, 2>(row, t, weight, plane.margin, plane.width);
        else correlate_rows<T, 1>(row, t, weight, plane.margin, plane.width);
    }
}

// The nine weights of one channel; a rate beyond the width leaves the middle column (its margin is 0).
template <class T>
void kernel_of(T (*w)[3], const T* weight, long margin, bool flipped) {
    for (int i = 0; i < 3; i++)
        for (int j = 0; j < 3; j++) {
            const T value = flipped ? weight[(2 - i) * 3 + (2 - j)] : weight[i * 3 + j];
            w[i][j] = margin == 0 && j != 1 ? T(0) : value;
        }
}

template <class T>
void depthwise_forward(Map<T> x, const T* weight, long n, long height, long width, long rate_h, long rate_w, T* out, T* mean,
                       T* var, int threads) {
    const long channels = x.channels, size = height * width;
    std::vector<Moments> moments(mean ? n * channels : 0);
#pragma omp parallel num_threads(threads)
    {
        PaddedPlane<T> plane(height, width, rate_w);
#pragma omp for
        for (long i = 0; i < n * channels; i++) {
            const long c = i % channels;
            T w[3][3];
            kernel_of(w, weight + 9 * c, plane.margin, false);
            for (long y = 0; y < height; y++)
                normalise_row(plane.row(y), x.raw + i * size + y * width, x.scale, x.offset, c, width);
            correlate_plane(out + i * size, plane, w, height, rate_h);
            if (mean) moments[i] = plane_moments(out + i * size, size);
        }
    }
    if (mean) combine_moments(moments, n, channels, mean, var, threads);
}

// sums[i][j] += Σ grad[x] · row_i[x + (j - 1) · margin]: nine chains of additions, of which none waits for itself
template <class T, int ROWS>
inline void weight_gradient_row(V<T> (*sums)[3], const T* grad, const Taps<T>& t, long margin, long width) {
    V<T> s[ROWS][3] = {};
    const T* row[ROWS];
    std::copy(t.row, t.row + ROWS, row);
    for (long x = 0; x < width; x += L<T>) {  // past the width the gradient's margin is zero
        const V<T> gradient = load(grad + x);
#pragma GCC unroll 3
        for (int i = 0; i < ROWS; i++) {
            s[i][0] += gradient * load(row[i] + x - margin);
            s[i][1] += gradient * load(row[i] + x);
            s[i][2] += gradient * load(row[i] + x + margin);
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < 3; j++) sums[t.kernel_row[i]][j] += s[i][j];
}

template <class T>
void weight_gradient_plane(double* grad_weight, const PaddedPlane<T>& g, const PaddedPlane<T>& x, long height, long rate_h) {
    V<T> sums[3][3] = {};
    for (long y = 0; y < height; y++) {
        const Taps<T> t = taps(x, y, height, rate_h);
        if (t.rows == 3) weight_gradient_row<T, 3>(sums, g.row(y), t, x.margin, x.width);
        else if (t.rows == 2) weight_gradient_row<T, 2>(sums, g.row(y), t, x.margin, x.width);
        else weight_gradient_row<T, 1>(sums, g.row(y), t, x.margin, x.width);
    }
    for (int i = 0; i < 3; i++)
        for (int j = 0; j < 3; j++) grad_weight[3 * i + j] = x.margin == 0 && j != 1 ? 0 : double(sum<T>(sums[i][j]));
}

template <class T>
void depthwise_backward(Gradient<T> grad, Map<T> x, const T* weight, long n, long height, long width, long rate_h, long rate_w,
                        MapGradient<T> grad_x, T* grad_weight, int threads) {
    const long channels = x.channels, size = height * width;
    std::vector<double> weights(n * channels * 9), scales(n * channels), offsets(n * channels);
#pragma omp parallel num_threads(threads)
    {
        PaddedPlane<T> plane(height, width, rate_w), gradient(height, width, rate_w);
#pragma omp for
        for (long i = 0; i < n * channels; i++) {
            const long c = i % channels;
            for (long y = 0; y < height; y++) {
                normalise_row(plane.row(y), x.raw + i * size + y * width, x.scale, x.offset, c, width);
                gradient_row(gradient.row(y), grad, i * size + y * width, c, width);
            }
            weight_gradient_plane(&weights[i * 9], gradient, plane, height, rate_h);
            if (!grad_x.raw) continue;
            T w[3][3];
            kernel_of(w, weight + 9 * c, plane.margin, true);
            correlate_plane(grad_x.raw + i * size, gradient, w, height, rate_h);
            if (x.scale)
                normalise_row_backward(grad_x.raw + i * size, x.raw + i * size, x.scale[c], x.offset[c], size, &scales[i],
                                       &offsets[i]);
        }
    }
    add_parts(weights, n, channels * 9, grad_weight);
    if (grad_x.raw && x.scale) {
        add_parts(scales, n, channels, grad_x.scale);
        add_parts(offsets, n, channels, grad_x.offset);
    }
}
