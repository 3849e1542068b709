"""The benchmark's whole plan as on a GPU that computes nothing: no line of it is first run where nobody can mend it.

Run by test_on_a_fake_gpu.py, in a process of its own.
"""

import csv
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
import torch

import bench.measure
import bench.plans
import bench.profiles
import bench.run
import bench.runner
import bench.stages
from bench import launch_trial, tune
from bench.accuracy import Error
from bench.cases import OURS, SUITES, Case, OperationCase
from bench.plans import make_plan
from bench.profiles import predictions
from bench.run import BenchSettings, main
from bench.worker import Say
from fast.dense_prediction_cell import DensePredictionCell
from fast.kernels.triton.launches import DEFAULT, Key
from fast.segmentation import SegmentationHead
from fast.train_step import TrainStep
from reference.grid import Grid
from search.cells.space import load_cell
from tests.bench.tiny_runs import TINY, plan_of
from tests.fake_gpu import FakeGpu, fake_gpu

# PyTorch 2.11's own decompositions, which its fake tensors import.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


class Here:
    """In the place of `Worker`: the functions run in this process, where the GPU is fake."""

    def __init__(self, **keywords: Any) -> None: ...

    def __call__(
        self, function: Callable[..., Any], *arguments: Any, limit_s: float = math.inf, say: Say | None = None
    ) -> Any:
        return function(*arguments, **({} if say is None else {"say": say}))

    def fresh(self) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None: ...


class Profiler:
    """In the place of PyTorch's, which sees no kernel of a fake GPU: three alike replays of two."""

    def __init__(self, **keywords: Any) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def export_chrome_trace(self, path: str) -> None:
        Path(path).write_text("{}")

    def events(self) -> list[SimpleNamespace]:
        names = ["depthwise_forward_kernel", "fold_kernel"] * bench.profiles.REPLAYS
        return [
            SimpleNamespace(
                name=name,
                device_type=SimpleNamespace(name="CUDA"),
                time_range=SimpleNamespace(start=10.0 * i, end=10.0 * i + 8.0),
            )
            for i, name in enumerate(names)
        ]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """The plans of a GPU at tiny sizes; what is computed there has no value to be compared."""
    for module in (bench.measure, bench.runner):
        monkeypatch.setattr(module, "Worker", Here)
    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    monkeypatch.setattr(bench.measure, "error_of", lambda actual, expected: Error(0.0, 0.0))
    monkeypatch.setattr(bench.measure, "BACK_TO_BACK_MS", 1.0)
    monkeypatch.setattr(bench.measure, "_BACK_TO_BACK_ROUNDS", 2)
    monkeypatch.setattr(bench.plans, "_PICTURES_OF_A_GPU", 2)
    monkeypatch.setattr(bench.plans, "PAPER", TINY)
    monkeypatch.setattr(bench.run, "PAPER", TINY)
    for module, stage in ((bench.stages, "gpu_tests"), (bench.profiles, "counters")):  # these are programs of their own
        monkeypatch.setattr(module, stage, lambda *arguments, say: say({"skipped": "on a fake GPU"}))
    with fake_gpu() as gpu:
        yield gpu


def test_a_run_of_minutes(gpu: FakeGpu, tmp_path: Path) -> None:
    main(BenchSettings(device="cuda", minutes=60, rounds=2, out=tmp_path))
    stages = [json.loads(path.read_text()) for path in sorted(tmp_path.rglob("stages/*.json"))]
    assert {stage["said"][-1]["status"] for stage in stages} == {"done"}
    assert len(stages) >= 18
    lines = [{"stage": stage["stage"], **line} for stage in stages for line in stage["said"]]
    rows = [line["row"] for line in lines if "row" in line]
    assert [line for line in rows if line["status"] not in ("ok", "not checked")] == []
    assert {"bfloat16", "float32"} == {line["dtype"] for line in rows}
    assert any(line["back_to_back_ms"] for line in rows)
    (kernel,) = [line for line in lines if line.get("kernel") == "fold_kernel" and "bfloat16" in line["stage"]]
    assert (kernel["us"], kernel["predicted_us"]) == (8.0, predictions("bfloat16")["fold_kernel"][0].us)
    assert gpu.launches > 1000


@pytest.mark.parametrize("size", [{}, {"quick": True}], ids=str)
def test_the_default_plan(gpu: FakeGpu, tmp_path: Path, size: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One job of each kind, by ours and one other: rates, grids and compilers are numbers and names to the same code.

    Searches and features are the same jobs in both plans, here where both have the same sizes.
    """
    monkeypatch.setattr(bench.plans, "QUICK", TINY)
    whole = make_plan(SUITES, torch.device("cuda:0"), quick="quick" in size)
    suites = [suite for suite in SUITES if not (size and suite in ("search", "features"))]
    some = [job for job in whole.jobs if job.case.suite in suites]
    kinds = {(kind_of(job.case), job.case.mode, len(job.in_fresh_process) > 0): job for job in some}
    jobs = [
        replace(job, providers=(job.providers[0], job.providers[-1]), in_fresh_process=job.in_fresh_process[:1])
        for job in kinds.values()
    ]
    plan = replace(whole, stages=(whole.stages[0], *plan_of(*jobs).stages))
    monkeypatch.setattr(bench.run, "make_plan", lambda *arguments, **flags: plan)
    main(BenchSettings(device="auto", rounds=1, out=tmp_path, **size))
    (path,) = tmp_path.rglob("*.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row for row in rows if row["status"] != "ok"] == []
    assert {row["suite"] for row in rows} == set(suites) - {"study"}  # in which no GPU takes part
    assert gpu.launches > (500 if size else 1000)


def kind_of(case: Case) -> str:
    operation = type(case.operation).__name__ if isinstance(case, OperationCase) else ""
    return f"{type(case).__name__} {operation}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_features_that_do_not_fit_are_sent_as_they_are(gpu: FakeGpu, dtype: torch.dtype) -> None:
    """In half the bytes, if they are half; a step and the statistics get them in the head's own dtype."""
    context = DensePredictionCell(load_cell("dpc"), 6, branch_channels=8, cell_channels=8)
    head = SegmentationHead(context, 3).to("cuda")
    features, labels = torch.zeros(3, 6, 7, 8, dtype=dtype), torch.zeros(3, 97, 113, dtype=torch.uint8)
    step = TrainStep(head, features, labels, grid=Grid(16), crop=(5, 5), batch_size=2, iterations=9)
    for _ in range(5):
        assert step().device == step.device == torch.device("cuda:0")
    batch, targets = step.draw()
    assert step._batch is not None
    assert (step._batch[0].dtype, step._batch[0].device.type) == (dtype, "cuda")
    assert (batch.dtype, batch.shape, targets.shape) == (torch.float32, (2, 6, 5, 5), (2, 65, 65))


def test_the_iteration_of_the_counters(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, lambda name=name: calls.append(f"{name} at {gpu.launches}"))
    bench.profiles.one_iteration(TINY.proxy, "cuda:0", "bfloat16")
    once = gpu.launches // 2
    assert calls == [f"start at {once}", f"stop at {2 * once}"]


def test_a_device_without_a_number_is_refused_as_on_a_gpu(gpu: FakeGpu) -> None:
    """So that the tests above would notice one."""
    with pytest.raises(ValueError, match="index"):
        torch.cuda.set_device(torch.device("cuda"))
    assert torch.empty(1, device="cuda").device == torch.device("cuda:0")
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(2, device="cuda") + torch.ones(2)
    assert OURS.memory_format(torch.device("cuda:0")) == torch.channels_last


@pytest.mark.parametrize("key", DEFAULT, ids=lambda key: "-".join(map(str, key)))
def test_comparisons_are_made_on_the_gpu(key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_trial, "relative_error", lambda *results: Error(0.0, 0.0))  # there are no values
    candidate = tune.near(key[0], DEFAULT[key], changes=1)[0]
    with fake_gpu() as gpu:  # refuses launches of what is not there
        trial = launch_trial.compared(key, candidate, DEFAULT[key], "cuda:0")
    launch_trial._prepared.cache_clear()
    assert gpu.launches > 2 * launch_trial.ROUNDS
    assert trial.best_us > 0
