"""The sum of the gradients that the readers of one map send back, each with those of the map's scale and offset.

    ∂x = Σ_r ∂x_r      ∂scale = Σ_r ∂scale_r      ∂offset = Σ_r ∂offset_r

Autograd adds two at a time: for R readers 3·(R - 1) launches, and 3·(R - 1) maps of traffic. Here it is one launch that moves
R + 1 maps and rounds once. Operations: R - 1 per value, never the limit. The vectors of the norm are summed by a program of
their own, in blocks that fit them.

Versions (not measured: no GPU was at hand)
  1. autograd's additions: in the published cell, whose branches have up to four readers, 16 launches
  2. this: two
"""

import triton
import triton.language as tl


@triton.jit  # `size` is specialised: if it is no multiple of 16, values are loaded one by one
def sum_gradients_kernel(
    grads,  # R pointers to (positions, C)
    grad_scales,  # R pointers to (C,), float32, or None if the map has no norm
    grad_offsets,
    sum_ptr,  # (positions, C)
    sums_ptr,  # (2, C), of scale and offset, or None
    size,  # positions · C
    C,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum BLOCK values of the maps; the programs behind them BLOCK_C channels of the vectors."""
    programs = tl.cdiv(size, BLOCK)
    program = tl.program_id(0)
    if program < programs:
        place = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = place < size
        total = tl.load(grads[0] + place, mask=mask, other=0.0).to(tl.float32)
        for r in tl.static_range(1, len(grads)):
            total += tl.load(grads[r] + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(sum_ptr + place, total.to(sum_ptr.dtype.element_ty), mask=mask)
    elif sums_ptr is not None:
        c = (program - programs) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = c < C
        scale = tl.load(grad_scales[0] + c, mask=mask_c, other=0.0)
        offset = tl.load(grad_offsets[0] + c, mask=mask_c, other=0.0)
        for r in tl.static_range(1, len(grads)):
            scale += tl.load(grad_scales[r] + c, mask=mask_c, other=0.0)
            offset += tl.load(grad_offsets[r] + c, mask=mask_c, other=0.0)
        tl.store(sums_ptr + c, scale, mask=mask_c)
        tl.store(sums_ptr + C + c, offset, mask=mask_c)
