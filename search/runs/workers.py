"""Evaluate cells in this process, alone or in turns; `search.runs.ray_workers` does it in several processes.

What evaluating means is the task's: a brief training on cached features (`search.tasks.proxy`), or a whole one
(`search.tasks.end_to_end`). Workers only evaluate; the process that asks also writes the study.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, cast

import torch
from tqdm import tqdm

from fast.segmentation import SegmentationHead
from reference.cell import Cell
from search.devices import resolve_device
from search.runs.cluster import demand_of, is_in_process
from search.settings import WorkerSettings
from search.tasks.feature_cache import FeatureCache
from search.tasks.proxy import NotFiniteError, Stretch, followed

WAIT_SECONDS = 1.0  # after which one looks whether more workers are there

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)
_Done = tuple[Result, SegmentationHead | None, bytes | None]  # result, head, state


class Job(NamedTuple):
    """A cell to evaluate; `key` is chosen by the caller; all randomness follows from `seed`. The task must be a `SteppedTask`
    for a `stretch`, a part of the training."""

    key: Any
    cell: Cell
    seed: tuple[int, ...]
    stretch: Stretch | None = None


class Task(Protocol[Result_co]):
    """Scores cells; the result depends on the cell, the task's settings and `seed` alone."""

    def evaluate(
        self, cell: Cell, seed: Sequence[int], on_step: Callable[[int], None] = ...
    ) -> tuple[Result_co, SegmentationHead | None]:
        """Evaluate a cell: its result, and the trained head unless it is kept elsewhere. Raises NotFiniteError."""
        ...


class SteppedTask(Task[Result_co], Protocol[Result_co]):
    """A task whose evaluations can run in turns, and in parts, with the same results as one after the other."""

    def evaluation(
        self, cell: Cell, seed: Sequence[int], stretch: Stretch | None = None
    ) -> Generator[int, None, tuple[Result_co, SegmentationHead | None, bytes | None]]:
        """`evaluate`, or a part of it, which yields the number of each iteration after it, and returns the state to go on."""
        ...


@dataclass(frozen=True)
class Outcome(Generic[Result_co]):
    """What came of a job: a result, with the trained head if the task returns one, or the reason why it failed. Of a part of a
    training also the state with which it goes on.

    A failure is passing if the cell may not be the cause, so that another try may succeed: a GPU was full, workers died.
    """

    job: Job
    result: Result_co | None = None
    head: SegmentationHead | None = None
    state: bytes | None = None
    failure: str | None = None
    is_passing: bool = False


class Workers(Protocol[Result_co]):
    """Submit up to `capacity` jobs, then wait for the one that is finished first."""

    @property
    def capacity(self) -> int:
        """How many jobs may run at a time. It may change while `wait` waits, to 0 as well."""
        ...

    def submit(self, job: Job) -> None: ...

    def wait(self, timeout: float | None = None) -> Outcome[Result_co] | None:
        """The next outcome, or None if there is none within `timeout` seconds, which a worker in this process ignores."""
        ...

    def close(self) -> None: ...


def evaluate(task: Task[Result], job: Job, on_step: Callable[[int], None] = lambda iteration: None) -> Outcome[Result]:
    """Run one job; a loss that is not finite or too little memory is a failure of the cell, not an error."""

    def work() -> "_Done[Result]":
        if job.stretch is None:
            return *task.evaluate(job.cell, job.seed, on_step), None
        return followed(cast(SteppedTask[Result], task).evaluation(job.cell, job.seed, job.stretch), on_step)

    outcome = _guarded(job, work)
    assert outcome is not None
    return outcome


def _guarded(job: Job, work: Callable[[], "_Done[Result] | None"]) -> Outcome[Result] | None:
    """The outcome if this work ends the job with a result, or as a failure; None if there is more to do."""
    try:
        done = work()
    except NotFiniteError as error:
        return Outcome(job, failure=str(error))
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return Outcome(job, failure=f"out of GPU memory: {str(error).splitlines()[0]}", is_passing=True)
    return None if done is None else Outcome(job, *done)


def outcomes(workers: Workers[Result], jobs: Iterable[Job]) -> Iterator[Outcome[Result]]:
    """Submit the jobs in order, as many at a time as the workers take; yield each outcome when it is there."""
    queue, running = list(jobs), 0
    while queue or running:
        while queue and running < workers.capacity:
            workers.submit(queue.pop(0))
            running += 1
        outcome = workers.wait(WAIT_SECONDS)
        if outcome is not None:
            yield outcome
            running -= 1


@contextmanager
def open_workers(
    create_task: Callable[..., Task[Result]],
    settings: WorkerSettings,
    device: str,
    iterations: int,
    *,
    caches: Mapping[str, FeatureCache] | None = None,
    in_turns: int = 1,
    most: int | None = None,
) -> Iterator[Workers[Result]]:
    """Workers with tasks by `create_task(**caches)` under Ray, or one in this process with a bar of a cell's iterations.

    `device` as the user gave it: cuda is one GPU for each worker, or its share of one, cuda:1 is refused for more than one.
    Above 1, `in_turns` is how many cells the worker in this process trains at a time; the task must be a `SteppedTask`. There
    are at most `most` workers.
    """
    if not is_in_process(settings, device):
        from search.runs.ray_workers import RayWorkers

        with closing(RayWorkers(create_task, demand_of(settings, device, most), caches)) as workers:
            yield workers
        return
    with tqdm(total=iterations, unit="step", leave=False, position=1, disable=None) as bar:
        running: list[Job] = []

        def on_step(job: Job, iteration: int) -> None:
            if running != [job]:
                running[:] = [job]
                bar.reset()
                bar.set_description(str(job.key))
            bar.update(iteration - bar.n)  # a continued training does not begin at 1

        if in_turns == 1:
            yield InProcess(create_task(**(caches or {})), on_step)
        else:
            task = cast(SteppedTask[Result], create_task(**(caches or {})))
            yield InTurns(task, in_turns, torch.device(resolve_device(device)), on_step)


class InProcess(Generic[Result]):
    """One job at a time in this process; `on_step(job, iteration)` follows its progress."""

    capacity = 1

    def __init__(self, task: Task[Result], on_step: Callable[[Job, int], None]) -> None:
        self._task = task
        self._on_step = on_step
        self._jobs: list[Job] = []

    def submit(self, job: Job) -> None:
        self._jobs.append(job)

    def wait(self, timeout: float | None = None) -> Outcome[Result]:
        job = self._jobs.pop(0)
        return evaluate(self._task, job, lambda iteration: self._on_step(job, iteration))

    def close(self) -> None:
        """Nothing to stop: no job runs outside `wait`."""


class InTurns(Generic[Result]):
    """Several jobs at a time in this process, one iteration of each in turn; on CUDA every job has a stream of its own.

    Most launches of one training are too small to fill a GPU. Those of another fill it meanwhile; on a CPU nothing is gained.
    """

    def __init__(
        self, task: SteppedTask[Result], capacity: int, device: torch.device, on_step: Callable[[Job, int], None]
    ) -> None:
        self.capacity = capacity
        self._task, self._on_step = task, on_step
        self._running: deque[_Running[Result]] = deque()
        on_gpu = device.type == "cuda"
        self._streams = [torch.cuda.Stream(device) if on_gpu else None for _ in range(capacity)]  # type: ignore[no-untyped-call]

    def submit(self, job: Job) -> None:
        stream = self._streams.pop()
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(stream.device))  # which may still copy the features
        self._running.append(_Running(job, self._task.evaluation(job.cell, job.seed, job.stretch), stream))

    def wait(self, timeout: float | None = None) -> Outcome[Result]:
        """Go on with all jobs until one of them ends."""
        followed = self._running[0].job
        while True:
            running = self._running.popleft()
            outcome = _guarded(running.job, lambda running=running: self._advance(running, followed))  # type: ignore[misc]
            if outcome is not None:
                self._streams.append(running.stream)
                return outcome
            self._running.append(running)

    def _advance(self, running: "_Running[Result]", followed: Job) -> "_Done[Result] | None":
        try:
            with nullcontext() if running.stream is None else torch.cuda.stream(running.stream):
                iteration = next(running.steps)
        except StopIteration as end:
            done: _Done[Result] = end.value
            return done
        if running.job is followed:
            self._on_step(running.job, iteration)
        return None

    def close(self) -> None:
        """Nothing to stop: no job runs outside `wait`."""


class _Running(NamedTuple, Generic[Result]):
    job: Job
    steps: Generator[int, None, "_Done[Result]"]
    stream: torch.cuda.Stream | None
