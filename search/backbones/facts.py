"""What identities, and the descriptions of heads and networks, say of a backbone beside its name and `output_stride`."""

from collections.abc import Mapping
from typing import Any

from fast.backbone import Backbone
from reference.grid import Grid

_USUAL: dict[str, Any] = {"align_corners": True, "layers": [-1], "patch_size": None}  # as when there was nothing else


def facts_of_backbone(backbone: Backbone) -> dict[str, Any]:
    """Nothing where features lie on corners, cells read the deepest layer alone and patches have their own size."""
    facts = {
        "align_corners": backbone.grid.align_corners,
        "layers": list(backbone.layers),
        "patch_size": backbone.patch_size,
    }
    return {name: fact for name, fact in facts.items() if fact != _USUAL[name]}


def facts_in(described: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are described."""
    return {name: described[name] for name in _USUAL if name in described}


def described_grid(described: Mapping[str, Any]) -> Grid:
    """The grid of what has `output_stride`, and such facts beside it."""
    return Grid(int(described["output_stride"]), align_corners=described.get("align_corners", True))


def described_layers(described: Mapping[str, Any]) -> tuple[int, ...]:
    """The layers that make up the features, counted from the end."""
    return tuple(described.get("layers", _USUAL["layers"]))
