"""The loop of a search: ask for a cell, have it scored, tell the study; known cells are scored before, the best after it."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import optuna
from tqdm import tqdm

from fast.segmentation import SegmentationHead
from reference.cell import Cell
from search.cells.sampler import CellSampler, suggest_cell
from search.cells.space import SearchSpace
from search.dense_tasks import Measure
from search.interrupts import ctrl_c_waits
from search.runs.study import FOUND, Study, ranked
from search.runs.workers import Job, Outcome, Workers
from search.tasks.proxy import ProxyResult

_NO_SCORE = -1.0  # below all scores: the first one is the best, also if it is 0
HEADS = "heads"  # folder in a run's for the heads that are kept
BEST_HEAD = "best"  # name under which a run keeps the head of its best cell

# Random streams are named (seed of the run, purpose, number); known cells and the search's best share one per comparison.
_TRIAL, _COMPARISON = 0, 1


@dataclass(frozen=True)
class SearchPlan:
    """What a search is to do: the number of trials, the known cells to compare with, and the seeds of each comparison."""

    trials: int
    compare: Mapping[str, Cell]
    comparison_seeds: int
    seed: int


def best_head(directory: Path) -> Path:
    """Where a run keeps the head of its best cell."""
    return directory / HEADS / f"{BEST_HEAD}.safetensors"


def head_name(compared: str) -> str:
    """The name under which a run keeps the head of a compared cell."""
    return f"{compared.replace(' ', '_')}_seed0"


class Search:
    """Asks for cells, submits them, waits and records; all state that must last is in the study."""

    def __init__(
        self,
        study: Study,
        workers: Workers[ProxyResult],
        space: SearchSpace,
        plan: SearchPlan,
        measure: Measure,
        keep_head: Callable[[str, SegmentationHead], None],
    ) -> None:
        self.study = study
        self.workers = workers
        self.space = space
        self.plan = plan
        self.measure = measure  # what a score is, for people
        self._keep_head = keep_head
        self.scored: dict[Cell, tuple[int, ProxyResult]] = {}  # form in the space -> its trial's number and result

    def run(self) -> None:
        """Score the known cells, then the search's, then its best cell again, because the best of many is partly luck."""
        self.study.discard_unfinished_comparisons()
        for name, cell in self.plan.compare.items():
            self._compare(name, cell)
        self._search()
        best = ranked(self.study.records())[:1]
        for record in best:  # with the same seeds as the known cells
            self._compare(f"{FOUND}{record.number}", record.cell)

    def _compare(self, name: str, cell: Cell) -> None:
        done = self.study.compared(name)
        for seed in range(self.plan.comparison_seeds):
            if seed in done:
                continue
            print(f"comparison: {name}, seed {seed}", file=sys.stderr)
            self.workers.submit(Job(name, cell, (self.plan.seed, _COMPARISON, seed)))
            outcome = self.workers.wait()
            with ctrl_c_waits():
                self._finish_comparison(outcome, name, seed)

    def _finish_comparison(self, outcome: Outcome[ProxyResult], name: str, seed: int) -> None:
        number = self.study.comparison.ask().number
        if outcome.result is None:
            print(f"comparison: {name}, seed {seed} failed: {outcome.failure}", file=sys.stderr)
            self.study.tell_comparison_failure(number, name, seed, outcome.failure or "unknown")
            return
        if seed == 0:
            self._save(outcome, head_name(name))
        self.study.tell(self.study.comparison, number, outcome.job.cell, outcome.result, name=name, seed=seed)

    def _search(self) -> None:
        records = self.study.records()
        finished = {record.number for record in records}
        queue = self.study.unfinished()
        running: set[int] = set()
        for record in records:
            if record.result:
                self.scored.setdefault(self.space.canonical_form(record.cell), (record.number, record.result))
        best = max((result.score for _, result in self.scored.values()), default=_NO_SCORE)
        failed = sum(record.failure is not None for record in records)
        with tqdm(total=self.plan.trials, initial=len(finished), desc="search", unit="cell") as bar:
            while True:
                shown = "-" if best == _NO_SCORE else self.measure.text(best)
                bar.set_postfix({f"best {self.measure.name}": shown, "failed": failed})
                while len(running) < self.workers.capacity:
                    with ctrl_c_waits():
                        trial = self._next_trial(queue, finished, running)
                        if trial is None:
                            break
                        running |= self._start(trial, finished)
                    bar.update(trial.number in finished)
                if not running:
                    return
                outcome = self.workers.wait()
                running.remove(outcome.job.key)
                finished.add(outcome.job.key)
                failed += outcome.failure is not None
                with ctrl_c_waits():
                    best = max(best, self._finish_trial(outcome, best))
                bar.update()

    def _next_trial(self, queue: list[optuna.Trial], finished: set[int], running: set[int]) -> optuna.Trial | None:
        """An interrupted trial, or a new one if any is left to do and all trials that its sampler may use are finished."""
        if queue:
            return queue.pop(0)
        number = len(finished) + len(running)
        if number >= self.plan.trials:
            return None
        sampler = self.study.search.sampler
        visible = sampler.visible_before(number) if isinstance(sampler, CellSampler) else 0
        return self.study.search.ask() if all(i in finished for i in range(visible)) else None

    def _start(self, trial: optuna.Trial, finished: set[int]) -> set[int]:
        """Submit the trial's cell, or copy the score of an equal cell; returns the numbers of trials that it started."""
        cell = suggest_cell(trial, self.space)
        if twin := self.scored.get(self.space.canonical_form(cell)):
            number, result = twin
            self.study.tell(self.study.search, trial.number, cell, result, duplicate_of=number)
            finished.add(trial.number)
            return set()
        self.workers.submit(Job(trial.number, cell, (self.plan.seed, _TRIAL, trial.number)))
        return {trial.number}

    def _finish_trial(self, outcome: Outcome[ProxyResult], best: float) -> float:
        number = outcome.job.key
        if outcome.result is None:
            self.study.tell_failure(number, outcome.job.cell, outcome.failure or "unknown")
            tqdm.write(f"trial {number} failed: {outcome.failure}", file=sys.stderr)
            return _NO_SCORE
        score = outcome.result.score
        if score > best:
            self._save(outcome, BEST_HEAD)
        self.study.tell(self.study.search, number, outcome.job.cell, outcome.result)
        self.scored.setdefault(self.space.canonical_form(outcome.job.cell), (number, outcome.result))
        return score

    def _save(self, outcome: Outcome[ProxyResult], name: str) -> None:
        assert outcome.head is not None  # if there is a result, there is a head
        self._keep_head(name, outcome.head)
