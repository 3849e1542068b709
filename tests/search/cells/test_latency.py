import time

import pytest
import torch
from torch import Tensor

import search.cells.latency
from fast.dense_prediction_cell import DensePredictionCell
from search.cells.latency import ROUNDS, device_label, like, measure_latencies, relative_latency
from search.cells.space import load_cell


class Slow(DensePredictionCell):
    """Takes so many seconds more, and notes its calls."""

    def __init__(self, seconds: float, calls: list[str], name: str) -> None:
        super().__init__(load_cell("aspp"), 3, branch_channels=4, cell_channels=4)
        self.seconds, self.calls, self.name = seconds, calls, name

    def forward(self, features: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not self.training
        self.calls.append(self.name)
        time.sleep(self.seconds)
        return super().forward(features)


def test_the_slower_cell_is_slower_and_turns_are_taken() -> None:
    calls: list[str] = []
    latencies = measure_latencies({"slow": Slow(0.02, calls, "slow"), "quick": Slow(0.005, calls, "quick")}, (5, 7))
    slow, quick = latencies.by_name["slow"], latencies.by_name["quick"]
    for latency, least in ((slow, 20), (quick, 5)):
        assert least <= latency.p20_ms <= latency.median_ms <= latency.p80_ms
    assert slow.median_ms > quick.median_ms
    assert latencies.feature_size == (5, 7)
    turns = "".join(name[0] for name in calls[-4 * ROUNDS :])
    assert "s" * 7 not in turns  # two turns may meet, of three calls each: the timer's two to warm up, and one
    assert calls.count("slow") >= ROUNDS


def test_a_relative_latency_is_the_median_of_the_ratios_in_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round in which the machine was slow changes nothing."""
    timed: dict[str, DensePredictionCell] = {}

    def turn(cell: DensePredictionCell, feature_size: tuple[int, int], device: torch.device) -> DensePredictionCell:
        assert (feature_size, device, cell.training) == ((5, 7), torch.device("cpu"), False)
        timed[str(cell.cell)] = cell
        return cell

    def in_turns(turns: dict[str, DensePredictionCell], rounds: int, *_: object, seconds: float) -> dict[str, list[float]]:
        published = load_cell("dpc")
        of_published = next(name for name, cell in turns.items() if cell.cell == published)
        of_this = next(name for name in turns if name != of_published)
        return {of_published: [10.0, 90.0, 10.0], of_this: [8.0, 63.0, 6.0]}

    monkeypatch.setattr(search.cells.latency, "_turn", turn)
    monkeypatch.setattr(search.cells.latency, "in_turns", in_turns)
    options = {"branch_channels": 4, "cell_channels": 4, "output_stride": 8, "pooling_size": (9, 9)}
    this = DensePredictionCell(load_cell("aspp"), (3, 2), **options)  # type: ignore[arg-type]
    assert relative_latency(this, (5, 7), torch.device("cpu")) == pytest.approx(0.7)
    for cell in timed.values():
        assert (cell.input_channels, cell.cell_channels) == ((3, 2), 4)
        assert all(getattr(cell, name) == value for name, value in options.items())
    assert set(timed) == {str(load_cell(name)) for name in ("aspp", "dpc")}
    timed.clear()
    assert relative_latency(like(this, load_cell("dpc")), (5, 7), torch.device("cpu")) == 1
    assert not timed


def test_no_round_begins_after_the_time_is_up() -> None:
    calls: list[str] = []
    measure_latencies({"slow": Slow(0.01, calls, "slow")}, (5, 7), seconds=0.0)
    assert len(calls) < ROUNDS


def test_weights_can_be_trained_afterwards() -> None:
    cell = DensePredictionCell(load_cell("aspp"), 3, branch_channels=4, cell_channels=4)
    measure_latencies({"aspp": cell}, (3, 3), seconds=0.0)
    cell.train()(torch.rand(2, 3, 3, 3)).sum().backward()
    assert all(parameter.grad is not None for parameter in cell.parameters())


def test_the_device_and_its_threads_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search.cells.latency, "_processor", lambda: "Abacus 3")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert device_label(torch.device("cpu")) == "Abacus 3, 2 threads"
