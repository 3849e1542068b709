import html
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fast.checkpoint import save_head
from fast.dense_prediction_cell import DensePredictionCell
from fast.segmentation import SegmentationHead
from search.cells.reach import FeatureMaps
from search.cells.space import SearchSpace, load_cell
from search.dense_tasks import Scores
from search.dense_tasks.segmentation import Segmentation
from search.errors import InputError
from search.report import ReportSettings, main
from search.reports.charts import groups_of
from search.reports.page import percent, quantity
from search.reports.run import write_report
from search.runs.study import BaselineRecord, Run, RunSettings, TrialRecord
from search.settings import BackboneSettings, DataSettings, FeatureSettings, HeadSettings, MachineSettings
from search.tasks.proxy import ProxyResult

MAPS = FeatureMaps(validation=(17, 33), training=(13, 33))
CLASS_NAMES = ("road", "car & <b>van</b>", "sky")
FAILURE = "the loss was nan at iteration 3 <script>"


def make_result(score: float, *, multiply_adds: int = 600_000_000) -> ProxyResult:
    curve = tuple((iteration, 2.0 / iteration) for iteration in range(1, 61))
    return ProxyResult(Scores(score, (score, None, 0.5 * score)), curve, 804_000, multiply_adds, 12.3, 10**9)


def make_run(directory: Path, scores: list[float | None], baselines: dict[str, list[float]] | None = None) -> Run:
    """A run with one trial per score, None for a failed one, and each baseline's scores by seed."""
    rng = np.random.default_rng(0)
    space = SearchSpace(maps=MAPS)
    trials = [
        TrialRecord.of(i, space.sample(rng), None if score is None else make_result(score), None if score else FAILURE, None)
        for i, score in enumerate(scores)
    ]
    curves = {record.number: make_result(0.5).loss_curve for record in trials}
    compared = [
        BaselineRecord(name, seed, load_cell(name) if name in ("aspp", "dpc") else trials[0].cell, make_result(score))
        for name, group in (baselines or {}).items()
        for seed, score in enumerate(group)
    ]
    identity = {"dataset": "shapes", "iterations": 1500, "crop_size": None, "image_size": [129, 161], "learning_rate": 0.05}
    palette = np.array([[128, 64, 128], [0, 0, 142], [70, 130, 180]], dtype=np.uint8)
    command = "python -m search.random --dataset shapes"
    settings = RunSettings(DataSettings(), BackboneSettings(), FeatureSettings(), HeadSettings(), MachineSettings())
    return Run(
        directory, identity, command, Segmentation(CLASS_NAMES, palette), settings, space, trials, compared, None, curves
    )


def read_report(run: Run) -> str:
    return write_report(run).read_text(encoding="utf-8")


def visible_text(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


BASELINES = {"aspp": [0.41, 0.42, 0.43], "dpc": [0.40, 0.44]}


def test_the_numbers_are_in_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path, [0.30, 0.4512, None, 0.35, 0.25, 0.33], BASELINES | {"trial 1": [0.44, 0.43]})
    run.trials.append(replace(run.trials[1], number=6, duplicate_of=1))
    text = visible_text(read_report(run))
    assert "The best of 5 distinct cells is that of trial 1, with 45.12 % mIOU" in text
    assert "Trained again with 2 other seeds it scores 43.50 ± 0.71 %" in text
    assert "ASPP 42.00 % ± 1.00, n = 3 best cell again +1.50 points" in text
    assert "Published DPC 42.00 % ± 2.83, n = 2 best cell again +1.50 points" in text
    assert "5 scored · 1 duplicate · 1 failed" in text
    assert "804 K 600 M 12.3" in text
    assert "absent" in text  # the class without IoU
    assert "python -m search.random --dataset shapes" in text
    assert "crop_size None" in text
    assert "1,500 training steps" in text
    assert FAILURE in text


def test_the_page_says_what_is_out_of_reach(tmp_path: Path) -> None:
    run = make_run(tmp_path, [0.30, 0.45], BASELINES)
    for path in ("aspp", "dpc"):  # are drawn if the run has their heads
        context = DensePredictionCell(load_cell(path), 3, branch_channels=4, cell_channels=4)
        save_head(tmp_path / "heads" / f"{path}_seed0.safetensors", SegmentationHead(context, 3), task={}, backbone={})
    text = visible_text(read_report(run))
    assert "4.2e+11 cells, 2.3e+10 of them different on a 17×33 map; out of reach on the 17×33 map: rate 18" in text
    assert "out of reach in the 13×33 training crops: rate 15 (height)." in text
    assert "out of reach on the 17×33 map: rate 18×18 of branch 3 (height)" in text  # ASPP
    for sentence in MAPS.cell_remarks(run.trials[0].cell):
        assert sentence in text


def test_own_cells_are_compared_by_their_names(tmp_path: Path) -> None:
    text = visible_text(read_report(make_run(tmp_path, [0.30, 0.45], {"mine": [0.41, 0.43], "trial 1": [0.44]})))
    assert "mine 42.00 % ± 1.41, n = 2 best cell again +2.00 points" in text  # a tile
    assert "mine again" not in text
    assert "trial 1 again (n = 1)" in text


def test_every_dot_says_whose_it_is(tmp_path: Path) -> None:
    """In each of the two charts with dots, in the place of its trial's score."""
    run = make_run(tmp_path, [0.30, None, 0.45, 0.35], BASELINES | {'"mine" & <more>': [0.43]})
    page = read_report(run)
    dots = re.findall(r'<title>([^<]+)</title><use [^>]*y="([\d.]+)"', page)
    of_trials = [(title, float(y)) for title, y in dots if title.startswith("trial")]
    assert [title.splitlines()[0] for title, _ in of_trials] == [
        f"trial {number}: mIOU {score} %, 600 M multiply-adds"
        for number, score in ((0, "30.00"), (2, "45.00"), (3, "35.00"), (2, "45.00"), (3, "35.00"), (0, "30.00"))
    ]
    for chart in (of_trials[:3], of_trials[3:]):
        assert sorted(chart, key=lambda dot: dot[1]) == sorted(chart, key=lambda dot: dot[0].split("mIOU")[1], reverse=True)
    compared = [html.unescape(title).splitlines()[0] for title, _ in dots if not title.startswith("trial")]
    assert compared == ["ASPP: 42.00 %", "Published DPC: 42.00 %", '"mine" & <more>: 43.00 %']


def test_of_very_many_trials_the_best_and_the_front_say_whose_they_are(tmp_path: Path) -> None:
    """All others are one picture in a chart, so the page hardly grows with them."""
    run = make_run(tmp_path, [0.30, 0.32, *(0.45 - 1e-4 * k for k in range(1200))])
    cheap = make_result(0.35, multiply_adds=1_000_000)
    run.trials[900] = TrialRecord.of(900, run.trials[900].cell, cheap, None, None)
    page = read_report(run)
    progress, costs = (
        re.search(rf"<h3>{heading}</h3>(.*?)</figure>", page, re.DOTALL)[1]  # type: ignore[index]
        for heading in ("Progress of the search", "Score against cost")
    )
    best = [str(number) for number in range(2, 102)]
    assert re.findall(r"<title>trial (\d+):", progress) == ["0", "1", *best]  # two of the line
    assert re.findall(r"<title>trial (\d+):", costs) == [*best, "900"]  # and the front's cheapest
    assert [chart.count("<image") for chart in (progress, costs)] == [1, 1]
    assert "Point at a larger dot" in visible_text(progress)
    assert len(progress) + len(costs) < 300_000
    parsed = [record for record in run.trials if "result" in vars(record)]  # JSON is read where it is asked for
    assert len(parsed) <= 20


@pytest.mark.parametrize(("kind", "named"), [("multiply_adds", "multiply-adds"), ("latency", "latency")])
def test_the_front_of_two_objectives_is_in_the_page(tmp_path: Path, kind: str, named: str) -> None:
    """From the cheapest, with the known cells where they belong, and which of the others beat a cell."""
    places = {0: (0.30, 3), 1: (0.20, 1), 2: (0.25, 3), 3: (0.45, 6), 4: (0.45, 5)}  # the third and the fourth are beaten
    run = make_run(tmp_path, [score for score, _ in places.values()])
    compared = {"linear": (0.1, 0), "psp": (0.31, 2), "aspp": (0.29, 3), "dpc": (0.40, 4), "trial 3": (0.1, 6)}
    of_places = {n: make_result(score, multiply_adds=cost * 10**9) for n, (score, cost) in (places | compared).items()}
    results = {n: replace(result, latency=result.multiply_adds / 1e9) for n, result in of_places.items()}
    trials = [TrialRecord.of(n, run.trials[n].cell, results[n], None, None) for n in places]
    baselines = [BaselineRecord(name, 0, run.trials[0].cell, results[name]) for name in compared]
    page = read_report(replace(run, trials=trials, baselines=baselines, identity=run.identity | {"second_objective": kind}))
    text = visible_text(page).replace("\N{NO-BREAK SPACE}", " ")
    assert f"The Pareto front of mIOU and {named} has 3 cells, of which 1 is beaten by a known cell in both." in text
    section = text.split("The Pareto front 3 of 5 distinct cells are on the front")[1].split("have the front.")[0]
    cost = {0: "0", 1: "1.00 B", 2: "2.00 B", 3: "3.00 B", 4: "4.00 B", 5: "5.00 B", 6: "6.00 B"}
    if kind == "latency":
        cost = {number: f"{number}.00 ×" for number in cost}
    rows = [f"Linear (n = 1) {cost[0]} 10.00 %", f"trial 1 {cost[1]} 20.00 %", f"PSP (n = 1) {cost[2]} 31.00 %"]
    rows += [f"trial 0 {cost[3]} 30.00 %", f"ASPP (n = 1) {cost[3]} 29.00 %", f"Published DPC (n = 1) {cost[4]} 40.00 %"]
    rows += [f"trial 4 {cost[5]} 45.00 %", f"trial 3 again (n = 1) {cost[6]} 10.00 %"]
    parts = re.split("|".join(map(re.escape, rows)), section)
    assert [section.index(row) for row in rows] == sorted(section.index(row) for row in rows)
    beaten = [re.findall("beaten by (.*?) $", part) for part in parts[1:-1]]
    assert beaten == [[], [], [], ["PSP"], ["trial 0"], [], []]
    charts = re.findall(r"<h3>(Score against \w+)</h3>", page)
    assert charts == ["Score against cost"] + ["Score against latency"] * (kind == "latency")
    assert (", latency 3.00" in page) == (kind == "latency")  # of a dot
    assert page.count("<title>Linear:") == 1  # which would press the others of the chart of latency into a corner
    assert "<h2>Cells of the front beside the known ones</h2>" in page


def test_of_many_failures_the_last_are_listed(tmp_path: Path) -> None:
    text = visible_text(read_report(make_run(tmp_path, [0.3, *[None] * 60])))
    assert "60 failed" in text
    assert "The last 50 of 60." in text
    assert text.count(FAILURE) == 50


def test_no_two_compared_cells_look_alike(tmp_path: Path) -> None:
    """Also the search's best of an earlier and of a later day, and more cells than there are colours."""
    names = ["aspp", "dpc", "trial 0", "trial 1", *(f"mine {k}" for k in range(8))]
    groups = groups_of(make_run(tmp_path, [0.3, 0.4], {name: [0.4] for name in names}))
    assert [group.name for group in groups] == names
    assert len({(group.colour, group.dashes) for group in groups}) == len(names)
    assert len({(group.colour, group.marker) for group in groups}) == len(names)
    assert len({group.colour for group in groups[:5]}) == 5


def test_long_names_are_short_in_the_page_and_whole_on_hover(tmp_path: Path) -> None:
    long_name, long_class = "cell_" * 38, "class_" * 40
    run = make_run(tmp_path, [0.3, 0.4], {long_name: [0.4]})
    run = replace(run, task=Segmentation((long_class, "car", "sky"), np.zeros((3, 3), np.uint8)))
    write_examples(run)
    page = read_report(run)
    shown = re.sub(r'title="[^"]*"|<title>[^<]*</title>', "", page)
    assert not re.search(r"(cell_){6}|(class_){6}", shown)
    assert page.count(f'title="{long_name}"') == 2  # its tile and the table of classes; one of cells adds the seeds
    assert f'title="{long_class}"' in page


def test_a_run_keeps_its_report_in_its_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`out` is for `cells`: the report of a run is .*report\.html"):
        main(ReportSettings(run=tmp_path, out=tmp_path / "page.html"))


def test_the_best_and_the_worst_cells_are_drawn_once_each(tmp_path: Path) -> None:
    scores: list[float | None] = [0.1 * k for k in range(1, 8)]
    text = visible_text(read_report(make_run(tmp_path, scores)))
    assert re.findall(r"No\. (\d) of 7", text) == ["1", "2", "3", "6", "7"]
    assert text.count("among the worst") == 2


def test_without_a_second_scoring_the_best_is_called_a_single_one(tmp_path: Path) -> None:
    text = visible_text(read_report(make_run(tmp_path, [0.30, 0.45], {"aspp": [0.47]})))
    assert "ASPP 47.00 % n = 1 best cell -2.00 points" in text
    assert "picked as the best of many and scored once" in text


@pytest.mark.parametrize(
    ("scores", "baselines", "message"),
    [
        ([], {}, "No trial has finished yet."),
        ([], BASELINES, "No trial has finished yet."),
        ([None, None], {}, "No cell has a score yet: 2 of 2 trials failed; the last: "),
        ([0.4], {}, "The best of 1 distinct cell is that of trial 0"),
        ([0.4], BASELINES, "The best of 1 distinct cell is that of trial 0"),
        ([0.4, 0.4, 0.4], {}, "The best of 3 distinct cells is that of trial 0"),
        ([None, 0.0, 0.4], {}, "with 40.00 % mIOU"),
    ],
)
def test_small_and_broken_runs_have_a_report(
    tmp_path: Path, scores: list[float | None], baselines: dict[str, list[float]], message: str
) -> None:
    assert message in visible_text(read_report(make_run(tmp_path, scores, baselines)))


def test_a_stopped_search_says_how_far_it_came_and_how_it_goes_on(tmp_path: Path) -> None:
    run = make_run(tmp_path, [0.4, 0.5])
    stopped = visible_text(read_report(replace(run, planned=40)))
    assert "stopped 2 of 40 trials. The same command goes on: python -m search.random --dataset shapes" in stopped
    assert "stopped 2 of 2" not in visible_text(read_report(replace(run, planned=2)))


def test_a_result_without_loss_curve_has_a_report(tmp_path: Path) -> None:
    run = make_run(tmp_path, [0.4])
    assert "Training loss" in read_report(replace(run, curves={}))


def write_examples(run: Run) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    label = np.full((12, 16), 2, dtype=np.uint8)
    label[:, :8] = 255
    predictions = {f"prediction_0/{model}": np.ones((12, 16), dtype=np.uint8) for model in ("dpc", "best", "aspp")}
    np.savez(run.directory / "examples.npz", allow_pickle=False, image_0=image, label_0=label, **predictions)


def test_predictions_are_shown_in_order(tmp_path: Path) -> None:
    run = make_run(tmp_path, [0.4], BASELINES)
    write_examples(run)
    page = read_report(run)
    assert re.findall(r'<img src="data:image/jpeg;base64,[^"]+" alt="([^"]+)"', page) == [
        "image",
        "label",
        "best cell",
        "ASPP",
        "Published DPC",
    ]


@pytest.mark.parametrize("content", [b"", b"PK not a zip"])
def test_damaged_examples_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "examples.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"examples\.npz is damaged"):
        write_report(make_run(tmp_path, [0.4]))
    assert not (tmp_path / "report.html").exists()


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, [0.3, 0.4], BASELINES)
    write_examples(run)
    page = read_report(run)
    links: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in ("script", "link", "iframe", "object")
            links.extend(value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset"))

    Links().feed(page)
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not re.search(r"url\((?!#)|@import", page)


def test_names_and_reasons_are_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path, [0.4, None], BASELINES)
    write_examples(run)
    page = read_report(run)
    assert "<b>van" not in page
    assert "<script" not in page
    assert page.count("car &amp; &lt;b&gt;van&lt;/b&gt;") == 2  # the table of classes and the legend


def test_the_report_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, [0.4])
    path = write_report(run)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    before = path.read_text(encoding="utf-8")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(InputError, match=r"cannot write .*report\.html \(No space left on device\)"):
        write_report(make_run(tmp_path, [0.5]))
    assert path.read_text(encoding="utf-8") == before


def test_command_refuses_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run"):
        main(ReportSettings(run=tmp_path))


def test_numbers_in_print() -> None:
    assert [percent(0.5), percent(0.12345, 1)] == ["50.00 %", "12.3 %"]
    assert [quantity(count) for count in (7, 1_000, 80_440, 804_000, 1_234_567, 98_700_000_000)] == [
        "7",
        "1.00 K",
        "80.4 K",
        "804 K",
        "1.23 M",
        "98.7 B",
    ]
