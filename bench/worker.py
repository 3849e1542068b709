"""Run work in a separate process: if it breaks the GPU's context, hangs or dies, only this work is lost."""

import contextlib
import importlib
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Self

Say = Callable[[Any], None]


class WorkFailed(Exception):
    """The function raised an exception; the message has its type and first line. The process can be used again."""


class WorkerLost(Exception):
    """The process is gone: it died, reached its limit, or broke the device's context; the message says which."""


class OutOfTime(WorkerLost):
    """The process reached its time limit."""


class Worker:
    """An interpreter of its own, started at once, that calls functions of importable modules one after the other.

    It has its own session: Ctrl-C only reaches the parent, and everything that the function starts ends with the process. A
    call behind one that lost the process gets a new one. That takes seconds to import PyTorch, which disturbs measurements
    on a few CPU cores, but not on a GPU: `ahead` starts the next one in advance.

    >>> with Worker() as worker:
    ...     worker(divmod, 7, 2)
    (3, 1)
    """

    def __init__(self, *, preload: str = "bench", log: Path | None = None, ahead: bool = False) -> None:
        self._start = partial(_start, preload, None if log is None else str(log))
        self._process, self._connection = self._start()
        self._next = self._start() if ahead else None
        self._is_new, self.is_lost, self._is_killed = True, False, False

    def __call__(
        self, function: Callable[..., Any], *arguments: Any, limit_s: float = math.inf, say: Say | None = None
    ) -> Any:
        """Call function(*arguments), with `say=` if one is given; what it says arrives at once.

        Raises WorkFailed, WorkerLost, OutOfTime.
        """
        if self.is_lost and not self._is_killed:
            self.fresh()
        if self._is_killed:  # perhaps meanwhile, by another thread, which did not see the new process
            self._lose()
            raise WorkerLost("the process was ended")
        self._is_new = False
        end = time.monotonic() + limit_s
        try:
            self._connection.send((function, arguments, say is not None))
            while self._connection.poll(None if math.isinf(end) else max(0.0, end - time.monotonic())):
                kind, value = self._connection.recv()
                if kind == "said":
                    assert say is not None
                    say(value)
                elif kind == "returned":
                    return value
                elif kind == "raised":
                    raise WorkFailed(value)
                else:
                    self._lose()
                    raise WorkerLost(value)
        except (EOFError, ConnectionError):
            self._process.join(10)
            code = self._process.exitcode
            self._lose()
            name = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
            raise WorkerLost(f"the process ended with {name}") from None
        self._lose()
        raise OutOfTime(f"stopped after {limit_s:.0f} s")

    def fresh(self) -> Self:
        """The worker, with a process that has done nothing yet; the previous one is ended."""
        if self.is_lost or not self._is_new:
            self._lose()
            self._process, self._connection = self._next or self._start()
            self._next = self._start() if self._next else None
            self._is_new, self.is_lost = True, False
        return self

    def kill(self) -> None:
        """End the process for good; a call that another thread waits for raises WorkerLost."""
        self._is_killed = True
        _kill(self._process)

    def close(self) -> None:
        """`kill` it and release its resources; to be called by the thread that uses it, or after that thread."""
        self.kill()
        self._lose()
        if self._next:
            _end(*self._next)

    def _lose(self) -> None:
        self.is_lost = True
        _end(self._process, self._connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _start(preload: str, log: str | None) -> tuple[SpawnProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, preload, log))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited, so that it holds during imports too
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return process, ours


def _kill(process: SpawnProcess) -> None:
    """With all that it has started."""
    if process.pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it has not begun its session yet, or is gone
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()


def _end(process: SpawnProcess, connection: Connection) -> None:
    _kill(process)
    process.join(10)  # a process that hangs in the driver cannot be ended, and is left behind
    connection.close()


def _serve(connection: Connection, preload: str, log: str | None) -> None:
    os.setsid()
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
    with contextlib.suppress(Exception):  # the function's own imports will say what is wrong
        importlib.import_module(preload)
    while True:
        try:
            function, arguments, speaks = connection.recv()
        except EOFError:  # the parent is gone
            return
        keywords = {"say": lambda value: connection.send(("said", value))} if speaks else {}
        try:
            answer = ("returned", function(*arguments, **keywords))
        except Exception as error:
            traceback.print_exc()
            text = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
            answer = ("lost" if has_lost_its_device() else "raised", text)
        sys.stdout.flush()
        connection.send(answer)


def _end_with_the_parent() -> None:
    """End the worker and all that it has started with the parent, so that they do not keep the GPU busy."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)


def has_lost_its_device() -> bool:
    """Whether the process has lost its CUDA context: after an illegal address or a failed launch, every later call fails."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False
