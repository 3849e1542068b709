"""1×1 convolution of B concatenated maps whose norms are applied on load: one matrix product, without a concatenated map.

    y[p, o] = Σ_b Σ_c v_b[p, c] · weight[o, column_b + c]          v_b = dropout(relu(scale_b · x_b + offset_b))
    ∂v_b[p, c] = Σ_o g[p, o] · weight[o, column_b + c]             ∂weight[o, column_b + c] = Σ_p g[p, o] · v_b[p, c]
    g = grad + slope · y + intercept

Bytes, for P positions, C channels of all maps and K outputs, of b bytes each: forward P·(C + K)·b + 4·C·K, backward P·(2·C +
2·K)·b + 8·C·K. Operations: 2·P·C·K forward, twice that backward. At 256 → 256 channels in 16 bits that is 128 operations per
byte, below the 200 of an H200: memory-bound, closely.

How a list of maps is passed: one launch per map would read and write a float32 sum of P·K values for each. A table of
pointers in device memory must be copied there from the host, which a captured graph cannot do. So the pointers are a tuple
of arguments, with one compilation per number of maps (at most ten; two in practice: one map, and the cell's). The map that a
step of the loop reads is chosen at run time among the B, so the code does not grow with B and loads are pipelined across
maps. Whether a map is normalised is one bit of an integer, because 2^B patterns would take 2^B compilations.

Dropout draws 16 bits for an element from Philox at (position, channel // 8, column_b): eight elements share one draw of 128
bits, as one draw each would cost more than the product. The backward pass draws the same bits again, so no mask is stored.

Versions (not measured: no GPU was at hand)
  1. concatenate, dropout, product, norm, ReLU: four passes over B·C channels before the product
  2. this: expected 1/4 of the bytes, one launch instead of six
  3. gradient of all maps from one program that holds g: expected to save B - 1 reads of g from the L2 cache, not done
"""

import triton
import triton.language as tl

from fast.kernels.triton.batch_norm import relu_of, store_moments


@triton.jit
def choose_map(step, raws, scales, offsets, channels, columns, BLOCK_K: tl.constexpr):
    """Find the map of block `step` of BLOCK_K channels: pointers, channels, column, index, the block's first channel."""
    raw_ptr, scale_ptr, offset_ptr = raws[0], scales[0], offsets[0]
    width, column, chosen, first_step, end = channels[0], columns[0], 0, 0, 0
    for b in tl.static_range(1, len(raws)):
        end += tl.cdiv(channels[b - 1], BLOCK_K)
        later = step >= end
        raw_ptr = tl.where(later, raws[b], raw_ptr)
        scale_ptr = tl.where(later, scales[b], scale_ptr)
        offset_ptr = tl.where(later, offsets[b], offset_ptr)
        width = tl.where(later, channels[b], width)
        column = tl.where(later, columns[b], column)
        chosen = tl.where(later, b, chosen)
        first_step = tl.where(later, end, first_step)
    return raw_ptr, scale_ptr, offset_ptr, width, column, chosen, (step - first_step) * BLOCK_K


@triton.jit
def load_norm(scale_ptr, offset_ptr, normed, k, mask_k):
    """Load scale, offset and lower bound of the ReLU for channels k; 1, 0 and -inf if the map is not normalised."""
    is_normed = (k * 0 + normed) != 0  # a vector, so the pointers are not read where it is false
    scale = tl.load(scale_ptr + k, mask=mask_k & is_normed, other=1.0)
    offset = tl.load(offset_ptr + k, mask=mask_k & is_normed, other=0.0)
    return scale, offset, tl.where(is_normed, 0.0, float("-inf"))


@triton.jit
def keep_mask(seed, p, first_k, column, drop_below, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mask of the elements (BLOCK_P, BLOCK_K) of a map that dropout keeps: 16 random bits each, at least `drop_below`."""
    group = first_k // 8 + tl.arange(0, BLOCK_K // 8)
    zero = tl.zeros((BLOCK_P, BLOCK_K // 8), tl.int32)
    r0, r1, r2, r3 = tl.philox(
        seed,
        (zero + p[:, None]).to(tl.uint32),
        (zero + group[None, :]).to(tl.uint32),
        (zero + column).to(tl.uint32),
        zero.to(tl.uint32),
    )
    words = tl.join(tl.join(r0, r1), tl.join(r2, r3))  # (BLOCK_P, BLOCK_K / 8, 2, 2)
    bits = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK_P, BLOCK_K))
    return bits.to(tl.int32) >= drop_below


@triton.jit
def load_value(
    raw_ptr,
    scale_ptr,
    offset_ptr,
    normed,
    p,
    mask_p,
    k,
    width,
    column,
    seed_ptr,
    first_k,
    drop_below,
    keep_scale,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Load v_b at (BLOCK_P, BLOCK_K), float32; 0 outside."""
    mask_k = k < width
    mask = mask_p[:, None] & mask_k[None, :]
    raw = tl.load(raw_ptr + p[:, None].to(tl.int64) * width + k[None, :], mask=mask, other=0.0).to(tl.float32)
    scale, offset, floor = load_norm(scale_ptr, offset_ptr, normed, k, mask_k)
    value = raw * scale[None, :] + offset[None, :]
    value = tl.where(mask, tl.where(value < floor[None, :], floor[None, :], value), 0.0)
    if seed_ptr is not None:
        keep = keep_mask(tl.load(seed_ptr), p, first_k, column, drop_below, BLOCK_P, BLOCK_K)
        value = tl.where(keep, value * keep_scale, 0.0)
    return value


@triton.jit
def load_gradient(grad_ptr, raw_ptr, slope_ptr, intercept_ptr, p, mask_p, o, C_OUT):
    """Load g at (positions p, outputs o), float32; 0 outside."""
    mask_o = o < C_OUT
    mask = mask_p[:, None] & mask_o[None, :]
    place = p[:, None].to(tl.int64) * C_OUT + o[None, :]
    grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + o, mask=mask_o, other=0.0)
        intercept = tl.load(intercept_ptr + o, mask=mask_o, other=0.0)
        raw = tl.load(raw_ptr + place, mask=mask, other=0.0).to(tl.float32)
        grad = tl.where(mask, grad + slope[None, :] * raw + intercept[None, :], 0.0)
    return grad


@triton.jit
def multiply_add(a, b, total, dtype: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """total + a · b, with operands rounded to `dtype` or to TF32, whose unit would only cut off bits."""
    a, b = a.to(dtype), b.to(dtype)
    if INPUT_PRECISION == "tf32":
        a, b = rounded_to_tf32(a), rounded_to_tf32(b)
    return tl.dot(a, b, total, input_precision=INPUT_PRECISION)


@triton.jit
def rounded_to_tf32(x):
    """Round to 11 bits, to nearest as libraries do; infinities and NaN stay."""
    bits = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1)
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["positions", "normed_bits", "drop_below"])
def pointwise_forward_kernel(
    raws,  # B pointers to (positions, channels of the map)
    scales,  # B pointers to (channels,), not read where the map's bit of normed_bits is 0
    offsets,
    channels,
    columns,  # where each map's channels begin among the weight's
    weight_ptr,  # (C_OUT, C)
    seed_ptr,  # (1,), or None for no dropout
    norm_scale_ptr,  # (C_OUT,), of a frozen norm to be applied, with its ReLU; or None
    norm_offset_ptr,
    out_ptr,  # (positions, C_OUT)
    partials_ptr,  # (tiles, 2, C_OUT), or None
    positions,
    normed_bits,
    drop_below,
    keep_scale,
    C,
    C_OUT,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Compute one tile of positions and outputs, and its moments."""
    tiles_n = tl.cdiv(C_OUT, BLOCK_N)
    tile = tl.program_id(0) // tiles_n
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    o = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_p, mask_o = p < positions, o < C_OUT
    dtype = out_ptr.dtype.element_ty
    num_steps = 0
    for b in tl.static_range(len(raws)):
        num_steps += tl.cdiv(channels[b], BLOCK_K)

    out = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for step in range(num_steps):
        raw_ptr, scale_ptr, offset_ptr, width, column, chosen, first_k = choose_map(
            step, raws, scales, offsets, channels, columns, BLOCK_K
        )
        k = first_k + tl.arange(0, BLOCK_K)
        value = load_value(
            raw_ptr,
            scale_ptr,
            offset_ptr,
            (normed_bits >> chosen) & 1,
            p,
            mask_p,
            k,
            width,
            column,
            seed_ptr,
            first_k,
            drop_below,
            keep_scale,
            BLOCK_P,
            BLOCK_K,
        )
        weight_place = o[None, :].to(tl.int64) * C + (column + k)[:, None]
        weight = tl.load(weight_ptr + weight_place, mask=(k < width)[:, None] & mask_o[None, :], other=0.0)
        out = multiply_add(value, weight, out, dtype, INPUT_PRECISION)

    if norm_scale_ptr is not None:
        scale = tl.load(norm_scale_ptr + o, mask=mask_o, other=0.0)
        offset = tl.load(norm_offset_ptr + o, mask=mask_o, other=0.0)
        out = relu_of(out, scale[None, :], offset[None, :])
    stored = out.to(dtype)
    tl.store(out_ptr + p[:, None].to(tl.int64) * C_OUT + o[None, :], stored, mask=mask_p[:, None] & mask_o[None, :])
    if partials_ptr is not None:  # from the rounded values, to which the norm will be applied
        store_moments(partials_ptr, stored.to(tl.float32), tile, mask_p, o, C_OUT)


@triton.jit(do_not_specialize=["positions", "normed_bits", "drop_below"])
def pointwise_input_gradient_kernel(
    grad_ptr,  # (positions, C_OUT)
    raw_ptr,  # (positions, C_OUT), the forward's output
    slope_ptr,  # (C_OUT,), or None
    intercept_ptr,
    raws,
    scales,
    offsets,
    channels,
    columns,
    grad_maps,  # pointers to (positions, channels of the map)
    weight_ptr,  # (C_OUT, C)
    seed_ptr,
    partials_ptr,  # (tiles, 2, C), of the gradients of scale and offset; None if no map is normalised
    positions,
    normed_bits,
    drop_below,
    keep_scale,
    C,
    C_OUT,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Compute one tile of positions and BLOCK_N channels of one map's gradient, BLOCK_K outputs at a time."""
    tiles_n = 0
    for b in tl.static_range(len(raws)):
        tiles_n += tl.cdiv(channels[b], BLOCK_N)
    step, tile = tl.program_id(0) % tiles_n, tl.program_id(0) // tiles_n
    x_ptr, scale_ptr, offset_ptr, width, column, chosen, first_c = choose_map(
        step, raws, scales, offsets, channels, columns, BLOCK_N
    )
    grad_x_ptr = grad_maps[0]
    for b in tl.static_range(1, len(raws)):
        grad_x_ptr = tl.where(chosen == b, grad_maps[b], grad_x_ptr)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    c = first_c + tl.arange(0, BLOCK_N)
    mask_p, mask_c = p < positions, c < width
    dtype = grad_ptr.dtype.element_ty

    grad_value = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for first_o in range(0, C_OUT, BLOCK_K):
        o = first_o + tl.arange(0, BLOCK_K)
        grad = load_gradient(grad_ptr, raw_ptr, slope_ptr, intercept_ptr, p, mask_p, o, C_OUT)  # (BLOCK_P, BLOCK_K)
        weight_place = o[:, None].to(tl.int64) * C + (column + c)[None, :]
        weight = tl.load(weight_ptr + weight_place, mask=(o < C_OUT)[:, None] & mask_c[None, :], other=0.0)
        grad_value = multiply_add(grad, weight, grad_value, dtype, INPUT_PRECISION)

    if seed_ptr is not None:
        keep = keep_mask(tl.load(seed_ptr), p, first_c, column, drop_below, BLOCK_P, BLOCK_N)
        grad_value = tl.where(keep, grad_value * keep_scale, 0.0)
    own_place = p[:, None].to(tl.int64) * width + c[None, :]
    own_mask = mask_p[:, None] & mask_c[None, :]
    if partials_ptr is not None:
        scale, offset, floor = load_norm(scale_ptr, offset_ptr, (normed_bits >> chosen) & 1, c, mask_c)
        x = tl.load(x_ptr + own_place, mask=own_mask, other=0.0).to(tl.float32)
        grad_value = tl.where(own_mask & (x * scale[None, :] + offset[None, :] > floor[None, :]), grad_value, 0.0)
        row_ptr = partials_ptr + tile.to(tl.int64) * 2 * C + column
        tl.store(row_ptr + c, tl.sum(grad_value * x, axis=0), mask=mask_c)
        tl.store(row_ptr + C + c, tl.sum(grad_value, axis=0), mask=mask_c)
        grad_value *= scale[None, :]
    tl.store(grad_x_ptr + own_place, grad_value.to(grad_x_ptr.dtype.element_ty), mask=own_mask)


@triton.jit(do_not_specialize=["positions", "normed_bits", "drop_below", "split_size"])
def pointwise_weight_gradient_kernel(
    grad_ptr,  # (positions, C_OUT)
    raw_ptr,
    slope_ptr,
    intercept_ptr,
    raws,
    scales,
    offsets,
    channels,
    columns,
    seed_ptr,
    partials_ptr,  # (splits, C_OUT, C)
    positions,
    normed_bits,
    drop_below,
    keep_scale,
    split_size,  # positions of one split, a multiple of BLOCK_K
    C,
    C_OUT,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Sum BLOCK_P outputs × BLOCK_N channels of one map over one split of the positions, BLOCK_K at a time."""
    tiles_n, tiles_o = 0, tl.cdiv(C_OUT, BLOCK_P)
    for b in tl.static_range(len(raws)):
        tiles_n += tl.cdiv(channels[b], BLOCK_N)
    program = tl.program_id(0)
    split, o_tile, step = program // (tiles_n * tiles_o), program // tiles_n % tiles_o, program % tiles_n
    x_ptr, scale_ptr, offset_ptr, width, column, chosen, first_c = choose_map(
        step, raws, scales, offsets, channels, columns, BLOCK_N
    )
    o = o_tile * BLOCK_P + tl.arange(0, BLOCK_P)
    c = first_c + tl.arange(0, BLOCK_N)
    dtype = grad_ptr.dtype.element_ty

    grad_weight = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    first, end = split * split_size, tl.minimum((split + 1) * split_size, positions)
    for first_p in range(first, end, BLOCK_K):
        p = first_p + tl.arange(0, BLOCK_K)
        mask_p = p < end
        grad = load_gradient(grad_ptr, raw_ptr, slope_ptr, intercept_ptr, p, mask_p, o, C_OUT)  # (BLOCK_K, BLOCK_P)
        value = load_value(
            x_ptr,
            scale_ptr,
            offset_ptr,
            (normed_bits >> chosen) & 1,
            p,
            mask_p,
            c,
            width,
            column,
            seed_ptr,
            first_c,
            drop_below,
            keep_scale,
            BLOCK_K,
            BLOCK_N,
        )
        grad_weight = multiply_add(tl.trans(grad.to(dtype)), value, grad_weight, dtype, INPUT_PRECISION)

    row_ptr = partials_ptr + split.to(tl.int64) * C_OUT * C
    place = o[:, None].to(tl.int64) * C + (column + c)[None, :]
    tl.store(row_ptr + place, grad_weight, mask=(o < C_OUT)[:, None] & (c < width)[None, :])
