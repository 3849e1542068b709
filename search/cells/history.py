"""What a sampler may know of a search: the cells that were proposed, and the scores of those that are finished.

Where a search is cut short, a trial that goes on gets another score on the next rung, and is better than all that did not get
so far: it was better than they were then. Of several objectives, each trial has as many values, the first of them its score;
greater ones are better in all of them.

It grows by one trial at a time, and a question costs the same at the first trial and at the 28,000th. Of several objectives,
`best` looks at all trials: 40 ms there.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from reference.cell import Cell
from search.cells.pareto import pareto_front, roomiest


class Proposed(NamedTuple):
    """A trial: its number, its cell as JSON, and the canonical form of it in the space, as JSON."""

    number: int
    cell_json: str
    form: str

    @property
    def cell(self) -> Cell:
        return Cell.from_json(self.cell_json)


class History:
    """The trials of one search; a greater score is better."""

    def __init__(self) -> None:
        self._trials: dict[int, Proposed] = {}
        self._scores: dict[int, tuple[int, float]] = {}  # rung and score of complete trials, by number
        self._others: dict[int, tuple[float, ...]] = {}  # their values besides, if there are several objectives
        self._first: dict[str, int] = {}  # form -> the lowest number of a trial that has it
        self._bound = 0  # trials below it are in the two lists, if they are complete
        self._complete: list[int] = []  # their numbers, in ascending order
        self._ranked: list[tuple[int, float, int]] = []  # (−rung, −score, number), in ascending order
        self._copies: dict[int, list[int]] = {}  # by original
        self.revision = 0  # counts the changes of scores that were there

    def __len__(self) -> int:
        """The number of proposed trials."""
        return len(self._trials)

    def __contains__(self, number: int) -> bool:
        return number in self._trials

    def has_form(self, form: str, before: int) -> bool:
        """Whether a trial numbered below `before` has a cell of this canonical form."""
        return self._first.get(form, before) < before

    def propose(self, number: int, cell_json: str, form: str) -> None:
        """Trial `number` is of this cell, now and for ever."""
        self._trials[number] = Proposed(number, cell_json, form)
        self._first[form] = min(number, self._first.get(form, number))

    def finish(self, number: int, score: float, rung: int = 0, others: tuple[float, ...] = ()) -> None:
        """A proposed trial has a score on a rung, and `others`, its values of further objectives.

        A failed one is never finished here, so it is no parent of others.
        """
        if number in self._scores and self._scores[number][0] >= rung:
            return
        self._forget(number)
        self._scores[number] = rung, score
        if others:
            self._others[number] = others
        if number < self._bound:
            self._show(number)
        for copy in self._copies.get(number, ()):
            self.finish(copy, score, rung, others)

    def copy(self, number: int, original: int) -> None:
        """A proposed trial has what another one has, now and later."""
        self._copies.setdefault(original, []).append(number)
        if original in self._scores:
            rung, score = self._scores[original]
            self.finish(number, score, rung, self._others.get(original, ()))

    def withdraw(self, number: int) -> None:
        """A trial has no score any more, nor have its copies: it has failed on a later rung."""
        for trial in (number, *self._copies.get(number, ())):
            self._forget(trial)

    def _forget(self, number: int) -> None:
        if number not in self._scores:
            return
        if number < self._bound:
            del self._complete[bisect_left(self._complete, number)]
            del self._ranked[bisect_left(self._ranked, self._rank(number))]
        del self._scores[number]
        self._others.pop(number, None)
        self.revision += 1

    def proposed(self, number: int) -> Proposed:
        """Trial `number`. Raises KeyError if there is none."""
        return self._trials[number]

    def scores(self, trials: Iterable[Proposed]) -> list[float]:
        """The scores of complete trials; of several rungs, numbers in their order. Raises KeyError for a trial without."""
        scores = [self._scores[trial.number] for trial in trials]
        if len({rung for rung, _ in scores}) <= 1:
            return [score for _, score in scores]
        places = {score: place for place, score in enumerate(sorted(set(scores)))}
        return [float(places[score]) for score in scores]

    @property
    def has_several_objectives(self) -> bool:
        """Whether trials have more values than the score."""
        return bool(self._others)

    def values(self, trials: Iterable[Proposed]) -> list[tuple[float, ...]]:
        """The values of complete trials for all objectives, of which the first are as in `scores`."""
        trials = list(trials)
        return [(score, *self._others.get(trial.number, ())) for trial, score in zip(trials, self.scores(trials), strict=True)]

    def complete(self, before: int, newest: int | None = None) -> list[Proposed]:
        """The trials numbered below `before` that have a score, by number; only the `newest` of them if that is given."""
        self._advance(before)
        end = bisect_left(self._complete, before)
        start = 0 if newest is None else max(0, end - newest)
        return [self._trials[number] for number in self._complete[start:end]]

    def best(self, before: int) -> Iterator[Proposed]:
        """The distinct cells of the complete trials numbered below `before`, best first; of equals the first.

        Of several objectives only those on the Pareto front, those with the fewest others near them first.
        """
        self._advance(before)
        seen: set[str] = set()
        for trial in self._front(before) if self.has_several_objectives else self._by_score(before):
            if trial.form not in seen:
                seen.add(trial.form)
                yield trial

    def _by_score(self, before: int) -> Iterator[Proposed]:
        return (self._trials[number] for *_, number in self._ranked if number < before)

    def _front(self, before: int) -> Iterator[Proposed]:
        trials = self.complete(before)
        values = self.values(trials)
        return (trials[place] for place in roomiest(values, pareto_front(values)))

    def _advance(self, before: int) -> None:
        for number in range(self._bound, before):
            if number in self._scores:
                self._show(number)
        self._bound = max(self._bound, before)

    def _show(self, number: int) -> None:
        insort(self._complete, number)
        insort(self._ranked, self._rank(number))

    def _rank(self, number: int) -> tuple[int, float, int]:
        rung, score = self._scores[number]
        return -rung, -score, number
