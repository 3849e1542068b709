"""The benchmark: `python bench/run.py`, from the repository's root (bench/README.md says how to read what it writes)."""

import itertools
import os
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from bench.cases import SUITES, Suite
from bench.measure import in_fresh_process, measure
from bench.plots import draw
from bench.report import table, write_markdown
from bench.results import FAILED, NOT_SUPPORTED, WRONG, Results, Row, environment, write_csv
from bench.roofline import measure_roofs
from bench.suites import Plan, make_plan
from bench.timing import CacheFlush
from search.cli import InputError, run_command
from search.features import resolve_device


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """Check and time the fast path beside PyTorch's own ways, in one run on one device."""

    suite: tuple[Suite, ...] = SUITES
    """What to measure: ops (all operations alone), loss, cell, proxy (training iterations), search (cells per hour)."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the GPU if there is one."""
    quick: bool = False
    """A look in under two minutes on two cores: one shape, one rate, few rounds."""
    full: bool = False
    """Everything, for hours: torch.compile on every case, all rates at the large size on a CPU too."""
    rounds: int | None = None
    """Times that every provider takes its turn. Default: 10, with --quick 3."""
    out: Path = Path("bench/results")
    """Folder of the results; each device has its own folder in it."""


def main(settings: BenchSettings) -> None:
    """Measure, print, write. Exits with 1 if any result was wrong or failed, with 130 after Ctrl-C."""
    if settings.rounds is not None and settings.rounds < 1:
        raise InputError(f"--rounds must be at least 1, got {settings.rounds}")
    if settings.quick and settings.full:
        raise InputError("--quick and --full contradict each other: give one of them")
    device = torch.device(resolve_device(settings.device))
    plan = make_plan(settings.suite, device, quick=settings.quick, full=settings.full)
    print("measuring the roofs: copies and matrix products", file=sys.stderr)
    roofs = measure_roofs(device, plan.dtypes, quick=settings.quick)
    results = Results(environment(device), roofs, plan.omissions)
    interrupted = False
    try:
        run_plan(plan, results, device, settings.rounds or plan.rounds)
    except KeyboardInterrupt:
        interrupted = True
        print("\nstopped: what was measured is written; the same command starts anew", file=sys.stderr)
    if not results.rows:
        sys.exit(130)
    print(table(results, colour=sys.stdout.isatty()))
    for path in write(results, settings.out):
        print(path)
    if interrupted:
        sys.exit(130)
    if any(row.status in (WRONG, FAILED) for row in results.rows):
        sys.exit(1)


def run_plan(plan: Plan, results: Results, device: torch.device, rounds: int) -> None:
    """Do the plan's jobs one after the other; `results` grows by each job's rows."""
    rng, flush = np.random.default_rng(0), CacheFlush(device)
    for suite in dict.fromkeys(job.case.suite for job in plan.jobs):
        results.rows += [_unsupported(suite, dtype) for dtype in plan.unsupported]
    with ExitStack() as stack:
        # A compiler's cache of earlier runs would make its first call look quick.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = stack.enter_context(tempfile.TemporaryDirectory())
        with tqdm(plan.jobs, unit="case") as bar:
            for job in bar:
                bar.set_description(f"{job.case.suite}: {job.case.name}, {job.case.mode}, {job.dtype}"[:60])
                results.rows += measure(
                    job, device, rounds, results.roofs, rng=rng, measure_first_call=in_fresh_process, flush=flush
                )
    results.is_complete = True


def write(results: Results, out: Path) -> list[Path]:
    """The CSV, the summary and the picture of a run; each is written aside, then renamed.

    A second run of the same day and commit gets "-2" behind its name: none replaces another.
    """
    stem = out / results.stem
    for again in itertools.count(2):
        if not stem.with_name(stem.name + ".csv").exists():
            break
        stem = out / results.stem.with_name(f"{results.stem.name}-{again}")
    paths = [stem.with_name(stem.name + suffix) for suffix in (".csv", ".md", ".png")]
    for path, writer in zip(paths, (write_csv, write_markdown, draw), strict=True):
        writer(path, results)
    return paths


def _unsupported(suite: Suite, dtype: str) -> Row:
    return Row(
        suite=suite,
        case="all",
        mode="training",
        provider="all",
        memory_format="",
        dtype=dtype,
        shape="",
        status=NOT_SUPPORTED,
        note="the processor has neither AMX nor AVX-512 bf16",
    )


if __name__ == "__main__":
    run_command(BenchSettings, main, prog="python bench/run.py")
