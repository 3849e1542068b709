"""How every command of `search` meets its user: flags from a dataclass, one clear sentence for bad input, clean Ctrl-C."""

import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import tyro

from search.errors import InputError

Settings = TypeVar("Settings")


@contextmanager
def flags_called(names: Mapping[str, str]) -> Iterator[None]:
    """Bad input found by a part that other commands have too, in the words of this one: its flags by part's flag.

    >>> try:
    ...     with flags_called({"--workers": "--loading-processes"}):
    ...         raise InputError("--workers must be at least 0")
    ... except InputError as error:
    ...     print(error)
    --loading-processes must be at least 0
    """
    try:
        yield
    except InputError as error:
        known = "|".join(map(re.escape, names))
        text = re.sub(rf"(?<![\w-])({known})(?![\w-])", lambda match: names[match[0]], str(error)) if names else str(error)
        raise type(error)(text) from error


def differences(before: Mapping[str, Any], now: Mapping[str, Any], flags: Mapping[str, str] | None = None) -> str:
    """Which settings are not what they were, by their flags (`flags` has those not named after their field); "" if all are.

    >>> differences({"top_k": 3, "seed": 0, "top": 1}, {"top_k": 5, "seed": 1, "top": 1})
    '--seed 0, now it is 1, and --top-k 3, now it is 5'
    """
    called = flags or {}
    return ", and ".join(
        f"{called.get(field, _flag(field))} {before.get(field)}, now it is {now.get(field)}"
        for field in sorted(before.keys() | now.keys())
        if before.get(field) != now.get(field)
    )


def _flag(field: str) -> str:
    return field if field.startswith("--") else f"--{field.replace('_', '-')}"


def run_command(
    settings_type: type[Settings], command: Callable[[Settings], None], *, prog: str, goes_on: bool = False
) -> None:
    """Parse the flags of `settings_type`, run `command`, and exit: 0 done, 2 bad input, 130 stopped by Ctrl-C.

    `goes_on` says that the same command goes on where it was stopped. A full memory is bad input too: of sizes too large.
    """
    settings = tyro.cli(settings_type, prog=prog, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        command(settings)
    except InputError as error:
        sys.exit(_fail(str(error)))
    except OSError as error:
        sys.exit(_fail(f"{error}: check the path, its permissions and the disk"))
    except (MemoryError, RuntimeError) as error:
        if not _is_full_memory(error):
            raise
        sys.exit(_fail(f"the memory is full ({str(error).strip().splitlines()[0]}): give smaller sizes"))
    except KeyboardInterrupt:
        print("\nstopped" + "; the same command goes on from here" * goes_on, file=sys.stderr)
        sys.exit(130)


@contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """What is inside comes to its end before Ctrl-C ends the program, which a second one does at once.

    For the database: interrupted between its lines it prints tracebacks of its own.
    """
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return
    pressed = []

    def wait(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        signal.raise_signal(signal.SIGINT)


def _is_full_memory(error: Exception) -> bool:
    """PyTorch has a type of its own for a full GPU, for a full CPU it has words alone."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, MemoryError) or any(each in str(error).lower() for each in words)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
