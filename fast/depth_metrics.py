"""`reference/depth_metrics.py` on PyTorch: the totals. Scores of added totals are the reference's own functions."""

import torch
from torch import Tensor

from reference.depth_metrics import DELTA, POWERS


@torch.no_grad()
def depth_totals(predictions: Tensor, depths: Tensor) -> Tensor:
    """Sums over the pixels of two tensors of one shape, in the reference's order -> (6,), float64, on their device.

    Whether all depths are above 0 is not checked: the answer would have to be waited for.
    """
    if predictions.shape != depths.shape or predictions.device != depths.device:
        raise ValueError(
            f"predictions and depths must have one shape and device, got {tuple(predictions.shape)} on "
            f"{predictions.device}, {tuple(depths.shape)} on {depths.device}"
        )
    measured = ~depths.isnan()
    p, d = (x.double().where(measured, 1.0) for x in (predictions, depths))  # 1 for both adds nothing to a sum
    ratio = torch.maximum(p / d, d / p)
    within = [(ratio < DELTA**power) & measured for power in POWERS]
    terms = [measured, (p - d).square(), (p - d).abs() / d, *within]
    return torch.stack([term.sum(dtype=torch.float64) for term in terms])
