"""The main job from end to end on a tiny CamVid: it finishes, goes on after any end, repeats itself, and reports failures."""

import csv
import html
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import search.folder
import search.pipeline
import search.random
import search.reports.run_files
import search.runs.study
import search.tabulate
import search.tasks.proxy
from fast.checkpoint import load_head
from fast.dense_prediction_cell import DensePredictionCell
from fast.train_step import TrainStep
from reference.cell import Branch, Cell, Conv1x1, PyramidPooling
from reference.mean_iou import mean_iou
from search.backbones import create_backbone
from search.cells.history import History
from search.cells.reach import FeatureMaps
from search.cells.samplers import create_sampler
from search.cells.samplers.paper import PaperSampler
from search.cells.space import SearchSpace, canonical_form, load_cell
from search.cli import uses_of_run
from search.datasets import SPLITS, open_dataset
from search.errors import InputError
from search.pipeline import load_found
from search.random import RandomSettings, completed_for
from search.reports.run import write_report
from search.runs.mirror import Mirror
from search.runs.status import status_lines
from search.runs.store import Store
from search.runs.study import Run, load_run, ranked
from search.settings import (
    BackboneSettings,
    DataSettings,
    HeadSettings,
    LossSettings,
    MachineSettings,
    ProxySettings,
    TrainingPictures,
    known,
)
from search.tabular.table import load_table
from search.tabulate import TabulateSettings
from search.tasks.feature_cache import open_cache
from search.tasks.proxy import NotFiniteError, ProxyResult, ProxyTask
from tests.search.composed import changed, composed

ROOT = Path(__file__).parents[2]
BACKBONE = "test_efficientnet"
KNOWN_CELLS = ("linear", "mlp", "aspp", "psp", "dpc")
OUTPUTS = ("settings.json", "study.db", "cells.csv", "examples.npz", "report.html", "best_cells/rank_01.json")


def write_camvid(folder: Path, size: tuple[int, int] = (33, 49)) -> Path:
    """Five training and four validation pictures in SegNet's layout: each half of a picture has a colour and a class."""
    rng = np.random.default_rng(0)
    for split, count in zip(SPLITS, (5, 4), strict=True):
        for name in (split, f"{split}annot"):
            (folder / name).mkdir(parents=True)
        for i in range(count):
            label = np.repeat(rng.integers(0, 4, 2), (16, size[1] - 16)).astype(np.uint8)[None].repeat(size[0], axis=0)
            image = 60 * label[..., None] + rng.integers(0, 30, (*size, 3), dtype=np.uint8)
            Image.fromarray(image.astype(np.uint8)).save(folder / split / f"{i}.png")
            Image.fromarray(label).save(folder / f"{split}annot" / f"{i}.png")
        lines = [f"/SegNet/{split}/{i}.png /SegNet/{split}annot/{i}.png\n" for i in range(count)]
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> RandomSettings:
    """Settings of a whole search that takes a second."""
    folder = tmp_path_factory.mktemp("tiny")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(timm.create_model(BACKBONE).state_dict(), folder / "weights.pth")
    return composed(
        RandomSettings,
        dataset="camvid",
        data_dir=write_camvid(folder / "camvid"),
        backbone=BACKBONE,
        weights=folder / "weights.pth",
        cache_dir=folder / "cache",
        out=folder / "uninterrupted",
        device="cpu",
        trials=6,
        iterations=8,
        batch_size=4,
        learning_rate=0.5,
        branch_channels=8,
        branches=2,
        lag=1,
        statistics_batches=2,
    )


@pytest.fixture(scope="module")
def uninterrupted(tiny: RandomSettings) -> Run:
    """The whole run, with its real report."""
    search.random.main(changed(tiny, out=tiny.out))
    return load_run(known(tiny.out))


@pytest.fixture
def settings(tiny: RandomSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RandomSettings:
    """The same search in a folder of its own, without a drawn report."""
    monkeypatch.setattr(search.reports.run_files, "write_report", skip_report)
    return changed(tiny, out=tmp_path / "camvid")


def skip_report(run: Run, device: str | None = None) -> Path:
    return run.directory / "report.html"


def run_search(settings: RandomSettings) -> Run:
    search.random.main(settings)
    return load_run(known(settings.out))


def measured(result: ProxyResult | None) -> ProxyResult | None:
    """Without what the machine's mood decides."""
    return result and replace(result, seconds=0.0, peak_memory_bytes=0)


def trials(run: Run) -> list[Any]:
    return [
        (record.number, record.cell, measured(record.result), record.failure, record.duplicate_of) for record in run.trials
    ]


def comparisons(run: Run) -> list[Any]:
    return [replace(record, result=replace(record.result, seconds=0.0, peak_memory_bytes=0)) for record in run.baselines]


def forbid_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(*_: object) -> None:
        raise AssertionError("nothing is left to evaluate")

    monkeypatch.setattr(ProxyTask, "evaluate", evaluate)


def test_a_run_leaves_what_it_is_for(
    tiny: RandomSettings, uninterrupted: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = uninterrupted.directory
    assert all((folder / name).is_file() for name in OUTPUTS)
    assert [record.number for record in uninterrupted.trials] == list(range(known(tiny.trials)))
    assert len({canonical_form(record.cell) for record in uninterrupted.trials}) == tiny.trials
    best = ranked(uninterrupted.trials)
    assert [record.result.score for record in best if record.result] == sorted(
        (record.result.score for record in uninterrupted.trials if record.result), reverse=True
    )
    for rank, record in enumerate(best, start=1):
        assert Cell.load(folder / "best_cells" / f"rank_{rank:02d}.json") == record.cell
    with (folder / "cells.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, record in zip(rows, uninterrupted.trials, strict=True):
        assert record.result is not None
        assert (int(row["trial"]), float(row["mean_iou"])) == (record.number, record.result.score)
        assert (int(row["parameters"]), Cell.from_json(row["cell"])) == (record.result.parameters, record.cell)
    assert [(record.name, record.seed) for record in uninterrupted.baselines] == [
        *((name, 0) for name in KNOWN_CELLS),
        (f"trial {best[0].number}", 0),
    ]
    assert [record.cell for record in uninterrupted.baselines[:-1]] == [load_cell(name) for name in KNOWN_CELLS]

    capsys.readouterr()
    forbid_evaluation(monkeypatch)
    search.random.main(changed(tiny, out=tiny.out))
    table = capsys.readouterr().out
    names = [f"{name} (n=1)" for name in KNOWN_CELLS]
    for line in (f"trial {best[0].number} ", *names, f"trial {best[0].number} again (n=1)"):
        assert line in table
    assert best[0].result is not None
    assert f"{100 * best[0].result.score:.2f}" in table


@pytest.mark.parametrize("name", ["best", *KNOWN_CELLS])
def test_a_saved_head_has_the_recorded_score(tiny: RandomSettings, uninterrupted: Run, name: str) -> None:
    expected = {record.name: record for record in uninterrupted.baselines} | {"best": ranked(uninterrupted.trials)[0]}
    file = uninterrupted.directory / "heads" / f"{name if name == 'best' else name + '_seed0'}.safetensors"
    head, description = load_head(file)
    assert head.context.cell == expected[name].cell
    assert (description["backbone"]["backbone"], description["backbone"]["output_stride"]) == (BACKBONE, 16)
    backbone = create_backbone(tiny.backbone, "camvid", tiny.machine.cache_dir)
    for key, constant in (("mean", backbone.mean), ("std", backbone.std)):  # what its images must be normalised by
        assert description["backbone"][key] == constant.flatten().tolist()

    folders = (tiny.machine.cache_dir / f"camvid-{split}-{BACKBONE}-os16" for split in SPLITS)
    train, val = (open_cache(folder, json.loads((folder / "settings.json").read_text())["identity"]) for folder in folders)
    result = expected[name].result
    assert result is not None
    assert mean_iou(ProxyTask(train, val, tiny.proxy, tiny.head)._totals(head)) == result.score


def test_examples_hold_pictures_labels_and_predictions(uninterrupted: Run) -> None:
    with np.load(uninterrupted.directory / "examples.npz") as examples:
        kinds = ("image", "label", "train_image", "train_label")
        names = {f"{kind}_{i}" for i in range(4) for kind in kinds}
        names |= {f"prediction_{i}/{model}" for i in range(4) for model in ("best", *KNOWN_CELLS)}
        assert set(examples) == names
        assert all(examples[name].shape[:2] == (33, 49) and examples[name].dtype == np.uint8 for name in names)
        trained_on = open_dataset("camvid", "train", uninterrupted.settings.data.data_dir)
        for row, index in ((0, 0), (3, 4)):  # from the first to the last
            assert np.array_equal(examples[f"train_image_{row}"], trained_on[index].image)
            assert np.array_equal(examples[f"train_label_{row}"], trained_on[index].label)


def test_the_report_shows_labels_that_were_trained_on(uninterrupted: Run) -> None:
    page = (uninterrupted.directory / "report.html").read_text(encoding="utf-8")
    predictions, labels = page.split("<h2>Predictions</h2>")[1].split("<h2>Labels</h2>")
    assert predictions.count("<figure>") == 4 * (2 + 1 + len(KNOWN_CELLS))  # image, label, best, known cells
    assert labels.count("<figure>") == 4 * 2


def test_a_report_of_a_version_without_labels_to_train_on_leaves_them_out(uninterrupted: Run, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted.directory, tmp_path / "run")
    path = tmp_path / "run" / "examples.npz"
    with np.load(path) as examples:
        kept = {name: examples[name] for name in examples if not name.startswith("train_")}
    np.savez(path, allow_pickle=False, **kept)
    write_report(load_run(tmp_path / "run"))
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<h2>Predictions</h2>" in page
    assert "<h2>Labels</h2>" not in page


def test_the_same_command_again_keeps_everything(
    settings: RandomSettings, uninterrupted: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_search(settings)
    assert trials(first) == trials(uninterrupted)  # a second process of the same seed: the same cells, scores and curves
    assert comparisons(first) == comparisons(uninterrupted)

    forbid_evaluation(monkeypatch)
    again = run_search(settings)
    assert (again.trials, again.baselines, again.identity) == (first.trials, first.baselines, first.identity)


def test_more_cells_continue_the_search(settings: RandomSettings, uninterrupted: Run) -> None:
    few = run_search(changed(settings, trials=2))
    more = run_search(settings)
    assert len(few.trials) == 2
    assert few.trials == more.trials[:2]
    assert trials(more) == trials(uninterrupted)


def test_more_comparison_seeds_keep_the_first(settings: RandomSettings, uninterrupted: Run) -> None:
    run_search(changed(settings, trials=1))
    run = run_search(changed(settings, trials=1, comparison_seeds=2))
    scores = {(record.name, record.seed): record for record in comparisons(run)}
    assert set(scores) == {(name, seed) for name in (*KNOWN_CELLS, "trial 0") for seed in (0, 1)}
    assert len(run.baselines) == len(scores)
    assert scores["dpc", 0] == comparisons(uninterrupted)[KNOWN_CELLS.index("dpc")]
    assert scores["dpc", 1].result.loss_curve != scores["dpc", 0].result.loss_curve


def test_two_cells_in_turns_have_the_same_scores(settings: RandomSettings, uninterrupted: Run) -> None:
    """Whoever ends first: another cell is asked for only when the sampler has seen what it would have seen alone."""
    run = run_search(changed(settings, cells_per_gpu=2))
    assert trials(run) == trials(uninterrupted)
    assert comparisons(run) == comparisons(uninterrupted)


def test_a_search_with_class_weights_says_which_it_had(
    settings: RandomSettings, uninterrupted: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = changed(settings, trials=2, cache_dir=tmp_path / "cache")  # not that of the others: it will hold counts
    run = run_search(changed(settings, class_weights="balanced"))
    printed = capsys.readouterr()
    weights = run.settings.loss.numbers
    assert weights is not None
    assert f"class weights: sky {weights[0]:g}, building {weights[1]:g}, " in printed.err
    assert "--class-weights balanced" in printed.out  # of the training that may come next
    assert run.identity["class_weights"] == list(weights)
    assert [record.cell for record in run.trials] == [record.cell for record in uninterrupted.trials[:2]]
    for record in run.trials:
        assert run.curve(record)[0] != uninterrupted.curve(record)[0]
    again = run_search(changed(settings, class_weights=weights))
    assert again.trials == run.trials
    with pytest.raises(InputError, match=r"with `class_weights` \[.*\], now it is None"):
        run_search(settings)


def test_a_run_from_before_there_were_class_weights_goes_on(settings: RandomSettings) -> None:
    before = run_search(changed(settings, trials=1))
    path = before.directory / "settings.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    assert (content["identity"].pop("class_weights"), content["settings"].pop("loss")) == (None, {"class_weights": None})
    path.write_text(json.dumps(content))
    assert load_run(before.directory).settings == before.settings
    assert run_search(changed(settings, trials=2)).trials[:1] == before.trials


# Two objectives

TWO = {"sampler": "evolution", "second_objective": "multiply_adds", "compare": ("linear", "dpc")}


def test_a_search_with_two_objectives_leaves_its_front(
    settings: RandomSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it was interrupted or not; cells that are on the front no more are taken away."""
    first = run_search(changed(settings, trials=23, **TWO))  # evolution begins after 20, and the lag
    (first.directory / "front_cells" / "trial_99.json").write_text("[]")
    capsys.readouterr()
    run = run_search(changed(settings, trials=27, **TWO))
    at_once = run_search(changed(settings, trials=27, out=tmp_path / "at once", **TWO))
    assert trials(run) == trials(at_once)
    assert trials(run)[:23] == trials(first)
    assert [record.cell for record in run.trials] == proposed_again(run)

    places = {record.number: (record.score or 0.0, -record.cost("multiply_adds")) for record in ranked(run.trials)}
    front = [number for number, place in places.items() if not any(dominates(other, place) for other in places.values())]
    printed = capsys.readouterr().out
    for folder in (run.directory, at_once.directory):
        with (folder / "front.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert sorted(int(row["trial"]) for row in rows) == sorted(front)
        costs = [int(row["multiply_adds"]) for row in rows]
        assert costs == sorted(costs)
        cells = {int(row["trial"]): Cell.from_json(row["cell"]) for row in rows}
        assert cells == {record.number: record.cell for record in run.trials if record.number in front}
        assert {path.name for path in (folder / "front_cells").iterdir()} == {f"trial_{number}.json" for number in front}
        assert all(Cell.load(folder / "front_cells" / f"trial_{number}.json") == cell for number, cell in cells.items())
    for number in front:
        assert f"\ntrial {number} " in printed
    assert f"\nPareto front of mIOU and multiply-adds: {len(front)} cells, " in printed
    assert f" beaten by known cells in both; {run.directory / 'front.csv'}" in printed  # linear costs nothing
    assert f"next: python -m search.rerank --run {run.directory} --seeds 3\n" in printed
    best_first = [number for number in places if number in front]
    assert [record.number for record in load_found(run.directory).front] == best_first
    named = ", ".join(map(str, best_first[:10])) + (f" and {len(front) - 10} more" if len(front) > 10 else "")
    assert f"Pareto front of score and multiply-adds: trials {named}" in list(status_lines(run.directory, None))


def proposed_again(run: Run) -> list[Cell]:
    """What the sampler proposes if it is told both values of all trials that it may look back at."""
    sampler, history = create_sampler("evolution", run.space, 0, lag=1), History()
    cells = []
    for number, record in enumerate(run.trials):
        for told in run.trials[max(0, number - 2) : max(0, number - 1)]:
            history.finish(told.number, told.score or 0.0, others=(-told.cost("multiply_adds"),))
        cells.append(sampler.propose(number, history))
        history.propose(number, record.cell_json, record.form)
    return cells


def dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] >= other[0] and one[1] >= other[1]


def test_latency_is_measured_of_every_cell_if_it_is_an_objective(
    settings: RandomSettings, uninterrupted: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def of_kinds(context: DensePredictionCell, feature_size: tuple[int, int], device: torch.device) -> float:
        assert (feature_size, device) == ((3, 4), torch.device("cpu"))
        return 1 + sum(isinstance(branch.operation, PyramidPooling) for branch in context.cell.branches)

    monkeypatch.setattr(search.tasks.proxy, "relative_latency", of_kinds)
    run = run_search(changed(settings, sampler="tpe", second_objective="latency"))
    measured = [(record.cell, known(record.result).latency) for record in run.trials]
    for cell, latency in measured + [(record.cell, record.result.latency) for record in run.baselines]:
        assert latency == 1 + sum(isinstance(branch.operation, PyramidPooling) for branch in cell.branches)
    with (run.directory / "cells.csv").open(newline="") as file:
        assert [float(row["latency"]) for row in csv.DictReader(file)] == [record.cost("latency") for record in run.trials]
    assert re.search(r"params multiply-adds latency seconds .*\ntrial .* [123]\.00×", capsys.readouterr().out)
    assert {known(record.result).latency for record in uninterrupted.trials} == {None}  # otherwise it is not
    with pytest.raises(InputError, match=r"with `second_objective` latency, now it is multiply_adds: .*another `out`"):
        search.random.main(changed(settings, sampler="tpe", second_objective="multiply_adds"))


def test_a_run_from_before_there_were_two_objectives_goes_on(settings: RandomSettings) -> None:
    before = run_search(changed(settings, trials=1))
    path = before.directory / "settings.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["identity"].pop("second_objective") == "none"
    path.write_text(json.dumps(content))
    assert run_search(changed(settings, trials=2)).trials[:1] == before.trials
    with pytest.raises(InputError, match=r"`second_objective` none, now it is multiply_adds: .*another `out`"):
        run_search(changed(settings, **TWO))


@pytest.mark.parametrize("sampler", ["paper", "local", "predictor"])
def test_samplers_of_one_objective_say_so(settings: RandomSettings, sampler: str) -> None:
    sentence = f"`sampler` {sampler} looks at the score alone: with `second_objective` latency give `sampler` evolution, tpe"
    with pytest.raises(InputError, match=sentence):
        search.random.main(changed(settings, sampler=sampler, second_objective="latency"))
    assert not known(settings.out).exists()


def test_two_objectives_are_not_cut_short(settings: RandomSettings) -> None:
    sentence = "`early_stopping` asha .* cannot be had with `second_objective` multiply_adds: leave out one of the two"
    with pytest.raises(InputError, match=sentence):
        search.random.main(changed(settings, early_stopping="asha", rungs=(2, 4), **TWO))


def test_another_seed_is_another_search(settings: RandomSettings, uninterrupted: Run) -> None:
    other = run_search(changed(settings, trials=2, seed=1))
    assert {record.cell for record in other.trials}.isdisjoint(record.cell for record in uninterrupted.trials)


# Ends without warning. Each child dies by SIGKILL at the n-th call of a function, and the same command goes on from there.

DEATHS: dict[str, tuple[object, str, int]] = {
    "before a cache is begun": (search.folder, "write_json", 1),
    "before the first features of a cache are counted": (search.folder, "write_json", 2),
    "before a comparison is told": (Store, "tell", 2),
    "in the middle of a training": (TrainStep, "draw", 4 * 10 + 3),  # 10 batches each: the fifth job
    "before a head is written": (search.runs.study, "write_whole", 3),
    "after the result, before the trial is finished": (Store, "_finish", 7),
    "before trials are shown": (Mirror, "update", 2),
    "in the last comparison": (ProxyTask, "evaluate", 2 + 6 + 1),
    "before the report": (search.reports.run_files, "finish_run", 1),
}


def die_at(owner: Any, name: str, call: int) -> None:
    original, calls = getattr(owner, name), 0

    def counting(*args: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **keywords)

    setattr(owner, name, counting)


def search_until_death(settings: RandomSettings, death: str) -> None:
    torch.set_num_threads(1)
    vars(search.reports.run_files)["write_report"] = skip_report
    die_at(*DEATHS[death])
    search.random.main(settings)


def kill(settings: RandomSettings, death: str) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    child = context.Process(target=search_until_death, args=(settings, death))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a server of children that have everything imported needs fork")
@pytest.mark.parametrize("death", tuple(DEATHS))
def test_a_killed_search_goes_on_as_if_nothing_had_happened(
    settings: RandomSettings, uninterrupted: Run, death: str, tmp_path: Path
) -> None:
    if "cache" in death:
        settings = changed(settings, cache_dir=tmp_path / "cache")
    kill(settings, death)
    run = run_search(settings)
    assert trials(run) == trials(uninterrupted)
    assert comparisons(run) == comparisons(uninterrupted)
    for name in ("best", "aspp_seed0", "dpc_seed0"):
        file = f"heads/{name}.safetensors"
        (head, description), (expected, expected_description) = (load_head(r.directory / file) for r in (run, uninterrupted))
        assert description == expected_description
        torch.testing.assert_close(head.state_dict(), expected.state_dict(), rtol=0, atol=0)


# Early stopping

CUT_SHORT = {"early_stopping": "asha", "rungs": (2, 4), "reduction_factor": 2}


@pytest.fixture(scope="module")
def cut_short(tiny: RandomSettings) -> Run:
    """The run that is cut short, with its real report."""
    search.random.main(changed(tiny, out=known(tiny.out).with_name("cut_short"), **CUT_SHORT))
    return load_run(known(tiny.out).with_name("cut_short"))


def test_a_cell_that_goes_on_ends_at_the_bits_of_a_training_in_one_go(settings: RandomSettings, tmp_path: Path) -> None:
    whole = run_search(changed(settings, sampler="random"))
    cut = run_search(changed(settings, sampler="random", out=tmp_path / "cut", **CUT_SHORT))
    in_full = {record.number: record for record in cut.trials if record.rung == 2}
    assert 0 < len(in_full) < len(cut.trials)
    for record in whole.trials:
        other = in_full.get(record.number)
        if other is not None:
            assert (other.cell, measured(other.result)) == (record.cell, measured(record.result))
            assert cut.curve(other) == whole.curve(record)
        else:
            assert cut.curve(cut.trials[record.number]) == whole.curve(record)[: cut.rungs[cut.trials[record.number].rung]]
    best = ranked(cut.trials)[0]
    assert best.number == max(in_full, key=lambda number: known(in_full[number].score))
    head, _ = load_head(cut.directory / "heads/best.safetensors")
    assert head.context.cell == best.cell
    assert comparisons(cut)[: len(KNOWN_CELLS)] == comparisons(whole)[: len(KNOWN_CELLS)]


def test_a_run_that_is_cut_short_says_how_far_each_cell_got(cut_short: Run) -> None:
    assert cut_short.rungs == (2, 4, 8)
    assert set(cut_short.rung_scores) == set(range(6))
    for record in cut_short.trials:
        scores = cut_short.rung_scores[record.number]
        assert (len(scores), scores[-1]) == (record.rung + 1, record.score)
        assert cut_short.curve(record)[-1][0] == cut_short.rungs[record.rung]
    assert cut_short.baselines[-1].name == f"trial {ranked(cut_short.trials)[0].number}"


def test_the_same_command_again_trains_nothing(
    settings: RandomSettings, cut_short: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_search(changed(settings, **CUT_SHORT))
    assert trials(first) == trials(cut_short)
    forbid_evaluation(monkeypatch)
    monkeypatch.setattr(ProxyTask, "evaluation", lambda *arguments: pytest.fail("a cell was trained"))
    assert trials(run_search(changed(settings, **CUT_SHORT))) == trials(cut_short)


def test_its_status_says_how_many_cells_got_how_far(cut_short: Run) -> None:
    trials_line, rungs, best, _ = status_lines(cut_short.directory, None)
    counts = [sum(len(scores) > rung for scores in cut_short.rung_scores.values()) for rung in range(3)]
    first = ranked(cut_short.trials)[0]
    assert "6 of 6 trials are finished" in trials_line
    assert rungs == f"trials with a score: {counts[0]} after 2, {counts[1]} after 4, {counts[2]} after 8 iterations"
    assert best == f"best: trial {first.number}, mIOU {100 * known(first.score):.2f} % after 8 iterations"


def test_cells_in_turns_go_on_likewise(settings: RandomSettings, cut_short: Run) -> None:
    run = run_search(changed(settings, cells_per_gpu=2, **CUT_SHORT))
    assert (trials(run), run.rung_scores) == (trials(cut_short), cut_short.rung_scores)


@pytest.mark.parametrize(("field", "value", "before"), [("reduction_factor", 4, 2), ("early_stopping", "pasha", "asha")])
def test_another_early_stopping_is_another_run(
    tiny: RandomSettings, cut_short: Run, field: str, value: Any, before: Any
) -> None:
    with pytest.raises(InputError, match=f"with `{field}` {before}, now it is {value}: .*another `out`"):
        search.random.main(changed(tiny, out=cut_short.directory, **(CUT_SHORT | {field: value})))


def test_searches_of_all_cells_become_a_table(settings: RandomSettings, tmp_path: Path) -> None:
    changes = CUT_SHORT | {
        "reduction_factor": 1,
        "branches": 1,
        "rates": (1,),
        "grids": (1,),
        "sampler": "random",
        "trials": 3,
    }
    runs = [run_search(changed(settings, **changes, seed=seed, out=tmp_path / f"seed_{seed}")) for seed in (0, 1)]
    search.tabulate.main(TabulateSettings(runs=tuple(run.directory for run in runs), out=tmp_path / "made"))
    table = load_table(str(tmp_path / "made" / "cells.json"))
    assert (len(table.cells), table.num_seeds, table.iterations) == (3, 2, (2, 4, 8))
    for seed, run in enumerate(runs):
        for record in run.trials:
            found = table.cells[table.place_of(record.cell)]
            assert found.scores[seed] == pytest.approx(run.rung_scores[record.number], abs=1e-6)
            assert record.result is not None
            assert found.seconds[seed] == pytest.approx(record.result.seconds, abs=0.01)
            assert (found.parameters, found.multiply_adds) == (record.result.parameters, record.result.multiply_adds)


def test_with_a_reduction_factor_of_1_all_cells_go_on(settings: RandomSettings) -> None:
    run = run_search(changed(settings, **(CUT_SHORT | {"reduction_factor": 1})))
    assert {record.rung for record in run.trials} == {2}
    assert {len(scores) for scores in run.rung_scores.values()} == {3}
    with (run.directory / "rungs.csv").open(encoding="utf-8", newline="") as file:
        rows = {int(row["trial"]): row for row in csv.DictReader(file)}
    assert {number: tuple(float(row[name]) for name in ("2", "4", "8")) for number, row in rows.items()} == run.rung_scores
    assert [Cell.from_json(rows[record.number]["cell"]) for record in run.trials] == [record.cell for record in run.trials]


def test_a_cell_that_is_not_trained_in_full_has_no_score_there(cut_short: Run) -> None:
    with (cut_short.directory / "rungs.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            reached = len(cut_short.rung_scores[int(row["trial"])])
            assert [bool(row[name]) for name in ("2", "4", "8")] == [place < reached for place in range(3)]


STRETCH_DEATHS: dict[str, tuple[object, str, int]] = {
    "after a trial went on": (Store, "_with_stretch", 5 + 4),
    "in the middle of a stretch": (TrainStep, "__call__", 5 * 8 + 11),
    "before a state is kept": (Store, "_keep_state", 5 + 6),
}
DEATHS |= STRETCH_DEATHS


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a server of children that have everything imported needs fork")
@pytest.mark.parametrize("death", STRETCH_DEATHS)
def test_a_killed_search_that_is_cut_short_goes_on_as_if_nothing_had_happened(
    settings: RandomSettings, cut_short: Run, death: str
) -> None:
    settings = changed(settings, **CUT_SHORT)
    kill(settings, death)
    run = run_search(settings)
    assert (trials(run), run.rung_scores) == (trials(cut_short), cut_short.rung_scores)
    assert comparisons(run) == comparisons(cut_short)


def test_ctrl_c_reports_what_is_there_and_goes_on(
    settings: RandomSettings,
    uninterrupted: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ProxyTask, "evaluate", interrupted_at((0, 0, 3), KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            search.random.main(settings)
    assert "best cell:" in capsys.readouterr().out
    assert (known(settings.out) / "best_cells" / "rank_03.json").is_file()
    assert trials(load_run(known(settings.out))) == trials(uninterrupted)[:3]
    assert trials(run_search(settings)) == trials(uninterrupted)


def interrupted_at(seed: tuple[int, ...], error: BaseException) -> Callable[..., Any]:
    original = ProxyTask.evaluate

    def evaluate(self: ProxyTask, cell: Cell, job_seed: Sequence[int], on_step: Any) -> Any:
        if job_seed == seed:
            raise error
        return original(self, cell, job_seed, on_step)

    return evaluate


# Trials without a score


def test_a_failed_trial_has_its_reason_and_the_search_goes_on(
    settings: RandomSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = NotFiniteError("the loss was nan at iteration 2")
    with monkeypatch.context() as patch:
        patch.setattr(ProxyTask, "evaluate", interrupted_at((0, 0, 1), error))
        run = run_search(settings)
    assert [record.number for record in run.trials] == list(range(known(settings.trials)))
    assert {record.number: record.failure for record in run.trials if record.failure} == {1: str(error)}
    assert run.trials[1].result is None
    assert f"trial 1 failed: {error}" in capsys.readouterr().err
    assert str(error) in (run.directory / "cells.csv").read_text()

    forbid_evaluation(monkeypatch)  # a failure is final: it would fail again
    assert run_search(settings).trials == run.trials


def test_a_learning_rate_that_ruins_every_cell_still_ends_in_order(
    settings: RandomSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    ruinous = changed(settings, learning_rate=1e30, trials=2)
    with pytest.raises(SystemExit) as exit:
        search.random.main(ruinous)
    assert exit.value.code == 1
    run = load_run(known(ruinous.out))
    assert [record.result for record in run.trials] == [None, None]
    assert all("not finite" in str(record.failure) or "the loss was" in str(record.failure) for record in run.trials)
    assert run.baselines == []
    assert "no cell has a score yet (2 failed)" in capsys.readouterr().err
    with np.load(run.directory / "examples.npz") as examples:  # wrong labels may be why
        assert "train_label_3" in examples


def test_an_equal_graph_is_not_evaluated_twice(settings: RandomSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = PyramidPooling(grid_size=(1, 1))
    cells = [Cell(tuple(Branch(-1, op) for op in order)) for order in ((Conv1x1(), pool), (pool, Conv1x1()))]
    monkeypatch.setattr(PaperSampler, "propose", lambda self, number, history: cells[number % 2])
    evaluated = []
    original = ProxyTask.evaluate

    def evaluate(self: ProxyTask, cell: Cell, *rest: Any) -> Any:
        evaluated.append(cell)
        return original(self, cell, *rest)

    monkeypatch.setattr(ProxyTask, "evaluate", evaluate)
    run = run_search(changed(settings, trials=4))
    assert evaluated.count(cells[0]) == 2  # as trial 0, and as the best once more
    assert evaluated.count(cells[1]) == 0
    assert [record.duplicate_of for record in run.trials] == [None, 0, 0, 0]
    assert [record.cell for record in run.trials] == [cells[i % 2] for i in range(4)]
    assert len({record.result for record in run.trials}) == 1
    assert len(ranked(run.trials)) == 1
    assert len(list((run.directory / "best_cells").iterdir())) == 1


def test_cells_that_do_the_same_on_the_map_are_evaluated_once(
    settings: RandomSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The map has 3×4 features: rates 3 and 4 differ in width alone, rates 4 and 6 in nothing."""
    evaluated, original = [], ProxyTask.evaluate

    def evaluate(self: ProxyTask, cell: Cell, *rest: Any) -> Any:
        evaluated.append(cell)
        return original(self, cell, *rest)

    monkeypatch.setattr(ProxyTask, "evaluate", evaluate)
    run = run_search(changed(settings, rates=(4, 6), grids=(), branches=1, trials=5, compare=()))
    said = "5 cells, 2 of them different on a 3×4 map; out of reach on the 3×4 map: rate 4, rate 6 (height and width)"
    assert f"search space: {said}\n" in capsys.readouterr().err
    assert len(evaluated) == 2 + 1  # and the best once more
    assert [record.duplicate_of is None for record in run.trials] == [True, True, False, False, False]
    assert {str(record.cell) for record in run.trials} <= {str(cell) for cell in all_of(run.space)}  # as they were drawn
    assert len({record.result for record in run.trials}) == 2
    assert run.space == SearchSpace(1, (4, 6), (), FeatureMaps((3, 4), (3, 4)))


def all_of(space: SearchSpace) -> list[Cell]:
    return [Cell((Branch(-1, operation),)) for operation in space.operations]


def test_a_run_that_was_begun_before_spaces_were_written_down_goes_on(
    settings: RandomSettings, uninterrupted: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_search(changed(settings, trials=2))
    path = run.directory / "settings.json"
    content = json.loads(path.read_text())
    content["identity"] = {name: value for name, value in content["identity"].items() if name not in ("rates", "grids")}
    del content["space"]
    path.write_text(json.dumps(content))
    assert load_run(run.directory).space == run.space
    with pytest.raises(InputError, match=r"was started with `rates` \[1, 3, 6, 9, 12, 15, 18, 21\], now it is \[1, 2\]: use"):
        search.random.main(changed(settings, rates=(1, 2)))
    assert trials(run_search(settings)) == trials(uninterrupted)


def test_a_crop_is_a_map_of_its_own(settings: RandomSettings) -> None:
    run = run_search(changed(settings, crop_size=(17, 33), pooling="grid_cells", trials=1, compare=()))
    assert run.space.maps == FeatureMaps(validation=(3, 4), training=(2, 3), pooling="grid_cells")


# The winner in the user's hands


def test_the_printed_lines_load_the_best_head_behind_its_backbone(
    tiny: RandomSettings, uninterrupted: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command again prints them too; they run as they are, in another process, and say what the page says."""
    assert len(uninterrupted.trials) > 0
    search.random.main(tiny)
    said = capsys.readouterr().out
    lines = said.partition("in Python:\n\n")[2].partition("\n\nnext: ")[0]
    assert len(lines.splitlines()) == 6
    assert f"<pre>{lines}</pre>" in html.unescape((uninterrupted.directory / "report.html").read_text(encoding="utf-8"))
    check = f"{lines}\nprint(tuple(outputs.shape), network.head.context.cell)"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    best = ranked(uninterrupted.trials)[0].cell
    height, width = uninterrupted.identity["image_size"]
    assert done.stdout == f"(1, 11, {(height - 1) // 16 + 1}, {(width - 1) // 16 + 1}) {best}\n"


def test_the_printed_trainings_have_the_optimiser_of_the_search(tmp_path: Path) -> None:
    groups = DataSettings(), BackboneSettings(), HeadSettings(), LossSettings(), MachineSettings()
    best = tmp_path / "heads" / "best.safetensors"
    _, *plain = uses_of_run(best, *groups, ProxySettings())
    assert not any("--optimizer" in command for command in plain)
    _, *others = uses_of_run(best, *groups, ProxySettings(optimizer="adamw", schedule="cosine", learning_rate=0.01))
    assert all(command.endswith("--optimizer adamw --schedule cosine") for command in others)
    assert len(others) == 2


# Refusals; those that features and search have in common are in test_cli.py


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("iterations", 0, "`iterations` must be at least 1"),
        ("statistics_batches", 0, "`statistics_batches` must be at least 1"),
        ("comparison_seeds", 0, "`comparison_seeds` must be at least 1"),
        ("cells_per_gpu", 0, "`cells_per_gpu` must be at least 1"),
        ("lag", -1, "`lag` must be at least 0"),
        ("rates", (3, 1), "`rates` must be different integers of at least 1, in ascending order, got 3 1"),
        ("rates", (0,), "`rates` must be different integers of at least 1, in ascending order, got 0"),
        ("grids", (2, 2), "`grids` must be different integers of at least 1, in ascending order, got 2 2"),
        ("early_stopping", "hyperband", "`early_stopping` must be none or halving or asha or pasha, got hyperband"),
        ("second_objective", "size", "`second_objective` must be none or multiply_adds or latency, got size"),
        ("reduction_factor", 0, "`reduction_factor` must be at least 1"),
        ("rungs", (2, 4), "`rungs` is for `early_stopping`: give asha, pasha or halving"),
        ("reduction_factor", 2, "`reduction_factor` is for `early_stopping`: give asha, pasha or halving"),
        ("rungs", (4, 2), "`rungs` must be different integers of at least 1, in ascending order, got 4 2"),
        ("rungs", (), "`rungs` must be different integers of at least 1, in ascending order, got none"),
        ("sampler", "grid", "`sampler` grid is unknown"),
        ("weight_decay", -1.0, "`weight_decay` must be at least 0"),
        ("optimizer", "adam", "`optimizer` must be sgd or adamw, got adam"),
        ("schedule", "linear", "`schedule` must be poly or cosine, got linear"),
        ("warmup_iterations", -1, "`warmup_iterations` must be at least 0"),
        ("learning_rate", 0.0, "`learning_rate` must be above 0"),
        ("learning_rate", float("nan"), "`learning_rate` must be above 0"),
        ("dropout", 1.0, "`dropout` must be at least 0 and below 1"),
        ("class_weights", (0.0,), "`class_weights` must be finite numbers of at least 0, not all of them 0, got 0"),
        ("class_weights", (1.0, 2.0), "`class_weights` must be 11 numbers"),
        ("seed", -1, "`seed` must be 0 or more"),
        ("image_size", (17, 49), "is 33×49, larger than 17×49: give a larger `image_size`"),
        ("image_size", (0, 0), r"`image_size` 0 0 must be 16·k \+ 1"),
        ("image_size", (-15, 49), r"`image_size` -15 49 must be 16·k \+ 1"),
        ("weights", None, "random weights: give `weights`, or `pretrained`"),
        ("storage", "not a database", "the study not a database cannot be used .*`storage`"),
        ("storage", "nosuchdatabase://host/name", "`storage`"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(
    settings: RandomSettings, tmp_path: Path, field: str, value: Any, sentence: str
) -> None:
    cache = {"cache_dir": tmp_path / "cache"} if field == "image_size" else {}
    with pytest.raises(InputError, match=sentence) as caught:
        search.random.main(changed(settings, **{"out": tmp_path / "refused", field: value} | cache))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("refused/*.csv"))
    assert not list(tmp_path.rglob("*.partial*"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, "`iterations` 8 are too few for `early_stopping` .* 4: give 80 or more, or `rungs`, such as 4"),
        ({"rungs": (2, 8)}, "`rungs` must be iterations in ascending order, below the 8 of a whole training, got 2 8"),
    ],
    ids=["none fits", "too long"],
)
def test_rungs_that_do_not_fit_the_iterations_are_refused(
    settings: RandomSettings, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        search.random.main(changed(settings, out=tmp_path / "refused", early_stopping="asha", **change))
    assert not (tmp_path / "refused").exists()


def test_rungs_follow_the_iterations(settings: RandomSettings) -> None:
    cache = {"pictures": TrainingPictures("camvid", 367, (360, 480))}
    completed = completed_for(Mock(**cache), changed(settings, iterations=1000, early_stopping="asha"))
    assert (completed.rungs, known(completed.halving(1000)).rungs) == ((62, 250), (62, 250, 1000))
    assert completed_for(Mock(**cache), changed(settings, iterations=1000)).rungs is None


def test_a_warmup_as_long_as_a_training_by_default_is_refused(tiny: RandomSettings, tmp_path: Path) -> None:
    """How long that is follows from the number of pictures."""
    settings = changed(tiny, iterations=None, warmup_iterations=30_000, out=tmp_path / "refused")
    with pytest.raises(InputError, match=r"`warmup_iterations` 30000 leaves none of `iterations` \d+"):
        search.random.main(settings)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("field", "value", "before"),
    [
        ("iterations", 9, 8),
        ("learning_rate", 0.2, 0.5),
        ("seed", 1, 0),
        ("branches", 3, 2),
        ("sampler", "tpe", "paper"),
    ],
)
def test_a_run_with_other_settings_is_refused(
    tiny: RandomSettings, uninterrupted: Run, field: str, value: Any, before: Any
) -> None:
    files = {path: path.read_bytes() for path in uninterrupted.directory.iterdir() if path.is_file()}
    with pytest.raises(InputError, match=f"with `{field}` {before}, now it is {value}: .*another `out`"):
        search.random.main(changed(tiny, out=tiny.out, **{field: value}))
    assert files == {path: path.read_bytes() for path in files}


def test_features_of_other_weights_lie_beside_and_their_run_is_another(
    settings: RandomSettings, uninterrupted: Run, tmp_path: Path
) -> None:
    state = timm.create_model(BACKBONE).state_dict()
    state["conv_stem.weight"] *= 2
    torch.save(state, tmp_path / "other.pth")
    cache_dir = tmp_path / "cache"
    shutil.copytree(settings.machine.cache_dir, cache_dir)
    before = {path: path.read_bytes() for path in cache_dir.rglob("*.*")}
    other = changed(settings, weights=tmp_path / "other.pth", cache_dir=cache_dir)
    with pytest.raises(InputError, match=r"run .* was started with `weights` \(content\) \w+…, now it is \w+…: "):
        search.random.main(changed(other, out=uninterrupted.directory))
    assert len(list(cache_dir.glob(f"camvid-train-{BACKBONE}-os16*"))) == 2
    assert before == {path: path.read_bytes() for path in before}
    search.random.main(changed(other, out=tmp_path / "other", trials=1))
    assert len(list(cache_dir.iterdir())) == 4  # two of each split, not three


def test_a_moved_folder_is_a_run_still(uninterrupted: Run, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / uninterrupted.directory.name
    moved.parent.mkdir()
    os.rename(uninterrupted.directory, moved)
    try:
        run = load_run(moved)
        assert (run.trials, run.baselines) == (uninterrupted.trials, uninterrupted.baselines)
    finally:
        os.rename(moved, uninterrupted.directory)


def test_settings_of_a_run_can_be_read(uninterrupted: Run, tiny: RandomSettings) -> None:
    described = json.loads((uninterrupted.directory / "settings.json").read_text())
    assert described["identity"]["iterations"] == tiny.proxy.iterations
    assert described["command"].startswith("python -m search.random")
    assert len(described["class_names"]) == len(described["palette"]) == 11


def test_defaults_of_a_search_follow_its_pictures(uninterrupted: Run, tiny: RandomSettings) -> None:
    folder = known(tiny.machine.cache_dir) / f"camvid-train-{BACKBONE}-os16"
    features = open_cache(folder, json.loads((folder / "settings.json").read_text())["identity"])

    def numbers(**given: Any) -> tuple[object, ...]:
        settings = completed_for(features, composed(RandomSettings, **given))
        return settings.trials, settings.proxy.iterations, settings.proxy.learning_rate, settings.head.branch_channels

    assert numbers() == (12, 80, 0.2, 64)  # the generated scenes
    assert numbers(dataset="cityscapes") == (100, 30_000, 0.01, 256)
    assert numbers(dataset="camvid") == (100, 200, 0.1, 256)  # 81 passes over five pictures would be 50
    assert numbers(dataset="camvid", iterations=7, trials=3, branch_channels=9, learning_rate=0.5) == (3, 7, 0.5, 9)
    assert TrainingPictures("mine.toml", 367, (1, 1)).steps(30_000, 8, batch=8, least=200) == 3700
