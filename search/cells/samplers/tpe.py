"""The tree-structured Parzen estimator (Bergstra et al., NIPS 2011), as Optuna has it."""

from collections.abc import Iterator
from itertools import chain

import optuna

from reference.cell import Cell
from search.cells.history import History, Proposed
from search.cells.sampler import LAG, cell_from_params, choices_of, distributions_of, params_of_cell, seed_of
from search.cells.samplers.fitted import FittedSampler
from search.cells.space import SearchSpace

MAX_MODEL_DRAWS = 20  # each takes milliseconds


class TPESampler(FittedSampler[optuna.Study]):
    """Optuna's TPE on all parameters at once; its random numbers are a function of (seed, trial), its study one in memory.

    Of several objectives it learns from the Pareto front and the newest trials (Ozaki et al., Multiobjective TPE, GECCO 2020).
    Cells are uniform until there are `initial` scores, and where the estimator has proposed only earlier cells.
    """

    takes_several_objectives = True

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        initial: int = 10,
        num_best: int = 100,
        num_newest: int = 300,
        lag: int = LAG,
    ) -> None:
        super().__init__(space, seed=seed, initial=initial, num_best=num_best, num_newest=num_newest, lag=lag)

    def propose(self, number: int, history: History) -> Cell:
        model = self._model(number, history)
        of_model = self._cells(model, number) if model is not None else ()
        return self._first_new(number, history, chain(of_model, self._uniform(self._rng(number))))

    def _cells(self, study: optuna.Study, number: int) -> Iterator[Cell]:
        tpe = optuna.samplers.TPESampler(seed=seed_of(self.seed, number), n_startup_trials=0, constant_liar=False)
        space = {name: each for name, each in distributions_of(self.space).items() if not each.single()}
        fixed = {name: choices[0] for name, choices in choices_of(self.space).items()}
        trial = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING)
        for _ in range(MAX_MODEL_DRAWS):
            yield cell_from_params(fixed | tpe.sample_relative(study, trial, space), self.space)

    def _fit(self, trials: list[Proposed], history: History) -> optuna.Study:
        all_values = history.values(trials)
        study, of_space = _silent_study(len(all_values[0])), distributions_of(self.space)
        for trial, values in zip(trials, all_values, strict=True):
            params = params_of_cell(trial.cell, self.space)
            study.add_trial(optuna.trial.create_trial(params=params, distributions=of_space, values=values))
        return study


def _silent_study(objectives: int) -> optuna.Study:
    """A new study in memory, of which people who keep a study of their own need not read."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(directions=["maximize"] * objectives)
    finally:
        optuna.logging.set_verbosity(verbosity)
