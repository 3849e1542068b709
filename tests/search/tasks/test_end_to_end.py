"""The end-to-end task: one cell is one training of `search.train` in a folder of its own, by any workers."""

import os
import re
import signal
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import search.train
import search.training.loop
from fast.checkpoint import load_network
from reference.cell import Cell
from search.cells.cost import cell_cost
from search.cells.space import load_cell
from search.datasets import camvid
from search.errors import InputError
from search.runs.cluster import Demand
from search.runs.ray_workers import RayWorkers
from search.runs.workers import InProcess, Job, Outcome
from search.settings import TrainingSettings, known
from search.tasks.end_to_end import EndToEndResult, EndToEndTask
from search.train import TrainSettings
from search.training.loop import Training
from search.training.state import read_curve
from tests.search import dataset_folders as made
from tests.search.composed import changed, composed
from tests.search.test_random import BACKBONE, write_camvid
from tests.search.test_train import kill_at_call, killed_while

ITERATIONS = 8
SEED = (0, 0)


def write_backbone(path: Path) -> Path:
    """Random weights with norms that fit them: features depend on the picture, and so do the scores of a short training."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = timm.create_model(BACKBONE).train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the statistics of the next pass alone
        model(torch.randn(8, 3, 64, 64))
        torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TrainingSettings:
    """Settings of a whole training that takes a second."""
    folder = tmp_path_factory.mktemp("tiny")
    return composed(
        TrainingSettings,
        dataset="camvid",
        data_dir=write_camvid(folder / "camvid"),
        val_split="train",
        backbone=BACKBONE,
        weights=write_backbone(folder / "weights.pth"),
        crop_size=(33, 33),
        batch_size=4,
        iterations=ITERATIONS,
        learning_rate=0.5,
        branch_channels=8,
        validate_every=4,
        checkpoint_every=1,
        statistics_batches=1,
        loading_processes=0,
        device="cpu",
    )


def test_a_split_without_labels_is_refused_before_any_training(tiny: TrainingSettings, tmp_path: Path) -> None:
    folder = write_camvid(tmp_path / "camvid")
    for path in (folder / "valannot").iterdir():
        made.write_label(path, np.full((33, 49), camvid.VOID, np.uint8))
    with pytest.raises(InputError, match=r"^no pixel of camvid val has a label to score by: give another `val_split`"):
        EndToEndTask(changed(tiny, data_dir=folder, val_split="val"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def uninterrupted(tiny: TrainingSettings, tmp_path_factory: pytest.TempPathFactory) -> tuple[EndToEndTask, EndToEndResult]:
    task = EndToEndTask(tiny, tmp_path_factory.mktemp("uninterrupted"))
    return task, task.evaluate(load_cell("dpc"), SEED)[0]


def measured(result: EndToEndResult | None) -> EndToEndResult:
    """Without what the machine's mood decides."""
    assert result is not None
    return replace(result, seconds=0.0)


def curve(task: EndToEndTask, cell: Cell) -> bytes:
    return (task.folder(cell, SEED) / "curve.csv").read_bytes()


def test_the_result_is_that_of_the_last_weights(uninterrupted: tuple[EndToEndTask, EndToEndResult]) -> None:
    task, result = uninterrupted
    cell = load_cell("dpc")
    network, description = load_network(task.folder(cell, SEED) / "last.safetensors")
    scores = [row[3] for row in read_curve(task.folder(cell, SEED)) if row[3] is not None]
    assert len(set(scores)) == 2
    assert result.score == scores[-1]
    assert network.head.context.cell == cell
    occurring = [iou for iou in result.scores.details if iou is not None]
    assert len(result.scores.details) == len(description["class_names"])
    assert sum(occurring) / len(occurring) == pytest.approx(result.score, rel=1e-12)  # float64, in another order
    expected = cell_cost(cell, network.backbone.channels, (3, 4), branch_channels=8, cell_channels=8).total  # 33×49 pixels
    assert (result.parameters, result.multiply_adds) == (expected.parameters, expected.multiply_adds)
    assert result.seconds > 0


def test_a_cell_is_scored_as_search_train_scores_it(
    tiny: TrainingSettings, uninterrupted: tuple[EndToEndTask, EndToEndResult], tmp_path: Path
) -> None:
    task, _ = uninterrupted
    seed = load_network(task.folder(load_cell("dpc"), SEED) / "last.safetensors")[1]["source"]["training"]["seed"]
    groups = {name: getattr(tiny, name) for name in ("data", "backbone", "recipe", "machine")} | {"new_head": tiny.head}
    search.train.main(TrainSettings(**groups, cell="dpc", seed=seed, out=tmp_path))
    assert (tmp_path / "curve.csv").read_bytes() == curve(task, load_cell("dpc"))


def test_seed_and_cell_decide_and_progress_is_told(
    tiny: TrainingSettings,
    uninterrupted: tuple[EndToEndTask, EndToEndResult],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task, cell = EndToEndTask(tiny, tmp_path), load_cell("dpc")
    steps: list[int] = []
    state = torch.random.get_rng_state()
    again, network = task.evaluate(cell, SEED, steps.append)
    assert torch.equal(state, torch.random.get_rng_state())
    assert network is None
    assert steps == list(range(1, ITERATIONS + 1))
    assert capsys.readouterr().err == ""  # whoever is told shows it
    assert measured(again) == measured(uninterrupted[1])
    other = [task.folder(cell, (0, 1)), task.folder(load_cell("aspp"), SEED)]
    scores = {again.score, task.evaluate(cell, (0, 1))[0].score, task.evaluate(load_cell("aspp"), SEED)[0].score}
    assert len(scores) == 3
    curves = {curve(task, cell), *((folder / "curve.csv").read_bytes() for folder in other)}
    assert len(curves) == 3


@pytest.mark.parametrize(
    "arm",
    [
        kill_at_call(Training, "_step", 1),
        kill_at_call(Training, "_step", 6),
        kill_at_call(search.training.loop, "save_network", 3),
        kill_at_call(search.training.loop, "save_state", ITERATIONS + 2, after=True),
    ],
    ids=["at_once", "in_the_middle", "at_the_end", "finished_and_not_told"],
)
def test_a_killed_evaluation_goes_on(
    tiny: TrainingSettings, uninterrupted: tuple[EndToEndTask, EndToEndResult], tmp_path: Path, arm: Callable[[], None]
) -> None:
    task, cell = EndToEndTask(tiny, tmp_path), load_cell("dpc")
    killed_while(lambda: task.evaluate(cell, SEED), arm)
    result, _ = task.evaluate(cell, SEED)
    assert measured(result) == measured(uninterrupted[1])
    assert curve(task, cell) == curve(uninterrupted[0], cell)


def test_a_finished_training_gives_its_result_again_without_its_networks(
    tiny: TrainingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, cell = EndToEndTask(tiny, tmp_path), load_cell("dpc")
    result, _ = task.evaluate(cell, SEED)

    def refuse(*_: object) -> None:
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(Training, "_step", refuse)
    monkeypatch.setattr(Training, "_validate", refuse)
    for name in ("last", "best"):
        (task.folder(cell, SEED) / f"{name}.safetensors").unlink()
    assert EndToEndTask(tiny, tmp_path).evaluate(cell, SEED)[0] == result  # the time that it took too


def test_a_training_that_leaves_the_finite_numbers_is_a_failure_of_its_cell(tiny: TrainingSettings, tmp_path: Path) -> None:
    workers = InProcess(EndToEndTask(changed(tiny, learning_rate=1e30), tmp_path), lambda job, iteration: None)
    workers.submit(Job(0, load_cell("dpc"), SEED))
    outcome = workers.wait()
    assert outcome.result is None
    words = r"the loss was (nan|inf) at iteration \d$|after iteration \d the weights .* not finite$"
    assert re.match(words, outcome.failure or "")
    assert not outcome.is_passing


def test_a_full_disk_is_no_failure_of_a_cell(tiny: TrainingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(search.training.loop, "save_state", save)
    workers = InProcess(EndToEndTask(tiny, tmp_path), lambda job, iteration: None)
    workers.submit(Job(0, load_cell("dpc"), SEED))
    with pytest.raises(OSError, match="No space left"):
        workers.wait()


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_saves_and_goes_on(
    tiny: TrainingSettings,
    uninterrupted: tuple[EndToEndTask, EndToEndResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task, cell = EndToEndTask(tiny, tmp_path), load_cell("dpc")
    job = Job(0, cell, SEED)
    stopped = InProcess(task, lambda job, iteration: os.kill(os.getpid(), signal.SIGINT) if iteration == 2 else None)
    stopped.submit(job)
    with pytest.raises(KeyboardInterrupt):
        stopped.wait()
    first: list[int] = []
    workers = InProcess(task, lambda job, iteration: first.append(iteration))
    workers.submit(job)
    assert measured(workers.wait().result) == measured(uninterrupted[1])
    assert first[0] == 4  # the iteration that Ctrl-C finds under way is the last, and kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iterations": 0}, "`iterations` must be at least 1"),
        ({"output_stride": 3}, "`output_stride` must be 4 to 32"),
        ({"dropout": 1.0}, "`dropout` must be at least 0 and below 1"),
        ({"data_dir": Path("nowhere")}, "nowhere"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tiny: TrainingSettings, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        EndToEndTask(changed(tiny, **change), tmp_path)


def test_real_ray_gives_the_same_results_and_says_bad_input_as_it_is(
    tiny: TrainingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="Ray is an extra: pip install -e '.[workers]'")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    jobs = [Job(name, load_cell(name), SEED) for name in ("dpc", "aspp")]
    folders = [tmp_path / name for name in ("alone", "ray")]
    with closing(RayWorkers(lambda: EndToEndTask(tiny, folders[1]), Demand(2))) as workers:
        for job in jobs:
            workers.submit(job)
        outcomes: list[Outcome[EndToEndResult]] = [known(workers.wait()) for _ in jobs]
        bad = Job("psp", load_cell("psp"), SEED)
        broken = EndToEndTask(tiny, folders[1]).folder(bad.cell, bad.seed)
        broken.mkdir()
        (broken / "settings.json").write_text("{")
        workers.submit(bad)
        with pytest.raises(InputError, match=r"settings\.json is damaged") as raised:
            workers.wait()
    assert "Traceback" not in str(raised.value)
    alone = EndToEndTask(tiny, folders[0])
    assert {outcome.job.key: measured(outcome.result) for outcome in outcomes} == {
        job.key: measured(alone.evaluate(job.cell, job.seed)[0]) for job in jobs
    }
