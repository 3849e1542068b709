"""Compare ways to search, replayed on a table of cells: `python -m search.compare`.

Each sampler searches the table many times, with and without early stopping, and with as many simulated workers as are given;
nothing is trained. How far its best cell is from the table's best is drawn against trials and against computing time.

The folder of the comparison (--out) keeps each search in a file of its own, so the same command continues, and more samplers
or seeds add to what is there.
"""

import functools
import importlib.metadata
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from tqdm import tqdm

from search.cells.samplers import SAMPLER_NAMES, create_sampler
from search.cli import print_next, run_command, spelled, this_command, to_type
from search.errors import InputError
from search.folder import Folder
from search.reports.comparison import write_comparison
from search.runs.halving import Halving, Rule
from search.runs.lag import chosen_lag
from search.settings import given, known, require
from search.tabular.replay import Moment, Strategy, replay
from search.tabular.table import CellTable, load_table, table_name

_PROG = spelled("compare")
_NONE: Literal["none"] = "none"
_EARLY_STOPPING = (_NONE, *get_args(Rule))
_MODELS = {"predictor": ("scikit-learn",), "tpe": ("optuna",)}  # packages that decide what these samplers propose


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Compare samplers and early stopping by replayed searches of a table of cells."""

    table: str = "camvid"
    """A table of cells that comes with the project, camvid, or a file of search.tabulate."""
    samplers: tuple[str, ...] = SAMPLER_NAMES
    """How cells are proposed: paper, random, evolution, local, predictor, tpe (docs/samplers.md)."""
    early_stopping: tuple[Literal["none"] | Rule, ...] = (_NONE, "asha")
    """With each of these: none, asha, pasha, halving (docs/early_stopping.md)."""
    rungs: tuple[int, ...] | None = None
    """Iterations after which early stopping compares cells, some of the table's. None: a 4th of all, a 16th and so on, where
    the table has scores; with another reduction factor its powers."""
    reduction_factor: int = 4
    """With early stopping, one of so many cells goes on from each of the rungs."""
    trials: int = 100
    """Cells that a search tries."""
    workers: int = 4
    """Cells that a search evaluates at a time."""
    seeds: int = 20
    """Searches of each kind."""
    processes: int | None = None
    """Searches that are replayed at a time. None: as many as there are processor cores."""
    out: Path | None = None
    """Folder of the comparison. None: runs/compare/ and the table's name."""

    def check(self) -> None:
        """Raise InputError for what cannot work."""
        for name in ("reduction_factor", "trials", "workers", "seeds"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        require("processes", self.processes, given(self.processes, 1) >= 1, "at least 1")
        for name, all_names in (("samplers", SAMPLER_NAMES), ("early_stopping", _EARLY_STOPPING)):
            chosen = getattr(self, name)
            if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(all_names):
                some = f"some of {', '.join(all_names)}, each once"
                raise InputError(f"`{name}` must name {some}, got {' '.join(chosen) or 'none'}")

    def strategies(self, table: CellTable) -> list[Strategy]:
        """All kinds of searches. Raises InputError for rungs that the table has not, and for a sampler that cannot work."""
        for sampler in self.samplers:
            create_sampler(sampler, table.space, 0)
        if self.trials > len(table.cells):
            raise InputError(f"`trials` must be at most {len(table.cells)}, the cells of the table, got {self.trials}")
        rungs = () if self.early_stopping == (_NONE,) else self._rungs(table.iterations)
        strategies = []
        for rule in self.early_stopping:
            halving = None if rule == _NONE else Halving(rule, (*rungs, table.iterations[-1]), self.reduction_factor)
            lag = chosen_lag(self.workers, self.trials, halving)
            strategies += [Strategy(sampler, halving, lag) for sampler in self.samplers]
        return strategies

    def _rungs(self, iterations: tuple[int, ...]) -> tuple[int, ...]:
        """Those of early stopping, without whole trainings. Raises InputError for some that the table has not."""
        there, rungs = iterations[:-1], given(self.rungs, _rungs_apart(iterations, self.reduction_factor))
        if not rungs and self.rungs is None:
            raise InputError(
                f"the table has scores after {_spaced(there)} iterations, none of them {iterations[-1]} divided by a power "
                f"of `reduction_factor` {self.reduction_factor}: give another, or `rungs`"
            )
        if not rungs or list(rungs) != sorted(set(rungs)) or not set(rungs) <= set(there):
            raise InputError(f"`rungs` must be some of {_spaced(there)}, in ascending order, got {_spaced(rungs) or 'none'}")
        return rungs


class _Search(NamedTuple):
    """One replayed search: of which kind, with which seed, and the folder that keeps it."""

    strategy: Strategy
    seed: int
    folder: Folder

    @property
    def job(self) -> str:
        return f"seed_{self.seed:03}"

    @property
    def is_finished(self) -> bool:
        return self.folder.result_path(self.job).exists()

    def moments(self, table: CellTable) -> list[Moment]:
        """What it came to. Raises InputError naming a damaged file."""
        content = known(self.folder.result(self.job))
        try:
            moments = [
                Moment(int(row["trials"]), int(row["iterations"]), float(row["seconds"]), int(row["best"]))
                for row in content["moments"]
            ]
            if not moments or not all(0 <= moment.best < len(table.cells) for moment in moments):
                raise ValueError("its moments are not of this table")
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise self.folder.damaged(self.job, error) from error
        return moments


def main(settings: CompareSettings) -> None:
    """Replay the searches that are not there yet, then report."""
    settings.check()
    table = load_table(settings.table)
    strategies = settings.strategies(table)
    directory = settings.out or Path("runs") / "compare" / table_name(settings.table)
    with Folder(directory).locked():
        searches = list(_searches(settings, table, strategies, directory))
        try:
            _run(settings, [search for search in searches if not search.is_finished], len(searches))
        except KeyboardInterrupt:  # what there is, is shown
            _report(settings, table, searches, directory)
            raise
        _report(settings, table, searches, directory)
    print_next(to_type("tabulate", "--table", settings.table, "--out", Path("runs") / f"{table_name(settings.table)}_cells"))


def _report(settings: CompareSettings, table: CellTable, searches: list[_Search], directory: Path) -> None:
    """Write and print what the searches came to, once there is one of each kind."""
    found: dict[Strategy, dict[int, list[Moment]]] = {search.strategy: {} for search in searches}
    for search in searches:
        if search.is_finished:
            found[search.strategy][search.seed] = search.moments(table)
    if all(found.values()):
        print(write_comparison(directory, table, found, settings.workers, this_command(_PROG)))


def _searches(settings: CompareSettings, table: CellTable, strategies: list[Strategy], directory: Path) -> Iterator[_Search]:
    """All searches: every kind once before any a second time, so that an early stop leaves what can be compared."""
    folders = {strategy: Folder(directory / strategy.name.replace(" ", ""), "comparison") for strategy in strategies}
    identities = {strategy: _identity(settings, table, strategy) for strategy in strategies}
    for strategy, folder in folders.items():
        folder.check(identities[strategy])
    for strategy, folder in folders.items():
        folder.begin(identities[strategy], this_command(_PROG))
    for seed in range(settings.seeds):
        for strategy in strategies:
            yield _Search(strategy, seed, folders[strategy])


def _identity(settings: CompareSettings, table: CellTable, strategy: Strategy) -> dict[str, Any]:
    """What a search's moments depend on."""
    shared = {"cells and scores of `table`": table.digest, "trials": settings.trials, "workers": settings.workers}
    halving, packages = strategy.halving, _MODELS.get(strategy.sampler, ())
    own = {} if halving is None else {"rungs": list(halving.rungs[:-1]), "reduction_factor": halving.reduction}
    return shared | own | {"lag": strategy.lag} | {name: importlib.metadata.version(name) for name in packages}


def _run(settings: CompareSettings, searches: list[_Search], total: int) -> None:
    """Replay the searches, several at a time, and keep each as it ends."""
    with tqdm(total=total, initial=total - len(searches), desc="compare", unit="search") as bar:
        for search, moments in _replayed(settings, searches):
            search.folder.write_result(search.job, {"moments": [moment._asdict() for moment in moments]})
            bar.update()


def _replayed(settings: CompareSettings, searches: list[_Search]) -> Iterator[tuple[_Search, list[Moment]]]:
    """The searches as they end."""
    processes = min(given(settings.processes, os.cpu_count() or 1), len(searches))
    if processes <= 1:
        yield from ((search, _replay(settings, search.strategy, search.seed)) for search in searches)
        return
    context = multiprocessing.get_context("spawn")  # a fork would have the locks of other threads
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_end_with_parent)
    try:
        with _ctrl_c_kept_from_children():
            futures = {pool.submit(_replay, settings, search.strategy, search.seed): search for search in searches}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise InputError(
            "a process that replayed a search was killed, perhaps for lack of memory: run the same command again, or with "
            "fewer `processes`"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _ctrl_c_kept_from_children() -> Iterator[None]:
    """Processes that begin inside never see Ctrl-C: it is for this one, which meets it at the end of the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """End this process when the parent does, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _replay(settings: CompareSettings, strategy: Strategy, seed: int) -> list[Moment]:
    return replay(_loaded(settings.table), strategy, trials=settings.trials, workers=settings.workers, seed=seed)


@functools.cache  # in each process
def _loaded(table: str) -> CellTable:
    return load_table(table)


def _rungs_apart(iterations: tuple[int, ...], reduction: int) -> tuple[int, ...]:
    """Of the table's iterations those that are a power of the reduction factor, at least 2, below all.

    >>> _rungs_apart((16, 32, 64, 128, 256), 4), _rungs_apart((16, 32, 64, 128, 256), 3)
    ((16, 64), ())
    """
    step = max(2, reduction)
    divisors = [step**power for power in range(1, iterations[-1].bit_length())]
    return tuple(each for each in iterations if any(each * divisor == iterations[-1] for divisor in divisors))


def _spaced(numbers: tuple[int, ...]) -> str:
    return " ".join(map(str, numbers))


if __name__ == "__main__":
    run_command(CompareSettings, main, prog=_PROG, goes_on=True)
