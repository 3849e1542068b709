"""The loop of a search: claim a job, have it evaluated, tell the study, until nothing is left to do here or elsewhere."""

import sys
import time
from collections import Counter
from collections.abc import Callable

from search.dense_tasks import Measure
from search.interrupts import ctrl_c_waits
from search.runs.database import LEASE
from search.runs.progress import Progress, named
from search.runs.store import Claim, SearchPlan
from search.runs.study import Study
from search.runs.tables import SEARCH, Key
from search.runs.workers import Job, Outcome, Workers
from search.tasks.proxy import ProxyResult, Stretch

TRIES = 3  # of a cell whose failure may be the machine's: a GPU was full, workers died
TICK = 1.0  # seconds, at most, until finished cells of other processes are seen

# Random streams are named (seed of the run, purpose, number); known cells and the search's best share one per comparison.
_TRIAL, _COMPARISON = 0, 1


class Search:
    """Keeps all workers busy with jobs of the study, in which is all state that must last.

    `on_tick` is called about every second. `measure` says what a score is, for people.
    """

    def __init__(
        self,
        study: Study,
        workers: Workers[ProxyResult],
        plan: SearchPlan,
        measure: Measure,
        on_tick: Callable[[], object] = lambda: None,
    ) -> None:
        self.study = study
        self.workers = workers
        self.plan = plan
        self.measure = measure
        self._on_tick = on_tick
        self._has_waited = False
        self._capacity = 0  # as it was last said
        self._shown = time.monotonic()  # when others could last see what is finished
        self._running: dict[str, Claim] = {}  # by the key of the workers' job
        self._passing: Counter[Key] = Counter()  # failures of which the cell may not be the cause

    def run(self) -> None:
        """Score the known cells, then the search's, then its best cell again, because the best of many is partly luck."""
        done = self.study.store.sync().num_finished  # others have gone on while this process got ready
        with Progress(self.plan.trials, done, self.measure) as self._progress:
            while True:
                self._fill()
                self._tick()
                if self._running:
                    self._wait()
                elif self.study.store.is_finished(self.plan):
                    self.study.show()
                    return
                elif self.workers.capacity == 0:  # all are lost, and others start while one waits
                    self._wait()
                else:  # other processes have the rest
                    time.sleep(TICK)

    def _fill(self) -> None:
        """Claim jobs for all workers that are idle."""
        while len(self._running) < self.workers.capacity:
            with ctrl_c_waits():
                claim = self.study.claim(self.plan)
                if claim is None:
                    self._say_why_it_waits()
                    return
                self._start(claim)

    def _say_why_it_waits(self) -> None:
        """Once, if trials are left, and nobody here has one."""
        lag, state = self.study.sampler.lag, self.study.store.state
        is_behind = (self.study.sampler.uses_scores or state.rungs is not None) and state.next < self.plan.trials
        if not self._running and is_behind and not self._has_waited:
            self._has_waited = True
            at_once = f"at most {lag + 1} cells are evaluated at a time by all processes together (its lag is {lag})"
            dead = f"a cell of one that died is begun anew after {LEASE:.0f} s"
            print(f"waiting: this run looks back, so {at_once}; {dead}", file=sys.stderr)

    def _start(self, claim: Claim) -> None:
        key = claim.key
        purpose = _TRIAL if key.name == SEARCH else _COMPARISON
        stretch = None if claim.until is None else Stretch(claim.until, claim.state)
        job = Job(named(key), claim.cell, (self.plan.seed, purpose, key.number), stretch)
        if key.rung > 0 and claim.state is None:
            print(f"{named(key)} is trained from the beginning: its state is not kept", file=sys.stderr)
        if claim.is_taken_over and self.study.store.is_server:
            print(f"{named(key)} is taken over from a process that is gone", file=sys.stderr)
        self._progress.started(key)
        self.workers.submit(job)
        self._running[job.key] = claim

    def _wait(self) -> None:
        outcome = self.workers.wait(timeout=TICK)
        if outcome is not None:
            with ctrl_c_waits():
                self._finish(outcome)

    def _finish(self, outcome: Outcome[ProxyResult]) -> None:
        claim = self._running.pop(outcome.job.key)
        key = claim.key
        self._passing[key] += outcome.is_passing
        if outcome.is_passing and self._passing[key] < TRIES:
            self._progress.again(key, outcome.failure or "unknown")
            self._start(claim)
        elif outcome.result is None:
            reason = outcome.failure or "unknown"
            self.study.tell_failure(key, reason)
            self._progress.finished(key, failure=reason)
        else:
            self.study.tell(key, outcome.result, outcome.head, outcome.state)
            self._progress.finished(key)

    def _tick(self) -> None:
        if time.monotonic() - self._shown >= TICK:
            self.study.show()
            self._shown = time.monotonic()
        store = self.study.store
        if self.workers.capacity != self._capacity:
            self._capacity = self.workers.capacity
            store.register(self._capacity)
            self._progress.workers(self._capacity)
        self._progress.others(*store.elsewhere())
        best, rungs = store.state.best, store.state.rungs
        scored, share, after = list[int](), None, None
        if rungs is not None:
            scored, share = rungs.scored(), rungs.share(self.plan.trials)
            after = rungs.halving.rungs[best.rung] if best is not None and best.rung < rungs.halving.top else None
        self._progress.counted(
            store.state.num_finished,
            failed=store.state.failed,
            best=None if best is None else best.score,
            rungs=scored,
            share=share,
            after=after,
        )
        self._on_tick()
