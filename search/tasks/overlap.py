"""Reading, computing and writing at the same time, each in order: `one_ahead` reads, `one_behind` writes.

Threads suffice: decoding a picture, copying an array, waiting for a GPU and for a disk all let other threads go on.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar, TypeVarTuple

import torch
from torch import Tensor

Argument = TypeVar("Argument")
Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


@contextmanager
def one_ahead(function: Callable[[Argument], Result], arguments: Iterable[Argument]) -> Iterator[Iterator[Result]]:
    """Give the results of `function` in the order of its arguments; while one is used, another thread computes the next.

    An error is raised in its turn, and no later argument is begun.

    >>> with one_ahead(abs, [-1, -2, -3]) as results:
    ...     list(results)
    [1, 2, 3]
    """
    with ThreadPoolExecutor(1) as thread:

        def results() -> Iterator[Result]:
            begun: list[Future[Result]] = []
            for argument in arguments:
                ready = [each.result() for each in begun]
                begun = [thread.submit(function, argument)]
                yield from ready
            yield from (each.result() for each in begun)

        yield results()


@contextmanager
def one_behind(function: Callable[[*Arguments], None]) -> Iterator[Callable[[*Arguments], None]]:
    """Give a function that has another thread call `function`, in order, and waits only for the call before.

    The error of a call is raised by the next one, which is then not made, or at the end. Also after an error inside, what was
    asked for is done when this is left.

    >>> written = []
    >>> with one_behind(written.append) as write:
    ...     for number in (1, 2, 3):
    ...         write(number)
    >>> written
    [1, 2, 3]
    """
    with ThreadPoolExecutor(1) as thread:
        begun: list[Future[None]] = []

        def call(*arguments: *Arguments) -> None:
            for each in begun:
                each.result()
            begun[:] = [thread.submit(function, *arguments)]

        yield call
        for each in begun:
            each.result()


class OnItsWay:
    """A tensor whose copy to the host has begun; the device goes on with other work meanwhile."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if values.device.type != "cuda":
            self._host = values.cpu()
            return
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._host.copy_(values, non_blocking=True)
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(values.device))

    def arrived(self) -> Tensor:
        """The tensor on the host, once all of it is there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
