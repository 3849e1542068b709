import time

import pytest
import torch
from torch import Tensor

import search.reports.latency
from fast.dense_prediction_cell import DensePredictionCell
from search.cells.space import load_cell
from search.reports.latency import ROUNDS, device_label, measure_latencies


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
    monkeypatch.setattr(search.reports.latency, "_processor", lambda: "Abacus 3")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert device_label(torch.device("cpu")) == "Abacus 3, 2 threads"
