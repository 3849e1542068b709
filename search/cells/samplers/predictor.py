"""A predictor of scores that chooses among many candidates, after BANANAS (White, Neiswanger and Savani, AAAI 2021,
https://arxiv.org/abs/1910.11858).

BANANAS draws from an ensemble of neural networks. Here it is the posterior of a Bayesian linear regression (MacKay, Neural
Computation 1992), which is fitted in milliseconds.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import chain, islice
from typing import Any

import numpy as np
from scipy.stats import rankdata
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import BayesianRidge

from reference.cell import Cell
from search.cells.history import History, Proposed
from search.cells.sampler import LAG, MAX_DRAWS
from search.cells.samplers.fitted import FittedSampler
from search.cells.space import SearchSpace


@dataclass(frozen=True)
class Predictor:
    """Weights of the path encoding for scores as ranks in 0..1, with mean (E,) and covariance root·rootᵀ, (E, E)."""

    encoder: Any  # of scikit-learn, which has no types
    mean: np.ndarray
    root: np.ndarray

    def draw(self, forms: Iterable[Cell], rng: np.random.Generator) -> np.ndarray:
        """Scores (N,) of N canonical forms with weights drawn from the posterior (Thompson sampling), up to a constant."""
        weights = self.mean + self.root @ rng.standard_normal(len(self.mean))  # (E,)
        scores: np.ndarray = self.encoder.transform(map(path_encoding, forms)) @ weights
        return scores


class PredictorSampler(FittedSampler[Predictor]):
    """Thompson sampling: of up to `candidates` new cells the one with the greatest score in a draw of the predictor.

    Candidates are neighbours of the `best_k` best distinct visible cells, and one of ten is uniform over the space, as are the
    cells until there are `initial` scores. The same seed gives the same cells on one kind of processor; on another one,
    rounding may choose another candidate.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        initial: int = 10,
        candidates: int = 100,
        best_k: int = 10,
        num_best: int = 500,
        num_newest: int = 500,
        lag: int = LAG,
    ) -> None:
        if candidates < 1 or best_k < 1:
            raise ValueError(f"candidates and best_k must be at least 1, got {candidates} and {best_k}")
        super().__init__(space, seed=seed, initial=initial, num_best=num_best, num_newest=num_newest, lag=lag)
        self.candidates = candidates
        self.best_k = best_k

    def propose(self, number: int, history: History) -> Cell:
        rng, model = self._rng(number), self._model(number, history)
        if model is None:
            return self._first_new(number, history, self._uniform(rng))
        drawn = chain(self._near_best(number, history, rng), self._uniform(rng))
        cells = self._new_ones(number, history, drawn)
        if not cells:
            return self.space.sample(rng)
        return list(cells.values())[int(model.draw(cells, rng).argmax())]

    def _near_best(self, number: int, history: History, rng: np.random.Generator) -> Iterator[Cell]:
        parents = [trial.cell for trial in islice(history.best(self.visible_before(number)), self.best_k)]
        for _ in range(MAX_DRAWS):
            if rng.random() < 0.1:
                yield self.space.sample(rng)
            else:
                yield self.space.mutate(parents[int(rng.integers(len(parents)))], rng)

    def _new_ones(self, number: int, history: History, drawn: Iterator[Cell]) -> dict[Cell, Cell]:
        """Different cells that no earlier trial has, by their canonical forms."""
        cells: dict[Cell, Cell] = {}
        for cell in drawn:
            form = self.space.canonical_form(cell)
            if not history.has_form(form.to_json(), number):
                cells.setdefault(form, cell)
            if len(cells) == self.candidates:
                break
        return cells

    def _fit(self, trials: list[Proposed], history: History) -> Predictor:
        scores = history.scores(trials)
        encoder = DictVectorizer(sparse=False)
        encodings = encoder.fit_transform(path_encoding(Cell.from_json(trial.form)) for trial in trials)  # (N, E)
        regression = BayesianRidge().fit(encodings, rankdata(scores) / len(scores))  # ranks are finite where scores are not
        variances, axes = np.linalg.eigh(regression.sigma_)
        return Predictor(encoder, regression.coef_, axes * np.sqrt(np.maximum(variances, 0)))  # rounding may be below 0


def path_encoding(cell: Cell) -> Counter[str]:
    """How often the cell has each operation, kind of operation, rate or grid size, and end of a path from the backbone.

    A path's end is a branch's kind of operation, and that of the branch or the layer that it reads.

    >>> cell = Cell.from_json(
    ...     '[{"op": "conv", "kernel": 1, "input": -1}, {"op": "pyramid_pooling", "grid_size": [1, 4], "input": 0}]'
    ... )
    >>> sorted(path_encoding(cell))
    ['-1 > Conv1x1', 'Conv1x1', 'Conv1x1 > PyramidPooling', 'PyramidPooling', 'conv1x1', 'grid_size[0] = 1', \
'grid_size[1] = 4', 'pool 1x4']
    """
    encoding: Counter[str] = Counter()
    kinds = [type(branch.operation).__name__ for branch in cell.branches]
    for branch, kind in zip(cell.branches, kinds, strict=True):
        source = kinds[branch.input_index] if branch.input_index >= 0 else branch.input_index
        encoding.update([str(branch.operation), kind, f"{source} > {kind}"])
        for field in fields(branch.operation):
            encoding.update(f"{field.name}[{i}] = {size}" for i, size in enumerate(getattr(branch.operation, field.name)))
    return encoding
