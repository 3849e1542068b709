import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.cells.pareto import isolation, merits, pareto_front

Row = tuple[float, ...]
NUMBERS = st.sampled_from([-math.inf, -2.0, 0.0, 0.5, 1.0, 3.0, math.inf])


def rows(most: int = 12) -> st.SearchStrategy[list[Row]]:
    """Rows of one to three columns, with equal ones and equal values among them."""
    return st.integers(1, 3).flatmap(lambda columns: st.lists(st.tuples(*[NUMBERS] * columns), max_size=most))


def dominates(one: Row, other: Row) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True)) and one != other


def fronts(values: Sequence[Row]) -> list[int]:
    """By their definition: what is left once the fronts before are taken away."""
    found, left, front = [0] * len(values), set(range(len(values))), 0
    while left:
        best = {i for i in left if not any(dominates(values[k], values[i]) for k in left)}
        for i in best:
            found[i] = front
        left, front = left - best, front - 1
    return found


@given(values=rows())
def test_a_front_has_what_nothing_dominates_and_of_equals_the_first(values: list[Row]) -> None:
    front = pareto_front(values)
    expected = [i for i, row in enumerate(values) if not any(dominates(other, row) for other in values)]
    assert sorted(front) == [i for i in expected if values.index(values[i]) == i]
    assert [values[i] for i in front] == sorted((values[i] for i in front), reverse=True)


@given(values=rows())
def test_merits_are_fronts_and_isolation_on_them(values: list[Row]) -> None:
    found = merits(values)
    assert [merit.front for merit in found] == fronts(values)
    for front in {merit.front for merit in found}:
        places = [i for i, merit in enumerate(found) if merit.front == front]
        assert [found[i].isolation for i in places] == isolation([values[i] for i in places]).tolist()


@given(values=rows())
def test_the_ends_of_a_front_are_alone_and_no_distance_is_undefined(values: list[Row]) -> None:
    distances = isolation(values)
    assert len(distances) == len(values)
    assert (distances >= 0).all()  # and so no NaN
    for column in np.asarray(values, float).reshape(len(values), -1 if values else 0).T:
        assert math.inf in distances[column == column.max()]
        assert math.inf in distances[column == column.min()]


def test_isolation_is_the_share_of_each_range_between_the_neighbours() -> None:
    places = [(0.0, 100.0), (1.0, 40.0), (3.0, 20.0), (10.0, 0.0)]
    assert isolation(places).tolist() == [math.inf, 3 / 10 + 80 / 100, 9 / 10 + 40 / 100, math.inf]
    assert isolation([(-math.inf, 1.0), (0.0, 0.5), (1.0, 0.0)]).tolist() == [math.inf, 1 + 1, math.inf]


def test_an_earlier_front_is_better_and_then_who_stands_alone() -> None:
    end, crowded, alone, other_end, beaten = merits([(0.0, 9.0), (0.1, 8.9), (5.0, 5.0), (9.0, 0.0), (8.0, -1.0)])
    assert beaten < crowded < alone < end == other_end


@pytest.mark.parametrize("function", [pareto_front, merits, lambda values: isolation(values).tolist()])
def test_of_nothing_comes_nothing(function: Callable[[list[Row]], list[object]]) -> None:
    assert function([]) == []
