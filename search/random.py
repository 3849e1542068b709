"""Search cells on the proxy task (paper, section 3), the main command of this project: `python -m search.random`.

Without flags it generates its own data, trains a small backbone on them and searches a dozen cells in a few minutes. The same
command continues an interrupted run, and adds cells to a finished one if --trials is raised.

Run this file as a module from the repository's root: inside this folder, its name would hide Python's own `random`.
"""

import sys
from pathlib import Path

if not __package__:  # started as a file, or taken for Python's own, by Python itself: the folder of a started file comes first
    _started = Path(sys.argv[0]).resolve()
    _is_here = _started.is_file() and _started.parent == Path(__file__).resolve().parent
    _command = _started.stem if _is_here else "random"
    sys.exit(f"error: start it in the repository's root by python -m search.{_command}: here, random.py hides Python's own")

from dataclasses import dataclass
from typing import Any

from fast.checkpoint import save_head
from fast.segmentation import SegmentationHead
from reference.cell import GRID_SIZES, NUM_BRANCHES, RATES
from search.cells.sampler import LAG, create_sampler
from search.cells.space import ASCENDING, SearchSpace, is_ascending, load_cells
from search.cli import Flat, run_command, spelled, this_command
from search.devices import resolve_device
from search.errors import InputError
from search.reports.run_files import finish_run
from search.runs.search import Search, SearchPlan
from search.runs.study import RunSettings, open_run
from search.runs.workers import open_workers
from search.settings import (
    BackboneSettings,
    DataSettings,
    FeatureSettings,
    HeadSettings,
    MachineSettings,
    ProxySettings,
    changes_no_score,
    declared,
    require,
    scored,
)
from search.tasks.feature_cache import MEAN, STD, WEIGHTS, FeatureCache, facts_of, open_cache, prepare_caches
from search.tasks.proxy import ProxyTask, feature_maps

KNOWN_CELLS = ("aspp", "dpc")
_PROG = spelled("random")
_RENAMED = {"--cells": "--trials", "--name": "--out FOLDER", "--runs-dir": "--out FOLDER"}


@dataclass(frozen=True, kw_only=True)
class RandomSettings:
    """Search dense prediction cells on the proxy task, beside ASPP and the published cell."""

    out: Path | None = changes_no_score(None)
    """Folder of the run. None: runs/ and the data set's name."""
    storage: str | None = None
    """Database URL of the study, such as postgresql://host/name. None: a SQLite file in the run's folder."""
    trials: int = changes_no_score(12)
    """Number of cells to try in all, those of earlier runs of this command included."""
    branches: int = NUM_BRANCHES
    """Branches per cell."""
    rates: tuple[int, ...] = RATES
    """Rates that atrous convolutions may have in height and width, as at output stride 16. None given: no such ones."""
    grids: tuple[int, ...] = GRID_SIZES
    """Grids that pyramid poolings may have in height and width. None given: no poolings."""
    sampler: str = "paper"
    """How cells are proposed: paper (uniform, and near the best so far), random, tpe or evolution."""
    lag: int = LAG
    """The paper's sampler ignores this many latest results, so its cells are the same with up to lag + 1 workers."""
    seed: int = 0
    """Seed of everything: the cells, their initial weights, crops and dropout."""
    compare: tuple[str, ...] = changes_no_score(KNOWN_CELLS)
    """Cells to score beside the search: aspp, dpc, psp, or paths of cell JSON files."""
    comparison_seeds: int = changes_no_score(1)
    """Seeds with which these and the best cell found are scored."""
    workers: int = changes_no_score(1)
    """Cells evaluated at a time; above 1 by Ray (install the extra `workers`), on CUDA with one GPU each."""
    cells_per_gpu: int = changes_no_score(1)
    """Cells trained at a time on one GPU, which one alone does not fill; scores are the same. It gains nothing on a CPU."""
    proxy: Flat[ProxySettings] = ProxySettings(iterations=80, learning_rate=0.2)
    head: Flat[HeadSettings] = HeadSettings(branch_channels=64)
    data: Flat[DataSettings] = DataSettings()
    backbone: Flat[BackboneSettings] = BackboneSettings()
    features: Flat[FeatureSettings] = FeatureSettings()
    machine: Flat[MachineSettings] = MachineSettings()


def main(settings: RandomSettings) -> None:
    """Search, compare, report."""
    _check(settings)
    device = resolve_device(settings.machine.device)
    head = settings.head.completed(settings.data.dataset)
    plan = SearchPlan(settings.trials, load_cells(settings.compare), settings.comparison_seeds, settings.seed)
    command = this_command(_PROG)
    caches = prepare_caches(settings.data, settings.backbone, settings.features, settings.machine, command)
    maps = feature_maps(settings.proxy, head, **caches)  # refuses a wrong crop size before the run begins
    space = SearchSpace(settings.branches, settings.rates, settings.grids, maps)
    origin, task = caches["train"].identity, caches["train"].task
    directory = settings.out or Path("runs") / origin["dataset"]
    to_open = [(caches[role].directory, caches[role].identity) for role in ("train", "val")]  # workers copy no arrays

    def create_task() -> ProxyTask:
        train, val = (open_cache(*each) for each in to_open)
        return ProxyTask(train, val, settings.proxy, head, device)

    def keep_head(name: str, trained: SegmentationHead) -> None:
        backbone = {key: origin[key] for key in ("backbone", "weights_origin", "output_stride", "dataset")}
        backbone |= {"weights_hash": origin[WEIGHTS], "mean": origin[MEAN], "std": origin[STD]}
        path = directory / "heads" / f"{name}.safetensors"
        save_head(path, trained, task=task.describe(), backbone=backbone)

    run = open_run(
        directory,
        _identity(settings, head, caches),
        create_sampler(settings.sampler, space, settings.seed, lag=settings.lag),
        storage=settings.storage,
        command=command,
        task=task,
        settings=RunSettings(settings.data, settings.backbone, settings.features, head, settings.machine),
        space=space,
        defaults=declared(*map(type, _groups(settings, head))),
    )
    with (
        run as study,
        open_workers(
            create_task,
            settings.workers,
            settings.machine.device,
            settings.proxy.iterations,
            in_turns=settings.cells_per_gpu,
        ) as workers,
    ):
        print(f"search space: {'; '.join(space.describe())}", file=sys.stderr)
        timed_on = None
        try:
            Search(study, workers, space, plan, task.score, keep_head).run()
            timed_on = device
        finally:  # also after Ctrl-C: report what there is, without latencies, which would take seconds
            finish_run(directory, caches["val"], settings.data, plan.compare, timed_on)


def _check(settings: RandomSettings) -> None:
    """Refuse numbers that cannot work, before anything is written."""
    settings.proxy.check()
    settings.head.check()
    settings.backbone.check()
    create_sampler(settings.sampler, SearchSpace(), settings.seed)  # refuses what it would only later
    require("trials", settings.trials, settings.trials >= 1, "at least 1")
    require("branches", settings.branches, settings.branches >= 1, "at least 1")
    require("rates", _spaced(settings.rates), is_ascending(settings.rates), ASCENDING)
    require("grids", _spaced(settings.grids), is_ascending(settings.grids), ASCENDING)
    require("comparison_seeds", settings.comparison_seeds, settings.comparison_seeds >= 1, "at least 1")
    require("workers", settings.workers, settings.workers >= 1, "at least 1")
    require("cells_per_gpu", settings.cells_per_gpu, settings.cells_per_gpu >= 1, "at least 1")
    require("lag", settings.lag, settings.lag >= 0, "at least 0")
    if settings.workers > 1 and settings.cells_per_gpu > 1:
        raise InputError(
            f"`cells_per_gpu` {settings.cells_per_gpu} needs `workers` 1: with more, each trains one cell at a time"
        )
    for field in ("workers", "cells_per_gpu"):
        count = getattr(settings, field)
        if settings.sampler == "paper" and count > settings.lag + 1:
            raise InputError(
                f"`{field}` {count} needs `lag` {count - 1} or more: the paper's sampler waits for all but so many cells"
            )


def _identity(settings: RandomSettings, head: HeadSettings, caches: dict[str, FeatureCache]) -> dict[str, Any]:
    """The settings that all scores of a run depend on: other values are refused in the same folder."""
    return scored(*_groups(settings, head)) | facts_of(caches)


def _groups(settings: RandomSettings, head: HeadSettings) -> tuple[Any, ...]:
    return settings, settings.data, settings.backbone, settings.features, head, settings.proxy


def _spaced(numbers: tuple[int, ...]) -> str:
    return " ".join(map(str, numbers))


if __name__ == "__main__":
    run_command(RandomSettings, main, prog=_PROG, goes_on=True, renamed=_RENAMED)
