"""What identities, and the descriptions of heads and networks, say of a backbone beside its name and `output_stride`."""

from collections.abc import Mapping
from typing import Any

from fast.backbone import Backbone
from reference.grid import Grid

FACTS = "align_corners", "patch_size"


def facts_of_backbone(backbone: Backbone) -> dict[str, Any]:
    """Nothing where features lie on corners and patches have their own size, as when there was nothing else."""
    usual = {"align_corners": True, "patch_size": None}
    facts = {"align_corners": backbone.grid.align_corners, "patch_size": backbone.patch_size}
    return {name: fact for name, fact in facts.items() if fact != usual[name]}


def facts_in(described: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are described."""
    return {name: described[name] for name in FACTS if name in described}


def described_grid(described: Mapping[str, Any]) -> Grid:
    """The grid of what has `output_stride`, and such facts beside it."""
    return Grid(int(described["output_stride"]), align_corners=described.get("align_corners", True))
