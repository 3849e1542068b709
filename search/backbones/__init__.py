"""Backbones: timm's models by name, those of trained networks, and small ones for the generated scenes."""

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from fast.backbone import Backbone, timm_backbone
from fast.checkpoint import describe_file, load_backbone
from fast.weights_file import WeightsFileError
from reference.grid import Grid
from search.backbones.shapes import SHAPES_BACKBONES, SMALL_BACKBONE, shapes_backbone
from search.errors import InputError
from search.settings import SHAPES, BackboneSettings, given

Settings = TypeVar("Settings", bound=BackboneSettings)

DEFAULT_BACKBONE = "mobilenetv2_100"  # but for the generated scenes


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
    """The settings with the name, origin and output stride of the network whose file is given as `weights`, if one is.

    Raises InputError where they contradict the file.
    """
    settings.check()
    described = backbone_in(settings.weights)
    if described is None:
        return settings
    name, origin = described["name"], described.get("weights_origin", "timm")
    if settings.backbone is not None and settings.backbone.split(".")[0] != name.split(".")[0]:
        raise InputError(
            f"`weights` {settings.weights} is a network on {name}, and `backbone` is {settings.backbone}: leave it out"
        )
    if settings.weights_origin not in ("timm", origin):  # timm is the default
        raise InputError(f"`weights` {settings.weights} is a network with weights from {origin}: leave out `weights_origin`")
    return replace(
        settings,
        backbone=name,
        weights_origin=origin,
        output_stride=given(settings.output_stride, described["output_stride"]),
    )


def grid_of(settings: BackboneSettings, dataset: str) -> Grid:
    """Where the features of the backbone that the settings name sit on pixels, without its weights. Raises InputError."""
    return Grid(completed_backbone(settings).stride)


def create_backbone(settings: BackboneSettings, dataset: str, cache_dir: Path, *, low_level: bool = False) -> Backbone:
    """The backbone that the settings name, with its weights; those for generated scenes are kept in `cache_dir`.

    `low_level=True` also gives the map at stride 4 that a decoder reads. Raises InputError naming the field.
    """
    settings = completed_backbone(settings)
    if settings.weights is not None and backbone_in(settings.weights) is not None:
        try:
            return load_backbone(settings.weights, output_stride=settings.output_stride, low_level=low_level)
        except ValueError as error:
            raise InputError(f"{error}; correct `weights`" + " or `decoder`" * low_level) from error
    name = settings.backbone or (SMALL_BACKBONE if dataset == SHAPES else DEFAULT_BACKBONE)
    if name in SHAPES_BACKBONES:
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
            output_stride=settings.stride,
            weights=settings.weights,
            pretrained=settings.pretrained,
            weights_origin=settings.weights_origin,
            low_level=low_level,
        )
    except WeightsFileError as error:
        raise InputError(f"{error}; correct `weights`") from error
    except ValueError as error:
        blamed = ["`backbone`", "`weights`", "`output_stride`", *(["`decoder`"] if low_level else [])]
        raise InputError(f"{error}; correct {', '.join(blamed[:-1])} or {blamed[-1]}") from error
    except OSError as error:
        raise InputError(f"timm could not load its weights of {name} ({error}): give a file as `weights`") from error
