"""Backbones: timm's models by name, those of trained networks, and small ones for the generated scenes."""

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from fast.backbone import Backbone, timm_backbone
from fast.checkpoint import describe_file, load_backbone
from fast.timm_models import Cut, cut_of
from fast.weights_file import WeightsFileError
from reference.grid import Grid
from search.backbones.shapes import SHAPES_BACKBONES, SMALL_BACKBONE, shapes_backbone
from search.errors import InputError
from search.settings import SHAPES, BackboneSettings, given, known

Settings = TypeVar("Settings", bound=BackboneSettings)

DEFAULT_BACKBONE = "mobilenetv2_100"  # but for the generated scenes
_ONLY_TIMM = "layers", "patch_size"  # settings of timm's models


def backbone_in(path: Path | None) -> dict[str, Any] | None:
    """What a network's file says of its backbone (name, output stride, and so on); None for any other file of weights.

    Raises InputError for a cell's or head's file, which has no backbone, and for a damaged one.
    """
    try:
        found = None if path is None else describe_file(path)
    except ValueError as error:
        raise InputError(f"{error}; correct `weights`") from error
    if found is None:
        return None
    kind, description = found
    if kind != "network":
        raise InputError(f"`weights` {path} is a {kind} without a backbone: give a network, or the weights of a timm model")
    return dict(description["backbone"])


def completed_backbone(settings: Settings) -> Settings:
    """The settings with what follows from the network whose file is given as `weights`, if one is, and from the backbone.

    That is the name, origin, layers and patch size of the file, and the output stride where it is not 16. Raises InputError
    where the settings contradict the file, and for a timm model that has no such features.
    """
    settings.check()
    described = backbone_in(settings.weights)
    if described is None:
        cut = _cut_of(settings)
        stride = settings.stride if cut is None else cut.grid.stride
        return settings if stride == settings.stride else replace(settings, output_stride=stride)
    name, origin = described["name"], described.get("weights_origin", "timm")
    if settings.backbone is not None and settings.backbone.split(".")[0] != name.split(".")[0]:
        raise InputError(
            f"`weights` {settings.weights} is a network on {name}, and `backbone` is {settings.backbone}: leave it out"
        )
    if settings.weights_origin not in ("timm", origin):  # timm is the default
        raise InputError(f"`weights` {settings.weights} is a network with weights from {origin}: leave out `weights_origin`")
    own = replace(settings, layers=tuple(described.get("layers", (-1,))), patch_size=described.get("patch_size"))
    for field in _ONLY_TIMM:
        if getattr(settings, field) not in (getattr(own, field), getattr(BackboneSettings, field)):
            raise InputError(f"`weights` {settings.weights} is a network with other `{field}`: leave that out")
    return replace(
        own,
        backbone=name,
        weights_origin=origin,
        output_stride=given(settings.output_stride, described["output_stride"]),
    )


def grid_of(settings: BackboneSettings, dataset: str) -> Grid:
    """Where the features of the backbone that the settings name sit on pixels, without its weights. Raises InputError."""
    settings = completed_backbone(settings)
    described = backbone_in(settings.weights)
    if described is not None:
        return Grid(settings.stride, described.get("align_corners", True))
    cut = _cut_of(replace(settings, backbone=backbone_name(settings, dataset)))
    return Grid(settings.stride) if cut is None else cut.grid


def backbone_name(settings: BackboneSettings, dataset: str) -> str:
    """The backbone's name, given or not."""
    return settings.backbone or (SMALL_BACKBONE if dataset == SHAPES else DEFAULT_BACKBONE)


def _cut_of(settings: BackboneSettings) -> Cut | None:
    """How the settings' timm model is cut; None for a backbone that is none of timm's. Raises InputError."""
    name = settings.backbone
    if name is None or name in SHAPES_BACKBONES:
        for field in _ONLY_TIMM:
            if name in SHAPES_BACKBONES and getattr(settings, field) != getattr(BackboneSettings, field):
                raise InputError(f"`{field}` is for a timm model as `backbone`, and {name} is none: leave it out")
        if name in SHAPES_BACKBONES and settings.stride not in (4, 8, 16, 32):
            raise InputError(f"`output_stride` {settings.stride} of {name} must be 4, 8, 16 or 32")
        return None
    try:
        return cut_of(name, settings.output_stride, settings.layers, settings.patch_size, settings.weights_origin)
    except ValueError as error:
        raise InputError(f"{error}; correct {_blamed(settings)}") from error


def _blamed(settings: BackboneSettings, *others: str) -> str:
    """The fields by which a backbone may be wrong."""
    own = [f"`{name}`" for name in _ONLY_TIMM if getattr(settings, name) != getattr(BackboneSettings, name)]
    names = ["`backbone`", *others, "`output_stride`", *own]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def create_backbone(settings: BackboneSettings, dataset: str, cache_dir: Path, *, low_level: bool = False) -> Backbone:
    """The backbone that the settings name, with its weights; those for generated scenes are kept in `cache_dir`.

    `low_level=True` also gives the map at stride 4 that a decoder reads. Raises InputError naming the field.
    """
    settings, decoder = completed_backbone(settings), ["`decoder`"] if low_level else []
    described = backbone_in(settings.weights)
    if settings.weights is not None and described is not None:
        try:
            return load_backbone(settings.weights, output_stride=settings.output_stride, low_level=low_level)
        except ValueError as error:
            stride = ["`output_stride`"] if settings.output_stride != described["output_stride"] else []
            raise InputError(f"{error}; correct {' or '.join(['`weights`', *stride, *decoder])}") from error
    settings = replace(settings, backbone=backbone_name(settings, dataset))
    name = known(settings.backbone)
    cut = _cut_of(settings)
    if cut is None:
        if settings.weights is not None or settings.pretrained:
            raise InputError("`weights` and `pretrained` belong to a `backbone`: name it, or leave them out")
        return shapes_backbone(cache_dir, settings.stride, name=name, low_level=low_level)
    if settings.weights is None and not settings.pretrained:
        raise InputError(
            "the backbone would have random weights: give `weights`, or `pretrained` to let timm download its own"
        )
    try:
        return timm_backbone(
            name,
            cut=cut,
            weights=settings.weights,
            pretrained=settings.pretrained,
            weights_origin=settings.weights_origin,
            low_level=low_level,
        )
    except WeightsFileError as error:
        raise InputError(f"{error}; correct `weights`") from error
    except ValueError as error:
        raise InputError(f"{error}; correct {_blamed(settings, '`weights`', *decoder)}") from error
    except OSError as error:
        raise InputError(f"timm could not load its weights of {name} ({error}): give a file as `weights`") from error
