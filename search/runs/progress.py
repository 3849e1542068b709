"""What a running search says on stderr: a bar with the state of all, and lines above it; on no terminal, lines alone."""

import os
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self, TextIO

from tqdm import tqdm

from search.dense_tasks import Measure
from search.runs.tables import SEARCH, Key

_BETWEEN_SHOWN = 0.2  # seconds between two states of the bar in which no trial has finished
_BETWEEN_LINES = 60.0  # seconds between two lines where there is no bar, unless a tenth of the trials is done
_WINDOW = 60.0  # seconds that a rate is of, at least
_ROUNDS = 5  # trials of each worker that a rate is of, at least: cells that are begun together end together
_SAME_FAILURES, _OF_MORE = 5, 10  # for the same reason, lines that are written all; of more, one in so many


class Progress:
    """Follows a search of `total` trials, of which `done` are finished; a context manager. `measure` is what a score is.

    Who searches says what begins and what ends, and about every second what `counted`, `others` and `workers` are to know.
    """

    def __init__(self, total: int, done: int, measure: Measure, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._done, self._measure, self._clock = max(total, done), done, measure, clock
        self._best: float | None = None
        self._failed = 0
        self._failures: Counter[str] = Counter()  # by reason, numbers left out
        self._rungs: Sequence[int] = ()
        self._after: int | None = None
        self._work = float(done)
        self._busy = 0
        self._capacity = 1
        self._elsewhere = (0, 0)  # cells, and the processes that they are with
        self._pace: Pace | None = None  # from the first trial on: comparisons take as long, and are none
        self._shown_at = self._line_at = clock()
        self._line_of: tuple[Any, ...] = (done, False, ())  # what the last line said: trials, whether it waits, rungs

    def __enter__(self) -> Self:
        self._bar = tqdm(
            total=self._total,
            initial=self._done,
            desc="search",
            bar_format=self._form,
            dynamic_ncols=True,
            disable=not _has_width(sys.stderr),
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._show(last=True)
        self._bar.close()

    def started(self, key: Key) -> None:
        """A job of this process has begun."""
        self._busy += 1
        if key.name != SEARCH:
            self._write(named(key))
        elif self._pace is None:
            self._pace = Pace(self._clock(), self._work)
        self._show()

    def finished(self, key: Key, failure: str | None = None) -> None:
        """A job of this process has ended: with a score, or for this reason with none."""
        self._busy -= 1
        if failure is not None:
            self._write_failure(key, failure)

    def again(self, key: Key, failure: str) -> None:
        """A job of this process has ended for this reason, and is tried again."""
        self._busy -= 1
        self._write(f"{named(key)} is tried again: {failure}")

    def counted(
        self,
        done: int,
        *,
        failed: int,
        best: float | None,
        rungs: Sequence[int] = (),
        share: float | None = None,
        after: int | None = None,
    ) -> None:
        """What the trials have come to by now: all that are finished, those without a score, and the best one.

        Where a search is cut short, also how many have a score on each of its `rungs`, the share of the work that is done, and
        the iterations `after` which the best one is so good, unless these are all.
        """
        work = float(done) if share is None else share * self._total
        if work > self._work:
            if self._pace is None:  # others have begun
                self._pace = Pace(self._clock(), work)
            self._pace.add(self._clock(), work, self._at_once)
        self._done, self._failed, self._best = done, failed, best
        self._work, self._rungs, self._after = max(self._work, work), rungs, after
        self._total = max(self._total, done)  # another process may have been told to try more
        self._show()

    def others(self, cells: int, processes: int) -> None:
        """So many cells are being evaluated by so many other processes."""
        self._elsewhere = cells, processes
        self._show()

    def workers(self, capacity: int) -> None:
        """This process evaluates so many cells at a time."""
        self._capacity = capacity
        self._show()

    @property
    def _at_once(self) -> int:
        return max(1, self._capacity + self._elsewhere[0])

    @property
    def _is_waiting(self) -> bool:
        return self._busy == 0 and self._elsewhere[0] > 0

    def _show(self, last: bool = False) -> None:
        now = self._clock()
        if self._bar.disable:
            self._show_line(now, last)
        elif last or self._done != self._bar.n or now - self._shown_at >= _BETWEEN_SHOWN:
            self._shown_at = now
            self._bar.n, self._bar.bar_format = min(self._work, self._total), self._form
            self._bar.set_postfix_str(", ".join(self._state(now)))

    def _show_line(self, now: float, last: bool) -> None:
        said, state = self._line_of, (self._done, self._is_waiting, tuple(self._rungs))
        is_next_tenth = self._tenths(self._done) > self._tenths(said[0])
        if state != said and (last or is_next_tenth or now - self._line_at >= _BETWEEN_LINES):
            self._line_of, self._line_at = state, now
            share = int(100 * self._work / max(1, self._total))
            self._write(", ".join([f"search: {self._done} of {self._total} trials ({share} %)", *self._state(now)]))

    @property
    def _form(self) -> str:
        """The bar's: how long it is says the work, the numbers are of trials."""
        return f"{{desc}}: {{percentage:3.0f}}%|{{bar}}| {self._done}/{self._total}{{postfix}}"

    def _tenths(self, done: int) -> int:
        return 10 * done // max(1, self._total)

    def _state(self, now: float) -> list[str]:
        """What there is to say, the most important first: a narrow terminal shows the beginning."""
        cells, processes = self._elsewhere
        state = []
        if self._is_waiting:
            state.append(f"waiting: {_count(cells, 'cell')} {'is' if cells == 1 else 'are'} with {_other(processes)}")
        if self._best is not None:
            after = "" if self._after is None else f" after {self._after} iterations"
            state.append(f"best {self._measure.name} {self._measure.text(self._best)}{after}")
        if self._pace is not None:
            state += self._pace.said(self._total - self._work, now, self._at_once)
        if len(self._rungs) > 1:
            state.append(f"{' → '.join(map(str, self._rungs))} cells on the rungs")
        if self._capacity > 1:
            state.append(f"{self._busy}/{self._capacity} workers busy")
        if cells and not self._is_waiting:
            state.append(f"{_count(cells, 'cell')} with {_other(processes)}")
        if self._failed:
            state.append(f"{self._failed} failed")
        return state

    def _write_failure(self, key: Key, reason: str) -> None:
        """A line for each failure, until there are many for one reason."""
        kind = re.sub(r"\d+", "", reason)
        self._failures[kind] += 1
        same, remark = self._failures[kind], ""
        if same == _SAME_FAILURES:
            remark = f" (the {same}th of its kind; from now on one in {_OF_MORE} is written)"
        elif same > _SAME_FAILURES:
            remark = f" (the {same}th of its kind)"
        if same <= _SAME_FAILURES or same % _OF_MORE == 0:
            self._write(f"{named(key)} failed: {reason}{remark}")

    def _write(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)


class Pace:
    """How fast trials are finished of late: in the last minute at least, and the last few rounds of all workers.

    Trials that are begun together end together, so a rate is taken from one end to another. After the last end, it falls only
    once nothing has ended for as long as a trial takes.
    """

    def __init__(self, now: float, done: float) -> None:
        self._ends = deque([(now, done)])  # times, and how many trials were finished then

    def add(self, now: float, done: float, at_once: int) -> None:
        """`done` trials are finished now; `at_once` are evaluated at a time."""
        self._ends.append((now, done))
        while len(self._ends) > 2:
            time_of_next, done_at_next = self._ends[1]
            if now - time_of_next < _WINDOW or done - done_at_next < _ROUNDS * at_once:
                return
            self._ends.popleft()

    def said(self, trials: float, now: float, at_once: int) -> list[str]:
        """How long so many trials will take, and how many an hour there are; nothing before the first end."""
        rate, left = self.per_second(now, at_once), self.seconds_for(trials, now, at_once)
        if rate is None or left is None:
            return []
        per_hour = 3600 * rate
        number = f"{per_hour:,.0f}/h" if per_hour >= 10 else f"{per_hour:.1f}/h"
        return [f"{duration(left)} left", number] if trials > 0 else [number]

    def per_second(self, now: float, at_once: int) -> float | None:
        """Trials a second; None before the first end."""
        (start, before), (end, done) = self._ends[0], self._ends[-1]
        if done == before or now <= start:
            return None
        of_one = at_once * (end - start) / (done - before)  # seconds that a trial takes
        return (done - before) / (max(end, now - of_one) - start)

    def seconds_for(self, trials: float, now: float, at_once: int) -> float | None:
        """How long so many trials will take from now on, at least as long as the last ones run; None before the first end."""
        rate = self.per_second(now, at_once)
        if rate is None:
            return None
        since = min(now - self._ends[-1][0], at_once / rate)
        return max(trials, at_once) / rate - since


def _has_width(stream: TextIO) -> bool:
    """Whether a bar can be drawn: on a terminal, but on one of no columns, as `script` makes it for a program without one."""
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:  # it is one of no file
        return stream.isatty()


def named(key: Key) -> str:
    """What a job is called."""
    if key.rung > 0:
        return f"trial {key.number}, rung {key.rung}"
    return f"trial {key.number}" if key.name == SEARCH else f"comparison: {key.name}, seed {key.number}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


def _other(processes: int) -> str:
    return f"{processes:,} other process" + "es" * (processes != 1)


def duration(seconds: float) -> str:
    """In the two largest units.

    >>> [duration(seconds) for seconds in (8.2, 59.9, 754, 11_100, 100_000)]
    ['8 s', '1 min', '13 min', '3 h 5 min', '1 d 4 h']
    """
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"
