"""`reference/pyramid_pooling.py` on PyTorch.

A sliding mean is taken along rows, then along columns: k_h + k_w reads per output instead of k_h · k_w.
"""

import torch.nn.functional as F
from torch import Tensor

from fast.batch_norm import MOMENTUM
from fast.bilinear_resize import bilinear_resize
from fast.pointwise_conv import conv1x1
from reference.pointwise_conv import ConvNorm
from reference.pyramid_pooling import PoolingVariant, window_size


def pyramid_pooling(
    x: Tensor,
    weights: ConvNorm[Tensor],
    *,
    grid_size: tuple[int, int],
    training: bool,
    variant: PoolingVariant = "sliding_window",
    pooling_size: tuple[int, int] | None = None,
    momentum: float = MOMENTUM,
) -> Tensor:
    """Means, conv1x1 (with BN and ReLU), resize back: (N, C_in, H, W) -> (N, C_out, H, W)."""
    height, width = x.shape[2:]
    if variant == "grid_cells":
        means = F.adaptive_avg_pool2d(x, grid_size)
    else:
        pin_h, pin_w = pooling_size or (None, None)
        window_h, window_w = window_size(height, grid_size[0], pin_h), window_size(width, grid_size[1], pin_w)
        means = F.avg_pool2d(F.avg_pool2d(x, (window_h, 1), stride=1), (1, window_w), stride=1)
    return bilinear_resize(conv1x1(means, weights, training=training, momentum=momentum), (height, width))
