"""How a search chooses its cells: one sampler per file, by the names that the literature gives them.

`paper.py` is the paper's, and random search; `evolution.py` regularised evolution, `local_search.py` local search,
`predictor.py` proposes what a model of the scores expects much of, and `tpe.py` is Optuna's.
"""

from search.cells.sampler import LAG, CellSampler
from search.cells.samplers.evolution import EvolutionSampler
from search.cells.samplers.local_search import LocalSearchSampler
from search.cells.samplers.paper import PaperSampler
from search.cells.samplers.tpe import TPESampler
from search.cells.space import SearchSpace
from search.commands import to_install
from search.errors import InputError

SAMPLER_NAMES = ("paper", "random", "evolution", "local", "predictor", "tpe")


def create_sampler(name: str, space: SearchSpace, seed: int, *, lag: int = LAG) -> CellSampler:
    """Create the sampler of this name, one of `SAMPLER_NAMES`. Raises InputError for another name.

    "random" is the paper's sampler without cells near the best, so it needs no `lag`.
    """
    if seed < 0:
        raise InputError(f"`seed` must be 0 or more, got {seed}")
    match name:
        case "paper":
            return PaperSampler(space, seed=seed, lag=lag)
        case "random":
            return PaperSampler(space, seed=seed, lag=lag, near_best_probability=0)
        case "evolution":
            return EvolutionSampler(space, seed=seed, lag=lag)
        case "local":
            return LocalSearchSampler(space, seed=seed, lag=lag)
        case "predictor":
            return _create_predictor(space, seed, lag)
        case "tpe":
            return TPESampler(space, seed=seed, lag=lag)
    raise InputError(f"`sampler` {name} is unknown; choose one of {', '.join(SAMPLER_NAMES)}")


def _create_predictor(space: SearchSpace, seed: int, lag: int) -> CellSampler:
    try:
        from search.cells.samplers.predictor import PredictorSampler
    except ModuleNotFoundError as error:
        raise InputError(f"`sampler` predictor needs scikit-learn: {to_install('predictor')}, or choose another") from error
    return PredictorSampler(space, seed=seed, lag=lag)
