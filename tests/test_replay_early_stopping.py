"""The script that says what early stopping would have saved: its figures on curves for which they are known."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from search.runs.halving import Halving

REPLAY = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "replay_early_stopping.py"))
RUNGS = (250, 500, 1000)


def curves(*rows: tuple[float, float, float]) -> np.ndarray:
    return np.array(rows)


def test_rungs_that_order_cells_as_the_last_one_cost_no_quality() -> None:
    scores = np.arange(16.0)[:, None] + np.array([0.0, 20.0, 40.0])
    replayed = REPLAY["replay"](scores, RUNGS, Halving("halving", RUNGS, 2))
    assert replayed == ((16 * 250 + 8 * 250 + 4 * 500) / (16 * 1000), 0.0)


def test_a_cell_that_is_best_at_last_alone_is_missed() -> None:
    late = curves((0.3, 0.4, 0.5), (0.2, 0.3, 0.4), (0.1, 0.2, 0.9), (0.0, 0.1, 0.1))
    cost, regret = REPLAY["replay"](late, RUNGS, Halving("asha", RUNGS, 4))
    assert (cost, regret) == (pytest.approx((4 * 250 + 750) / 4000), pytest.approx(0.4))
    assert REPLAY["replay_short"](late, RUNGS, 1) == (pytest.approx((3 * 500 + 1000) / 4000), pytest.approx(0.4))


def test_the_tables_have_a_row_for_each_rung_and_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rungs.csv"
    rng = np.random.default_rng(0)
    rows = [f"{i},{','.join(map(str, rng.random(3)))},,[]" for i in range(8)] + ["8,0.5,,,it failed,[]"]
    path.write_text("\n".join(["trial,250,500,1000,failure,cell", *rows]))
    REPLAY["main"](path)
    said = capsys.readouterr().out
    assert said.startswith("8 cells, 1,000 iterations in full\n")
    rules = [line.split("|")[1:4] for line in said.splitlines() if line.startswith("| ") and "rule" not in line]
    assert [rule[0].strip() for rule in rules].count("asha") == 3  # halves on one rung and two, a quarter on one
    assert ["all short, the best in full" in rule[0] for rule in rules].count(True) == 2


def test_the_page_has_what_the_script_prints(capsys: pytest.CaptureFixture[str]) -> None:
    docs = Path(__file__).parents[1] / "docs"
    REPLAY["main"](docs / "data" / "camvid_rungs.csv")
    printed = capsys.readouterr().out.splitlines()
    page = (docs / "early_stopping.md").read_text(encoding="utf-8")
    shown = [line for line in page.split("## Measured on CamVid")[1].splitlines() if line.startswith("|")]
    assert len(shown) > 20
    assert set(shown) <= set(printed)
