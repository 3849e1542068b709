"""Tables of made-up scores: a merit for each operation, more with every iteration, and noise."""

from collections.abc import Iterator
from itertools import product

import numpy as np

from reference.cell import Branch, Cell
from search.cells.reach import FeatureMaps
from search.cells.space import SearchSpace
from search.dense_tasks import Measure
from search.tabular.table import CellTable, TabulatedCell

ITERATIONS = (16, 32, 64, 128, 256)
SPACE = SearchSpace(2, (1, 6), (1,), maps=FeatureMaps((24, 31), (17, 17)))


def all_cells(space: SearchSpace) -> Iterator[Cell]:
    """Every way to write every cell of the space."""
    inputs = [range(-space.num_inputs, i) for i in range(space.num_branches)]
    for chosen in product(*inputs):
        for operations in product(space.operations, repeat=space.num_branches):
            yield Cell(tuple(map(Branch, chosen, operations)))


def made_table(
    space: SearchSpace = SPACE, *, seeds: int = 3, iterations: tuple[int, ...] = ITERATIONS, noise: float = 0.01, seed: int = 0
) -> CellTable:
    rng = np.random.default_rng(seed)
    merits = {operation: rng.normal() for operation in space.operations}
    cells = []
    for cell in dict.fromkeys(space.canonical_form(cell) for cell in all_cells(space)):
        merit = 0.3 + 0.02 * sum(merits[branch.operation] for branch in cell.branches)
        curves = merit + 0.02 * np.log2(iterations) + noise * rng.standard_normal((seeds, len(iterations)))
        seconds = tuple(rng.uniform(5, 15, seeds).round(2).tolist())
        cost = int(rng.integers(1, 100))
        cells.append(TabulatedCell(cell, cost, 1000 * cost, seconds, tuple(map(tuple, curves.round(6).tolist()))))
    provenance = {"seeds": list(range(seeds)), "settings": {"dataset": "made_up"}}
    return CellTable(Measure("mIOU", "mean_iou"), provenance, space, iterations, tuple(cells))
