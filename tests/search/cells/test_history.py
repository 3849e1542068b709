import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.cells.history import History, Proposed
from search.cells.space import SearchSpace

SPACE = SearchSpace(2)
CELLS = [SPACE.sample(np.random.default_rng(seed)) for seed in range(6)]


@dataclass(frozen=True)
class NaiveTrial:
    """What a history is told of a trial; `score` is None for one that fails or runs."""

    number: int
    cell: int  # its place in CELLS
    score: float | None

    @property
    def form(self) -> str:
        return SPACE.canonical_form(CELLS[self.cell]).to_json()


@st.composite
def orders(draw: st.DrawFn) -> tuple[list[NaiveTrial], list[int], list[int]]:
    """Trials, the order in which they finish, and for each the bound of a question that is asked after it."""
    scores = st.one_of(st.none(), st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 0.5000001, math.inf]))
    drawn = draw(st.lists(st.tuples(st.integers(0, len(CELLS) - 1), scores), max_size=12))
    trials = [NaiveTrial(number, cell, score) for number, (cell, score) in enumerate(drawn)]
    finished = draw(st.permutations([trial.number for trial in trials if trial.score is not None]))
    bounds = st.integers(0, len(trials) + 1)
    return trials, finished, draw(st.lists(bounds, min_size=len(finished), max_size=len(finished)))


def best_numbers(trials: list[NaiveTrial]) -> list[int]:
    first: dict[str, int] = {}
    for trial in sorted(trials, key=lambda trial: (-(trial.score or 0.0), trial.number)):
        first.setdefault(trial.form, trial.number)
    return list(first.values())


@given(order=orders())
def test_answers_are_those_of_a_list_of_all_trials(order: tuple[list[NaiveTrial], list[int], list[int]]) -> None:
    """Whatever the order of finishing, and whatever bounds were asked for before."""
    trials, finished, bounds = order
    history, told = History(), []
    for trial in trials:
        history.propose(trial.number, CELLS[trial.cell].to_json(), trial.form)
    assert len(history) == len(trials)
    for number, before in zip(finished, bounds, strict=True):
        history.finish(number, trials[number].score or 0.0)
        told.append(trials[number])
        visible = sorted((trial for trial in told if trial.number < before), key=lambda trial: trial.number)
        assert [trial.number for trial in history.complete(before)] == [trial.number for trial in visible]
        assert history.scores(history.complete(before)) == [trial.score for trial in visible]
        assert history.complete(before, newest=3) == history.complete(before)[-3:]
        assert [trial.number for trial in history.best(before)] == best_numbers(visible)


@given(order=orders())
def test_a_form_is_known_from_its_first_trial_on(order: tuple[list[NaiveTrial], list[int], list[int]]) -> None:
    trials, _, _ = order
    history = History()
    for trial in reversed(trials):  # as when an interrupted trial proposes after later ones
        history.propose(trial.number, CELLS[trial.cell].to_json(), trial.form)
    for form in {SPACE.canonical_form(cell).to_json() for cell in CELLS}:
        for before in range(len(trials) + 2):
            assert history.has_form(form, before) == any(trial.form == form for trial in trials[:before])


def test_a_cell_is_given_as_it_was_proposed() -> None:
    history = History()
    history.propose(0, CELLS[0].to_json(), SPACE.canonical_form(CELLS[0]).to_json())
    history.finish(0, 0.5)
    (trial,) = history.complete(1)
    assert (trial.number, trial.cell) == (0, CELLS[0])


def test_a_trial_keeps_its_first_score() -> None:
    history = History()
    for number in range(2):
        history.propose(number, CELLS[number].to_json(), CELLS[number].to_json())
    history.finish(0, 0.5)
    history.finish(1, 0.4)
    history.finish(1, 0.6)
    assert [trial.number for trial in history.best(2)] == [0, 1]


def test_a_trial_without_a_score_has_none() -> None:
    history = History()
    history.propose(0, CELLS[0].to_json(), CELLS[0].to_json())
    assert history.complete(1) == list(history.best(1)) == []
    with pytest.raises(KeyError):
        history.scores([Proposed(0, CELLS[0].to_json(), CELLS[0].to_json())])


# Several objectives


VALUES = [(0.5, -3.0), (0.4, -1.0), (0.3, -2.0), (0.5, -2.0), (0.45, -1.9)]  # the third and the first are beaten


def history_of(values: Sequence[tuple[float, ...]]) -> History:
    history = History()
    for number, (score, *others) in enumerate(values):
        history.propose(number, CELLS[number].to_json(), CELLS[number].to_json())
        history.finish(number, score, others=tuple(others))
    return history


def test_of_several_objectives_the_best_are_the_front_and_first_who_stands_alone() -> None:
    history = history_of(VALUES)
    assert history.has_several_objectives
    assert history.values(history.complete(5)) == VALUES
    assert history.scores(history.complete(5)) == [score for score, _ in VALUES]
    assert sorted(trial.number for trial in history.best(5)) == [1, 3, 4]
    assert [trial.number for trial in history.best(5)][-1] == 4  # which lies between the others
    assert [trial.number for trial in history.best(3)] == [0, 1]
    assert not list(history.best(0))


def test_a_copy_and_a_withdrawn_trial_have_all_values_or_none() -> None:
    history = history_of(VALUES[:2])
    for number in (2, 3):
        history.propose(number, CELLS[1].to_json(), CELLS[1].to_json())
        history.copy(number, 1)
    assert history.values(history.complete(4)) == [*VALUES[:2], VALUES[1], VALUES[1]]
    assert [trial.number for trial in history.best(4)] == [0, 1]  # a form once
    history.withdraw(1)
    assert history.values(history.complete(4)) == VALUES[:1]
    assert [trial.number for trial in history.best(4)] == [0]


def test_of_one_objective_values_are_scores() -> None:
    history = history_of([(0.5,), (0.4,)])
    assert not history.has_several_objectives
    assert history.values(history.complete(2)) == [(0.5,), (0.4,)]
