"""Pictures in tiles, for those whose maps do not fit in memory: where tiles lie, and how what they give becomes one map.

Tiles lie on the grid of the backbone, so the features of a tile sit on the pixels on which those of the whole picture do.
Where tiles overlap, each counts by a weight that falls towards its borders, where it lacks context.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fast.segmentation import SegmentationNetwork
from reference.grid import Grid
from search.settings import TILE_OVERLAP, RecipeSettings


@dataclass(frozen=True)
class Tiles:
    """Height and width in pixels of the tiles of a picture, and the least share of them by which neighbours overlap."""

    size: tuple[int, int]
    overlap: float = TILE_OVERLAP

    @classmethod
    def of(cls, recipe: RecipeSettings) -> "Tiles | None":
        """Those of a training's validation pictures, None for whole pictures."""
        return None if recipe.tile_size is None else cls(recipe.tile_size, recipe.tile_overlap)

    def within(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the tiles of a picture of this size, which are nowhere larger than it.

        >>> Tiles((513, 513)).within((1025, 257))
        (513, 257)
        """
        return min(self.size[0], size[0]), min(self.size[1], size[1])


def least_size(network: SegmentationNetwork) -> tuple[int, int]:
    """Height and width of the smallest picture or tile that a network takes: its pooling windows must not exceed the map."""
    return network.backbone.grid.pixels(network.head.context.pooling_size or (1, 1))


def tile_starts(extent: int, tile: int, overlap: float, grid: Grid) -> list[int]:
    """The first pixels of the tiles along one side: a step apart on the grid of features; the last tile ends at the border.

    >>> tile_starts(177, 65, 0.25, Grid(16)), tile_starts(65, 65, 0.25, Grid(16))
    ([0, 48, 96, 112], [0])
    >>> tile_starts(176, 64, 0.25, Grid(16, align_corners=False))
    [0, 48, 96, 112]
    """
    return [*range(0, extent - tile, _step(tile, overlap, grid)), extent - tile]


def blended_rows(
    outputs: Callable[[int, int], Tensor], size: tuple[int, int], tile: tuple[int, int], overlap: float, grid: Grid
) -> Iterator[Tensor]:
    """The outputs of a picture (K, rows, W) from the top, a few rows at a time, so that they are never there as a whole.

    `outputs` gives those of the tile (K, *tile) whose first row and column it is called with. What is yielded holds until the
    next rows are asked for.
    """
    (tops, down), (lefts, across) = (_places(extent, length, overlap, grid) for extent, length in zip(size, tile, strict=True))
    band: Tensor | None = None  # of the height of a tile: the rows that are under way
    for top, following, rows in zip(tops, [*tops[1:], size[0]], down, strict=True):
        for left, columns in zip(lefts, across, strict=True):
            part = outputs(top, left)
            if band is None:
                band = part.new_zeros(part.shape[0], tile[0], size[1])
            band[:, :, left : left + tile[1]] += part * (rows[:, None] * columns).to(part.device)
        assert band is not None  # there is at least one column
        finished = following - top
        yield band[:, :finished]
        unfinished = band[:, finished:].clone()
        band[:, : tile[0] - finished] = unfinished
        band[:, tile[0] - finished :] = 0


def _step(tile: int, overlap: float, grid: Grid) -> int:
    """The largest step on the grid that lets neighbours overlap as much; 1e-6 is for rounding, as in 0.9 · 640."""
    across = tile - 1 if grid.align_corners else tile  # a whole number of strides
    return grid.stride * max(1, int((1 - overlap) * across / grid.stride + 1e-6))


def _places(extent: int, tile: int, overlap: float, grid: Grid) -> tuple[list[int], list[Tensor]]:
    """The tiles' first pixels along one side, and the weights (tile,) of each one's pixels, which sum to 1 at every pixel."""
    starts = tile_starts(extent, tile, overlap, grid)
    shared = tile - _step(tile, overlap, grid)  # pixels that neighbours have in common, but for the last two
    border = torch.arange(1, tile + 1, dtype=torch.float64)
    window = (torch.minimum(border, border.flip(0)) / (shared + 1)).clamp(max=1)
    total = torch.zeros(extent, dtype=torch.float64)
    for start in starts:
        total[start : start + tile] += window
    return starts, [(window / total[start : start + tile]).float() for start in starts]
