"""The loop by itself: averages, and what comes of a training that had ended. Whole trainings are in `test_train.py`."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fast.batch_norm import MOMENTUM
from reference.grid import Grid
from search.cells.space import load_cell
from search.datasets import open_dataset
from search.devices import Devices
from search.settings import TrainingPictures, TrainingSettings
from search.training.loop import Training, TrainingResult, averaged
from search.training.network import create_network
from search.training.state import load_state
from tests.search.composed import composed
from tests.search.tasks.test_end_to_end import write_backbone
from tests.search.test_random import BACKBONE, write_camvid


def test_the_average_is_that_of_all_weights_so_far() -> None:
    module = nn.Linear(1, 1, bias=False)
    weights = [1.0, 2.0, -3.0]
    with torch.no_grad():
        module.weight.fill_(weights[0])
        average = averaged(module, 0.75)
        for weight in weights[1:]:
            module.weight.fill_(weight)
            average.update_parameters(module)
    expected = 0.75 * (0.75 * weights[0] + 0.25 * weights[1]) + 0.25 * weights[2]
    assert next(average.parameters()).item() == pytest.approx(expected, rel=1e-6)  # float32


def test_a_training_that_had_ended_gives_the_same_result_again(tmp_path: Path) -> None:
    """Also to whoever was killed before the result was written down: it is in the state, not in the networks alone."""
    settings = composed(
        TrainingSettings,
        dataset="camvid",
        data_dir=write_camvid(tmp_path / "camvid"),
        backbone=BACKBONE,
        weights=write_backbone(tmp_path / "weights.pth"),
        crop_size=(33, 33),
        batch_size=2,
        iterations=3,
        validate_every=2,
        statistics_batches=1,
        branch_channels=4,
        loading_processes=0,
        device="cpu",
    ).completed(TrainingPictures("camvid", 5, (33, 49)), Grid(16))
    data, out = settings.data, tmp_path / "out"
    train, val = (open_dataset("camvid", split, data.data_dir) for split in (data.train_split, data.val_split))
    out.mkdir()
    told: list[int] = []

    def run() -> TrainingResult:
        network = create_network(settings, load_cell("dpc"), train.task)
        norms = [part for part in network.head.modules() if isinstance(part, nn.BatchNorm2d)]
        assert {norm.momentum for norm in norms} == {MOMENTUM}
        return Training(settings, network, train, val, out, Devices("cpu")).run(told.append)

    first = run()
    assert told == [1, 2, 3]
    state = load_state(out, torch.device("cpu"))
    assert state is not None
    assert first.seconds == state["progress"]["seconds"]
    before = (out / "curve.csv").read_bytes()
    assert run() == first
    assert told == [1, 2, 3]
    assert (out / "curve.csv").read_bytes() == before
