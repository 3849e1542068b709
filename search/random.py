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

from dataclasses import dataclass, replace
from typing import Any

from search.backbones import completed_backbone
from search.backbones.shapes import SHAPES_BACKBONES
from search.cells.space import load_cells
from search.cli import Flat, print_defaults, print_next, run_command, spelled, this_command, to_type, uses_of_run
from search.datasets.weights import completed_loss
from search.errors import InputError
from search.folder import Folder
from search.pipeline import SearchSettings, run_search
from search.reports.in_python import in_python
from search.runs.status import status_lines
from search.runs.study import RunSettings, best_head, load_run, require_storage
from search.settings import (
    BackboneSettings,
    DataSettings,
    FeatureSettings,
    HeadSettings,
    LossSettings,
    MachineSettings,
    ProxySettings,
    changes_no_score,
)
from search.tasks.feature_cache import WEIGHTS, FeatureCache, open_for_features, prepare_caches

_PROG = spelled("random")
_RENAMED = {"--cells": "--trials", "--name": "--out FOLDER", "--runs-dir": "--out FOLDER"}


@dataclass(frozen=True, kw_only=True)
class RandomSettings(SearchSettings):
    """Search dense prediction cells on the proxy task, beside a linear probe, an MLP, ASPP, PSP and the published cell."""

    out: Path | None = changes_no_score(None)
    """Folder of the run. None: runs/ and the data set's name."""
    status: bool = changes_no_score(False)
    """Print how far the search in the folder is, or of a database server the one of its name, and end."""
    proxy: Flat[ProxySettings] = ProxySettings()
    head: Flat[HeadSettings] = HeadSettings()
    loss: Flat[LossSettings] = LossSettings()
    data: Flat[DataSettings] = DataSettings()
    backbone: Flat[BackboneSettings] = BackboneSettings()
    features: Flat[FeatureSettings] = FeatureSettings()
    machine: Flat[MachineSettings] = MachineSettings()


def main(settings: RandomSettings) -> None:
    """Search, compare, report, and say how the best head is used; exit with code 1 if no cell has a score."""
    if settings.status:
        settings.check_storage()
        print("\n".join(status_lines(settings.out or Path("runs") / settings.data.dataset, settings.storage)))
        return
    for group in (settings.proxy, settings.head, settings.loss, settings.backbone, settings):
        group.check()
    if settings.proxy.iterations is not None:
        settings.with_rungs(settings.proxy.iterations)  # refuses those that do not fit
    require_storage(settings.storage)  # before hours of features
    load_cells(settings.compare, len(completed_backbone(settings.backbone).layers))  # refuses those of other layers
    data, machine, command = settings.data, settings.machine, this_command(_PROG)
    of_features = data, settings.backbone, settings.features, machine
    train, val = open_for_features(*of_features)
    loss = completed_loss(settings.loss, train, machine.cache_dir)
    caches = prepare_caches((train, val), *of_features, command, settings.proxy.crop_size)
    settings, typed = completed_for(caches["train"], settings), settings
    chosen = (typed, settings), (typed.proxy, settings.proxy), (typed.head, settings.head)
    origin = caches["train"].identity
    directory = settings.out or Path("runs") / origin["dataset"]
    _refuse_other_backbone(directory, origin, settings.backbone.weights)
    settings = settings.with_lag(directory, machine.device, settings.proxy.steps)
    groups = settings, data, settings.backbone, settings.features, settings.head, loss, settings.proxy
    wrote = run_search(
        directory,
        settings,
        settings.proxy,
        RunSettings(data, settings.backbone, settings.features, settings.head, settings.machine, loss),
        caches,
        {"train": train, "val": val},
        groups=groups,
        command=command,
        on_begin=lambda: print_defaults(caches["train"].pictures, *chosen),
    )
    if not wrote:
        by_hand = to_type("report", "--run", str(directory))
        print(f"nothing is left to do; the process that holds {directory} writes the report (or {by_hand})", file=sys.stderr)
        return
    if not (directory / "best_cells" / "rank_01.json").exists():  # every cell has failed, as was said
        sys.exit(1)
    print(f"\nthe best head behind its backbone, in Python:\n\n{in_python(load_run(directory))}\n")
    of_search = data, settings.backbone, settings.head, settings.loss, settings.machine, settings.proxy
    print_next(*uses_of_run(best_head(directory), *of_search, of_two=settings.cost_kind is not None))


def completed_for(features: FeatureCache, settings: RandomSettings) -> RandomSettings:
    """The settings with what follows from the data, and from a network whose file is given as `weights`."""
    dataset = settings.data.dataset  # as it was given: shapes for both of its tasks
    proxy = settings.proxy.completed(features.pictures._replace(dataset=dataset))
    return replace(
        settings.completed(dataset).with_rungs(proxy.steps),
        proxy=proxy,
        head=settings.head.completed(dataset),
        backbone=completed_backbone(settings.backbone),
    )


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


if __name__ == "__main__":
    run_command(RandomSettings, main, prog=_PROG, goes_on=True, renamed=_RENAMED)
