"""Search cells on the proxy task (paper, section 3), the main command of this project: `python -m search.random`.

Without flags it generates its own data, trains a small backbone on them and searches a dozen cells in a few minutes. The same
command continues an interrupted run, and adds cells to a finished one if --trials is raised.

Run this file as a module from the repository's root: inside this folder, its name would hide Python's own `random`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fast.checkpoint import save_head
from fast.segmentation import SegmentationHead
from reference.cell import NUM_BRANCHES
from search.backbones import completed_backbone
from search.backbones.shapes import SHAPES_BACKBONES
from search.cells.sampler import LAG, create_sampler
from search.cells.space import SearchSpace, load_cells
from search.cli import Flat, print_defaults, print_next, run_command, this_command, uses_of_run
from search.devices import resolve_device
from search.errors import InputError
from search.folder import Folder
from search.reports.run_files import finish_run
from search.runs.search import HEADS, Search, SearchPlan
from search.runs.study import RunSettings, open_run
from search.runs.workers import open_workers
from search.settings import (
    SHAPES,
    BackboneSettings,
    DataSettings,
    FeatureSettings,
    HeadSettings,
    MachineSettings,
    ProxySettings,
    changes_no_score,
    given,
    known,
    require,
    scored,
)
from search.tasks.feature_cache import MEAN, STD, WEIGHTS, FeatureCache, facts_of, open_cache, prepare_caches
from search.tasks.proxy import ProxyTask, crop_in_features

KNOWN_CELLS = ("aspp", "dpc")
_PROG = "python -m search.random"
_RENAMED = {"--cells": "--trials", "--name": "--out FOLDER", "--runs-dir": "--out FOLDER"}


@dataclass(frozen=True, kw_only=True)
class RandomSettings:
    """Search dense prediction cells on the proxy task, beside ASPP and the published cell."""

    out: Path | None = changes_no_score(None)
    """Folder of the run. None: runs/ and the data set's name."""
    storage: str | None = None
    """Database URL of the study, such as postgresql://host/name. None: a SQLite file in the run's folder."""
    trials: int | None = changes_no_score(None)
    """Number of cells to try in all, those of earlier runs of this command included. None: 100; 12 for shapes."""
    branches: int = NUM_BRANCHES
    """Branches per cell."""
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
    proxy: Flat[ProxySettings] = ProxySettings()
    head: Flat[HeadSettings] = HeadSettings()
    data: Flat[DataSettings] = DataSettings()
    backbone: Flat[BackboneSettings] = BackboneSettings()
    features: Flat[FeatureSettings] = FeatureSettings()
    machine: Flat[MachineSettings] = MachineSettings()

    def completed(self, features: FeatureCache) -> "RandomSettings":
        """With what follows from the data, and from a network whose file is given as `weights`."""
        pictures = features.pictures._replace(dataset=self.data.dataset)  # as it was given: shapes for both of its tasks
        return replace(
            self,
            trials=given(self.trials, 12 if self.data.dataset == SHAPES else 100),
            proxy=self.proxy.completed(pictures),
            head=self.head.completed(self.data.dataset),
            backbone=completed_backbone(self.backbone),
        )


def main(settings: RandomSettings) -> None:
    """Search, compare, report."""
    _check(settings)
    device, space = resolve_device(settings.machine.device), SearchSpace(settings.branches)
    sampler = create_sampler(settings.sampler, space, settings.seed, lag=settings.lag)
    compare, command = load_cells(settings.compare), this_command(_PROG)
    caches = prepare_caches(settings.data, settings.backbone, settings.features, settings.machine, command)
    settings, typed = settings.completed(caches["train"]), settings
    crop_in_features(settings.proxy, caches["train"])  # refuses a wrong crop size before the run begins
    origin, task = caches["train"].identity, caches["train"].task
    directory = settings.out or Path("runs") / origin["dataset"]
    to_open = [(caches[role].directory, caches[role].identity) for role in ("train", "val")]  # workers copy no arrays

    def create_task() -> ProxyTask:
        train, val = (open_cache(*each) for each in to_open)
        return ProxyTask(train, val, settings.proxy, settings.head, device)

    def keep_head(name: str, trained: SegmentationHead) -> None:
        backbone = {key: origin[key] for key in ("backbone", "weights_origin", "output_stride", "dataset")}
        backbone |= {"weights_hash": origin[WEIGHTS], "mean": origin[MEAN], "std": origin[STD]}
        path = directory / HEADS / f"{name}.safetensors"
        save_head(path, trained, task=task.describe(), backbone=backbone)

    _refuse_other_backbone(directory, origin, settings.backbone.weights)
    run = open_run(
        directory,
        _identity(settings, caches),
        sampler,
        storage=settings.storage,
        command=command,
        task=task,
        settings=RunSettings(settings.data, settings.backbone, settings.features, settings.head, settings.machine),
    )
    with (
        run as study,
        open_workers(
            create_task,
            settings.workers,
            settings.machine.device,
            settings.proxy.steps,
            in_turns=settings.cells_per_gpu,
        ) as workers,
    ):
        timed_on = None
        plan = SearchPlan(known(settings.trials), compare, settings.comparison_seeds, settings.seed)
        groups = ((typed, settings), (typed.proxy, settings.proxy), (typed.head, settings.head))
        print_defaults(caches["train"].pictures, *groups)
        try:
            Search(study, workers, space, plan, task.score, keep_head).run()
            timed_on = device
        finally:  # also after Ctrl-C: report what there is, without latencies, which would take seconds
            finish_run(directory, caches["val"], settings.data, plan.compare, timed_on)
    _print_next(settings, directory)


def _refuse_other_backbone(directory: Path, origin: dict[str, Any], weights: Path | None) -> None:
    """Say what helps where a small backbone was trained anew, which is what no value of any flag brings back."""
    before = Folder(directory).description()
    if before is None or weights is not None or origin["backbone"] not in SHAPES_BACKBONES:
        return
    if before["identity"].get(WEIGHTS) != origin[WEIGHTS]:
        raise InputError(
            f"run {directory} was begun with another training of {origin['backbone']}, whose weights depend on machine and "
            "threads: give the `cache_dir` that it was trained in, another `out`, or delete that folder"
        )


def _print_next(settings: RandomSettings, directory: Path) -> None:
    best = directory / "best_cells" / "rank_01.json"
    if best.exists():  # unless every cell has failed
        print_next(*uses_of_run(directory, settings.data, settings.backbone, settings.head, settings.machine))


def _check(settings: RandomSettings) -> None:
    """Refuse numbers that cannot work, before anything is written."""
    settings.proxy.check()
    settings.head.check()
    settings.backbone.check()
    require("trials", settings.trials, given(settings.trials, 1) >= 1, "at least 1")
    require("branches", settings.branches, settings.branches >= 1, "at least 1")
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


def _identity(settings: RandomSettings, caches: dict[str, FeatureCache]) -> dict[str, Any]:
    """The settings that all scores of a run depend on: other values are refused in the same folder."""
    groups = (settings, settings.data, settings.backbone, settings.features, settings.head, settings.proxy)
    return scored(*groups) | facts_of(caches)


if __name__ == "__main__":
    run_command(RandomSettings, main, prog=_PROG, goes_on=True, renamed=_RENAMED)
