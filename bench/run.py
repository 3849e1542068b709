"""The benchmark: `python bench/run.py`, from the repository's root (bench/README.md says how to read what it writes)."""

import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout, also where another one is installed or none

from bench.cases import OURS, SUITES, DType, Suite
from bench.measure import in_fresh_process, measure
from bench.plots import draw
from bench.report import table, write_markdown
from bench.results import (
    FAILED,
    NOT_SUPPORTED,
    WRONG,
    Results,
    Row,
    environment,
    forget_unfinished,
    load_unfinished,
    new_name,
    save_unfinished,
    write_csv,
)
from bench.roofline import measure_roofs
from bench.suites import Plan, make_plan
from bench.timing import CacheFlush
from search.cli import run_command
from search.errors import InputError
from search.features import resolve_device


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """Check and time the fast path beside PyTorch's own ways, in one run on one device."""

    suite: tuple[Suite, ...] = SUITES
    """What to measure, in this order: proxy (training iterations), loss, search (cells per hour), cell, ops (all alone)."""
    dtype: tuple[DType, ...] | None = None
    """In which dtypes. Default: on a GPU bfloat16 and float32 (with --quick the first, with --full float16 too), on a CPU
    float32, and bfloat16 where the processor has instructions for it."""
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
    """Measure, print, write. Exits with 1 if any result of ours was wrong or failed, with 130 after Ctrl-C."""
    if settings.rounds is not None and settings.rounds < 1:
        raise InputError(f"--rounds must be at least 1, got {settings.rounds}")
    if settings.quick and settings.full:
        raise InputError("--quick and --full contradict each other: give one of them")
    device = torch.device(resolve_device(settings.device))
    if device.type == "cpu" and "float16" in (settings.dtype or ()):
        raise InputError("--dtype float16 is measured on a GPU alone: this run is on the CPU")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # whose stream the events are recorded in
    folder = settings.out / environment(device).folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            results = run_and_write(settings, device, folder)
    except Timeout:
        raise InputError(f"another benchmark writes to {folder}: two at once would disturb each other's times") from None
    if not results.is_complete:
        sys.exit(130)
    if any(row.status in (WRONG, FAILED) for row in results.rows if row.provider == OURS.name):
        sys.exit(1)


def run_and_write(settings: BenchSettings, device: torch.device, folder: Path) -> Results:
    """Begin the plan or go on with it, to its end or to Ctrl-C; print and write what is known then."""
    plan = make_plan(settings.suite, device, quick=settings.quick, full=settings.full, dtypes=settings.dtype)
    results = begin(settings, plan, device, folder)
    try:
        run_plan(plan, results, device, settings.rounds or plan.rounds, save=lambda: save_unfinished(folder, results))
    except KeyboardInterrupt:
        print("\nstopped: the same command at the same commit goes on with the next case", file=sys.stderr)
    print(table(results, colour=sys.stdout.isatty()))
    for path in write(results, folder):
        print(path)
    if results.is_complete:
        forget_unfinished(folder, results)
    return results


def begin(settings: BenchSettings, plan: Plan, device: torch.device, folder: Path) -> Results:
    """The stopped run of the same command, or a new one."""
    command = {"suite": list(settings.suite), "device": str(device), "quick": settings.quick, "full": settings.full}
    command |= {"rounds": settings.rounds, "dtype": settings.dtype and list(settings.dtype)}
    here = environment(device)
    if stopped := load_unfinished(folder, command, here):
        print(f"going on with {stopped.name} behind {stopped.jobs_done} cases", file=sys.stderr)
        return stopped
    print("measuring the roofs: copies and matrix products", file=sys.stderr)
    roofs = measure_roofs(device, plan.dtypes, quick=settings.quick)
    results = Results(here, roofs, plan.omissions, command=command, name=new_name(folder, here))
    results.rows += unsupported_rows(settings.suite, plan.unsupported)
    return results


def run_plan(plan: Plan, results: Results, device: torch.device, rounds: int, *, save: Callable[[], None]) -> None:
    """Do the plan's jobs one after the other; `results` grows by each job's rows, and is saved behind it."""
    rng, flush = np.random.default_rng(results.jobs_done), CacheFlush(device)
    with ExitStack() as stack:
        # A compiler's cache of earlier runs would make its first call look quick.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = stack.enter_context(tempfile.TemporaryDirectory())
        with tqdm(plan.jobs[results.jobs_done :], initial=results.jobs_done, total=len(plan.jobs), unit="case") as bar:
            for job in bar:
                bar.set_description(f"{job.case.suite}: {job.case.name}, {job.case.mode}, {job.dtype}"[:60])
                results.rows += measure(
                    job, device, rounds, results.roofs, rng=rng, measure_first_call=in_fresh_process, flush=flush
                )
                results.jobs_done += 1
                save()
    results.is_complete = True


def write(results: Results, folder: Path) -> list[Path]:
    """The CSV, the summary and the picture of a run; each is written aside, then renamed."""
    paths = [folder / (results.name + suffix) for suffix in (".csv", ".md", ".png")]
    for path, writer in zip(paths, (write_csv, write_markdown, draw), strict=True):
        writer(path, results)
    return paths


def unsupported_rows(suites: Sequence[Suite], dtypes: Sequence[str]) -> Iterator[Row]:
    """One per suite and dtype that the plan leaves out for want of a processor's instructions."""
    for suite, dtype in itertools.product(dict.fromkeys(suites), dtypes):
        yield Row(
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
