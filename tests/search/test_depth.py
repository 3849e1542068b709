"""Every command with a second task: a tiny folder of depth maps goes from search to evaluation."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import search.evaluate
import search.export
import search.fidelity
import search.random
import search.rerank
import search.train
from fast.checkpoint import load_head, load_network, save_network
from search.datasets import open_dataset
from search.dense_tasks import restored_task
from search.errors import InputError
from search.evaluate import EvaluateSettings
from search.export import ExportSettings
from search.fidelity import FidelitySettings
from search.random import RandomSettings
from search.rerank import RerankSettings
from search.runs.study import Run, load_run
from search.train import TrainSettings
from tests.search.composed import composed
from tests.search.test_random import write_camvid

BACKBONE = "test_efficientnet"
DESCRIPTION = """
depth_scale = 256
images = "{split}/{name}.jpg"
labels = "{split}/{name}.png"

[splits.train]
[splits.val]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that are bright where they are near, in two halves; with weights of a backbone."""
    folder, rng = tmp_path_factory.mktemp("depths"), np.random.default_rng(0)
    for split in ("train", "val"):
        (folder / split).mkdir()
        for i in range(5):
            depth = np.repeat(rng.uniform(1, 8, 2), (20, 29))[None].repeat(33, axis=0)
            grey = 255 / depth[..., None] + rng.integers(-3, 4, (33, 49, 3))
            Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(folder / split / f"{i}.jpg")
            depth[rng.random(depth.shape) < 0.1] = 0  # holes
            Image.fromarray(np.rint(256 * depth).astype(np.uint16)).save(folder / split / f"{i}.png")
    (folder / "rooms.toml").write_text(DESCRIPTION)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(timm.create_model(BACKBONE).state_dict(), folder / "weights.pth")
    return folder


def data(folder: Path) -> dict[str, object]:
    return {
        "dataset": str(folder / "rooms.toml"),
        "backbone": BACKBONE,
        "weights": folder / "weights.pth",
        "cache_dir": folder / "cache",
        "device": "cpu",
    }


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    settings = composed(
        RandomSettings,
        **data(folder),
        out=folder / "run",
        trials=3,
        iterations=12,
        batch_size=4,
        branch_channels=8,
        branches=2,
        statistics_batches=2,
    )
    search.random.main(settings)
    return load_run(folder / "run")


@pytest.fixture(scope="module")
def network(folder: Path) -> Path:
    settings = composed(
        TrainSettings,
        **data(folder),
        cell="aspp",
        out=folder / "training",
        branch_channels=8,
        crop_size=(33, 33),
        batch_size=4,
        iterations=6,
        validate_every=3,
        hard_example_mining=0.5,
        statistics_batches=1,
        loading_processes=0,
    )
    search.train.main(settings)
    return folder / "training" / "best.safetensors"


def test_a_search_scores_by_the_tasks_own_measures(run: Run) -> None:
    assert (run.task.name, run.task.describe()) == ("depth", {"depth_scale": 256.0})
    with (run.directory / "cells.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, record in zip(rows, run.trials, strict=True):
        assert record.result is not None
        assert (float(row["delta_1"]), float(row["rmse"])) == (record.result.score, record.result.scores.details[0])
    losses = [run.curve(record) for record in run.trials if record.result]
    assert all(curve[-1][1] < curve[0][1] for curve in losses)


def test_a_head_predicts_one_number_a_pixel_and_its_file_says_which(run: Run) -> None:
    head, description = load_head(run.directory / "heads" / "best.safetensors")
    assert head.classifier.out_channels == 1
    assert restored_task(description).name == "depth"


def test_the_report_shows_depths_and_their_measures(run: Run) -> None:
    page = (run.directory / "report.html").read_text(encoding="utf-8")
    for text in ("δ&lt;1.25", "RMSE, m", "AbsRel", "not measured", "best cell", "ASPP"):
        assert text in page
    for text in ("mIOU", "IoU", "class"):  # no word of another task, but in style sheets
        assert text not in page.split("<body")[1].replace('class="', "")


def test_examples_keep_metres(run: Run, folder: Path) -> None:
    with np.load(run.directory / "examples.npz") as arrays:
        np.testing.assert_array_equal(arrays["label_0"], open_dataset(str(folder / "rooms.toml"), "val", None)[0].label)
        predicted = arrays["prediction_0/best"]
    assert predicted.dtype == np.float32
    assert (predicted > 0).all()


def test_a_reranking_and_a_comparison_of_protocols_name_the_measure(run: Run, folder: Path, tmp_path: Path) -> None:
    recipe = {"crop_size": (33, 33), "iterations": 2, "batch_size": 2, "statistics_batches": 1, "loading_processes": 0}
    settings = composed(
        RerankSettings, run=run.directory, top=1, compare=("aspp",), out=tmp_path / "r", device="cpu", **recipe
    )
    search.rerank.main(settings)
    header = (tmp_path / "r" / "ranks.csv").read_text().splitlines()[0].split(",")
    assert {"proxy_delta_1", "final_delta_1", "final_rmse"} <= set(header)
    fidelity = composed(
        FidelitySettings,
        **data(folder),
        protocols=("proxy", "end_to_end"),
        seeds=1,
        iterations=1,
        branch_channels=4,
        batch_size=2,
        statistics_batches=1,
        out=tmp_path / "f",
    )
    few = dict(list(search.fidelity.fidelity_cells().items())[:3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search.fidelity, "fidelity_cells", lambda: few)
        small = {"iterations": 1, "batch_size": 2, "statistics_batches": 1, "loading_processes": 0, "crop_size": (33, 33)}
        search.fidelity.main(replace(fidelity, end_to_end=replace(fidelity.end_to_end, **small)))  # type: ignore[arg-type]
    assert "delta_1" in (tmp_path / "f" / "scores.csv").read_text().splitlines()[0]
    assert "δ<1.25 in percent" in (tmp_path / "f" / "report.md").read_text(encoding="utf-8")


def test_a_training_validates_by_the_score_of_its_task(network: Path) -> None:
    lines = (network.parent / "curve.csv").read_text().splitlines()
    assert lines[0] == "iteration,loss,learning_rate,delta_1"
    best = max(float(line.split(",")[3]) for line in lines[1:] if line.split(",")[3])
    assert load_network(network)[1]["source"]["delta_1"] == best


def test_evaluation_writes_depths_in_the_data_sets_own_form(
    network: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = composed(
        EvaluateSettings,
        network=network,
        dataset=str(folder / "rooms.toml"),
        scales=(0.75, 1.0),
        flip=True,
        predictions=tmp_path / "predictions",
        overlays=tmp_path / "overlays",
        out=tmp_path / "scores.json",
        device="cpu",
    )
    search.evaluate.main(settings)
    assert "AbsRel" in capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    dataset = open_dataset(str(folder / "rooms.toml"), "val", None)
    right, squares, count = 0, 0.0, 0
    for i in range(len(dataset)):
        predicted = np.array(Image.open(tmp_path / "predictions" / f"{i}.png")) / 256
        depth = dataset[i].label.astype(np.float64)
        measured = ~np.isnan(depth)
        ratio = np.maximum(predicted[measured] / depth[measured], depth[measured] / predicted[measured])
        right, count = right + int(np.count_nonzero(ratio < 1.25)), count + int(np.count_nonzero(measured))
        squares += ((predicted - depth)[measured] ** 2).sum()
        assert (tmp_path / "overlays" / f"{i}.png").is_file()
    assert scores["measured_pixels"] == count
    assert scores["delta_1"] == pytest.approx(right / count, abs=5e-3)  # written predictions are rounded to 1/256 m
    assert scores["rmse"] == pytest.approx(np.sqrt(squares / count), abs=2 / 256)


def test_a_network_is_evaluated_on_its_own_data_unless_told_otherwise(network: Path, folder: Path, tmp_path: Path) -> None:
    scores = []
    for dataset in (None, str(folder / "rooms.toml")):
        settings = composed(EvaluateSettings, network=network, dataset=dataset, out=tmp_path / "scores.json", device="cpu")
        search.evaluate.main(settings)
        scores.append(json.loads((tmp_path / "scores.json").read_text()))
    assert scores[0] == scores[1]
    assert scores[0]["dataset"] == "rooms"


def test_other_labels_are_refused(network: Path, run: Run, tmp_path: Path) -> None:
    camvid = write_camvid(tmp_path / "camvid")
    with pytest.raises(InputError, match=r"predicts depth, the labels of camvid are for segmentation: give the `dataset`"):
        search.evaluate.main(composed(EvaluateSettings, network=network, dataset="camvid", data_dir=camvid, device="cpu"))
    with pytest.raises(InputError, match=r"`task` segmentation needs other labels: .* for depth"):
        search.rerank.main(composed(RerankSettings, run=run.directory, task="segmentation", device="cpu"))


def test_a_depth_network_is_exported(network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search.export.main(ExportSettings(network=network, out=tmp_path / "n.pt2", size=(33, 49), fixed_size=True))
    assert "deviates by" in capsys.readouterr().out


def test_ranks_of_two_tasks_are_not_compared(run: Run, tmp_path: Path) -> None:
    camvid = write_camvid(tmp_path / "camvid")
    task = replace(run.settings.data, dataset="camvid", data_dir=camvid, task=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search.rerank, "load_run", lambda _: replace(run, settings=replace(run.settings, data=task)))
        settings = composed(RerankSettings, run=run.directory, crop_size=(33, 33), out=tmp_path / "out", device="cpu")
        with pytest.raises(InputError, match=r"`dataset` camvid has labels for segmentation, and `run` .* by depth"):
            search.rerank.main(settings)
    assert not (tmp_path / "out" / "settings.json").exists()


def test_a_search_without_labels_to_score_by_is_refused_before_it_begins(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("cache", "run", "training"))
    for path in (tmp_path / "copy" / "val").glob("*.png"):
        Image.fromarray(np.zeros((33, 49), np.uint16)).save(path)
    settings = composed(RandomSettings, **data(tmp_path / "copy"), out=tmp_path / "run", trials=1, iterations=1)
    with pytest.raises(InputError, match="no pixel of rooms val has a label to score by: give another `val_split`"):
        search.random.main(settings)
    assert not (tmp_path / "run").exists()


def test_the_best_of_cells_that_all_score_nothing_is_kept(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("cache", "run", "training"))
    for path in (tmp_path / "copy").glob("*/*.png"):  # far away, where nothing is predicted after one step
        Image.fromarray(np.full((33, 49), 60_000, np.uint16)).save(path)
    settings = composed(
        RandomSettings,
        **data(tmp_path / "copy"),
        out=tmp_path / "run",
        trials=1,
        iterations=1,
        branch_channels=4,
        branches=2,
        statistics_batches=1,
        compare=(),
        learning_rate=1e-3,
    )
    search.random.main(settings)
    (record,) = load_run(tmp_path / "run").trials
    assert record.result is not None
    assert record.result.score == 0
    assert (tmp_path / "run" / "heads" / "best.safetensors").exists()


def test_a_network_that_does_not_say_what_it_predicts_is_refused(folder: Path, network: Path, tmp_path: Path) -> None:
    save_network(tmp_path / "n.safetensors", load_network(network)[0], task={})
    settings = composed(TrainSettings, **(data(folder) | {"backbone": None, "weights": None}), init=tmp_path / "n.safetensors")
    with pytest.raises(InputError, match=r"n\.safetensors does not say what its outputs are: give another file"):
        search.train.main(replace(settings, out=tmp_path / "t"))
