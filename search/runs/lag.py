"""How many of the latest results a search ignores, so that no worker waits for another one's slow cell."""

import math

from search.cells.sampler import LAG
from search.runs.halving import Halving
from search.settings import known

SLACK = 4  # how many times as long as the others a cell may take before they wait for it
_SLACK_IN_FULL = 2  # with early stopping: as long as one that is trained in full is expected to take


def chosen_lag(workers: int, trials: int | None, halving: Halving | None) -> int:
    """The lag of a new search in which so many cells are evaluated at a time.

    With early stopping one for whole trainings, unless that were much of the search of so many trials.
    """
    if workers <= LAG + 1:
        return LAG
    if halving is None:
        return SLACK * workers
    for_whole = math.ceil(_SLACK_IN_FULL * halving.longest) * workers
    return max(SLACK * workers, min(for_whole, known(trials) // 4))
