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

from search.cli import Flat, run_command, spelled, this_command
from search.datasets import open_dataset
from search.pipeline import QUICK_PROXY, SMALL_HEAD, SearchSettings, run_search
from search.runs.study import RunSettings
from search.settings import (
    BackboneSettings,
    DataSettings,
    FeatureSettings,
    HeadSettings,
    MachineSettings,
    ProxySettings,
    changes_no_score,
    declared,
    scored,
)
from search.tasks.feature_cache import FeatureCache, facts_of, prepare_caches

_PROG = spelled("random")
_RENAMED = {"--cells": "--trials", "--name": "--out FOLDER", "--runs-dir": "--out FOLDER"}


@dataclass(frozen=True, kw_only=True)
class RandomSettings(SearchSettings):
    """Search dense prediction cells on the proxy task, beside ASPP and the published cell."""

    out: Path | None = changes_no_score(None)
    """Folder of the run. None: runs/ and the data set's name."""
    proxy: Flat[ProxySettings] = QUICK_PROXY
    head: Flat[HeadSettings] = SMALL_HEAD
    data: Flat[DataSettings] = DataSettings()
    backbone: Flat[BackboneSettings] = BackboneSettings()
    features: Flat[FeatureSettings] = FeatureSettings()
    machine: Flat[MachineSettings] = MachineSettings()


def main(settings: RandomSettings) -> None:
    """Search, compare, report."""
    for group in (settings.proxy, settings.head, settings.backbone, settings):
        group.check()
    data, backbone, features, machine = settings.data, settings.backbone, settings.features, settings.machine
    head, command = settings.head.completed(data.dataset), this_command(_PROG)
    caches = prepare_caches(data, backbone, features, machine, command)
    directory = settings.out or Path("runs") / caches["train"].identity["dataset"]
    run_search(
        directory,
        settings,
        settings.proxy,
        RunSettings(data, backbone, features, head, machine),
        caches,
        open_dataset(data.dataset, data.val_split, data.data_dir, data.task),
        identity=_identity(settings, head, caches),
        defaults=declared(*map(type, _groups(settings, head))),
        command=command,
    )


def _identity(settings: RandomSettings, head: HeadSettings, caches: dict[str, FeatureCache]) -> dict[str, Any]:
    """The settings that all scores of a run depend on: other values are refused in the same folder."""
    return scored(*_groups(settings, head)) | facts_of(caches)


def _groups(settings: RandomSettings, head: HeadSettings) -> tuple[Any, ...]:
    return settings, settings.data, settings.backbone, settings.features, head, settings.proxy


if __name__ == "__main__":
    run_command(RandomSettings, main, prog=_PROG, goes_on=True, renamed=_RENAMED)
