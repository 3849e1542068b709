"""Dilated 3×3 convolution per channel, on a map whose norm is applied on load, with the sums for its own batch norm.

    y[p] = Σ_t weight[t] · v[p + shift_t]      v = relu(scale · x + offset) inside the map, 0 outside      t: nine taps
    ∂v[p] = Σ_t weight[t] · g[p - shift_t]     ∂weight[t] = Σ_p g[p - shift_t] · v[p]     g = grad + slope · y + intercept

A program keeps its columns, over (N, W) as one axis so that small maps waste no lanes, and walks down the rows of one phase of
rate_h after the other: rows phase, phase + rate_h, ... are neighbours to a tap. Forward, a row is loaded at three columns,
normalised, and added to three rows of outputs in flight. Backward, three rows of g at three columns stay in registers: they
give one row of ∂v and meet one row of v for the nine sums of ∂weight, which are added up over positions when the program ends.

Long columns are cut into segments, whose neighbour rows are loaded twice; short phases are walked by one program in turn. The
host chooses so that the programs fill the GPU evenly (`_RowPlan`). A loop begins and ends at rows that exist. A column outside
the map needs no select per value: forward and for ∂v its taps are 0, and the sums of ∂weight leave its lanes out.

The moments of a program's outputs are sums about an anchor, each lane's first output (with its own row in place of the row
below), as a large mean must not hide a small variance; the lanes' means and M2 are combined at the end.

Bytes per value of a map, of b bytes: forward 2·b (read x, write y), backward 4·b (read x, y, grad, write ∂x); from the caches
4·b and 8·b, as each row is read at three columns. Operations: 18 forward, 36 backward, plus 9 or 6 to normalise.

The rates are run-time arguments, so one compilation serves all 64 pairs.

Versions (not measured: no GPU was at hand; instructions of all warps at 8×256×49×49, bfloat16, compiled for sm_90)
  1. one launch per step: convolution, sums, normalisation, ReLU: reads and writes the map three times forward
  2. normalise on load, sums in the same launch: 1/3 of the bytes, 1/4 of the launches
  3. backward of input and weight in one pass: 4 instead of 7 maps of traffic; nine loads and norms per output: 18.0 M
     instructions forward; 29.6 M backward, which adds up over positions after every tile, behind 54 barriers; 12 and 8
     warps per multiprocessor
  4. this: 6.3 to 7.0 M forward, 10.9 to 13.9 M backward, by rate, without branches that programs skip; no barrier in a loop
     over rows, 20 and 16 warps; 98 partial sums instead of 301
  5. not taken: loading a row ahead forward too, 8 % more instructions and spills at 20 warps; four channels per thread
     backward instead of two, 12 % fewer instructions but 8 warps
"""

import triton
import triton.language as tl

from fast.kernels.triton.batch_norm import INTERPRETED, relu_of


@triton.jit
def load_columns(row_ptr, shift, masks):
    """Load a row at the columns of the three taps: left, own and right."""
    left, own, right = masks
    return (
        tl.load(row_ptr - shift, mask=left, other=0.0),
        tl.load(row_ptr, mask=own, other=0.0),
        tl.load(row_ptr + shift, mask=right, other=0.0),
    )


@triton.jit
def load_taps(weight_ptr, first: tl.constexpr, step: tl.constexpr, c, mask_c, left, right):
    """Load taps first, first + step, first + 2 · step as factors of the left, own and right column; 0 outside the map."""
    tap_ptr = weight_ptr + c * 9 + first
    at_left = tl.load(tap_ptr, mask=mask_c, other=0.0).to(tl.float32)
    own = tl.load(tap_ptr + step, mask=mask_c, other=0.0).to(tl.float32)
    at_right = tl.load(tap_ptr + 2 * step, mask=mask_c, other=0.0).to(tl.float32)
    return tl.where(left[:, None], at_left[None, :], 0.0), own[None, :], tl.where(right[:, None], at_right[None, :], 0.0)


@triton.jit
def load_row_vector(vector_ptr, c, mask_c):
    """Load a vector of the channels: (1, BLOCK_C)."""
    return tl.load(vector_ptr + c, mask=mask_c, other=0.0)[None, :]


@triton.jit
def to_float32(x):
    """In float32. Of two bfloat16 in a register each takes one instruction; the compiler would unpack the second by two.

    Only a GPU runs this assembly, so only tests on a GPU cover it.
    """
    if x.dtype == tl.bfloat16 and not INTERPRETED:
        bits = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=&r,=r,r", [x], dtype=tl.int32, is_pure=True, pack=2
        )
        x = bits.to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def value_of(raw, scale, offset):
    """The value of a map in float32; at a masked lane relu(offset), which the taps must not count."""
    value = to_float32(raw)
    if scale is not None:
        value = relu_of(value, scale, offset)
    return value


@triton.jit
def load_values(row_ptr, shift, masks, scale, offset):
    """Load v of a row at three columns."""
    raws = load_columns(row_ptr, shift, masks)
    return value_of(raws[0], scale, offset), value_of(raws[1], scale, offset), value_of(raws[2], scale, offset)


@triton.jit
def add_products(total, row, taps):
    """Add a row at three columns times its taps."""
    total += row[0] * taps[0]
    total += row[1] * taps[1]
    total += row[2] * taps[2]
    return total


@triton.jit
def columns_of(tile, c, columns, height, width, rate_w, C, BLOCK_P: tl.constexpr):
    """Where a tile's columns begin, (BLOCK_P, BLOCK_C), and where there is a left, an own and a right one: (BLOCK_P,)."""
    q = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    n, w = q // width, q % width
    place = (n.to(tl.int64) * height * width + w)[:, None] * C + c[None, :]
    own = q < columns
    return place, own & (w >= rate_w), own, own & (w < width - rate_w)


@triton.jit
def rows_of(group, height, rate_h, segment_rows, program_phases, phase_groups):
    """The first row of a group's segment, counted in its phase; its phases, first and end; rows of a phase, longer phases."""
    first_phase = group % phase_groups * program_phases
    end_phase = tl.minimum(first_phase + program_phases, tl.minimum(rate_h, height))
    rows = height // rate_h
    return group // phase_groups * segment_rows, first_phase, end_phase, rows, height - rows * rate_h


@triton.jit
def add_deviations(out, anchor, total, squares):
    """Add stored values to a lane's sums of deviations and of their squares."""
    deviation = out.to(tl.float32) - anchor  # `to_float32` would spill on sm_80, for 4 instructions of 114
    return total + deviation, squares + deviation * deviation


@triton.jit
def store_lanes_moments(partials_ptr, counts_ptr, tile, anchor, total, squares, lanes, num_rows, own, c, C):
    """Combine the moments of the lanes, num_rows values each, where there is a column; partials: (tiles, 2, C)."""
    lane_size = num_rows.to(tl.float32)
    deviation = total / lane_size
    lane_mean = anchor + deviation
    mean = tl.sum(tl.where(own[:, None], lane_mean, 0.0), axis=0) / lanes  # (BLOCK_C,)
    centred = lane_mean - mean[None, :]
    squares = tl.where(own[:, None], squares - total * deviation + lane_size * centred * centred, 0.0)
    row_ptr = partials_ptr + tile.to(tl.int64) * 2 * C
    tl.store(row_ptr + c, mean, mask=c < C)
    tl.store(row_ptr + C + c, tl.sum(squares, axis=0), mask=c < C)
    tl.store(counts_ptr + tile, lanes * num_rows)  # the same from every tile of channels


@triton.jit(
    do_not_specialize=[
        *("columns", "height", "width", "rate_h", "rate_w"),
        *("segment_rows", "program_phases", "phase_groups", "groups"),
    ]
)
def depthwise_forward_kernel(
    x_ptr,  # (N, height, width, C)
    scale_ptr,  # (C,), or None
    offset_ptr,
    weight_ptr,  # (C, 9)
    out_ptr,  # (N, height, width, C)
    partials_ptr,  # (tiles, 2, C), or None
    counts_ptr,  # (tiles,), or None
    columns,  # N · width
    height,
    width,
    rate_h,
    rate_w,
    segment_rows,  # of one phase, in each group of rows; these four are the host's `_RowPlan`
    program_phases,  # that a group has
    phase_groups,  # that share out the phases of the same segment
    groups,  # in all: phase_groups for each segment
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute a segment of some phases at BLOCK_P columns and BLOCK_C channels, and the moments of all together."""
    tiles_c = tl.cdiv(C, BLOCK_C)
    tile = tl.program_id(0) // tiles_c
    c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    place, left, own, right = columns_of(tile // groups, c, columns, height, width, rate_w, C, BLOCK_P)
    first, first_phase, end_phase, full_rows, longer = rows_of(
        tile % groups, height, rate_h, segment_rows, program_phases, phase_groups
    )
    mask = own[:, None] & mask_c[None, :]
    masks = left[:, None] & mask_c[None, :], mask, right[:, None] & mask_c[None, :]
    shift, stride = rate_w.to(tl.int64) * C, rate_h.to(tl.int64) * width * C
    upper = load_taps(weight_ptr, 0, 1, c, mask_c, left, right)
    middle = load_taps(weight_ptr, 3, 1, c, mask_c, left, right)
    lower = load_taps(weight_ptr, 6, 1, c, mask_c, left, right)
    scale, offset = None, None
    if scale_ptr is not None:
        scale, offset = load_row_vector(scale_ptr, c, mask_c), load_row_vector(offset_ptr, c, mask_c)

    zero = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    anchor, total, squares, num_rows = zero, zero, zero, 0
    for phase in range(first_phase, end_phase):
        rows = full_rows + (phase < longer).to(tl.int32)
        end = tl.minimum(first + segment_rows, rows)
        x_row = x_ptr + place + (phase + first * rate_h).to(tl.int64) * width * C
        out_row = out_ptr + place + (phase + first * rate_h).to(tl.int64) * width * C
        here = zero  # the sum so far of the next row that is finished
        if first > 0:
            here = add_products(zero, load_values(x_row - stride, shift, masks, scale, offset), upper)
        row = load_values(x_row, shift, masks, scale, offset)
        here, below = add_products(here, row, middle), add_products(zero, row, upper)
        if partials_ptr is not None and phase == first_phase:
            anchor = here
            if rows > 1:
                anchor = add_products(here, row, lower)
        for _ in range(first, tl.minimum(end, rows - 1)):
            x_row += stride
            row = load_values(x_row, shift, masks, scale, offset)
            out = add_products(here, row, lower).to(out_ptr.dtype.element_ty)
            here, below = add_products(below, row, middle), add_products(zero, row, upper)
            tl.store(out_row, out, mask=mask)
            out_row += stride
            if partials_ptr is not None:  # of the rounded values, to which the norm will be applied
                total, squares = add_deviations(out, anchor, total, squares)
        if end == rows:  # no row below
            last_row = out_ptr + place + (phase + (rows - 1) * rate_h).to(tl.int64) * width * C
            out = here.to(out_ptr.dtype.element_ty)
            tl.store(last_row, out, mask=mask)
            if partials_ptr is not None:
                total, squares = add_deviations(out, anchor, total, squares)
        num_rows += end - first
    if partials_ptr is not None:
        lanes = tl.minimum(columns - tile // groups * BLOCK_P, BLOCK_P).to(tl.float32)
        store_lanes_moments(partials_ptr, counts_ptr, tile, anchor, total, squares, lanes, num_rows, own, c, C)


@triton.jit
def load_gradients(grad_ptr, raw_ptr, place, shift, masks, slope, intercept):
    """Load g of a row at three columns; at a masked lane the intercept, which neither taps nor sums must count."""
    grads = load_columns(grad_ptr + place, shift, masks)
    left, own, right = to_float32(grads[0]), to_float32(grads[1]), to_float32(grads[2])
    if slope is not None:
        raws = load_columns(raw_ptr + place, shift, masks)
        left += to_float32(raws[0]) * slope + intercept
        own += to_float32(raws[1]) * slope + intercept
        right += to_float32(raws[2]) * slope + intercept
    return left, own, right


@triton.jit
def add_value_times(sums, value, row):
    """Add v times a row of g at three columns to the sums of three taps."""
    return sums[0] + value * row[0], sums[1] + value * row[1], sums[2] + value * row[2]


@triton.jit
def row_backward(x, scale, offset, above, here, below, taps, sums, norm_sums, grad_x_ptr, place, mask):
    """One row: its share in the sums of the weight, of scale and offset, and its gradient, which is stored."""
    x = to_float32(x)
    value = value_of(x, scale, offset)
    upper, middle, lower = sums  # the row below reads this one by its upper taps
    sums = add_value_times(upper, value, below), add_value_times(middle, value, here), add_value_times(lower, value, above)
    if grad_x_ptr is not None:
        grad_value = add_products(tl.zeros(x.shape, tl.float32), above, taps[2])
        grad_value = add_products(add_products(grad_value, here, taps[1]), below, taps[0])  # what is loaded last, last
        if scale is not None:
            grad_value = tl.where(value > 0.0, grad_value, 0.0)
            norm_sums = norm_sums[0] + grad_value * x, norm_sums[1] + grad_value
            grad_value *= scale
        tl.store(grad_x_ptr + place, grad_value.to(grad_x_ptr.dtype.element_ty), mask=mask)
    return sums, norm_sums


@triton.jit
def store_sum(row_ptr, lanes, where, mask_c):
    """Add up the lanes of a program's columns, where there are such: (BLOCK_P, BLOCK_C) -> (BLOCK_C,)."""
    tl.store(row_ptr, tl.sum(tl.where(where[:, None], lanes, 0.0), axis=0), mask=mask_c)


@triton.jit(
    do_not_specialize=[
        *("columns", "height", "width", "rate_h", "rate_w"),
        *("segment_rows", "program_phases", "phase_groups", "groups"),
    ]
)
def depthwise_backward_kernel(
    grad_ptr,  # (N, height, width, C)
    raw_ptr,  # (N, height, width, C), the forward's output
    slope_ptr,  # (C,), or None
    intercept_ptr,
    x_ptr,  # (N, height, width, C)
    scale_ptr,  # (C,), or None
    offset_ptr,
    weight_ptr,  # (C, 9)
    grad_x_ptr,  # (N, height, width, C), or None
    partials_ptr,  # (tiles, ROWS, C): nine for the weight, then scale and offset
    columns,  # N · width
    height,
    width,
    rate_h,
    rate_w,
    segment_rows,  # of one phase, in each group of rows; these four are the host's `_RowPlan`
    program_phases,  # that a group has
    phase_groups,  # that share out the phases of the same segment
    groups,  # in all: phase_groups for each segment
    C,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute x's gradient as the forward walks, and the program's share in the gradients of weight, scale and offset."""
    tiles_c = tl.cdiv(C, BLOCK_C)
    tile = tl.program_id(0) // tiles_c
    c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    place, left, own, right = columns_of(tile // groups, c, columns, height, width, rate_w, C, BLOCK_P)
    first, first_phase, end_phase, full_rows, longer = rows_of(
        tile % groups, height, rate_h, segment_rows, program_phases, phase_groups
    )
    mask = own[:, None] & mask_c[None, :]
    masks = left[:, None] & mask_c[None, :], mask, right[:, None] & mask_c[None, :]
    shift, stride = rate_w.to(tl.int64) * C, rate_h.to(tl.int64) * width * C
    # From x back to the outputs: the one in the left column reads x by its right tap.
    upper = load_taps(weight_ptr, 2, -1, c, mask_c, left, right)
    middle = load_taps(weight_ptr, 5, -1, c, mask_c, left, right)
    lower = load_taps(weight_ptr, 8, -1, c, mask_c, left, right)
    taps = upper, middle, lower
    scale, offset = None, None
    if scale_ptr is not None:
        scale, offset = load_row_vector(scale_ptr, c, mask_c), load_row_vector(offset_ptr, c, mask_c)
    slope, intercept = None, None
    if slope_ptr is not None:
        slope, intercept = load_row_vector(slope_ptr, c, mask_c), load_row_vector(intercept_ptr, c, mask_c)

    zero = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    none = zero, zero, zero
    sums, norm_sums = (none, none, none), (zero, zero)
    for phase in range(first_phase, end_phase):
        rows = full_rows + (phase < longer).to(tl.int32)
        end = tl.minimum(first + segment_rows, rows)
        row = place + (phase + first * rate_h).to(tl.int64) * width * C
        above = none
        if first > 0:
            above = load_gradients(grad_ptr, raw_ptr, row - stride, shift, masks, slope, intercept)
        here = load_gradients(grad_ptr, raw_ptr, row, shift, masks, slope, intercept)
        x = tl.load(x_ptr + row, mask=mask, other=0.0)
        for _ in range(first, tl.minimum(end, rows - 1)):
            x_below = tl.load(x_ptr + row + stride, mask=mask, other=0.0)  # a row ahead, to work on while g is on its way
            below = load_gradients(grad_ptr, raw_ptr, row + stride, shift, masks, slope, intercept)
            sums, norm_sums = row_backward(x, scale, offset, above, here, below, taps, sums, norm_sums, grad_x_ptr, row, mask)
            above, here, x = here, below, x_below
            row += stride
        if end == rows:  # no row below
            last = place + (phase + (rows - 1) * rate_h).to(tl.int64) * width * C
            sums, norm_sums = row_backward(x, scale, offset, above, here, none, taps, sums, norm_sums, grad_x_ptr, last, mask)

    row_ptr = partials_ptr + tile.to(tl.int64) * ROWS * C + c
    for tap in tl.static_range(0, 9, 3):
        store_sum(row_ptr + tap * C, sums[tap // 3][2], right, mask_c)  # the left tap of the output to the right
        store_sum(row_ptr + (tap + 1) * C, sums[tap // 3][1], own, mask_c)
        store_sum(row_ptr + (tap + 2) * C, sums[tap // 3][0], left, mask_c)
    if ROWS > 9:
        store_sum(row_ptr + 9 * C, norm_sums[0], own, mask_c)
        store_sum(row_ptr + 10 * C, norm_sums[1], own, mask_c)
