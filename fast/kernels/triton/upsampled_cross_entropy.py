"""Mean softmax cross-entropy of bilinearly upsampled logits, and its gradient, without full-size logits.

    z[k] = (1-f_y)·((1-f_x)·l₀₀[k] + f_x·l₀₁[k]) + f_y·((1-f_x)·l₁₀[k] + f_x·l₁₁[k])     (f_y, f_x): within a cell of logits
    loss = (1 / |L|) Σ_{p ∈ L} log Σ_k exp z_p[k] - z_p[label]
    ∂l_c[k] = (1 / |L|) Σ_{p ∈ L} weight_c(p) · (softmax(z_p)[k] - [k = label])

A program computes the pixels of one cell, between four neighbouring logits: about 16×16 at output stride 16. It holds the
cell's logits, interpolates them along x once and goes down the rows. At the end it has the gradients of the four corners and
its share of the loss, and writes them to buffers. A second kernel adds up the loss and counts the labelled pixels, in a fixed
order; a third adds the up to four contributions of each logit. The position within a cell is a quotient of integers, so it
is exact at any size.

Bytes for N·H·W labels and N·h·w·K logits: N·H·W (uint8) + 8·N·h·w·K, and 32·N·h·w·K for the corners' gradients, which stay in
the L2 cache. Operations: about 12 per pixel and class, one of them an exponential. At 8×19×49×49 → 769×769: 8 MB, 12 MB of
corners, 1.1·10⁹ operations with 0.09·10⁹ exponentials (0.15·10⁹ as classes are padded to a power of two): bound by
arithmetic.

Versions (not measured: no GPU was at hand)
  1. interpolate, cross-entropy, and back by the library: six passes over 360 MB
  2. this: expected 1/50 of the bytes
  3. classes in the slow dimension of a tile, so that sums over classes stay within a thread: in this version already
  4. classes in blocks that need no padding, 16 + 4 for 19: expected 1.4×, not done
"""

import triton
import triton.language as tl


@triton.jit
def first_pixel(cell, in_size, out_size):
    """The first output pixel whose position is at or after logit `cell` along one axis."""
    return tl.cdiv(cell * tl.maximum(out_size - 1, 1), tl.maximum(in_size - 1, 1))


@triton.jit
def within_cell(pixel, cell, in_size, out_size):
    """Position of output pixel `pixel` after logit `cell`, 0 to 1."""
    span = tl.maximum(out_size - 1, 1)
    return (pixel * (in_size - 1) - cell * span).to(tl.float32) / span.to(tl.float32)


SIZES = ["height", "width", "label_height", "label_width", "cells_h", "cells_w"]
STRIDES = ["stride_n", "stride_k", "stride_h", "stride_w"]


@triton.jit(do_not_specialize=[*SIZES, *STRIDES, "ignore_index"])
def cell_gradients_kernel(
    logits_ptr,
    labels_ptr,  # (N, label_height, label_width)
    corners_ptr,  # (cells, 4, K), float32
    losses_ptr,  # (cells,), float32
    counts_ptr,  # (cells,), int32
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
):
    """Compute loss, gradients of the four corners and number of labelled pixels of one cell. Bad labels make the loss NaN."""
    cell = tl.program_id(0)
    n, i, j = cell // cells_w // cells_h, cell // cells_w % cells_h, cell % cells_w
    k = tl.arange(0, BLOCK_K)
    mask_k = k < K
    below, right = tl.minimum(i + 1, height - 1), tl.minimum(j + 1, width - 1)
    image_ptr = logits_ptr + n.to(tl.int64) * stride_n + k.to(tl.int64) * stride_k
    l00 = tl.load(image_ptr + i * stride_h + j * stride_w, mask=mask_k, other=0.0).to(tl.float32)[:, None]
    l01 = tl.load(image_ptr + i * stride_h + right * stride_w, mask=mask_k, other=0.0).to(tl.float32)[:, None]
    l10 = tl.load(image_ptr + below * stride_h + j * stride_w, mask=mask_k, other=0.0).to(tl.float32)[:, None]
    l11 = tl.load(image_ptr + below * stride_h + right * stride_w, mask=mask_k, other=0.0).to(tl.float32)[:, None]
    first_y, first_x = first_pixel(i, height, label_height), first_pixel(j, width, label_width)
    end_y = tl.where(i == cells_h - 1, label_height, tl.minimum(first_pixel(i + 1, height, label_height), label_height))
    end_x = tl.where(j == cells_w - 1, label_width, tl.minimum(first_pixel(j + 1, width, label_width), label_width))

    g00, g01 = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    g10, g11 = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    loss, count = tl.zeros((BLOCK_X,), tl.float32), tl.zeros((BLOCK_X,), tl.int32)
    for start_x in range(first_x, end_x, BLOCK_X):
        x = start_x + tl.arange(0, BLOCK_X)
        mask_x = x < end_x
        fx = within_cell(x, j, width, label_width)[None, :]
        top, bottom = l00 * (1.0 - fx) + l01 * fx, l10 * (1.0 - fx) + l11 * fx  # (BLOCK_K, BLOCK_X)
        grad_top, grad_bottom = tl.zeros((BLOCK_K, BLOCK_X), tl.float32), tl.zeros((BLOCK_K, BLOCK_X), tl.float32)
        for y in range(first_y, end_y):
            fy = within_cell(y, i, height, label_height)
            row_ptr = labels_ptr + (n.to(tl.int64) * label_height + y) * label_width
            label = tl.load(row_ptr + x, mask=mask_x, other=0).to(tl.int64)
            labelled = mask_x & (label != ignore_index)
            z = tl.where(mask_k[:, None], top * (1.0 - fy) + bottom * fy, float("-inf"))
            z -= tl.max(z, axis=0)[None, :]  # no overflow in exp
            exp_z = tl.exp(z)
            total = tl.sum(exp_z, axis=0)
            is_label = k[:, None] == label.to(tl.int32)[None, :]
            chosen = tl.sum(tl.where(is_label, z, 0.0), axis=0)
            surprise = tl.where((label >= 0) & (label < K), tl.log(total) - chosen, float("nan"))
            loss += tl.where(labelled, surprise, 0.0)
            count += labelled.to(tl.int32)
            grad = exp_z * (1.0 / total)[None, :] - is_label.to(tl.float32)
            grad *= labelled.to(tl.float32)[None, :]  # not tl.where: NaN stays NaN at ignored pixels, as in PyTorch
            grad = tl.where(mask_x[None, :], grad, 0.0)
            grad_top += grad * (1.0 - fy)
            grad_bottom += grad * fy
        g00 += tl.sum(grad_top * (1.0 - fx), axis=1)
        g01 += tl.sum(grad_top * fx, axis=1)
        g10 += tl.sum(grad_bottom * (1.0 - fx), axis=1)
        g11 += tl.sum(grad_bottom * fx, axis=1)

    corner_ptr = corners_ptr + cell.to(tl.int64) * 4 * K + k
    tl.store(corner_ptr, g00, mask=mask_k)
    tl.store(corner_ptr + K, g01, mask=mask_k)
    tl.store(corner_ptr + 2 * K, g10, mask=mask_k)
    tl.store(corner_ptr + 3 * K, g11, mask=mask_k)
    tl.store(losses_ptr + cell, tl.sum(loss, axis=0))
    tl.store(counts_ptr + cell, tl.sum(count, axis=0))


@triton.jit(do_not_specialize=["cells"])
def mean_loss_kernel(losses_ptr, counts_ptr, loss_ptr, share_ptr, cells, BLOCK: tl.constexpr):
    """Compute, in one program, the mean loss and the share 1 / |L| of a pixel."""
    losses, counts = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.int64)
    for first in range(0, cells, BLOCK):
        cell = first + tl.arange(0, BLOCK)
        losses += tl.load(losses_ptr + cell, mask=cell < cells, other=0.0).to(tl.float64)
        counts += tl.load(counts_ptr + cell, mask=cell < cells, other=0).to(tl.int64)
    labelled = tl.maximum(tl.sum(counts, axis=0), 1).to(tl.float64)
    tl.store(loss_ptr, (tl.sum(losses, axis=0) / labelled).to(loss_ptr.dtype.element_ty))
    tl.store(share_ptr, (1.0 / labelled).to(tl.float32))


@triton.jit(do_not_specialize=["logits", "height", "width", "cells_h", "cells_w", *STRIDES])
def gather_corners_kernel(
    corners_ptr,  # (cells, 4, K)
    share_ptr,  # (1,)
    grad_ptr,
    logits,  # N · height · width
    height,
    width,
    cells_h,
    cells_w,
    stride_n,
    stride_k,
    stride_h,
    stride_w,
    K,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add up the gradient of each logit from the cells before and after it, along both axes."""
    q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    k = tl.arange(0, BLOCK_K)
    n, i, j = q // width // height, q // width % height, q % width
    total = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for corner in tl.static_range(4):
        cell_i, cell_j = i - corner // 2, j - corner % 2
        exists = (q < logits) & (cell_i >= 0) & (cell_i < cells_h) & (cell_j >= 0) & (cell_j < cells_w)
        cell = (n * cells_h + cell_i) * cells_w + cell_j
        place = (cell.to(tl.int64) * 4 + corner)[:, None] * K + k[None, :]
        total += tl.load(corners_ptr + place, mask=exists[:, None] & (k < K)[None, :], other=0.0)
    total *= tl.load(share_ptr)
    place = n.to(tl.int64) * stride_n + i.to(tl.int64) * stride_h + j.to(tl.int64) * stride_w
    place = place[:, None] + k[None, :].to(tl.int64) * stride_k
    tl.store(grad_ptr + place, total.to(grad_ptr.dtype.element_ty), mask=(q < logits)[:, None] & (k < K)[None, :])
