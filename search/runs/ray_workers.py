"""Evaluate cells in several workers under Ray, on one machine or a cluster. A worker that dies gives its cell back."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic

import torch

from search.commands import to_install
from search.devices import resolve_device
from search.errors import InputError
from search.interrupts import sigterm_kept
from search.runs.workers import Job, Outcome, Result, Task, evaluate

MAX_DEATHS = 3
_PATIENCE = 60  # seconds between two messages about workers that are not ready yet


class RayWorkers(Generic[Result]):
    """`count` Ray actors, each with a task of its own made by `create_task`; one GPU each if the device is CUDA.

    Joins the cluster that RAY_ADDRESS names, or else starts Ray on this machine. Relative paths are those of this process, so
    on several machines the folder must exist on all. Raises InputError if Ray is not installed, or for too few GPUs.
    """

    def __init__(self, create_task: Callable[[], Task[Result]], count: int, device: str) -> None:
        try:
            import ray
        except ImportError as error:
            raise InputError(f"`workers` above 1 needs Ray: {to_install('workers')}") from error
        self._ray: Any = ray
        self.capacity = count
        errors = ("RayActorError", "ObjectLostError", "OutOfMemoryError")  # the last is raised by Ray's memory monitor
        self._deaths = tuple(getattr(ray.exceptions, name) for name in errors)
        if device.startswith("cuda:"):
            raise InputError(f"`device` {device} is one GPU, `workers` {count} have one each: give cuda")
        on_gpu = (resolve_device(device) if device == "auto" else device).startswith("cuda")
        if not ray.is_initialized():
            with sigterm_kept():
                ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
        gpus = 1 if on_gpu else 0
        resources: Any = ray.cluster_resources  # untyped
        available = int(resources().get("GPU", 0))
        if gpus * count > available:
            raise InputError(f"`workers` {count} on CUDA needs {count} GPUs, Ray has {available}: give fewer workers")
        threads = max(1, torch.get_num_threads() // count)
        actor_class: Any = ray.remote(num_gpus=gpus, num_cpus=0)(_Evaluator)
        self._create: Callable[[], Any] = lambda: actor_class.remote(create_task, threads, Path.cwd())
        self._idle = [self._create() for _ in range(count)]
        self._wait_until_ready()
        self._running: dict[Any, tuple[Job, Any, int]] = {}  # Ray reference -> the job, its actor, deaths so far

    def _wait_until_ready(self) -> None:
        missing = [actor.ready.remote() for actor in self._idle]
        try:
            while missing:
                ready, missing = self._ray.wait(missing, num_returns=len(missing), timeout=_PATIENCE)
                self._ray.get(ready)
                if missing:
                    what = "they load their data, or wait for a free GPU"
                    print(f"{len(missing)} of {self.capacity} workers are not ready yet: {what}", file=sys.stderr)
        except self._deaths as error:  # no failure of a cell, so raised before the first cell
            raise InputError(f"the workers cannot start: {str(error).strip().splitlines()[-1]}") from error

    def submit(self, job: Job, deaths: int = 0) -> None:
        actor = self._idle.pop()
        self._running[actor.evaluate.remote(job)] = (job, actor, deaths)

    def wait(self, timeout: float | None = None) -> Outcome[Result] | None:
        """Wait for the next outcome. Raises what a worker raised for bad input or a full disk; no cell causes that."""
        while True:
            finished, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout)
            if not finished:
                return None
            (reference,) = finished
            job, actor, deaths = self._running.pop(reference)
            try:
                outcome: Outcome[Result] = self._ray.get(reference)
            except self._deaths:
                self._ray.kill(actor, no_restart=True)  # if it only cannot be reached, two would train in one folder
                self._idle.append(self._create())
                if deaths + 1 == MAX_DEATHS:
                    return Outcome(job, failure=f"its worker died {MAX_DEATHS} times", is_passing=True)
                self.submit(job, deaths + 1)
            except (InputError, OSError) as error:
                raise getattr(error, "cause", error) from None  # without the worker's traceback
            else:
                self._idle.append(actor)
                return outcome

    def close(self) -> None:
        """Stop the workers; the cells that they were evaluating will be evaluated again by the next run."""
        self._ray.shutdown()


class _Evaluator(Generic[Result]):
    def __init__(self, create_task: Callable[[], Task[Result]], threads: int, folder: Path) -> None:
        os.chdir(folder)
        torch.set_num_threads(threads)
        self._task = create_task()

    def ready(self) -> None:
        """Returns when the task is made."""

    def evaluate(self, job: Job) -> Outcome[Result]:
        return evaluate(self._task, job)
