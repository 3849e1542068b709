"""A replayed search does what the real one does, and its clock, its count and its best cell are those of a search."""

from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import search.tabular.replay
from reference.cell import Cell
from search.cells.history import History
from search.cells.sampler import CellSampler
from search.cells.samplers import SAMPLER_NAMES, create_sampler
from search.cells.space import SearchSpace
from search.runs.halving import Halving, Rule
from search.runs.lag import chosen_lag
from search.runs.store import Claim, SearchPlan, Store, Told
from search.runs.tables import SEARCH
from search.tabular.replay import Moment, Strategy, replay
from search.tabular.table import CellTable
from tests.search.tabular.made_table import made_table

SMALL = made_table(SearchSpace(2, (1,), (1,)), seeds=1)
TABLE = made_table(seeds=1)
SEVERAL = made_table(seeds=4, seed=1)
RUNGS = (16, 64, 256)
STRATEGIES = [Strategy(name) for name in SAMPLER_NAMES] + [
    Strategy("paper", Halving("asha", RUNGS, 4)),
    Strategy("evolution", Halving("asha", RUNGS, 2)),
    Strategy("local", Halving("pasha", RUNGS, 4)),
    Strategy("tpe", Halving("halving", RUNGS, 4)),
    Strategy("predictor", Halving("asha", RUNGS, 4)),
]


class Watched:
    """A sampler that remembers what it proposed."""

    def __init__(self, sampler: CellSampler, proposed: dict[int, Cell]) -> None:
        self._sampler, self._proposed = sampler, proposed

    def visible_before(self, number: int) -> int:
        return self._sampler.visible_before(number)

    def propose(self, number: int, history: History) -> Cell:
        self._proposed[number] = cell = self._sampler.propose(number, history)
        return cell


def really(
    table: CellTable, strategy: Strategy, trials: int, seed: int, url: str, at_once: int
) -> tuple[dict[int, Cell], int]:
    """The cells of the search by the store that a real one has, so many at a time, and the place of its best one."""
    halving = strategy.halving and replace(strategy.halving, lag=strategy.lag)
    proposed = dict[int, Cell]()
    sampler = Watched(create_sampler(strategy.sampler, table.space, seed, lag=strategy.lag), proposed)
    with closing(Store(url, "replayed", "{}", halving=halving)) as store:
        plan, running = SearchPlan(trials, {}, 1, 0), deque[Claim]()
        while True:
            claim = store.claim(plan, table.space, sampler) if len(running) < at_once else None
            if claim is not None and claim.key.name != SEARCH:  # the best one again: the search has ended
                break
            if claim is not None:
                running.append(claim)
            elif running:  # none can begin; without one that runs, a second was spent on copies
                ended = running.popleft()
                column = -1 if ended.until is None else table.iterations.index(ended.until)
                score = table.cells[table.place_of(ended.cell)].scores[0][column]
                assert store.tell(ended.key, Told(score, 1, "{}", "[]"))
        assert store.state.best is not None
        return proposed, table.place_of(proposed[store.state.best.number])


def replayed(
    table: CellTable, strategy: Strategy, trials: int, seed: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[int, Cell], int]:
    """The same of a replayed search."""
    proposed = dict[int, Cell]()

    def watched(*arguments: Any, **options: Any) -> Watched:
        return Watched(create_sampler(*arguments, **options), proposed)

    monkeypatch.setattr(search.tabular.replay, "create_sampler", watched)
    moments = replay(table, strategy, trials=trials, workers=workers, seed=seed)
    assert moments[-1].trials == trials
    return proposed, moments[-1].best


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)
def test_it_tries_the_cells_that_a_real_search_tries(
    strategy: Strategy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = 18  # more than there are different cells: some are copies
    assert trials > len(SMALL.cells)
    expected = really(SMALL, strategy, trials, 3, f"sqlite:///{tmp_path / 'study.db'}", 1)
    assert replayed(SMALL, strategy, trials, 3, 1, monkeypatch) == expected


@pytest.mark.parametrize("halving", [None, Halving("asha", RUNGS, 2)], ids=["full", "asha"])
@pytest.mark.parametrize("sampler", ["paper", "local"])
def test_so_do_eight_workers_with_their_lag(
    sampler: str, halving: Halving | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy = Strategy(sampler, halving, chosen_lag(8, 18, halving))
    assert strategy.lag == 32
    near = replace(strategy, lag=8)
    for each in (strategy, near):
        expected = really(SMALL, each, 18, 3, f"sqlite:///{tmp_path / f'{each.lag}.db'}", 8)
        assert replayed(SMALL, each, 18, 3, 8, monkeypatch) == expected


def test_the_lag_decides_what_a_sampler_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (replayed(TABLE, Strategy("local", lag=lag), 30, 0, 1, monkeypatch)[0] for lag in (0, 20))
    assert few != many


def distinct(table: CellTable, trials: int, seed: int) -> Iterator[int]:
    """Places of the cells that random search tries, each once."""
    sampler, seen = create_sampler("random", table.space, seed), History()
    for number in range(trials):
        cell = sampler.propose(number, seen)
        seen.propose(number, cell.to_json(), table.space.canonical_form(cell).to_json())
        yield table.place_of(cell)


def test_one_worker_takes_all_seconds_and_iterations_one_after_the_other() -> None:
    places = list(distinct(TABLE, 20, 5))
    moments = replay(TABLE, Strategy("random"), trials=20, workers=1, seed=5)
    taken = TABLE.seconds[places, 0]
    assert moments[-1].seconds == pytest.approx(taken.sum())
    assert moments[-1].iterations == 20 * 256
    best = int(np.argmax(TABLE.means[places]))
    rise = next(moment for moment in moments if moment.best == places[best])
    assert rise.trials == best + 1
    assert rise.seconds == pytest.approx(taken[: best + 1].sum())


def test_workers_share_the_time_and_come_to_the_same_end() -> None:
    one, four = (replay(TABLE, Strategy("evolution"), trials=40, workers=workers, seed=1) for workers in (1, 4))
    assert one[-1].best == four[-1].best
    assert one[-1].iterations == four[-1].iterations
    assert one[-1].seconds / 4 <= four[-1].seconds < one[-1].seconds / 2


def test_a_whole_training_comes_of_stretches_that_take_their_share() -> None:
    strategy = Strategy("random", Halving("asha", (64, 256), 1))  # all go on
    moments = replay(TABLE, strategy, trials=12, workers=1, seed=2)
    assert moments[-1].iterations == 12 * 256
    assert moments[-1].seconds == pytest.approx(TABLE.seconds[list(distinct(TABLE, 12, 2)), 0].sum())


def test_early_stopping_takes_fewer_iterations() -> None:
    cut = replay(TABLE, Strategy("random", Halving("halving", RUNGS, 4)), trials=32, workers=1, seed=0)
    assert cut[-1].iterations == 32 * 16 + 8 * 48 + 2 * 192


def test_a_cell_has_the_scores_of_one_seed_in_a_search_and_others_in_another() -> None:
    """A search of all cells ends with the best by the scores that it saw: with noise, not always the same."""
    trials = len(SEVERAL.cells)
    bests = [replay(SEVERAL, Strategy("random"), trials=trials, workers=1, seed=seed)[-1] for seed in range(30)]
    assert all(last.iterations == 256 * trials for last in bests)  # none was a copy
    assert len({last.best for last in bests}) > 1
    highest = SEVERAL.scores[:, :, -1].max(axis=1)
    assert all(highest[last.best] >= np.sort(SEVERAL.scores[:, :, -1].min(axis=1))[-1] for last in bests)


@settings(max_examples=25, deadline=None)
@given(
    sampler=st.sampled_from(["random", "paper", "evolution", "local"]),
    rule=st.sampled_from([None, *get_args(Rule)]),
    trials=st.integers(1, 60),
    workers=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_moments_go_on(sampler: str, rule: Rule | None, trials: int, workers: int, seed: int) -> None:
    strategy = Strategy(sampler, rule and Halving(rule, RUNGS, 4))
    moments = replay(SEVERAL, strategy, trials=trials, workers=workers, seed=seed)
    assert moments == replay(SEVERAL, strategy, trials=trials, workers=workers, seed=seed)
    for before, after in pairwise(moments):
        assert before.trials <= after.trials
        assert before.iterations <= after.iterations
        assert before.seconds <= after.seconds
        assert before != after
    last: Moment = moments[-1]
    assert last.trials == trials
    assert last.iterations <= 256 * min(trials, len(SEVERAL.cells))
    assert last.seconds <= SEVERAL.seconds.max() * last.iterations / 256
