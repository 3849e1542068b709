"""A tabular benchmark of cells: all cells of a small space, each trained with several seeds and scored as it was trained.

With it a search can be replayed in seconds (`search.tabular.replay`), after NAS-Bench-101 (Ying et al., ICML 2019,
https://arxiv.org/abs/1902.09635). A table is one JSON file:

    format       1
    measure      what the score is; greater ones are better
    provenance   what the scores depend on, the commands that made them, and the versions that wrote the file
    space        of which these are all the different cells
    iterations   after which each training was scored, ascending; the last ones are a whole training
    cells        a line each: the cell in its canonical form, its cost, and by seed the seconds of the whole training
                 and the score after each of `iterations`
"""

import hashlib
import importlib.metadata
import json
import math
import operator
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference.cell import BACKBONE_FEATURE, Branch, Cell, Operation
from search.cells.space import SearchSpace
from search.commands import spelled
from search.dense_tasks import Measure
from search.errors import InputError
from search.files import write_text
from search.runs.study import Run, TrialRecord, restored_space
from search.settings import known, plain, restored

TABLES = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.json"))}  # those that come with the project
CELLS_FILE = "cells.json"  # of a table in a folder of its own
_FORMAT = 1
_PACKAGES = ("numpy", "timm", "torch")  # whose versions decide about scores


@dataclass(frozen=True)
class TabulatedCell:
    """A cell with its cost, and by seed the seconds of a whole training and the scores after each number of iterations."""

    cell: Cell
    parameters: int
    multiply_adds: int
    seconds: tuple[float, ...]  # (seeds,), with the last scoring
    scores: tuple[tuple[float, ...], ...]  # (seeds, rungs)

    def check(self, seeds: int, rungs: int) -> None:
        """Raise ValueError for other numbers of scores than these, and for values that are none."""
        if not seeds or len(self.scores) != seeds or len(self.seconds) != seeds or {*map(len, self.scores)} != {rungs}:
            raise ValueError(f"{self.cell} must have the seconds and {rungs} scores of {seeds} seeds")
        if not all(map(math.isfinite, chain(*self.scores))) or not all(0 < value < math.inf for value in self.seconds):
            raise ValueError(f"{self.cell} has a score that is no number, or seconds that are none")


@dataclass(frozen=True)
class CellTable:
    """All cells of `space`, each with the scores of its trainings. Raises ValueError if one is missing or has other scores."""

    measure: Measure
    provenance: Mapping[str, Any]
    space: SearchSpace
    iterations: tuple[int, ...]
    cells: tuple[TabulatedCell, ...]

    def __post_init__(self) -> None:
        if len(self.iterations) < 2 or list(self.iterations) != sorted(set(self.iterations)) or self.iterations[0] < 1:
            raise ValueError(f"iterations must be two or more, ascending, got {self.iterations}")
        forms = set(self._places)
        if strange := next((each.cell for each in self.cells if not self._is_canonical(each.cell)), None):
            raise ValueError(f"{strange} is no canonical form of the space")
        if len(self.cells) != len(forms) or len(forms) != self.space.canonical_size():
            raise ValueError(f"{len(self.cells)} cells, {len(forms)} of them different: not the {self.space.canonical_size()}")
        for each in self.cells:
            each.check(self.num_seeds, len(self.iterations))

    @property
    def num_seeds(self) -> int:
        return len(self.cells[0].scores)

    @cached_property
    def scores(self) -> NDArray[np.float64]:
        """(cells, seeds, rungs)."""
        return np.array([each.scores for each in self.cells])

    @cached_property
    def seconds(self) -> NDArray[np.float64]:
        """(cells, seeds)."""
        return np.array([each.seconds for each in self.cells])

    @cached_property
    def means(self) -> NDArray[np.float64]:
        """Mean over seeds of the scores after a whole training, (cells,)."""
        means: NDArray[np.float64] = self.scores[:, :, -1].mean(axis=1)
        return means

    def place_of(self, cell: Cell) -> int:
        """Where in `cells` that one is that does the same. Raises ValueError for a cell of another space."""
        try:
            return self._places[self.space.canonical_form(cell)]
        except KeyError as error:
            raise ValueError(f"{cell} is not in the table's space") from error

    @cached_property
    def digest(self) -> str:
        """Hash of all that a search of the table depends on: its space, its cells, their costs and their scores."""
        content = plain([asdict(self.space), self.iterations, [_content(each) for each in self.cells]])
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def to_json(self) -> str:
        """The content of the file, with a line for each cell."""
        head = {
            "format": _FORMAT,
            "measure": plain(asdict(self.measure)),
            "provenance": self.provenance,
            "space": plain(asdict(self.space)),
            "iterations": self.iterations,
        }
        lines = ",\n  ".join(json.dumps(_content(each)) for each in self.cells)
        return f'{json.dumps(head, indent=1)[:-2]},\n "cells": [\n  {lines}\n ]\n}}\n'

    def _is_canonical(self, cell: Cell) -> bool:
        if cell != self.space.canonical_form(cell):
            return False
        has_shape = len(cell.branches) == self.space.num_branches and cell.num_inputs <= self.space.num_inputs
        return has_shape and all(branch.operation in self._operations for branch in cell.branches)

    @cached_property
    def _operations(self) -> set[Operation]:
        """Those of canonical forms."""
        single = (Cell((Branch(BACKBONE_FEATURE, operation),)) for operation in self.space.operations)
        return {self.space.canonical_form(cell).branches[0].operation for cell in single}

    @cached_property
    def _places(self) -> dict[Cell, int]:
        return {self.space.canonical_form(each.cell): place for place, each in enumerate(self.cells)}


def load_table(name: str) -> CellTable:
    """Read a table that comes with the project, or a file. Raises InputError for a file that is none."""
    path = TABLES.get(name, Path(name))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise InputError(f"`table` {path} is of another version of this project: make it again by {spelled('tabulate')}")
        return CellTable(
            restored(Measure, content["measure"]),
            _checked_provenance(content["provenance"]),
            restored_space(content["space"]),
            tuple(map(operator.index, content["iterations"])),
            tuple(map(_restored, content["cells"])),
        )
    except InputError:
        raise
    except OSError as error:
        names = ", ".join(TABLES)
        raise InputError(f"`table` {name} cannot be read ({error.strerror}): give a file, or one of {names}") from error
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(f"`table` {path} is not a table of cells ({error}): make one by {spelled('tabulate')}") from error


def table_name(name: str) -> str:
    """What a table is called: one that comes with the project by its own name, a file `cells.json` by that of its folder.

    >>> table_name("camvid"), table_name("runs/my_table/cells.json"), table_name("mine.json")
    ('camvid', 'my_table', 'mine')
    """
    path = Path(name).absolute()
    return path.parent.name if path.name == CELLS_FILE else path.stem


def write_table(path: Path, table: CellTable) -> None:
    """Write a table, whole or not at all."""
    write_text(path, table.to_json())


def table_of_runs(runs: Sequence[Run]) -> CellTable:
    """What searches with different seeds have found out that tried all cells of the same space, scored on all rungs.

    Raises InputError, naming the run, if cells are missing, or if the runs differ in more than their seeds.
    """
    first = runs[0]
    for run in runs:
        _require_alike(first, run)
    by_form = [_scored(run) for run in runs]
    seeds = [run.identity["seed"] for run in runs]
    if len(set(seeds)) < len(seeds):
        raise InputError(f"`runs` have the seeds {seeds}: each needs one of its own, by `seed`")
    cells = [_tabulated(form, [(run, found[form]) for run, found in zip(runs, by_form, strict=True)]) for form in by_form[0]]
    identity = {name: value for name, value in first.identity.items() if name not in _OF_THE_SEARCH}
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}
    commands = [run.command for run in runs]
    provenance = {"seeds": seeds, "commands": commands, "tabulated_with": versions, "settings": identity}
    cells.sort(key=lambda each: str(each.cell))
    return CellTable(first.task.score, provenance, first.space, first.rungs, tuple(cells))


# What a search depends on, and the scores of a cell do not; `seed` is said for each run.
_OF_THE_SEARCH = ("storage", "sampler", "second_objective", "early_stopping", "reduction_factor", "lag", "rungs", "seed")


def _require_alike(first: Run, run: Run) -> None:
    if not run.rungs:
        raise InputError(
            f"run {run.directory} has no learning curves: begin it in another folder with `early_stopping` asha and "
            "`reduction_factor` 1, so that every cell is scored on every rung"
        )
    if (run.space, run.rungs) != (first.space, first.rungs):
        raise InputError(f"runs {first.directory} and {run.directory} are of different spaces or rungs: give runs of one")
    differ = [
        name
        for name in sorted(first.identity.keys() | run.identity.keys())
        if name not in _OF_THE_SEARCH and first.identity.get(name) != run.identity.get(name)
    ]
    if differ:
        raise InputError(f"runs {first.directory} and {run.directory} differ in {', '.join(differ)}: give runs of one setting")


def _scored(run: Run) -> dict[Cell, TrialRecord]:
    """The trials that were trained, by the canonical form of their cells."""
    trained = [record for record in run.trials if record.duplicate_of is None and record.rung == len(run.rungs) - 1]
    found = {run.space.canonical_form(record.cell): record for record in trained if record.score is not None}
    missing = run.space.canonical_size() - len(found)
    if missing:
        raise InputError(
            f"run {run.directory} lacks {missing} of {run.space.canonical_size()} cells with a score of a whole training: "
            "search on with more `trials`; a cell that has failed is not tried again, and needs another run"
        )
    return found


def _tabulated(form: Cell, trials: Sequence[tuple[Run, TrialRecord]]) -> TabulatedCell:
    results = [known(record.result) for _, record in trials]  # they have a score
    return TabulatedCell(
        form,
        results[0].parameters,
        results[0].multiply_adds,
        tuple(round(result.seconds, 2) for result in results),
        tuple(tuple(round(score, 6) for score in run.rung_scores[record.number]) for run, record in trials),
    )


def _content(each: TabulatedCell) -> dict[str, Any]:
    return {
        "cell": json.loads(each.cell.to_json()),
        "parameters": each.parameters,
        "multiply_adds": each.multiply_adds,
        "seconds": each.seconds,
        "scores": each.scores,
    }


def _checked_provenance(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict) or not isinstance(content.get("settings", {}), dict):
        raise ValueError("provenance must be an object, and so must be its settings")
    return content


def _restored(content: Mapping[str, Any]) -> TabulatedCell:
    return TabulatedCell(
        Cell.from_json(json.dumps(content["cell"])),
        operator.index(content["parameters"]),
        operator.index(content["multiply_adds"]),
        tuple(map(float, content["seconds"])),
        tuple(tuple(map(float, scores)) for scores in content["scores"]),
    )
