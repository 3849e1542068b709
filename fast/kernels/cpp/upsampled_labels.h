// Logits against labels of full size, which the logits never reach: the softmax cross-entropy with its gradient, and the confusion
// matrix of the best class.
//
//   z = bilinear(logits)   loss = mean over labelled pixels of log Σ_k e^(z_k) - z_label   ∂loss/∂logits = resizeᵀ(softmax - onehot)
//
// Operations: about 25 per pixel and class, in registers. Bytes: one per pixel for its label. Bound by arithmetic.
//
// At 8×19×49×49 → 769×769 on two cores with AVX2 (Zen 3): PyTorch 1445 ms, by bands of rows 464 ms; this 104 ms; labels widened by
// rows and one logarithm for many pixels 74 ms; along x by runs between two logits, forward and back, 49 ms.

#pragma once

#include "maps.h"

// e^x for x <= 0, to 2 units in the last place: 2^n · e^r, r in [-ln 2 / 2, ln 2 / 2], Cephes' polynomial.
inline V<float> exponential(V<float> x) {
    typedef int32_t Int __attribute__((vector_size(VECTOR_BYTES)));
    x = x < -87.0f ? V<float>{} - 87.0f : x;  // NaN stays NaN
    const V<float> shifted = x * 1.44269504f + 12582912.0f;  // 1.5 · 2^23: the integer lands in the low bits
    const V<float> n = shifted - 12582912.0f;
    const V<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    V<float> y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    Int bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits <<= 23;  // n in the exponent's place; what was above it falls out
    Int y_bits;
    std::memcpy(&y_bits, &y, sizeof y);
    y_bits += bits;
    std::memcpy(&y, &y_bits, sizeof y);
    return y;
}
inline V<double> exponential(V<double> x) {
    for (int i = 0; i < L<double>; i++) x[i] = std::exp(x[i]);
    return x;
}

struct Axis {  // bilinear taps along one axis: output i reads low[i] and low[i] + 1, the latter with weight fraction[i]
    const int32_t* low;
    const double* fraction;
    long in_size, out_size;
};

// The outputs that lie between an input and the next: input r has begin[r] .. begin[r + 1].
struct Strips {
    std::vector<long> begin;
    explicit Strips(const Axis& axis) : begin(axis.in_size + 1, axis.out_size) {
        for (long i = axis.out_size - 1; i >= 0; i--) begin[axis.low[i]] = i;
        for (long r = axis.in_size - 1; r >= 0; r--) begin[r] = std::min(begin[r], begin[r + 1]);
    }
    long longest() const {
        long size = 0;
        for (size_t r = 0; r + 1 < begin.size(); r++) size = std::max(size, begin[r + 1] - begin[r]);
        return size;
    }
};

// What one thread needs for a strip of rows: its logits in full width, their gradients, and its labels.
template <class T>
struct Strip {
    long padded, classes;
    const Strips columns;
    std::vector<T> fraction, buffer, vectors;
    std::vector<Lane<T>> targets;               // (rows, padded): -1 where ignored
    T *top, *step, *grad_top, *grad_bottom;     // (K, padded); step: from the row of logits above to the one below
    V<T>*logits, *sums, *weighted;              // (K,)

    Strip(const Axis& x, long classes, long longest)
        : padded(ceil_div(x.out_size, L<T>) * L<T>), classes(classes), columns(x), fraction(x.fraction, x.fraction + x.out_size),
          targets(longest * padded, -1) {
        top = scratch(buffer, 4 * classes * padded);
        std::fill(top, top + 4 * classes * padded, T(0));
        step = top + classes * padded, grad_top = step + classes * padded, grad_bottom = grad_top + classes * padded;
        logits = reinterpret_cast<V<T>*>(scratch(vectors, 3 * classes * L<T>));
        sums = logits + classes, weighted = sums + classes;
    }
    // Logits (K, h, w) of an image and the labels of strip r; returns the number of labelled pixels, or -1 if a
    // label is neither a class nor ignored.
    template <class Labels>
    int64_t read(const T* in, const Labels* labels, long r, long rows, const Axis& y_axis, const Axis& x_axis, Labels ignore) {
        const long h = y_axis.in_size, w = x_axis.in_size, width = x_axis.out_size, below = r + 1 < h ? w : 0;
        for (long k = 0; k < classes; k++)
            for (long j = 0; j < w; j++) {
                const T* corner = in + (k * h + r) * w + j;
                const long right = j + 1 < w ? 1 : 0;
                const T a = corner[0], a_step = corner[right] - a;
                const T b = corner[below] - a, b_step = corner[below + right] - corner[below] - a_step;
                for (long i = columns.begin[j]; i < columns.begin[j + 1]; i++) {
                    top[k * padded + i] = a + fraction[i] * a_step;
                    step[k * padded + i] = b + fraction[i] * b_step;
                }
            }
        int64_t labelled = 0;
        for (long y = 0; y < rows; y++) {
            Lane<T> ignored = 0, foreign = 0;
            for (long x = 0; x < width; x++) {
                const Labels label = labels[y * width + x];
                targets[y * padded + x] = label == ignore ? Lane<T>(-1) : Lane<T>(label);
                ignored += label == ignore;
                foreign |= label != ignore && (label < Labels(0) || int64_t(label) >= classes);
            }
            if (foreign) return -1;
            labelled += width - ignored;
        }
        return labelled;
    }
    // The way back from one row's gradient in full width: (K, padded) -> (K, w).
    void narrow(T* out, const T* grad, long w) const {
        std::fill(out, out + classes * w, T(0));
        for (long k = 0; k < classes; k++)
            for (long j = 0; j < w; j++) {
                T left = 0, right = 0;
#pragma omp simd reduction(+ : left, right)
                for (long i = columns.begin[j]; i < columns.begin[j + 1]; i++) {
                    right += fraction[i] * grad[k * padded + i];
                    left += grad[k * padded + i];
                }
                out[k * w + j] += left - right;
                out[k * w + std::min(j + 1, w - 1)] += right;
            }
    }
    Mask<T> target(long y, long x) const {
        Mask<T> lanes;
        std::memcpy(&lanes, &targets[y * padded + x], sizeof lanes);
        return lanes;
    }
    V<T> logit(long k, long x, T f) const { return load(top + k * padded + x) + f * load(step + k * padded + x); }
};

// The loss of L columns of a strip, and the gradients of both rows of logits there.
template <class T>
double strip_loss(const Strip<T>& s, const double* fractions, long rows, long x) {
    const V<T> one = V<T>{} + T(1);
    // Σ log = log Π: as many factors of at most K as cannot overflow
    const long factors = std::max(1L, long(37 / std::log10(s.classes + 1.0)));
    double loss = 0;
    V<T> product = one, chosen_sum{};
    std::memset(s.sums, 0, s.classes * sizeof(V<T>));
    std::memset(s.weighted, 0, s.classes * sizeof(V<T>));
    for (long y = 0; y < rows; y++) {
        const T f = T(fractions[y]);
        const Mask<T> target = s.target(y, x), labelled = target >= Mask<T>{};
        V<T> largest = V<T>{} - std::numeric_limits<T>::infinity(), chosen{}, total{};
        for (long k = 0; k < s.classes; k++) {
            const V<T> logit = s.logit(k, x, f);
            s.logits[k] = logit;
            largest = logit < largest ? largest : logit;
        }
        for (long k = 0; k < s.classes; k++) {
            const V<T> logit = s.logits[k] - largest, e = exponential(logit);
            chosen = target == Mask<T>{} + Lane<T>(k) ? logit : chosen;
            total += e;
            s.logits[k] = e;
        }
        const V<T> share = labelled ? one / total : V<T>{};
        for (long k = 0; k < s.classes; k++) {
            const V<T> g = s.logits[k] * share - (target == Mask<T>{} + Lane<T>(k) ? one : V<T>{});
            s.sums[k] += g;
            s.weighted[k] += f * g;
        }
        product *= labelled ? total : one;
        chosen_sum += chosen;
        if (y % factors == factors - 1 || y + 1 == rows) {
            for (long i = 0; i < L<T>; i++) loss += std::log(double(product[i]));
            product = one;
        }
    }
    for (long k = 0; k < s.classes; k++) {
        store(s.grad_top + k * s.padded + x, s.sums[k] - s.weighted[k]);
        store(s.grad_bottom + k * s.padded + x, s.weighted[k]);
    }
    return loss - sum<T>(chosen_sum);
}

// Returns whether every label is a class or ignored; if not, the results are not written.
template <class T, class Labels>
bool upsampled_cross_entropy(const T* logits, const Labels* labels, long n, long classes, Axis rows, Axis columns,
                             Labels ignore, double* mean_loss, T* grad, int threads) {
    const long h = rows.in_size, w = columns.in_size, small = classes * w;
    const Strips strips(rows);
    std::vector<double> losses(n * h);
    std::vector<int64_t> counts(n * h);
    std::vector<T> parts(n * h * 2 * small);  // what the rows of logits above and below each strip get
#pragma omp parallel num_threads(threads)
    {
        Strip<T> strip(columns, classes, strips.longest());
#pragma omp for schedule(dynamic)
        for (long task = 0; task < n * h; task++) {
            const long image = task / h, r = task % h, top = strips.begin[r], count = strips.begin[r + 1] - top;
            if (count == 0) continue;
            const Labels* label = labels + (image * rows.out_size + top) * columns.out_size;
            counts[task] = strip.read(logits + image * classes * h * w, label, r, count, rows, columns, ignore);
            if (counts[task] < 0) continue;
            for (long x = 0; x < columns.out_size; x += L<T>)
                losses[task] += strip_loss(strip, rows.fraction + top, count, x);
            T* part = &parts[task * 2 * small];
            strip.narrow(part, strip.grad_top, w);
            strip.narrow(part + small, strip.grad_bottom, w);
        }
    }
    if (std::count(counts.begin(), counts.end(), -1)) return false;
    double loss = 0;
    int64_t count = 0;
    for (long task = 0; task < n * h; task++) loss += losses[task], count += counts[task];
    const double mean = 1.0 / std::max<int64_t>(count, 1);
#pragma omp parallel for num_threads(threads)
    for (long task = 0; task < n * h; task++) {
        const long image = task / h, r = task % h;
        for (long k = 0; k < classes; k++)
            for (long x = 0; x < w; x++) {
                T g = parts[task * 2 * small + k * w + x];
                if (r > 0) g += parts[(task - 1) * 2 * small + small + k * w + x];
                if (r == h - 1) g += parts[task * 2 * small + small + k * w + x];  // below the last row lies the last row
                grad[((image * classes + k) * h + r) * w + x] = T(g * mean);
            }
    }
    *mean_loss = loss * mean;
    return true;
}

template <class T, class Labels>
bool upsampled_confusion_matrix(const T* logits, const Labels* labels, long n, long classes, Axis rows, Axis columns,
                                Labels ignore, int64_t* confusion, int threads) {
    const long h = rows.in_size, w = columns.in_size;
    const Strips strips(rows);
    std::vector<char> foreign(n * h);
#pragma omp parallel num_threads(threads)
    {
        Strip<T> strip(columns, classes, strips.longest());
        std::vector<int64_t> counts(classes * classes);
#pragma omp for schedule(dynamic)
        for (long task = 0; task < n * h; task++) {
            const long image = task / h, r = task % h, top = strips.begin[r], count = strips.begin[r + 1] - top;
            if (count == 0) continue;
            const Labels* label = labels + (image * rows.out_size + top) * columns.out_size;
            foreign[task] = strip.read(logits + image * classes * h * w, label, r, count, rows, columns, ignore) < 0;
            if (foreign[task]) continue;
            for (long y = 0; y < count; y++)
                for (long x = 0; x < columns.out_size; x += L<T>) {
                    const T f = T(rows.fraction[top + y]);
                    V<T> largest = strip.logit(0, x, f);
                    Mask<T> best{};
                    for (long k = 1; k < classes; k++) {
                        const V<T> logit = strip.logit(k, x, f);
                        best = logit > largest ? Mask<T>{} + Lane<T>(k) : best;
                        largest = logit > largest ? logit : largest;
                    }
                    const Mask<T> target = strip.target(y, x);
                    for (long i = 0; i < L<T>; i++)
                        if (target[i] >= 0) counts[target[i] * classes + best[i]]++;
                }
        }
#pragma omp critical
        for (long i = 0; i < classes * classes; i++) confusion[i] += counts[i];
    }
    return !std::count(foreign.begin(), foreign.end(), 1);
}
