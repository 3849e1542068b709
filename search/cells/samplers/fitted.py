"""What samplers with a model of the scores have in common: when it is fitted, and on which trials."""

from abc import abstractmethod
from itertools import islice
from typing import Generic, TypeVar

from search.cells.history import History, Proposed
from search.cells.sampler import LAG, CellSampler, Remembered
from search.cells.space import SearchSpace

Model = TypeVar("Model")


class FittedSampler(CellSampler, Generic[Model]):
    """A sampler with a model that is fitted at fixed trial numbers, so that its average cost does not grow with the history.

    It is fitted on the `num_best` best distinct cells and the `num_newest` newest trials; never on fewer than `initial`. Where
    trials go on to later rungs, it is fitted anew after each of their results: trainings take longer.
    """

    def __init__(self, space: SearchSpace, *, seed: int, initial: int, num_best: int, num_newest: int, lag: int = LAG) -> None:
        if initial < 1:
            raise ValueError(f"initial must be at least 1, got {initial}")
        super().__init__(space, seed=seed, lag=lag)
        self.initial = initial
        self.num_best = num_best
        self.num_newest = num_newest
        self._models: Remembered[History, tuple[tuple[int, int], Model]] = Remembered()  # the last one, with what it is of

    @abstractmethod
    def _fit(self, trials: list[Proposed], history: History) -> Model:
        """A model of the scores that these trials have in the history; they are ordered by number."""

    def _model(self, number: int, history: History) -> Model | None:
        """The model for trial `number`; None if it is too early for one."""
        bound = fitted_before(self.visible_before(number))
        known, model = self._models.get(history, (None, None))
        if known != (bound, history.revision):
            model = self._fitted(bound, history)
            if model is not None:
                self._models[history] = (bound, history.revision), model
        return model

    def _fitted(self, bound: int, history: History) -> Model | None:
        trials = {trial.number: trial for trial in history.complete(bound, newest=self.num_newest)}
        if len(trials) < self.initial:
            return None
        trials |= {trial.number: trial for trial in islice(history.best(bound), self.num_best)}
        return self._fit([trials[number] for number in sorted(trials)], history)


def fitted_before(visible: int) -> int:
    """The greatest multiple of a power of two that is at most `visible`: of 1 up to 31, 2 up to 63, at last of 32.

    >>> [fitted_before(visible) for visible in (31, 33, 67, 1023, 1025, 28000)]
    [31, 32, 64, 992, 1024, 28000]
    """
    period = min(max(visible, 16) // 16, 32)
    return visible - visible % (1 << (period.bit_length() - 1))
