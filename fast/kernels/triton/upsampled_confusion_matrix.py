"""Upsample the logits, take the best class of every pixel and count (label, class) pairs, without full-size logits.

    M[a, b] = #{p : label_p = a ≠ ignore, first argmax_k z_p[k] = b}         z: see upsampled_cross_entropy.py

A program goes down the pixel rows between two rows of logits, over BLOCK_X columns that it interpolated once; without
ALIGN_CORNERS also those before the first row and after the last. Neighbouring pixels mostly belong to the same entry of M; in
a row the first of them adds the count of all, so there is one atomic instead of up to BLOCK_X. Integer atomics are exact in
any order.

Bytes for N·H·W labels: N·H·W (uint8) + 4·N·h·w·K. Operations: about 4 per pixel and class, and BLOCK_X comparisons per pixel.

Versions (not measured: no GPU was at hand)
  1. interpolate, argmax, bincount by the library: 360 MB written and read, and a sort
  2. an atomic per pixel: millions on the few large entries of the diagonal, one after the other
  3. this: expected 10 times fewer atomics on maps whose segments are wider than BLOCK_X
"""

import triton
import triton.language as tl

from fast.kernels.triton.upsampled_cross_entropy import (
    SIZES,
    STRIDES,
    ends_of_cell,
    first_pixel,
    within_cell,
)


@triton.jit(do_not_specialize=[*SIZES, "cells_h", "cells_w", *STRIDES, "ignore_index"])
def confusion_matrix_kernel(
    logits_ptr,
    labels_ptr,  # (N, label_height, label_width)
    confusion_ptr,  # (K, K), int64
    height,
    width,
    label_height,
    label_width,
    cells_h,
    cells_w,
    stride_n,
    stride_k,
    stride_h,
    stride_w,
    ignore_index,
    K,
    BLOCK_K: tl.constexpr,
    BLOCK_X: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
):
    """Count the pixels of row i of cells of one image, BLOCK_X columns. Labels out of range do not count.

    With ALIGN_CORNERS the last cell has the pixel on the last logit too.
    """
    tiles_x = tl.cdiv(label_width, BLOCK_X)
    row = tl.program_id(0) // tiles_x
    n, i = row // cells_h, row % cells_h
    x = tl.program_id(0) % tiles_x * BLOCK_X + tl.arange(0, BLOCK_X)
    mask_x = x < label_width
    k = tl.arange(0, BLOCK_K)
    mask = (k < K)[:, None] & mask_x[None, :]
    if ALIGN_CORNERS:
        j = tl.minimum(x * (width - 1) // tl.maximum(label_width - 1, 1), cells_w - 1)
    else:
        j = ((2 * x + 1) * width + label_width) // (2 * label_width)
    above, below = ends_of_cell(i, height, ALIGN_CORNERS)
    left, right = ends_of_cell(j, width, ALIGN_CORNERS)
    image_ptr = logits_ptr + n.to(tl.int64) * stride_n + k[:, None].to(tl.int64) * stride_k
    left, right = (left * stride_w)[None, :], (right * stride_w)[None, :]
    fx = within_cell(x, j, width, label_width, ALIGN_CORNERS)[None, :]
    top = tl.load(image_ptr + above * stride_h + left, mask=mask, other=0.0).to(tl.float32) * (1.0 - fx)
    top += tl.load(image_ptr + above * stride_h + right, mask=mask, other=0.0).to(tl.float32) * fx
    bottom = tl.load(image_ptr + below * stride_h + left, mask=mask, other=0.0).to(tl.float32) * (1.0 - fx)
    bottom += tl.load(image_ptr + below * stride_h + right, mask=mask, other=0.0).to(tl.float32) * fx  # (BLOCK_K, BLOCK_X)

    first_y = first_pixel(i, height, label_height, ALIGN_CORNERS)
    end_y = tl.minimum(first_pixel(i + 1, height, label_height, ALIGN_CORNERS), label_height)
    for y in range(first_y, tl.where(i == cells_h - 1, label_height, end_y)):
        fy = within_cell(y, i, height, label_height, ALIGN_CORNERS)
        z = top * (1.0 - fy) + bottom * fy
        z = tl.where(z != z, float("inf"), z)  # as in PyTorch, NaN is the largest, so M shows it
        z = tl.where((k < K)[:, None], z, float("-inf"))
        best = tl.min(
            tl.where(z == tl.max(z, axis=0)[None, :], k[:, None], BLOCK_K), axis=0
        )  # (BLOCK_X,), the first of equal ones
        label = tl.load(labels_ptr + (n.to(tl.int64) * label_height + y) * label_width + x, mask=mask_x, other=0).to(tl.int64)
        counted = mask_x & (label != ignore_index) & (label >= 0) & (label < K)
        entry = tl.where(counted, label.to(tl.int32) * K + best, -1)
        same = (entry[:, None] == entry[None, :]).to(tl.int32)  # (BLOCK_X, BLOCK_X)
        earlier = tl.sum(tl.where(x[None, :] < x[:, None], same, 0), axis=1)
        tl.atomic_add(confusion_ptr + entry, tl.sum(same, axis=1).to(tl.int64), mask=counted & (earlier == 0), sem="relaxed")
