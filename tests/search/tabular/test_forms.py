"""The forms of other libraries have the table's numbers for every way to write a cell, and load without this project."""

import csv
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from search.cells.sampler import choices_of, params_of_cell
from search.tabular.forms import NAME, write_forms
from search.tabular.table import CellTable
from tests.search.tabular.made_table import ITERATIONS, SPACE, all_cells, made_table

TABLE = made_table()
CELL = list(all_cells(SPACE))[17]
EACH = TABLE.cells[TABLE.place_of(CELL)]
PARAMS = params_of_cell(CELL, SPACE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("forms")
    written = write_forms(directory, TABLE, "made_up")
    assert written[:2] == [directory / "optunahub", directory / "mfpbench"]
    assert all(path.is_dir() for path in written)
    return directory


def by_library(library: str, source: str, directory: Path) -> Any:
    """What a program prints as JSON that has the library, and nothing of this project."""
    if find_spec(library) is None:
        pytest.skip(f"needs {library}")
    ours = ("search", "reference", "fast", "dense_prediction_cell")
    source = f"import json, sys\nsys.modules |= dict.fromkeys({ours}, None)\nPARAMS = {PARAMS!r}\n{source}"
    command = [sys.executable, "-W", "ignore", "-c", source]
    ran = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_rows_are_all_ways_to_write_all_cells(folder: Path) -> None:
    package = folder / "optunahub" / "benchmarks" / NAME
    text = (package / "cells.csv").read_text(encoding="utf-8")
    assert (folder / "mfpbench" / "cells.csv").read_text(encoding="utf-8") == text
    rows = list(csv.DictReader(text.splitlines()))
    assert len(rows) == SPACE.size() == len({tuple(row[name] for name in choices_of(SPACE)) for row in rows})
    assert len({row["cell"] for row in rows}) == len(TABLE.cells)
    found = next(row for row in rows if all(row[name] == str(value) for name, value in PARAMS.items()))
    assert [[float(found[f"score_{seed}_{each}"]) for each in ITERATIONS] for seed in range(3)] == [
        list(s) for s in EACH.scores
    ]
    assert [float(found[f"seconds_{seed}"]) for seed in range(3)] == list(EACH.seconds)
    assert (int(found["parameters"]), int(found["multiply_adds"])) == (EACH.parameters, EACH.multiply_adds)
    assert '"dataset": "made_up"' in (package / "README.md").read_text(encoding="utf-8")


def test_optunahub(folder: Path) -> None:
    source = f"""
import optuna, optunahub
optuna.logging.set_verbosity(optuna.logging.ERROR)
cells = optunahub.load_local_module("benchmarks/{NAME}", registry_root="optunahub")
one = cells.Problem(seed=1, iterations=64)
both = cells.Problem(objectives=("score", "multiply_adds"))
study = optuna.create_study(directions=both.directions, sampler=optuna.samplers.RandomSampler(seed=0))
study.optimize(both, n_trials=5)
refused = []
for wrong in ({{"seed": 3}}, {{"iterations": 65}}, {{"objectives": ("size",)}}):
    try:
        cells.Problem(**wrong)
    except ValueError as error:
        refused.append(str(error))
print(json.dumps([one.evaluate(PARAMS), both.evaluate(PARAMS), len(study.trials), [d.name for d in both.directions], refused]))
"""
    score, both, trials, directions, refused = by_library("optunahub", source, folder)
    assert score == EACH.scores[1][ITERATIONS.index(64)]
    assert both == [pytest.approx(TABLE.means[TABLE.place_of(CELL)]), EACH.multiply_adds]
    assert (trials, directions) == (5, ["MAXIMIZE", "MINIMIZE"])
    assert [text.split(" must be ")[0] for text in refused] == ["seed", "seed", "objectives"]


def test_mfpbench(folder: Path) -> None:
    source = f"""
sys.path.insert(0, "mfpbench")
from {NAME} import DensePredictionCells
benchmark = DensePredictionCells(training=2, seed=0)
early, whole = benchmark.query(PARAMS, at=2), benchmark.query(PARAMS)
curve = [each["iterations"].value for each in benchmark.trajectory(benchmark.sample())]
rungs = list(map(int, benchmark.iter_fidelities()))[:5]
all(benchmark.query(PARAMS, at=rung) for rung in rungs)
print(json.dumps([early.score, whole["mean_score"].value, early.cost, curve, rungs, len(benchmark.configs)]))
"""
    score, mean, seconds, curve, rungs, configs = by_library("mfpbench", source, folder)
    assert score == EACH.scores[2][ITERATIONS.index(32)]
    assert mean == pytest.approx(TABLE.means[TABLE.place_of(CELL)])
    assert seconds == pytest.approx(EACH.seconds[2] * 32 / 256)
    assert curve == list(ITERATIONS)
    assert rungs == [1, 2, 3, 4, 5]
    assert configs == SPACE.size()


def test_syne_tune(folder: Path) -> None:
    if find_spec("fastparquet") is None:
        pytest.skip("needs fastparquet")
    source = """
from syne_tune.blackbox_repository.blackbox_tabular import deserialize
blackbox = deserialize("syne_tune")["made_up"]
values = blackbox(PARAMS, fidelity={"iterations": 128}, seed=1)
print(json.dumps([{name: float(value) for name, value in values.items()}, len(blackbox.hyperparameters)]))
"""
    values, configurations = by_library("syne_tune", source, folder)
    expected = {"score": EACH.scores[1][ITERATIONS.index(128)], "elapsed_time": EACH.seconds[1] / 2}
    expected |= {"multiply_adds": EACH.multiply_adds, "parameters": EACH.parameters}
    assert values == pytest.approx(expected, rel=1e-6)
    assert configurations == SPACE.size()


def test_without_syne_tune_the_others_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastparquet", None)
    table: CellTable = TABLE
    assert [path.name for path in write_forms(tmp_path, table, "made_up")] == ["optunahub", "mfpbench"]
    assert not (tmp_path / "syne_tune").exists()
