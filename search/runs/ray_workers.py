"""Evaluate cells in several workers under Ray, on one machine or a cluster that grows and shrinks meanwhile.

A worker is a Ray actor on a node that this process chooses, because it knows which data the node has and how many threads are
there for each. A worker that dies gives its cell back. Only within the cluster does anything travel as a pickle.
"""

import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple

import torch
from tqdm import tqdm

from search.errors import InputError
from search.runs.cluster import Demand, Node, alive_nodes, import_ray, join, require_room, threads_wanted
from search.runs.shipping import Source, StoredCache, lacking, open_or_fetch, stored
from search.runs.workers import WAIT_SECONDS, Job, Outcome, Result, Task, evaluate
from search.tasks.feature_cache import FeatureCache

MAX_DEATHS = 3
RETRY_SECONDS = 60.0  # after which a node may try again on which a worker could not start
_PATIENCE = 60.0  # seconds between two messages about workers that are not ready yet


class RayWorkers(Generic[Result]):
    """Ray actors, as many as `demand` says, each with a task of its own made by `create_task(**caches)`.

    Joins a running cluster, or else starts Ray on this machine. Nodes may come and go: `capacity` follows. Feature caches are
    opened on each node, or sent there once; without any, the folder of this process must be on all. Raises InputError if Ray
    is not installed, for too few GPUs, and if no worker can start.
    """

    def __init__(
        self, create_task: Callable[..., Task[Result]], demand: Demand, caches: Mapping[str, FeatureCache] | None = None
    ) -> None:
        self._ray: Any = import_ray()
        self._has_joined = join()
        errors = ("RayActorError", "ObjectLostError", "OutOfMemoryError")  # the last is raised by Ray's memory monitor
        self._deaths = tuple(getattr(self._ray.exceptions, name) for name in errors)
        self._create_task, self._demand = create_task, demand
        self._caches = [stored(name, cache) for name, cache in (caches or {}).items()]
        self._actor_class: Any = self._ray.remote(num_gpus=demand.gpus_each or 0, num_cpus=0)(_Evaluator)
        self._source: Any = None
        self._nodes: dict[str, Node] = {}
        self._told: set[str] = set()  # nodes of which it was said that data are sent there, or that they are left out
        self._barred: dict[str, float] = {}  # nodes on which a worker could not start, and when
        self._starting: dict[Any, _Worker] = {}  # Ray reference -> the worker that it will be ready with
        self._idle: list[_Worker] = []
        self._running: dict[Any, _Running] = {}  # Ray reference -> the job and its worker
        self._queue: deque[tuple[Job, int]] = deque()  # jobs without a worker, and how many have died of each
        self._looked = -WAIT_SECONDS
        require_room(demand, alive_nodes())
        try:
            self._look()
            self._wait_for_the_first()
        except BaseException:
            self.close()
            raise

    @property
    def capacity(self) -> int:
        """The number of workers that are ready."""
        return len(self._idle) + len(self._running)

    def submit(self, job: Job) -> None:
        self._queue.append((job, 0))
        self._hand_out()

    def wait(self, timeout: float | None = None) -> Outcome[Result] | None:
        """Wait for the next outcome. Raises what a worker raised for bad input or a full disk; no cell causes that."""
        end = float("inf") if timeout is None else time.monotonic() + timeout
        while True:
            self._look()
            self._hand_out()
            outcome = self._next(max(0.0, min(WAIT_SECONDS, end - time.monotonic())))
            if outcome is not None or time.monotonic() >= end:
                return outcome

    def close(self) -> None:
        """Stop the workers; the cells that they were evaluating will be evaluated again by the next run."""
        if self._has_joined:
            self._ray.shutdown()
        else:
            for actor in [worker.actor for worker in self._workers()] + [self._source] * (self._source is not None):
                self._ray.kill(actor, no_restart=True)

    def _wait_for_the_first(self) -> None:
        """Wait until cells can be evaluated. Raises InputError if no worker can start: that is no failure of a cell."""
        told = time.monotonic()
        while not self._idle:
            self._look()
            self._next(WAIT_SECONDS)
            if time.monotonic() - told >= _PATIENCE:
                told = time.monotonic()
                _tell(f"{len(self._starting)} workers are not ready yet: they load their data, or wait for a free GPU")

    def _look(self) -> None:
        """Look which nodes are there, at most once a second; start workers that are missing, stop idle ones too many."""
        if time.monotonic() - self._looked < WAIT_SECONDS:
            return
        self._looked = time.monotonic()
        nodes = alive_nodes()
        placed = self._demand.placed(nodes)
        self._follow({node.id: node for node in nodes}, placed)
        present = self._present()
        for worker in list(self._idle):
            if present[worker.node] > placed[worker.node]:
                self._idle.remove(worker)
                self._ray.kill(worker.actor, no_restart=True)
                present[worker.node] -= 1
        spare = placed.total() - present.total()  # those that are too many may still be at work
        for node in self._nodes:
            missing = 0 if self._is_barred(node) else placed[node] - present[node]
            for _ in range(min(missing, spare)):
                self._start(node)
                spare -= 1

    def _follow(self, nodes: dict[str, Node], placed: Counter[str]) -> None:
        """Say which nodes came and went, and forget the workers of those that went, but what is at work.

        That is noticed by what becomes of the jobs.
        """
        before, self._nodes = self._nodes, nodes
        if before or len(nodes) > 1:
            for node in [node for name, node in nodes.items() if name not in before]:
                _tell(f"node {node.address}: {placed[node.id]} workers")
        for gone in before.keys() - nodes.keys():
            _tell(f"node {before[gone].address} has left; its cells are evaluated on others")
            self._starting = {reference: worker for reference, worker in self._starting.items() if worker.node != gone}
            self._idle = [worker for worker in self._idle if worker.node != gone]

    def _workers(self) -> list["_Worker"]:
        return [*self._starting.values(), *self._idle, *(running.worker for running in self._running.values())]

    def _present(self) -> Counter[str]:
        """How many workers each node has, by its id."""
        return Counter(worker.node for worker in self._workers())

    def _is_barred(self, node: str) -> bool:
        return time.monotonic() - self._barred.get(node, -RETRY_SECONDS) < RETRY_SECONDS

    def _start(self, node: str) -> None:
        place = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        actor = self._actor_class.options(scheduling_strategy=place).remote(self._create_task, self._caches, Path.cwd())
        self._starting[actor.lacks.remote()] = _Worker(actor, node)

    def _hand_out(self) -> None:
        """Give waiting jobs to idle workers, with the threads that their node has for each."""
        while self._queue and self._idle:
            job, deaths = self._queue.popleft()
            threads = self._threads(self._idle[-1].node)
            worker = self._idle.pop()
            self._running[worker.actor.evaluate.remote(job, threads)] = _Running(job, worker, deaths)

    def _threads(self, node: str) -> int:
        threads = max(1, self._nodes[node].cpus // self._present()[node])
        return min(threads, threads_wanted() or threads)

    def _next(self, seconds: float) -> Outcome[Result] | None:
        """What happens first within this time; an outcome, if it is the end of a job."""
        references = [*self._starting, *self._running]
        if not references:
            time.sleep(seconds)
            return None
        ready, _ = self._ray.wait(references, num_returns=1, timeout=seconds)
        for reference in ready:
            if reference in self._starting:
                self._go_on_starting(reference, self._starting.pop(reference))
            else:
                return self._ended(reference, self._running.pop(reference))
        return None

    def _go_on_starting(self, reference: Any, worker: "_Worker") -> None:
        try:
            lacks = self._ray.get(reference)
        except (*self._deaths, InputError, OSError) as error:
            self._bar(worker, str(getattr(error, "cause", error)).strip().splitlines()[-1])
            return
        if worker.is_loading:
            self._barred.pop(worker.node, None)
            self._idle.append(worker)
            return
        if lacks:
            self._tell_of_sending(worker.node, lacks)
        worker.is_loading = True
        self._starting[worker.actor.load.remote(self._source)] = worker

    def _bar(self, worker: "_Worker", reason: str) -> None:
        """Leave out a node for a while on which a worker cannot start, if the node itself is alive.

        Raises InputError if there is no other, and nobody is at work.
        """
        alike = {reference: each for reference, each in self._starting.items() if each.node == worker.node}
        for each in [worker, *alike.values()]:
            self._ray.kill(each.actor, no_restart=True)
        self._starting = {reference: each for reference, each in self._starting.items() if reference not in alike}
        nodes = {node.id: node for node in alive_nodes()}
        if worker.node not in nodes:
            return
        self._barred[worker.node] = time.monotonic()
        if nodes.keys() <= self._barred.keys() and not self._workers():
            raise InputError(f"the workers cannot start: {reason}")
        if worker.node not in self._told:
            self._told.add(worker.node)
            _tell(f"node {nodes[worker.node].address} is left out, its workers cannot start: {reason}")

    def _tell_of_sending(self, node: str, lacks: Sequence[StoredCache]) -> None:
        if self._source is None:
            place = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                self._ray.get_runtime_context().get_node_id(), soft=False
            )
            source_class: Any = self._ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Source)
            self._source = source_class.options(scheduling_strategy=place).remote(self._caches)
        if node not in self._told:
            self._told.add(node)
            names, size = " and ".join(str(cache.directory) for cache in lacks), sum(cache.bytes for cache in lacks)
            _tell(f"node {self._nodes[node].address} does not have {names}: {size / 1e6:.0f} MB are sent to it, once")

    def _ended(self, reference: Any, running: "_Running") -> Outcome[Result] | None:
        job, worker, deaths = running
        try:
            outcome: Outcome[Result] = self._ray.get(reference)
        except self._deaths:
            self._ray.kill(worker.actor, no_restart=True)  # if it only cannot be reached, two would train in one folder
            self._doubt(worker.node)
            if deaths + 1 == MAX_DEATHS:
                return Outcome(job, failure=f"its worker died {MAX_DEATHS} times", is_passing=True)
            self._queue.appendleft((job, deaths + 1))
            return None
        except (InputError, OSError) as error:
            raise getattr(error, "cause", error) from None  # without the worker's traceback
        self._idle.append(worker)
        return outcome

    def _doubt(self, node: str) -> None:
        """A worker has died, perhaps with its node: the idle ones there have to answer before they get a cell."""
        self._looked = -WAIT_SECONDS
        self._starting |= {each.actor.lacks.remote(): each for each in self._idle if each.node == node}
        self._idle = [each for each in self._idle if each.node != node]


@dataclass
class _Worker:
    """An actor, on the node of this id; `is_loading` once it was told to make its task."""

    actor: Any
    node: str
    is_loading: bool = False


class _Running(NamedTuple):
    job: Job
    worker: _Worker
    deaths: int


class _Evaluator(Generic[Result]):
    """A worker: it is asked what it lacks, then to load, then to evaluate."""

    def __init__(self, create_task: Callable[..., Task[Result]], caches: Sequence[StoredCache], folder: Path) -> None:
        self._create_task, self._caches, self._folder = create_task, caches, folder

    def lacks(self) -> list[StoredCache]:
        """The caches that this machine does not have."""
        return lacking(self._caches)

    def load(self, source: Any) -> None:
        """Make the task, once the caches are there; `source` is a `Source`, or None if this machine has them.

        Raises InputError for a task without caches on a machine that does not have the folder of the driver.
        """
        if self._folder.is_dir():
            os.chdir(self._folder)
        elif not self._caches:
            raise InputError(f"{self._folder} is not on this machine: share it among all nodes")

        def read(cache: str, name: str, number: int) -> tuple[bytes, str]:
            found: tuple[bytes, str] = import_ray().get(source.read.remote(cache, name, number))
            return found

        self._task = self._create_task(**{cache.name: open_or_fetch(cache, read) for cache in self._caches})

    def evaluate(self, job: Job, threads: int) -> Outcome[Result]:
        torch.set_num_threads(threads)
        return evaluate(self._task, job)


def _tell(words: str) -> None:
    tqdm.write(words, file=sys.stderr)
