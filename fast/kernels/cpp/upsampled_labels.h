// Logits against labels of full size, which the logits never reach: the softmax cross-entropy with its gradient, and the
// confusion matrix of the best class.
//
//   z = bilinear(logits), at every pixel and for every class k
//   loss = mean over labelled pixels of w[label] · (ln Σ_k e^z[k] - z[label])
//   ∂loss/∂logits = resizeᵀ(w[label] · (softmax - onehot)) / number of labelled pixels          w: class weights, 1 if not given
//
// How the loss is computed:
//
// Strips. The rows of pixels between a row of logits and the next one are a strip: 16 rows where 49 rows become 769. It is one
//   task of one thread. Without aligned corners the pixels before the first logit are one too, and those after the last: both
//   of its rows of logits are then the same one. Both rows are widened along x. Down a column of pixels each class then goes
//   along a straight line:
//
//       z[k] = top[k] + f · step[k]     f: 0 at the row of logits above, 1 at the one below, growing evenly from row to row
//
// A straight line as the shift. A softmax stays the same if one number is subtracted from all classes of a pixel, and without
//   that powers overflow. The usual number, the pixel's largest z, takes a search at every pixel. Here the largest is looked
//   for at both ends of a column alone, and the straight line through these two is subtracted. At both ends no class lies above
//   it, so none does in between: z is at most 0, its power at most 1, and `shift` leaves straight lines.
// Powers by a geometric series. z[k] changes by the same amount from row to row, so its power 2^z[k] by the same factor,
//   ratio[k]. Of four rows only the first one's power is computed, three products make the others. A longer series would add up
//   more roundings.
// Sums of logs. In units of ln 2 a pixel's loss is log2(total) - z[label], with total = Σ_k 2^z[k]; the shift is in both terms
//   and cancels. Σ log2(total) is the logarithm of the product of all totals of a strip (powers.h). Σ z[label] is not taken
//   pixel by pixel either: z[label] is the logit above with weight 1 - f plus the logit below with weight f, so these weights
//   are added up for each logit of both widened rows, and then multiplied with it.
// Class weights. Compiled apart (WEIGHTED), so that without them nothing is done for them. With them each pixel has a weight,
//   which multiplies its share of the gradient and its weights of z[label]; the logarithm of a product knows none, so each
//   pixel takes its own.
// The gradient. With p[k] = 2^z[k] / total, a pixel gives (1 - f) · p[k] to the logit above it and f · p[k] to the one below.
//   Down a column that takes two sums, Σ p and Σ f · p. The label's part, -(1 - f) and -f, are the weights that Σ z[label]
//   needed: with them the gradients begin. `narrow` brings both rows back along x, and in the end each row of logits adds what
//   it got from the strip above it and the strip below it.
// Where that is not precise. If other classes lead above than below, and by far, then halfway down all of them lie far below
//   the straight line, and total is small; powers below 2^-126 are rounded up to it, which shows if total is as small, or once
//   a steep series has multiplied it. Either is noticed (LEAST_TOTAL, STEEPEST), and such columns are computed again: EXACT,
//   each power by itself, and relative to the largest z of its pixel.
//
// Operations: about 20 per pixel and class, in registers. Bytes: one per pixel for its label. Bound by arithmetic.
//
// What each step gained at 8×19×49×49 → 769×769 on two cores with AVX2 (Zen 3): PyTorch 1445 ms, by bands of rows 464 ms; this
// file at first, with powers and logarithms of each pixel, 104 ms; labels widened by rows, one logarithm for many pixels 74 ms;
// along x by runs between two logits, forward and back, 49 ms; straight lines as shifts and labels counted once, 0.68 of that;
// the geometric series 0.73 of that.

#pragma once

#include "maps.h"
#include "powers.h"

constexpr int ROWS_AT_ONCE = 4;       // of a geometric series
constexpr int STEEPEST = 8;           // |log2 ratio|: a power rounded up to 2^-126 is then still small three rows later
constexpr double LEAST_TOTAL = 1e-6;  // so far below the straight line logits have lost digits

// Bilinear taps along one axis. Interval j lies between inputs j - 1 and j, the first and the last one between the outermost
// input and itself. Output i reads both ends of its interval, the upper one with weight fraction[i]. Within an interval the
// fractions grow evenly, in the first and the last one too. With aligned corners the first one is empty.
struct Axis {
    const int32_t* interval;  // (out_size,), 0 to in_size, never decreasing
    const double* fraction;   // (out_size,), in [0, 1)
    long in_size, out_size;
};

// The outputs in each interval of an axis: interval j has begin[j] .. begin[j + 1].
struct Strips {
    long in_size, number;
    std::vector<long> begin;
    explicit Strips(const Axis& axis) : in_size(axis.in_size), number(in_size + 1), begin(number + 1, axis.out_size) {
        for (long i = axis.out_size - 1; i >= 0; i--) begin[axis.interval[i]] = i;
        for (long j = number - 1; j >= 0; j--) begin[j] = std::min(begin[j], begin[j + 1]);
    }
    long size(long j) const { return begin[j + 1] - begin[j]; }
    long lower(long j) const { return std::max(j - 1, 0L); }  // the inputs at the ends of interval j
    long upper(long j) const { return std::min(j, in_size - 1); }
    long longest() const {
        long longest = 0;
        for (long j = 0; j < number; j++) longest = std::max(longest, size(j));
        return longest;
    }
};

// What is given: logits (n, classes, rows.in_size, columns.in_size) and labels (n, rows.out_size, columns.out_size).
template <class T, class Labels>
struct Batch {
    const T* logits;
    const Labels* labels;
    long n, classes;
    Axis rows, columns;
    Labels ignore;  // the label of pixels that count for nothing
};

// A strip as one thread holds it. Rows are padded to whole vectors, with logits 0 and labels ignored.
template <class T>
struct Strip {
    long classes, width, padded;
    Strips columns;                // the pixels between a logit and the next one, along x
    std::vector<T> fraction;       // (width + L,): along x
    std::vector<Lane<T>> targets;  // (rows, padded): the pixel's label, -1 where ignored
    std::vector<T> weights;        // (rows, padded): of the pixel's class, 0 where ignored; of no use without class weights
    Scratch<T> top, step;          // (classes, padded): z = top + f · step
    const double* fractions;       // (rows,): along y, f of each row
    long rows;                     // of the strip at hand

    Strip(const Axis& x, long classes, long longest)
        : classes(classes), width(x.out_size), padded(ceil_div(width, L<T>) * L<T>), columns(x),
          fraction(x.fraction, x.fraction + width), targets(longest * padded, -1), top(classes * padded), step(top.size()) {
        fraction.resize(width + L<T>);  // a vector from the last column
    }
    // The number of labelled pixels of strip j of an image, or -1 if a label is neither a class nor ignored.
    template <class Labels>
    int64_t read(const Batch<T, Labels>& batch, const Strips& strips, long image, long j) {
        const long h = batch.rows.in_size, w = batch.columns.in_size;
        rows = strips.size(j), fractions = batch.rows.fraction + strips.begin[j];
        const T* logits = batch.logits + image * classes * h * w;
        widen(logits + strips.lower(j) * w, h * w, (strips.upper(j) - strips.lower(j)) * w);
        return read_labels(batch.labels + (image * batch.rows.out_size + strips.begin[j]) * width, batch.ignore);
    }
    void read_weights(const T* class_weights) {
        weights.resize(targets.size());
        for (long i = 0; i < rows * padded; i++) weights[i] = targets[i] < 0 ? T(0) : class_weights[targets[i]];
    }
    V<T> logit(long k, long x, T f) const { return load(&top[k * padded + x]) + f * load(&step[k * padded + x]); }
    Mask<T> target(long y, long x) const {
        Mask<T> lanes;
        std::memcpy(&lanes, &targets[y * padded + x], sizeof lanes);
        return lanes;
    }
    void shift();
    void narrow(T* out, const Scratch<T>& grad) const;

  private:
    // The way along x: a row of logits of each class, `plane` apart, and the row `below` it -> top and step.
    void widen(const T* row, long plane, long below) {
        for (long k = 0; k < classes; k++)
            for (long j = 0; j < columns.number; j++) {
                const T* corner = row + k * plane + columns.lower(j);
                const long right = columns.upper(j) - columns.lower(j);
                const T a = corner[0], a_step = corner[right] - a;
                const T b = corner[below] - a, b_step = corner[below + right] - corner[below] - a_step;
                for (long i = columns.begin[j]; i < columns.begin[j + 1]; i++) {
                    top[k * padded + i] = a + fraction[i] * a_step;
                    step[k * padded + i] = b + fraction[i] * b_step;
                }
            }
    }
    template <class Labels>
    int64_t read_labels(const Labels* labels, Labels ignore) {
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
};

// Subtracts from each column the straight line from the largest logit above to the largest below, and turns powers of e into
// powers of two.
template <class T>
void Strip<T>::shift() {
    for (long x = 0; x < padded; x += L<T>) {
        V<T> above = load(&top[x]), below = above + load(&step[x]);  // the largest so far
        for (long k = 1; k < classes; k++) {
            const V<T> a = load(&top[k * padded + x]), b = a + load(&step[k * padded + x]);
            above = above < a ? a : above;
            below = below < b ? b : below;
        }
        for (T *a = top.data() + x, *d = step.data() + x; a < top.data() + classes * padded; a += padded, d += padded) {
            const V<T> first = (load(a) - above) * T(LOG2_E), last = (load(a) + load(d) - below) * T(LOG2_E);
            store(a, first);
            store(d, last - first);
        }
    }
}

// The way back along x, from the gradient of one widened row: (classes, padded) -> (classes, w). Pixel i gives 1 - fraction[i]
// of its own to the logit at its left, the rest to the one at its right. Lanes past a logit's pixels are masked.
template <class T>
void Strip<T>::narrow(T* out, const Scratch<T>& grad) const {
    Mask<T> lane;
    for (int l = 0; l < L<T>; l++) lane[l] = l;
    for (long k = 0; k < classes; k++, out += columns.in_size) {
        T before = 0;  // what the logit at the left got from the interval before
        for (long j = 0; j < columns.number; j++) {
            V<T> all{}, right{};
            for (long i = columns.begin[j]; i < columns.begin[j + 1]; i += L<T>) {
                const V<T> g = lane < Lane<T>(columns.begin[j + 1] - i) ? load(&grad[k * padded + i]) : V<T>{};
                right += load(&fraction[i]) * g;
                all += g;
            }
            const T to_right = sum<T>(right), with_left = before + (sum<T>(all) - to_right);
            out[columns.lower(j)] = with_left;
            before = j > 0 ? to_right : with_left + to_right;
        }
        out[columns.in_size - 1] += before;
    }
}

// What one thread adds up: over a strip the gradient of both widened rows of logits, and over the rows of L columns of it.
template <class T>
struct Sums {
    struct Class {
        V<T> power[ROWS_AT_ONCE];  // 2^z of the rows at hand
        V<T> ratio;                // from one row's power to the next
        V<T> p, weighted_p;        // Σ p and Σ f · p over the rows
    };
    Scratch<T> top, bottom;  // (classes, padded), and a vector from the last column
    Scratch<Class> classes;

    explicit Sums(const Strip<T>& s) : top(s.classes * s.padded + L<T>), bottom(top.size()), classes(s.classes) {}

    // The gradients begin with what the labels alone give: minus the weights with which z[label] reads top and bottom.
    template <bool WEIGHTED>
    void begin_with_labels(const Strip<T>& s) {
        std::fill(top.begin(), top.end(), T(0));
        std::fill(bottom.begin(), bottom.end(), T(0));
        for (long y = 0; y < s.rows; y++)
            for (long x = 0; x < s.width; x++) {
                const Lane<T> label = s.targets[y * s.padded + x];
                const long place = std::max<Lane<T>>(label, 0) * s.padded + x;
                const T weight = WEIGHTED ? s.weights[y * s.padded + x] : label < 0 ? T(0) : T(1);
                const T f = weight * T(s.fractions[y]);
                top[place] -= weight - f;
                bottom[place] -= f;
            }
    }
};

// What the loss of L columns is made of.
template <class T>
struct Loss {
    LogSum<T> totals;            // of all columns of the strip so far; WEIGHTED: of none
    V<T> logs{};                 // WEIGHTED: the logarithms of totals
    V<T> shifts{};               // EXACT: what was subtracted at each labelled pixel, besides the straight line
    V<T> least = V<T>{} + T(1);  // of all totals
};

// EXACT: of all classes, at each pixel of ROWS rows.
template <class T, int ROWS>
inline void find_largest(const Strip<T>& s, long x, const T* f, V<T>* largest) {
    for (int r = 0; r < ROWS; r++) largest[r] = V<T>{} - std::numeric_limits<T>::infinity();
    for (long k = 0; k < s.classes; k++)
        for (int r = 0; r < ROWS; r++) {
            const V<T> logit = s.logit(k, x, f[r]);
            largest[r] = logit < largest[r] ? largest[r] : logit;
        }
}

// ROWS rows of L columns, from row y: adds their p to `sums`, their totals to `loss`.
template <class T, int ROWS, bool EXACT, bool WEIGHTED>
inline void add_rows(const Strip<T>& s, Sums<T>& sums, long y, long x, Loss<T>& loss) {
    T f[ROWS];
    V<T> largest[ROWS] = {}, total[ROWS] = {}, share[ROWS];
    for (int r = 0; r < ROWS; r++) f[r] = T(s.fractions[y + r]);
    if (EXACT) find_largest<T, ROWS>(s, x, f, largest);
    for (long k = 0; k < s.classes; k++) {
        const V<T> above = load(&s.top[k * s.padded + x]), step = load(&s.step[k * s.padded + x]);
        V<T> power{};
        for (int r = 0; r < ROWS; r++) {
            if (!EXACT && r > 0) power *= sums.classes[k].ratio;
            else power = power_of_two(above + f[r] * step - largest[r]);
            sums.classes[k].power[r] = power;
            total[r] += power;
        }
    }
    for (int r = 0; r < ROWS; r++) {
        const Mask<T> labelled = s.target(y + r, x) >= Mask<T>{};
        const V<T> one = V<T>{} + T(1);
        const V<T> weight = WEIGHTED ? load(&s.weights[(y + r) * s.padded + x]) : one;
        share[r] = labelled ? weight / total[r] : V<T>{};
        total[r] = labelled ? total[r] : one;
        if (WEIGHTED) loss.logs += weight * log_of_two<T>(total[r]);
        else loss.totals.add(total[r]);
        if (EXACT) loss.shifts += labelled ? weight * largest[r] : V<T>{};
        loss.least = total[r] < loss.least ? total[r] : loss.least;
    }
    for (auto& of_class : sums.classes) {
        V<T> sum = of_class.p, weighted = of_class.weighted_p;
        for (int r = 0; r < ROWS; r++) {
            const V<T> p = of_class.power[r] * share[r];  // of a NaN it is NaN even at an ignored pixel, as PyTorch's
            sum += p;
            weighted += f[r] * p;
        }
        of_class.p = sum, of_class.weighted_p = weighted;
    }
}

// All rows of L columns.
template <class T, bool EXACT, bool WEIGHTED>
inline void add_columns(const Strip<T>& s, Sums<T>& sums, long x, Loss<T>& loss) {
    for (auto& of_class : sums.classes) of_class.p = of_class.weighted_p = V<T>{};
    long y = 0;
    for (; y + ROWS_AT_ONCE <= s.rows; y += ROWS_AT_ONCE) add_rows<T, ROWS_AT_ONCE, EXACT, WEIGHTED>(s, sums, y, x, loss);
    for (; y < s.rows; y++) add_rows<T, 1, EXACT, WEIGHTED>(s, sums, y, x, loss);
}

// The ratios of the geometric series; returns |log2| of the one farthest from 1.
template <class T>
inline V<T> find_ratios(const Strip<T>& s, Sums<T>& sums, long x) {
    V<T> steepest{};
    for (long k = 0; s.rows >= ROWS_AT_ONCE && k < s.classes; k++) {
        const V<T> rise = T(s.fractions[1] - s.fractions[0]) * load(&s.step[k * s.padded + x]);
        const V<T> slope = rise < -rise ? -rise : rise;
        steepest = steepest < slope ? slope : steepest;
        sums.classes[k].ratio = power_of_two(rise);
    }
    return steepest;
}

// The loss of L columns of a strip in units of ln 2, but for the logarithms of what goes into `totals`; adds to the gradients.
template <class T, bool WEIGHTED>
double columns_loss(const Strip<T>& s, Sums<T>& sums, long x, LogSum<T>& totals) {
    Loss<T> loss{totals};
    const V<T> steepest = find_ratios(s, sums, x);
    add_columns<T, false, WEIGHTED>(s, sums, x, loss);
    bool imprecise = false;  // a NaN is not: it stays one either way
    for (int i = 0; i < L<T>; i++) imprecise |= loss.least[i] < T(LEAST_TOTAL) || steepest[i] > STEEPEST;
    if (imprecise) {
        loss = {totals};
        add_columns<T, true, WEIGHTED>(s, sums, x, loss);
    }
    totals = loss.totals;
    V<T> chosen{};  // Σ z[label] over the rows
    for (long k = 0; k < s.classes; k++) {
        const long place = k * s.padded + x;
        const V<T> above = load(&s.top[place]), below = above + load(&s.step[place]);
        const V<T> top = load(&sums.top[place]), bottom = load(&sums.bottom[place]), zero{};  // minus the labels' weights
        chosen -= (top != zero ? top * above : zero) + (bottom != zero ? bottom * below : zero);
        store(&sums.top[place], top + (sums.classes[k].p - sums.classes[k].weighted_p));
        store(&sums.bottom[place], bottom + sums.classes[k].weighted_p);
    }
    return double(sum<T>(loss.logs)) + double(sum<T>(loss.shifts)) - double(sum<T>(chosen));
}

// What a strip gives to the row of logits above it and to the one below, not yet divided by the number of labelled pixels.
template <class T>
struct OfStrips {
    long number, size;     // strips of an image; of a row of logits, (classes, w)
    std::vector<T> parts;  // (n, number, 2, classes, w)
    std::vector<double> losses;
    std::vector<int64_t> labelled;

    OfStrips(long n, long number, long size)
        : number(number), size(size), parts(n * number * 2 * size), losses(n * number), labelled(n * number) {}
    T* above(long image, long j) { return parts.data() + (image * number + j) * 2 * size; }
    T* below(long image, long j) { return above(image, j) + size; }
};

// Gradients of all logits, (n, classes, h, w): row r lies below strip r and above strip r + 1. The first row lies above the first
// strip too, the last row below the last.
template <class T>
void add_strips(OfStrips<T>& strips, long n, long classes, long h, long w, double mean, T* grad, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < n * h; row++) {
        const long image = row / h, r = row % h;
        for (long k = 0; k < classes; k++)
            for (long x = 0; x < w; x++) {
                const long place = k * w + x;
                T g = strips.above(image, r + 1)[place] + strips.below(image, r)[place];
                if (r == 0) g += strips.above(image, 0)[place];
                if (r == h - 1) g += strips.below(image, h)[place];
                grad[((image * classes + k) * h + r) * w + x] = T(g * mean);
            }
    }
}

// Returns whether every label is a class or ignored; if not, the results are not written. WEIGHTED: by class_weights (classes,).
template <class T, class Labels, bool WEIGHTED>
bool upsampled_cross_entropy(const Batch<T, Labels>& batch, const T* class_weights, double* mean_loss, T* grad, int threads) {
    const long h = batch.rows.in_size, w = batch.columns.in_size;
    const Strips strips(batch.rows);
    const long tasks = batch.n * strips.number;
    OfStrips<T> results(batch.n, strips.number, batch.classes * w);
#pragma omp parallel num_threads(threads)
    {
        Strip<T> strip(batch.columns, batch.classes, strips.longest());
        Sums<T> sums(strip);
#pragma omp for schedule(dynamic)
        for (long task = 0; task < tasks; task++) {
            const long image = task / strips.number, j = task % strips.number;
            if (strips.size(j) == 0) continue;
            results.labelled[task] = strip.read(batch, strips, image, j);
            if (results.labelled[task] < 0) continue;
            strip.shift();
            if (WEIGHTED) strip.read_weights(class_weights);
            sums.template begin_with_labels<WEIGHTED>(strip);
            LogSum<T> totals;
            double loss = 0;
            for (long x = 0; x < strip.width; x += L<T>) loss += columns_loss<T, WEIGHTED>(strip, sums, x, totals);
            results.losses[task] = (loss + totals.sum()) / LOG2_E;
            strip.narrow(results.above(image, j), sums.top);
            strip.narrow(results.below(image, j), sums.bottom);
        }
    }
    if (std::count(results.labelled.begin(), results.labelled.end(), -1)) return false;
    double loss = 0;
    int64_t labelled = 0;
    for (long task = 0; task < tasks; task++) loss += results.losses[task], labelled += results.labelled[task];
    const double mean = 1.0 / std::max<int64_t>(labelled, 1);
    add_strips(results, batch.n, batch.classes, h, w, mean, grad, threads);
    *mean_loss = loss * mean;
    return true;
}

// Counts a strip's labelled pixels by label and best class: (classes, classes). Of equal logits the first one is the best.
// Inlined: as a call of its own it took a tenth longer with AVX2.
template <class T>
inline __attribute__((always_inline)) void count_best(const Strip<T>& s, std::vector<int64_t>& counts) {
    for (long y = 0; y < s.rows; y++)
        for (long x = 0; x < s.width; x += L<T>) {
            const T f = T(s.fractions[y]);
            V<T> largest = s.logit(0, x, f);
            Mask<T> best{};
            for (long k = 1; k < s.classes; k++) {
                const V<T> logit = s.logit(k, x, f);
                best = logit > largest ? Mask<T>{} + Lane<T>(k) : best;
                largest = logit > largest ? logit : largest;
            }
            const Mask<T> target = s.target(y, x);
            for (long i = 0; i < L<T>; i++)
                if (target[i] >= 0) counts[target[i] * s.classes + best[i]]++;
        }
}

// Adds to `confusion`; returns whether every label is a class or ignored.
template <class T, class Labels>
bool upsampled_confusion_matrix(const Batch<T, Labels>& batch, int64_t* confusion, int threads) {
    const Strips strips(batch.rows);
    const long tasks = batch.n * strips.number;
    std::vector<char> foreign(tasks);
#pragma omp parallel num_threads(threads)
    {
        Strip<T> strip(batch.columns, batch.classes, strips.longest());
        std::vector<int64_t> counts(batch.classes * batch.classes);
#pragma omp for schedule(dynamic)
        for (long task = 0; task < tasks; task++) {
            const long image = task / strips.number, j = task % strips.number;
            if (strips.size(j) == 0) continue;
            foreign[task] = strip.read(batch, strips, image, j) < 0;
            if (!foreign[task]) count_best(strip, counts);
        }
#pragma omp critical
        for (size_t i = 0; i < counts.size(); i++) confusion[i] += counts[i];
    }
    return !std::count(foreign.begin(), foreign.end(), 1);
}
