"""Find the fastest launch of each Triton kernel on this GPU, and write it for the kernels to use: `python bench/tune.py`.

For every line of the launch table it tries launches near the best so far, on the calls of a training iteration. They are
compiled by processes without the GPU, dropped if they spill, run in a separate process, compared with the counted launch's
results, and timed in turns with the best. What matters most to an iteration comes first; every trial is saved before the next.
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import os
import queue
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Self

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout of this file

import torch

from bench import launch_trial
from bench.launch_trial import BETTER, COMPILED, FAILED, NO_FIT, SHARED_BYTES, Trial, triton_cache
from bench.results import append_line
from bench.worker import Worker, WorkerLost, WorkFailed
from fast.kernels import triton as kernels
from fast.kernels.triton.launches import DEFAULT, FOLDER, SIZES, Key, Launch, Measured, Table, measured, path_of
from search.devices import resolve_device
from search.errors import InputError, with_fields
from search.files import write_json

ROOT = Path(__file__).parents[1]
_TILE, _WIDE, _WARPS = (16, 32, 64, 128), (32, 64, 128, 256), (2, 4, 8)
_PRODUCT = {"block_p": _WIDE, "block_n": _WIDE, "block_k": (16, 32, 64), "warps": (4, 8), "stages": (2, 3, 4)}
# At 4 warps, so many registers leave room for six, five, four and three programs on a multiprocessor.
_WALK = {"block_p": (2, 4, 8, 16), "block_n": (32, 64, 128), "warps": _WARPS, "registers": (80, 96, 128, 168)}
# What is tried, per kernel; the kernels in the order of their shares of an iteration, as counted.
CHOICES: dict[str, dict[str, tuple[int, ...]]] = {
    "depthwise_backward": _WALK | {"programs": (264, 396, 528, 660)},
    "pointwise_input_gradient": _PRODUCT,
    "pointwise_forward": _PRODUCT | {"block_k": (16, 32, 64, 128)},
    "pointwise_weight_gradient": _PRODUCT | {"programs": (132, 264, 528)},
    "cell_gradients": {"block_p": (32, 64, 128, 256), "warps": (1, 2, 4)},
    "depthwise_forward": _WALK | {"programs": (396, 528, 660, 792)},
    "fold": {"block_p": (128, 256, 512, 1024), "block_n": (1, 2, 4, 8, 16), "warps": _WARPS},
    "sum_partials": {"block_p": (16, 32, 64, 128, 256, 512), "block_n": (4, 8, 16, 32, 64, 128), "warps": _WARPS},
    "sum_gradients": {"block_p": (512, 1024, 2048, 4096), "warps": _WARPS},
    "unfold": {"block_n": _WIDE, "warps": (1, 2, 4)},
    "crops": {"block_p": (256, 512, 1024), "block_n": (512, 1024, 2048, 4096), "warps": (1, 2, 4)},
    "mean_loss": {"block_p": (1024, 2048, 4096, 8192), "warps": (4, 8, 16, 32)},
    "gather_corners": {"block_p": _TILE, "warps": _WARPS},
    "normalise": {"block_p": _TILE, "block_n": (*_TILE, 256), "warps": _WARPS},
    "normalise_backward": {"block_p": _TILE, "block_n": (*_TILE, 256), "warps": _WARPS},
    "confusion_matrix": {"block_p": (16, 32, 64), "warps": (1, 2, 4)},
}
AHEAD = 32  # candidates that are compiled in advance

Candidate = tuple[Key, Launch]


class Journal:
    """All trials on one GPU with the same versions and kernels; in a file, if there is one, a JSON line for each."""

    def __init__(self, path: Path | None = None, identity: str = "") -> None:
        self.trials: list[Trial] = []
        self._path, self._identity = path, identity
        if path and path.exists():
            lines = path.read_text(encoding="utf-8").split("\n")
            if lines[-1]:  # the tuner was ended while it wrote this line
                path.write_text("\n".join([*lines[:-1], ""]), encoding="utf-8")
            for line in lines[:-1]:
                try:
                    identity_then, key, launch, *rest = json.loads(line)
                    if identity_then == identity:
                        self.trials.append(Trial((key[0], key[1], key[2]), Launch(*launch), *rest))
                except (ValueError, TypeError, LookupError):  # a damaged line: it is tried again
                    continue

    def add(self, trial: Trial) -> None:
        self.trials.append(trial)
        if self._path:
            append_line(self._path, [self._identity, *trial])

    def found(self) -> dict[Key, Measured]:
        """The best launch of every key for which one is better than the counted launch."""
        found: dict[Key, Measured] = {}
        for trial in self.trials:
            if trial.verdict == BETTER:  # than the last that was
                first_us = found[trial.key].counted_us if trial.key in found else trial.best_us
                found[trial.key] = Measured(trial.launch, first_us, trial.us)
        return found

    def best(self) -> Table:
        """The best launch so far of every key."""
        return DEFAULT | {key: entry.launch for key, entry in self.found().items()}


@functools.cache
def near(kernel: str, best: Launch, changes: int) -> list[Launch]:
    """Launches that differ from `best` in at most the given number of fields; fewest fields first, then smallest steps."""
    found: list[tuple[int, float, Launch]] = []
    for values in itertools.product(*CHOICES[kernel].values()):
        launch = best._replace(**dict(zip(CHOICES[kernel], values, strict=True)))
        steps = [abs(math.log2(new / old)) for new, old in zip(launch, best, strict=True) if new != old]
        if 1 <= len(steps) <= changes:
            found.append((len(steps), sum(steps), launch))
    return [launch for _, _, launch in sorted(found)]


def untried(keys: Sequence[Key], journal: Journal, known: Table) -> Iterator[tuple[int, Candidate]]:
    """What is left to try as the journal stands, in order, with the number of changes: one of every key's best, then two.

    The known launch of an earlier table comes before all others of its key.
    """
    best, tried = journal.best(), {(trial.key, trial.launch) for trial in journal.trials}
    for changes in (1, 2):
        for key in keys:
            for launch in (known.get(key, DEFAULT[key]), *near(key[0], best[key], changes)):
                if launch != DEFAULT[key] and (key, launch) not in tried:
                    yield changes, (key, launch)


def tune(keys: Sequence[Key], journal: Journal, examine: Callable[[list[Candidate], Launch], Trial], known: Table) -> None:
    """Try one candidate after the other until none is left or the time is over; say what was not reached, also at Ctrl-C."""
    try:
        while ahead := [candidate for _, candidate in itertools.islice(untried(keys, journal, known), AHEAD)]:
            trial = examine(ahead, journal.best()[ahead[0][0]])
            journal.add(trial)
            times = f"{trial.best_us:.2f} -> {trial.us:.2f} us " if trial.us else ""
            print(f"{words(trial.key)}: {tuple(trial.launch)} {times}{trial.verdict} {trial.note}".rstrip(), flush=True)
    except TimeoutError:
        pass
    finally:
        left = list(dict.fromkeys((changes, key) for changes, (key, _) in untried(keys, journal, known)))
        for changes, key in left:
            if changes == left[0][0]:
                print(f"not reached with {changes} changed at once: {words(key)}")


def words(key: Key) -> str:
    """A key as it is printed."""
    return " ".join(map(str, key))


class Examiner:
    """Compiles candidates by processes without the GPU, in the order of the requests, and measures them by another one.

    They are processes of their own because a launch may crash its compiler or the GPU's context: that costs this launch only.
    Without a `device`, compiling is all.
    """

    def __init__(self, architecture: int, end: float, device: str | None = None) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._architecture, self._end, self._device = architecture, end, device
        self._measuring = Worker()
        self._compilers = [Worker() for _ in range(max(1, cores - 1) if device else cores)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._compilers:
            self._idle.put(worker)
        pool = self._pool = ThreadPoolExecutor(len(self._compilers))  # a thread waits for each compiler
        self._compiled = functools.cache(lambda key, launch: pool.submit(self._compile, key, launch))  # once each

    def __call__(self, ahead: list[Candidate], best: Launch) -> Trial:
        """Examine the first candidate while the others are compiled. Raises TimeoutError when the time is over."""
        for key, launch in ahead:
            self._compiled(key, DEFAULT[key])
            self._compiled(key, launch)
        key, launch = ahead[0]
        try:
            trials = [self._compiled(key, needed).result(self._left_s()) for needed in (DEFAULT[key], best, launch)]
            if self._device is None or trials[-1].verdict == NO_FIT:
                return trials[-1]
            limit_s = min(60.0, self._left_s())
            trial: Trial = self._measuring(launch_trial.compared, key, launch, best, self._device, limit_s=limit_s)
            return trial
        except (WorkFailed, WorkerLost) as error:
            self._left_s()  # at the end of the time, the launch is not the cause
            return Trial(key, launch, FAILED, note=str(error))

    def _compile(self, key: Key, launch: Launch) -> Trial:
        """Compile it into Triton's cache on disk."""
        worker = self._idle.get()
        try:
            trial: Trial = worker(launch_trial.compiled, key, launch, self._architecture, limit_s=120)
            return trial
        finally:
            self._idle.put(worker)

    def _left_s(self) -> float:
        left_s = self._end - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        return left_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Give up at once what is being compiled or measured."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for worker in self._compilers:
            worker.kill()  # a thread may still wait for it
        self._pool.shutdown()
        for worker in (*self._compilers, self._measuring):
            worker.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune, or compile ahead. Exits with 2 where neither can be done, with 130 after Ctrl-C."""
    flags = parser()
    options = flags.parse_args(arguments)
    if not 0 < options.minutes < math.inf:
        flags.exit(2, f"--minutes must be a number above 0, got {options.minutes:g}\n")
    end, keys = time.monotonic() + 60 * options.minutes, keys_of(options.kernels)
    try:
        if options.compile_for:
            compile_ahead(keys, options.compile_for, end)
            return
        if not kernels.is_available():
            flags.exit(2, "no GPU that Triton can use: tune on a machine with one, or compile ahead by --compile-for 90\n")
        device = resolve_device(options.device)  # with its number
        command = shlex.join(["python", "bench/tune.py", *(sys.argv[1:] if arguments is None else arguments)])
        tune_device(keys, device, end, options.out, command)
    except InputError as error:
        flags.exit(2, with_fields(f"{error}\n", lambda field: f"--{field}"))
    except KeyboardInterrupt:
        print("stopped by Ctrl-C: the same command goes on")
        sys.exit(130)


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--minutes", type=float, default=4.0, help="when to stop, with what is known then (default: 4)")
    flags.add_argument("--device", default="cuda:0")
    flags.add_argument("--kernels", nargs="+", choices=list(CHOICES), default=list(CHOICES), help="default: all")
    flags.add_argument("--out", type=Path, help=f"default: {FOLDER.relative_to(ROOT)}/<gpu>.json")
    without_gpu = "only fill Triton's cache, for such a GPU; needs none"
    flags.add_argument("--compile-for", type=int, choices=sorted(SHARED_BYTES), help=without_gpu)
    return flags


def keys_of(chosen: Sequence[str]) -> list[Key]:
    """The keys of the launch table for these kernels: the proxy's sizes first, bfloat16 before float32 maps."""
    keys = [key for key in DEFAULT if key[0] in chosen]
    has_two = {kernel for kernel, value_bytes, _ in DEFAULT if value_bytes == 2}
    order = list(CHOICES)
    return sorted(keys, key=lambda key: (SIZES.index(key[2]), key[0] in has_two and key[1] == 4, order.index(key[0])))


def compile_ahead(keys: Sequence[Key], architecture: int, end: float) -> None:
    """Compile all candidates near the counted launches into Triton's cache, as if none were better."""
    journal = Journal()
    try:
        with Examiner(architecture, end) as examine:
            tune(keys, journal, examine, known={})
    finally:
        count = Counter(trial.verdict for trial in journal.trials)
        wanted = sum(len(near(key[0], DEFAULT[key], 2)) for key in keys)
        result = f"{count[NO_FIT]} would spill or not fit; {count[FAILED]} failed"
        print(f"{count[COMPILED] + count[NO_FIT]} of {wanted} launches compiled into {triton_cache()}: {result}")


def tune_device(keys: Sequence[Key], device: str, end: float, out: Path | None, command: str) -> None:
    """Tune on a GPU, and write its table however it ends: what was found better, and earlier entries that were not tried."""
    gpu, properties = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device)
    out = out or path_of(gpu)
    out.parent.mkdir(parents=True, exist_ok=True)
    versions = f"torch {torch.__version__}, Triton {version('triton')}"
    journal = Journal(out.with_suffix(".jsonl"), f"{gpu}, {versions}, sources {sources_hash()}")
    earlier = measured(path_of(gpu), gpu) | measured(out, gpu)
    try:
        with Examiner(10 * properties.major + properties.minor, end, device) as examine:
            tune(keys, journal, examine, known={key: entry.launch for key, entry in earlier.items()})
    finally:
        about = {"gpu": gpu, "versions": versions, "date": datetime.now(UTC).date().isoformat(), "command": command}
        write_json(out, {**about, "launches": entries(journal, earlier)})
        print(out)


def entries(journal: Journal, earlier: dict[Key, Measured]) -> list[dict[str, object]]:
    """The launches of a GPU's table, as `measured` reads them."""
    tried = {(trial.key, trial.launch) for trial in journal.trials}
    kept = {key: entry for key, entry in earlier.items() if (key, entry.launch) not in tried}
    return [
        {"kernel": kernel, "value_bytes": value_bytes, "size": size, **entry._asdict(), "launch": entry.launch._asdict()}
        for (kernel, value_bytes, size), entry in sorted((kept | journal.found()).items())
    ]


def sources_hash() -> str:
    """A hash of what a time depends on: the kernels, how they are called, the counted table."""
    folder = ROOT / "fast" / "kernels" / "triton"
    calls = [ROOT / "bench" / name for name in ("kernel_calls.py", "launch_trial.py")]
    sources = (path.read_bytes() for path in (*sorted(folder.rglob("*.py")), *calls))
    return hashlib.sha256(b"".join(sources)).hexdigest()[:12]


if __name__ == "__main__":
    main()
