"""Ours, the baselines and `reference/` compute the same thing from the same inputs, and costs are counted as PyTorch does."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.accuracy import Error, budget, error_of
from bench.caching_case import CachingCase
from bench.cases import (
    EAGER,
    EAGER_CHANNELS_LAST,
    OURS,
    SUITES,
    Case,
    CellCase,
    DepthwiseCase,
    DType,
    MapCase,
    OperationCase,
    Provider,
    rate_of,
)
from bench.costs import Cost
from bench.plans import MODES, NEW_CELL, PAPER, PUBLISHED_RATES, make_plan
from bench.training_cases import ProxyCase, SearchCase
from reference.cell import BACKBONE_FEATURE, RATES, Operation
from tests.bench.reference_truth import reference_truth
from tests.bench.tiny_runs import CPU, SEPARABLE, tiny_jobs

CASES = [job.case for suite in SUITES if suite != "study" for job in tiny_jobs(suite)]  # which computes nothing
ids = [f"{case.suite}-{case.name}-{case.mode}-{case.shape}".replace(" ", "_") for case in CASES]
every_case = pytest.mark.parametrize("case", CASES, ids=ids)

MAP_CASES = [case for case in CASES if isinstance(case, MapCase)]
every_map_case = pytest.mark.parametrize(
    "case", MAP_CASES, ids=[f"{case.name}-{case.mode}-{case.shape}".replace(" ", "_") for case in MAP_CASES]
)

# float32 through a cell's training step: eager PyTorch itself is up to 1e-6 from the truth; a flipped ReLU would show as 3e-5.
ROUNDING = 1e-5
ROUNDING_IN_FLOAT64 = 1e-11
ROUNDING_IN_FLOAT16 = 5e-4  # in which features are kept, also those of the truth: an element may be rounded the other way


def run(case: Case, provider: Provider) -> dict[str, list[torch.Tensor]]:
    workload = case.workload(provider, "float32", CPU)
    workload()
    return workload.parts()


@every_case
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_truth_is_that_of_the_reference(case: Case, dtype: str) -> None:
    if isinstance(case, SearchCase | CachingCase):
        pytest.skip("a search is made of our own code, a backbone of timm's")
    small = case.small()
    expected = {kind: [torch.from_numpy(part) for part in parts] for kind, parts in reference_truth(small, dtype).items()}
    assert error_of(small.truth(dtype), expected).maximum < ROUNDING_IN_FLOAT64


@every_case
@pytest.mark.parametrize("provider", [OURS, EAGER, EAGER_CHANNELS_LAST], ids=lambda provider: provider.name)
def test_every_provider_computes_the_truth(case: Case, provider: Provider) -> None:
    if isinstance(case, SearchCase) and provider != OURS:
        pytest.skip("a search is made of our own code")
    small = case.small()
    rounding = ROUNDING_IN_FLOAT16 if isinstance(case, CachingCase) else ROUNDING
    assert error_of(run(small, provider), small.truth("float32")).rms < rounding


@every_case
def test_a_second_call_computes_the_same(case: Case) -> None:
    if isinstance(case, ProxyCase | SearchCase):
        pytest.skip("a step changes the weights; a search is too slow to run twice here")
    workload = case.small().workload(OURS, "float32", CPU)
    workload()
    first = {kind: [part.clone() for part in parts] for kind, parts in workload.parts().items()}
    workload()
    assert all(torch.equal(a, b) for kind in first for a, b in zip(first[kind], workload.parts()[kind], strict=True))


def counted(case: Case) -> int:
    workload = case.workload(EAGER, "float32", CPU)
    with FlopCounterMode(display=False) as counter:
        workload()
    return int(counter.get_total_flops())


def flops(case: Case) -> int:
    cost = case.cost(4)
    assert cost is not None
    return cost.flops


@every_map_case
def test_operations_are_counted_as_torch_counts_them(case: MapCase) -> None:
    if case.mode == "training" and not (isinstance(case, OperationCase) and rate_of(case) is None):
        pytest.skip("PyTorch's counter takes the weight gradient of a grouped convolution for that of a full one")
    assert flops(case) == counted(case)


@every_map_case
def test_training_is_three_times_inference_where_the_input_needs_a_gradient(case: MapCase) -> None:
    training, inference = (flops(replace(case, mode=mode)) for mode in MODES[::-1])
    spared = 0
    if isinstance(case, CellCase):  # the backbone's features need none
        first = [branch.operation for branch in case.cell.branches if branch.input_index == BACKBONE_FEATURE]
        for operation in first:
            alone = OperationCase(**vars_of(case, "inference"), operation=operation)
            depthwise = DepthwiseCase(**(vars_of(case, "inference") | {"channels": case.in_channels}), rate=(1, 1))
            spared += flops(alone if rate_of(alone) is None else depthwise)
    assert training == 3 * inference - spared


def vars_of(case: MapCase, mode: str) -> dict[str, Any]:
    sizes = ("batch", "in_channels", "channels", "height", "width")
    return {"suite": case.suite, "name": case.name, "mode": mode} | {name: getattr(case, name) for name in sizes}


def test_bytes_of_a_separable_convolution_by_hand() -> None:
    x, weights = 4 * 2 * 6 * 7 * 8, 4 * (9 * 6 + 36)  # a map, and the parameters
    # Forward: x and weights in, y out. Back: y's gradient, x and weights in, their gradients out.
    assert SEPARABLE.cost(4) == Cost(bytes=5 * x + 3 * weights, flops=2 * 3 * (9 * 6 + 36) * 2 * 7 * 8)


def test_half_the_element_size_moves_half_the_map() -> None:
    full, half = SEPARABLE.cost(4), SEPARABLE.cost(2)
    assert full.bytes - half.bytes == 5 * 2 * 2 * 6 * 7 * 8


def test_budget_grows_with_the_yardstick_up_to_the_limit() -> None:
    assert budget("float32") == budget("float32", Error(1.0, 1.0)) > budget("float32", Error(1e-7, 1e-8)) > 0


@pytest.mark.parametrize("damage", ["nan", "missing", "other shape", "other kind"])
def test_unusable_results_have_no_finite_error(damage: str) -> None:
    small = SEPARABLE.small()
    parts, truth = run(small, OURS), small.truth("float32")
    output = parts["output"][0].clone()
    output[0, 0, 0, 0] = torch.nan
    damaged: dict[str, Any] = {
        "nan": {**parts, "output": [output]},
        "missing": {**parts, "gradients": parts["gradients"][:-1]},
        "other shape": {**parts, "output": [parts["output"][0][..., :-1]]},
        "other kind": {"output": parts["output"]},
    }
    assert error_of(damaged[damage], truth).rms == float("inf")


def test_the_plan_holds_every_rate_grid_and_cell() -> None:
    plan = make_plan(SUITES, CPU, quick=False, dtypes=["float32"])  # bfloat16 too, where it is quick
    separable = [job.case for job in plan.jobs if isinstance(job.case, OperationCase) and rate_of(job.case)]
    first_size = [case for case in separable if case.height == 49]
    assert {(rate_of(case), case.mode) for case in first_size} == {
        (rate, mode) for rate in PUBLISHED_RATES for mode in ("inference", "training")
    }
    assert len(PUBLISHED_RATES) == len(RATES) ** 2 == 64
    assert {case.shape for case in separable} == {"8×256×49×49", "16×256×97×97"}
    assert {type(job.case.operation) for job in plan.jobs if isinstance(job.case, OperationCase)} == {*get_args(Operation)}
    cells = {job.case.name for job in plan.jobs if isinstance(job.case, CellCase)}
    assert cells == {"dpc", "aspp", *(f"random {i}" for i in range(PAPER.random_cells))}
    assert [job.case.name for job in plan.jobs if job.case.suite == "proxy"][:2] == ["iteration", NEW_CELL]


def test_a_gpu_starts_with_what_matters_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    plan = make_plan(SUITES, torch.device("cuda"), quick=False)
    assert [(job.case.name, job.dtype) for job in plan.jobs[:2]] == [("iteration", "bfloat16"), ("iteration", "float32")]
    assert {job.dtype for job in plan.jobs} == {"bfloat16", "float32"}
    assert any("--dtype float16" in omission for omission in plan.omissions)
    # Half a minute for a compiled provider and 10 s for a process are an hour and a half.
    assert sum(provider.compile_mode is not None for job in plan.jobs for provider in job.providers) <= 190
    assert sum(len(job.in_fresh_process) for job in plan.jobs) <= 250


@pytest.mark.parametrize(
    ("dtypes", "expected"), [(["float16"], {"float16"}), (["float32", "bfloat16"], {"bfloat16", "float32"})]
)
def test_dtypes_are_those_asked_for(dtypes: list[DType], expected: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    plan = make_plan(["ops"], torch.device("cuda"), quick=False, dtypes=dtypes)
    assert {job.dtype for job in plan.jobs} == expected


def test_quick_leaves_compilers_out_on_a_cpu_and_says_so() -> None:
    plan = make_plan(SUITES, CPU, quick=True, dtypes=["float32"])
    names = {provider.name for job in plan.jobs for provider in job.providers}
    assert names == {"ours", "eager", "ours without kernels", "Optuna", "Optuna, paper's sampler"}
    assert any("torch.compile" in omission and "--quick" in omission for omission in plan.omissions)
    assert any("new cell" in omission and "--quick" in omission for omission in plan.omissions)
