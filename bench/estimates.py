"""Numbers with an interval, so that nothing is claimed that the next run might deny.

The interval of a median is the classic one by order statistics, which assumes nothing of how times are distributed: with n
samples, the k-th smallest and the k-th largest have the median between them unless fewer than k samples fall on one side of
it, whose probability is that of a fair coin. Each end of a ratio takes an end of both times, so at 97.5 % for each time the
ratio's interval holds for at least 95 %. It covers what varies between rounds, but no load that lasts for the whole
measurement: that is `others_percent`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Self

from bench.load import LIMIT_PERCENT

_LEVEL = 0.975  # of one time


def median_interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """The interval of the samples' median; None for fewer than seven, which have none.

    >>> median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0])  # all but one at each end: 97.9 %
    (2.0, 9.0)
    >>> median_interval([1.0, 2.0, 3.0])
    """
    ordered, count, k, outside = sorted(samples), len(samples), 0, 0
    while k < count and 2 * (outside + comb(count, k)) <= (1 - _LEVEL) * 2**count:
        outside += comb(count, k)  # of the 2ⁿ ways in which n samples may fall, those with k on one side
        k += 1
    return (ordered[k - 1], ordered[-k]) if k else None


@dataclass(frozen=True)
class Estimate:
    """A number, the ends of its interval if it has one, and how much others took of the processor meanwhile."""

    value: float
    low: float | None
    high: float | None
    others_percent: float = 0.0

    @classmethod
    def exact(cls, value: float) -> Self:
        """A number that does not vary from round to round."""
        return cls(value, value, value)

    @property
    def is_disturbed(self) -> bool:
        return self.others_percent > LIMIT_PERCENT

    def over(self, other: "Estimate") -> "Estimate":
        """The ratio of two positive numbers.

        >>> Estimate(6.0, 4.0, 8.0).over(Estimate(2.0, 1.0, 4.0))
        Estimate(value=3.0, low=1.0, high=8.0, others_percent=0.0)
        """
        low = self.low / other.high if self.low is not None and other.high is not None else None
        high = self.high / other.low if self.high is not None and other.low is not None else None
        return Estimate(self.value / other.value, low, high, max(self.others_percent, other.others_percent))

    def plus(self, other: "Estimate") -> "Estimate":
        low = self.low + other.low if self.low is not None and other.low is not None else None
        high = self.high + other.high if self.high is not None and other.high is not None else None
        return Estimate(self.value + other.value, low, high, max(self.others_percent, other.others_percent))

    def times(self, factor: float) -> "Estimate":
        low, high = (None if end is None else factor * end for end in (self.low, self.high))
        return Estimate(factor * self.value, low, high, self.others_percent)
