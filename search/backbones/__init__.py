"""Backbones: timm's models by name, and small ones for the generated scenes."""

from pathlib import Path

from fast.backbone import Backbone, timm_backbone
from search.backbones.shapes import SHAPES_BACKBONES, SMALL_BACKBONE, shapes_backbone
from search.errors import InputError
from search.settings import SHAPES, BackboneSettings


def create_backbone(settings: BackboneSettings, dataset: str, cache_dir: Path, *, low_level: bool = False) -> Backbone:
    """The backbone that the settings name, with its weights; those for generated scenes are kept in `cache_dir`.

    `low_level=True` also gives the map at stride 4 that a decoder reads. Raises InputError naming the field.
    """
    settings.check()
    name = settings.backbone or (SMALL_BACKBONE if dataset == SHAPES else "mobilenetv2_100")
    if dataset == SHAPES and name in SHAPES_BACKBONES:
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
    except ValueError as error:
        blamed = ["`backbone`", "`weights`", "`output_stride`", *(["`decoder`"] if low_level else [])]
        raise InputError(f"{error}; correct {', '.join(blamed[:-1])} or {blamed[-1]}") from error
    except OSError as error:
        raise InputError(f"timm could not load its weights of {name} ({error}): give a file as `weights`") from error
