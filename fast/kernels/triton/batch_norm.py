"""Batch norms between kernels: the numbers with which a norm is applied on load, passes that apply one, ordered sums.

    n = Σ n_t     mean = Σ n_t · mean_t / n     var = Σ (M2_t + n_t · (mean_t - mean)²) / n                 (Chan et al.)
    scale = γ / √(var + ε)     offset = β - mean · scale     r ← (1 - momentum) · r + momentum · batch

A convolution writes, for each tile t of its output, the number n_t of its positions (tiles need not be of one size), the mean
and the sum of squared deviations from it, M2. So a large mean cannot hide a small variance, as it would in E[x²] - E[x]². One
program per channel adds up the tiles in their order, so ten runs give ten identical results, which atomics would not.

Bytes: `fold` reads 8 B per tile and channel twice (the second time from the L2 cache), `unfold` 24 B per channel, `normalise`
the map once and writes it once. Operations: 4 per value of a map, never the limit.

Versions (not measured: no GPU was at hand)
  1. sums of x and x² by atomics: a zeroed buffer, results that differ from run to run, no variance left at a large mean
  2. this: two numbers per tile and channel, one small launch; expected to cost as little: a map has 16 to 64 times more values
  3. several tiles per program, fewer partial sums: expected to gain only beyond 10⁵ positions
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # by Triton's interpreter, which has no assembly


@triton.jit
def relu_of(raw, scale, offset):
    """relu(scale · raw + offset) of float32 blocks. NaN stays NaN, as in PyTorch's relu; a maximum alone would hide it."""
    return tl.maximum(raw * scale + offset, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def store_moments(partials_ptr, out, tile, mask_p, c, C):
    """Mean and M2 of the rows of out: (BLOCK_P, BLOCK_C), float32, where mask_p; partials: (tiles, 2, C)."""
    count = tl.sum(mask_p.to(tl.float32), axis=0)
    mean = tl.sum(tl.where(mask_p[:, None], out, 0.0), axis=0) / count  # (BLOCK_C,)
    centred = tl.where(mask_p[:, None], out - mean[None, :], 0.0)
    row_ptr = partials_ptr + tile.to(tl.int64) * 2 * C
    tl.store(row_ptr + c, mean, mask=c < C)
    tl.store(row_ptr + C + c, tl.sum(centred * centred, axis=0), mask=c < C)


@triton.jit
def load_sizes(counts_ptr, tile, num_tiles, tile_size, count):
    """How many positions each tile has, float32; 0 beyond the last."""
    if counts_ptr is None:
        return tl.maximum(tl.minimum(count - tile * tile_size, tile_size), 0).to(tl.float32)
    else:  # left out when compiled
        return tl.load(counts_ptr + tile, mask=tile < num_tiles, other=0.0)


@triton.jit(do_not_specialize=["num_tiles", "tile_size", "count"])
def fold_kernel(
    partials_ptr,  # (tiles, 2, C)
    counts_ptr,  # (tiles,), positions of each; or None: tile_size, and the rest in the last one
    gamma_ptr,
    beta_ptr,
    running_mean_ptr,
    running_var_ptr,
    folded_ptr,  # (4, C): scale, offset, mean, inv_std
    num_tiles,
    tile_size,
    count,
    momentum,
    eps,
    C,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Combine the tiles' moments and move the running statistics; one program per BLOCK_C channels."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    batch_size = tl.maximum(count, 1).to(tl.float32)

    weighted = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, num_tiles, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        row_ptr = partials_ptr + tile[:, None].to(tl.int64) * 2 * C + c[None, :]
        size = load_sizes(counts_ptr, tile, num_tiles, tile_size, count)
        mean_t = tl.load(row_ptr, mask=(tile < num_tiles)[:, None] & mask_c[None, :], other=0.0)  # (BLOCK_T, BLOCK_C)
        weighted += tl.sum(size[:, None] * mean_t, axis=0)
    mean = weighted / batch_size

    deviations = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, num_tiles, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        row_ptr = partials_ptr + tile[:, None].to(tl.int64) * 2 * C + c[None, :]
        size = load_sizes(counts_ptr, tile, num_tiles, tile_size, count)
        mask = (tile < num_tiles)[:, None] & mask_c[None, :]
        mean_t = tl.load(row_ptr, mask=mask, other=0.0)
        squares = tl.load(row_ptr + C, mask=mask, other=0.0)
        deviations += tl.sum(squares + size[:, None] * (mean_t - mean[None, :]) * (mean_t - mean[None, :]), axis=0)
    var = deviations / batch_size

    inv_std = 1.0 / tl.sqrt_rn(var + eps)
    scale = tl.load(gamma_ptr + c, mask=mask_c).to(tl.float32) * inv_std
    tl.store(folded_ptr + c, scale, mask=mask_c)
    tl.store(folded_ptr + C + c, tl.load(beta_ptr + c, mask=mask_c).to(tl.float32) - mean * scale, mask=mask_c)
    tl.store(folded_ptr + 2 * C + c, mean, mask=mask_c)
    tl.store(folded_ptr + 3 * C + c, inv_std, mask=mask_c)

    unbiased = deviations / tl.maximum(count - 1, 1).to(tl.float32)
    running_mean = tl.load(running_mean_ptr + c, mask=mask_c).to(tl.float32)
    running_var = tl.load(running_var_ptr + c, mask=mask_c).to(tl.float32)
    tl.store(running_mean_ptr + c, (1.0 - momentum) * running_mean + momentum * mean, mask=mask_c)
    tl.store(running_var_ptr + c, (1.0 - momentum) * running_var + momentum * unbiased, mask=mask_c)


@triton.jit(do_not_specialize=["count"])
def unfold_kernel(
    grad_scale_ptr,
    grad_offset_ptr,
    scale_ptr,
    mean_ptr,
    inv_std_ptr,
    gamma_ptr,
    unfolded_ptr,  # (4, C): slope, intercept, gradients of gamma and beta
    count,
    C,
    BLOCK_C: tl.constexpr,
):
    """The backward pass of `fold_kernel`, by the equations of `fast/kernels/interface.py`."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    batch_size = tl.maximum(count, 1).to(tl.float32)
    grad_offset = tl.load(grad_offset_ptr + c, mask=mask_c)
    mean = tl.load(mean_ptr + c, mask=mask_c)
    inv_std = tl.load(inv_std_ptr + c, mask=mask_c)
    centred = tl.load(grad_scale_ptr + c, mask=mask_c) - mean * grad_offset
    # inv_std three times in turn: its cube alone overflows nothing here, but is far from 1 where the variance is small.
    slope = -tl.load(gamma_ptr + c, mask=mask_c).to(tl.float32) * inv_std * (centred * inv_std) * inv_std / batch_size
    intercept = -tl.load(scale_ptr + c, mask=mask_c) * grad_offset / batch_size - slope * mean
    tl.store(unfolded_ptr + c, slope, mask=mask_c)
    tl.store(unfolded_ptr + C + c, intercept, mask=mask_c)
    tl.store(unfolded_ptr + 2 * C + c, centred * inv_std, mask=mask_c)
    tl.store(unfolded_ptr + 3 * C + c, grad_offset, mask=mask_c)


@triton.jit(do_not_specialize=["positions"])
def normalise_kernel(x_ptr, scale_ptr, offset_ptr, out_ptr, positions, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """out = relu(scale · x + offset); x, out: (positions, C)."""
    tiles_c = tl.cdiv(C, BLOCK_C)
    p = tl.program_id(0) // tiles_c * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    mask = (p < positions)[:, None] & mask_c[None, :]
    place = p[:, None].to(tl.int64) * C + c[None, :]
    scale = tl.load(scale_ptr + c, mask=mask_c, other=0.0)
    offset = tl.load(offset_ptr + c, mask=mask_c, other=0.0)
    raw = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_P, BLOCK_C)
    value = relu_of(raw, scale[None, :], offset[None, :])
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["positions"])
def normalise_backward_kernel(
    grad_ptr,
    x_ptr,
    scale_ptr,
    offset_ptr,
    grad_x_ptr,
    partials_ptr,  # (tiles, 2, C): of the gradients of scale and offset
    positions,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The backward pass of `normalise_kernel`; grad, x, grad_x: (positions, C)."""
    tiles_c = tl.cdiv(C, BLOCK_C)
    tile = tl.program_id(0) // tiles_c
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    mask = (p < positions)[:, None] & mask_c[None, :]
    place = p[:, None].to(tl.int64) * C + c[None, :]
    scale = tl.load(scale_ptr + c, mask=mask_c, other=0.0)
    offset = tl.load(offset_ptr + c, mask=mask_c, other=0.0)
    raw = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
    grad = tl.where(raw * scale[None, :] + offset[None, :] > 0.0, grad, 0.0)
    tl.store(grad_x_ptr + place, (grad * scale[None, :]).to(grad_x_ptr.dtype.element_ty), mask=mask)
    row_ptr = partials_ptr + tile.to(tl.int64) * 2 * C
    tl.store(row_ptr + c, tl.sum(grad * raw, axis=0), mask=mask_c)
    tl.store(row_ptr + C + c, tl.sum(grad, axis=0), mask=mask_c)


@triton.jit(do_not_specialize=["num_tiles", "interleaved"])
def sum_partials_kernel(
    partials_ptr,  # (tiles, rows, C)
    out_ptr,
    num_tiles,
    interleaved,
    rows,
    C,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum over tiles, in their order -> (C, interleaved) for the first `interleaved` rows, then (rows - interleaved, C)."""
    column = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = rows * C
    mask = column < columns
    total = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, num_tiles, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        place = tile[:, None].to(tl.int64) * columns + column[None, :]
        total += tl.sum(tl.load(partials_ptr + place, mask=(tile < num_tiles)[:, None] & mask[None, :], other=0.0), axis=0)
    row = column // C
    place = tl.where(row < interleaved, column % C * interleaved + row, column)
    tl.store(out_ptr + place, total, mask=mask)
