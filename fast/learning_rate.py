"""Learning rates over the iterations of a training: the authors' polynomial decay, or half a cosine, after a beginning.

With t from 0 to 1 over the iterations after the beginning, of learning rate r:

    poly     r · (1 − t)^0.9           (train_utils.py of research/deeplab)
    cosine   r · (1 + cos(π · t)) / 2

The beginning is a warm-up, in which iteration i of w has r · i / w, or the authors' slow start, which has a rate of its own.
"""

import math
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor

Schedule = Literal["poly", "cosine"]
POWER = 0.9


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """The learning rate of each of so many iterations; of a warm-up and a slow start, at most one is to be given."""

    initial: float
    iterations: int
    schedule: Schedule = "poly"
    warmup_iterations: int = 0
    slow_start_iterations: int = 0
    slow_start_rate: float = 1e-4

    def after(self, done: Tensor) -> Tensor:
        """The rates of the iterations that come after `done` others, of the same shape; float32 where these are integers.

        >>> LearningRate(initial=0.01, iterations=4, schedule="cosine").after(torch.arange(5))
        tensor([0.0100, 0.0085, 0.0050, 0.0015, 0.0000])
        """
        begin = max(self.warmup_iterations, self.slow_start_iterations)
        left = (1 - (done - begin) / (self.iterations - begin)).clamp(min=0)  # 1 − t
        rates = self.initial * self._share(left)
        if self.warmup_iterations:
            rates = torch.where(done < begin, self.initial * done / begin, rates)
        if self.slow_start_iterations:
            rates = torch.where(done < begin, self.slow_start_rate, rates)
        return rates

    def _share(self, left: Tensor) -> Tensor:
        match self.schedule:
            case "poly":
                return left**POWER
            case "cosine":
                return (1 - torch.cos(math.pi * left)) / 2
            case _:
                assert_never(self.schedule)
