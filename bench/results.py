"""Results of a run: one row per case, provider and dtype, and the environment. Written as CSV, whole or not at all."""

import csv
import hashlib
import io
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.cases import EAGER, OURS, OURS_WITHOUT_KERNELS, Suite
from bench.costs import Mode
from bench.estimates import Estimate
from bench.roofline import Roofs
from search.cells.latency import device_label
from search.files import write_text

OK, WRONG, FAILED, NOT_SUPPORTED = "ok", "WRONG", "failed", "not supported here"
NOT_CHECKED = "not checked"  # timed; another stage compares the result, if the time allows
ABOVE_ROOF = "quicker than the roof, which is not stable"  # a row's note
_WORSE = (NOT_CHECKED, OK, FAILED, WRONG)  # of two rows of a case and provider, the status later in this list is kept
DONE, OUT_OF_TIME, NO_TIME = "done", "out of time", "no time left"  # a stage ended by itself, its limit, or the run's
ROOT = Path(__file__).parents[1]
SOURCES = ("reference", "fast", "search", "bench")  # files that a benchmark's times depend on


@dataclass(frozen=True)
class Environment:
    """The machine, versions and commit of a run."""

    device: str
    folder: str  # the device's folder in bench/results
    threads: int
    commit: str
    timestamp: str  # UTC, ISO 8601
    python: str
    torch: str
    triton: str
    cuda: str


@dataclass(kw_only=True)
class Row:
    """One provider's result, filled in while it is measured; a number that was not measured is None."""

    suite: Suite
    case: str
    mode: Mode
    provider: str
    memory_format: str = ""
    dtype: str
    shape: str = ""
    status: str
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    median_low_ms: float | None = None  # the interval of the median
    median_high_ms: float | None = None
    warm_median_ms: float | None = None
    back_to_back_ms: float | None = None
    back_to_back_low_ms: float | None = None
    back_to_back_high_ms: float | None = None
    first_call_s: float | None = None
    peak_memory_mb: float | None = None
    written_mb: float | None = None
    bytes: int | None = None
    flops: int | None = None
    percent_of_roof: float | None = None
    max_error: float | None = None
    rms_error: float | None = None
    ratio_to_best_other: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    rounds: int = 0
    others_percent: float | None = None  # of the processor, while it was timed
    note: str = ""

    @property
    def time(self) -> Estimate | None:
        """The cold time, in milliseconds."""
        if self.median_ms is None:
            return None
        return Estimate(self.median_ms, self.median_low_ms, self.median_high_ms, self.others_percent or 0.0)

    @property
    def step(self) -> Estimate | None:
        """Time of a step in a long training, in milliseconds: back to back, if that was measured."""
        if self.back_to_back_ms is None:
            return self.time
        ends = self.back_to_back_low_ms, self.back_to_back_high_ms
        return Estimate(self.back_to_back_ms, *ends, self.others_percent or 0.0)

    @property
    def is_disturbed(self) -> bool:
        """Whether others used so much of the processor that nothing is concluded from its time."""
        return self.time is not None and self.time.is_disturbed

    @property
    def key(self) -> tuple[str, ...]:
        """The key that the rows of all providers of one case share."""
        return (self.suite, self.case, self.mode, self.dtype, self.shape)


@dataclass
class Results:
    """The results of a run, which grow while it lasts."""

    environment: Environment
    roofs: Roofs
    omissions: tuple[str, ...] = ()
    rows: list[Row] = field(default_factory=list)
    is_complete: bool = False  # it came to the end of its plan, or of its minutes
    parts: int = 1  # number of times it was started
    numbers: list[dict[str, Any]] = field(default_factory=list)  # what stages measured besides rows, and how they ended

    def hear(self, stage: str, value: Row | dict[str, Any]) -> None:
        """Take in what a stage has measured."""
        if isinstance(value, Row):
            self.add(value)
        else:
            self.numbers.append({"stage": stage, **value})
            self.roofs = self.roofs.with_number(value)

    def add(self, row: Row) -> None:
        """A row takes the place of an earlier one of its case and provider: newer numbers, but the worse status of both."""
        old = next((old for old in self.rows if (old.key, old.provider) == (row.key, row.provider)), None)
        if old is None:
            self.rows.append(row)
        else:
            known = {f.name: getattr(old, f.name) for f in fields(Row) if getattr(row, f.name) is None}
            verdict = max(row, old, key=lambda row: _WORSE.index(row.status))
            self.rows[self.rows.index(old)] = replace(row, **known, status=verdict.status, note=verdict.note)
        group = iter(with_ratio([other for other in self.rows if other.key == row.key]))
        self.rows = [next(group) if other.key == row.key else other for other in self.rows]

    def groups(self, suite: Suite | None = None) -> Iterator[list[Row]]:
        """Yield the rows of one case after the other, of all providers."""
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in self.rows:
            if suite in (None, row.suite):
                groups.setdefault(row.key, []).append(row)
        yield from groups.values()

    def failures(self) -> list[str]:
        """Our results that were wrong or failed; a stage that reached its time limit is not counted."""
        rows = [f"{row.case}, {row.dtype}: {row.status}" for row in self.rows if row.provider == OURS.name]
        found = [text for text in rows if text.endswith((WRONG, FAILED))]
        for number in self.numbers:
            is_ours = number.get("provider") == OURS.name and number.get("result") in (WRONG, FAILED)
            if is_ours or "failed_test" in number or number.get("status", DONE) not in (DONE, OUT_OF_TIME, NO_TIME):
                found.append(number["stage"])
        return list(dict.fromkeys(found))


def append_line(path: Path, value: object) -> None:
    """One more line of JSON, on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")
        file.flush()
        os.fsync(file.fileno())


def right(rows: Iterable[Row]) -> list[Row]:
    """The rows that may be compared: those of right results."""
    return [row for row in rows if row.status == OK and row.median_ms]


def ours(rows: Iterable[Row]) -> Row | None:
    """Our row of a case, if it is right and was timed."""
    return next((row for row in right(rows) if row.provider == OURS.name), None)


def best_other(rows: Iterable[Row]) -> Row | None:
    """The quickest right row that is not ours."""
    others = [row for row in right(rows) if row.provider != OURS.name]
    return min(others, key=lambda row: row.median_ms or 0.0, default=None)


def eager(rows: Iterable[Row]) -> Row | None:
    """The row of eager PyTorch in its default layout; for a search that of our code on the library's operations."""
    return next((row for row in right(rows) if row.provider in (EAGER.name, OURS_WITHOUT_KERNELS.name)), None)


def speed(rows: Iterable[Row]) -> Estimate | None:
    """Time of the best other provider divided by ours, also where others disturbed one of them."""
    group = list(rows)
    times = [row.time if row else None for row in (best_other(group), ours(group))]
    return times[0].over(times[1]) if times[0] and times[1] else None


def ratio(rows: Iterable[Row]) -> float | None:
    """The value of `speed`; None where others disturbed it."""
    found = speed(rows)
    return None if found is None or found.is_disturbed else found.value


def with_ratio(group: list[Row]) -> list[Row]:
    """The rows of one case; ours with its ratio to the best other."""
    found = speed(group)
    known = (None, None, None) if found is None or found.is_disturbed else (found.value, found.low, found.high)
    names = ("ratio_to_best_other", "ratio_low", "ratio_high")
    changes: dict[str, Any] = dict(zip(names, known, strict=True))
    return [replace(row, **changes) if row.provider == OURS.name else row for row in group]


def write_csv(path: Path, results: Results) -> None:
    """All rows, each with the environment."""
    provenance = {f.name: getattr(results.environment, f.name) for f in fields(Environment) if f.name != "folder"}
    rows = [(asdict(row) | provenance).values() for row in results.rows]
    write_table(path, [*(f.name for f in fields(Row)), *provenance], rows)


def write_table(path: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """A CSV file with floats of six digits, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([f"{value:.6g}" if isinstance(value, float) else value for value in row] for row in rows)
    write_text(path, text.getvalue())


def environment(device: torch.device, out: Path) -> Environment:
    """This machine, and this checkout but for the folder of results."""
    name = device_name(device)
    return Environment(
        device=name,
        folder=folder_name(name),
        threads=torch.get_num_threads(),
        commit=_commit(out),
        timestamp=datetime.now(UTC).isoformat(timespec="seconds"),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_version("triton"),
        cuda=torch.version.cuda or "none" if device.type == "cuda" else "none",
    )


def device_name(device: torch.device) -> str:
    """The graphics card as its driver calls it, or the processor and how many cores of it this process may use."""
    label = device_label(device)
    if device.type == "cuda":
        return label
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{label.rpartition(', ')[0]}, {cores} cores"  # in the place of the threads in use


def folder_name(name: str) -> str:
    """
    >>> folder_name("AMD EPYC, 2 cores"), folder_name("Intel(R) Xeon(R) CPU @ 2.20GHz, 4 cores")
    ('amd-epyc-2-cores', 'intel-xeon-cpu-2-20ghz-4-cores')
    """
    plain = re.sub(r"\((r|tm)\)", "", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def _commit(out: Path) -> str:
    """The short hash, with -dirty where tracked or new files differ from it; outside a checkout, a hash of the sources."""
    inside = [path.relative_to(ROOT) for path in (ROOT / "bench" / "results", out.resolve()) if ROOT in path.parents]
    try:
        changes = _git("status", "--porcelain", "--", ".", *(f":!{path}" for path in inside))
        short = _git("rev-parse", "--short", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        digest = hashlib.sha256()
        for path in sorted(
            path for room in SOURCES for path in (ROOT / room).rglob("*") if path.suffix in (".py", ".h", ".cpp")
        ):
            digest.update(path.read_bytes())
        return f"sources-{digest.hexdigest()[:8]}"
    return f"{short}-dirty" if changes else short


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
