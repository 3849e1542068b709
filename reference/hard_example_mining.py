"""Hard example mining: the cross-entropy of the pixels that have the largest loss, the hardest ones, alone.

    loss = (1 / |{s ∈ T: l_s ≠ 0}|) · Σ_{s ∈ T} l_s,     T = the int(share · N·H·W) pixels of the largest l

where l is the loss of each pixel (`upsampled_cross_entropy.py`), times its class's weight. Ignored pixels are among the N·H·W,
but their loss is 0, so they count neither in the sum nor in the denominator. T is chosen over the whole batch. While no two
pixels change places, it does not depend on the logits. So loss and gradient are those with all other pixels ignored. The share
falls linearly over the first iterations (`mined_share`).

Source: `top_k_percent_pixels` and `hard_example_mining_step` of `add_softmax_cross_entropy_loss_for_each_scale` in
research/deeplab/utils/train_utils.py.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference.batch_norm import Array
from reference.upsampled_cross_entropy import (
    IGNORE_INDEX,
    pixel_losses,
    upsampled_cross_entropy,
    upsampled_cross_entropy_backward,
)


def mined_share(share: float, iteration: int, iterations: int) -> float:
    """The share of pixels at `iteration`: it falls linearly from 1 to `share` over `iterations`, or is `share` if that is 0.

    >>> mined_share(0.5, 2, 4)
    0.75
    """
    progress = min(1.0, iteration / iterations) if iterations > 0 else 1.0
    return progress * share + 1 - progress


def keep_largest(losses: Array, labels: NDArray[Any], share: float, ignore: int | float) -> NDArray[Any]:
    """`labels` (N, H, W), with `ignore` at every pixel whose loss is not among the largest; losses: (N, H, W), 0 if ignored.

    int(share · N·H·W) pixels are kept, but none whose loss is 0; of equal losses the first ones. A loss of NaN counts as the
    largest, lest it be hidden. The labels may be measured values, where `ignore` is NaN (`upsampled_l1.py`). Raises ValueError
    for a share that is not within 0 and 1.

    >>> keep_largest(np.array([[[0.1, 0.0, 3.0, 2.0]]]), np.array([[[7, 255, 8, 9]]]), 0.5, 255)
    array([[[255, 255,   8,   9]]])
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"the share of pixels must be 0 to 1, got {share}")
    hardest_first = np.argsort(-np.where(np.isnan(losses), np.inf, losses), axis=None, kind="stable")
    kept = np.zeros(losses.size, dtype=bool)
    kept[hardest_first[: int(share * losses.size)]] = True
    return np.where(kept.reshape(losses.shape) & (losses != 0.0), labels, np.asarray(ignore, dtype=labels.dtype))


def hardest_pixels(
    logits: Array,
    labels: NDArray[np.integer],
    share: float,
    *,
    class_weights: Array | None = None,
    ignore_index: int = IGNORE_INDEX,
    align_corners: bool = True,
) -> NDArray[np.integer]:
    """`labels` (N, H, W), with `ignore_index` at every pixel whose loss of `logits` (N, K, h, w) is not among the largest."""
    losses = pixel_losses(logits, labels, class_weights=class_weights, ignore_index=ignore_index, align_corners=align_corners)
    return keep_largest(losses, labels, share, ignore_index)


def mined_cross_entropy(
    logits: Array,
    labels: NDArray[np.integer],
    share: float,
    *,
    class_weights: Array | None = None,
    ignore_index: int = IGNORE_INDEX,
    align_corners: bool = True,
) -> float:
    """Arguments of `upsampled_cross_entropy` -> the mean loss of the hardest share of all pixels, in nats; 0 if that is none.

    >>> logits = np.log([[1.0, 3.0]]).reshape(1, 2, 1, 1)  # probabilities 1/4 and 3/4
    >>> labels = np.array([[[0, 1, 1, 255]]])  # losses ln 4, ln 4/3, ln 4/3, and none
    >>> [round(float(np.exp(mined_cross_entropy(logits, labels, share))), 6) for share in (0.0, 0.25, 0.5)]
    [1.0, 4.0, 2.309401]
    """
    mined = hardest_pixels(
        logits, labels, share, class_weights=class_weights, ignore_index=ignore_index, align_corners=align_corners
    )
    return upsampled_cross_entropy(
        logits, mined, class_weights=class_weights, ignore_index=ignore_index, align_corners=align_corners
    )


def mined_cross_entropy_backward(
    logits: Array,
    labels: NDArray[np.integer],
    share: float,
    *,
    class_weights: Array | None = None,
    ignore_index: int = IGNORE_INDEX,
    align_corners: bool = True,
) -> Array:
    """Gradient of the loss for logits: (N, K, h, w)."""
    mined = hardest_pixels(
        logits, labels, share, class_weights=class_weights, ignore_index=ignore_index, align_corners=align_corners
    )
    return upsampled_cross_entropy_backward(
        logits, mined, class_weights=class_weights, ignore_index=ignore_index, align_corners=align_corners
    )
