"""Re-ranking (paper, section 4.2): the best cells of a search by proxy score, trained end to end: `python -m search.rerank`.

`--out` holds a folder for each cell and seed. While a cell is trained, that is a training of `search.train`, and goes on as
one does; when it is finished, `result.json` says what came of it, the network stays, the state of the training is deleted.
"""

import csv
import io
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fast.backbone import WeightsOrigin
from reference.cell import Cell
from reference.pyramid_pooling import PoolingVariant
from search.cells.space import canonical_form, load_cells
from search.cli import run_command
from search.errors import InputError
from search.features import resolve_device, write_json, write_text
from search.reports.rank_correlation import MIN_POINTS, RankCorrelation, rank_correlation, ties
from search.reports.scatter import Point, Scatter, write_scatters
from search.runs.study import Run, load_run, ranked
from search.runs.workers import Job, Outcome, Workers, open_workers, outcomes
from search.tasks.end_to_end import EndToEndResult, EndToEndTask
from search.train import RecipeSettings, TrainSettings, complete
from search.training.state import open_training

# Flags that are the run's where they are not given, and those that no longer fit once another data set or backbone is given.
_DATA = ("dataset", "data_dir", "train_split")
_BACKBONE = ("backbone", "weights", "weights_origin", "pretrained")
_HEAD = ("output_stride", "pooling", "branch_channels", "cache_dir")
_RENAMED = {"--workers": "--loading-processes"}  # flags of search.train that mean something else here


@dataclass(frozen=True, kw_only=True)
class RerankSettings(RecipeSettings):
    """Train the best cells of a search end to end, rank them again, and compare with their ranks on the proxy task."""

    run: Path
    """Folder of the search, such as runs/camvid."""
    top: int = 50
    """Number of cells, the best by proxy score."""
    compare: tuple[str, ...] = ("dpc", "aspp")
    """Cells to train beside them: aspp, dpc, psp, or paths of cell JSON files."""
    seeds: int = 1
    """Trainings of each cell; the k-th has the same crops for all cells."""
    workers: int = 1
    """Cells trained at a time; above 1 by Ray (install the extra `workers`), on CUDA with one GPU each."""
    dataset: str | None = None
    """Data set, as in search.train. Default: the run's, with its --data-dir and --train-split."""
    data_dir: Path | None = None
    """Folder of the data set. Default: the run's."""
    train_split: str | None = None
    """Split to train on. Default: the run's."""
    val_split: str = "val"
    """Split to score on."""
    backbone: str | None = None
    """Any timm model with feature maps. Default: the run's, with its weights."""
    weights: Path | None = None
    """Local file of the backbone's weights. Default: the run's."""
    weights_origin: WeightsOrigin | None = None
    """Where the weights were trained: timm or tensorflow. Default: the run's, or timm with other weights."""
    pretrained: bool = False
    """Let timm download its pretrained weights."""
    output_stride: int | None = None
    """Pixels per feature, 8 or 16. Default: the run's."""
    branch_channels: int | None = None
    """Filters of each branch and of the cell's output. Default: the run's."""
    pooling: PoolingVariant | None = None
    """Pyramid pooling: sliding_window or grid_cells. Default: the run's."""
    validate_every: int | None = None
    """Iterations between validations. Default: only after the last, which alone counts."""
    loading_processes: int = 2
    """Processes that load pictures, for each cell in training; 0 loads between the iterations."""
    seed: int = 0
    """Seed of everything: initial weights, order of the pictures, crops, dropout."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the GPU if there is one."""
    cache_dir: Path | None = None
    """Where the small backbone for shapes is kept. Default: the run's."""
    out: Path | None = None
    """Folder of the re-ranking. Default: rerank/ in the run's folder."""


@dataclass(frozen=True)
class Candidate:
    """A cell to train end to end: one of the search's best, or a known one, which has no rank."""

    name: str
    cell: Cell
    proxy_scores: tuple[float, ...]  # one per seed; none for a known cell that the run did not score
    proxy_rank: int | None


@dataclass(frozen=True)
class Reranked:
    """A candidate and what came of its trainings so far: `results` are those that count, `finished` is the number of all."""

    candidate: Candidate
    results: tuple[EndToEndResult, ...]
    failures: tuple[str, ...]
    finished: int
    folder: Path  # of the first seed's training
    final_rank: int | None = None

    @property
    def is_scored(self) -> bool:
        """A cell that failed with any seed is not: its mean would leave out its worst."""
        return bool(self.results) and not self.failures

    @property
    def scores(self) -> list[float]:
        return [result.mean_iou for result in self.results]

    @property
    def mean(self) -> float:
        return float(np.mean(self.scores)) if self.results else math.nan

    @property
    def std(self) -> float:
        return float(np.std(self.scores, ddof=1)) if len(self.results) > 1 else math.nan


def main(settings: RerankSettings) -> None:
    """Train what is not trained yet, then rank."""
    for field in ("top", "seeds", "workers"):
        if getattr(settings, field) < 1:
            raise InputError(f"--{field} must be at least 1, got {getattr(settings, field)}")
    run = load_run(settings.run)
    candidates = candidates_of(run, settings)
    directory = settings.out or settings.run / "rerank"
    training = train_settings(settings, run)

    def create_task() -> EndToEndTask:
        return EndToEndTask(training, directory, _RENAMED)

    task = create_task()
    workers = open_workers(create_task, settings.workers, training.device, training.iterations or 0)
    with open_training(directory, task.identity(), ["python", "-m", "search.rerank", *sys.argv[1:]]), workers as opened:
        try:
            _train(task, opened, candidates, settings)
        finally:  # also after Ctrl-C: what there is, is shown
            finish(directory, rank(task, candidates, settings), settings)


def candidates_of(run: Run, settings: RerankSettings) -> list[Candidate]:
    """The cells to compare with, then the best of the run by proxy score. Raises InputError if the run has no score."""
    best = ranked(run.trials)[: settings.top]
    if not best:
        raise InputError(f"{run.directory} has no cell with a score yet: run its search first")
    if len(best) < settings.top:
        print(f"{run.directory} has {len(best)} cells with a score, not {settings.top}: all are trained", file=sys.stderr)
    candidates = []
    for name, cell in load_cells(settings.compare).items():
        same = [r for r in run.baselines if r.name == name and canonical_form(r.cell) == canonical_form(cell)]
        candidates.append(Candidate(name, cell, tuple(record.result.mean_iou for record in same), None))
    for proxy_rank, record in enumerate(best, start=1):
        scores = (record.result.mean_iou,) if record.result else ()
        candidates.append(Candidate(f"trial {record.number}", record.cell, scores, proxy_rank))
    return candidates


def train_settings(settings: RerankSettings, run: Run) -> TrainSettings:
    """The settings of each training: what is given, else what the run was made with."""
    values = {field.name: getattr(settings, field.name) for field in fields(RecipeSettings)}
    flags = (*_DATA, *_BACKBONE, *_HEAD)
    given = {name: value for name in flags if (value := getattr(settings, name)) is not None and value is not False}
    inherited = [name for name in flags if name not in given]
    if "dataset" in given:
        inherited = [name for name in inherited if name not in _DATA]
    if given.keys() & {"backbone", "weights", "pretrained"}:
        inherited = [name for name in inherited if name == "backbone" or name not in _BACKBONE]
    known = run.settings | (run.features or {})
    values |= {name: known[name] for name in inherited if known.get(name) is not None} | given
    values |= {name: Path(values[name]) for name in ("data_dir", "weights", "cache_dir") if name in values}
    values |= {"val_split": settings.val_split, "workers": settings.loading_processes}
    values |= {"seed": settings.seed, "device": resolve_device(settings.device)}
    training = complete(TrainSettings(**values))
    return complete(TrainSettings(**values | {"validate_every": settings.validate_every or training.iterations}))


def _train(
    task: EndToEndTask, workers: Workers[EndToEndResult], candidates: list[Candidate], settings: RerankSettings
) -> None:
    """All that has no `result.json` yet; every cell once before any a second time, so that an early table is a whole one."""
    queue = {}
    for candidate, seed in _trainings(candidates, settings):
        folder = task.folder(candidate.cell, seed)  # one for equal cells of two names
        queue[folder] = Job(f"{candidate.name}, seed {seed[-1]}", candidate.cell, seed)
    total = len(queue)
    for folder in [folder for folder in queue if read_result(folder) is not None]:
        del queue[folder]
        _delete_state(folder)  # if the process ended just before it was
    with tqdm(total=total, initial=total - len(queue), desc="re-ranking", unit="cell") as bar:
        for outcome in outcomes(workers, queue.values()):
            _record(task, outcome)
            bar.update()


def _trainings(candidates: list[Candidate], settings: RerankSettings) -> Iterator[tuple[Candidate, tuple[int, int]]]:
    for k in range(settings.seeds):
        for candidate in candidates:
            yield candidate, (settings.seed, k)


def _record(task: EndToEndTask, outcome: Outcome[EndToEndResult]) -> None:
    folder = task.folder(outcome.job.cell, outcome.job.seed)
    if outcome.is_passing:  # its state stays
        tqdm.write(f"{outcome.job.key} failed: {outcome.failure}; the same command goes on with it", file=sys.stderr)
        return
    if outcome.result is None:
        tqdm.write(f"{outcome.job.key} failed: {outcome.failure}; delete {folder} to try it again", file=sys.stderr)
    else:
        tqdm.write(f"{outcome.job.key}: mIOU {100 * outcome.result.mean_iou:.2f} %", file=sys.stderr)
    result = asdict(outcome.result) if outcome.result else None
    write_json(folder / "result.json", {"result": result, "failure": outcome.failure})
    _delete_state(folder)


def _delete_state(folder: Path) -> None:
    """Optimiser and weights in training, and the best validation's weights: several times the network that is kept."""
    for name in ("state.pt", "best.safetensors"):
        (folder / name).unlink(missing_ok=True)


def read_result(folder: Path) -> EndToEndResult | str | None:
    """What came of a training: a result, the reason of its failure, or None before its end. Raises InputError."""
    path = folder / "result.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["result"] is None:
            return str(content["failure"])
        return EndToEndResult(**{**content["result"], "class_iou": tuple(content["result"]["class_iou"])})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}): delete the folder {folder} and run the same command again") from error


def rank(task: EndToEndTask, candidates: list[Candidate], settings: RerankSettings) -> list[Reranked]:
    """Best first, those without a score last; the cells of the search have ranks among themselves.

    While trainings are missing, of the cells that have a score only the seeds count that all of them have.
    """
    read = [
        [read_result(task.folder(candidate.cell, seed)) for _, seed in _trainings([candidate], settings)]
        for candidate in candidates
    ]
    begun = [of_cell for of_cell in read if any(of_cell) and not any(isinstance(outcome, str) for outcome in of_cell)]
    shared = [k for k in range(settings.seeds) if all(of_cell[k] for of_cell in begun)] or range(settings.seeds)
    rows = []
    for candidate, of_cell in zip(candidates, read, strict=True):
        failures = tuple(outcome for outcome in of_cell if isinstance(outcome, str))
        counted = of_cell if failures else [of_cell[k] for k in shared]
        results = tuple(outcome for outcome in counted if isinstance(outcome, EndToEndResult))
        finished = sum(outcome is not None for outcome in of_cell)
        rows.append(Reranked(candidate, results, failures, finished, task.folder(candidate.cell, (settings.seed, 0))))
    rows.sort(key=lambda row: -row.mean if row.is_scored else math.inf)
    found = [row.candidate.name for row in rows if row.candidate.proxy_rank is not None and row.is_scored]
    return [replace(row, final_rank=found.index(name) + 1) if (name := row.candidate.name) in found else row for row in rows]


def correlation(rows: list[Reranked]) -> RankCorrelation | None:
    """Spearman's ρ of proxy and final score over the search's cells, None below three. The known ones were not its choice."""
    found = [row for row in rows if row.final_rank is not None]
    if len(found) < MIN_POINTS:
        return None
    return rank_correlation([row.candidate.proxy_scores[0] for row in found], [row.mean for row in found])


def finish(directory: Path, rows: list[Reranked], settings: RerankSettings) -> None:
    """Write the ranks, the picture and the best cell; print the table."""
    found = [row for row in rows if row.final_rank is not None]
    if not found:
        failed = sum(len(row.failures) for row in rows)
        print(f"no cell of the search is trained yet ({failed} trainings failed)", file=sys.stderr)
        return
    rho = correlation(rows)
    write_text(directory / "best_cell.json", found[0].candidate.cell.to_json())
    _write_csv(directory / "ranks.csv", rows)
    _draw(directory / "scatter.png", rows, rho)
    print(_table(rows))
    done, wanted = sum(row.finished for row in rows), len(rows) * settings.seeds
    if done < wanted:
        print(f"\n{done} of {wanted} trainings are done; the same command goes on")
    if warning := ties([row.mean for row in found]):
        print(f"\nwarning: {warning}")
    if rho is None:
        print(f"\nSpearman's rho of proxy and final score takes {MIN_POINTS} cells of the search; here are {len(found)}")
    else:
        print(f"\nproxy and final score, {rho.count} cells: Spearman's {rho}, with its 95 % bootstrap interval")
    print(f"\nranks: {directory / 'ranks.csv'}\npicture: {directory / 'scatter.png'}")
    print(f"best cell: {directory / 'best_cell.json'}, {found[0].candidate.name}")
    print(f"its network: {found[0].folder / 'last.safetensors'}")


def _table(rows: list[Reranked]) -> str:
    width = max(len(row.candidate.name) for row in rows)
    lines = [
        f"{'':{width}} {'proxy':>12} {'final':>20}",
        f"{'':{width}} {'rank':>5} {'mIOU %':>6} {'rank':>5} {'mIOU %':>14} {'params':>9} {'multiply-adds':>13} "
        f"{'seconds':>8}  cell",
    ]
    for row in rows:
        candidate = row.candidate
        proxy = f"{100 * np.mean(candidate.proxy_scores):.2f}" if candidate.proxy_scores else "–"
        final, cost = "failed" if row.failures else "–", f"{'–':>9} {'–':>13} {'–':>8}"
        if row.is_scored:
            spread = f" ± {100 * row.std:.2f}" if len(row.results) > 1 else ""
            final, first = f"{100 * row.mean:.2f}{spread}", row.results[0]
            cost = f"{first.parameters:>9,} {first.multiply_adds / 1e9:>12.3f}B {first.seconds:>8.1f}"
        lines.append(
            f"{candidate.name:{width}} {candidate.proxy_rank or '–':>5} {proxy:>6} {row.final_rank or '–':>5} {final:>14} "
            f"{cost}  {candidate.cell}"
        )
    return "\n".join(lines)


def _write_csv(path: Path, rows: list[Reranked]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    final_columns = (
        "final_rank",
        "final_mean_iou",
        "final_std",
        "seeds",
        "failures",
        "parameters",
        "multiply_adds",
        "seconds",
    )
    writer.writerow(["name", "proxy_rank", "proxy_mean_iou", *final_columns, "folder", "cell"])
    for row in rows:
        candidate, first = row.candidate, row.results[0] if row.results else None
        proxy = float(np.mean(candidate.proxy_scores)) if candidate.proxy_scores else None
        final = [row.mean if row.results else None, row.std if len(row.results) > 1 else None, len(row.results)]
        cost: list[Any] = [first.parameters, first.multiply_adds, first.seconds] if first else [None] * 3
        cell = json.dumps(json.loads(candidate.cell.to_json()))
        ranks = [candidate.proxy_rank, proxy, row.final_rank]
        writer.writerow([candidate.name, *ranks, *final, "; ".join(row.failures), *cost, row.folder.name, cell])
    write_text(path, text.getvalue())


def _draw(path: Path, rows: list[Reranked], rho: RankCorrelation | None) -> None:
    """Figure 4b: a dot for each cell, the known ones marked, ρ of the others above."""
    points = [
        Point(row.candidate.proxy_scores, row.scores, None if row.candidate.proxy_rank else row.candidate.name)
        for row in rows
        if row.candidate.proxy_scores and row.is_scored
    ]
    write_scatters(path, [Scatter(points, "proxy", "end to end", title=f"cells of the search: {rho}" if rho else "")])


if __name__ == "__main__":
    run_command(RerankSettings, main, prog="python -m search.rerank", goes_on=True)
