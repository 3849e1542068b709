"""Mean softmax cross-entropy of bilinearly upsampled logits, and its gradient, without full-size logits.

    z[k] = (1-f_y)·((1-f_x)·l₀₀[k] + f_x·l₀₁[k]) + f_y·((1-f_x)·l₁₀[k] + f_x·l₁₁[k])     (f_y, f_x): within a cell of logits
    loss = (1 / |L|) Σ_{p ∈ L} w[label] · (log Σ_k exp z_p[k] - z_p[label])             (w: class weights, 1 if not given)
    ∂l_c[k] = (1 / |L|) Σ_{p ∈ L} weight_c(p) · w[label] · (softmax(z_p)[k] - [k = label])

A cell is the label pixels from a logit to the next along both axes: 16×16 at output stride 16. A program computes CELLS cells;
a thread, a lane of its cell, has COLUMNS columns of its pixels, ROWS rows at a time: a chunk. A second kernel adds up the loss
and counts the labelled pixels, in a fixed order; a third adds the up to four contributions of each logit. The position within
a cell is a quotient of integers, so it is exact at any size.

With ALIGN_CORNERS a cell begins at each logit. Without, pixels lie before the first logit too, and after the last: cells whose
two ends are one logit, on which all their pixels sit. These are (h + 1)·(w + 1) cells, so 32×32 logits of 512×512 pixels cost
what 33×33 of 513×513 do.

A surface as the shift. A softmax stays the same if one number is subtracted from all classes of a pixel, and without that
powers overflow. The usual number, the pixel's largest z, takes a search at every pixel. Here the largest logit of each corner
is interpolated like a class: no class lies above it. Down a column of pixels all classes, shifted, are straight lines:

    z[k] = top[k] + f_y · rise[k] ≤ 0     in powers of two: log₂ e is in it

Two passes over the classes. From row to row a power 2^z grows by the same factor, the class's ratio, so SERIES rows take one
exponential. The first pass adds up t = Σ_k 2^z of all rows. The second one needs Σ p and Σ f_y · p down the column, with
p = 2^z / t: a polynomial in the ratio, whose coefficients 1 / t are the same for all classes, and its derivative. By Horner's
rule that is two multiply-adds per pixel and class. Summed along x they are the gradients of the corners.
Labels are kept four to a register, as bytes. For a class that a program's labels do not have, as bits say, nothing is done;
for one that they have, four labels are compared at once. Number and rows of its pixels give its gradient and Σ z[label].
Class weights, if given, multiply these, and each pixel's share 1 / t; the logarithm of a product knows no weights, so that of
each t is then taken by itself. Without them the same code is compiled as if there were none.
Where that is not precise: if other classes lead at one corner than at another, and by far, then in between all of them lie
far below the surface, and totals are small; a steep series leaves float32's range. Such chunks are computed row by row, with
powers relative to each pixel's largest z, at several times the instructions: rare until the leading class is 20 ahead, half
of the cells' groups at class boundaries at 30. So are all if there are more than 254 classes.

Bytes for N·H·W labels and N·h·w·K logits: N·H·W (uint8) + 8·N·h·w·K, and 32·N·h·w·K for the corners' gradients, which stay in
the L2 cache. At 8×19×49×49 → 769×769: 8 MB, 12 MB of corners, 90 million pairs of pixel and class: bound by arithmetic.

Versions (instructions of warps in code compiled for sm_90, at that size; not measured: no GPU was at hand)
  1. interpolate, cross-entropy, and back by the library: six passes over 360 MB
  2. a program for each cell, classes in the slow dimension of a tile, 19 padded to 32, an exponential per pixel and class:
     146 million, 254 registers
  3. this: 32 million where three classes meet in a program, 39 where all do; 100 registers (Triton 3.8: 121,
     with class weights 168)
     Without ALIGN_CORNERS 0.4 % more for as many cells, 128 registers
  4. a column per thread: 45 to 51 million, 72 registers; four columns: 26 to 33 million, 168 registers; see bench/tune.py
"""

import triton
import triton.language as tl

from fast.kernels.triton.batch_norm import INTERPRETED

LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
FOREIGN = tl.constexpr(-2)  # a label that is neither a class nor ignore_index
MOST_CLASSES = tl.constexpr(254)  # whose labels fit a byte, beside FOREIGN and -1
# A power below 2^-126 is 0, and so are the later ones of its series: at most 2^-98, as it grows by 2^28 after its first row.
STEEPEST = tl.constexpr(32.0)  # |log₂ ratio| · SERIES
LEAST_PRODUCT = tl.constexpr(2.0**-64)  # of four rows' totals; beside one as small, that 2^-98 is less than rounding


@triton.jit
def last_cell(in_size, ALIGN_CORNERS: tl.constexpr):
    """The number of the last cell along one axis. Cell c begins at logit c, or without ALIGN_CORNERS at logit c - 1."""
    return in_size - 1 if ALIGN_CORNERS else in_size


@triton.jit
def ends_of_cell(cell, in_size, ALIGN_CORNERS: tl.constexpr):
    """The two logits that `cell` lies between along one axis."""
    if ALIGN_CORNERS:
        ends = cell, tl.minimum(cell + 1, in_size - 1)
    else:
        ends = tl.maximum(cell - 1, 0), tl.minimum(cell, in_size - 1)
    return ends


@triton.jit
def first_pixel(cell, in_size, out_size, ALIGN_CORNERS: tl.constexpr):
    """The first output pixel whose position is in `cell` or after it along one axis."""
    if ALIGN_CORNERS:
        pixel = tl.cdiv(cell * tl.maximum(out_size - 1, 1), tl.maximum(in_size - 1, 1))
    else:
        pixel = tl.maximum(tl.cdiv((2 * cell - 1) * out_size - in_size, 2 * in_size), 0)
    return pixel


@triton.jit
def within_cell(pixel, cell, in_size, out_size, ALIGN_CORNERS: tl.constexpr):
    """Position of output pixel `pixel` in `cell`, 0 to 1 from one end to the other."""
    if ALIGN_CORNERS:
        span = tl.maximum(out_size - 1, 1)
        position = (pixel * (in_size - 1) - cell * span).to(tl.float32) / span.to(tl.float32)
    else:
        span = 2 * out_size
        position = ((2 * pixel + 1) * in_size - (2 * cell - 1) * out_size).to(tl.float32) / span.to(tl.float32)
        position = tl.where(cell == 0, 1.0, tl.where(cell == in_size, 0.0, position))  # on the first logit, on the last one
    return position


@triton.jit
def step_in_cell(cell, in_size, out_size, ALIGN_CORNERS: tl.constexpr):
    """How much `within_cell` grows from one output pixel to the next."""
    if ALIGN_CORNERS:
        step = (in_size - 1).to(tl.float32) / tl.maximum(out_size - 1, 1).to(tl.float32)
    else:
        step = tl.where((cell == 0) | (cell == in_size), 0.0, in_size.to(tl.float32) / out_size.to(tl.float32))
    return step


@triton.jit
def power_of_two(x):
    """2^x in one instruction, all but the last of float32's bits right; below 2^-126 it is 0."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def log_of_two(x):
    """log₂ x in one instruction, with an absolute error of 2^-22 near 1."""
    if INTERPRETED:
        return tl.log2(x)
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def inverse(x):
    """1 / x in one instruction, all but the last of float32's bits right."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def append(values, value):
    """A tuple with one more value."""
    return values + (value,)  # noqa: RUF005 Triton has no unpacking


@triton.jit
def pinned(x):
    """x. Computed here and now, where the compiler would rather keep what it is made of in more registers."""
    if INTERPRETED:
        return x
    bits = x.to(tl.uint32, bitcast=True)
    bits = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [bits], dtype=tl.uint32, is_pure=False, pack=1)
    return bits.to(x.dtype, bitcast=True)


@triton.jit
def bitwise_or(a, b):
    """For `tl.reduce`."""
    return a | b


@triton.jit
def end_of_cell(cell, in_size, out_size, ALIGN_CORNERS: tl.constexpr):
    """The first output pixel of the next cell along one axis; the last cell ends with the pixels."""
    end = tl.minimum(first_pixel(cell + 1, in_size, out_size, ALIGN_CORNERS), out_size)
    return tl.where(cell == last_cell(in_size, ALIGN_CORNERS), out_size, end)


@triton.jit
def cell_sum(x, CELLS: tl.constexpr, LANES: tl.constexpr):
    """The sum over the lanes of each cell, for each of them: (THREADS,) -> (THREADS,)."""
    total = tl.sum(tl.reshape(x, (CELLS, LANES)), axis=1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(total, (CELLS, LANES)), (CELLS * LANES,))


@triton.jit
def cell_maximum(x, CELLS: tl.constexpr, LANES: tl.constexpr):
    """The largest of the lanes of each cell, for each of them: (THREADS,) -> (THREADS,)."""
    largest = tl.max(tl.reshape(x, (CELLS, LANES)), axis=1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(largest, (CELLS, LANES)), (CELLS * LANES,))


@triton.jit
def corner_pointers(logits_ptr, n, i, j, height, width, stride_n, stride_h, stride_w, ALIGN_CORNERS: tl.constexpr):
    """Class 0 of the four logits around each cell, in the order of the corners: four of (THREADS,)."""
    above, below = ends_of_cell(i, height, ALIGN_CORNERS)
    left, right = ends_of_cell(j, width, ALIGN_CORNERS)
    above_ptr = logits_ptr + (n.to(tl.int64) * stride_n + above.to(tl.int64) * stride_h)
    below_ptr = logits_ptr + (n.to(tl.int64) * stride_n + below.to(tl.int64) * stride_h)
    at_left, at_right = left.to(tl.int64) * stride_w, right.to(tl.int64) * stride_w
    return above_ptr + at_left, above_ptr + at_right, below_ptr + at_left, below_ptr + at_right


@triton.jit
def largest_logits(corner_ptrs, lane, stride_k, K, CELLS: tl.constexpr, LANES: tl.constexpr):
    """The largest logit of each corner, times log₂ e: four of (THREADS,). The lanes of a cell share its classes."""
    none = tl.full(lane.shape, float("-inf"), tl.float32)
    largest = append(append(append(append((), none), none), none), none)
    for first in range(0, K, LANES):
        k = first + lane
        found = ()
        for corner in tl.static_range(4):
            logit = tl.load(corner_ptrs[corner] + k * stride_k, mask=k < K, other=float("-inf")).to(tl.float32)
            found = append(found, tl.maximum(largest[corner], logit))
        largest = found
    shifts = ()
    for corner in tl.static_range(4):
        shifts = append(shifts, cell_maximum(largest[corner], CELLS, LANES) * LOG2_E)
    return shifts


@triton.jit
def line(corner_ptrs, shifts, fx, offset):
    """A class down each column, in powers of two: z = top + fy · rise. `offset`: of its logits. Two of (COLUMNS, THREADS)."""
    l00 = tl.load(corner_ptrs[0] + offset).to(tl.float32) * LOG2_E - shifts[0]
    l01 = tl.load(corner_ptrs[1] + offset).to(tl.float32) * LOG2_E - shifts[1]
    l10 = tl.load(corner_ptrs[2] + offset).to(tl.float32) * LOG2_E - shifts[2]
    l11 = tl.load(corner_ptrs[3] + offset).to(tl.float32) * LOG2_E - shifts[3]
    top = l00[None] + (l01 - l00)[None] * fx
    bottom = l10[None] + (l11 - l10)[None] * fx
    return top, bottom - top


@triton.jit
def read_label(pixel_ptr, there, ignore_index, K):
    """-1 where ignored or not there, FOREIGN where it is neither a class nor ignored, int32."""
    label = tl.load(pixel_ptr, mask=there, other=0)
    if label.dtype == tl.uint8:
        label = label.to(tl.int32)
    known = tl.where((label >= 0) & (label < K), label.to(tl.int32), FOREIGN)
    return tl.where(there & (label != ignore_index), known, -1)


@triton.jit
def series_totals(corner_ptrs, shifts, fx, first_fy, step, stride_k, K, ROWS: tl.constexpr, SERIES: tl.constexpr):
    """Σ_k 2^z of ROWS rows, by geometric series down the columns; and the steepest |log₂ ratio| of each column."""
    zero = fx * 0.0
    steepest = zero
    totals = ()
    for _ in tl.static_range(ROWS):
        totals = append(totals, zero)
    for k in range(K):
        top, rise = line(corner_ptrs, shifts, fx, k * stride_k)
        slope = step * rise
        steepest = tl.maximum(steepest, tl.abs(slope))
        ratio = power_of_two(slope)
        squared = ratio * ratio
        cubed, fourth = squared * ratio, squared * squared
        sums = ()
        for row in tl.static_range(0, ROWS, 4):
            if row % SERIES == 0:
                power = power_of_two(top + (first_fy + row * step)[None] * rise)
            else:
                power *= fourth
            sums = append(append(sums, totals[row] + power), totals[row + 1] + power * ratio)
            sums = append(append(sums, totals[row + 2] + power * squared), totals[row + 3] + power * cubed)
        totals = sums
    return totals, steepest


@triton.jit
def series_sums(weights, top, rise, first_fy, step, ROWS: tl.constexpr, SERIES: tl.constexpr):
    """Σ p and Σ fy · p over the rows of each column, with p = weight · 2^z: a polynomial in the ratio, by Horner's rule."""
    ratio = power_of_two(step * rise)
    all_p, below_p = tl.zeros(ratio.shape, tl.float32), tl.zeros(ratio.shape, tl.float32)
    for begin in tl.static_range(0, ROWS, SERIES):
        fy = (first_fy + begin * step)[None]
        power = power_of_two(top + fy * rise)
        derivative = weights[begin + SERIES - 1]
        value = derivative * ratio + weights[begin + SERIES - 2]
        for back in tl.static_range(3, SERIES + 1):
            derivative = derivative * ratio + value
            value = value * ratio + weights[begin + SERIES - back]
        value *= power
        all_p += value
        below_p += fy * value + (step * ratio) * (derivative * power)
    return all_p, below_p


@triton.jit
def read_labels(pixel_ptr, rows_left, label_width, ignore_index, K, ROWS: tl.constexpr):
    """ROWS labels of each column, four as the bytes of each number; and a bit for every class that there is, modulo 32."""
    labels = ()
    classes = tl.zeros(rows_left.shape, tl.int32)
    for begin in tl.static_range(0, ROWS, 4):
        four = tl.zeros(rows_left.shape, tl.uint32)
        for row in tl.static_range(begin, begin + 4):
            label = read_label(pixel_ptr, row < rows_left, ignore_index, K)
            pixel_ptr += label_width
            four |= (label & 0xFF).to(tl.uint32) << (8 * (row - begin))
            classes |= 1 << (label & 31)
        labels = append(labels, pinned(four))
    return labels, tl.reduce(tl.reduce(classes, 0, bitwise_or), 0, bitwise_or)


@triton.jit
def shares(totals, labels, class_weights_ptr, K, ROWS: tl.constexpr):
    """The factor of each row's powers, the loss but for the labels' logits, the least product of four labelled totals."""
    loss, least = tl.zeros(totals[0].shape, tl.float32), tl.full(totals[0].shape, 1.0, tl.float32)
    weights = ()
    for begin in tl.static_range(0, ROWS, 4):
        product = tl.full(loss.shape, 1.0, tl.float32)
        for row in tl.static_range(begin, begin + 4):
            byte = 0xFF << (8 * (row - begin))
            labelled = (labels[begin // 4] & byte) != byte
            total = tl.where(labelled, totals[row], 1.0)
            product *= total
            # Where a total is NaN the gradient is, even at an ignored pixel, as PyTorch's.
            share = tl.where(labelled, inverse(totals[row]), totals[row] * 0.0)
            if class_weights_ptr is not None:
                label = (labels[begin // 4] >> (8 * (row - begin))) & 0xFF
                weight = tl.load(class_weights_ptr + label, mask=labelled & (label < K), other=0.0).to(tl.float32)
                share *= weight
                loss += weight * log_of_two(total)
            weights = append(weights, pinned(share))
        if class_weights_ptr is None:
            loss += log_of_two(product)
        least = tl.minimum(least, product)
    return weights, loss, least


@triton.jit
def label_weights(labels, k, ROWS: tl.constexpr):
    """Pixels of class k in each column, and the sum of their rows."""
    by_row, by_four = tl.zeros(labels[0].shape, tl.uint32), tl.zeros(labels[0].shape, tl.uint32)  # counts in bytes
    for four in tl.static_range(ROWS // 4):
        difference = labels[four] ^ (k * 0x01010101)
        differs = ((difference & 0x7F7F7F7F) + 0x7F7F7F7F) | difference  # the upper bit of each byte that is not 0
        same = ((differs >> 7) & 0x01010101) ^ 0x01010101
        by_row += same
        by_four += four * same
    number = (by_row * 0x01010101) >> 24  # the sum of four bytes
    row_sum = ((by_row * 0x00010203) >> 24) + ((by_four * 0x04040404) >> 24)  # rows 0, 1, 2, 3 of each four; 4 · four
    return number.to(tl.int32).to(tl.float32), row_sum.to(tl.int32).to(tl.float32)


@triton.jit
def exact_log_total(corner_ptrs, shifts, fx, fy, stride_k, K):
    """log₂ Σ_k 2^z of one row, with powers relative to each pixel's largest z."""
    most = fx * 0.0 - float("inf")
    for k in range(K):
        top, rise = line(corner_ptrs, shifts, fx, k * stride_k)
        most = tl.maximum(most, top + fy * rise)
    total = fx * 0.0
    for k in range(K):
        top, rise = line(corner_ptrs, shifts, fx, k * stride_k)
        total += power_of_two(top + fy * rise - most)
    return most + log_of_two(total)


@triton.jit
def add_to_corners(place, all_p, below_p, fx, lane, writes, later, exists, CELLS: tl.constexpr, LANES: tl.constexpr):
    """Add Σ over a cell's columns of both sums to its four corners; lane c of a cell has corner c."""
    above_p = all_p - below_p
    top, top_right = tl.sum(above_p, axis=0), tl.sum(above_p * fx, axis=0)
    bottom, bottom_right = tl.sum(below_p, axis=0), tl.sum(below_p * fx, axis=0)
    left = tl.where(lane < 2, cell_sum(top - top_right, CELLS, LANES), cell_sum(bottom - bottom_right, CELLS, LANES))
    right = tl.where(lane < 2, cell_sum(top_right, CELLS, LANES), cell_sum(bottom_right, CELLS, LANES))
    grad = tl.where(exists, tl.where((lane & 1) == 0, left, right), 0.0)
    grad += tl.load(place, mask=writes & later, other=0.0)
    tl.store(place, grad, mask=writes)


@triton.jit
def exact_gradients(
    own_place,
    pixel_ptr,
    class_weights_ptr,
    corner_ptrs,
    shifts,
    fx,
    first_fy,
    step,
    rows_left,
    lane,
    writes,
    exists,
    chunk,
    place_step,
    label_width,
    stride_k,
    ignore_index,
    K,
    ROWS: tl.constexpr,
    CELLS: tl.constexpr,
    LANES: tl.constexpr,
):
    """A chunk without series, row by row: loss and number of labelled pixels of each thread."""
    loss, count = tl.zeros(lane.shape, tl.float32), tl.zeros(lane.shape, tl.float32)
    for row in range(ROWS):
        fy, there = (first_fy + row * step)[None], row < rows_left
        label = read_label(pixel_ptr + row * label_width, there, ignore_index, K)
        log_total = exact_log_total(corner_ptrs, shifts, fx, fy, stride_k, K)
        weight = (label != -1).to(tl.float32)
        if class_weights_ptr is not None:
            weight *= tl.load(class_weights_ptr + label, mask=label >= 0, other=0.0).to(tl.float32)
        place = own_place
        for k in range(K):
            top, rise = line(corner_ptrs, shifts, fx, k * stride_k)
            z = top + fy * rise - log_total
            p = (power_of_two(z) - (label == k).to(tl.float32)) * weight  # of a NaN it stays NaN
            p = tl.where(there, p, 0.0)
            if class_weights_ptr is not None:
                z *= weight
            loss -= tl.sum(tl.where(label == k, z, 0.0), axis=0)
            add_to_corners(place, p, fy * p, fx, lane, writes, chunk + row > 0, exists, CELLS, LANES)
            place += place_step
        loss += tl.sum(tl.where(label == FOREIGN, float("nan"), 0.0), axis=0)
        count += tl.sum((label != -1).to(tl.float32), axis=0)
        tl.debug_barrier()  # before the next row reads what other threads may have written
    return loss, count


SIZES = ["height", "width", "label_height", "label_width"]
STRIDES = ["stride_n", "stride_k", "stride_h", "stride_w"]


@triton.jit(do_not_specialize=["cells", *SIZES, "rows", "columns", *STRIDES, "ignore_index", "K"])
def cell_gradients_kernel(
    logits_ptr,
    labels_ptr,  # (N, label_height, label_width)
    class_weights_ptr,  # (K,), or None
    corners_ptr,  # (K, 4, cells), float32
    losses_ptr,  # (programs,), float32
    counts_ptr,  # (programs,), int32
    cells,  # of all images
    height,
    width,
    label_height,
    label_width,
    rows,  # of label pixels in the largest cell
    columns,
    stride_n,
    stride_k,
    stride_h,
    stride_w,
    ignore_index,
    K,
    ROWS: tl.constexpr,
    SERIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    CELLS: tl.constexpr,
    LANES: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
):
    """Compute loss, gradients of the corners and number of labelled pixels of CELLS cells. Bad labels make the loss NaN."""
    thread = tl.arange(0, CELLS * LANES)
    lane, own_cell = thread % LANES, tl.program_id(0) * CELLS + thread // LANES
    cell = tl.minimum(own_cell, cells - 1)
    cells_h, cells_w = last_cell(height, ALIGN_CORNERS) + 1, last_cell(width, ALIGN_CORNERS) + 1
    n, i, j = cell // cells_w // cells_h, cell // cells_w % cells_h, cell % cells_w
    corner_ptrs = corner_pointers(logits_ptr, n, i, j, height, width, stride_n, stride_h, stride_w, ALIGN_CORNERS)
    shifts = largest_logits(corner_ptrs, lane, stride_k, K, CELLS, LANES)
    first_y, first_x = (
        first_pixel(i, height, label_height, ALIGN_CORNERS),
        first_pixel(j, width, label_width, ALIGN_CORNERS),
    )
    end_y = tl.where(own_cell < cells, end_of_cell(i, height, label_height, ALIGN_CORNERS), first_y)
    end_x = end_of_cell(j, width, label_width, ALIGN_CORNERS)
    step = step_in_cell(i, height, label_height, ALIGN_CORNERS)  # of each thread, or of all of them
    writes, place_step = (lane < 4) & (own_cell < cells), 4 * cells.to(tl.int64)
    own_place = corners_ptr + (lane.to(tl.int64) * cells + cell)

    loss, count = tl.zeros((CELLS * LANES,), tl.float32), tl.zeros((CELLS * LANES,), tl.float32)
    chunks_x = tl.cdiv(columns, COLUMNS * LANES)
    for chunk in range(tl.cdiv(rows, ROWS) * chunks_x):
        y, left = first_y + chunk // chunks_x * ROWS, first_x + chunk % chunks_x * (COLUMNS * LANES)
        x = left[None] + lane[None] + tl.arange(0, COLUMNS)[:, None] * LANES
        rows_left = tl.where(x < end_x[None], (end_y - y)[None], 0)
        exists = (y < end_y) & (left < end_x)
        pixel_ptr = labels_ptr + ((n.to(tl.int64) * label_height + y)[None] * label_width + x)
        fx = tl.minimum(within_cell(x, j[None], width, label_width, ALIGN_CORNERS), 1.0)
        fy = within_cell(y, i, height, label_height, ALIGN_CORNERS)
        place = own_place
        labels, classes = read_labels(pixel_ptr, rows_left, label_width, ignore_index, K, ROWS)
        totals, steepest = series_totals(corner_ptrs, shifts, fx, fy, step, stride_k, K, ROWS, SERIES)
        weights, log_totals, least = shares(totals, labels, class_weights_ptr, K, ROWS)
        imprecise = exists[None] & ((least < LEAST_PRODUCT) | (steepest * SERIES > STEEPEST) | (K > MOST_CLASSES))
        if tl.max(tl.max(imprecise.to(tl.int32), axis=0), axis=0) != 0:
            exact_loss, exact_count = exact_gradients(
                own_place,
                pixel_ptr,
                class_weights_ptr,
                corner_ptrs,
                shifts,
                fx,
                fy,
                step,
                rows_left,
                lane,
                writes,
                exists,
                chunk,
                place_step,
                label_width,
                stride_k,
                ignore_index,
                K,
                ROWS,
                CELLS,
                LANES,
            )
            loss += exact_loss
            count += exact_count
        else:
            foreign, _ = label_weights(labels, FOREIGN & 0xFF, ROWS)
            loss += tl.sum(tl.where(foreign > 0.0, float("nan"), log_totals), axis=0)
            for k in range(K):
                top, rise = line(corner_ptrs, shifts, fx, k * stride_k)
                all_p, below_p = series_sums(weights, top, rise, fy, step, ROWS, SERIES)
                if (classes >> (k & 31)) & 1 != 0:
                    number, row_sum = label_weights(labels, k, ROWS)
                    below = fy[None] * number + step * row_sum
                    count += tl.sum(number, axis=0)
                    if class_weights_ptr is not None:
                        weight = tl.load(class_weights_ptr + k).to(tl.float32)
                        number *= weight
                        below *= weight
                    loss -= tl.sum(tl.where(number > 0.0, number * top + below * rise, 0.0), axis=0)
                    all_p -= number
                    below_p -= below
                add_to_corners(place, all_p, below_p, fx, lane, writes, chunk > 0, exists, CELLS, LANES)
                place += place_step
        tl.debug_barrier()  # before the next chunk reads what other threads may have written
    tl.store(losses_ptr + tl.program_id(0), tl.sum(loss, axis=0) * LN_2)
    tl.store(counts_ptr + tl.program_id(0), tl.sum(count.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["programs"])
def mean_loss_kernel(losses_ptr, counts_ptr, loss_ptr, share_ptr, programs, BLOCK: tl.constexpr):
    """Compute, in one program, the mean loss and the share 1 / |L| of a pixel."""
    losses, counts = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.int64)
    for first in range(0, programs, BLOCK):
        program = first + tl.arange(0, BLOCK)
        losses += tl.load(losses_ptr + program, mask=program < programs, other=0.0).to(tl.float64)
        counts += tl.load(counts_ptr + program, mask=program < programs, other=0).to(tl.int64)
    labelled = tl.maximum(tl.sum(counts, axis=0), 1).to(tl.float64)
    tl.store(loss_ptr, (tl.sum(losses, axis=0) / labelled).to(loss_ptr.dtype.element_ty))
    tl.store(share_ptr, (1.0 / labelled).to(tl.float32))


@triton.jit(do_not_specialize=["logits", "height", "width", *STRIDES])
def gather_corners_kernel(
    corners_ptr,  # (K, 4, cells)
    share_ptr,  # (1,)
    grad_ptr,
    logits,  # N · height · width
    height,
    width,
    stride_n,
    stride_k,
    stride_h,
    stride_w,
    K,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
):
    """Add up the gradient of each logit from the cells before and after it, along both axes.

    Outermost cells of pixels that all sit on one logit give everything to it, and nothing to the corners that lie beyond.
    """
    q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    k = tl.arange(0, BLOCK_K)
    n, i, j = q // width // height, q // width % height, q % width
    total = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    cells_h, cells_w = last_cell(height, ALIGN_CORNERS) + 1, last_cell(width, ALIGN_CORNERS) + 1
    cells = logits if ALIGN_CORNERS else logits // (height * width) * (cells_h * cells_w)
    for corner in tl.static_range(4):
        cell_i, cell_j = i + (cells_h - height) - corner // 2, j + (cells_w - width) - corner % 2
        exists = (q < logits) & (cell_i >= 0) & (cell_j >= 0)
        cell = (n * cells_h + cell_i) * cells_w + cell_j
        corner_ptr = corners_ptr + (k.to(tl.int64) * 4 + corner) * cells
        total += tl.load(corner_ptr[None, :] + cell[:, None], mask=exists[:, None] & (k < K)[None, :], other=0.0)
    total *= tl.load(share_ptr)
    place = n.to(tl.int64) * stride_n + i.to(tl.int64) * stride_h + j.to(tl.int64) * stride_w
    place = place[:, None] + k[None, :].to(tl.int64) * stride_k
    tl.store(grad_ptr + place, total.to(grad_ptr.dtype.element_ty), mask=(q < logits)[:, None] & (k < K)[None, :])
