"""The benchmark: `python bench/run.py`, from the repository's root (bench/README.md says how to read what it writes)."""

import argparse
import itertools
import os
import shlex
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout, whether one is installed or not

from bench.cases import DTYPES, SUITES, DType, Suite
from bench.launch_trial import SHARED_BYTES, triton_cache
from bench.measure import measure_apart
from bench.report import in_short, table, write_markdown
from bench.results import NOT_SUPPORTED, UNFINISHED, Environment, Results, Row, append_line, environment, new_name, write_csv
from bench.roofline import NO_ROOFS, Roofs, measure_roofs
from bench.stages import Run, compile_kernels, plan_stages, run_stages
from bench.suites import PAPER, Plan, make_plan
from bench.worker import Worker
from search.devices import resolve_device
from search.errors import InputError, as_flag, with_fields
from search.folder import Folder

KIND = "benchmark"  # of folders, in error messages
CLOSING_S = 12.0  # reserved in a run of limited minutes for imports, the last summary and the picture


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """The flags, as `parser` explains them."""

    suite: Sequence[Suite] = SUITES
    dtype: Sequence[DType] | None = None
    device: str = "auto"
    quick: bool = False
    full: bool = False
    minutes: float | None = None
    compile_for: int | None = None
    rounds: int | None = None
    out: Path = Path("bench/results")


def parser() -> argparse.ArgumentParser:
    """The parser of flags, from the standard library: a machine with PyTorch may lack other libraries."""
    flags = argparse.ArgumentParser(
        prog="python bench/run.py",
        description="Check and time the fast path beside PyTorch's own ways, in one run on one device.",
        argument_default=argparse.SUPPRESS,
    )
    flags.add_argument("--suite", nargs="+", choices=SUITES, help="what to measure, in this order (default: all)")
    flags.add_argument(
        "--dtype",
        nargs="+",
        choices=tuple(DTYPES),
        help="in which dtypes (default: on a GPU bfloat16 and float32, with --quick the first, with --full float16 too; "
        "on a CPU float32, and bfloat16 where the processor has instructions for it)",
    )
    flags.add_argument("--device", help="cpu, cuda, cuda:1, ...; auto, the default, takes the GPU if there is one")
    flags.add_argument(
        "--quick", action="store_true", help="a look: one shape, one rate, few rounds; two minutes on two cores"
    )
    flags.add_argument("--full", action="store_true", help="everything, for hours: torch.compile on every case, all rates")
    flags.add_argument(
        "--minutes",
        type=float,
        help="stop then; a plan of its own, what matters most first, each part in a process of its own: "
        "for a machine that is at hand for minutes",
    )
    flags.add_argument(
        "--compile-for",
        type=int,
        choices=sorted(SHARED_BYTES),
        help="only fill Triton's cache for such a GPU (90: H100, H200), with what --minutes launches; needs none",
    )
    flags.add_argument("--rounds", type=int, help="times that every provider takes its turn (default: 10, with --quick 3)")
    flags.add_argument("--out", type=Path, help="folder of the results (default: bench/results); a folder in it per device")
    return flags


def spelling(field: str) -> str:
    """How an error names a field: settings by their flags."""
    return as_flag(field) if hasattr(BenchSettings, field) else field


def main(settings: BenchSettings) -> None:
    """Measure, print, write. Exits with 1 if any result of ours was wrong or failed, with 130 after Ctrl-C."""
    check(settings)
    if settings.compile_for is not None:
        count = compile_kernels(settings.compile_for, plan_stages(torch.device("cuda"), PAPER))
        print(f"\n{count} kernels in {triton_cache()}")
        return
    device = torch.device(resolve_device(settings.device))
    if device.type == "cpu" and "float16" in (settings.dtype or ()):
        raise InputError("--dtype float16 is measured on a GPU alone: this run is on the CPU")
    folder = settings.out / environment(device).folder
    with Folder(folder, remedy="stop it: two at once would disturb each other's times").locked():
        results = (run_and_write if settings.minutes is None else run_for_minutes)(settings, device, folder)
    if not results.is_complete:
        sys.exit(130)
    if failures := results.failures():
        print("wrong or failed: " + "; ".join(failures), file=sys.stderr)
        sys.exit(1)


def check(settings: BenchSettings) -> None:
    """Raise InputError for flags that cannot work."""
    if settings.rounds is not None and settings.rounds < 1:
        raise InputError(f"--rounds must be at least 1, got {settings.rounds}")
    if settings.quick and settings.full:
        raise InputError("--quick and --full contradict each other: give one of them")
    if settings.minutes is not None:
        if not settings.minutes > 0:
            raise InputError(f"--minutes must be more than 0, got {settings.minutes:g}")
        if settings.quick or settings.full or tuple(settings.suite) != SUITES or settings.dtype:
            raise InputError("--minutes has a plan of its own: leave out --suite, --dtype, --quick and --full")


def run_and_write(settings: BenchSettings, device: torch.device, folder: Path) -> Results:
    """Run the plan, or continue it, to its end or to Ctrl-C; then print and write the results."""
    plan = make_plan(settings.suite, device, quick=settings.quick, full=settings.full, dtypes=settings.dtype)
    unfinished, results = begin(settings, plan, device, folder)
    try:
        run_plan(plan, results, device, settings.rounds or plan.rounds, unfinished)
    except KeyboardInterrupt:
        print("\nstopped: the same command at the same commit goes on with the next case", file=sys.stderr)
    print_and_write(results, folder)
    return results


def run_for_minutes(settings: BenchSettings, device: torch.device, folder: Path) -> Results:
    """Run the stages that fit into --minutes. Numbers go into <name>.jsonl at once, the summary is written after each."""
    assert settings.minutes is not None
    end = time.monotonic() + 60 * settings.minutes - min(CLOSING_S, 6 * settings.minutes)
    here = environment(device)
    results = Results(here, NO_ROOFS, name=new_name(folder, here))
    stem = folder / results.name
    append_line(stem.with_suffix(".jsonl"), {"stage": "environment", **vars(here)})
    run = Run(str(device), torch.get_num_threads(), settings.rounds or PAPER.rounds, NO_ROOFS, stem)

    def hear(stage: str, value: dict[str, Any] | Row) -> None:
        line = {"stage": stage, **(vars(value) if isinstance(value, Row) else value)}
        append_line(stem.with_suffix(".jsonl"), line)
        print(in_short(line), flush=True)
        if isinstance(value, Row):
            results.add(value)
            return
        results.numbers.append(line)
        results.roofs = results.roofs.with_number(value)
        if "status" in value:
            write(results, folder, SUMMARY)

    try:
        stages = list(plan_stages(device, PAPER))
        run_stages(stages, lambda: replace(run, roofs=results.roofs), end, hear, log=stem.with_suffix(".log"))
        results.is_complete = True
    except KeyboardInterrupt:
        print("\nstopped: what was measured is written", file=sys.stderr)
    print_and_write(results, folder)
    return results


def print_and_write(results: Results, folder: Path) -> None:
    """Print the table and the names of the files."""
    from bench.plots import draw  # its library loads slowly, and processes that measure do not need it

    print(table(results))
    writers = {**SUMMARY, ".png": draw}
    written = write(results, folder, writers)
    if results.is_complete and len(written) == len(writers):
        shutil.rmtree(folder / (results.name + UNFINISHED), ignore_errors=True)  # a run of limited minutes has none
    for pattern in (".*", "-profile-*", "-counters-*"):
        for path in sorted(folder.glob(results.name + pattern)):
            print(path)


def begin(settings: BenchSettings, plan: Plan, device: torch.device, folder: Path) -> tuple[Folder, Results]:
    """Go on with the stopped run of the same command, or begin a new one: its folder, and the results without any case."""
    here = environment(device)
    identity = asdict(here) | asdict(settings) | {"device": f"{device}, {here.device}"}
    for name in ("timestamp", "out"):  # a run that goes on was begun earlier, and lies in that folder
        del identity[name]
    unfinished = None if here.commit.endswith("-dirty") else stopped_run(folder, identity)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if unfinished and (began := unfinished.description()):
        print(f"going on with {unfinished.path.stem}", file=sys.stderr)
        here, roofs, parts = Environment(**began["environment"]), Roofs(**began["roofs"]), began["parts"] + 1
    else:
        print("measuring the roofs: copies and matrix products", file=sys.stderr)
        roofs, parts = measure_roofs(device, plan.dtypes, quick=settings.quick), 1
        unfinished = Folder(folder / (new_name(folder, here) + UNFINISHED), KIND)
    command = shlex.join(["python", "bench/run.py", *sys.argv[1:]])
    unfinished.begin(identity, command, environment=asdict(here), roofs=asdict(roofs), parts=parts)
    results = Results(here, roofs, plan.omissions, name=unfinished.path.stem, parts=parts)
    results.rows += unsupported_rows(settings.suite, plan.unsupported)
    return unfinished, results


def stopped_run(folder: Path, identity: Mapping[str, Any]) -> Folder | None:
    """The unfinished run of this command on this machine and code; of any other it is said what differs."""
    for path in sorted(folder.glob("*" + UNFINISHED)):
        unfinished = Folder(path, KIND)
        try:
            unfinished.check(identity)
        except InputError as error:
            print(f"not continued: {with_fields(str(error), spelling)}", file=sys.stderr)
        else:
            return unfinished
    return None


def run_plan(plan: Plan, results: Results, device: torch.device, rounds: int, unfinished: Folder) -> None:
    """Run the plan's jobs one after the other, but for those whose rows are in the unfinished run's folder already."""
    with ExitStack() as stack:
        # A compiler cache of earlier runs would make the first call look fast.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = stack.enter_context(tempfile.TemporaryDirectory())
        worker = stack.enter_context(Worker(preload="bench.training_cases"))
        bar = stack.enter_context(tqdm(plan.jobs, unit="case"))
        for number, job in enumerate(bar):
            bar.set_description(f"{job.case.suite}: {job.case.name}, {job.case.mode}, {job.dtype}"[:60])
            result = unfinished.result(name := f"case-{number:04}")
            if result is None:
                rows = measure_apart(worker, job, device, rounds, results.roofs, seed=number)
                unfinished.write_result(name, result := {"rows": [asdict(row) for row in rows]})
            results.rows += [Row(**row) for row in result["rows"]]
    results.is_complete = True


Writer = Callable[[Path, Results], None]
SUMMARY: Mapping[str, Writer] = {".csv": write_csv, ".md": write_markdown}


def write(results: Results, folder: Path, writers: Mapping[str, Writer]) -> list[Path]:
    """Write a run's CSV, summary and picture, as the suffixes say, each atomically; return those that could be written."""
    written = []
    for suffix, writer in writers.items():
        path = folder / (results.name + suffix)
        try:
            writer(path, results)
        except Exception:  # the numbers are on the disk, so the run continues
            print(f"{path} could not be written:", file=sys.stderr)
            traceback.print_exc()
        else:
            written.append(path)
    return written


def unsupported_rows(suites: Sequence[Suite], dtypes: Sequence[str]) -> Iterator[Row]:
    """A row per suite and dtype that the plan leaves out because the processor lacks instructions."""
    for suite, dtype in itertools.product(dict.fromkeys(suites), dtypes):
        note = "the processor has neither AMX nor AVX-512 bf16"
        yield Row(suite=suite, case="all", mode="training", provider="all", dtype=dtype, status=NOT_SUPPORTED, note=note)


if __name__ == "__main__":
    try:
        main(BenchSettings(**vars(parser().parse_args())))
    except InputError as error:
        print(f"error: {with_fields(str(error), spelling)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error}: check the path, its permissions and the disk", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
