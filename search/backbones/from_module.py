"""Any module that gives features as a backbone; what its features are is measured on made pictures."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fast.backbone import Backbone
from fast.measured_grid import REFUSALS, OffGridError, evaluating, measured_grid
from reference.grid import Grid
from search.errors import InputError

_PROBE = (129, 161)  # height and width in pixels, 16·k + 1 each
_FEATURES = (33, 3)  # height and width of the maps by which strides are told apart: rows tell 31 from 32
_STRIDES = (16, 8, 32, 14, 4, *(stride for stride in range(5, 32) if stride not in (8, 14, 16)))  # usual ones first


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

    Raises InputError unless its features lie on one of the two grids (`reference/grid.py`), with a stride of 4 to 32 pixels:
    H = s·k + 1 rows of pixels give k + 1 rows of features, or s·k rows give k, each in the middle of its patch.
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"`module` must be an nn.Module, not {module!r}: give an object of the class")
    for field, values in (("mean", mean), ("std", std)):
        if not isinstance(values, Sequence) or len(values) != 3 or not all(0 <= value <= 1 for value in values):
            raise InputError(f"`{field}` must be three numbers for pixels from 0 to 1, got {values!r}")
    if not all(std):
        raise InputError(f"`std` must be above 0, got {std!r}")
    body = LastMap(module)
    channels, grid = _measured(body, name)
    backbone = Backbone(
        name,
        body,
        channels=channels,
        output_stride=grid.stride,
        align_corners=grid.align_corners,
        mean=torch.tensor([255.0 * value for value in mean]),
        std=torch.tensor([255.0 * value for value in std]),
    )
    return backbone.to(_device(body))


def _last(maps: list[Tensor]) -> Tensor:
    return maps[-1]


def _measured(body: LastMap, name: str) -> tuple[int, Grid]:
    """The channels of the features, and their grid. Raises InputError."""
    refusal: InputError | None = None
    off_grid = ""
    for size, expected, stride in _probes():
        try:
            features = _features(body, name, torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)))
        except InputError as error:
            refusal = refusal or error
            continue
        if tuple(features.shape[2:]) == expected:
            try:
                return features.shape[1], measured_grid(body, _last, stride)
            except OffGridError as error:
                off_grid = off_grid or str(error)
    if off_grid:
        remedy = "pad convolutions and poolings with odd kernels by half their size on every side, or leave out even ones"
        raise InputError(f"`module` {name} {off_grid}: {remedy}")
    raise refusal or InputError(_without_stride(_features(body, name, torch.zeros(1, 3, *_PROBE)), name))


def _probes() -> Iterator[tuple[tuple[int, int], tuple[int, int], int]]:
    """Sizes of pictures, those of the maps that they have at a stride, and the stride."""
    for stride in _STRIDES:
        for grid in (Grid(stride), Grid(stride, align_corners=False)):
            yield grid.pixels(_FEATURES), _FEATURES, stride


@torch.no_grad()
def _features(body: LastMap, name: str, images: Tensor) -> Tensor:
    """The features of these images, on the CPU, in evaluation mode; the mode that the module was in is kept."""
    try:
        with evaluating(body):
            (features,) = body(images.to(_device(body)))
    except REFUSALS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"`module` {name} gives no features of images {tuple(images.shape)} ({reason}): correct it"
        ) from error
    if not isinstance(features, Tensor) or features.ndim != 4 or not features.is_floating_point():
        given = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise InputError(
            f"`module` {name} must give a map (N, channels, h, w), or several, got {given}: cut it before its head"
        )
    return features.float().cpu()


def _device(module: nn.Module) -> torch.device:
    return next((each.device for each in module.parameters()), torch.device("cpu"))


def _without_stride(features: Tensor, name: str) -> str:
    """What to say of a module that has a feature on every so many pixels on neither grid."""
    height, width = features.shape[2:]
    given = f"{height}×{width} features of {_PROBE[0]}×{_PROBE[1]} pixels"
    strides = {(pixels - 1) / max(extent - 1, 1) for pixels, extent in zip(_PROBE, (height, width), strict=True)}
    if len(strides) == 1 and (stride := min(strides)) == int(stride):
        remedy = "change strides to dilation in its last stages, as by `replace_stride_with_dilation` of torchvision's ResNets"
        return f"`module` {name} gives {given}, an output stride of {int(stride)}, where 4 to 32 can be read: {remedy}"
    rows, columns = Grid(16).features(_PROBE)
    return (
        f"`module` {name} gives {given}; at output stride 16 it would be {rows}×{columns}, with features on the corners: pad "
        "each odd kernel by half its size (3: 1, 7: 3), and leave out even ones"
    )
