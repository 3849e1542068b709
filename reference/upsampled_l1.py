"""Absolute difference of outputs resized to the targets' size, averaged over the measured pixels.

    loss = (1 / |M|) · Σ_{p ∈ M}  |resize(outputs)[p] − target_p|,     M = pixels that were measured, whose target is not NaN

Without any measured pixel the loss is 0. The targets keep their full size: the outputs are resized, not the targets. For depth
both are logarithms of metres. The difference is then the logarithm of the ratio of two depths, so the loss is the same in any
unit of length. Source of predicting the logarithm: Eigen et al., "Depth Map Prediction from a Single Image using a Multi-Scale
Deep Network", NeurIPS 2014, section 3; their loss is made of squares of this difference.
"""

import numpy as np
from numpy.typing import NDArray

from reference.batch_norm import Array
from reference.bilinear_resize import bilinear_resize, bilinear_resize_backward


def upsampled_l1(outputs: Array, targets: Array, *, align_corners: bool = True) -> float:
    """outputs: (N, 1, h, w), targets: (N, H, W), NaN where nothing was measured -> the mean loss, in the unit of both.

    >>> outputs = np.array([0.0, 2.0]).reshape(1, 1, 1, 2)  # resized to three pixels: 0, 1, 2
    >>> upsampled_l1(outputs, np.array([[[0.5, np.nan, 3.0]]]))  # (0.5 + 1) / 2
    0.75
    """
    difference, measured = _difference(outputs, targets, align_corners)
    return float(np.abs(difference).sum() / max(measured.sum(), 1))


def upsampled_l1_backward(outputs: Array, targets: Array, *, align_corners: bool = True) -> Array:
    """Gradient of the loss for outputs: (N, 1, h, w). That of |x| at 0 is taken as 0."""
    difference, measured = _difference(outputs, targets, align_corners)
    grad_upsampled = np.sign(difference)[:, None] / max(measured.sum(), 1)  # (N, 1, H, W)
    return bilinear_resize_backward(grad_upsampled, (outputs.shape[2], outputs.shape[3]), align_corners=align_corners)


def _difference(outputs: Array, targets: Array, align_corners: bool) -> tuple[Array, NDArray[np.bool_]]:
    """Resized output less target, 0 where nothing was measured: (N, H, W), and which pixels were measured: (N, H, W)."""
    if outputs.ndim != 4 or outputs.shape[1] != 1 or targets.ndim != 3 or outputs.shape[0] != targets.shape[0]:
        raise ValueError(f"needs outputs: (N, 1, h, w) and targets: (N, H, W), got {outputs.shape}, {targets.shape}")
    measured = ~np.isnan(targets)
    upsampled = bilinear_resize(outputs, (targets.shape[1], targets.shape[2]), align_corners=align_corners)[:, 0]
    return np.where(measured, upsampled - targets, 0.0), measured
