"""Ctrl-C, and SIGTERM as another Ctrl-C: a command stops by it, but not in the middle of what must not be interrupted."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_STOPS = (signal.SIGINT, signal.SIGTERM)
_waiting: list[list[signal.Signals]] = []  # what was pressed in the block that must come to its end, if there is one


@contextmanager
def sigterm_is_ctrl_c() -> Iterator[None]:
    """Let SIGTERM, by which `kill`, Slurm and Kubernetes end a program, stop the code inside as Ctrl-C does."""
    if not _may_set_handlers():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """Bring back what SIGTERM does after the code inside, a library that sets a handler of its own."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if _may_set_handlers():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def first_stop_calls(act: Callable[[signal.Signals], object]) -> Iterator[None]:
    """Let the first Ctrl-C (or SIGTERM, if that is one) call `act` instead of ending the program; a second one ends it.

    What a signal does is left as it is where that is no function: to end the program at once, or nothing, as in the background
    jobs of a shell.
    """
    before = {number: handler for number in _STOPS if callable(handler := signal.getsignal(number))}
    if not _may_set_handlers():
        before = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: FrameType | None) -> None:
        restore()
        act(signal.Signals(number))

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        restore()


def stop_waits() -> bool:
    """Whether Ctrl-C was pressed and waits for the end of a block, which should not wait for anything else then."""
    return any(_waiting)


@contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """Let the code inside finish before Ctrl-C ends the program; a second Ctrl-C ends it at once.

    Used around calls of the database, which prints its own tracebacks if it is interrupted. Inside of such a block, another
    one changes nothing.
    """
    if _waiting or not _may_set_handlers():
        yield
        return
    pressed: list[signal.Signals] = []
    try:
        _waiting.append(pressed)
        with first_stop_calls(pressed.append):
            yield
    finally:
        _waiting.clear()
    for number in pressed:
        signal.raise_signal(number)


def _may_set_handlers() -> bool:
    """Whether Python lets this thread set what a signal does."""
    return threading.current_thread() is threading.main_thread()
