// Logits against labels of full size, which the logits never reach: the softmax cross-entropy with its gradient, and the confusion
// matrix of the best class.
//
//   z = bilinear(logits)   loss = mean over labelled pixels of log Σ_k e^(z_k) - z_label   ∂loss/∂logits = resizeᵀ(softmax - onehot)
//
// Operations: about 20 per pixel and class, in registers. Bytes: one per pixel for its label. Bound by arithmetic.
//
// At 8×19×49×49 → 769×769 on two cores with AVX2 (Zen 3): PyTorch 1445 ms, by bands of rows 464 ms; this 104 ms; labels widened by
// rows and one logarithm for many pixels 74 ms; along x by runs between two logits, forward and back, 49 ms; powers of two, shifted
// along straight lines instead of by each pixel's largest logit, two rows at a time, labels counted once, 0.68 of that; one power
// and three products for four rows 0.73 of that.

#pragma once

#include "maps.h"

// 2^x for x up to about 100, to 2 units in the last place: 2^n · 2^r, r in [-1/2, 1/2], Cephes' polynomial. NaN stays NaN.
inline V<float> power_of_two(V<float> x) {
    x = x < -126.0f ? V<float>{} - 126.0f : x;
    const V<float> shifted = x + 12582912.0f;  // 1.5 · 2^23: the nearest integer lands in the low bits
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

// Σ log2 of positive numbers as log2 of their product, whose exponent is taken away before it overflows.
template <class T>
struct LogSum {
    static constexpr int MANTISSA = std::numeric_limits<T>::digits - 1, BIAS = std::numeric_limits<T>::max_exponent - 1;
    V<T> product = V<T>{} + T(1), seen{};  // seen: their sum, which a NaN among them turns into NaN
    Mask<T> exponent{};
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

constexpr double LOG2_E = 1.4426950408889634;

// Of a column between two rows of logits one power is computed, the others follow by a factor: a geometric series.
constexpr int ROWS_AT_ONCE = 4;  // more would add up more roundings
constexpr int STEEPEST = 8;      // log2 of that factor: a power that was rounded up to 2^-126 then stays small for so many rows

// Bilinear taps along one axis: output i reads low[i] and low[i] + 1, the latter with weight fraction[i]. Between two inputs the
// outputs lie at equal distances, as with aligned corners: the loss takes one step for all of them.
struct Axis {
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
    V<T>*powers, *ratios, *sums, *weighted;     // (ROWS_AT_ONCE, K), (K,), (K,), (K,)

    Strip(const Axis& x, long classes, long longest)
        : padded(ceil_div(x.out_size, L<T>) * L<T>), classes(classes), columns(x), fraction(x.fraction, x.fraction + x.out_size),
          targets(longest * padded, -1) {
        fraction.resize(x.out_size + L<T>);  // a vector from the last column
        top = scratch(buffer, 4 * classes * padded + L<T>);
        std::fill(top, top + 4 * classes * padded, T(0));
        step = top + classes * padded, grad_top = step + classes * padded, grad_bottom = grad_top + classes * padded;
        powers = reinterpret_cast<V<T>*>(scratch(vectors, (ROWS_AT_ONCE + 3) * classes * L<T>));
        ratios = powers + ROWS_AT_ONCE * classes, sums = ratios + classes, weighted = sums + classes;
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
    // Makes both rows of logits powers of two for the softmax, and their largest 0 in each column: between two rows all are then
    // at most 0, and mostly not far below. The gradients begin with what the labels alone give.
    void shift_and_count(const double* fractions, long rows, long width) {
        for (long x = 0; x < padded; x += L<T>) {
            V<T> above = load(top + x), below = above + load(step + x);
            for (long k = 1; k < classes; k++) {
                const V<T> a = load(top + k * padded + x), b = a + load(step + k * padded + x);
                above = above < a ? a : above;
                below = below < b ? b : below;
            }
            for (T *a = top + x, *d = step + x; a < top + classes * padded; a += padded, d += padded) {
                const V<T> first = (load(a) - above) * T(LOG2_E), last = (load(a) + load(d) - below) * T(LOG2_E);
                store(a, first);
                store(d, last - first);
            }
        }
        std::fill(grad_top, grad_top + 2 * classes * padded, T(0));
        for (long y = 0; y < rows; y++)
            for (long x = 0; x < width; x++) {
                const Lane<T> label = targets[y * padded + x];
                const long place = std::max<Lane<T>>(label, 0) * padded + x;
                const T weight = label < 0 ? T(0) : T(1), f = weight * T(fractions[y]);
                grad_top[place] -= weight - f;
                grad_bottom[place] -= f;
            }
    }
    // The way back from one row's gradient in full width: (K, padded) -> (K, w). Vectors past a logit's columns are masked.
    void narrow(T* out, const T* grad, long w) const {
        std::fill(out, out + classes * w, T(0));
        Mask<T> lane;
        for (int l = 0; l < L<T>; l++) lane[l] = l;
        for (long k = 0; k < classes; k++)
            for (long j = 0; j < w; j++) {
                V<T> all{}, right{};
                for (long i = columns.begin[j]; i < columns.begin[j + 1]; i += L<T>) {
                    const V<T> g = lane < Lane<T>(columns.begin[j + 1] - i) ? load(grad + k * padded + i) : V<T>{};
                    right += load(&fraction[i]) * g;
                    all += g;
                }
                const T to_right = sum<T>(right);
                out[k * w + j] += sum<T>(all) - to_right;
                out[k * w + std::min(j + 1, w - 1)] += to_right;
            }
    }
    Mask<T> target(long y, long x) const {
        Mask<T> lanes;
        std::memcpy(&lanes, &targets[y * padded + x], sizeof lanes);
        return lanes;
    }
    V<T> logit(long k, long x, T f) const { return load(top + k * padded + x) + f * load(step + k * padded + x); }
};

// ROWS rows of L columns: their softmax into the gradients' sums, their totals into `logs`; returns the least of these.
// From row to row a logit changes by the same step, so its power by the same factor. EXACT: each power is computed by itself, of
// the logit minus the largest of its pixel.
template <class T, int ROWS, bool EXACT>
inline V<T> rows_softmax(const Strip<T>& s, const double* fractions, long y, long x, LogSum<T>& logs, V<T>& shifts) {
    const V<T> one = V<T>{} + T(1);
    T f[ROWS];
    V<T> total[ROWS] = {}, share[ROWS], largest[ROWS] = {}, least = one;
    for (int r = 0; r < ROWS; r++) f[r] = T(fractions[y + r]), largest[r] -= EXACT ? std::numeric_limits<T>::infinity() : T(0);
    for (long k = 0; EXACT && k < s.classes; k++)
        for (int r = 0; r < ROWS; r++) {
            const V<T> logit = s.logit(k, x, f[r]);
            largest[r] = logit < largest[r] ? largest[r] : logit;
        }
    for (long k = 0; k < s.classes; k++) {
        const V<T> above = load(s.top + k * s.padded + x), step = load(s.step + k * s.padded + x);
        V<T> power{};
        for (int r = 0; r < ROWS; r++) {
            if (!EXACT && r > 0) power *= s.ratios[k];
            else power = power_of_two(above + f[r] * step - largest[r]);
            s.powers[ROWS * k + r] = power;
            total[r] += power;
        }
    }
    for (int r = 0; r < ROWS; r++) {
        const Mask<T> labelled = s.target(y + r, x) >= Mask<T>{};
        share[r] = labelled ? one / total[r] : V<T>{};
        total[r] = labelled ? total[r] : one;
        logs.add(total[r]);
        if (EXACT) shifts += labelled ? largest[r] : V<T>{};
        least = total[r] < least ? total[r] : least;
    }
    for (long k = 0; k < s.classes; k++) {
        V<T> sum = s.sums[k], weighted = s.weighted[k];
        for (int r = 0; r < ROWS; r++) {
            const V<T> g = s.powers[ROWS * k + r] * share[r];  // of a NaN it is NaN even at an ignored pixel, as PyTorch's
            sum += g;
            weighted += f[r] * g;
        }
        s.sums[k] = sum, s.weighted[k] = weighted;
    }
    return least;
}

// The loss of L columns of a strip in units of ln 2, but for what goes into `logs`; and the gradients of both rows of logits.
template <class T, bool EXACT>
double columns_loss(const Strip<T>& s, const double* fractions, long rows, long x, LogSum<T>& all_logs) {
    LogSum<T> logs = all_logs;
    V<T> shifts{}, chosen{}, least = V<T>{} + T(1), steepest{};
    for (long k = 0; !EXACT && rows >= ROWS_AT_ONCE && k < s.classes; k++) {
        const V<T> rise = T(fractions[1] - fractions[0]) * load(s.step + k * s.padded + x), slope = rise < -rise ? -rise : rise;
        steepest = steepest < slope ? slope : steepest;
        s.ratios[k] = power_of_two(rise);
    }
    std::memset(s.sums, 0, 2 * s.classes * sizeof(V<T>));
    long y = 0;
    for (; y + ROWS_AT_ONCE <= rows; y += ROWS_AT_ONCE) {
        const V<T> of_rows = rows_softmax<T, ROWS_AT_ONCE, EXACT>(s, fractions, y, x, logs, shifts);
        least = of_rows < least ? of_rows : least;
    }
    for (; y < rows; y++) {
        const V<T> of_row = rows_softmax<T, 1, EXACT>(s, fractions, y, x, logs, shifts);
        least = of_row < least ? of_row : least;
    }
    if (!EXACT)  // two rows of logits so different that all lie far below 0 between them, or that powers grow fast
        for (int i = 0; i < L<T>; i++)
            if (least[i] < T(1e-6) || steepest[i] > STEEPEST) return columns_loss<T, true>(s, fractions, rows, x, all_logs);
    for (long k = 0; k < s.classes; k++) {
        T *to_top = s.grad_top + k * s.padded + x, *to_bottom = s.grad_bottom + k * s.padded + x;
        const V<T> above = load(s.top + k * s.padded + x), below = above + load(s.step + k * s.padded + x);
        const V<T> top = load(to_top), bottom = load(to_bottom), zero{};  // minus the labels' weights
        chosen -= (top != zero ? top * above : zero) + (bottom != zero ? bottom * below : zero);
        store(to_top, top + (s.sums[k] - s.weighted[k]));
        store(to_bottom, bottom + s.weighted[k]);
    }
    all_logs = logs;
    return double(sum<T>(shifts)) - double(sum<T>(chosen));
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
            strip.shift_and_count(rows.fraction + top, count, columns.out_size);
            LogSum<T> logs;
            for (long x = 0; x < columns.out_size; x += L<T>)
                losses[task] += columns_loss<T, false>(strip, rows.fraction + top, count, x, logs);
            losses[task] = (losses[task] + logs.sum()) / LOG2_E;
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
