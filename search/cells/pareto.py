"""Comparing things by several values at once: which ones nothing else beats, and which of those stand alone.

Values are rows of numbers, of which greater ones are better in each column. A row dominates another one if it is nowhere worse
and somewhere better.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = Sequence[Sequence[float]]


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether a row is nowhere worse than another one, and somewhere better.

    >>> dominates((0.5, -2.0), (0.5, -3.0)), dominates((0.5, -2.0), (0.5, -2.0)), dominates((0.5, -2.0), (0.4, -1.0))
    (True, False, False)
    """
    pairs = list(zip(one, other, strict=True))
    return all(mine >= theirs for mine, theirs in pairs) and any(mine > theirs for mine, theirs in pairs)


class Merit(NamedTuple):
    """How good a row is among others (Deb et al., NSGA-II, IEEE Transactions on Evolutionary Computation 2002, section III).

    The greater merit is the better one: on an earlier front, or on the same one where there are fewer others near.
    """

    front: int  # 0 for the rows that none dominates, −1 for those that only they dominate, and so on
    isolation: float  # the crowding distance: sides of the box that its neighbours on the front leave to it


def pareto_front(values: Values) -> list[int]:
    """The places of the rows that no other one dominates, ordered by the first column from the greatest; of equal rows one.

    Its time grows with the number of rows times that on the front.

    >>> pareto_front([(0.5, -3.0), (0.4, -1.0), (0.5, -2.0), (0.3, -1.0)])
    [2, 1]
    """
    rows = _array(values)
    if not len(rows):
        return []
    left = np.lexsort(-rows.T[::-1])  # the greatest in the first column, of equal ones in the second, and so on
    front = []
    while len(left):  # nothing that is left dominates the first
        front.append(int(left[0]))
        left = left[(rows[left] > rows[left[0]]).any(axis=1)]
    return front


def roomiest(values: Values, front: Sequence[int]) -> list[int]:
    """The places of a front of these rows, those with the most room around them, and so its ends, first.

    >>> roomiest([(4, 0), (3, 1), (1, 2), (0, 4)], [0, 1, 2, 3])
    [0, 3, 2, 1]
    """
    order = np.argsort(-isolation([values[place] for place in front]), kind="stable")
    return [front[i] for i in order.tolist()]


def merits(values: Values) -> list[Merit]:
    """The merit of each row, in order; takes time and memory for the square of their number.

    >>> [merit.front for merit in merits([(0.5, -2.0), (0.4, -1.0), (0.5, -3.0), (0.3, -1.0)])]
    [0, 0, -1, -1]
    """
    rows = _array(values)
    as_good: NDArray[np.bool_] = np.all(rows[:, None] >= rows, axis=2)
    is_better = as_good & ~as_good.T  # `dominates`, of all pairs
    fronts, isolations = np.zeros(len(rows), int), np.zeros(len(rows))
    left, number = np.arange(len(rows)), 0
    while len(left):
        is_next = ~np.any(is_better[np.ix_(left, left)], axis=0)
        fronts[left[is_next]], isolations[left[is_next]] = number, isolation(rows[left[is_next]])
        left, number = left[~is_next], number - 1
    return list(map(Merit, fronts.tolist(), isolations.tolist()))


def isolation(front: Values | NDArray[np.float64]) -> NDArray[np.float64]:
    """The crowding distance of each row of a front; infinite for the greatest and the least of each column.

    >>> isolation([(4, 0), (3, 1), (1, 2), (0, 4)]).tolist()
    [inf, 1.25, 1.5, inf]
    """
    rows = _array(front)
    distances = np.zeros(len(rows))
    for column in rows.T:
        order = np.argsort(column, kind="stable")
        ordered = _finite(column[order])
        extent = ordered[-1] - ordered[0] if len(rows) else 0.0
        if extent > 0:
            distances[order[1:-1]] += (ordered[2:] - ordered[:-2]) / extent
        distances[order[[0, -1]] if len(rows) else order] = np.inf
    return distances


def _array(values: Values | NDArray[np.float64]) -> NDArray[np.float64]:
    rows = np.asarray(values, dtype=np.float64)
    return rows.reshape(len(rows), -1 if rows.size else 0)


def _finite(column: NDArray[np.float64]) -> NDArray[np.float64]:
    """With the extremes of the finite ones in place of infinite ones, so that distances are numbers."""
    finite = column[np.isfinite(column)]
    return np.clip(column, finite.min(), finite.max()) if len(finite) else np.zeros_like(column)
