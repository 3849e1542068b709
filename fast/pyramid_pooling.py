"""`reference/pyramid_pooling.py` on PyTorch.

A sliding mean is taken along rows, then along columns: k_h + k_w reads per output instead of k_h · k_w. Backends that multiply
planes by small matrices compute the means in one pass over the map, and the resize in another.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fast.batch_norm import MOMENTUM
from fast.bilinear_resize import constant, lazy_bilinear_resize
from fast.kernels import NormedMap, backend_for
from fast.lazy_norm import LiveConv, in_mode, plane_product, value
from fast.pointwise_conv import lazy_conv1x1
from reference.pointwise_conv import ConvNorm
from reference.pyramid_pooling import PoolingVariant, pooling_matrix, window_size


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
    conv = in_mode(weights, training, momentum)
    return lazy_pyramid_pooling(NormedMap(x), conv, grid_size=grid_size, variant=variant, pooling_size=pooling_size).raw


def lazy_pyramid_pooling(
    x: NormedMap,
    conv: LiveConv,
    *,
    grid_size: tuple[int, int],
    variant: PoolingVariant = "sliding_window",
    pooling_size: tuple[int, int] | None = None,
) -> NormedMap:
    """Like `pyramid_pooling`, of a map whose norm is applied on load; the result's norm is applied."""
    size = (x.raw.shape[2], x.raw.shape[3])
    pin_h, pin_w = pooling_size or (None, None)
    backend = backend_for(x.raw)
    if backend:  # means and resize are each a small matrix along either axis
        like = (torch.promote_types(x.raw.dtype, torch.float32), x.raw.device)
        rows = _pooling(size[0], grid_size[0], variant, pin_h, *like)
        columns = _pooling(size[1], grid_size[1], variant, pin_w, *like)
        means = NormedMap(plane_product(backend, x, rows, columns))
    elif variant == "grid_cells":
        means = NormedMap(F.adaptive_avg_pool2d(value(x), grid_size))
    else:
        means = NormedMap(_sliding_means(_sliding_means(value(x), 2, grid_size[0], pin_h), 3, grid_size[1], pin_w))
    return NormedMap(lazy_bilinear_resize(lazy_conv1x1(means, conv), size))


def _sliding_means(x: Tensor, axis: int, grid: int, pooling_size: int | None) -> Tensor:
    if grid == 1 and pooling_size is None:  # an exported program then works at every size, which windows could not
        return x.mean(dim=axis, keepdim=True)
    window = window_size(x.shape[axis], grid, pooling_size)
    return F.avg_pool2d(x, (window, 1) if axis == 2 else (1, window), stride=1)


@functools.cache  # kept in memory, as in `resize_matrix`
def _pooling(
    size: int, grid: int, variant: PoolingVariant, pooling_size: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    return constant(pooling_matrix(size, grid, variant=variant, pooling_size=pooling_size), dtype, device)
