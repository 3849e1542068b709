"""docs/tutorial.ipynb: it runs from beginning to end in a folder of its own, and its outputs are those of its cells."""

import ast
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from search.cells.space import SearchSpace
from search.pipeline import load_found
from search.runs.study import load_run
from tests.test_docs import LINK, anchors

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NOTEBOOK = DOCS / "tutorial.ipynb"
RUNNING = runpy.run_path(str(DOCS / "run_tutorial.py"))
ITERATIONS = 10  # training steps of a cell: the scores are poor, and all else is as with more
OF_A_MACHINE = re.compile(r"/(home|root|tmp|work|usr|opt|Users|content)/|site-packages|[A-Z]:\\|\d:\d\d:\d\d|20\d\d-\d\d")

Cell = dict[str, Any]


def cells_of(path: Path, kind: str = "code") -> list[Cell]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def source(cell: Cell) -> str:
    return "".join(cell["source"])


def output_text(cell: Cell) -> str:
    """What a cell printed, and the tables that it shows; of pictures only that they are there."""
    parts = []
    for output in cell["outputs"]:
        data = output.get("data", {})
        parts.append("".join(output.get("text", data.get("text/markdown", ""))) or " ".join(sorted(data)))
    return "\n".join(parts)


def test_it_runs_from_beginning_to_end(tmp_path: Path) -> None:
    """One test, so that the notebook is run once, however many processes share the tests."""
    executed = run_notebook(tmp_path)
    check_six_cells_are_scored_beside_those_made_by_hand(executed)
    check_the_report_is_written_and_nothing_else_is_left(executed)
    check_pytorch_computes_what_numpy_does(executed)
    check_the_committed_outputs_are_those_of_the_cells(executed)


def run_notebook(folder: Path) -> Path:
    """The notebook after a run, beside the folder `run` that it ran in."""
    (folder / "run").mkdir()
    command = [sys.executable, str(DOCS / "run_tutorial.py"), "--out", str(folder / "executed.ipynb")]
    command += ["--folder", str(folder / "run"), "--iterations", str(ITERATIONS)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "JUPYTER_RUNTIME_DIR": str(folder / "jupyter")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # no cell failed, none warned
    return folder / "executed.ipynb"


def check_six_cells_are_scored_beside_those_made_by_hand(executed: Path) -> None:
    run = load_run(executed.parent / "run" / "runs" / "tutorial" / "search")
    assert [trial.number for trial in run.trials if trial.score is not None] == [0, 1, 2, 3, 4, 5]
    assert {record.name for record in run.baselines} >= {"linear", "mlp", "aspp", "psp", "dpc"}
    assert all(trial.result is not None and 0 < trial.result.score < 1 for trial in run.trials)
    (table,) = (output_text(cell) for cell in cells_of(executed) if cell["id"] == "scores")
    for trial in run.trials:
        assert f"| trial {trial.number} | {100 * (trial.score or 0):.1f} % |" in table
        assert str(trial.cell) in table


def check_the_report_is_written_and_nothing_else_is_left(executed: Path) -> None:
    folder = executed.parent / "run"
    found = load_found(folder / "runs" / "tutorial" / "search")
    assert found.report.stat().st_size > 100_000
    assert {path.name for path in folder.iterdir()} == {"runs"}


def check_pytorch_computes_what_numpy_does(executed: Path) -> None:
    texts = {cell["id"]: output_text(cell) for cell in cells_of(executed)}
    text = texts["reference-and-fast"] + texts["whole-cell-equal"]
    errors = [float(number) for number in re.findall(r"by the largest value: (\S+)", text)]
    assert len(errors) == 4  # an output and two gradients of an operation, the output of a cell
    assert max(errors) < 1e-5  # of float32: a few hundred roundings of 6e-8 each, at most, follow each other in a cell


def check_the_committed_outputs_are_those_of_the_cells(executed: Path) -> None:
    """But for numbers, of which some are scores: these differ with machine, threads and the number of iterations."""
    committed, new = cells_of(NOTEBOOK), cells_of(executed)
    assert [cell["id"] for cell in committed] == [cell["id"] for cell in new]
    for before, after in zip(committed, new, strict=True):
        texts = (re.sub(r"[\d.,]+(e[+-]\d+)?|\s+", "#", output_text(cell)) for cell in (before, after))
        assert next(texts) == next(texts), f"{before['id']}: run python docs/run_tutorial.py"


def test_the_committed_notebook_ran_in_one_go() -> None:
    cells = cells_of(NOTEBOOK)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell["outputs"]) for cell in cells) >= 10
    for cell in cells:
        live = RUNNING["LIVE"] in cell["metadata"].get("tags", [])
        assert not (live and cell["outputs"]), f"outputs of {cell['id']} are not kept"
        assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in cell["outputs"])


def test_the_committed_notebook_is_small_and_of_no_machine() -> None:
    assert NOTEBOOK.stat().st_size < 600_000
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert content["metadata"]["language_info"] == {"name": "python"}
    for cell in content["cells"]:
        assert not cell["metadata"].keys() - {"tags"}  # such as when it ran, and for how long
        assert not OF_A_MACHINE.search(output_text(cell) if cell["cell_type"] == "code" else source(cell)), cell["id"]


def test_what_the_text_says_of_the_scores_is_so() -> None:
    (table,) = (output_text(cell) for cell in cells_of(NOTEBOOK) if cell["id"] == "scores")
    rows = re.findall(r"^\| (six drawn|by hand) \| ([^|]+) \| ([\d.]+) % \|", table, re.MULTILINE)
    drawn = sorted(float(score) for kind, _, score in rows if kind == "six drawn")
    by_hand = {name: float(score) for kind, name, score in rows if kind == "by hand"}
    text = re.sub(r"\s+", " ", " ".join(source(cell) for cell in cells_of(NOTEBOOK, "markdown")))
    assert "all six drawn cells lead the linear probe and the MLP" in text
    assert len(drawn) == 6
    assert drawn[0] > max(by_hand["linear"], by_hand["mlp"])
    assert "five lead ASPP by about two points or more" in text
    assert drawn[1] - by_hand["aspp"] > 1.5
    assert "PSP, made by hand, leads them all" in text
    assert by_hand["psp"] > drawn[-1]
    assert by_hand["psp"] == max(by_hand.values())


def test_links_lead_somewhere() -> None:
    found = 0
    for cell in cells_of(NOTEBOOK, "markdown"):
        for match in LINK.finditer(source(cell)):
            name, _, anchor = match["target"].partition("#")
            assert (DOCS / name).is_file(), match["target"]
            assert not anchor or anchor in anchors(DOCS / name), match["target"]
            found += 1
    assert found > 10


def test_answers_are_hidden_and_right() -> None:
    (text,) = (source(cell) for cell in cells_of(NOTEBOOK, "markdown") if cell["id"] == "exercises")
    assert len(re.findall(r"^\*\*\d\.\*\*", text, re.MULTILINE)) == text.count("<details>") == text.count("</details>") >= 3
    number, expression = re.search(r"= ([\d,]+), which is `(SearchSpace\(2\)\.size\(\))`", text).groups()  # type: ignore[union-attr]
    assert eval(expression, {"SearchSpace": SearchSpace}) == int(number.replace(",", ""))


def test_who_has_not_installed_the_project_is_told_how(monkeypatch: pytest.MonkeyPatch) -> None:
    first = source(cells_of(NOTEBOOK)[0])
    imported = [node for node in ast.parse(first).body if isinstance(node, ast.Import | ast.ImportFrom)]
    roots = {(node.names[0].name if isinstance(node, ast.Import) else str(node.module)).split(".")[0] for node in imported}
    assert roots <= set(sys.stdlib_module_names)  # for it must run where nothing is installed
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "search" else find_spec(name))
    with pytest.raises(ImportError, match=r"^search cannot be imported: .*pip install -e '\.\[search\]'.*restart the kernel$"):
        exec(first, {})


def test_a_cell_that_warns_is_refused() -> None:
    cell = new_code_cell("...", id="loud", outputs=[new_output("stream", name="stderr", text="a.py:1: UserWarning: no")])
    with pytest.raises(RuntimeError, match=r"cell loud of tutorial\.ipynb warns: a\.py:1: UserWarning: no"):
        RUNNING["_require_no_warning"](cell)


@pytest.mark.parametrize("sources", [["x = 1"], ["ITERATIONS = 1", "ITERATIONS = 2"]])
def test_iterations_are_set_in_one_place(sources: list[str]) -> None:
    with pytest.raises(ValueError, match="not once"):
        RUNNING["with_iterations"](new_notebook(cells=[new_code_cell(each) for each in sources]), 3)


def test_a_folder_that_is_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(SystemExit, match="2"):
        RUNNING["main"](["--folder", str(tmp_path)])
    assert "is no empty folder" in capsys.readouterr().err
