"""How a model of timm is cut to a backbone: which of its maps are the features, at which stride and on which grid.

timm has four ways to give features of a model: as the outputs of its stages or blocks (`FeatureListNet`, `FeatureHookNet`), by
a method of the model (`FeatureGetterNet`), or by a class of its own (`EfficientNetFeatures`). Each of them knows the stride of
every map (`feature_info`), and names the model's weights in its own way.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fast.measured_grid import REFUSALS, OffGridError, measured_grid
from fast.weights import Wanted, read_fitting
from reference.grid import Grid

WeightsOrigin = Literal["timm", "tensorflow"]

DEEPEST = -1
_DEFAULT_STRIDE = 16
# By which models take pictures of any size on their grid, where they have such an option.
_ANY_SIZE = {"dynamic_img_size": True, "strict_img_size": False}
_XCEPTIONS = ("xception41", "xception65", "xception71")  # with the authors' blocks


@dataclass(frozen=True)
class Cut:
    """Which maps of a timm model a backbone gives, and where they lie.

    `layers` are counted from the end, −1 being the map that has the grid: timm's last one, or the one before it where
    `deepest` is −2, and so on. `patch_size` is that to which the model's own patches were resampled.
    """

    grid: Grid
    layers: tuple[int, ...] = (DEEPEST,)
    deepest: int = DEEPEST
    patch_size: int | None = None

    @property
    def indices(self) -> tuple[int, ...]:
        """The maps from early to late, counted from timm's last one."""
        return tuple(sorted(self.deepest + 1 + layer for layer in self.layers))


def check_layers(layers: Sequence[int]) -> None:
    """Raises ValueError for layers that are not counted from the end, each once, the deepest first."""
    if not layers or max(layers) > DEEPEST or list(layers) != sorted(set(layers), reverse=True):
        given = " ".join(map(str, layers)) or "none"
        raise ValueError(f"layers are counted from the end, each once, the deepest first, such as -1 -4, got {given}")


@lru_cache(maxsize=64)
def cut_of(
    name: str,
    output_stride: int | None = None,
    layers: tuple[int, ...] = (DEEPEST,),
    patch_size: int | None = None,
    weights_origin: WeightsOrigin = "timm",
) -> Cut:
    """How the model is cut, measured on random weights: for features at this stride, or at 16, or at the only one it has.

    A model that timm builds at any output stride is built at this one. One that it does not, or whose features then leave the
    grid, is cut behind its last map that has the stride. Raises ValueError naming the model.
    """
    check_name(name)
    check_layers(layers)
    # Measuring takes gradients, which a model that is built in inference mode has not.
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wanted = output_stride or patch_size or _DEFAULT_STRIDE
        body = _built_at(name, wanted, patch_size, weights_origin)
        fault = ""
        if body is not None:
            try:
                grid = measured_grid(body, last_map(body), wanted)
            except OffGridError as error:
                fault = _off_grid(name, error)
                # ResNet-D's shortcuts average 2 × 2 pixels, and so lean to one side; they count as corners all the same.
                if error.as_many_as_corners:
                    return _with_layers(name, Cut(Grid(wanted), patch_size=patch_size), layers, strides_of(body))
            else:
                return _with_layers(name, Cut(grid, patch_size=patch_size), layers, strides_of(body))
        return _cut_of_stages(name, output_stride, wanted, layers, patch_size, weights_origin, fault)


def _built_at(name: str, output_stride: int, patch_size: int | None, weights_origin: WeightsOrigin) -> Any:
    """timm's module whose last map has this stride; None where timm builds none."""
    try:
        body = _opened(name, (DEEPEST,), output_stride, patch_size, weights_origin)
    except ValueError:
        return None
    return body if strides_of(body)[-1] == output_stride else None


def _cut_of_stages(
    name: str,
    output_stride: int | None,
    wanted: int,
    layers: tuple[int, ...],
    patch_size: int | None,
    weights_origin: WeightsOrigin,
    fault: str,
) -> Cut:
    """The cut of a model at the strides that it has by itself; `fault` says what is wrong with it at the stride wanted."""
    body = _opened(name, (DEEPEST,), None, patch_size, weights_origin)
    strides = strides_of(body)
    if output_stride is None and len(set(strides)) == 1:
        wanted = strides[-1]
    if wanted not in strides:
        has = ", ".join(map(str, sorted(set(strides))))
        raise ValueError(fault or f"backbone {name!r} has no features at output stride {wanted}, only at {has}")
    deepest = len(strides) - strides[::-1].index(wanted) - 1 - len(strides)
    if deepest != DEEPEST:
        body = _opened(name, (deepest,), None, patch_size, weights_origin)
    try:
        grid = measured_grid(body, last_map(body), wanted)
    except OffGridError as error:
        raise ValueError(_off_grid(name, error)) from error
    return _with_layers(name, Cut(grid, deepest=deepest, patch_size=patch_size), layers, strides)


def _off_grid(name: str, error: OffGridError) -> str:
    """What to say of a model whose features lie on no grid, or which takes pictures of one size alone."""
    import timm

    config: Any = timm.get_pretrained_cfg(name)
    if error.takes_neither and config is not None and config.fixed_input_size:
        _, height, width = config.input_size
        return f"backbone {name!r} takes pictures of {height}×{width} pixels alone, where any number of features is needed"
    return f"backbone {name!r} {error}"


def _with_layers(name: str, cut: Cut, layers: tuple[int, ...], strides: Sequence[int]) -> Cut:
    count = len(strides) + cut.deepest + 1
    if min(layers) < -count:
        raise ValueError(
            f"backbone {name!r} has {count} layers down to output stride {cut.grid.stride}, -1 to -{count}: there is no "
            f"{min(layers)}"
        )
    return replace(cut, layers=layers)


def check_name(name: str) -> None:
    """Raises ValueError for a name that is none of timm's."""
    import timm

    if not timm.is_model(name):
        similar = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:8]) or "see timm.list_models()"
        raise ValueError(f"backbone {name!r} is not a timm model; similar names: {similar}")


def open_model(
    name: str,
    indices: tuple[int, ...],
    cut: Cut,
    weights_origin: WeightsOrigin,
    *,
    pretrained: bool = False,
    weights: Path | None = None,
) -> Any:
    """timm's module that gives these maps of the model, early to late, with random weights unless some are given.

    `weights` and `pretrained` are as in `timm_backbone`. Raises ValueError naming the model.
    """
    stride = cut.grid.stride if cut.deepest == DEEPEST else None
    body = _opened(name, indices, stride, cut.patch_size, weights_origin, pretrained, weights)
    if stride is not None and (only := strides_of(body)[-1]) != stride:  # timm has built it without the option
        raise ValueError(f"timm builds backbone {name!r} at output stride {only} instead")
    return body


def _opened(
    name: str,
    indices: tuple[int, ...],
    output_stride: int | None,
    patch_size: int | None,
    weights_origin: WeightsOrigin,
    pretrained: bool = False,
    weights: Path | None = None,
) -> Any:
    """timm's module, at this output stride if timm can build it so. Raises ValueError naming the model."""
    # At stride 8 timm's xception71 would lack a shortcut's convolution that its weights have.
    halves = name.split(".")[0] in _XCEPTIONS and output_stride == 8
    options: dict[str, Any] = {"output_stride": 16 if halves else output_stride, **_ANY_SIZE}
    if weights_origin == "tensorflow" and not name.startswith("xception"):
        options["pad_type"] = "same"
    try:
        body, taken = _create(name, options, features_only=True, out_indices=indices, pretrained=pretrained)
    except REFUSALS as error:
        at = f" at output stride {output_stride}" * (output_stride is not None)
        reason = str(error) or type(error).__name__
        raise ValueError(f"backbone {name!r} cannot give features{at} ({reason})") from error
    if halves:
        _halve_output_stride(body)
    if weights is not None:
        _load(body, name, taken, weights)
    if patch_size is not None:
        _resample_patches(body, name, patch_size)
    return body


def _create(name: str, options: Mapping[str, Any], **arguments: Any) -> tuple[Any, dict[str, Any]]:
    """timm's model with those of the options that it takes, and these options."""
    import timm

    taken = {key: value for key, value in options.items() if value is not None}
    while True:
        try:
            return timm.create_model(name, **arguments, **taken), taken
        except TypeError as error:
            _, found, unexpected = str(error).partition("unexpected keyword argument")
            unknown = {"output_stride", *_ANY_SIZE} & taken.keys() & set(re.findall(r"'(\w+)'", unexpected))
            if not found or not unknown:
                raise
            for key in unknown:
                del taken[key]


def strides_of(body: Any) -> list[int]:
    """The strides of all maps that the model has, early to late, also of those that the body does not give."""
    return [info["reduction"] for info in body.feature_info.info]


def channels_of(body: Any) -> list[int]:
    """The channels of the maps that the body gives."""
    channels: list[int] = body.feature_info.channels()
    return channels


def last_map(body: Any) -> Callable[[Any], Tensor]:
    """What takes the last map (N, C, h, w) of what the body gives."""
    return lambda maps: as_maps(body, maps)[-1]


def as_maps(body: nn.Module, maps: Any) -> list[Tensor]:
    """The maps as (N, C, h, w), also of a body that says in `output_fmt` that its own are (N, h, w, C)."""
    found: list[Tensor] = list(maps)
    if getattr(body, "output_fmt", "NCHW") == "NHWC":
        found = [each.permute(0, 3, 1, 2) for each in found]
    return found


def _halve_output_stride(body: Any) -> None:
    """Set the last stride of 2 to 1, and dilate the convolutions of all later blocks twice as much."""
    blocks = [module for name, module in body.named_children() if name.startswith("blocks_")]
    last = max(i for i, block in enumerate(blocks) if any(conv.stride == (2, 2) for conv in _convolutions(block)))
    for conv in _convolutions(blocks[last]):
        conv.stride = (1, 1)
    for conv in (conv for block in blocks[last + 1 :] for conv in _convolutions(block) if conv.kernel_size == (3, 3)):
        conv.dilation = conv.padding = (2 * conv.dilation[0], 2 * conv.dilation[1])
    strides = strides_of(body)
    for info in body.feature_info.info:
        info["reduction"] = min(info["reduction"], max(strides) // 2)


def _convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [child for child in module.modules() if isinstance(child, nn.Conv2d)]


def _resample_patches(body: Any, name: str, patch_size: int) -> None:
    """Resample the kernel that embeds patches, as timm does; the places that it has learnt stay those of as many patches."""
    model: Any = getattr(body, "model", None)
    embedding: Any = getattr(model, "patch_embed", None)
    if not (hasattr(model, "set_input_size") and isinstance(getattr(embedding, "proj", None), nn.Conv2d)):
        raise ValueError(f"backbone {name!r} does not embed patches, whose size could be changed to {patch_size}")
    if embedding.patch_size != (patch_size, patch_size):
        rows, columns = embedding.grid_size
        model.set_input_size(img_size=(rows * patch_size, columns * patch_size), patch_size=(patch_size, patch_size))
    for info in body.feature_info.info:
        info["reduction"] = patch_size


def _load(body: nn.Module, name: str, options: Mapping[str, Any], path: Path) -> None:
    """Load the file; it must fit the whole timm model, or exactly the part of it that computes features."""
    import timm

    wanted = body.state_dict()
    whole = timm.create_model(name, **options).state_dict().keys()
    aliases = {key: own for key in whole if key not in wanted and (own := _own_name(key, wanted)) is not None}
    head = whole - wanted.keys() - aliases.keys()  # conv_head, classifier and the like
    body.load_state_dict(read_fitting(path, Wanted(name, wanted, aliases=aliases, others=head)))


def _own_name(key: str, wanted: Mapping[str, Tensor]) -> str | None:
    """The name that a weight of the model, such as `blocks.0.bias`, has where timm wraps it; None if it is not there."""
    names = (key.replace(".", "_", 1), f"model.{key}", f"body.{key}")  # outputs of modules; a method of the model; hooks
    return next((name for name in names if name in wanted), None)
