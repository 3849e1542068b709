"""`reference/upsampled_l1.py` on PyTorch. Full-size outputs exist: with one channel they are as large as the targets."""

import torch
from torch import Tensor

from fast.kernels import NormedMap, operations_for


def upsampled_l1(outputs: Tensor, targets: Tensor, *, align_corners: bool = True) -> Tensor:
    """outputs: (N, 1, h, w), targets: (N, H, W), NaN where nothing was measured -> the mean loss, in the unit of both.

    Computed in float32, or in float64 if the outputs are.
    """
    losses = pixel_losses(outputs, targets, align_corners=align_corners)
    count = (~targets.isnan()).sum().clamp(min=1)
    return (losses.sum(dtype=torch.float64) / count).to(losses.dtype)


def pixel_losses(outputs: Tensor, targets: Tensor, *, align_corners: bool = True) -> Tensor:
    """outputs: (N, 1, h, w), targets: (N, H, W) -> |resize(outputs) − target|: (N, H, W), 0 where nothing was measured."""
    check_targets(outputs, targets)
    precise = outputs if outputs.dtype == torch.float64 else outputs.float()
    with torch.autocast(outputs.device.type, enabled=False):
        # Not by `bilinear_resize`: on kernels, the gradient of this resize is the same at every run.
        size = targets.shape[1], targets.shape[2]
        upsampled = operations_for(precise).resize(NormedMap(precise), size, align_corners)[:, 0]
        difference = upsampled - targets.to(precise.dtype)
        # NaN ends here: a difference has the gradient 1 whatever it is, and |·| never sees one.
        return difference.where(~targets.isnan(), 0.0).abs()


def check_targets(outputs: Tensor, targets: Tensor) -> None:
    """Raises ValueError unless targets: (N, H, W) belong to outputs: (N, 1, h, w), on one device."""
    fits = outputs.ndim == 4 and outputs.shape[1] == 1 and targets.ndim == 3 and outputs.shape[0] == targets.shape[0]
    if not fits or outputs.device != targets.device:
        raise ValueError(
            f"outputs: (N, 1, h, w) and targets: (N, H, W) on one device are needed, got {tuple(outputs.shape)} on "
            f"{outputs.device}, {tuple(targets.shape)} on {targets.device}"
        )
