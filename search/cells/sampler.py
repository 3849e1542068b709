"""What all samplers of cells are, for a search and for any Optuna study; `search/cells/samplers/` has them.

A cell travels through Optuna as categorical parameters: `branch0_operation`, then `branch1_input`, `branch1_operation` and so
on; of one input, which branch 0 always reads, there is no `branch0_input`.

    sampler = create_sampler("paper", SearchSpace(), seed=0)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(lambda trial: score(suggest_cell(trial, SearchSpace())), n_trials=100)
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from operator import mul
from threading import Lock
from typing import Any, ClassVar, Self, TypeVar
from weakref import WeakKeyDictionary
from zlib import crc32

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from reference.cell import BACKBONE_FEATURE, Branch, Cell, Operation
from search.cells.history import History
from search.cells.space import SearchSpace

LAG = 4  # enough for five workers, and few enough for a study of a dozen trials to use its best cells
_OF_A_CELL = re.compile(r"branch\d+_(input|operation)")
MAX_DRAWS = 1000

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def suggest_cell(trial: optuna.trial.BaseTrial, space: SearchSpace) -> Cell:
    """Ask a trial for its cell, parameter by parameter; works with any sampler of the study."""
    params = {name: trial.suggest_categorical(name, choices) for name, choices in choices_of(space).items()}
    return cell_from_params(params, space)


def params_of_cell(cell: Cell, space: SearchSpace) -> dict[str, str | int]:
    """The Optuna parameters of a cell in the space, for `study.enqueue_trial` or `optuna.trial.FixedTrial`."""
    params: dict[str, str | int] = {}
    for i, branch in enumerate(cell.branches):
        params |= {f"branch{i}_input": branch.input_index, f"branch{i}_operation": str(branch.operation)}
    return {name: params[name] for name in choices_of(space)}


def distributions_of(space: SearchSpace) -> dict[str, BaseDistribution]:
    """The distributions of these parameters."""
    return {name: CategoricalDistribution(choices) for name, choices in choices_of(space).items()}


def cell_from_params(params: Mapping[str, Any], space: SearchSpace) -> Cell:
    """The cell that a trial's parameters describe; others in `params` are ignored. Raises ValueError for one that is bad."""
    named = params if space.num_inputs > 1 else {**params, "branch0_input": BACKBONE_FEATURE}
    inputs = (named[f"branch{i}_input"] for i in range(space.num_branches))
    by_name = _operations_by_name(space)
    operations = (by_name[named[f"branch{i}_operation"]] for i in range(space.num_branches))
    try:
        return Cell(tuple(map(Branch, inputs, operations)))
    except KeyError as error:
        raise ValueError(
            f"not the parameters of a cell of {space.num_branches} branches: {error} missing or unknown"
        ) from error


class Remembered(WeakKeyDictionary[_Key, _Value]):
    """What was computed of objects that are alive, for use under its lock; copies are empty, as it can be computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = Lock()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()


class StudyHistory:
    """The trials of an Optuna study as a history, in which each trial is looked at until it is finished, and not again."""

    def __init__(self, space: SearchSpace) -> None:
        self._space = space
        self._origin: tuple[BaseStorage, int] | None = None
        self._history = History()
        self._num_read = 0
        self._unfinished: list[int] = []  # of those that were read

    def read(self, study: optuna.Study) -> History:
        """The history now; a trial whose parameters are not all there (yet) is left out.

        Raises ValueError for a complete trial with a part of a cell: the study's cells are of another space.
        """
        trials = study.get_trials(deepcopy=False)  # by number
        origin = (study._storage, study._study_id)
        if self._origin != origin or len(trials) < self._num_read:
            self._origin, self._history, self._num_read, self._unfinished = origin, History(), 0, []
        changed = [*self._unfinished, *range(self._num_read, len(trials))]
        for number in changed:
            self._read(trials[number], study.directions)
        self._unfinished = [number for number in changed if not trials[number].state.is_finished()]
        self._num_read = len(trials)
        return self._history

    def _read(self, trial: FrozenTrial, directions: Sequence[StudyDirection]) -> None:
        if all(name in trial.params for name in choices_of(self._space)):
            cell = cell_from_params(trial.params, self._space)
            self._history.propose(trial.number, cell.to_json(), self._space.canonical_form(cell).to_json())
            if trial.state == TrialState.COMPLETE:
                signs = (1 if direction == StudyDirection.MAXIMIZE else -1 for direction in directions)
                score, *others = map(mul, signs, trial.values)
                self._history.finish(trial.number, score, others=tuple(others))
        elif trial.state == TrialState.COMPLETE and any(name in trial.params for name in choices_of(self._space)):
            raise ValueError(f"trial {trial.number} has a cell of another search space than the sampler's: give both the same")


class CellSampler(optuna.samplers.BaseSampler, ABC):
    """A sampler of cells: for the search, which keeps a history, and for any Optuna study.

    Trial n is a function of `seed`, n, the cells of all earlier trials, and the scores of those that are visible: numbered
    below `visible_before(n)`. So the same seed gives the same cells with any number of workers up to `lag` + 1, if trial n is
    asked for only once the visible ones are finished. A sampler keeps nothing that a study could not give it again: it may be
    copied, pickled and built anew, and the study goes on where it stopped.
    """

    takes_several_objectives: ClassVar[bool] = False  # and not the score alone

    def __init__(self, space: SearchSpace, *, seed: int, lag: int = LAG) -> None:
        if seed < 0 or lag < 0:
            raise ValueError(f"seed and lag must be at least 0, got {seed} and {lag}")
        self.space = space
        self.seed = seed
        self.lag = lag
        self._histories: Remembered[optuna.Study, StudyHistory] = Remembered()

    @abstractmethod
    def propose(self, number: int, history: History) -> Cell:
        """The cell of trial `number`; `history` has the cells of all earlier trials, and scores where they are known."""

    @property
    def uses_scores(self) -> bool:
        """Whether a cell depends on the scores of earlier ones."""
        return True

    def visible_before(self, number: int) -> int:
        """Trials below this number must be finished before trial `number` is asked for; 0 if scores are never used."""
        return max(0, number - self.lag) if self.uses_scores else 0

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return distributions_of(self.space)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self._require_objectives(study)
        with self._histories.lock:
            history = self._histories.setdefault(study, StudyHistory(self.space)).read(study)
            params = params_of_cell(self.propose(trial.number, history), self.space)
        return {name: value for name, value in params.items() if name in search_space}  # PartialFixedSampler fixes others

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw any other parameter of the objective, such as a learning rate: uniform, a function of (seed, trial) alone.

        Raises ValueError for a parameter of a cell that is not in the sampler's space.
        """
        self._require_objectives(study)
        own = distributions_of(self.space).get(param_name)
        if own != param_distribution and (own is not None or _OF_A_CELL.fullmatch(param_name)):
            raise ValueError(f"{param_name} is of a cell in another search space than the sampler's: give both the same")
        seed = seed_of(self.seed, trial.number, crc32(param_name.encode()))
        return optuna.samplers.RandomSampler(seed).sample_independent(study, trial, param_name, param_distribution)

    def _rng(self, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, number])

    def _uniform(self, rng: np.random.Generator) -> Iterator[Cell]:
        """Cells uniformly at random, `MAX_DRAWS` of them."""
        return (self.space.sample(rng) for _ in range(MAX_DRAWS))

    def _first_new(self, number: int, history: History, candidates: Iterable[Cell]) -> Cell:
        """The first candidate whose canonical form no trial before `number` has; the last one if there is none."""
        for cell in candidates:
            if not history.has_form(self.space.canonical_form(cell).to_json(), number):
                break
        return cell

    def _require_objectives(self, study: optuna.Study) -> None:
        if self.uses_scores and not self.takes_several_objectives and len(study.directions) > 1:
            raise ValueError(
                f"{type(self).__name__} is for studies of one objective, got {len(study.directions)}: "
                "of several take evolution, tpe or random"
            )


def seed_of(*entropy: int) -> int:
    """A seed for a library that takes one number: a function of several."""
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


@cache
def _operations_by_name(space: SearchSpace) -> dict[str, Operation]:
    return {str(operation): operation for operation in space.operations}


@cache
def choices_of(space: SearchSpace) -> Mapping[str, tuple[str | int, ...]]:
    """The choices of each Optuna parameter of the space's cells."""
    choices: dict[str, tuple[str | int, ...]] = {}
    for i in range(space.num_branches):
        if space.num_inputs > 1 or i > 0:
            choices[f"branch{i}_input"] = tuple(range(-space.num_inputs, i))
        choices[f"branch{i}_operation"] = tuple(_operations_by_name(space))
    return choices
