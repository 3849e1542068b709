"""The benchmark: `python bench/run.py`, from the repository's root (bench/README.md says how to read what it writes)."""

import argparse
import itertools
import json
import math
import os
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout, whether one is installed or not

from bench.cases import DTYPES, SUITES, DType, Suite
from bench.launch_trial import SHARED_BYTES, triton_cache
from bench.measure import Run
from bench.plans import PAPER, QUICK, Plan, make_plan, plan_of_minutes
from bench.report import in_short, table, write_markdown
from bench.results import NOT_SUPPORTED, Environment, Results, Row, environment, write_csv
from bench.roofline import NO_ROOFS
from bench.runner import Value, run_stages
from bench.stages import compile_kernels
from search.devices import resolve_device
from search.errors import InputError, as_flag, with_fields
from search.folder import Folder, differences

KIND = "benchmark"  # of folders, in error messages
CLOSING_S = 12.0  # reserved in a run of limited minutes for imports, the last summary and the picture


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """The flags, as `parser` explains them."""

    suite: Sequence[Suite] = SUITES
    dtype: Sequence[DType] | None = None
    device: str = "auto"
    quick: bool = False
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
        help="in which dtypes (default: on a GPU bfloat16 and float32, on a CPU float32, and bfloat16 where the processor has "
        "instructions for it; with --quick the first of these)",
    )
    flags.add_argument("--device", help="cpu, cuda, cuda:1, ...; auto, the default, takes the GPU if there is one")
    flags.add_argument(
        "--quick", action="store_true", help="a look: one shape, one rate, few rounds; two minutes on two cores"
    )
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
        count = compile_kernels(settings.compile_for, plan_of_minutes(torch.device("cuda"), PAPER).jobs)
        print(f"\n{count} kernels in {triton_cache()}")
        return
    device = torch.device(resolve_device(settings.device))
    if device.type == "cpu" and "float16" in (settings.dtype or ()):
        raise InputError("--dtype float16 is measured on a GPU alone: this run is on the CPU")
    here = environment(device, settings.out)
    parent = settings.out / here.folder
    with Folder(parent, remedy="stop it: two at once would disturb each other's times").locked():
        results = run(settings, device, parent, here)
    if not results.is_complete:
        sys.exit(130)
    if failures := results.failures():
        print("wrong or failed: " + "; ".join(failures), file=sys.stderr)
        sys.exit(1)


def check(settings: BenchSettings) -> None:
    """Raise InputError for flags that cannot work."""
    if settings.rounds is not None and settings.rounds < 1:
        raise InputError(f"--rounds must be at least 1, got {settings.rounds}")
    if settings.minutes is not None:
        if not settings.minutes > 0:
            raise InputError(f"--minutes must be more than 0, got {settings.minutes:g}")
        if settings.quick or tuple(settings.suite) != SUITES or settings.dtype:
            raise InputError("--minutes has a plan of its own: leave out --suite, --dtype and --quick")


def run(settings: BenchSettings, device: torch.device, parent: Path, here: Environment) -> Results:
    """Run the plan to its end, to Ctrl-C or as far as the minutes go; what is known is written after every stage."""
    end = math.inf
    if settings.minutes is None:
        plan = make_plan(settings.suite, device, quick=settings.quick, dtypes=settings.dtype)
    else:
        end = time.monotonic() + 60 * settings.minutes - min(CLOSING_S, 6 * settings.minutes)
        plan = plan_of_minutes(device, PAPER)
    folder, results = begin(settings, plan, device, parent, here)
    rounds = settings.rounds or (QUICK if settings.quick else PAPER).rounds
    measured = Run(str(device), torch.get_num_threads(), rounds, results.roofs, folder.path)

    def tell(stage: str, value: Value) -> None:
        if settings.minutes is not None:
            tqdm.write(in_short(vars(value) if isinstance(value, Row) else {"stage": stage, **value}))
            sys.stdout.flush()
        if isinstance(value, dict) and "status" in value:
            write(results, folder.path, SUMMARY)

    with ExitStack() as stack:
        if settings.minutes is None:  # a compiler's cache of earlier runs would make the first call look fast
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = stack.enter_context(tempfile.TemporaryDirectory())
        try:
            left = run_stages(plan.stages, measured, results, end, tell)
        except KeyboardInterrupt:
            left = 1  # at least
    print_and_write(results, folder, is_whole=not left)
    if left:
        why = f"no time was left for {left} stages" if results.is_complete else "stopped"
        goes_on = "begins anew, because of uncommitted changes" if here.commit.endswith("-dirty") else "goes on"
        print(f"{why}: the same command {goes_on}", file=sys.stderr)
    return results


def begin(
    settings: BenchSettings, plan: Plan, device: torch.device, parent: Path, here: Environment
) -> tuple[Folder, Results]:
    """Go on with the stopped run of the same command, or begin a new one: its folder, and the results without any stage."""
    identity = asdict(here) | asdict(settings) | {"device": f"{device}, {here.device}"}
    identity["minutes"] = settings.minutes is not None  # which plan; no number depends on how many minutes
    for name in ("timestamp", "out"):  # a run that goes on was begun earlier, and lies in that folder
        del identity[name]
    folder = None if here.commit.endswith("-dirty") else stopped_run(parent, identity)
    parts = 1
    if folder and (began := folder.description()):
        print(f"going on with {folder.path}", file=sys.stderr)
        try:
            here, parts = Environment(**began["environment"]), int(began["parts"]) + 1
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder.path}/settings.json is damaged ({error}): delete that folder") from error
    else:
        folder = Folder(new_path(parent, here), KIND)
        print(f"a new run, {folder.path}", file=sys.stderr)
    command = shlex.join(["python", "bench/run.py", *sys.argv[1:]])
    folder.begin(identity, command, environment=asdict(here), parts=parts, is_whole=False)
    rows = list(unsupported_rows(settings.suite, plan.unsupported))
    return folder, Results(here, NO_ROOFS, plan.omissions, rows, parts=parts)


def stopped_run(parent: Path, identity: Mapping[str, Any]) -> Folder | None:
    """The stopped run of this command on this machine and code; of any other it is said what differs."""
    for path in sorted(parent.glob("*/settings.json")):
        folder = Folder(path.parent, KIND)
        try:
            began = folder.description() or {}
        except InputError as error:
            print(f"{path.parent} does not go on: {error}", file=sys.stderr)
            continue
        if began.get("is_whole"):
            continue
        other = differences(began["identity"], json.loads(json.dumps(identity)))
        if not other:
            return folder
        print(f"{path.parent} does not go on: begun with {with_fields(other, spelling)}", file=sys.stderr)
    return None


def new_path(parent: Path, here: Environment) -> Path:
    """<date>-<commit>, with "-2" for a second run of the same day and commit, so that none replaces another."""
    name = f"{here.timestamp[:10]}-{here.commit}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(path for path in map(parent.joinpath, names) if not path.exists())


def print_and_write(results: Results, folder: Folder, *, is_whole: bool) -> None:
    """Print the table and the names of the files; a run that is whole does not go on. Exits with 1 if a file is missing."""
    from bench.plots import draw  # its library loads slowly, and processes that measure do not need it

    print(table(results))
    writers = {**SUMMARY, "summary.png": draw}
    has_all = len(write(results, folder.path, writers)) == len(writers)
    if has_all and is_whole:
        began = folder.description() or {}
        facts = {name: began[name] for name in ("environment", "parts")}
        folder.begin(began["identity"], began["command"], **facts, is_whole=True)
    for path in sorted(path for path in folder.path.iterdir() if path.is_file()):
        print(path)
    if not has_all:
        print("a file is missing: make room, and the same command writes it", file=sys.stderr)
        sys.exit(1)


Writer = Callable[[Path, Results], None]
SUMMARY: Mapping[str, Writer] = {"rows.csv": write_csv, "summary.md": write_markdown}


def write(results: Results, folder: Path, writers: Mapping[str, Writer]) -> list[Path]:
    """Write the files of a run, each atomically; return those that could be written."""
    written = []
    for name, writer in writers.items():
        path = folder / name
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
    except BrokenPipeError:  # who reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"error: {error}: check the path, its permissions and the disk", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
