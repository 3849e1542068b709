"""How far a search is, for people, while processes work on it or after them: from its folder or its database alone."""

import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from search.cells.pareto import pareto_front
from search.commands import spelled
from search.dense_tasks import Measure, restored_task
from search.errors import InputError
from search.folder import Folder
from search.runs.database import is_server
from search.runs.progress import duration, named
from search.runs.reader import Counts, Process, Reader
from search.runs.study import new_name, require_file, storage_url, unusable
from search.runs.tables import Key, cost_in
from search.tasks.proxy import COST_NAMES

_HOUR = 3600  # seconds
_MOST_OF_FRONT = 10  # trials that are named
_REASONS = 5  # for which cells failed, that are said


def status_lines(directory: Path, storage: str | None) -> Iterator[str]:
    """What there is to say of the run in this folder, or of the one with its name on the database server `storage`.

    Raises InputError where there is none, and for a database that cannot be read.
    """
    description = Folder(directory).description()
    if description is None and (storage is None or not is_server(storage)):
        raise InputError(
            f"{directory} is not a run (no settings.json): give the folder of a run of `{spelled('random')}` as `out`"
        )
    url = storage_url(directory, storage or (description or {}).get("storage"))
    name = new_name(directory, url) if description is None else str(description["id"])
    try:
        require_file(directory, url)
        with closing(Reader(url, name)) as reader:
            processes, running = reader.processes(), reader.running()
            since = max([time.time() - _HOUR, *sorted(process.started for process in processes)[:1]])
            counts, front = reader.counts(since), _front(reader)
    except KeyError:
        raise InputError(f"{directory} has no trials yet, or is of an earlier version: go on with it first") from None
    except (SQLAlchemyError, ImportError) as error:
        raise unusable(url, error) from error
    measure = None if description is None else restored_task(description).score
    total = None if description is None else description.get("trials")
    done = counts.complete + counts.failed
    rate = f"; {_rate(counts.lately, time.time() - since)}" if processes else ""
    yield f"{name}: {_of_trials(counts, None if total is None else max(total, done))}{rate}"
    rungs = (description or {}).get("rungs", ())
    if rungs or len(counts.rungs) > 1:
        yield _on_rungs(counts, rungs)
    yield from _best_and_failures(counts, measure, rungs)
    yield from front
    yield from _running(running, {process.id: process for process in processes})
    yield from (f"{_named(process)}: {process.workers} at a time, since {_when(process.started)}" for process in processes)
    if not processes:
        yield "no process works on it: the command that began it goes on"


def _of_trials(counts: Counts, total: int | None) -> str:
    done = f"{counts.complete + counts.failed:,}" + ("" if total is None else f" of {total:,}")
    return f"{done} trials are finished, {counts.failed:,} failed; {counts.comparisons:,} comparisons are made"


def _on_rungs(counts: Counts, iterations: Sequence[int]) -> str:
    """How many trials have got how far."""
    named = [f"after {each:,}" for each in iterations] or [f"on rung {rung}" for rung in range(len(counts.rungs))]
    scored = zip(named, counts.rungs, strict=False)
    return (
        "trials with a score: "
        + ", ".join(f"{number:,} {where}" for where, number in scored)
        + " iterations" * bool(iterations)
    )


def _rate(trials: int, seconds: float) -> str:
    """Of the last hour, or since the processes have been there."""
    return f"{trials * _HOUR / max(1.0, seconds):,.0f} trials an hour"


def _best_and_failures(counts: Counts, measure: Measure | None, iterations: Sequence[int]) -> Iterator[str]:
    if counts.best is not None:
        number, score = counts.best
        said = f"score {score:.4f}" if measure is None else f"{measure.name} {measure.text(score)}"
        rung = len(counts.rungs) - 1  # the best is of those that got furthest
        yield f"best: trial {number}, {said}" + (f" after {iterations[rung]:,} iterations" if iterations else "")
    reasons = counts.reasons.most_common()
    yield from (f"failed {times:,} ×: {reason}" for reason, times in reasons[:_REASONS])
    if more := sum(times for _, times in reasons[_REASONS:]):
        yield f"failed {more:,} × for other reasons"


def _front(reader: Reader) -> list[str]:
    """Of a search with two objectives the trials that no other one beats in both, the best score first."""
    kind = reader.identity().get("second_objective", "none")  # earlier runs had none
    if kind == "none":
        return []
    scored = [(row, row.score, row.result) for row in reader.finished(search=True) if row.duplicate_of is None]
    places = [(row, score, -cost_in(result, kind)) for row, score, result in scored if score is not None and result]
    front = [str(places[i][0].key.number) for i in pareto_front([place[1:] for place in places])]
    more = f" and {len(front) - _MOST_OF_FRONT} more" if len(front) > _MOST_OF_FRONT else ""
    named = f"trials {', '.join(front[:_MOST_OF_FRONT])}{more}" if front else "no cell yet"
    return [f"Pareto front of score and {COST_NAMES[kind]}: {named}"]


def _running(jobs: list[tuple[Key, str, float]], processes: dict[str, Process]) -> Iterator[str]:
    for key, owner, started in jobs:
        process = processes.get(owner)
        where = "interrupted, to be done again" if process is None else f"with {_named(process)}"
        yield f"{named(key)}: {where}, begun {duration(max(0.0, time.time() - started))} ago"


def _named(process: Process) -> str:
    gone = " (gone)" if process.host == platform.node() and not _is_there(process.pid) else ""
    return f"process {process.pid} on {process.host}{gone}"


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(" ", "minutes")
