"""Find the fastest launch of each Triton kernel on this GPU, and write it for the kernels to use: `python bench/tune.py`.

For every line of the launch table it tries launches near the best so far, on the calls of a training iteration. They are
compiled by processes without the GPU, dropped if they spill, run in a separate process, compared with the counted launch's
results, and timed in turns with the best. What matters most to an iteration comes first; every trial is saved before the next.
"""

import argparse
import ast
import hashlib
import itertools
import json
import math
import os
import queue
import re
import shlex
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, Self

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout of this file

import torch

from bench import launch_trial
from bench.launch_trial import SHARED_BYTES, Comparison
from bench.results import append_line
from bench.worker import OutOfTime, Worker, WorkerLost, WorkFailed
from fast.checkpoint import write_whole
from fast.kernels import triton as kernels
from fast.kernels.triton.launches import DEFAULT, SIZES, Key, Launch, Table, file_stem, measured
from search.devices import resolve_device
from search.errors import InputError, with_fields

ROOT = Path(__file__).parents[1]
LAUNCHES = ROOT / "fast" / "kernels" / "triton" / "launches"
_TILE, _WIDE, _WARPS = (16, 32, 64, 128), (32, 64, 128, 256), (2, 4, 8)
_PRODUCT = {"block_p": _WIDE, "block_n": _WIDE, "block_k": (16, 32, 64), "warps": (4, 8), "stages": (2, 3, 4)}
# What is tried, per kernel; the kernels in the order of their shares of an iteration, as counted.
CHOICES: dict[str, dict[str, tuple[int, ...]]] = {
    "depthwise_backward": {"block_p": _TILE, "block_n": _TILE, "warps": _WARPS},
    "pointwise_input_gradient": _PRODUCT,
    "pointwise_forward": _PRODUCT | {"block_k": (16, 32, 64, 128)},
    "pointwise_weight_gradient": _PRODUCT | {"programs": (132, 264, 528)},
    "cell_gradients": {"block_p": (8, 16, 32), "warps": (1, 2, 4)},
    "depthwise_forward": {"block_p": _TILE, "block_n": _TILE, "warps": _WARPS},
    "fold": {"block_p": (128, 256, 512, 1024), "block_n": (1, 2, 4, 8, 16), "warps": _WARPS},
    "sum_partials": {"block_p": (16, 32, 64, 128, 256, 512), "block_n": (4, 8, 16, 32, 64), "warps": _WARPS},
    "unfold": {"block_n": _WIDE, "warps": (1, 2, 4)},
    "mean_loss": {"block_p": (1024, 2048, 4096, 8192), "warps": (4, 8, 16, 32)},
    "gather_corners": {"block_p": _TILE, "warps": _WARPS},
    "normalise": {"block_p": _TILE, "block_n": (*_TILE, 256), "warps": _WARPS},
    "normalise_backward": {"block_p": _TILE, "block_n": (*_TILE, 256), "warps": _WARPS},
    "separable_inference": _PRODUCT | {"block_p": _TILE, "block_n": (64, 128, 256), "stages": (1, 2, 3)},
    "confusion_matrix": {"block_p": (16, 32, 64), "warps": (1, 2, 4)},
}
AHEAD = 16  # candidates of a key that are compiled in advance
BETTER, NOT_BETTER, WRONG, FAILED, NO_FIT = "better", "not better", "WRONG", "failed", "does not fit"


class Trial(NamedTuple):
    """The result of one candidate: a line of the journal."""

    key: Key
    launch: Launch
    verdict: str
    best_us: float | None = None  # time of the best launch until then, in the same turns
    us: float | None = None
    note: str = ""


class Journal:
    """All trials on one GPU with the same versions and kernels, in a file with one JSON line for each."""

    def __init__(self, path: Path, identity: str) -> None:
        self.trials: list[Trial] = []
        self._path, self._identity = path, identity
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if text and not text.endswith("\n"):  # the tuner was ended while it wrote this line
            path.write_text(text + "\n", encoding="utf-8")
        for line in text.splitlines():
            try:
                identity_then, key, launch, *rest = json.loads(line)
                if identity_then == identity:
                    self.trials.append(Trial((key[0], key[1], key[2]), Launch(*launch), *rest))
            except (ValueError, TypeError, IndexError):
                continue

    def add(self, trial: Trial) -> None:
        self.trials.append(trial)
        append_line(self._path, [self._identity, *trial])

    def of(self, key: Key) -> list[Trial]:
        return [trial for trial in self.trials if trial.key == key]

    def best(self, key: Key) -> Launch:
        return next((trial.launch for trial in reversed(self.of(key)) if trial.verdict == BETTER), DEFAULT[key])


def candidates(kernel: str, best: Launch, changes: int) -> list[Launch]:
    """Launches that differ from `best` in at most the given number of fields; fewest fields first, then smallest steps."""
    found: list[tuple[int, float, Launch]] = []
    for values in itertools.product(*CHOICES[kernel].values()):
        launch = best._replace(**dict(zip(CHOICES[kernel], values, strict=True)))
        steps = [abs(math.log2(new / old)) for new, old in zip(launch, best, strict=True) if new != old]
        if 1 <= len(steps) <= changes:
            found.append((len(steps), sum(steps), launch))
    return [launch for _, _, launch in sorted(found)]


def untried(key: Key, journal: Journal, changes: int, known: Table) -> list[Launch]:
    """The next candidates, beginning with the launch of an earlier table."""
    tried = {DEFAULT[key], *(trial.launch for trial in journal.of(key))}
    near = [known[key]] if key in known else []
    return [launch for launch in [*near, *candidates(key[0], journal.best(key), changes)] if launch not in tried]


def search(
    key: Key,
    journal: Journal,
    examine: Callable[[Key, Launch, list[Launch]], Trial],
    *,
    changes: int,
    is_over: Callable[[], bool],
    known: Table,
) -> bool:
    """Try launches near the best so far until none is untried (True) or the time is over (False)."""
    while left := untried(key, journal, changes, known):
        if is_over():
            return False
        try:
            trial = examine(key, journal.best(key), left)
        except TimeoutError:
            return False
        journal.add(trial)
        times = "" if trial.us is None else f"{trial.best_us:.2f} -> {trial.us:.2f} us "
        print(f"{' '.join(map(str, key))}: {tuple(trial.launch)} {times}{trial.verdict} {trial.note}".rstrip(), flush=True)
    return True


class Compilers:
    """Processes without the GPU that compile launches into Triton's cache on disk, in the order of the requests."""

    def __init__(self, architecture: int, processes: int) -> None:
        self._architecture = architecture
        self._pool = ThreadPoolExecutor(processes)
        self._workers = [Worker() for _ in range(processes)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._futures: dict[tuple[Key, Launch], Future[dict[str, int]]] = {}

    def begin(self, key: Key, launches: Iterable[Launch]) -> None:
        for launch in launches:
            if (key, launch) not in self._futures:
                self._futures[key, launch] = self._pool.submit(self._compile, key, launch)

    def usage(self, key: Key, launch: Launch, limit_s: float | None = None) -> dict[str, int]:
        """The GPU resources that the compiled kernel uses. Raises WorkFailed, WorkerLost, TimeoutError."""
        self.begin(key, [launch])
        return self._futures[key, launch].result(limit_s)

    def _compile(self, key: Key, launch: Launch) -> dict[str, int]:
        worker = self._idle.get()
        try:
            usage: dict[str, int] = worker(launch_trial.compiled, key, launch, self._architecture, limit_s=120)
            return usage
        finally:
            self._idle.put(worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.kill()
        self._pool.shutdown()
        for worker in self._workers:
            worker.close()


class Examiner:
    """Compiles a candidate, then compares it on the device, in a separate process because it may crash."""

    def __init__(self, compilers: Compilers, device: str, shared_bytes: int, end: float) -> None:
        self._compilers, self._device, self._shared_bytes, self._end = compilers, device, shared_bytes, end
        self._worker = Worker()

    def __call__(self, key: Key, best: Launch, left: list[Launch]) -> Trial:
        """Examine the first remaining candidate while the next ones are compiled. Raises TimeoutError at the time limit."""
        candidate = left[0]
        self._compilers.begin(key, left[:AHEAD])
        try:
            if misfit := why_not(self._compilers.usage(key, candidate, self._left_s()), self._shared_bytes):
                return Trial(key, candidate, NO_FIT, note=misfit)
            for launch in (DEFAULT[key], best):
                self._compilers.usage(key, launch, self._left_s())
            arguments = (key, best, candidate, self._device)
            return judged(key, candidate, self._worker(launch_trial.compared, *arguments, limit_s=min(60.0, self._left_s())))
        except OutOfTime as error:
            if self._left_s() <= 0:
                raise TimeoutError from error  # the candidate is not the cause
            return Trial(key, candidate, FAILED, note=str(error))
        except (WorkFailed, WorkerLost) as error:
            return Trial(key, candidate, FAILED, note=str(error))

    def _left_s(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()


def why_not(usage: dict[str, int], shared_bytes: int) -> str:
    """The reason not to measure a compiled launch, or an empty text."""
    spilled = usage.get("stack", 0) + usage.get("local", 0)
    if spilled:
        return f"spills {spilled} bytes per thread"
    return f"needs {usage['shared']} bytes of shared memory" if usage["shared"] > shared_bytes else ""


def judged(key: Key, candidate: Launch, comparison: Comparison) -> Trial:
    """The trial of a comparison: a wrong candidate has no time; a right one is better only by more than the spread."""
    if not comparison.error <= comparison.limit:
        return Trial(key, candidate, WRONG, note=f"error {comparison.error:.1e}, limit {comparison.limit:.0e}")
    verdict = BETTER if comparison.is_better else NOT_BETTER
    return Trial(key, candidate, verdict, comparison.best.median, comparison.candidate.median)


def keys_of(chosen: Sequence[str]) -> list[Key]:
    """The keys of the launch table for these kernels: the proxy's sizes first, bfloat16 before float32 maps."""
    keys = [key for key in DEFAULT if key[0] in chosen]
    has_two = {kernel for kernel, value_bytes, _ in DEFAULT if value_bytes == 2}
    order = list(CHOICES)
    return sorted(keys, key=lambda key: (SIZES.index(key[2]), key[0] in has_two and key[1] == 4, order.index(key[0])))


def tune(keys: list[Key], journal: Journal, compilers: Compilers, examine: Examiner, end: float, known: Table) -> list[str]:
    """Tune every key with one change at a time, then with two at once; return in words what was not reached."""
    for changes in (1, 2):
        for i, key in enumerate(keys):
            for ahead in keys[i : i + 3]:  # so that the GPU does not wait for compilers
                compilers.begin(ahead, [DEFAULT[ahead], *untried(ahead, journal, changes, known)[:AHEAD]])
            if not search(key, journal, examine, changes=changes, is_over=lambda: time.monotonic() > end, known=known):
                return [f"not reached with {changes} changed at once: {' '.join(map(str, key))}" for key in keys[i:]]
    return []


def compile_ahead(keys: list[Key], compilers: Compilers, end: float, shared_bytes: int) -> None:
    """Compile all candidates near the counted launches into Triton's cache, until the time is over."""
    wanted = [(key, [DEFAULT[key], *candidates(key[0], DEFAULT[key], n)]) for n in (1, 2) for key in keys]
    pairs = list(dict.fromkeys((key, launch) for key, launches in wanted for launch in launches))
    for key, launch in pairs:
        compilers.begin(key, [launch])
    ends = Counter[str]()
    try:
        for key, launch in pairs:
            ends[_end_of_compilation(key, launch, compilers, end, shared_bytes)] += 1
            print(f"\r{ends.total()} of {len(pairs)} launches", end="", file=sys.stderr, flush=True)
    except TimeoutError:
        print("\nthe time is over: the same command goes on", file=sys.stderr)
    finally:  # Ctrl-C too
        result = f"{ends[NO_FIT]} would spill or not fit; {ends[FAILED]} failed"
        compiled = ends.total() - ends[FAILED]
        print(f"\n{compiled} of {len(pairs)} launches compiled into {launch_trial.triton_cache()}: {result}")


def _end_of_compilation(key: Key, launch: Launch, compilers: Compilers, end: float, shared_bytes: int) -> str:
    """NO_FIT, FAILED or nothing to say. Raises TimeoutError at the end of the time."""
    try:
        return NO_FIT if why_not(compilers.usage(key, launch, max(0.0, end - time.monotonic())), shared_bytes) else ""
    except (WorkFailed, WorkerLost) as error:
        print(f"{' '.join(map(str, key))}: {tuple(launch)} {FAILED} {error}", flush=True)
        return FAILED


class Entry(NamedTuple):
    """A launch of a written table, with the line that it stands in."""

    launch: Launch
    line: str


TABLE = '''"""Launches that are quicker than the counted ones on {gpu}; written by `bench/tune.py`.

{date}, {versions}:

{command}

Behind each launch: all its calls in an iteration with the counted launch -> with this one, cold caches.
"""

from fast.kernels.triton.launches import {names}

LAUNCHES: Table = {{{entries}}}
'''


def table_text(gpu: str, versions: str, command: str, date: str, journal: Journal, earlier: dict[Key, Entry]) -> str:
    """The Python module of a GPU's launches: those that the journal found better, and earlier entries that were not tried."""
    tried = {(trial.key, trial.launch) for trial in journal.trials}
    lines = {key: entry.line for key, entry in earlier.items() if (key, entry.launch) not in tried}
    lines |= {key: line for key in DEFAULT if (line := _line(key, journal))}
    entries = "".join(f"\n{lines[key]}" for key in DEFAULT if key in lines)
    return TABLE.format(
        gpu=gpu,
        versions=versions,
        date=date,
        command=textwrap.fill(command, 120, initial_indent="    ", subsequent_indent=8 * " ", break_on_hyphens=False),
        names="Launch, Table" if entries else "Table",
        entries=f"{entries}\n" if entries else "",
    )


def _line(key: Key, journal: Journal) -> str:
    """The entry of the best launch that was found; nothing where none was."""
    better = [trial for trial in journal.of(key) if trial.verdict == BETTER]
    if not better:
        return ""
    best = better[-1].launch
    launch = ", ".join(map(str, best if best.programs else best[:5]))
    return f'    ("{key[0]}", {key[1]}, "{key[2]}"): Launch({launch}),  # {better[0].best_us:.2f} -> {better[-1].us:.2f} us'


def entries_of(path: Path) -> dict[Key, Entry]:
    """Read the entries of an earlier table."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.finditer(r'^    (\("\w+", \d, "\w+"\)): Launch(\([\d, ]+\)),.*$', text, re.MULTILINE)
    return {ast.literal_eval(match[1]): Entry(Launch(*ast.literal_eval(match[2])), match[0]) for match in found}


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune, or compile ahead. Exits with 2 where neither can be done, with 130 after Ctrl-C."""
    flags = parser()
    options = flags.parse_args(arguments)
    if not options.minutes > 0:
        flags.exit(2, f"--minutes must be more than 0, got {options.minutes:g}\n")
    end, keys = time.monotonic() + 60 * options.minutes, keys_of(options.kernels)
    processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if options.compile_for:
        try:
            with Compilers(options.compile_for, processes) as compilers:
                compile_ahead(keys, compilers, end, SHARED_BYTES[options.compile_for])
        except KeyboardInterrupt:
            sys.exit(130)
        return
    if not kernels.is_available():
        flags.exit(2, "no GPU that Triton can use: tune on a machine with one, or compile ahead by --compile-for 90\n")
    try:
        options.device = resolve_device(options.device)  # with its number
    except InputError as error:
        flags.exit(2, with_fields(f"{error}\n", lambda field: f"--{field}"))
    command = shlex.join(["python", "bench/tune.py", *(sys.argv[1:] if arguments is None else arguments)])
    sys.exit(run(options, keys, end, processes, command))


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--minutes", type=float, default=4.0, help="when to stop, with what is known then (default: 4)")
    flags.add_argument("--device", default="cuda:0")
    flags.add_argument("--kernels", nargs="+", choices=list(CHOICES), default=list(CHOICES), help="default: all")
    flags.add_argument("--out", type=Path, help=f"default: {LAUNCHES.relative_to(ROOT)}/<gpu>.py")
    without_gpu = "only fill Triton's cache, for such a GPU; needs none"
    flags.add_argument("--compile-for", type=int, choices=sorted(SHARED_BYTES), help=without_gpu)
    return flags


def run(options: argparse.Namespace, keys: list[Key], end: float, processes: int, command: str) -> int:
    """Tune on the device, write the table however it ends, print what was not reached, and return the exit code."""
    gpu, properties = torch.cuda.get_device_name(options.device), torch.cuda.get_device_properties(options.device)
    out = options.out or LAUNCHES / f"{file_stem(gpu)}.py"
    versions = f"torch {torch.__version__}, Triton {version('triton')}"
    journal = Journal(out.with_suffix(".jsonl"), f"{gpu}, {versions}, sources {sources_hash()}")
    earlier, code, unreached = entries_of(out), 0, []
    known = measured(gpu) | {key: entry.launch for key, entry in earlier.items()}
    architecture = 10 * properties.major + properties.minor
    shared_bytes = SHARED_BYTES.get(architecture, sys.maxsize)  # for an unknown GPU, Triton itself refuses what does not fit
    try:
        with (
            Compilers(architecture, max(1, processes - 1)) as compilers,
            Examiner(compilers, options.device, shared_bytes, end) as examine,
        ):
            unreached = tune(keys, journal, compilers, examine, end, known)
    except KeyboardInterrupt:
        code, unreached = 130, ["stopped by Ctrl-C: the same command goes on"]
    finally:
        date = datetime.now(UTC).date().isoformat()
        write_whole(out, table_text(gpu, versions, command, date, journal, earlier).encode())
    print("\n".join([*unreached, str(out)]))
    return code


def sources_hash() -> str:
    """A hash of what a time depends on: the kernels, how they are called, the counted table."""
    folder = ROOT / "fast" / "kernels" / "triton"
    calls = [ROOT / "bench" / name for name in ("kernel_calls.py", "launch_trial.py")]
    paths = [*sorted(folder.glob("*.py")), folder / "launches" / "__init__.py", *calls]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


if __name__ == "__main__":
    main()
