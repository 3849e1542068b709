"""The main job: search cells on the proxy task (paper, section 3): `python -m search.random`.

Without flags it makes its own data, trains a small backbone on them and searches a dozen cells in a few minutes. The same
command goes on with an interrupted run, and adds cells to a finished one if --cells is raised.

This file is to be run as a module from the repository's root: inside this folder its name would hide Python's own `random`.
"""

import csv
import io
import json
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from tqdm import tqdm

from fast.bilinear_resize import bilinear_resize
from fast.checkpoint import load_head, save_head
from reference.cell import NUM_BRANCHES, Cell
from search.cells.sampler import LAG, PaperSampler, create_sampler, suggest_cell
from search.cells.space import SearchSpace, canonical_form, load_cells
from search.cli import ctrl_c_waits, run_command
from search.datasets import open_dataset
from search.errors import InputError
from search.features import FeatureCache, FeatureSettings, open_cache, prepare_caches, resolve_device, write_text
from search.report import write_report
from search.reports.rank_correlation import ties
from search.runs.study import FOUND, BaselineRecord, Study, TrialRecord, comparison_label, load_run, open_run, ranked
from search.runs.workers import Job, Outcome, Workers, open_workers
from search.tasks.proxy import ProxyResult, ProxySettings, ProxyTask, crop_in_features

KNOWN_CELLS = ("aspp", "dpc")
_EXAMPLES = 4
_TOP = 10  # cells in the table and in best_cells/

# Settings that may change between two runs of the command: they move files, add work, or spread it, but change no score.
_FREE = {
    "name",
    "runs_dir",
    "cache_dir",
    "data_dir",
    "train_split",
    "weights",
    "device",
    "workers",
    "cells",
    "compare",
    "comparison_seeds",
}


@dataclass(frozen=True, kw_only=True)
class RandomSettings(FeatureSettings, ProxySettings):
    """Search dense prediction cells on the proxy task, beside ASPP and the published cell."""

    name: str | None = None
    """Name of the run, its folder in --runs-dir. Default: the data set's name."""
    runs_dir: Path = Path("runs")
    """Folder of the runs."""
    storage: str | None = None
    """Database URL of the study, such as postgresql://host/name. Default: a SQLite file in the run's folder."""
    cells: int = 12
    """Number of cells to try in all, those of earlier runs of this command included."""
    iterations: int = 80
    """Training steps per cell. The paper: 30,000."""
    learning_rate: float = 0.2
    """Initial learning rate; it falls to 0 by the power 0.9 of the remaining share of steps. The paper: 0.01."""
    branch_channels: int = 64
    """Filters of each branch and of the cell's output. The paper: 256."""
    branches: int = NUM_BRANCHES
    """Branches per cell."""
    sampler: str = "paper"
    """How cells are proposed: paper (uniform, and near the best so far), random, tpe or evolution."""
    lag: int = LAG
    """The paper's sampler ignores this many latest results, so that its cells do not depend on up to lag + 1 workers."""
    seed: int = 0
    """Seed of everything: the cells, their initial weights, crops and dropout."""
    compare: tuple[str, ...] = KNOWN_CELLS
    """Cells to score beside the search: aspp, dpc, psp, or paths of cell JSON files."""
    comparison_seeds: int = 1
    """Seeds with which these and the best cell found are scored."""
    workers: int = 1
    """Cells evaluated at a time; above 1 by Ray (install the extra `workers`), on CUDA with one GPU each."""


def main(settings: RandomSettings) -> None:
    """Search, compare, report."""
    _check(settings)
    device = resolve_device(settings.device)
    sampler = create_sampler(settings.sampler, SearchSpace(settings.branches), settings.seed, lag=settings.lag)
    known_cells(settings)
    caches = prepare_caches(settings)
    crop_in_features(settings, caches["train"])  # refuses a wrong one before the run begins
    directory = settings.runs_dir / (settings.name or caches["train"].manifest["dataset"])
    description: dict[str, Any] = {
        "command": ["python", "-m", "search.random", *sys.argv[1:]],
        "class_names": caches["train"].class_names,
        "palette": np.array(caches["train"].manifest["palette"], dtype=np.uint8),
        "features": {field.name: getattr(settings, field.name) for field in fields(FeatureSettings)},
    }

    def create_task() -> ProxyTask:
        train, val = (open_cache(caches[role].directory) for role in ("train", "val"))
        return ProxyTask(train, val, settings, device)

    with (
        open_run(directory, _identity(settings, caches), sampler, storage=settings.storage, **description) as study,
        open_workers(create_task, settings.workers, device, settings.iterations) as workers,
    ):
        timed_on = None
        try:
            _Search(settings, study, workers, caches).run()
            timed_on = device
        finally:  # also after Ctrl-C: what there is, is shown; but no latency, that would take seconds
            finish(directory, caches, settings, timed_on)


def known_cells(settings: RandomSettings) -> dict[str, Cell]:
    """The cells to compare with, by their short names. Raises InputError for one that is not there, or two of one name."""
    return load_cells(settings.compare)


class _Search:
    """The loop that asks, submits, waits and tells; all state that must last is in the study."""

    def __init__(
        self, settings: RandomSettings, study: Study, workers: Workers[ProxyResult], caches: dict[str, FeatureCache]
    ) -> None:
        self.settings = settings
        self.study = study
        self.workers = workers
        self.caches = caches
        self.space = SearchSpace(settings.branches)
        self.scored: dict[Cell, tuple[int, ProxyResult]] = {}  # by canonical form: the trial that was evaluated

    def run(self) -> None:
        self.study.discard_unfinished_comparisons()
        for name, cell in known_cells(self.settings).items():
            self._compare(name, cell)
        self._search()
        best = ranked(self.study.records())[:1]
        for record in best:  # the best of many is partly luck: scored again with the seeds of the known cells
            self._compare(f"{FOUND}{record.number}", record.cell)

    def _compare(self, name: str, cell: Cell) -> None:
        done = self.study.compared(name)
        for seed in range(self.settings.comparison_seeds):
            if seed in done:
                continue
            print(f"comparison: {name}, seed {seed}", file=sys.stderr)
            self.workers.submit(Job(name, cell, (self.settings.seed, 1, seed)))
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
            self._save(outcome, f"{name.replace(' ', '_')}_seed0")
        self.study.tell(self.study.comparison, number, outcome.job.cell, outcome.result, name=name, seed=seed)

    def _search(self) -> None:
        records = self.study.records()
        finished = {record.number for record in records}
        queue = self.study.unfinished()
        running: set[int] = set()
        for record in records:
            if record.result:
                self.scored.setdefault(canonical_form(record.cell), (record.number, record.result))
        best = max((result.mean_iou for _, result in self.scored.values()), default=0.0)
        failed = sum(record.failure is not None for record in records)
        with tqdm(total=self.settings.cells, initial=len(finished), desc="search", unit="cell") as bar:
            while True:
                bar.set_postfix(best_mIOU=f"{100 * best:.2f}%", failed=failed)
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
        """An interrupted trial, or a new one if there is room and what its sampler may look at is finished."""
        if queue:
            return queue.pop(0)
        number = len(finished) + len(running)
        if number >= self.settings.cells:
            return None
        sampler = self.study.search.sampler
        visible = sampler.visible_before(number) if isinstance(sampler, PaperSampler) else 0
        return self.study.search.ask() if all(i in finished for i in range(visible)) else None

    def _start(self, trial: optuna.Trial, finished: set[int]) -> set[int]:
        """Submit the trial's cell, or take the score of an equal cell; returns the trials that now run."""
        cell = suggest_cell(trial, self.space)
        if twin := self.scored.get(canonical_form(cell)):
            number, result = twin
            self.study.tell(self.study.search, trial.number, cell, result, duplicate_of=number)
            finished.add(trial.number)
            return set()
        self.workers.submit(Job(trial.number, cell, (self.settings.seed, 0, trial.number)))
        return {trial.number}

    def _finish_trial(self, outcome: Outcome[ProxyResult], best: float) -> float:
        number = outcome.job.key
        if outcome.result is None:
            self.study.tell_failure(number, outcome.job.cell, outcome.failure or "unknown")
            tqdm.write(f"trial {number} failed: {outcome.failure}", file=sys.stderr)
            return 0.0
        score = outcome.result.mean_iou
        if score > best:
            self._save(outcome, "best")
        self.study.tell(self.study.search, number, outcome.job.cell, outcome.result)
        self.scored.setdefault(canonical_form(outcome.job.cell), (number, outcome.result))
        return score

    def _save(self, outcome: Outcome[ProxyResult], name: str) -> None:
        assert outcome.head is not None  # a result comes with its head
        manifest = self.caches["train"].manifest
        keys = ("backbone", "weights_hash", "weights_origin", "mean", "std", "output_stride", "dataset")
        backbone = {key: manifest[key] for key in keys if key in manifest}  # a cache of an earlier version lacks some
        path = self.study.directory / "heads" / f"{name}.safetensors"
        save_head(path, outcome.head, class_names=self.caches["train"].class_names, backbone=backbone)


def finish(directory: Path, caches: dict[str, FeatureCache], settings: RandomSettings, timed_on: str | None) -> None:
    """Write what the run is for: best cells, table, examples and report, with latencies on a device; print the table."""
    run = load_run(directory)
    best = ranked(run.trials)[:_TOP]
    if not best:
        failed = sum(record.failure is not None for record in run.trials)
        report = write_report(run)
        print(f"no cell has a score yet ({failed} failed): see {report}; run the same command to go on", file=sys.stderr)
        return
    for rank, record in enumerate(best, start=1):
        write_text(directory / "best_cells" / f"rank_{rank:02d}.json", record.cell.to_json())
    _write_csv(directory / "cells.csv", run.trials)
    _write_examples(directory, caches["val"], settings)
    report = write_report(run, timed_on)
    print(_table(best, run.baselines))
    if warning := ties([record.result.mean_iou for record in ranked(run.trials) if record.result]):
        print(f"\nwarning: {warning}")
    print(f"\nreport: {report}\nbest cell: {directory / 'best_cells' / 'rank_01.json'}")


def _table(best: list[TrialRecord], baselines: list[BaselineRecord]) -> str:
    rows = [(f"trial {record.number}", [record.result], record.cell) for record in best if record.result]
    for name in dict.fromkeys(record.name for record in baselines):
        again = [record for record in baselines if record.name == name]
        label = comparison_label(name)
        rows.append((f"{label} (n={len(again)})", [record.result for record in again], again[0].cell))
    lines = [f"{'':20} {'mIOU %':>14} {'params':>9} {'multiply-adds':>13} {'seconds':>7}  cell"]
    for label, results, cell in rows:
        scores = [100 * result.mean_iou for result in results]
        spread = f" ± {np.std(scores, ddof=1):.2f}" if len(scores) > 1 else ""
        mean, first = f"{np.mean(scores):.2f}{spread}", results[0]
        lines.append(
            f"{label:20} {mean:>14} {first.parameters:>9,} {first.multiply_adds / 1e9:>12.3f}B {first.seconds:>7.1f}  {cell}"
        )
    return "\n".join(lines)


def _write_csv(path: Path, records: list[TrialRecord]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["trial", "mean_iou", "parameters", "multiply_adds", "seconds", "failure", "duplicate_of", "cell"])
    for record in records:
        result = record.result
        scores = [result.mean_iou, result.parameters, result.multiply_adds, result.seconds] if result else [None] * 4
        cell = json.dumps(json.loads(record.cell.to_json()))
        writer.writerow([record.number, *scores, record.failure, record.duplicate_of, cell])
    write_text(path, text.getvalue())


@torch.inference_mode()
def _write_examples(directory: Path, val: FeatureCache, settings: RandomSettings) -> None:
    """Predictions of the best cell's and the known cells' heads on a few validation images, for the report."""
    dataset = open_dataset(settings.dataset, "val", settings.data_dir)
    heads = {
        name: load_head(path)[0]
        for name in ("best", *known_cells(settings))
        if (path := directory / "heads" / f"{name if name == 'best' else name + '_seed0'}.safetensors").exists()
    }
    arrays: dict[str, np.typing.NDArray[np.uint8]] = {}
    for row, index in enumerate(np.linspace(0, len(dataset) - 1, min(_EXAMPLES, len(dataset))).round().astype(int)):
        sample = dataset[int(index)]
        height, width = sample.label.shape
        arrays |= {f"image_{row}": sample.image, f"label_{row}": sample.label}
        for name, head in heads.items():
            logits = head(val.features[index : index + 1].float())
            upsampled = bilinear_resize(logits, (val.labels.shape[1], val.labels.shape[2]))
            arrays[f"prediction_{row}/{name}"] = upsampled.argmax(dim=1)[0, :height, :width].to(torch.uint8).numpy()
    partial = directory / "examples.partial.npz"
    np.savez_compressed(partial, allow_pickle=False, **arrays)
    partial.replace(directory / "examples.npz")


def _check(settings: RandomSettings) -> None:
    """Refuse numbers that cannot work, before anything is written."""
    at_least_one = ("cells", "iterations", "batch_size", "branch_channels", "branches", "comparison_seeds", "workers")
    for field in (*at_least_one, "statistics_batches"):
        if getattr(settings, field) < 1:
            raise InputError(f"--{field.replace('_', '-')} must be at least 1, got {getattr(settings, field)}")
    for field in ("lag", "weight_decay", "momentum"):
        if not getattr(settings, field) >= 0:  # nor NaN
            raise InputError(f"--{field.replace('_', '-')} must not be negative, got {getattr(settings, field)}")
    if not settings.learning_rate > 0:
        raise InputError(f"--learning-rate must be above 0, got {settings.learning_rate}")
    if settings.sampler == "paper" and settings.workers > settings.lag + 1:
        raise InputError(f"--workers {settings.workers} needs --lag {settings.workers - 1} or more, or some would never work")
    if not 0 <= settings.dropout < 1:
        raise InputError(f"--dropout must be at least 0 and below 1, got {settings.dropout}")


def _identity(settings: RandomSettings, caches: dict[str, FeatureCache]) -> dict[str, Any]:
    """What the scores of a run depend on; the same command goes on, another one is refused."""
    fields = {field: value for field, value in asdict(settings).items() if field not in _FREE}
    hashes = {
        key: caches["train"].manifest[key] for key in ("backbone", "weights_hash", "data_fingerprint", "image_size", "dataset")
    }
    hashes["val_fingerprint"] = caches["val"].manifest["data_fingerprint"]
    identity: dict[str, Any] = json.loads(json.dumps(fields | hashes))
    return identity


if __name__ == "__main__":
    run_command(RandomSettings, main, prog="python -m search.random", goes_on=True)
