"""Local search (White, Nolen and Savani, UAI 2021, https://arxiv.org/abs/2005.02960)."""

import numpy as np

from reference.cell import Cell
from search.cells.history import History, Proposed
from search.cells.sampler import LAG, CellSampler, Remembered
from search.cells.space import SearchSpace


class LocalSearchSampler(CellSampler):
    """Local search that moves on as soon as a neighbour is better ("query until lower"), from the best of `initial` cells.

    Trial n is a neighbour of the best visible cell, uniformly chosen among those that are not proposed yet; if all are, of the
    next best, and so on. The first cells, until there are `initial` scores, are uniform over the space.
    """

    def __init__(self, space: SearchSpace, *, seed: int, initial: int = 10, lag: int = LAG) -> None:
        if initial < 1:
            raise ValueError(f"initial must be at least 1, got {initial}")
        super().__init__(space, seed=seed, lag=lag)
        self.initial = initial
        # Form of a cell -> the first trial that found it used up, and how many neighbours it has.
        self._used_up: Remembered[History, dict[str, tuple[int, int]]] = Remembered()

    def propose(self, number: int, history: History) -> Cell:
        visible, rng = self.visible_before(number), self._rng(number)
        if len(history.complete(visible, newest=self.initial)) == self.initial:
            for parent in history.best(visible):
                if cell := self._new_neighbour(parent, number, history, rng):
                    return cell
        return self._first_new(number, history, self._uniform(rng))

    def _new_neighbour(self, parent: Proposed, number: int, history: History, rng: np.random.Generator) -> Cell | None:
        used_up = self._used_up.setdefault(history, {})
        since, count = used_up.get(parent.form, (number + 1, 0))
        if since <= number:
            rng.permutation(count)  # drawn in any case: what is remembered must not change what follows
            return None
        neighbours = list(self.space.neighbours(parent.cell))
        for i in rng.permutation(len(neighbours)):
            cell = neighbours[int(i)]
            if not history.has_form(self.space.canonical_form(cell).to_json(), number):
                return cell
        used_up[parent.form] = number, len(neighbours)
        return None
