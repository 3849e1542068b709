"""The search space of dense prediction cells (paper, section 3.1): every cell of B branches over the paper's 81 operations.

A cell is written as a sequence of branches, but their order does not matter, because the 1×1 projection behind the
concatenation is learned. `canonical_form` picks one sequence for all orders of the same graph, so that no graph is
evaluated twice.

A space may have other rates and grids, its cells may read several layers of a backbone, and it may know the maps that they are
evaluated on. Then also cells of which all operations do the same there count as one (`SearchSpace.canonical_form`). A cell
stays as it was drawn wherever it is shown or kept, because on larger maps it is a cell of its own.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import assert_never

import numpy as np

from reference.cell import (
    BACKBONE_FEATURE,
    GRID_SIZES,
    NUM_BRANCHES,
    RATES,
    AtrousSeparableConv,
    Branch,
    Cell,
    Conv1x1,
    Operation,
    PyramidPooling,
    operations_of,
)
from search.cells.reach import FeatureMaps, size_text
from search.errors import InputError, require_file_name

CELLS_DIRECTORY = Path(__file__).parent
ASCENDING = "different integers of at least 1, in ascending order"  # what rates and grid sizes must be


@dataclass(frozen=True)
class SearchSpace:
    """All cells of `num_branches` branches: branch i reads one of i + L maps, of the backbone's L = `num_inputs` layers and of
    the earlier branches.

    The operations are the 1×1 convolution, the atrous convolutions of all pairs of `rates` and the poolings of all pairs of
    `grid_sizes`, none if there are none. `maps` are those that cells are evaluated on. Raises ValueError, naming the field.

    >>> f"{SearchSpace(5).size():.1e} cells, {SearchSpace(5).canonical_size():.1e} up to the order of branches"
    '4.2e+11 cells, 3.8e+10 up to the order of branches'
    >>> f"{SearchSpace(5, maps=FeatureMaps((17, 17), (17, 17))).canonical_size():.1e} on a 17×17 map"
    '1.4e+10 on a 17×17 map'
    >>> f"{SearchSpace(5, num_inputs=4).size():.1e} on four layers"
    '2.3e+13 on four layers'
    """

    num_branches: int = NUM_BRANCHES
    rates: tuple[int, ...] = RATES
    grid_sizes: tuple[int, ...] = GRID_SIZES
    maps: FeatureMaps | None = None
    num_inputs: int = 1

    def __post_init__(self) -> None:
        for name in ("num_branches", "num_inputs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("rates", "grid_sizes"):
            if not is_ascending(getattr(self, name)):
                raise ValueError(f"{name} must be {ASCENDING}, got {getattr(self, name)}")

    @cached_property
    def operations(self) -> tuple[Operation, ...]:
        """The operations of a branch, in the order of the paper's 81."""
        return operations_of(self.rates, self.grid_sizes)

    @cached_property
    def _index(self) -> dict[Operation, int]:
        return {operation: k for k, operation in enumerate(self.operations)}

    def size(self) -> int:
        """The number of cells as they are drawn, exactly: B!·81^B for 81 operations and one input."""
        return math.prod((i + self.num_inputs) * len(self.operations) for i in range(self.num_branches))

    def canonical_size(self) -> int:
        """The number of different canonical forms, exactly: of cells that differ on the maps, if there are any.

        A cell is a forest with an operation at each node, and a tree is an operation with a forest below. In the cell's own
        forest each tree also has one of the inputs that it hangs on.
        """
        different = len(set(map(self._smallest, self.operations)))
        trees = [0]  # by the number of their nodes
        for n in range(self.num_branches):
            trees.append(different * _forests(trees)[n])
        return _forests([self.num_inputs * count for count in trees])[self.num_branches]

    def canonical_form(self, cell: Cell) -> Cell:
        """A cell that is equal for two cells exactly if they are the same graph of operations that do the same on the maps.

        Each operation is replaced by the smallest that does the same, be it in the space or not; without maps, by none.
        """
        branches = (replace(branch, operation=self._smallest(branch.operation)) for branch in cell.branches)
        return canonical_form(Cell(tuple(branches)))

    def describe(self) -> list[str]:
        """How many cells there are, how many of them differ on the maps, and which rates and grids are out of reach."""
        layers = "" if self.num_inputs == 1 else f" that read {self.num_inputs} layers"
        counted = f"{_count_text(self.size())} cells{layers}, {_count_text(self.canonical_size())} of them different"
        if self.maps is None:
            return [counted]
        rates = [(f"rate {rate}", AtrousSeparableConv((rate, rate))) for rate in self.rates]
        grids = [(f"grid {grid}", PyramidPooling((grid, grid))) for grid in self.grid_sizes]
        return [f"{counted} on a {size_text(self.maps.validation)} map", *self.maps.remarks([*rates, *grids])]

    def sample(self, rng: np.random.Generator) -> Cell:
        """Draw a cell, uniformly among all `size()` of them."""
        inputs = [int(rng.integers(-self.num_inputs, i)) for i in range(self.num_branches)]
        operations = [self.operations[k] for k in rng.integers(len(self.operations), size=self.num_branches)]
        return Cell(tuple(map(Branch, inputs, operations)))

    def contains(self, cell: Cell) -> bool:
        has_shape = len(cell.branches) == self.num_branches and cell.num_inputs <= self.num_inputs
        return has_shape and all(branch.operation in self._index for branch in cell.branches)

    def check(self, cell: Cell) -> None:
        """Raise ValueError, naming the branch and the field, for a cell outside the space."""
        if len(cell.branches) != self.num_branches:
            raise ValueError(f"a cell of this search space has {self.num_branches} branches, got {len(cell.branches)}")
        cell.require_inputs(self.num_inputs)
        for i, branch in enumerate(cell.branches):
            if branch.operation not in self._index:
                raise ValueError(f"branch {i}: {self._outside(branch.operation)}")

    def neighbours(self, cell: Cell) -> Iterator[Cell]:
        """Every cell that differs from `cell` in one input or one operation, once: B·(B − 1)/2 + 80·B cells of one input.

        Raises ValueError for a cell outside the space.
        """
        self.check(cell)
        return (self._neighbour(cell, k) for k in range(self._num_neighbours()))

    def mutate(self, cell: Cell, rng: np.random.Generator) -> Cell:
        """Draw one of the neighbours, uniformly; the cell itself if it has none.

        Raises ValueError for a cell outside the space.
        """
        self.check(cell)
        count = self._num_neighbours()
        return self._neighbour(cell, int(rng.integers(count))) if count else cell

    def _num_neighbours(self) -> int:
        return sum(i + self.num_inputs - 1 + len(self.operations) - 1 for i in range(self.num_branches))

    def _neighbour(self, cell: Cell, k: int) -> Cell:
        """Neighbour k of a cell: other inputs of branch 0, its other operations, other inputs of branch 1, and so on."""
        for i, branch in enumerate(cell.branches):
            inputs, operations = i + self.num_inputs - 1, len(self.operations) - 1  # so many others
            if k < inputs:
                other = k - self.num_inputs
                return _with_branch(cell, i, replace(branch, input_index=other + (other >= branch.input_index)))
            if k < inputs + operations:
                chosen = k - inputs
                chosen += chosen >= self._index[branch.operation]
                return _with_branch(cell, i, replace(branch, operation=self.operations[chosen]))
            k -= inputs + operations
        raise IndexError(f"a cell of this search space has {self._num_neighbours()} neighbours")

    def _smallest(self, operation: Operation) -> Operation:
        return operation if self.maps is None else self.maps.smallest(operation)

    def _outside(self, operation: Operation) -> str:
        match operation:
            case Conv1x1():
                return f"operation must be one that a search proposes, got {operation}"
            case AtrousSeparableConv(rate):
                return f"rate must be two of {', '.join(map(str, self.rates))}, got {rate}"
            case PyramidPooling(grid_size):
                return f"grid_size must be two of {', '.join(map(str, self.grid_sizes))}, got {grid_size}"
            case _:
                assert_never(operation)


def is_ascending(numbers: Sequence[int]) -> bool:
    """Whether they are what rates and grid sizes must be: `ASCENDING`."""
    return all(number >= 1 for number in numbers) and list(numbers) == sorted(set(numbers))


def canonical_form(cell: Cell) -> Cell:
    """A cell that is the same for every order of the branches: equal for two cells exactly if they are the same graph.

    Each branch reads a single map, so a cell is a forest. A subtree is encoded as its operation and the sorted encodings of
    the subtrees that read it, so only isomorphic ones are equal. The canonical cell lists the forest depth first, sorted: all
    that reads input −1 before what reads −2.

    >>> first, second = (
    ...     '{"op": "conv", "kernel": 1, "input": -1}',
    ...     '{"op": "pyramid_pooling", "grid_size": [1, 1], "input": -1}',
    ... )
    >>> print(canonical_form(Cell.from_json(f"[{second}, {first}]")))
    conv1x1(F), pool 1x1(F)
    """
    readers: defaultdict[int, list[int]] = defaultdict(list)
    for i, branch in enumerate(cell.branches):
        readers[branch.input_index].append(i)

    encodings: dict[int, str] = {}
    for i in reversed(range(len(cell.branches))):  # a branch always comes after the one that it reads
        encodings[i] = f"{cell.branches[i].operation}[{','.join(sorted(encodings[j] for j in readers[i]))}]"

    branches: list[Branch] = []

    def place_readers(old_index: int, new_index: int) -> None:
        for i in sorted(readers[old_index], key=encodings.__getitem__):
            branches.append(Branch(new_index, cell.branches[i].operation))
            place_readers(i, len(branches) - 1)

    for k in range(cell.num_inputs):
        place_readers(BACKBONE_FEATURE - k, BACKBONE_FEATURE - k)
    return Cell(tuple(branches))


def cell_hash(cell: Cell) -> str:
    """A short name, 12 hexadecimal digits, for the graph of `cell`: the same on every machine and for every branch order."""
    return hashlib.sha256(canonical_form(cell).to_json().encode()).hexdigest()[:12]


def known_cells(num_inputs: int = 1) -> dict[str, Cell]:
    """The cells that searches are compared with, by name, for so many layers of a backbone.

    "linear" is the linear probe, "mlp" the head of SegFormer: a 1×1 convolution of each layer, and one of them all. They read
    every layer. The others, in `search/cells/`, read the deepest one.
    """
    of_each_layer = tuple(Branch(BACKBONE_FEATURE - k, Conv1x1()) for k in range(num_inputs))
    published = {path.stem: Cell.load(path) for path in sorted(CELLS_DIRECTORY.glob("*.json"))}
    return {"linear": Cell(()), "mlp": Cell(of_each_layer), **published}


def load_cell(name_or_path: str, num_inputs: int = 1) -> Cell:
    """Load a known cell by name ("linear", "mlp", "aspp", "psp", "dpc"), or else the JSON file at that path.

    `num_inputs` is the number of layers that the backbone gives. Raises InputError if there is no such cell, or its file
    cannot be read.
    """
    known = known_cells(num_inputs)
    try:
        return known[name_or_path] if name_or_path in known else Cell.load(name_or_path)
    except FileNotFoundError as error:
        raise InputError(
            f"there is no cell {name_or_path!r}: give one of {', '.join(known)}, or the path of a cell's JSON file"
        ) from error
    except OSError as error:
        raise InputError(f"cannot read the cell {name_or_path!r}: {error.strerror}; give the path of a JSON file") from error
    except ValueError as error:
        raise InputError(f"{error}; correct the file, or give another cell") from error


def load_cells(names_or_paths: Sequence[str], num_inputs: int | None = None) -> dict[str, Cell]:
    """Load all cells to compare with, by short name: a known cell's own, or a file's name without folder and suffix.

    Raises InputError for two files with the same short name, and for a name that the search gives to its own cells; given the
    number of layers that the backbone gives, also for a cell that reads another.
    """
    cells: dict[str, Cell] = {}
    for name_or_path in names_or_paths:
        name = Path(name_or_path).stem
        if name == "best" or name.startswith("trial"):
            raise InputError(f"`compare` {name_or_path}: the search has cells called {name!r} itself, rename the file")
        require_file_name(name, f"`compare` {name_or_path}")
        for other in cells:
            if name.replace(" ", "_") == other.replace(" ", "_"):  # as files of their heads are called
                names = f"the name {name!r}" if name == other else f"the names {other!r} and {name!r}, which are one file's"
                raise InputError(f"`compare` has two cells of {names}: rename the file {name_or_path}, or leave it out")
        cells[name] = load_cell(name_or_path, num_inputs or 1)
        if num_inputs is not None:
            require_layers("compare", name_or_path, cells[name], num_inputs)
    return cells


def require_layers(field: str, name: str, cell: Cell, num_inputs: int) -> None:
    """Raise InputError about the field for a cell that reads a layer which the backbone does not give."""
    try:
        cell.require_inputs(num_inputs)
    except ValueError as error:
        raise InputError(f"`{field}` {name}: {error}; give as many `layers`, or another cell") from error


def _forests(trees: Sequence[int]) -> list[int]:
    """How many forests of 0, 1, ... nodes there are, given how many trees: the Euler transform.

    n·forests[n] = Σ_k (Σ_{d | k} d·trees[d])·forests[n − k]
    """
    weights = [sum(d * trees[d] for d in range(1, k + 1) if k % d == 0) for k in range(len(trees))]
    forests = [1]
    for n in range(1, len(trees)):
        forests.append(sum(weights[k] * forests[n - k] for k in range(1, n + 1)) // n)
    return forests


def _with_branch(cell: Cell, i: int, branch: Branch) -> Cell:
    return Cell((*cell.branches[:i], branch, *cell.branches[i + 1 :]))


def _count_text(count: int) -> str:
    return f"{count:,}" if count < 10**7 else f"{count:.1e}"
