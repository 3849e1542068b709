"""Cut the batch of a training iteration out of the feature maps and labels of all images, at places drawn on the device.

    place = ⌊draw · limit / 2³¹⌋        limit: images, H - h + 1 tops, W - w + 1 lefts        draw: 0 ... 2³¹ - 1
    batch[n] = features[image, top : top + h, left : left + w]                 channels last, so rows are contiguous
    targets[n] = labels[image, s·top : s·top + H, s·left : s·left + W]          H × W pixels belong to a crop of h × w features

No place's probability differs from 1 / limit by more than 2⁻³¹.

Bytes: each value of the batch and of its labels is read and written once: 34 MB for 8·49·49·320 features of 16 bits and 8·769²
labels of 8 bits. No arithmetic but a conversion to the dtype that is asked for.

A program copies a part of one row, of features or of labels. Features go by vectors of 16 bytes where the channels are a
multiple of 16. A row of labels begins at any byte, so these go one by one, neighbouring lanes at neighbouring bytes; vectors
of labels would have to be shifted (not tried; estimated to save a quarter of all instructions).

Versions (not measured: no GPU was at hand)
  1. `features[index, rows, columns]` and the same for labels by the library, which expands three index tensors to one int64
     each per pixel: 22 launches with the draws and sums of indices, 227 MB moved for 4.7 MB of labels
  2. this, four warps for 2048 values or 1024 labels: one launch behind one draw; 6.7 million warp instructions for the batch
     above, two thirds of them to find the row
  3. two warps: 4.3 million, 40 registers, 50 warps on a multiprocessor. One warp has 3.1 million and 79 registers, but half as
     many warps that wait for memory
"""

import triton
import triton.language as tl


@triton.jit
def draw_place(draw_ptr, limit):
    """Turn a number below 2³¹ into one below `limit`: int64."""
    return (tl.load(draw_ptr).to(tl.int64) * limit) >> 31


@triton.jit
def copy_part(source_ptr, target_ptr, first, length, BLOCK: tl.constexpr):
    """Copy elements first ... first + BLOCK - 1 of a row of `length`."""
    i = first + tl.arange(0, BLOCK)
    value = tl.load(source_ptr + i, mask=i < length)
    tl.store(target_ptr + i, value.to(target_ptr.dtype.element_ty), mask=i < length)


SIZES = ("batch_size", "images", "height", "width", "crop_h", "crop_w", "label_height", "label_width")


@triton.jit(do_not_specialize=[*SIZES, "window_h", "window_w", "stride"])
def crops_kernel(
    features_ptr,  # (images, height, width, C)
    labels_ptr,  # (images, label_height, label_width)
    draws_ptr,  # (3, batch_size), int32, at least 0: for image, top and left
    batch_ptr,  # (batch_size, crop_h, crop_w, C)
    targets_ptr,  # (batch_size, window_h, window_w)
    batch_size,
    images,
    height,
    width,
    crop_h,
    crop_w,
    label_height,
    label_width,
    window_h,
    window_w,
    stride,
    C,
    BLOCK_C: tl.constexpr,  # values of a row of features
    BLOCK_X: tl.constexpr,  # labels of a row
):
    """Copy one part of a row: the first programs have the features, the others the labels."""
    tiles_c, tiles_x = tl.cdiv(crop_w * C, BLOCK_C), tl.cdiv(window_w, BLOCK_X)
    feature_programs = batch_size * crop_h * tiles_c
    program = tl.program_id(0)
    is_label = program >= feature_programs
    part = tl.where(is_label, program - feature_programs, program)
    tiles, rows = tl.where(is_label, tiles_x, tiles_c), tl.where(is_label, window_h, crop_h)
    row, tile = part // tiles, part % tiles
    n, y = row // rows, row % rows
    image = draw_place(draws_ptr + n, images)
    top = draw_place(draws_ptr + batch_size + n, height - crop_h + 1)
    left = draw_place(draws_ptr + 2 * batch_size + n, width - crop_w + 1)
    if is_label:
        source = (image * label_height + stride * top + y) * label_width + stride * left
        copy_part(labels_ptr + source, targets_ptr + row.to(tl.int64) * window_w, tile * BLOCK_X, window_w, BLOCK_X)
    else:
        source = ((image * height + top + y) * width + left) * C
        copy_part(features_ptr + source, batch_ptr + row.to(tl.int64) * crop_w * C, tile * BLOCK_C, crop_w * C, BLOCK_C)
