"""Benchmark runs small enough for a test."""

import math
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.cases import EAGER, EAGER_CHANNELS_LAST, OURS, OURS_WITHOUT_KERNELS, SUITES, Job, OperationCase, Suite
from bench.measure import Run
from bench.plans import QUICK, Plan, Planner, Scale
from bench.results import Environment, Results, Row
from bench.roofline import Roofs
from bench.run import unsupported_rows
from bench.runner import run_stages
from bench.stages import Stage
from bench.study_case import OPTUNA, StudyScale
from reference.cell import AtrousSeparableConv
from search.settings import HeadSettings, ProxySettings

CPU = torch.device("cpu")
TINY = replace(
    QUICK,
    maps=((2, 6, 7, 8), (2, 6, 9, 8)),
    proxy=replace(QUICK.proxy, batch=2, in_channels=10, channels=6, num_classes=3, crop=(4, 5)),
    centres=replace(QUICK.centres, batch=2, in_channels=10, channels=6, num_classes=3, crop=(4, 5)),
    rates=((1, 1), (6, 21)),
    random_cells=1,
    search=replace(
        QUICK.search,
        settings=ProxySettings(iterations=2, learning_rate=0.05, batch_size=2, statistics_batches=1),
        head=HeadSettings(branch_channels=8),
        train_images=3,
        val_images=2,
    ),
    caching=replace(QUICK.caching, pictures=2, size=(64, 48), model="test_vit"),
    study=StudyScale(trials=(2,), processes=2, at_once=4, databases=("SQLite",)),
)
ROOFS = Roofs(copy_gb_per_s=10.0, matrix_gflops={"float32": 50.0})
ENVIRONMENT = Environment(
    device="Some CPU, 2 cores",
    folder="some-cpu-2-cores",
    threads=1,
    commit="0123abc",
    timestamp="2026-01-02T03:04:05+00:00",
    python="3.11",
    torch="2",
    triton="none",
    cuda="none",
)
SEPARABLE = OperationCase(
    suite="ops",
    name="sep3x3 6x21",
    mode="training",
    operation=AtrousSeparableConv(rate=(6, 21)),
    batch=2,
    in_channels=6,
    channels=6,
    height=7,
    width=8,
)
NOT_COMPILED = (OURS, EAGER, EAGER_CHANNELS_LAST, OURS_WITHOUT_KERNELS, OPTUNA)


def tiny_jobs(suite: Suite, scale: Scale = TINY) -> list[Job]:
    """All jobs of a suite without compilers and fresh processes."""
    planner = Planner(scale, CPU, quick=False)
    jobs = [planner.job(case, "float32") for case in planner.cases([suite])]
    return [replace(job, in_fresh_process=(), providers=tuple(p for p in job.providers if p in NOT_COMPILED)) for job in jobs]


def plan_of(*jobs: Job) -> Plan:
    """A plan of these jobs, without roofs."""
    return Plan(tuple(Stage(job.title, jobs=(job,), is_case=True) for job in jobs))


def tiny_results() -> Results:
    """A whole run of every suite, its last cases, two rounds."""
    plan = plan_of(*(job for suite in SUITES for job in tiny_jobs(suite)[-3:]))
    results = Results(ENVIRONMENT, ROOFS, omissions=("nothing but time",))
    results.rows += unsupported_rows(SUITES, ("bfloat16",))
    with TemporaryDirectory() as folder:
        run_stages(plan.stages, Run("cpu", torch.get_num_threads(), 2, ROOFS, Path(folder)), results, math.inf)
    return results


def row(provider: str, median_ms: float | None, **changes: Any) -> Row:
    """A made-up result of one case."""
    made = Row(
        suite="proxy",
        case="iteration",
        mode="training",
        provider=provider,
        memory_format="NCHW",
        dtype="float32",
        shape="2×3×4×5",
        status="ok" if median_ms else "WRONG",
        median_ms=median_ms,
        p20_ms=median_ms,
        p80_ms=median_ms,
        median_low_ms=median_ms,
        median_high_ms=median_ms,
    )
    return replace(made, **changes)
