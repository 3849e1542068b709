"""1×1 convolution of B concatenated maps whose norms are applied on load: one matrix product, without a concatenated map.

    y[p, o] = Σ_b Σ_c v_b[p, c] · weight[o, column_b + c]          v_b = dropout(relu(scale_b · x_b + offset_b))
    ∂v_b[p, c] = Σ_o g[p, o] · weight[o, column_b + c]             ∂weight[o, column_b + c] = Σ_p g[p, o] · v_b[p, c]
    g = grad + slope · y + intercept

Bytes, for P positions, C channels of all maps and K outputs, of b bytes each: forward P·(C + K)·b, backward P·(2·C + 2·K)·b
for the weight and P·(2·C + K)·b for the maps, and 4·C·K for each use of the weight. Operations: 2·P·C·K forward, twice that
backward. At 256 → 256 channels in 16 bits that is 128 operations per byte, below the 200 of an H200: memory-bound, closely.

Operands: what a tile of a product would round again for every other tile is rounded once. The weight, by a launch of its own,
with the summed axis last (what TF32's unit wants), and for the backward pass transposed. g, by the kernel of the weight's
gradient, whose first tile along the channels stores it; if many tiles need it, by a launch before that kernel. So the kernel
of the maps' gradient multiplies what it copies to shared memory, without a register between.

How a list of maps is passed: one launch per map would read and write a float32 sum of P·K values for each. A table of
pointers in device memory must be copied there from the host, which a captured graph cannot do. So the pointers are a tuple
of arguments, with one compilation per number of maps (at most ten; two in practice: one map, and the cell's). The map that a
step of the loop reads is chosen at run time among the B, so the code does not grow with B and loads are pipelined across
maps. Whether a map is normalised is one bit of an integer, because 2^B patterns would take 2^B compilations.

Dropout draws 16 bits for an element from Philox at (position, channel // 8, column_b): eight elements share one draw of 128
bits, as one draw each would cost more than the product. The backward pass draws the same bits again, so no mask is stored. Its
factor 1 / (1 - rate) is that of all elements, so it is applied to sums.

Versions (not measured: no GPU was at hand). Counts are warp instructions and bytes from the L2 cache of the seven products of
a training iteration in bfloat16 (five branches, projection, classifier; 8·49·49 positions) as compiled for sm_90: forward,
gradient of the weight, gradient of the maps.
  1. concatenate, dropout, product, norm, ReLU: four passes over B·C channels before the product
  2. one launch, norms applied on load, weights and g rounded by every tile: 128 M + 100 M + 118 M, 1.10 + 0.74 + 1.07 GB, one
     program of 8 warps on a multiprocessor
  3. weights and g rounded once: 109 M + 102 M + 67 M, 0.69 + 0.80 + 0.65 GB
  4. this, with larger tiles, 64-bit products in Philox, moments from values whose threads hold columns, no masks where sizes
     are multiples of the tiles, epilogues by halves: 40 M + 51 M + 55 M, 0.59 + 0.61 + 0.65 GB; on a multiprocessor two
     programs of 4 warps forward, one of 8 for the weight, two (256 channels) or one (more) of 8 for the maps
  5. the mask of dropout as bits, written by one kernel and read by the others: expected to save 5 M, not done
  6. gradient of all maps from one program that holds g: expected to save B - 1 reads of g from the L2 cache, not done
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
def within(index, size, WHOLE: tl.constexpr):
    """index < size, which is known, and costs nothing, where sizes are WHOLE multiples of the tile."""
    return tl.full(index.shape, True, tl.int1) if WHOLE else index < size


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
    zero = tl.zeros((BLOCK_P, BLOCK_K // 8), tl.uint32)
    r0, r1, r2, r3 = philox(seed.to(tl.uint64), zero + p[:, None].to(tl.uint32), zero + group[None, :].to(tl.uint32), column)
    words = tl.join(tl.join(r0, r1), tl.join(r2, r3))  # (BLOCK_P, BLOCK_K / 8, 2, 2)
    # Compared where they stand, in the upper half of a word: what lies below them decides nothing, and is not masked out.
    bits = tl.reshape(tl.join(words << 16, words), (BLOCK_P, BLOCK_K))
    return bits >= drop_below.to(tl.uint32) << 16


@triton.jit
def philox(seed, c0, c1, column):
    """128 random bits of Philox 4×32-10 for each counter (c0, c1, column, 0), as four words.

    As `tl.philox`, but with a product of 64 bits for each pair of its halves: one instruction, where that takes two.
    """
    c2, c3 = tl.zeros_like(c0) + column.to(tl.uint32), tl.zeros_like(c0)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        first, second = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (second >> 32).to(tl.uint32) ^ c1 ^ k0, second.to(tl.uint32)
        c2, c3 = (first >> 32).to(tl.uint32) ^ c3 ^ k1, first.to(tl.uint32)
        k0, k1 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False), tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def load_value(
    raw_ptr,
    scale_ptr,
    offset_ptr,
    normed,
    first_p,
    row,  # (BLOCK_P,), from first_p on, inside the map
    width,
    column,
    seed,  # None for no dropout
    first_k,
    drop_below,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Load v_b at (BLOCK_P, BLOCK_K), float32, but for dropout's factor; 0 at channels outside."""
    k = first_k + tl.arange(0, BLOCK_K)
    mask_k = within(k, width, WHOLE)
    place = row[:, None] * width + k[None, :]
    tile_ptr = raw_ptr + first_p.to(tl.int64) * width
    raw = tl.load(tile_ptr + place, mask=tl.broadcast_to(mask_k[None, :], place.shape), other=0.0).to(tl.float32)
    scale, offset, floor = load_norm(scale_ptr, offset_ptr, normed, k, mask_k)
    normal = raw * scale[None, :] + offset[None, :]
    value = tl.maximum(normal, tl.broadcast_to(floor[None, :], normal.shape), propagate_nan=tl.PropagateNan.ALL)
    if seed is not None:
        value = tl.where(keep_mask(seed, first_p + row, first_k, column, drop_below, BLOCK_P, BLOCK_K), value, 0.0)
    return value


@triton.jit
def load_gradient(grad_ptr, raw_ptr, slope_ptr, intercept_ptr, first_p, row, mask_p, o, mask_o, C_OUT):
    """Load g at (positions first_p + row, outputs o), float32; 0 outside."""
    mask = mask_p[:, None] & mask_o[None, :]
    first, place = first_p.to(tl.int64) * C_OUT, row[:, None] * C_OUT + o[None, :]
    grad = tl.load(grad_ptr + first + place, mask=mask, other=0.0).to(tl.float32)
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + o, mask=mask_o, other=0.0)
        intercept = tl.load(intercept_ptr + o, mask=mask_o, other=0.0)
        raw = tl.load(raw_ptr + first + place, mask=mask, other=0.0).to(tl.float32)
        grad = tl.where(mask_p[:, None], grad + slope[None, :] * raw + intercept[None, :], 0.0)
    return grad


@triton.jit
def multiply_add(a, b, total, dtype: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """total + a · b, with both operands rounded as the product takes them."""
    a, b = as_operand(a, dtype, INPUT_PRECISION), as_operand(b, dtype, INPUT_PRECISION)
    return tl.dot(a, b, total, input_precision=INPUT_PRECISION)


@triton.jit
def as_operand(x, dtype: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """Round to `dtype`, or to TF32, whose unit would only cut off bits."""
    x = x.to(dtype)
    if INPUT_PRECISION == "tf32":
        x = rounded_to_tf32(x)
    return x


@triton.jit
def rounded_to_tf32(x):
    """Round to 11 bits, to nearest as libraries do; infinities and NaN stay."""
    bits = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1)
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["transposed_bits"])
def pointwise_operands_kernel(
    weights,  # pointers to (C_OUT, C)
    operands,  # pointers to the same, or (C, C_OUT) where the bit of transposed_bits is 1
    channels,
    out_channels,
    transposed_bits,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Round weights as the products take them, once for all their tiles, and lay them out with the summed axis last."""
    weight_ptr, operand_ptr, C, C_OUT, chosen = weights[0], operands[0], channels[0], out_channels[0], 0
    first, end = 0, 0
    for i in tl.static_range(1, len(weights)):
        end += tl.cdiv(out_channels[i - 1], BLOCK_O) * tl.cdiv(channels[i - 1], BLOCK_C)
        later = tl.program_id(0) >= end
        weight_ptr = tl.where(later, weights[i], weight_ptr)
        operand_ptr = tl.where(later, operands[i], operand_ptr)
        C = tl.where(later, channels[i], C)
        C_OUT = tl.where(later, out_channels[i], C_OUT)
        chosen = tl.where(later, i, chosen)
        first = tl.where(later, end, first)
    tiles_c = tl.cdiv(C, BLOCK_C)
    tile = tl.program_id(0) - first
    o = tile // tiles_c * BLOCK_O + tl.arange(0, BLOCK_O)
    c = tile % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (o < C_OUT)[:, None] & (c < C)[None, :]
    weight = tl.load(weight_ptr + o[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
    operand = as_operand(weight, operand_ptr.dtype.element_ty, INPUT_PRECISION)
    if (transposed_bits >> chosen) & 1:
        tl.store(operand_ptr + c[:, None] * C_OUT + o[None, :], tl.trans(operand), mask=tl.trans(mask))
    else:
        tl.store(operand_ptr + o[:, None] * C + c[None, :], operand, mask=mask)


@triton.jit(do_not_specialize=["positions"])
def pointwise_gradient_kernel(
    grad_ptr,  # (positions, C_OUT)
    raw_ptr,  # (positions, C_OUT), the forward's output
    slope_ptr,  # (C_OUT,)
    intercept_ptr,
    rounded_ptr,  # (positions, C_OUT)
    positions,
    C_OUT,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Compute g as an operand, once for all tiles that need it."""
    tiles_o = tl.cdiv(C_OUT, BLOCK_N)
    first_p, row = tl.program_id(0) // tiles_o * BLOCK_P, tl.arange(0, BLOCK_P)
    o = tl.program_id(0) % tiles_o * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_p, mask_o = first_p + row < positions, o < C_OUT
    grad = load_gradient(grad_ptr, raw_ptr, slope_ptr, intercept_ptr, first_p, row, mask_p, o, mask_o, C_OUT)
    grad = as_operand(grad, rounded_ptr.dtype.element_ty, INPUT_PRECISION)
    tile_ptr = rounded_ptr + first_p.to(tl.int64) * C_OUT
    tl.store(tile_ptr + row[:, None] * C_OUT + o[None, :], grad, mask=mask_p[:, None] & mask_o[None, :])


@triton.jit(do_not_specialize=["positions", "normed_bits", "drop_below"])
def pointwise_forward_kernel(
    raws,  # B pointers to (positions, channels of the map)
    scales,  # B pointers to (channels,), not read where the map's bit of normed_bits is 0
    offsets,
    channels,
    columns,  # where each map's channels begin among the weight's
    operand_ptr,  # (C_OUT, C), the weight as an operand in out's dtype
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
    WHOLE: tl.constexpr,  # channels are multiples of BLOCK_K, outputs of BLOCK_N
    INPUT_PRECISION: tl.constexpr,
):
    """Compute one tile of positions and outputs, and its moments."""
    tiles_n = tl.cdiv(C_OUT, BLOCK_N)
    tile = tl.program_id(0) // tiles_n
    first_p, row = tile * BLOCK_P, tl.arange(0, BLOCK_P)
    o = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_p, mask_o = first_p + row < positions, within(o, C_OUT, WHOLE)
    read_row = tl.minimum(row, positions - 1 - first_p)  # without a mask: what is computed beyond the last is not stored
    dtype = out_ptr.dtype.element_ty
    seed = None if seed_ptr is None else tl.load(seed_ptr)
    num_steps = 0
    for b in tl.static_range(len(raws)):
        num_steps += tl.cdiv(channels[b], BLOCK_K)

    out = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for step in range(num_steps):
        raw_ptr, scale_ptr, offset_ptr, width, column, chosen, first_k = choose_map(
            step, raws, scales, offsets, channels, columns, BLOCK_K
        )
        value = load_value(
            raw_ptr,
            scale_ptr,
            offset_ptr,
            (normed_bits >> chosen) & 1,
            first_p,
            read_row,
            width,
            column,
            seed,
            first_k,
            drop_below,
            BLOCK_P,
            BLOCK_K,
            WHOLE,
        )
        k = first_k + tl.arange(0, BLOCK_K)
        place = o[None, :] * C + (column + k)[:, None]
        operand = tl.load(operand_ptr + place, mask=within(k, width, WHOLE)[:, None] & mask_o[None, :], other=0.0)
        out = tl.dot(as_operand(value, dtype, INPUT_PRECISION), operand, out, input_precision=INPUT_PRECISION)

    if seed_ptr is not None:
        out *= keep_scale
    # By halves where a thread could not hold all of a wide tile, before and after the norm.
    parts = halves(out) if norm_scale_ptr is not None and BLOCK_N > 128 else (out,)
    for i in tl.static_range(len(parts)):
        first_o = tl.program_id(0) % tiles_n * BLOCK_N + i * (BLOCK_N // len(parts))
        store_product(
            parts[i],
            norm_scale_ptr,
            norm_offset_ptr,
            out_ptr,
            partials_ptr,
            tile,
            mask_p,
            first_o,
            C_OUT,
            BLOCK_P,
            BLOCK_N // len(parts),
            WHOLE,
        )


@triton.jit
def store_product(
    out,  # (BLOCK_P, BLOCK_N)
    norm_scale_ptr,
    norm_offset_ptr,
    out_ptr,
    partials_ptr,
    tile,
    mask_p,
    first_o,
    C_OUT,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Apply the frozen norm, if there is one; store a tile of the output, and its moments, if they are asked for."""
    first_p, row, o = tile * BLOCK_P, tl.arange(0, BLOCK_P), first_o + tl.arange(0, BLOCK_N)
    mask_o = within(o, C_OUT, WHOLE)
    if norm_scale_ptr is not None:
        scale = tl.load(norm_scale_ptr + o, mask=mask_o, other=0.0)
        offset = tl.load(norm_offset_ptr + o, mask=mask_o, other=0.0)
        out = relu_of(out, scale[None, :], offset[None, :])
    tile_ptr = out_ptr + first_p.to(tl.int64) * C_OUT
    place, mask = row[:, None] * C_OUT + o[None, :], mask_p[:, None] & mask_o[None, :]
    tl.store(tile_ptr + place, out.to(out_ptr.dtype.element_ty), mask=mask)
    if partials_ptr is not None:
        # From the rounded values, to which the norm will be applied. They are read back because a thread then holds columns,
        # and adds most of them up by itself; threads of a product hold rows, which are added up by a shuffle for each value.
        tl.debug_barrier()
        stored = tl.load(tile_ptr + place, mask=mask, other=0.0).to(tl.float32)
        store_moments(partials_ptr, stored, tile, mask_p, o, C_OUT)


@triton.jit
def halves(x):
    """Split (M, N) into two blocks of N / 2 columns each."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit(do_not_specialize=["positions", "normed_bits", "drop_below", "split_size"])
def pointwise_weight_gradient_kernel(
    grad_ptr,  # (positions, C_OUT)
    raw_ptr,  # (positions, C_OUT), the forward's output
    slope_ptr,  # (C_OUT,), or None
    intercept_ptr,
    raws,
    scales,
    offsets,
    channels,
    columns,
    seed_ptr,
    partials_ptr,  # (splits, C_OUT, C)
    rounded_ptr,  # (positions, C_OUT): g as an operand, for the gradient of the maps; or None
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
    WHOLE: tl.constexpr,  # outputs are multiples of BLOCK_P, channels of BLOCK_N
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
    mask_o = within(o, C_OUT, WHOLE)
    dtype = grad_ptr.dtype.element_ty
    seed = None if seed_ptr is None else tl.load(seed_ptr)

    grad_weight = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    size, row = tl.minimum(split_size, positions - split * split_size), tl.arange(0, BLOCK_K)
    for block in range(tl.cdiv(size, BLOCK_K)):
        first_p = split * split_size + block * BLOCK_K
        mask_p = first_p + row < positions
        grad = load_gradient(grad_ptr, raw_ptr, slope_ptr, intercept_ptr, first_p, row, mask_p, o, mask_o, C_OUT)
        grad = as_operand(grad, dtype, INPUT_PRECISION)  # (BLOCK_K, BLOCK_P)
        if rounded_ptr is not None:
            tile_ptr = rounded_ptr + first_p.to(tl.int64) * C_OUT
            mask = (mask_p & (step == 0))[:, None] & mask_o[None, :]  # by the first of the tiles that need the same g
            tl.store(tile_ptr + row[:, None] * C_OUT + o[None, :], grad, mask=mask)
        value = load_value(
            x_ptr,
            scale_ptr,
            offset_ptr,
            (normed_bits >> chosen) & 1,
            first_p,
            tl.minimum(row, positions - 1 - first_p),  # any value is multiplied by a gradient of 0 beyond
            width,
            column,
            seed,
            first_c,
            drop_below,
            BLOCK_K,
            BLOCK_N,
            WHOLE,
        )
        value = as_operand(value, dtype, INPUT_PRECISION)
        grad_weight = tl.dot(tl.trans(grad), value, grad_weight, input_precision=INPUT_PRECISION)

    if seed_ptr is not None:
        grad_weight *= keep_scale
    row_ptr = partials_ptr + split.to(tl.int64) * C_OUT * C
    place = o[:, None] * C + (column + c)[None, :]
    tl.store(row_ptr + place, grad_weight, mask=mask_o[:, None] & within(c, width, WHOLE)[None, :])


@triton.jit(do_not_specialize=["positions", "normed_bits", "drop_below"])
def pointwise_input_gradient_kernel(
    rounded_ptr,  # (positions, C_OUT): g as an operand
    raws,
    scales,
    offsets,
    channels,
    columns,
    grad_maps,  # pointers to (positions, channels of the map)
    operand_ptr,  # (C, C_OUT), the weight as an operand
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
    WHOLE: tl.constexpr,  # channels are multiples of BLOCK_N, outputs of BLOCK_K
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
    first_p, row = tile * BLOCK_P, tl.arange(0, BLOCK_P)
    c = first_c + tl.arange(0, BLOCK_N)
    mask_p, mask_c = first_p + row < positions, within(c, width, WHOLE)
    tile_ptr = rounded_ptr + first_p.to(tl.int64) * C_OUT

    grad_value = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for first_o in range(0, C_OUT, BLOCK_K):
        o = first_o + tl.arange(0, BLOCK_K)
        mask_o = within(o, C_OUT, WHOLE)
        grad_place = row[:, None] * C_OUT + o[None, :]  # (BLOCK_P, BLOCK_K)
        grad = tl.load(tile_ptr + grad_place, mask=mask_p[:, None] & mask_o[None, :], other=0.0)
        place = (column + c)[None, :] * C_OUT + o[:, None]
        operand = tl.load(operand_ptr + place, mask=mask_o[:, None] & mask_c[None, :], other=0.0)
        grad_value = tl.dot(grad, operand, grad_value, input_precision=INPUT_PRECISION)

    # By halves, because a thread that held all of it twice, before and after it is moved to the layout of x, would spill.
    parts = halves(grad_value)
    for i in tl.static_range(2):
        store_input_gradient(
            parts[i],
            x_ptr,
            scale_ptr,
            offset_ptr,
            grad_x_ptr,
            (normed_bits >> chosen) & 1,
            tile,
            mask_p,
            width,
            column,
            seed_ptr,
            partials_ptr,
            first_c + i * (BLOCK_N // 2),
            drop_below,
            keep_scale,
            C,
            BLOCK_P,
            BLOCK_N // 2,
            WHOLE,
        )


@triton.jit
def store_input_gradient(
    grad_value,  # (BLOCK_P, BLOCK_N), of the values after norm, ReLU and dropout; 0 at positions outside
    x_ptr,
    scale_ptr,
    offset_ptr,
    grad_x_ptr,
    normed,
    tile,
    mask_p,
    width,
    column,
    seed_ptr,
    partials_ptr,
    first_c,
    drop_below,
    keep_scale,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Go back through dropout, ReLU and norm of one map; store its gradient, and the sums for those of its norm."""
    first_p, row, c = tile * BLOCK_P, tl.arange(0, BLOCK_P), first_c + tl.arange(0, BLOCK_N)
    mask_c = within(c, width, WHOLE)
    first, place = first_p.to(tl.int64) * width, row[:, None] * width + c[None, :]
    mask = mask_p[:, None] & mask_c[None, :]
    factor = tl.full((BLOCK_N,), 1.0, tl.float32)  # the same at all positions, so it is applied to sums
    # Dropout's mask is joined with the ReLU's before either is applied: so both are compared in the layout of x, not moved.
    if seed_ptr is not None:
        keep = keep_mask(tl.load(seed_ptr), first_p + row, first_c, column, drop_below, BLOCK_P, BLOCK_N)
        factor *= keep_scale
    if partials_ptr is not None:
        scale, offset, floor = load_norm(scale_ptr, offset_ptr, normed, c, mask_c)
        x = tl.load(x_ptr + first + place, mask=mask, other=0.0).to(tl.float32)
        passes = x * scale[None, :] + offset[None, :] > floor[None, :]
        if seed_ptr is not None:
            passes &= keep
        grad_value = tl.where(passes, grad_value, 0.0)
        row_ptr = partials_ptr + tile.to(tl.int64) * 2 * C + column
        tl.store(row_ptr + c, tl.sum(grad_value * x, axis=0) * factor, mask=mask_c)
        tl.store(row_ptr + C + c, tl.sum(grad_value, axis=0) * factor, mask=mask_c)
        factor *= scale
    elif seed_ptr is not None:
        grad_value = tl.where(keep, grad_value, 0.0)
    grad_value *= factor[None, :]
    tl.store(grad_x_ptr + first + place, grad_value.to(grad_x_ptr.dtype.element_ty), mask=mask)
