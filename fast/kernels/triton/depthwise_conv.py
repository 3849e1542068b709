"""Dilated 3×3 convolution per channel, on a map whose norm is applied on load, with the sums for its own batch norm.

    y[p] = Σ_t weight[t] · v[p + shift_t]      v = relu(scale · x + offset) inside the map, 0 outside      t: nine taps
    ∂v[p] = Σ_t weight[t] · g[p - shift_t]     ∂weight[t] = Σ_p g[p - shift_t] · v[p]     g = grad + slope · y + intercept

Both gradients read g at the same nine shifts, so one kernel computes them, and v is loaded once.

Bytes per value of a map, of b bytes: forward 2·b (read x, write y), backward 4·b (read x, y, grad, write ∂x); the nine shifted
reads hit the caches, since a row of positions lies 1 to 24 rows away. Operations: 18 forward, 36 backward, plus 3 per shifted
read to normalise it. That is 5 to 13 operations per byte: memory-bound on any GPU.

The rates are run-time arguments, so one compilation serves all 64 pairs. Positions run over (N, H, W) as one axis, so small
maps waste no lanes at their right border; a tap outside the map is masked.

Versions (not measured: no GPU was at hand)
  1. one launch per step: convolution, sums, normalisation, ReLU: reads and writes the map three times forward
  2. normalise on load, sums in the same launch: expected 1/3 of the bytes, 1/4 of the launches
  3. backward of input and weight in one pass: expected 4 instead of 7 maps of traffic
  4. taps that lie outside for the whole tile skipped: expected to gain at rates of more than half the map, not done
"""

import triton
import triton.language as tl

from fast.kernels.triton.batch_norm import relu_of, store_moments


@triton.jit(do_not_specialize=["positions", "height", "width", "rate_h", "rate_w"])
def depthwise_forward_kernel(
    x_ptr,  # (positions, C)
    scale_ptr,  # (C,), or None
    offset_ptr,
    weight_ptr,  # (C, 9)
    out_ptr,  # (positions, C)
    partials_ptr,  # (tiles, 2, C), or None
    positions,
    height,
    width,
    rate_h,
    rate_w,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute one tile of positions and channels, and its moments."""
    tiles_c = tl.cdiv(C, BLOCK_C)
    tile = tl.program_id(0) // tiles_c
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_p, mask_c = p < positions, c < C
    h, w = p // width % height, p % width

    out = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for tap in tl.static_range(9):
        shift_h, shift_w = (tap // 3 - 1) * rate_h, (tap % 3 - 1) * rate_w
        inside = mask_p & (h + shift_h >= 0) & (h + shift_h < height) & (w + shift_w >= 0) & (w + shift_w < width)
        place = (p + shift_h * width + shift_w)[:, None].to(tl.int64) * C + c[None, :]
        value = tl.load(x_ptr + place, mask=inside[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + c, mask=mask_c, other=0.0)
            offset = tl.load(offset_ptr + c, mask=mask_c, other=0.0)
            value = tl.where(inside[:, None], relu_of(value, scale[None, :], offset[None, :]), 0.0)
        out += value * tl.load(weight_ptr + c * 9 + tap, mask=mask_c, other=0.0).to(tl.float32)[None, :]

    stored = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + p[:, None].to(tl.int64) * C + c[None, :], stored, mask=mask_p[:, None] & mask_c[None, :])
    if partials_ptr is not None:  # from the rounded values, to which the norm will be applied
        store_moments(partials_ptr, stored.to(tl.float32), tile, mask_p, c, C)


@triton.jit(do_not_specialize=["positions", "height", "width", "rate_h", "rate_w"])
def depthwise_backward_kernel(
    grad_ptr,  # (positions, C)
    raw_ptr,  # (positions, C), the forward's output
    slope_ptr,  # (C,), or None
    intercept_ptr,
    x_ptr,  # (positions, C)
    scale_ptr,  # (C,), or None
    offset_ptr,
    weight_ptr,  # (C, 9)
    grad_x_ptr,  # (positions, C), or None
    partials_ptr,  # (tiles, ROWS, C): nine for the weight, then scale and offset
    positions,
    height,
    width,
    rate_h,
    rate_w,
    C,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute one tile of x's gradient, and its share in the gradients of weight, scale and offset."""
    tiles_c = tl.cdiv(C, BLOCK_C)
    tile = tl.program_id(0) // tiles_c
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_p, mask_c = p < positions, c < C
    h, w = p // width % height, p % width
    own_place = p[:, None].to(tl.int64) * C + c[None, :]
    own_mask = mask_p[:, None] & mask_c[None, :]
    row_ptr = partials_ptr + tile.to(tl.int64) * ROWS * C + c

    x = tl.load(x_ptr + own_place, mask=own_mask, other=0.0).to(tl.float32)
    value = x
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + c, mask=mask_c, other=0.0)
        offset = tl.load(offset_ptr + c, mask=mask_c, other=0.0)
        value = tl.where(own_mask, relu_of(x, scale[None, :], offset[None, :]), 0.0)

    grad_value = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for tap in tl.static_range(9):
        shift_h, shift_w = (1 - tap // 3) * rate_h, (1 - tap % 3) * rate_w  # from x back to the output that this tap feeds
        inside = mask_p & (h + shift_h >= 0) & (h + shift_h < height) & (w + shift_w >= 0) & (w + shift_w < width)
        mask = inside[:, None] & mask_c[None, :]
        place = (p + shift_h * width + shift_w)[:, None].to(tl.int64) * C + c[None, :]
        grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if slope_ptr is not None:
            slope = tl.load(slope_ptr + c, mask=mask_c, other=0.0)
            intercept = tl.load(intercept_ptr + c, mask=mask_c, other=0.0)
            raw = tl.load(raw_ptr + place, mask=mask, other=0.0).to(tl.float32)
            grad = tl.where(inside[:, None], grad + slope[None, :] * raw + intercept[None, :], 0.0)
        tl.store(row_ptr + tap * C, tl.sum(grad * value, axis=0), mask=mask_c)
        if grad_x_ptr is not None:
            grad_value += grad * tl.load(weight_ptr + c * 9 + tap, mask=mask_c, other=0.0).to(tl.float32)[None, :]

    if grad_x_ptr is not None:
        if scale_ptr is not None:
            grad_value = tl.where(x * scale[None, :] + offset[None, :] > 0.0, grad_value, 0.0)
            tl.store(row_ptr + 9 * C, tl.sum(grad_value * x, axis=0), mask=mask_c)
            tl.store(row_ptr + 10 * C, tl.sum(grad_value, axis=0), mask=mask_c)
            grad_value *= scale[None, :]
        tl.store(grad_x_ptr + own_place, grad_value.to(grad_x_ptr.dtype.element_ty), mask=own_mask)
