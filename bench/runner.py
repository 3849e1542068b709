"""Run a plan: stage after stage. What a stage has measured is on the disk at once; the rows of a case come together.

An illegal memory access, a hang or the end of the time costs only the stage in which it happens, and nothing that was
measured before. What a stage says lies in a file of its own in the run's folder; a run that goes on reads these files, and
measures only the cases and stages that are not in them.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from tqdm import tqdm

from bench.cases import Job
from bench.launch_trial import triton_cache
from bench.measure import Run, measure_apart
from bench.results import DONE, NO_TIME, OUT_OF_TIME, Results, Row
from bench.stages import Stage
from bench.worker import OutOfTime, Worker, WorkerLost, WorkFailed
from search.folder import Folder

Value = dict[str, Any] | Row  # a number with its names, or a provider's row
LEAST_S = 5.0  # in less time no stage is begun
Hear = Callable[[Value], None]


def run_stages(
    stages: Sequence[Stage], run: Run, results: Results, end: float, tell: Callable[[str, Value], None] = lambda *_: None
) -> int:
    """Run the stages that are left, as far as they fit in before `end` on the monotonic clock -> number of those that do not.

    `tell` hears each value with its stage's name when it is on the disk and in the results.
    """
    folder, on_gpu, unreached = Folder(run.folder / "stages"), run.device_name != "cpu", 0
    with Worker(preload="bench.stages", log=run.folder / "log", ahead=on_gpu) as worker:
        bar = tqdm(stages, unit="stage", disable=None)
        for number, stage in enumerate(bar):
            bar.set_description(stage.name[:60])
            record = Record(folder, number, stage, results)
            if record.is_whole:
                continue

            def hear(value: Value, stage: Stage = stage, record: Record = record) -> None:
                record.add(value)
                tell(stage.name, value)

            left = replace(stage, jobs=tuple(job for job in stage.jobs if not record.has(job)))
            outcome = _outcome(left, replace(run, roofs=results.roofs), worker, end, hear)
            unreached += outcome["status"] == NO_TIME
            record.is_whole = outcome["status"] != NO_TIME
            hear(outcome)
    results.is_complete = True
    return unreached


class Record:
    """What a stage says: in its file, and in the results of the run, beginning with what an earlier part of the run left.

    That is all, if it brought the stage to its end; or else the rows of the cases that are whole. Raises InputError for a
    damaged file.
    """

    def __init__(self, folder: Folder, number: int, stage: Stage, results: Results) -> None:
        self._folder, self._stage, self._results = folder, stage, results
        self._name = f"{number:03}-{re.sub(r'[^a-z0-9]+', '-', stage.name.lower())}"
        try:
            earlier = folder.result(self._name) or {"is_whole": False, "said": []}
            self.is_whole = bool(earlier["is_whole"])
            self._said = [Row(**value["row"]) if "row" in value else dict(value) for value in earlier["said"]]
        except (ValueError, KeyError, TypeError) as error:
            raise folder.damaged(self._name, error) from error
        if not self.is_whole:
            jobs = () if stage.function else stage.jobs
            self._said = [row for job in jobs if self.has(job) for row in self._rows_of(job)]
        for value in self._said:
            self._hear(value)

    def has(self, job: Job) -> bool:
        """Whether the job of a stage without a function has a row of every provider."""
        return self._stage.function is None and len(self._rows_of(job)) == len(job.providers)

    def _rows_of(self, job: Job) -> list[Row]:
        case = job.case
        key = (case.suite, case.name, case.mode, job.dtype, case.shape)
        return [value for value in self._said if isinstance(value, Row) and value.key == key]

    def add(self, value: Value) -> None:
        self._said.append(value)
        said = [{"row": asdict(value)} if isinstance(value, Row) else value for value in self._said]
        self._folder.write_result(self._name, {"stage": self._stage.name, "is_whole": self.is_whole, "said": said})
        self._hear(value)

    def _hear(self, value: Value) -> None:
        ended_well = isinstance(value, dict) and value.get("status") == DONE
        if not (ended_well and self._stage.is_case):  # of a case its rows say all
            self._results.hear(self._stage.name, value)


def _outcome(stage: Stage, run: Run, worker: Worker, end: float, hear: Hear) -> dict[str, Any]:
    """Run a stage -> how it ended, in how many seconds, and how many kernels Triton did not find in its cache."""
    start, cached = time.monotonic(), _kernels_in_cache()
    limit_s = min(stage.limit_s, end - start)
    if limit_s < LEAST_S:
        return {"status": NO_TIME, "seconds": 0.0}
    status = run_stage(stage, run, worker, limit_s, hear)
    if status["status"] == OUT_OF_TIME and limit_s < stage.limit_s:  # it is not to blame
        status["status"] = NO_TIME
    compiled = {"kernels_compiled": _kernels_in_cache() - cached} if run.device_name != "cpu" else {}
    return {**status, "seconds": round(time.monotonic() - start, 1), **compiled}


def _kernels_in_cache() -> int:
    return sum(1 for _ in triton_cache().glob("*/*.cubin"))


def run_stage(stage: Stage, run: Run, worker: Worker, limit_s: float, hear: Hear) -> dict[str, str]:
    """Run a stage for `limit_s` seconds at most -> how it ended."""
    if not stage.is_case:
        worker.fresh()
    try:
        if stage.function is not None:
            worker(stage.function, run, *stage.jobs, limit_s=limit_s, say=hear)
        else:
            measure_jobs(stage.jobs, run, worker, time.monotonic() + limit_s, hear)
    except OutOfTime as error:
        return {"status": OUT_OF_TIME, "note": str(error)}
    except (WorkFailed, WorkerLost) as error:
        return {"status": str(error)}
    return {"status": DONE}


def measure_jobs(jobs: Sequence[Job], run: Run, worker: Worker, end: float, hear: Hear) -> None:
    """Each job's rows, until `end` on the monotonic clock; no job takes more than one and a half of its share in it."""
    late = list[str]()
    for number, job in enumerate(jobs):
        left_s = end - time.monotonic()
        if left_s < 1:
            late += [f"no time left for {len(jobs) - number} of {len(jobs)} cases"]
            break
        limit_s = min(left_s, max(15.0, 1.5 * left_s / (len(jobs) - number)))
        try:
            for row in measure_apart(worker, job, run, limit_s):
                hear(row)
        except OutOfTime as error:
            late.append(f"{job.case.name}, {job.case.mode}: {error}")
    if late:
        raise OutOfTime("; ".join(late))
