"""A table has every cell once, is a file that is read back, and comes of complete searches alone."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reference.cell import Cell
from search.cells.space import SearchSpace
from search.errors import InputError
from search.runs.study import Run, TrialRecord
from search.tabular.table import TABLES, CellTable, load_table, table_of_runs, write_table
from tests.search.tabular.made_table import ITERATIONS, SPACE, all_cells, made_table
from tests.search.test_report import make_result, make_run

TABLE = made_table()


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "cells.json"
    write_table(path, TABLE)
    assert load_table(str(path)) == TABLE
    lines = path.read_text(encoding="utf-8").splitlines()
    assert sum('"scores"' in line for line in lines) == len(TABLE.cells)  # a line each


def test_every_way_to_write_a_cell_is_found() -> None:
    places = [TABLE.place_of(cell) for cell in all_cells(SPACE)]
    assert len(places) == SPACE.size()
    assert set(places) == set(range(len(TABLE.cells)))
    with pytest.raises(ValueError, match="not in the table's space"):
        TABLE.place_of(next(all_cells(SearchSpace(3))))


def test_the_digest_is_of_what_a_search_depends_on() -> None:
    assert replace(TABLE, provenance={"noted": "later"}).digest == TABLE.digest
    assert replace(TABLE, cells=(replace(TABLE.cells[0], seconds=(1.0, 2.0, 3.0)), *TABLE.cells[1:])).digest != TABLE.digest
    assert replace(TABLE, iterations=(15, *ITERATIONS[1:])).digest != TABLE.digest


def test_worth_is_the_mean_of_the_last_scores() -> None:
    assert TABLE.means == pytest.approx([np.mean([curve[-1] for curve in each.scores]) for each in TABLE.cells])
    assert TABLE.scores.shape == (len(TABLE.cells), 3, len(ITERATIONS))


def _in_another_order(cell: Cell) -> Cell:
    """The same cell, its branches the other way round, if both read the backbone."""
    return Cell(cell.branches[::-1]) if all(branch.input_index < 0 for branch in cell.branches) else cell


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda cells: cells[1:], "not the"),
        (lambda cells: (*cells[1:], cells[1]), "not the"),
        (lambda cells: (replace(cells[0], scores=cells[0].scores[:2]), *cells[1:]), "scores of 2 seeds"),
        (lambda cells: (replace(cells[0], seconds=(1.0, 0.0, 1.0)), *cells[1:]), "seconds"),
        (lambda cells: (replace(cells[0], seconds=(1.0,)), *cells[1:]), "scores of 3 seeds"),
        (lambda cells: (replace(cells[0], scores=((float("nan"),) * 5,) * 3), *cells[1:]), "number"),
        (
            lambda cells: tuple(replace(each, scores=tuple(s[:3] for s in each.scores)) for each in cells),
            "5 scores of 3 seeds",
        ),
        (lambda cells: tuple(replace(each, scores=(), seconds=()) for each in cells), "scores of 0 seeds"),
        (lambda cells: tuple(replace(each, cell=_in_another_order(each.cell)) for each in cells), "canonical form"),
    ],
)
def test_a_table_with_holes_is_refused(change: Callable[[Any], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(TABLE, cells=change(TABLE.cells))


@pytest.mark.parametrize("iterations", [(), (16,), (16, 16, 64, 128, 256), (0, 32, 64, 128, 256), (32, 16, 64, 128, 256)])
def test_iterations_ascend(iterations: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ascend"):
        replace(TABLE, iterations=iterations)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a table of cells"),
        ("[]", "not a table of cells"),
        ("{}", "not a table of cells"),
        ('{"format": 2}', "of another version"),
        (TABLE.to_json().replace('"rate": [1, 6]', '"rate": [1, 7]'), "not a table of cells"),
        (TABLE.to_json()[:-100], "not a table of cells"),
        (TABLE.to_json().replace("  16,", "  Infinity,"), "not a table of cells"),
        (TABLE.to_json().replace("  16,", "  16.5,"), "not a table of cells"),
        (TABLE.to_json().replace('"settings": {', '"settings": 1, "others": {'), "not a table of cells"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "cells.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words) as raised:
        load_table(str(path))
    assert str(path) in str(raised.value)


def test_an_absent_table_names_those_that_are_there() -> None:
    with pytest.raises(InputError, match=r"`table` nowhere cannot be read .*: give a file, or one of camvid"):
        load_table("nowhere")


# The table that comes with the project


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_the_project(name: str) -> None:
    table = load_table(name)
    assert len(table.cells) == table.space.canonical_size() > 300
    assert table.num_seeds >= 3
    assert len(table.iterations) >= 4
    text = TABLES[name].read_text(encoding="utf-8")
    assert len(text) < 200_000
    assert not re.search(r"(?<![\w.])/(tmp|home|root|work|mnt|data)/", text)  # paths of the machine that it was made on
    assert {"seeds", "commands", "settings", "tabulated_with"} <= table.provenance.keys()
    assert table.to_json() == text  # as it is written today
    spread = table.means.std()
    noise = np.sqrt(table.scores[:, :, -1].var(axis=1, ddof=1).mean())
    assert spread > noise  # cells differ by more than seeds


# Of searches


def searched(directory: Path, seed: int, table: CellTable = TABLE) -> Run:
    """A search that has tried all cells of a table, in another order with each seed, and a copy of the first one."""
    run = make_run(directory, [])
    order = np.random.default_rng(seed).permutation(len(table.cells)).tolist()
    trials, scores = [], {}
    for number, place in enumerate([*order, order[0]]):
        each = table.cells[place]
        made = make_result(each.scores[seed][-1])
        result = replace(made, parameters=each.parameters, multiply_adds=each.multiply_adds, seconds=each.seconds[seed])
        copied = 0 if number == len(order) else None
        trials.append(replace(TrialRecord.of(number, each.cell, result, None, copied), rung=len(table.iterations) - 1))
        scores[number] = each.scores[seed]
    identity = run.identity | {"seed": seed, "early_stopping": "asha", "reduction_factor": 1, "lag": seed}
    return replace(run, trials=trials, rung_scores=scores, rungs=table.iterations, space=table.space, identity=identity)


def test_searches_make_the_table(tmp_path: Path) -> None:
    made = table_of_runs([searched(tmp_path / str(seed), seed) for seed in range(3)])
    by_cell = {each.cell: each for each in TABLE.cells}
    assert {each.cell: each for each in made.cells} == by_cell
    assert [str(each.cell) for each in made.cells] == sorted(str(cell) for cell in by_cell)
    assert made.provenance["seeds"] == [0, 1, 2]
    assert made.provenance["settings"] == {
        "dataset": "shapes",
        "iterations": 1500,
        "crop_size": None,
        "image_size": [129, 161],
        "learning_rate": 0.05,
    }
    assert json.loads(made.to_json())["provenance"]["commands"] == ["python -m search.random --dataset shapes"] * 3


def _without_a_cell(run: Run) -> Run:
    return replace(run, trials=run.trials[1:-1])


def _with_one_half_way(run: Run) -> Run:
    return replace(run, trials=[replace(run.trials[0], rung=2), *run.trials[1:-1]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without_a_cell, f"lacks 1 of {len(TABLE.cells)} cells"),
        (_with_one_half_way, f"lacks 1 of {len(TABLE.cells)} cells"),
        (lambda run: replace(run, rungs=()), "no learning curves: .*`early_stopping` asha and `reduction_factor` 1"),
        (lambda run: replace(run, rungs=(1, *run.rungs[1:])), "different spaces or rungs"),
        (lambda run: replace(run, space=SearchSpace(2)), "different spaces or rungs"),
        (lambda run: replace(run, identity=run.identity | {"learning_rate": 1}), "differ in learning_rate"),
        (lambda run: replace(run, identity=run.identity | {"seed": 0}), r"seeds \[0, 0\]"),
    ],
)
def test_other_searches_are_refused(tmp_path: Path, change: Callable[[Run], Run], words: str) -> None:
    with pytest.raises(InputError, match=words):
        table_of_runs([searched(tmp_path / "first", 0), change(searched(tmp_path / "second", 1))])
