"""`reference/pyramid_pooling.py` on PyTorch."""

from torch import Tensor

from fast.batch_norm import MOMENTUM
from fast.kernels import LiveConv, NormedMap, in_mode, operations_for
from reference.pointwise_conv import ConvNorm
from reference.pyramid_pooling import PoolingVariant


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
    return pool(NormedMap(x), conv, grid_size=grid_size, variant=variant, pooling_size=pooling_size)


def pool(
    x: NormedMap,
    conv: LiveConv,
    *,
    grid_size: tuple[int, int],
    variant: PoolingVariant = "sliding_window",
    pooling_size: tuple[int, int] | None = None,
) -> Tensor:
    """`pyramid_pooling` of a map whose norm may not yet be applied, with a convolution as it stands in a network."""
    operations = operations_for(x.raw)
    means = operations.pooling_means(x, grid_size, variant, pooling_size)
    projected = operations.pointwise_conv([NormedMap(means)], *conv)
    return operations.resize(projected, (x.raw.shape[2], x.raw.shape[3]))
