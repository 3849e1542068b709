"""Wrong kernels are never compared, and failures stay with their provider."""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

import bench.load
import bench.measure
from bench.cases import EAGER, EAGER_CHANNELS_LAST, OURS, Case, Job, Provider
from bench.measure import measure
from bench.results import Row, ratio
from bench.timing import FirstCall
from fast.atrous_separable_conv import atrous_separable_conv
from fast.kernels import Backend, backend_for
from tests.bench.tiny_runs import CPU, ROOFS, SEPARABLE

ONE_ULP = 1 + 2**-23


def measure_tiny(case: Case = SEPARABLE, **changes: Any) -> list[Row]:
    job = replace(Job(case, "float32", (OURS, EAGER, EAGER_CHANNELS_LAST), in_fresh_process=()), **changes)
    with (
        mock.patch.object(bench.measure, "in_fresh_process", return_value=FirstCall(1.5, 3.0)),
        mock.patch.object(bench.measure, "CacheFlush"),
        mock.patch.object(bench.load, "_cpu_times", return_value=None),  # tests also run on busy machines
    ):
        return measure(job, CPU, 2, ROOFS)


def ours_with(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Change what our separable convolution returns."""
    name = "bench.cases.atrous_separable_conv"
    monkeypatch.setattr(name, lambda x, *args, **kwargs: change(atrous_separable_conv(x, *args, **kwargs)))


def test_right_rows_are_timed() -> None:
    rows = measure_tiny()
    assert [row.provider for row in rows] == ["ours", "eager", "eager channels-last"]
    assert all(row.status == "ok" and row.median_ms and row.rms_error is not None and row.percent_of_roof for row in rows)
    others = [row.median_ms or 0.0 for row in rows[1:]]
    assert rows[0].ratio_to_best_other == min(others) / (rows[0].median_ms or 0.0)
    assert all(row.ratio_to_best_other is None for row in rows[1:])


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y * 1.01,
        lambda y: y.roll(1, dims=3),
        lambda y: torch.cat([y[:, :, :-1], y[:, :, :1]], dim=2),
        lambda y: y.detach().requires_grad_(),
        lambda y: y * torch.nan,
    ],
    ids=["scaled", "shifted", "wrong row", "no gradient", "nan"],
)
def test_a_wrong_kernel_is_never_compared(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    ours_with(monkeypatch, change)
    wrong, *right = measure_tiny()
    assert wrong.status in ("WRONG", "failed")
    assert wrong.ratio_to_best_other is wrong.percent_of_roof is ratio([wrong, *right]) is None
    assert (wrong.median_ms is None) == (wrong.status == "failed")  # how long it took is worth knowing even so
    assert wrong.note
    assert all(row.status == "ok" and row.median_ms for row in right)


def test_rounding_is_not_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    ours_with(monkeypatch, lambda y: y * ONE_ULP)
    assert measure_tiny()[0].status == "ok"


def test_a_kernel_that_is_wrong_at_the_full_size_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    full = (SEPARABLE.batch, SEPARABLE.channels, SEPARABLE.height, SEPARABLE.width)
    ours_with(monkeypatch, lambda y: y * (1.1 if y.shape == full else 1.0))
    row = measure_tiny()[0]
    assert (row.status, row.ratio_to_best_other) == ("WRONG", None)
    assert "eager at full size" in row.note


def test_a_failure_stays_with_its_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(y: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of luck\nand a long story")

    ours_with(monkeypatch, fail)
    failed, *right = measure_tiny()
    assert (failed.status, failed.note) == ("failed", "RuntimeError: out of luck")
    assert all(row.median_ms for row in right)


def test_first_call_and_memory_come_from_the_fresh_process() -> None:
    rows = measure_tiny(in_fresh_process=(OURS, EAGER, EAGER_CHANNELS_LAST))
    assert {(row.first_call_s, row.peak_memory_mb) for row in rows} == {(1.5, 3.0)}


def test_kernels_are_off_for_the_provider_without(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[Backend | None] = set()

    def look(y: torch.Tensor) -> torch.Tensor:
        seen.add(backend_for(y))
        return y

    ours_with(monkeypatch, look)
    without = Provider("without", is_ours=True, uses_kernels=False)
    assert measure_tiny(providers=(without,))[0].status == "ok"
    assert seen == {None}


@pytest.mark.parametrize("percent", [1.0, 48.0])
def test_what_others_use_meanwhile_is_noted(monkeypatch: pytest.MonkeyPatch, percent: float) -> None:
    monkeypatch.setattr(bench.load, "percent_between", lambda before, after, cores: percent)
    with mock.patch.object(bench.measure, "CacheFlush"):
        rows = measure(Job(SEPARABLE, "float32", (OURS, EAGER)), CPU, 7, ROOFS)
    assert [row.others_percent for row in rows] == [percent, percent]
    assert all((row.percent_of_roof is None) == (percent > 5) for row in rows)
    assert [row.ratio_to_best_other is None for row in rows] == [percent > 5, True]
    assert all((row.median_low_ms or 9e9) <= (row.median_ms or 0) <= (row.median_high_ms or 0) for row in rows)
