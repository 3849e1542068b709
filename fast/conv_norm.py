"""A convolution of a cell or decoder, with its norm: an `nn.Conv2d` without bias that holds the norm as its child `norm`.

It is a plain `nn.Conv2d`, whose forward is the convolution alone, so that whatever looks for convolutions (counters of
operations, pruning, parametrizations) finds them. `conv_norm_relu` runs both as modules; `live_conv` gives their tensors to
the operations that run both at once.
"""

from collections.abc import Callable
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.batch_norm import live, uses_batch_statistics
from fast.kernels import LiveConv
from reference.pointwise_conv import ConvNorm

NormLayer: TypeAlias = Callable[[int], nn.Module]  # channels -> a norm of maps (N, channels, H, W)


def conv_norm(
    in_channels: int,
    channels: int,
    norm_layer: NormLayer,
    *,
    rate: tuple[int, int] | None = None,
    truncated_normal_std: float | None = None,
) -> nn.Conv2d:
    """1×1, or with a rate 3×3 and depthwise; weights by Xavier, or from a truncated normal."""
    conv: nn.Conv2d = nn.utils.skip_init(  # type: ignore[no-untyped-call]  # which draws no random numbers of its own
        nn.Conv2d,
        in_channels,
        channels,
        kernel_size=1 if rate is None else 3,
        padding=0 if rate is None else rate,
        dilation=1 if rate is None else rate,
        groups=1 if rate is None else in_channels,
        bias=False,
        device=torch.get_default_device(),
    )
    if truncated_normal_std is None:
        nn.init.xavier_uniform_(conv.weight)
    else:  # TensorFlow truncates at two standard deviations
        std = truncated_normal_std
        nn.init.trunc_normal_(conv.weight, std=std, a=-2 * std, b=2 * std)
    conv.norm = new_norm(norm_layer, channels)
    return conv


def conv_norm_relu(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """x: (N, C_in, H, W) -> (N, C, H, W): convolution, norm and ReLU, each called as a module.

    As in the operations that fuse them, a training `nn.BatchNorm2d` takes its running statistics where a map has one value a
    channel, at which its own forward raises ValueError.
    """
    return F.relu(normed(conv(x), _norm_of(conv)))


def normed(x: Tensor, norm: nn.Module) -> Tensor:
    """x: (N, C, H, W) -> (N, C, H, W): the norm, called as a module, with running statistics as in `conv_norm_relu`."""
    if not (isinstance(norm, nn.BatchNorm2d) and norm.training) or uses_batch_statistics(x, training=True):
        return cast(Tensor, norm(x))
    norm.eval()
    try:
        return cast(Tensor, norm(x))
    finally:
        norm.train()


def new_norm(norm_layer: NormLayer, channels: int) -> nn.Module:
    """The norm of so many channels. Raises TypeError for a module in place of what makes one."""
    if isinstance(norm_layer, nn.Module):
        raise TypeError(f"norm_layer must make a norm from a number of channels, got one: {norm_layer}")
    return norm_layer(channels)


def live_conv(conv: nn.Conv2d) -> LiveConv:
    """The weights with the norm's own mode: it can be frozen while the rest trains, or the other way round."""
    return LiveConv(conv.weight, live(_norm_of(conv)))


def conv_weights(conv: nn.Conv2d) -> ConvNorm[Tensor]:
    """The live tensors in the reference's container. Raises TypeError or ValueError for a norm that the reference lacks."""
    weight, norm = live_conv(conv)
    return ConvNorm(weight, norm.tensors)


def _norm_of(conv: nn.Module) -> nn.Module:
    norm = getattr(conv, "norm", None)
    if not isinstance(norm, nn.Module):
        raise TypeError(
            f"a convolution must hold its norm as its child `norm`, nn.Identity() for none; this one has not: {conv}"
        )
    return norm
