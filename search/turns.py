"""Times taken in turns: a round calls everybody once, in a new order, so that whatever slows the machine slows all of them."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch

T = TypeVar("T")


class Summary(NamedTuple):
    """The samples of all rounds in three numbers of their unit: median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Summary":
        """Summarise samples.

        >>> Summary.of([1.0, 2.0, 3.0, 4.0, 100.0])
        Summary(median=3.0, p20=1.8, p80=23.2)
        """
        p20, median, p80 = (float(value) for value in np.percentile(samples, (20, 50, 80)))
        return cls(round(median, 6), round(p20, 6), round(p80, 6))

    def differs_from(self, other: "Summary") -> bool:
        """Whether the medians are further apart than either one's middle 60 % is wide."""
        return abs(self.median - other.median) > max(self.p80 - self.p20, other.p80 - other.p20)


def in_turns(
    turns: Mapping[str, Callable[[], T]], rounds: int, rng: np.random.Generator, *, seconds: float = math.inf
) -> dict[str, list[T]]:
    """What every turn returned in each round. No round begins after `seconds`, but there are three at least."""
    samples: dict[str, list[T]] = {name: [] for name in turns}
    names, start = list(turns), time.perf_counter()
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - start > seconds:
            break
        for i in rng.permutation(len(names)):
            samples[names[i]].append(turns[names[i]]())
    return samples


def back_to_back_ms(call: Callable[[], object], device: torch.device, calls: int) -> float:
    """Milliseconds a call, of `calls` with nothing between them: on a GPU the host launches the next while one runs."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronise(device)
    return 1e3 * (time.perf_counter() - start) / calls


def synchronise(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
