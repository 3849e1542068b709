"""Regularised evolution (Real, Aggarwal, Huang and Le, AAAI 2019, https://arxiv.org/abs/1802.01548, algorithm 1)."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from reference.cell import Cell
from search.cells.history import History, Proposed
from search.cells.pareto import merits
from search.cells.sampler import LAG, MAX_DRAWS, CellSampler
from search.cells.space import SearchSpace


class EvolutionSampler(CellSampler):
    """Aging evolution: the population is the `population` newest visible trials with a score, however good they are.

    The parent is the best of `tournament` of them, drawn with replacement; its child is a neighbour of it. The first cells,
    until there are so many scores, are uniform over the space. A failed trial is never in the population. Of several
    objectives the best is that of the greatest merit in the population (`search.cells.pareto`), as in NSGA-II.
    """

    takes_several_objectives = True

    def __init__(self, space: SearchSpace, *, seed: int, population: int = 20, tournament: int = 5, lag: int = LAG) -> None:
        if population < 1 or tournament < 1:
            raise ValueError(f"population and tournament must be at least 1, got {population} and {tournament}")
        super().__init__(space, seed=seed, lag=lag)
        self.population = population
        self.tournament = tournament

    def propose(self, number: int, history: History) -> Cell:
        living = history.complete(self.visible_before(number), newest=self.population)
        rng = self._rng(number)
        children = self._children(living, _merits(living, history), rng) if len(living) == self.population else ()
        return self._first_new(number, history, chain(children, self._uniform(rng)))

    def _children(self, living: Sequence[Proposed], merit: Sequence[Any], rng: np.random.Generator) -> Iterator[Cell]:
        for _ in range(MAX_DRAWS):
            entrants = rng.integers(len(living), size=self.tournament).tolist()
            winner = max(entrants, key=merit.__getitem__)
            yield self.space.mutate(living[winner].cell, rng)


def _merits(living: Sequence[Proposed], history: History) -> Sequence[Any]:
    """What the trials are compared by: greater ones are better."""
    return merits(history.values(living)) if history.has_several_objectives else history.scores(living)
