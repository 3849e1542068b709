"""The paper's sampler (section 3.2), and random search, which is a part of it."""

from collections.abc import Sequence
from itertools import islice

import numpy as np

from reference.cell import Cell
from search.cells.history import History, Proposed
from search.cells.sampler import LAG, MAX_DRAWS, CellSampler
from search.cells.space import SearchSpace


class PaperSampler(CellSampler):
    """Random search as in Vizier (paper, section 3.2): cells uniformly at random, and some near the best observed so far.

    With `near_best_probability` trial n is a neighbour of one of the `best_k` best distinct cells among the *visible* trials,
    uniformly chosen; otherwise, and while none is complete, it is uniform over the space. A cell of the canonical form of an
    earlier one (`SearchSpace.canonical_form`) is drawn again, at most `MAX_DRAWS` times. Only complete trials are parents.
    """

    def __init__(
        self, space: SearchSpace, *, seed: int, near_best_probability: float = 0.5, best_k: int = 10, lag: int = LAG
    ) -> None:
        if not 0 <= near_best_probability <= 1:
            raise ValueError(f"near_best_probability must be between 0 and 1, got {near_best_probability}")
        if best_k < 1:
            raise ValueError(f"best_k must be at least 1, got {best_k}")
        super().__init__(space, seed=seed, lag=lag)
        self.near_best_probability = near_best_probability
        self.best_k = best_k

    @property
    def uses_scores(self) -> bool:
        return self.near_best_probability > 0

    def propose(self, number: int, history: History) -> Cell:
        parents = list(islice(history.best(self.visible_before(number)), self.best_k)) if self.uses_scores else []
        rng = self._rng(number)
        return self._first_new(number, history, (self._draw(parents, rng) for _ in range(MAX_DRAWS)))

    def _draw(self, parents: Sequence[Proposed], rng: np.random.Generator) -> Cell:
        if rng.random() < self.near_best_probability and parents:
            return self.space.mutate(parents[int(rng.integers(len(parents)))].cell, rng)
        return self.space.sample(rng)
