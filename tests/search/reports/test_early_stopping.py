"""What a report says of a search that was cut short: rungs, cost, learning curves; no comparison mixes rungs."""

import csv
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

import search.reports.run_files
from search.reports.run import Running, write_report
from search.reports.run_files import finish_run
from search.reports.rungs import Agreement, Cost, Rung, cost_of, rungs_of, ties_of, trained_longest
from search.runs.study import Run, TrialRecord, ranked
from tests.search.test_report import BASELINES, FAILURE, make_result, make_run, visible_text

RUNGS = (62, 250, 1000)
# By trial. 2 failed at once, 3 on the second rung, 7 on the third; 8 is a copy of 0.
SCORES: dict[int, tuple[float, ...]] = {
    0: (0.20, 0.35, 0.50),
    1: (0.10,),
    3: (0.22,),
    4: (0.30, 0.33),
    5: (0.18, 0.31),
    6: (0.25, 0.36, 0.48),
    7: (0.24, 0.37),
}
FAILED, COPIES = (2, 3, 7), {8: 0}


def cut_short(
    directory: Path,
    scores: Mapping[int, Sequence[float]],
    *,
    rungs: tuple[int, ...] = RUNGS,
    failed: Sequence[int] = (),
    copies: Mapping[int, int] | None = None,
    baselines: Mapping[str, list[float]] | None = None,
    **identity: Any,
) -> Run:
    """A run with rungs: by trial its score on each that it has reached; those that failed; and by trial whose copy it is."""
    copies = copies or {}
    run = make_run(directory, [0.5] * (max([*scores, *failed, *copies]) + 1), dict(baselines or {}))
    trials = []
    for record in run.trials:
        number = record.number
        reached = scores.get(copies.get(number, number), ())
        is_failed = number in failed
        if reached or is_failed:
            result = None if is_failed else make_result(reached[-1])
            made = TrialRecord.of(number, record.cell, result, FAILURE if is_failed else None, copies.get(number))
            trials.append(replace(made, rung=max(len(reached) - 1, 0)))
    identity = {"early_stopping": "asha", "reduction_factor": 4} | identity
    kept = {number: tuple(reached) for number, reached in scores.items()}
    return replace(run, trials=trials, rungs=rungs, rung_scores=kept, identity=run.identity | identity)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return cut_short(tmp_path, SCORES, failed=FAILED, copies=COPIES, baselines=BASELINES)


def page_of(run: Run, running: Running | None = None) -> str:
    return write_report(run, running=running).read_text(encoding="utf-8")


def section(page: str) -> str:
    found = re.search(r"<h2>Early stopping</h2>(.*?)<h2>", page, re.DOTALL)
    assert found
    return found[1]


def chart(page: str, heading: str) -> str:
    found = re.search(rf"<h3>{heading}</h3>(.*?)</figure>", page, re.DOTALL)
    assert found
    return found[1]


def titles(svg: str) -> list[str]:
    return [html.unescape(title) for title in re.findall(r"<title>([^<]+)</title>", svg)]


# What is counted


def test_rungs_of_cells_that_failed_copies_and_those_that_went_on(run: Run) -> None:
    first, second, last = rungs_of(run)
    assert (first.iterations, first.cells, first.best) == (62, 7, (0.30, 4))
    assert (first.went_on, first.failed) == (6, 1)  # trial 3 failed above
    assert (second.iterations, second.cells, second.best) == (250, 5, (0.37, 7))
    assert (second.went_on, second.failed) == (3, 1)
    assert last == Rung(1000, 2, (0.50, 0))
    both = [SCORES[number] for number in (0, 4, 5, 6, 7)]
    assert first.agreement is not None
    assert first.agreement.rho == pytest.approx(stats.spearmanr([s[0] for s in both], [s[1] for s in both]).statistic)
    assert first.agreement.cells == 5
    assert first.agreement.interval is not None
    assert second.agreement == Agreement(2)  # two cells have no rank correlation


def test_cost_is_that_of_rungs_with_a_score_and_copies_are_free(run: Run) -> None:
    assert cost_of(run) == Cost(7, trained=2 * 62 + 3 * 250 + 2 * 1000, in_full=7 * 1000)


def test_what_has_no_order_has_no_rank_correlation(tmp_path: Path) -> None:
    run = cut_short(tmp_path, {k: (0.1, 0.2 + 0.1 * k) for k in range(4)}, rungs=(10, 100))
    assert rungs_of(run)[0].agreement == Agreement(4)
    assert "– n = 4" in visible_text(section(page_of(run)))


def test_of_many_cells_the_rank_correlation_has_no_interval(tmp_path: Path) -> None:
    run = cut_short(tmp_path, {k: (0.1 + 1e-4 * k, 0.2 + 1e-4 * k) for k in range(600)}, rungs=(10, 100))
    agreement = rungs_of(run)[0].agreement
    assert agreement is not None
    assert agreement.rho == pytest.approx(1.0)
    assert (agreement.interval, agreement.cells) == (None, 600)


def test_ties_are_looked_for_on_each_rung(run: Run, tmp_path: Path) -> None:
    assert list(ties_of(run, ranked(run.trials))) == []
    stuck = dict.fromkeys(range(5), (0.05,)) | {9: (0.05, 0.3), 10: (0.06, 0.05)}
    tied = cut_short(tmp_path, stuck, rungs=(1000, 2000))
    (warning,) = ties_of(tied, ranked(tied.trials))
    assert warning.startswith("after 1,000 iterations most scores are the same, 5.00 %")
    mixed = cut_short(tmp_path, {0: (0.1, 0.3), 1: (0.3,), 2: (0.2, 0.31)}, rungs=(10, 100))  # two of three at last have 0.3
    assert list(ties_of(mixed, ranked(mixed.trials))) == []


def test_ties_of_a_run_without_rungs_are_those_of_all_cells(tmp_path: Path) -> None:
    run = make_run(tmp_path, [0.05, 0.05, 0.05, 0.2])
    (warning,) = ties_of(run, ranked(run.trials))
    assert warning.startswith("most scores are the same, 5.00 %")
    assert trained_longest(ranked(run.trials)) == ranked(run.trials)


# The page


def test_the_section_has_rungs_cost_and_what_rho_is_of(run: Run) -> None:
    text = visible_text(section(page_of(run)))
    assert "Every cell is scored after 62 iterations. The best quarter goes on from there to 250, the best quarter of" in text
    assert "2,874 iterations were trained, 41.1 % of the 7,000 that all 7 cells would have taken in full." in text
    assert "62 7 6 1 failed 30.00 % trial 4 " in text
    assert "250 5 3 1 failed 37.00 % trial 7 – n = 2" in text
    assert "1,000 2 – 50.00 % trial 0 –" in text
    assert "It is of the cells that went on, which are the best: expect a higher one among all cells." in text
    assert "on their way" not in text


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ({"early_stopping": "halving"}, "Once all are there, the best quarter goes on from there to 250"),
        ({"reduction_factor": 2}, "The best half goes on from there to 250"),
        ({"reduction_factor": 5}, "The best one in 5 goes on from there to 250"),
        ({"early_stopping": "pasha"}, "An upper rung is used only if the two below it disagree"),
        ({"reduction_factor": 1}, "All go on to 250, 1,000: these are whole learning curves."),
    ],
)
def test_the_section_says_what_the_rule_was(tmp_path: Path, identity: dict[str, Any], message: str) -> None:
    text = visible_text(section(page_of(cut_short(tmp_path, SCORES, failed=FAILED, **identity))))
    assert message in text
    assert ("expect a higher one among all cells" in text) == (identity.get("reduction_factor") != 1)


def test_scores_say_how_long_their_cells_were_trained(run: Run) -> None:
    page = page_of(run)
    text = visible_text(page)
    assert "62, 250 or 1,000 training steps per cell" in text
    assert "5 scored · 2 in full · 1 duplicate · 3 failed" in text
    rows = re.findall(r'<th>trial (\d+)</th><td class="number">([\d,]+)</td><td class="number">([\d.]+) %', page)
    assert rows == [
        ("0", "1,000", "50.00"),
        ("6", "1,000", "48.00"),
        ("4", "250", "33.00"),
        ("5", "250", "31.00"),
        ("1", "62", "10.00"),
    ]
    assert len(re.findall(r'<tr class="compared"><th>[^/]+</th><td class="number">1,000</td>', page)) == 2
    assert "No. 5 of 5, among the worst trial 1, 62 iterations" in text


def test_charts_compare_cells_that_were_trained_as_long(run: Run) -> None:
    page = page_of(run)
    scores, progress, costs = (
        chart(page, heading)
        for heading in ("Scores of the cells trained in full", "Progress of the search", "Score against cost")
    )
    assert "2 of 5 distinct cells, each once" in visible_text(scores)
    for svg in (progress, costs):
        assert "fewer iterations" in svg  # the legend
        assert "Grey: scores after fewer iterations." in visible_text(svg)
        shown = [title.splitlines()[0] for title in titles(svg) if title.startswith("trial")]
        of_trials = {int(title.split()[1].rstrip(":")): title for title in shown}
        assert of_trials[1] == "trial 1: mIOU 10.00 % after 62 iterations, 600 M multiply-adds"
        assert of_trials[0] == "trial 0: mIOU 50.00 % after 1,000 iterations, 600 M multiply-adds"
        longest, shorter = (svg.split(f'<g id="{gid}">')[1].split("<g id=")[0] for gid in ("trials", "shorter"))
        assert {int(n) for n in re.findall(r"<title>trial (\d+):", longest)} <= {0, 6, 8}
        assert {int(n) for n in re.findall(r"<title>trial (\d+):", shorter)} == {1, 4, 5}
    assert "best so far in full" in progress


def test_learning_curves_end_where_their_cells_did(run: Run) -> None:
    svg = chart(page_of(run), "Learning curves")
    ends = {title.splitlines()[0] for title in titles(svg)}
    assert len(ends) == 7
    assert "trial 7: mIOU 24.00 % after 62, 37.00 % after 250 iterations" in ends  # failed on the third rung
    assert "trial 0: mIOU 20.00 % after 62, 35.00 % after 250, 50.00 % after 1,000 iterations" in ends
    for label in ("62 iterations", "250 iterations", "1,000 iterations", "best, trial 0"):
        assert label in svg
    assert "are drawn" not in visible_text(svg)


def test_of_very_many_cells_some_curves_of_each_rung_are_drawn_always_the_same(tmp_path: Path) -> None:
    scores = {k: (0.1 + 1e-4 * k, *([0.3 + 1e-4 * k] if k >= 900 else []), *([0.5] if k == 1199 else [])) for k in range(1200)}
    run = cut_short(tmp_path, scores)
    svg = chart(page_of(run), "Learning curves")
    drawn = [int(number) for number in re.findall(r"<title>trial (\d+):", svg)]
    assert len(drawn) == 80 + 80 + 1
    assert {0, 899, 900, 1198, 1199} <= set(drawn)  # best and worst of each rung
    assert "Of the cells that end on a rung, up to 900, 80 are drawn, evenly from best to worst." in visible_text(svg)
    assert chart(page_of(run), "Learning curves") == svg
    assert len(svg) < 200_000


def test_a_running_search_without_a_cell_in_full(tmp_path: Path) -> None:
    scores = {0: (0.2, 0.3), 1: (0.25,), 2: (0.3,)}  # trial 2 is on its way
    run = cut_short(tmp_path, scores, baselines=BASELINES)
    page = page_of(run, Running(28_000, datetime(2026, 5, 4, tzinfo=UTC)))
    text = visible_text(page)
    assert "with 30.00 % mIOU on the proxy task after 250 of 1,000 iterations; none is trained in full yet." in text
    assert "3 scored · 0 in full" in text
    assert "points" not in text.split("Early stopping")[0]  # no difference to cells that were trained in full
    assert "374 iterations were trained so far, 12.5 % of the 3,000 that all 3 cells" in text
    assert "Cells on their way to the next rung are not counted there yet." in text
    assert "62 3 1 30.00 % trial 2 – n = 1 250 1 0 30.00 % trial 0 – 1,000 0 – – –" in text
    assert "Scores of the cells trained longest so far, 250 iterations" in text
    assert "best so far after 250" in page
    assert "trial 0, 250 iterations ASPP" in text  # above the table of classes


def test_one_rung_is_enough_for_a_page_of_a_search_that_has_just_begun(tmp_path: Path) -> None:
    text = visible_text(page_of(cut_short(tmp_path, {0: (0.2,)}), Running(12, datetime(2026, 5, 4, tzinfo=UTC))))
    assert "62 iterations were trained so far, 6.2 % of the 1,000 that 1 cell would have taken in full." in text


@pytest.mark.parametrize("failed", [(), (0, 1)])
def test_before_the_first_score_there_is_no_section(tmp_path: Path, failed: tuple[int, ...]) -> None:
    run = cut_short(tmp_path, {}, failed=(*failed, 2))
    page = page_of(run)
    assert "Early stopping" not in page
    assert "No cell has a score yet" in page
    assert cost_of(run) is None


def test_a_run_without_rungs_says_nothing_of_them(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path, [0.3, None, 0.45], BASELINES))
    assert not re.search(r"early stopping|fewer iterations|in full|\brungs?\b", visible_text(page), re.IGNORECASE)
    assert "1,500 training steps per cell" in page
    assert "Scores of all cells" in page
    assert '<th class="number">iterations</th>' not in page


# Files and the printed table


def finish(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    monkeypatch.setattr(search.reports.run_files, "load_run", lambda directory: run)
    monkeypatch.setattr(search.reports.run_files, "_write_examples", lambda *_: None)
    finish_run(run.directory, {}, None, (), None)  # type: ignore[arg-type]
    with (run.directory / "cells.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_table_and_files_say_iterations_and_have_cells_in_full_first(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = finish(run, monkeypatch)
    assert {int(row["trial"]): row["iterations"] for row in rows} == {
        **{0: "1000", 6: "1000", 8: "1000", 4: "250", 5: "250", 1: "62"},
        **dict.fromkeys(FAILED, ""),
    }
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["iterations", "mIOU"]
    assert [line.split()[1:4] for line in lines[1:6]] == [
        ["0", "1,000", "50.00"],
        ["6", "1,000", "48.00"],
        ["4", "250", "33.00"],
        ["5", "250", "31.00"],
        ["1", "62", "10.00"],
    ]
    assert lines[6].split()[:5] == ["aspp", "(n=3)", "1,000", "42.00", "±"]
    assert not any("warning" in line for line in lines)
    best = run.directory / "best_cells"
    assert (best / "rank_01.json").read_text() == run.trials[0].cell.to_json()
    assert (best / "rank_05.json").read_text() == run.trials[1].cell.to_json()


def test_table_and_files_of_a_run_without_rungs_are_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = finish(make_run(tmp_path, [0.3, None, 0.45]), monkeypatch)
    assert "iterations" not in rows[0]
    assert "iterations" not in capsys.readouterr().out


def test_ties_on_a_rung_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = cut_short(tmp_path, dict.fromkeys(range(3), (0.05,)) | {3: (0.2, 0.3)})
    finish(run, monkeypatch)
    assert "warning: after 62 iterations most scores are the same, 5.00 %" in capsys.readouterr().out
