"""What all samplers promise, in a search that keeps a history; `test_sampler.py` has them in Optuna studies."""

import copy
import pickle
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.study import StudyDirection

from reference.cell import AtrousSeparableConv, Cell
from search.cells.history import History, Proposed
from search.cells.pareto import pareto_front
from search.cells.reach import FeatureMaps
from search.cells.sampler import CellSampler
from search.cells.samplers import SAMPLER_NAMES, create_sampler
from search.cells.samplers.evolution import EvolutionSampler, _merits
from search.cells.samplers.local_search import LocalSearchSampler
from search.cells.samplers.predictor import PredictorSampler
from search.cells.samplers.tpe import TPESampler
from search.cells.space import SearchSpace
from search.errors import InputError
from tests.strategies import rng_seeds

SPACES = (
    SearchSpace(),
    SearchSpace(3, num_inputs=3),
    SearchSpace(2, maps=FeatureMaps((5, 5), (5, 5))),
    SearchSpace(2, rates=()),
    SearchSpace(2, grid_sizes=()),
    SearchSpace(1, rates=(1, 2), grid_sizes=(3,)),  # six cells
    SearchSpace(2, rates=(), grid_sizes=(), num_inputs=2),  # of one operation
    SearchSpace(1, rates=(), grid_sizes=()),  # one cell, without a neighbour
)
TRIALS = 24  # of which the models see enough
every_sampler = pytest.mark.parametrize("name", SAMPLER_NAMES)
_usual = settings.get_profile(settings.get_current_profile_name()).max_examples
few_examples = settings(max_examples=max(5, _usual // 20))  # each is a whole search


def score(cell: Cell) -> float | None:
    """Minus the mean distance, on a logarithmic scale, of the rates' product from 36; None, for a failure, of one in eight."""
    if crc32(cell.to_json().encode()) % 8 == 0:
        return None
    rates = [b.operation.rate if isinstance(b.operation, AtrousSeparableConv) else (100, 100) for b in cell.branches]
    return -float(np.mean([abs(np.log(np.prod(rate) / 36)) for rate in rates]))


def trials_in(space: SearchSpace) -> int:
    """So many that a small space is used up, where each further cell takes a thousand draws."""
    return min(TRIALS, space.canonical_size() + 2)


@dataclass
class MadeSearch:
    """A search with `workers` cells at a time, which are finished in the order that `order_seed` draws."""

    sampler: CellSampler
    workers: int = 1
    order_seed: int = 0
    history: History = field(default_factory=History)
    cells: list[Cell] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    others: Callable[[Cell], tuple[float, ...]] = lambda cell: ()  # values besides the score

    def run(self, until: int) -> list[Cell]:
        """Begin trials up to number `until`, and finish as many as that needs."""
        order = np.random.default_rng(self.order_seed)
        while len(self.cells) < until:
            number = len(self.cells)
            is_ready = self.sampler.visible_before(number) <= min(self.running, default=number)
            if len(self.running) < self.workers and is_ready:
                self.cells.append(self.sampler.propose(number, self.history))
                self._tell_cell(number)
                self.running.append(number)
            else:
                self._finish(self.running.pop(int(order.integers(len(self.running)))))
        return self.cells

    def restarted(self, sampler: CellSampler) -> "MadeSearch":
        """What another process knows, that takes over from here."""
        other = MadeSearch(sampler, cells=list(self.cells), running=list(self.running), others=self.others)
        for number in range(len(self.cells)):
            other._tell_cell(number)
            if number not in self.running:
                other._finish(number)
        return other

    def _tell_cell(self, number: int) -> None:
        cell = self.cells[number]
        self.history.propose(number, cell.to_json(), self.sampler.space.canonical_form(cell).to_json())

    def _finish(self, number: int) -> None:
        if (value := score(self.cells[number])) is not None:
            self.history.finish(number, value, others=self.others(self.cells[number]))


@every_sampler
@few_examples
@given(space=st.sampled_from(SPACES), seed=rng_seeds(), lag=st.integers(0, 6), order_seed=rng_seeds(), data=st.data())
def test_a_seed_has_its_cells(
    name: str, space: SearchSpace, seed: int, lag: int, order_seed: int, data: st.DataObject
) -> None:
    """With any number of workers up to lag + 1, whoever ends first, and after any interruption."""
    sampler = create_sampler(name, space, seed, lag=lag)
    alone, trials = MadeSearch(sampler), trials_in(space)
    expected = list(alone.run(trials))
    together = MadeSearch(copy.deepcopy(sampler), data.draw(st.integers(1, lag + 1)), order_seed)
    together.run(data.draw(st.integers(0, trials), label="interrupted at"))
    assert together.restarted(pickle.loads(pickle.dumps(sampler))).run(trials) == expected
    assert together.run(trials) == expected
    asked_again = data.draw(st.integers(0, trials - 1))
    assert sampler.propose(asked_again, alone.history) == expected[asked_again]


def test_local_search_proposes_the_same_once_the_neighbours_of_the_best_are_used_up() -> None:
    """Whether it remembers so, or is a new one that has to find out."""
    space, history = SearchSpace(2, (1, 3), ()), History()
    remembering = create_sampler("local", space, 0, lag=0)
    for number in range(60):
        cell = remembering.propose(number, history)
        assert cell == create_sampler("local", space, 0, lag=0).propose(number, history)
        history.propose(number, cell.to_json(), space.canonical_form(cell).to_json())
        history.finish(number, 2.0 if number == 12 else random.Random(number).random())


@every_sampler
@few_examples
@given(space=st.sampled_from(SPACES), seed=rng_seeds(), lag=st.integers(0, 6))
def test_cells_are_in_the_space_and_new_while_it_has_others(name: str, space: SearchSpace, seed: int, lag: int) -> None:
    cells = MadeSearch(create_sampler(name, space, seed, lag=lag), workers=lag + 1).run(trials_in(space))
    assert all(map(space.contains, cells))
    assert len(set(map(space.canonical_form, cells))) == min(len(cells), space.canonical_size())


@every_sampler
@few_examples
@given(seed=rng_seeds(), lag=st.integers(0, 6))
def test_scores_count_only_if_they_are_visible(name: str, seed: int, lag: int) -> None:
    sampler = create_sampler(name, SearchSpace(), seed, lag=lag)
    cells, visible = MadeSearch(sampler).run(TRIALS), sampler.visible_before(TRIALS)
    assert visible == (TRIALS - lag if sampler.uses_scores else 0)

    def next_cell(of_hidden: float | None) -> Cell:
        history = History()
        for number, cell in enumerate(cells):
            history.propose(number, cell.to_json(), sampler.space.canonical_form(cell).to_json())
            value = score(cell) if number < visible else of_hidden
            if value is not None:
                history.finish(number, value)
        return create_sampler(name, SearchSpace(), seed, lag=lag).propose(TRIALS, history)

    assert next_cell(None) == next_cell(-1.0) == next_cell(1.0)


@every_sampler
def test_infinite_and_equal_scores_are_scores(name: str) -> None:
    space = SearchSpace(2)
    for values in ([np.inf], [-np.inf, np.inf, 0.0], [0.5]):
        history, sampler = History(), create_sampler(name, space, 0)
        for number in range(TRIALS):
            cell = sampler.propose(number, history)
            history.propose(number, cell.to_json(), space.canonical_form(cell).to_json())
            history.finish(number, values[number % len(values)])
        assert space.contains(sampler.propose(TRIALS, history))


@pytest.mark.parametrize(
    ("name", "gain"),
    [("paper", 0.1), ("evolution", 0.15), ("local", 0.2), ("predictor", 0.3)],  # measured: 0.15, 0.25, 0.40, 0.52
)
def test_samplers_find_better_cells_than_random_search(name: str, gain: float) -> None:
    """TPE does so later: of a choice among 81 operations it learns little from so few trials."""

    def best_score(sampler: str, seed: int) -> float:
        cells = MadeSearch(create_sampler(sampler, SearchSpace(), seed), workers=5).run(100)
        return max(value for value in map(score, cells) if value is not None)

    gains = [best_score(name, seed) - best_score("random", seed) for seed in range(5)]
    assert np.mean(gains) > gain


# Several objectives

of_several = pytest.mark.parametrize("name", ["random", "evolution", "tpe"])


def cheapness(cell: Cell) -> tuple[float, ...]:
    """One more objective, at odds with the score: minus the mean of the rates' product."""
    rates = [b.operation.rate if isinstance(b.operation, AtrousSeparableConv) else (1, 1) for b in cell.branches]
    return (-float(np.mean([np.prod(rate) for rate in rates])),)


@of_several
@few_examples
@given(space=st.sampled_from(SPACES), seed=rng_seeds(), lag=st.integers(0, 6), order_seed=rng_seeds(), data=st.data())
def test_a_seed_has_its_cells_of_two_objectives(
    name: str, space: SearchSpace, seed: int, lag: int, order_seed: int, data: st.DataObject
) -> None:
    sampler = create_sampler(name, space, seed, lag=lag)
    alone, trials = MadeSearch(sampler, others=cheapness), trials_in(space)
    expected = list(alone.run(trials))
    together = MadeSearch(copy.deepcopy(sampler), data.draw(st.integers(1, lag + 1)), order_seed, others=cheapness)
    together.run(data.draw(st.integers(0, trials), label="interrupted at"))
    assert together.restarted(pickle.loads(pickle.dumps(sampler))).run(trials) == expected
    assert together.run(trials) == expected


@of_several
def test_infinite_and_equal_values_are_values(name: str) -> None:
    space = SearchSpace(2)
    for values in ([(np.inf, 0.0)], [(-np.inf, np.inf), (np.inf, -np.inf), (0.0, 1.0)], [(0.5, 0.5)]):
        history, sampler = History(), create_sampler(name, space, 0)
        for number in range(TRIALS):
            cell = sampler.propose(number, history)
            history.propose(number, cell.to_json(), space.canonical_form(cell).to_json())
            value, other = values[number % len(values)]
            history.finish(number, value, others=(other,))
        assert space.contains(sampler.propose(TRIALS, history))


def test_a_tournament_of_many_is_won_by_who_stands_alone_on_the_front() -> None:
    """By either end of it, and so also by cells that have not the best score."""
    sampler = EvolutionSampler(SearchSpace(2), seed=0, population=6, tournament=200, lag=0)
    search, of_the_cheap = MadeSearch(sampler, others=cheapness), 0

    def is_child(cell: Cell, of: Proposed) -> bool:
        return cell in sampler.space.neighbours(of.cell)

    cells = search.run(40)
    for number in range(15, 40):
        living = search.history.complete(number, newest=6)
        values = search.history.values(living)
        parents = [value for trial, value in zip(living, values, strict=True) if is_child(cells[number], trial)]
        of_best, of_cheapest = max(values) in parents, max(values, key=lambda pair: (pair[1], pair[0])) in parents
        assert of_best or of_cheapest
        of_the_cheap += not of_best
    assert of_the_cheap > 3


def test_a_merit_wins_over_a_score() -> None:
    """Here the trial with the most room around it is in the middle of the front; its ends are not in the tournament."""
    space, history = SearchSpace(2), History()
    rng = np.random.default_rng(0)
    values = [(0.0, 0.0), (5.0, -5.0), (8.0, -9.0), (8.1, -9.1), (9.0, -10.0), (7.9, -9.05)]  # the last is beaten
    for number, (value, other) in enumerate(values):
        cell = space.sample(rng)
        history.propose(number, cell.to_json(), cell.to_json())
        history.finish(number, value, others=(other,))
    living = history.complete(len(values))
    merit = _merits(living, history)
    assert sorted(range(6), key=merit.__getitem__)[:3] == [5, 3, 2]
    assert merit[1] > merit[2] > merit[3] > merit[5]
    assert merit[0] == merit[4] == max(merit)


def test_tpe_learns_all_values_of_the_front_and_of_the_newest() -> None:
    space, history, rng = SearchSpace(2), History(), np.random.default_rng(0)
    sampler = TPESampler(space, seed=0, initial=5, num_newest=5, lag=0)
    for number in range(31):
        cell = space.sample(rng)
        history.propose(number, cell.to_json(), cell.to_json())
        history.finish(number, -float(number), others=(-100.0 if number else -1.0,))  # the first is the front
    study = sampler._model(31, history)
    assert study is not None
    assert study.directions == [StudyDirection.MAXIMIZE] * 2
    assert [trial.values for trial in study.trials] == [[0, -1], *([-number, -100] for number in range(26, 31))]


def test_evolution_finds_a_longer_front_than_by_the_score_alone_and_a_better_one_than_at_random() -> None:
    """Better by the area between the front and a cell that is bad in both."""

    def found(sampler: str, seed: int, others: Callable[[Cell], tuple[float, ...]] = cheapness) -> tuple[float, int]:
        cells = MadeSearch(create_sampler(sampler, SearchSpace(), seed), workers=5, others=others).run(150)
        points = [(value, *cheapness(cell)) for cell in cells if (value := score(cell)) is not None]
        front = sorted(points[place] for place in pareto_front(points))  # by score, and so from the cheapest
        below = [-3.0, *(value for value, _ in front)]
        steps = zip(front, below, strict=False)
        area = sum((max(value, -3.0) - max(lower, -3.0)) * max(cheap + 200, 0.0) for (value, cheap), lower in steps)
        return area, len(front)

    both = np.array([found("evolution", seed) for seed in range(5)])
    by_score = np.array([found("evolution", seed, lambda cell: ()) for seed in range(5)])
    at_random = np.array([found("random", seed) for seed in range(5)])
    assert both[:, 0].mean() > 1.05 * at_random[:, 0].mean()  # measured: 1.11
    assert both[:, 1].mean() > 1.5 * by_score[:, 1].mean()  # measured: 2


# Each sampler


def test_a_child_is_a_neighbour_of_one_of_the_newest_that_have_a_score() -> None:
    sampler = EvolutionSampler(SearchSpace(2), seed=0, population=6, tournament=3, lag=2)
    search = MadeSearch(sampler, workers=3)
    cells = search.run(60)
    first = next(n for n in range(60) if len(search.history.complete(n - 2)) == 6)
    for number in range(first, 60):
        living = [trial.cell for trial in search.history.complete(number - 2, newest=6)]
        assert any(cells[number] in sampler.space.neighbours(parent) for parent in living)
    assert max(score(cell) or -10 for cell in cells) > max(score(cell) or -10 for cell in cells[:first])


def test_a_tournament_of_many_is_won_by_the_best_of_the_population() -> None:
    sampler = EvolutionSampler(SearchSpace(2), seed=0, population=6, tournament=200, lag=0)
    search = MadeSearch(sampler)
    cells = search.run(40)
    for number in range(15, 40):
        living = search.history.complete(number, newest=6)
        best = max(living, key=lambda trial: score(trial.cell) or -10)
        assert cells[number] in sampler.space.neighbours(best.cell)


def test_local_search_proposes_neighbours_of_the_best_then_of_the_next_best() -> None:
    space = SearchSpace(2, rates=(1, 6), grid_sizes=(1,))  # a cell has 11 neighbours
    sampler = LocalSearchSampler(space, seed=0, initial=3, lag=0)
    search = MadeSearch(sampler)
    cells, depths = search.run(50), set()
    first = next(n for n in range(50) if len(search.history.complete(n)) == 3)
    for number in range(first, 50):
        earlier = set(map(space.canonical_form, cells[:number]))
        parents = [trial.cell for trial in search.history.best(number)]
        open_neighbours = [
            {cell for cell in space.neighbours(parent) if space.canonical_form(cell) not in earlier} for parent in parents
        ]
        depth = next(depth for depth, neighbours in enumerate(open_neighbours) if neighbours)
        assert cells[number] in open_neighbours[depth]
        depths.add(depth)
    assert len(depths) > 2


@pytest.mark.parametrize(("sampler", "bound"), [(PredictorSampler, 1000), (TPESampler, 400)])
def test_a_model_learns_from_the_best_and_the_newest_cells_alone(
    sampler: type[PredictorSampler] | type[TPESampler], bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So its cost is bounded at the 28,000th trial; it is fitted at every 32nd."""
    fitted_on: list[list[int]] = []
    fit: Callable[..., Any] = sampler._fit

    def noted_fit(self: CellSampler, trials: list[Proposed], history: History) -> Any:
        fitted_on.append([trial.number for trial in trials])
        return fit(self, trials, history)

    monkeypatch.setattr(sampler, "_fit", noted_fit)
    proposer, history, rng = sampler(SearchSpace(), seed=0), History(), np.random.default_rng(0)
    for number in range(2000):
        cell = proposer.space.sample(rng)
        history.propose(number, cell.to_json(), cell.to_json())
        history.finish(number, -number)
    for number in range(2000, 2064):
        proposer.propose(number, history)
    assert len(fitted_on) == 3
    assert len(fitted_on[0]) == bound == proposer.num_best + proposer.num_newest
    assert fitted_on[0] == [*range(proposer.num_best), *range(1984 - proposer.num_newest, 1984)]


@pytest.mark.parametrize(
    ("sampler", "settings"),
    [
        (EvolutionSampler, {"population": 0}),
        (EvolutionSampler, {"tournament": 0}),
        (LocalSearchSampler, {"initial": 0}),
        (PredictorSampler, {"candidates": 0}),
        (PredictorSampler, {"best_k": 0}),
        (TPESampler, {"initial": 0}),
    ],
)
def test_settings_out_of_range_are_refused(sampler: type[CellSampler], settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}.* must be at least 1"):
        sampler(SearchSpace(), seed=0, **settings)


def test_a_predictor_without_scikit_learn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "search.cells.samplers.predictor")
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(InputError, match=r"`sampler` predictor needs scikit-learn: pip install .*\[predictor\]"):
        create_sampler("predictor", SearchSpace(), 0)
