"""What identities, and the descriptions of heads and networks, say of the grid that a backbone's features lie on."""

from collections.abc import Mapping
from typing import Any

from reference.grid import Grid


def grid_fact(grid: Grid) -> dict[str, bool]:
    """What is to be said beside `output_stride`: nothing of corners, as whatever was written when there were no others."""
    return {} if grid.align_corners else {"align_corners": False}


def described_grid(described: Mapping[str, Any]) -> Grid:
    """The grid of what has `output_stride`, and `grid_fact` beside it."""
    return Grid(int(described["output_stride"]), align_corners=described.get("align_corners", True))
