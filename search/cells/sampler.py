"""How a study proposes cells: the paper's sampler (section 3.2) and a few of Optuna's own, for any Optuna study.

A cell travels through Optuna as categorical parameters: `branch0_operation`, then `branch1_input`, `branch1_operation` and so
on; of one input, which branch 0 always reads, there is no `branch0_input`.

    sampler = PaperSampler(SearchSpace(), seed=0)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(lambda trial: score(suggest_cell(trial, SearchSpace())), n_trials=100)
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any
from zlib import crc32

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from reference.cell import BACKBONE_FEATURE, Branch, Cell, Operation
from search.cells.history import History, Proposed
from search.cells.space import SearchSpace
from search.errors import InputError

LAG = 4  # enough for five workers, and few enough for a study of a dozen trials to use its best cells
MAX_DRAWS = 1000
EVOLUTION_POPULATION = 20
SAMPLER_NAMES = ("paper", "random", "tpe", "evolution")


def suggest_cell(trial: optuna.trial.BaseTrial, space: SearchSpace) -> Cell:
    """Ask a trial for its cell, parameter by parameter; works with any sampler of the study."""
    params = {name: trial.suggest_categorical(name, choices) for name, choices in _choices(space).items()}
    return cell_from_params(params, space)


def params_of_cell(cell: Cell, space: SearchSpace) -> dict[str, str | int]:
    """The Optuna parameters of a cell in the space, for `study.enqueue_trial` or `optuna.trial.FixedTrial`."""
    params: dict[str, str | int] = {}
    for i, branch in enumerate(cell.branches):
        params |= {f"branch{i}_input": branch.input_index, f"branch{i}_operation": str(branch.operation)}
    return {name: params[name] for name in _choices(space)}


def distributions_of(space: SearchSpace) -> dict[str, BaseDistribution]:
    """The distributions of these parameters."""
    return {name: CategoricalDistribution(choices) for name, choices in _choices(space).items()}


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


class CellSampler(optuna.samplers.BaseSampler, ABC):
    """A sampler of cells: for the search, which keeps a history, and for any Optuna study of one objective.

    Trial n is a function of `seed`, n, the cells of all earlier trials, and the scores of those that are visible: numbered
    below `visible_before(n)`. So the same seed gives the same cells with any number of workers up to `lag` + 1, if trial n is
    asked for only once the visible ones are finished. A sampler keeps nothing that a study could not give it again: it may be
    copied, pickled and built anew, and the study goes on where it stopped.
    """

    def __init__(self, space: SearchSpace, *, seed: int, lag: int = LAG) -> None:
        if seed < 0 or lag < 0:
            raise ValueError(f"seed and lag must be at least 0, got {seed} and {lag}")
        self.space = space
        self.seed = seed
        self.lag = lag

    @abstractmethod
    def propose(self, number: int, history: History) -> Cell:
        """The cell of trial `number`; `history` has the cells of all earlier trials, and scores where they are known."""

    def visible_before(self, number: int) -> int:
        """Trials below this number must be finished before trial `number` is asked for; 0 if results are never used."""
        return max(0, number - self.lag)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return distributions_of(self.space)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return params_of_cell(self.propose(trial.number, _history_of(study, trial.number, self.space)), self.space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw any other parameter of the objective, such as a learning rate: uniform, a function of (seed, trial) alone."""
        seed = _trial_seed(self.seed, trial.number, crc32(param_name.encode()))
        return optuna.samplers.RandomSampler(seed).sample_independent(study, trial, param_name, param_distribution)

    def _new(self, history: History, draw: Callable[[], Cell]) -> Cell:
        """Draw until the cell's canonical form is new, at most `MAX_DRAWS` times."""
        for _ in range(MAX_DRAWS):
            cell = draw()
            if self.space.canonical_form(cell).to_json() not in history:
                break
        return cell


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

    def visible_before(self, number: int) -> int:
        return super().visible_before(number) if self.near_best_probability > 0 else 0

    def propose(self, number: int, history: History) -> Cell:
        parents = history.best(self.best_k, self.visible_before(number))
        rng = np.random.default_rng([self.seed, number])
        return self._new(history, lambda: self._draw(parents, rng))

    def _draw(self, parents: Sequence[Proposed], rng: np.random.Generator) -> Cell:
        if rng.random() < self.near_best_probability and parents:
            return self.space.mutate(parents[int(rng.integers(len(parents)))].cell, rng)
        return self.space.sample(rng)


class SeededByTrial(optuna.samplers.BaseSampler):
    """One of Optuna's samplers, built afresh for each trial with a seed that is a function of (seed, trial number).

    Optuna's own seed starts one stream of random numbers, so a resumed study would propose its first cells again.
    """

    def __init__(self, build: Callable[[int], optuna.samplers.BaseSampler], *, seed: int) -> None:
        self.seed = seed
        self._build = build
        self._samplers: dict[int, optuna.samplers.BaseSampler] = {}  # samplers of the trials in flight, by trial number

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._samplers[trial.number] = self._build(_trial_seed(self.seed, trial.number))
        self._samplers[trial.number].before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._of(trial).sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._of(trial).after_trial(study, trial, state, values)
        self._samplers.pop(trial.number, None)

    def _of(self, trial: FrozenTrial) -> optuna.samplers.BaseSampler:
        """The trial's own sampler; a new one for a trial that another process began."""
        return self._samplers.get(trial.number) or self._build(_trial_seed(self.seed, trial.number))


def create_sampler(name: str, space: SearchSpace, seed: int, *, lag: int = LAG) -> optuna.samplers.BaseSampler:
    """Create the sampler of this name, one of `SAMPLER_NAMES`; `lag` is for the paper's. Raises InputError for another name.

    "random" is the paper's sampler without cells near the best. "tpe" and "evolution" (a genetic algorithm) are Optuna's.
    They use all results there are when they are asked, so their cells depend on the number of workers.
    """
    if seed < 0:
        raise InputError(f"`seed` must be 0 or more, got {seed}")
    match name:
        case "paper":
            return PaperSampler(space, seed=seed, lag=lag)
        case "random":
            return PaperSampler(space, seed=seed, near_best_probability=0)
        case "tpe":
            return SeededByTrial(_tpe, seed=seed)
        case "evolution":
            return SeededByTrial(_evolution, seed=seed)
    raise InputError(f"`sampler` {name} is unknown; choose one of {', '.join(SAMPLER_NAMES)}")


def _tpe(trial_seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(seed=trial_seed)


def _evolution(trial_seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.NSGAIISampler(population_size=EVOLUTION_POPULATION, seed=trial_seed)


def _trial_seed(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


@cache
def _operations_by_name(space: SearchSpace) -> dict[str, Operation]:
    return {str(operation): operation for operation in space.operations}


@cache
def _choices(space: SearchSpace) -> dict[str, tuple[str | int, ...]]:
    choices: dict[str, tuple[str | int, ...]] = {}
    for i in range(space.num_branches):
        if space.num_inputs > 1 or i > 0:
            choices[f"branch{i}_input"] = tuple(range(-space.num_inputs, i))
        choices[f"branch{i}_operation"] = tuple(_operations_by_name(space))
    return choices


def _history_of(study: optuna.Study, before: int, space: SearchSpace) -> History:
    """The trials below number `before`; one whose parameters are not all there (yet) is left out.

    Raises ValueError for a study of several objectives.
    """
    if len(study.directions) > 1:
        raise ValueError("this sampler is for one objective")
    sign = 1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else -1
    names, history = tuple(_choices(space)), History()
    for trial in study.get_trials(deepcopy=False):
        values = tuple(map(trial.params.get, names))
        if trial.number < before and None not in values:
            history.propose(trial.number, *_cell_and_form(values, space))
            if trial.state == TrialState.COMPLETE:
                history.finish(trial.number, sign * trial.values[0])
    return history


@cache  # cached, because a long study is scanned at every trial and its cells do not change
def _cell_and_form(values: tuple[Any, ...], space: SearchSpace) -> tuple[str, str]:
    cell = cell_from_params(dict(zip(_choices(space), values, strict=True)), space)
    return cell.to_json(), space.canonical_form(cell).to_json()
