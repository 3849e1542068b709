"""What the terminal says of a search."""

import sys
from typing import Any

from tqdm import tqdm

from search.dense_tasks import Measure


class Progress:
    """Shows how far a search is."""

    def __init__(self, total: int, done: int, measure: Measure) -> None:
        self._bar: Any = tqdm(total=total, initial=done, desc="search", unit="cell")
        self._measure = measure

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def started(self, key: object) -> None:
        """A cell is being evaluated."""

    def finished(self, score: float | None, failure: str | None) -> None:
        """A cell is finished."""
        self._bar.update()
        if failure:
            tqdm.write(failure, file=sys.stderr)

    def skipped(self) -> None:
        """A cell was finished with the score of another one."""
        self._bar.update()

    def others(self, cells: int, processes: int) -> None:
        """So many cells are with other processes."""

    def workers(self, capacity: int) -> None:
        """So many cells can be evaluated at a time."""
