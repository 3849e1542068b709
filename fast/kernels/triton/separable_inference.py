"""A whole separable convolution with frozen norms in one kernel: the map between its two parts stays in registers.

    m[p, c] = relu(scale_d[c] · Σ_t depthwise[c, t] · v[p + shift_t, c] + offset_d[c])      v = relu(scale · x + offset)
    y[p, o] = relu(scale_p[o] · Σ_c pointwise[o, c] · m[p, c] + offset_p[o])

A block of m takes nine shifted loads for BLOCK_K channels, and is at once the left operand of the matrix product. A program
computes all outputs of its positions if BLOCK_N covers them; otherwise m is computed again for each block of outputs.

Bytes per position of b-byte values: (C + K)·b, instead of (2·C + 2·C + 2·K)·b by three launches. Operations: 18·C + 2·C·K; at
256 → 256 channels in 16 bits 133 per byte: memory-bound on an H200, closely.

Versions (not measured: no GPU was at hand)
  1. depthwise, norm + ReLU, pointwise, norm + ReLU: four launches, ten maps of traffic
  2. norms applied on load: two launches, four maps of traffic
  3. this: one launch, two maps of traffic; expected 2× over 2. while the nine reads come from the L1 and L2 caches
"""

import triton
import triton.language as tl

from fast.kernels.triton.batch_norm import relu_of
from fast.kernels.triton.pointwise_conv import multiply_add


@triton.jit(do_not_specialize=["positions", "height", "width", "rate_h", "rate_w"])
def separable_inference_kernel(
    x_ptr,  # (positions, C)
    scale_ptr,  # (C,), or None
    offset_ptr,
    depthwise_ptr,  # (C, 9)
    depthwise_scale_ptr,  # (C,)
    depthwise_offset_ptr,
    pointwise_ptr,  # (C_OUT, C)
    pointwise_scale_ptr,  # (C_OUT,)
    pointwise_offset_ptr,
    out_ptr,  # (positions, C_OUT)
    positions,
    height,
    width,
    rate_h,
    rate_w,
    C,
    C_OUT,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Compute one tile of positions and outputs, with BLOCK_K channels of the map between the convolutions at a time."""
    tiles_n = tl.cdiv(C_OUT, BLOCK_N)
    p = tl.program_id(0) // tiles_n * BLOCK_P + tl.arange(0, BLOCK_P)
    o = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_p, mask_o = p < positions, o < C_OUT
    h, w = p // width % height, p % width
    dtype = out_ptr.dtype.element_ty

    out = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for first_c in range(0, C, BLOCK_K):
        c = first_c + tl.arange(0, BLOCK_K)
        mask_c = c < C
        middle = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
        for tap in tl.static_range(9):
            shift_h, shift_w = (tap // 3 - 1) * rate_h, (tap % 3 - 1) * rate_w
            inside = mask_p & (h + shift_h >= 0) & (h + shift_h < height) & (w + shift_w >= 0) & (w + shift_w < width)
            place = (p + shift_h * width + shift_w)[:, None].to(tl.int64) * C + c[None, :]
            value = tl.load(x_ptr + place, mask=inside[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
            if scale_ptr is not None:
                scale = tl.load(scale_ptr + c, mask=mask_c, other=0.0)
                offset = tl.load(offset_ptr + c, mask=mask_c, other=0.0)
                value = tl.where(inside[:, None], relu_of(value, scale[None, :], offset[None, :]), 0.0)
            middle += value * tl.load(depthwise_ptr + c * 9 + tap, mask=mask_c, other=0.0).to(tl.float32)[None, :]
        depthwise_scale = tl.load(depthwise_scale_ptr + c, mask=mask_c, other=0.0)
        depthwise_offset = tl.load(depthwise_offset_ptr + c, mask=mask_c, other=0.0)
        middle = relu_of(middle, depthwise_scale[None, :], depthwise_offset[None, :])  # 0 where c is outside
        weight_place = o[None, :].to(tl.int64) * C + c[:, None]
        weight = tl.load(pointwise_ptr + weight_place, mask=mask_c[:, None] & mask_o[None, :], other=0.0)
        out = multiply_add(middle, weight, out, dtype, INPUT_PRECISION)

    pointwise_scale = tl.load(pointwise_scale_ptr + o, mask=mask_o, other=0.0)
    pointwise_offset = tl.load(pointwise_offset_ptr + o, mask=mask_o, other=0.0)
    out = relu_of(out, pointwise_scale[None, :], pointwise_offset[None, :])
    tl.store(out_ptr + p[:, None].to(tl.int64) * C_OUT + o[None, :], out.to(dtype), mask=mask_p[:, None] & mask_o[None, :])
