"""Any module that gives features as a backbone; what its features are is measured on a made picture."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fast.backbone import Backbone
from search.errors import InputError

_PROBE = (129, 161)  # height and width in pixels, 16·k + 1 each
_STRIDES = (8, 16)
_TOLERANCE = 0.01  # of the features' variation; rounding is far below, half a feature's shift far above


class LastMap(nn.Module):
    """A body for `Backbone`: the last map that `module` gives, of one tensor, a list of them or a mapping to them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.module(images)
        if isinstance(maps, Mapping):
            maps = list(maps.values())
        return [maps[-1] if isinstance(maps, list | tuple) else maps]


def backbone_from_module(module: nn.Module, *, name: str, mean: Sequence[float], std: Sequence[float]) -> Backbone:
    """The module, which is used and not copied, as a backbone: images (N, 3, H, W) -> its last map (N, channels, h, w).

    The module gets pixels from 0 to 1 with `mean` subtracted and divided by `std`, such as (0.485, 0.456, 0.406) and (0.229,
    0.224, 0.225). It may return a map, or several, of which the last counts. Channels and output stride are measured.

    Raises InputError unless there is a feature on every 8th or 16th pixel, the corners included: H = s·k + 1 rows of pixels
    give k + 1 rows of features, and the map of a mirrored picture would be the mirrored map if all kernels were symmetric.
    """
    for field, values in (("mean", mean), ("std", std)):
        if len(values) != 3 or not all(0 <= value <= 1 for value in values):
            raise InputError(f"`{field}` must be three numbers for pixels from 0 to 1, got {tuple(values)}")
    body = LastMap(module)
    features = _features(body, name, torch.rand(1, 3, *_PROBE, generator=torch.Generator().manual_seed(0)))
    stride = _output_stride(features, name)
    _require_corners(body, name)
    backbone = Backbone(
        name,
        body,
        channels=features.shape[1],
        output_stride=stride,
        mean=torch.tensor([255.0 * value for value in mean]),
        std=torch.tensor([255.0 * value for value in std]),
    )
    return backbone.to(_device(body))


@torch.no_grad()
def _features(body: LastMap, name: str, images: Tensor) -> Tensor:
    """The features of these images, on the CPU, in evaluation mode; the mode that the module was in is kept."""
    modes = {each: each.training for each in body.modules()}
    try:
        (features,) = body.eval()(images.to(_device(body)))
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"`module` {name} gives no features of images {tuple(images.shape)} ({reason}): correct it"
        ) from error
    finally:
        for each, mode in modes.items():
            each.training = mode
    if not isinstance(features, Tensor) or features.ndim != 4 or not features.is_floating_point():
        given = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise InputError(
            f"`module` {name} must give a map (N, channels, h, w), or several, got {given}: cut it before its head"
        )
    return features.float().cpu()


def _device(module: nn.Module) -> torch.device:
    return next((each.device for each in module.parameters()), torch.device("cpu"))


def _output_stride(features: Tensor, name: str) -> int:
    height, width = features.shape[2:]
    strides = {(pixels - 1) / max(extent - 1, 1) for pixels, extent in zip(_PROBE, (height, width), strict=True)}
    stride = min(strides)
    if len(strides) == 1 and stride in _STRIDES:
        return int(stride)
    given = f"{height}×{width} features of {_PROBE[0]}×{_PROBE[1]} pixels"
    if len(strides) == 1 and stride == int(stride):
        remedy = "change strides to dilation in its last stages, as by `replace_stride_with_dilation` of torchvision's ResNets"
        raise InputError(f"`module` {name} gives {given}, an output stride of {int(stride)} in place of 8 or 16: {remedy}")
    rows, columns = ((pixels - 1) // 16 + 1 for pixels in _PROBE)
    raise InputError(
        f"`module` {name} gives {given}; at output stride 16 it would be {rows}×{columns}, with features on the corners: pad "
        "each odd kernel by half its size (3: 1, 7: 3), and leave out even ones"
    )


def _require_corners(body: LastMap, name: str) -> None:
    """Refuse a module that looks to one side: with symmetric kernels, mirroring would do more than mirror the map."""
    symmetric = copy.deepcopy(body)
    with torch.no_grad():
        for weight in symmetric.parameters():
            if weight.ndim == 4:  # of a convolution: (out, in, rows, columns)
                weight.copy_((weight + weight.flip(2, 3)) / 2)
    images = torch.rand(1, 3, *_PROBE, generator=torch.Generator().manual_seed(1))
    plain, turned = (_features(symmetric, name, each) for each in (images, images.flip(2, 3)))
    variation = (plain - plain.mean((2, 3), keepdim=True)).norm()
    if (turned.flip(2, 3) - plain).norm() > _TOLERANCE * variation:
        raise InputError(
            f"`module` {name} has no feature on every corner of a picture, for turned by 180° it gives other features: pad "
            "convolutions and poolings with odd kernels by half their size on every side, and leave out even kernels"
        )
