"""Scores of depth maps: root-mean-square error, mean relative error, and how many pixels are right up to a factor.

    RMSE = √( (1 / |M|) · Σ (p − d)² )        AbsRel = (1 / |M|) · Σ |p − d| / d
    δ_k = (1 / |M|) · number of pixels with  max(p / d, d / p) < 1.25^k,     k = 1, 2, 3

for predicted depth p and true depth d, both above 0 in metres, over the pixels M that were measured: those whose depth is not
NaN. The pixels of all images are pooled, each counts once; some papers take a score per image and average over images, which
gives other numbers. Predictions are compared as they are, not first scaled to the true median. Used for NYU Depth and KITTI.
Source: Eigen et al., "Depth Map Prediction from a Single Image using a Multi-Scale Deep Network", NeurIPS 2014, section 4.
"""

import numpy as np

from reference.batch_norm import Array

DELTA = 1.25
POWERS = (1, 2, 3)


def depth_totals(predictions: Array, depths: Array) -> Array:
    """Sums over the pixels of two arrays of one shape: (6,), of which every score is made; add totals to add images.

    They are: number of measured pixels, Σ (p − d)², Σ |p − d| / d, number with max(p / d, d / p) < 1.25, < 1.25², < 1.25³.
    Raises ValueError for two shapes, and for a depth or, where one was measured, a prediction that is not above 0.

    >>> depth_totals(np.array([1.0, 3.0, 5.0]), np.array([1.0, 2.0, np.nan]))  # a ratio of 1.5 is below 1.25²
    array([2. , 1. , 0.5, 1. , 2. , 2. ])
    """
    if predictions.shape != depths.shape:
        raise ValueError(f"predictions and depths must have one shape, got {predictions.shape}, {depths.shape}")
    measured = ~np.isnan(depths)
    p, d = predictions[measured].astype(np.float64), depths[measured].astype(np.float64)
    for name, values in (("predicted", p), ("measured", d)):
        if (values <= 0).any():
            raise ValueError(f"a {name} depth must be above 0, got {values[values <= 0][0]}")
    ratio = np.maximum(p / d, d / p)
    within = [np.count_nonzero(ratio < DELTA**power) for power in POWERS]
    return np.array([p.size, np.square(p - d).sum(), (np.abs(p - d) / d).sum(), *within], dtype=np.float64)


def rmse(totals: Array) -> float:
    """totals: (6,) -> root-mean-square error in the depths' unit; NaN if nothing was measured.

    >>> rmse(depth_totals(np.array([1.0, 3.0]), np.array([1.0, 2.0])))  # √(1 / 2)
    0.7071067811865476
    """
    return float(np.sqrt(_mean(totals, 1)))


def abs_rel(totals: Array) -> float:
    """totals: (6,) -> mean of |p − d| / d; NaN if nothing was measured.

    >>> abs_rel(depth_totals(np.array([1.0, 3.0]), np.array([1.0, 2.0])))  # (0 + 1/2) / 2
    0.25
    """
    return _mean(totals, 2)


def delta(totals: Array, power: int = 1) -> float:
    """totals: (6,) -> share of the pixels, in 0..1, with max(p / d, d / p) < 1.25^power; NaN if nothing was measured.

    >>> totals = depth_totals(np.array([1.0, 3.0]), np.array([1.0, 2.0]))
    >>> delta(totals), delta(totals, power=2)
    (0.5, 1.0)
    """
    if power not in POWERS:
        raise ValueError(f"power must be 1, 2 or 3, got {power}")
    return _mean(totals, 2 + power)


def _mean(totals: Array, index: int) -> float:
    """One of the sums, by the number of measured pixels."""
    return float(totals[index] / totals[0]) if totals[0] > 0 else float("nan")
