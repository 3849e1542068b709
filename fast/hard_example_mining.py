"""`reference/hard_example_mining.py` on PyTorch: which pixels are the hardest.

All other pixels become ignored ones, so `upsampled_cross_entropy` computes loss and gradient. Logits of a whole batch are
never upsampled here either; only one number per pixel is. For another loss, `keep_largest` takes its pixels' losses. Of pixels
with equal losses any may be kept.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fast.kernels.library import band_rows
from fast.kernels.matrices import resize_matrix
from fast.upsampled_cross_entropy import fitting_weights
from reference.upsampled_cross_entropy import IGNORE_INDEX


@torch.no_grad()
def hardest_pixels(
    logits: Tensor,
    labels: Tensor,
    share: float,
    *,
    class_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    align_corners: bool = True,
) -> Tensor:
    """`labels` (N, H, W), with `ignore_index` at every pixel whose loss of `logits` (N, K, h, w) is not among the largest.

    int(share · N·H·W) pixels are kept (ignored ones count in N·H·W), but none whose loss is 0. As the authors' do, class
    weights (K,) multiply the losses before the largest are taken, so pixels of weight 0 are never kept.
    """
    precise = logits.float()
    weights = None if class_weights is None else fitting_weights(class_weights, precise)
    return keep_largest(_pixel_losses(precise, labels, ignore_index, weights, align_corners), labels, share, ignore_index)


@torch.no_grad()
def keep_largest(losses: Tensor, labels: Tensor, share: float, ignore: int | float) -> Tensor:
    """`labels` (N, H, W), with `ignore` at every pixel whose loss is not among the largest; losses: (N, H, W), 0 if ignored.

    int(share · N·H·W) pixels are kept (ignored ones count in N·H·W), but none whose loss is 0. A loss of NaN counts as the
    largest. `ignore` is a number that the labels' dtype can hold, NaN for targets in floating point.
    """
    flat = losses.flatten()  # (N·H·W,)
    largest = flat.topk(int(share * flat.numel())).indices
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[largest] = flat[largest] != 0
    return labels.where(kept.view(labels.shape), ignore)


def _pixel_losses(
    logits: Tensor, labels: Tensor, ignore_index: int, class_weights: Tensor | None, align_corners: bool
) -> Tensor:
    """The loss of every pixel (N, H, W), 0 where it is ignored, computed in bands of rows."""
    height, width = labels.shape[1:]
    rows, columns = (
        resize_matrix(logits.shape[2 + i], (height, width)[i], logits.dtype, logits.device, align_corners) for i in range(2)
    )
    band = band_rows(logits, width)
    losses = logits.new_empty(labels.shape)
    for n, logit in enumerate(logits):
        wide = logit @ columns.T  # (K, h, W)
        for top in range(0, height, band):
            target = labels[n, top : top + band].long()
            upsampled = rows[top : top + band] @ wide  # (K, band, W)
            losses[n, top : top + band] = F.cross_entropy(
                upsampled[None], target[None], class_weights, ignore_index=ignore_index, reduction="none"
            )[0]
    return losses
