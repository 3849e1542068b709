"""Samplers compared on a table: what regret is, what is written, and that a comparison goes on."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy.stats import spearmanr

import search.compare
import search.tabulate
from search.cells.space import SearchSpace
from search.compare import CompareSettings
from search.dense_tasks import Measure
from search.errors import InputError
from search.folder import Folder
from search.reports.comparison import TRAININGS, TRIALS, _draw, regrets, write_comparison
from search.runs.halving import Halving
from search.tabular.replay import Moment, Strategy, replay
from search.tabular.table import write_table
from search.tabulate import TabulateSettings
from tests.search.tabular.made_table import made_table
from tests.search.test_report import visible_text

TABLE = made_table()
WORTH = 100 * (TABLE.means.max() - TABLE.means)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("table") / "cells.json"
    write_table(path, TABLE)
    return str(path)


@pytest.fixture
def small(table: str, tmp_path: Path) -> CompareSettings:
    return CompareSettings(
        table=table, samplers=("random", "evolution"), trials=24, seeds=3, processes=1, out=tmp_path / "comparison"
    )


# Regret


def test_regret_is_of_the_best_cell_so_far_by_its_mean() -> None:
    searches = {
        0: [Moment(2, 256, 1.0, 3), Moment(4, 1024, 2.0, 5), Moment(9, 2048, 3.0, 5)],
        7: [Moment(1, 512, 1.0, 7), Moment(10, 2560, 3.0, 7)],
    }
    by_trials = 100 * regrets(TABLE, searches, TRIALS, [1, 2, 3, 4, 100])
    assert by_trials[0] == pytest.approx([np.nan, WORTH[3], WORTH[3], WORTH[5], WORTH[5]], nan_ok=True)
    assert by_trials[1] == pytest.approx([WORTH[7]] * 5)
    by_trainings = 100 * regrets(TABLE, searches, TRAININGS, [0.5, 1, 2, 3.9, 4])
    assert by_trainings[0] == pytest.approx([np.nan, WORTH[3], WORTH[3], WORTH[3], WORTH[5]], nan_ok=True)
    assert by_trainings[1] == pytest.approx([np.nan, np.nan, WORTH[7], WORTH[7], WORTH[7]], nan_ok=True)


def test_the_summary_has_the_quartiles_and_the_pairs_with_random_search(tmp_path: Path) -> None:
    best, worst = int(TABLE.means.argmax()), int(TABLE.means.argmin())
    middle = int(np.argsort(TABLE.means)[len(TABLE.means) // 2])

    def found(*ends: int) -> dict[int, list[Moment]]:
        return {seed: [Moment(10, 2560, 7200.0, end)] for seed, end in enumerate(ends)}

    cut = Strategy("paper", Halving("asha", (16, 256), 4))
    kinds = {Strategy("random"): found(worst, middle, middle), cut: found(best, worst, middle)}
    text = write_comparison(tmp_path, TABLE, kinds, 4, "the command")
    last = [line for line in text.splitlines() if line.startswith("paper + asha")][-1]
    assert last.split()[3:] == ["3", "10.0", "120.0", "1–1–1"]
    rows = list(csv.DictReader((tmp_path / "summary.csv").read_text(encoding="utf-8").splitlines()))
    row = next(row for row in rows if (row["sampler"], row["against"], row["budget"]) == ("paper", "trials", "10"))
    assert row["early_stopping"] == "asha"
    quartiles = [float(row[name]) for name in ("first_quartile", "median", "third_quartile")]
    assert 100 * np.array(quartiles) == pytest.approx(
        np.quantile([0, WORTH[worst], WORTH[middle]], (0.25, 0.5, 0.75)), abs=1e-4
    )
    before = next(row for row in rows if (row["sampler"], row["against"], row["budget"]) == ("paper", "trials", "5"))
    assert before["median"] == ""  # no score yet


def test_pairs_are_of_the_same_seed(tmp_path: Path) -> None:
    by_worth = np.argsort(-TABLE.means).tolist()  # the best first
    ends = {seed: [Moment(10, 2560, 1.0, place)] for seed, place in enumerate(by_worth[:4])}
    without_first = {seed: moments for seed, moments in ends.items() if seed != 0}
    kinds = {Strategy("random"): without_first, Strategy("local"): ends}
    text = write_comparison(tmp_path, TABLE, kinds, 4, "")
    assert [line for line in text.splitlines() if line.startswith("local")][-1].endswith("0–3–0")


def test_what_is_said_of_the_table(tmp_path: Path) -> None:
    search = {0: replay(TABLE, Strategy("random"), trials=5, workers=1, seed=0)}
    text = write_comparison(tmp_path, TABLE, {Strategy("random"): search}, 1, "")
    last = np.array([[curve[-1] for curve in each.scores] for each in TABLE.cells])
    noise = np.sqrt(np.mean([np.var(row, ddof=1) for row in last]))
    assert f"of one training {100 * noise:.2f} %, of the mean of 3 {100 * noise / np.sqrt(3):.2f} %" in text
    between = np.mean([spearmanr(last[:, i], last[:, j]).statistic for i, j in ((0, 1), (0, 2), (1, 2))])
    assert f"between two seeds: {between:.2f}" in text
    early = [np.mean([spearmanr(TABLE.scores[:, s, k], last[:, s]).statistic for s in range(3)]) for k in range(4)]
    assert ", ".join(f"{rho:.2f} after {each}" for each, rho in zip((16, 32, 64, 128), early, strict=True)) in text
    best = int(np.argmax([row.mean() for row in last]))
    assert f"best cell: {TABLE.cells[best].cell}" in text


def test_two_cells_have_no_rank_correlation(tmp_path: Path) -> None:
    two = made_table(SearchSpace(1, (1,), ()), seeds=1)
    assert len(two.cells) == 2
    moments = replay(two, Strategy("random"), trials=2, workers=1, seed=0)
    assert "ρ" not in write_comparison(tmp_path, two, {Strategy("random"): {0: moments}}, 1, "")


def test_the_chart_has_the_median_and_the_quartiles() -> None:
    kind = Strategy("evolution")
    searches = {seed: replay(TABLE, kind, trials=20, workers=1, seed=seed) for seed in range(8)}
    axes = Figure().add_subplot()
    _draw(TABLE, {kind: searches}, None, TRIALS, axes)
    (line,) = axes.get_lines()
    places, median = line.get_data(orig=True)
    values = 100 * regrets(TABLE, searches, TRIALS, list(np.asarray(places)))
    assert median == pytest.approx(np.median(values, axis=0))
    (band,) = axes.collections
    edges = np.asarray(band.get_paths()[0].vertices)[:, 1]
    assert edges.max() == pytest.approx(np.quantile(values, 0.75, axis=0).max())
    assert edges.min() == pytest.approx(np.quantile(values, 0.25, axis=0).min())


def test_a_score_that_is_no_share_is_not_a_percentage(tmp_path: Path) -> None:
    other = replace(TABLE, measure=Measure("−RMSE", "rmse", "m"))
    moments = replay(other, Strategy("random"), trials=5, workers=1, seed=0)
    text = write_comparison(tmp_path, other, {Strategy("random"): {0: moments}}, 1, "")
    assert f"best {TABLE.means.max():.3f} m" in text
    worth = WORTH[moments[-1].best] / 100
    assert f"{worth:.2f} ({worth:.2f}–{worth:.2f})" in text


# The command


def test_it_compares_and_goes_on(small: CompareSettings, capsys: pytest.CaptureFixture[str]) -> None:
    assert small.out is not None
    search.compare.main(small)
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines() if " + asha" in line] == ["random", "evolution"] * 3
    files = {path.relative_to(small.out).as_posix(): path.stat().st_mtime_ns for path in small.out.rglob("seed_*.json")}
    assert len(files) == 2 * 2 * 3
    expected = replay(TABLE, Strategy("evolution", Halving("asha", (16, 64, 256), 4)), trials=24, workers=4, seed=2)
    assert json.loads((small.out / "evolution+asha" / "seed_002.json").read_text())["moments"] == [
        m._asdict() for m in expected
    ]
    page = (small.out / "comparison.html").read_text(encoding="utf-8")
    assert len(re.findall(r"<svg", page)) == 4
    assert "57 cells, 3 seeds" in visible_text(page)
    assert {"comparison.png", "comparison.svg", "summary.csv"} <= {path.name for path in small.out.iterdir()}

    (small.out / "random" / "seed_001.json").unlink()  # as if it had been stopped there
    search.compare.main(replace(small, samplers=("random", "evolution", "local"), seeds=4))
    after = {path.relative_to(small.out).as_posix(): path.stat().st_mtime_ns for path in small.out.rglob("seed_*.json")}
    assert len(after) == 2 * 3 * 4
    assert {name for name in files if after[name] != files[name]} == {"random/seed_001.json"}


def test_several_processes_find_the_same(small: CompareSettings) -> None:
    assert small.out is not None
    search.compare.main(replace(small, seeds=1))
    search.compare.main(replace(small, seeds=1, processes=2, out=small.out / "again"))
    for name in ("random", "evolution", "random+asha", "evolution+asha"):
        one, other = (path / name / "seed_000.json" for path in (small.out, small.out / "again"))
        assert one.read_bytes() == other.read_bytes()


def test_other_searches_in_the_same_folder_are_refused(small: CompareSettings, tmp_path: Path) -> None:
    search.compare.main(replace(small, seeds=1))
    with pytest.raises(InputError, match=r"`trials` 24, now it is 30"):
        search.compare.main(replace(small, trials=30))
    with pytest.raises(InputError, match=r"`rungs` \[16, 64\], now it is \[32\]"):
        search.compare.main(replace(small, rungs=(32,)))
    other = tmp_path / "other.json"
    write_table(other, made_table(seed=5))
    with pytest.raises(InputError, match="cells and scores of `table`"):
        search.compare.main(replace(small, table=str(other)))


def test_a_damaged_result_is_named(small: CompareSettings) -> None:
    assert small.out is not None
    search.compare.main(replace(small, seeds=1))
    path = small.out / "random" / "seed_000.json"
    one = '{"moments": [{"trials": 1, "iterations": 256, "seconds": 1.0, "best": 1}]}'
    wrong = '{"moments": []}', '{"moments": [[1]]}', one.replace('"best": 1', '"best": 9999'), one.replace("256", '"a"')
    for text in ("", "{}", '{"moments": 1}', *wrong):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=re.escape(f"{path} is damaged")):
            search.compare.main(replace(small, seeds=1))


def test_one_at_a_time(small: CompareSettings) -> None:
    assert small.out is not None
    with Folder(small.out).locked(), pytest.raises(InputError, match="in use by another process"):
        search.compare.main(small)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trials": 0}, "`trials` must be at least 1"),
        ({"seeds": 0}, "`seeds` must be at least 1"),
        ({"workers": 0}, "`workers` must be at least 1"),
        ({"processes": 0}, "`processes` must be at least 1"),
        ({"reduction_factor": 0}, "`reduction_factor` must be at least 1"),
        ({"samplers": ()}, "`samplers` must name some of paper, .*, got none"),
        ({"samplers": ("random", "random")}, "each once"),
        ({"samplers": ("best",)}, "`samplers` must name some of paper"),
        ({"early_stopping": ("soon",)}, "`early_stopping` must name some of none, halving, asha, pasha"),
        ({"rungs": (17,)}, "`rungs` must be some of 16 32 64 128, in ascending order, got 17"),
        ({"rungs": (256,)}, "`rungs` must be some"),
        ({"rungs": (64, 16)}, "in ascending order, got 64 16"),
        ({"reduction_factor": 3}, "none of them 256 divided by a power of `reduction_factor` 3"),
        ({"rungs": ()}, "got none"),
        ({"trials": 58}, "`trials` must be at most 57, the cells of the table, got 58"),
        ({"table": "nowhere"}, "`table` nowhere cannot be read"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    small: CompareSettings, change: dict[str, object], words: str
) -> None:
    assert small.out is not None
    with pytest.raises(InputError, match=words):
        search.compare.main(replace(small, **change))  # type: ignore[arg-type]
    assert not small.out.exists()


# search.tabulate


def test_a_table_is_written_in_other_forms(table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search.tabulate.main(TabulateSettings(table=table, out=tmp_path / "forms"))
    said = capsys.readouterr()
    assert said.out.startswith("57 cells, 3 seeds, scored after 16, 32, 64, 128, 256 iterations\n")
    assert (tmp_path / "forms" / "mfpbench" / "cells.csv").exists()
    assert not (tmp_path / "forms" / "cells.json").exists()


@pytest.mark.parametrize("wrong", [TabulateSettings(), TabulateSettings(runs=(Path("a"),), table="camvid")])
def test_runs_or_a_table(wrong: TabulateSettings) -> None:
    with pytest.raises(InputError, match="give either `runs`, folders of searches, or `table`"):
        search.tabulate.main(wrong)
