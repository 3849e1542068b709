"""How far can the proxy task be trusted (paper, section 4.1)? A small space, scored exhaustively: `python -m search.fidelity`.

Every cell of the space is scored under several protocols, and Spearman's ρ says how alike two protocols order the cells:

    proxy         small backbone, cached features, short training: what a search uses
    long          the same, trained longer
    large         a larger backbone, cached, short
    end_to_end    the small backbone, trained together with the cell

The paper has a space of 31 cells; as far as we know it is nowhere listed. Ours are the 31 = 2⁵ − 1 non-empty choices of ASPP's
five branches, all reading the backbone: 1×1, rates 6, 12 and 18, image pooling. That is a whole family, not a selection, from
a plain 1×1 to ASPP itself, and it asks what one wants to know of a branch: what is it worth beside those?

`runs/fidelity/<name>/` keeps each score in a file of its own, written when its training ends. Whatever ends the process, the
same command goes on; more protocols or seeds add to what is there. Each training has its own random numbers, so
agreement never comes from equal initial weights or crops.
"""

import json
import math
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain, combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

from filelock import FileLock, Timeout
from tqdm import tqdm

from fast.backbone import WeightsOrigin
from reference.cell import Cell
from search.backbones.shapes import WIDE_BACKBONE
from search.cells.space import canonical_form, load_cell
from search.cli import differences, flags_called, run_command
from search.datasets import open_dataset
from search.errors import InputError
from search.features import FeatureSettings, open_cache, padded_size, prepare_caches, resolve_device, write_json
from search.reports.fidelity import Score, load_scores, score_path, write_report
from search.runs.workers import Job, Outcome, Task, open_workers, outcomes
from search.tasks.end_to_end import EndToEndTask, training_folder
from search.tasks.proxy import ProxySettings, ProxyTask, crop_in_features
from search.train import TrainSettings, complete

ProtocolName = Literal["proxy", "long", "large", "end_to_end"]
PROTOCOLS: tuple[ProtocolName, ...] = ("proxy", "long", "large", "end_to_end")

# What scores depend on under another name than the flag behind it, and settings that change no score.
_FLAGS = {
    "weights_hash": "--weights",
    "initial_weights": "--weights",
    "data_fingerprint": "--data-dir (training)",
    "val_fingerprint": "--data-dir (validation)",
}
_DERIVED = {"validate_every"}  # of the iterations
_END_TO_END = ("iterations", "batch_size", "learning_rate", "min_scale", "max_scale")  # settings of its own
_SHARED_WITH_TRAINING = (
    *(
        "dataset",
        "data_dir",
        "train_split",
        "backbone",
        "weights",
        "weights_origin",
        "pretrained",
        "output_stride",
        "cache_dir",
    ),
    *("branch_channels", "pooling", "dropout", "crop_size", "momentum", "weight_decay", "statistics_batches", "seed"),
)


@dataclass(frozen=True, kw_only=True)
class FidelitySettings(FeatureSettings, ProxySettings):
    """Score a space of 31 cells under several protocols, and say how alike these order them."""

    name: str | None = None
    """Name of the run, its folder in fidelity/ of --runs-dir. Default: the data set's name."""
    runs_dir: Path = Path("runs")
    """Folder of the runs."""
    protocols: tuple[ProtocolName, ...] = PROTOCOLS
    """What to compare: proxy, long, large, end_to_end."""
    seeds: int = 2
    """Trainings of each cell under each protocol; from 2 on they tell how well a protocol agrees with itself."""
    iterations: int = 40
    """Training steps per cell of proxy and large. The paper: 30,000."""
    learning_rate: float = 0.2
    """Initial learning rate on cached features; it falls to 0 by the power 0.9 of the remaining share. The paper: 0.01."""
    branch_channels: int = 64
    """Filters of each branch and of the cell's output. The paper: 256."""
    long_iterations: int = 120
    """Training steps per cell of long."""
    large_backbone: str | None = None
    """The backbone of large, any timm model. Default: a wider one trained on the spot for shapes, xception65 for the rest."""
    large_weights: Path | None = None
    """Local file of its weights."""
    large_weights_origin: WeightsOrigin = "timm"
    """Where these were trained, as --weights-origin."""
    large_pretrained: bool = False
    """Let timm download its pretrained weights for it."""
    end_to_end_iterations: int = 50
    """Training steps per network of end_to_end. The paper: 90,000."""
    end_to_end_batch_size: int = 4
    """Crops per step there. The paper: 16."""
    end_to_end_learning_rate: float = 0.1
    """Initial learning rate there. The paper: 0.01."""
    end_to_end_min_scale: float | None = None
    """Smallest random scale of a training picture there. Default: 0.5; 1 for shapes."""
    end_to_end_max_scale: float | None = None
    """Largest random scale there. Default: 2; 1 for shapes."""
    loading_processes: int = 2
    """Processes that load pictures, for each network in training; 0 loads between the steps."""
    workers: int = 1
    """Cells scored at a time; above 1 by Ray (install the extra `workers`), on CUDA with one GPU each."""
    seed: int = 0
    """Seed of everything: initial weights, crops, dropout."""


@dataclass(frozen=True)
class Protocol:
    """A way to score cells, ready to be used. `identity` is what its scores depend on, by the flags that say so."""

    name: ProtocolName
    create_task: Callable[[], Task[Any]]
    iterations: int
    identity: dict[str, Any]


class TrainingKey(NamedTuple):
    """One cell's training; in print as its name."""

    protocol: ProtocolName
    cell_name: str
    seed: int

    def __str__(self) -> str:
        return f"{self.protocol}, {self.cell_name}, seed {self.seed}"


def fidelity_cells() -> dict[str, Cell]:
    """The space, by name: all non-empty choices of ASPP's branches, in canonical form, small ones first.

    >>> cells = fidelity_cells()
    >>> len(cells), len(set(cells.values()))
    (31, 31)
    >>> print(cells["1x1+r6"])
    conv1x1(F), sep3x3 6x6(F)
    """
    branches = list(zip(("1x1", "r6", "r12", "r18", "pool"), load_cell("aspp").branches, strict=True))
    choices = chain.from_iterable(combinations(branches, size) for size in range(1, len(branches) + 1))
    return {"+".join(n for n, _ in choice): canonical_form(Cell(tuple(b for _, b in choice))) for choice in choices}


def main(settings: FidelitySettings) -> None:
    """Score what is not scored yet; say how the protocols agree."""
    _check(settings)
    directory = settings.runs_dir / "fidelity" / (settings.name or Path(settings.dataset).stem)
    protocols = prepare_protocols(settings, directory)
    with _hold(directory, protocols):
        try:
            _run(settings, protocols, directory)
        finally:  # also after Ctrl-C: what there is, is shown
            scores = load_scores(directory, PROTOCOLS, list(fidelity_cells()))  # of earlier commands too
            scored = {score.protocol for score in scores}
            shown = [protocol for protocol in PROTOCOLS if protocol in scored or protocol in settings.protocols]
            print(write_report(directory, scores, shown, _command()))


def prepare_protocols(settings: FidelitySettings, directory: Path) -> list[Protocol]:
    """What `--protocols` names, with caches computed, so that whatever cannot work is refused before the first training."""
    device = resolve_device(settings.device)
    protocols = []
    if {"proxy", "long"} & set(settings.protocols):
        caches = _cache_directories(settings)
        if "proxy" in settings.protocols:
            protocols.append(_cached("proxy", settings, caches, device, iterations="--iterations"))
        if "long" in settings.protocols:
            longer = replace(settings, iterations=settings.long_iterations)
            protocols.append(_cached("long", longer, caches, device, iterations="--long-iterations"))
    if "large" in settings.protocols:
        large = _large(settings)
        flags = ("backbone", "weights", "weights-origin", "pretrained")
        with flags_called({f"--{flag}": f"--large-{flag}" for flag in flags}):
            protocols.append(_cached("large", large, _cache_directories(large), device, iterations="--iterations"))
    if "end_to_end" in settings.protocols:
        protocols.append(_end_to_end(settings, _trainings(directory), device))
    return protocols


def _large(settings: FidelitySettings) -> FidelitySettings:
    """The settings of the large backbone as those of the only one."""
    return replace(
        settings,
        backbone=settings.large_backbone or (WIDE_BACKBONE if settings.dataset == "shapes" else "xception65"),
        weights=settings.large_weights,
        weights_origin=settings.large_weights_origin,
        pretrained=settings.large_pretrained,
    )


def _cache_directories(settings: FidelitySettings) -> dict[str, Path]:
    return {role: cache.directory for role, cache in prepare_caches(settings).items()}


def _cached(
    name: ProtocolName, settings: FidelitySettings, directories: dict[str, Path], device: str, *, iterations: str
) -> Protocol:
    def create_task() -> ProxyTask:
        return ProxyTask(open_cache(directories["train"]), open_cache(directories["val"]), settings, device)

    crop_in_features(settings, open_cache(directories["train"]))  # refuses a wrong one
    train, val = (open_cache(directories[role]).manifest for role in ("train", "val"))
    prefix = "--large-" if name == "large" else "--"
    identity: dict[str, Any] = {
        "--dataset": train["dataset"],
        f"{prefix}backbone": train["backbone"],
        f"{prefix}weights": train["weights_hash"],
        f"{prefix}weights-origin": train.get("weights_origin"),
        "--data-dir (training)": train["data_fingerprint"],
        "--data-dir (validation)": val["data_fingerprint"],
        "--image-size": train["image_size"],
        iterations: settings.iterations,
    }
    others = {field.name for field in fields(ProxySettings)} - {"iterations"} | {"seed", "mirrored", "feature_dtype"}
    identity |= {_flag(field): getattr(settings, field) for field in sorted(others | {"output_stride"})}
    return Protocol(name, create_task, settings.iterations, identity)


def _end_to_end(settings: FidelitySettings, directory: Path, device: str) -> Protocol:
    values: dict[str, Any] = {field: getattr(settings, field) for field in _SHARED_WITH_TRAINING}
    train = open_dataset(settings.dataset, settings.train_split, settings.data_dir)
    values["crop_size"] = settings.crop_size or padded_size(settings, train)  # whole images, as on cached features
    values |= {field: getattr(settings, f"end_to_end_{field}") for field in _END_TO_END}
    if settings.dataset == "shapes":  # a short training learns one scale at best
        values |= {field: 1.0 for field in ("min_scale", "max_scale") if values[field] is None}
    values = {field: value for field, value in values.items() if value is not None}
    values |= {"validate_every": settings.end_to_end_iterations, "workers": settings.loading_processes, "device": device}
    values["precision"] = "bfloat16" if settings.precision == "bfloat16" else "float32"
    training = complete(TrainSettings(**values))
    names = {_flag(field): _flag(f"end_to_end_{field}") for field in _END_TO_END} | {"--workers": "--loading-processes"}

    def create_task() -> EndToEndTask:
        return EndToEndTask(training, directory, names)

    identity = {field: value for field, value in create_task().identity().items() if field not in _DERIVED}
    by_flag = {_FLAGS.get(field, names.get(_flag(field), _flag(field))): value for field, value in identity.items()}
    assert len(by_flag) == len(identity)  # else a change would go unseen
    return Protocol("end_to_end", create_task, settings.end_to_end_iterations, by_flag)


def _run(settings: FidelitySettings, protocols: list[Protocol], directory: Path) -> None:
    cells, device = fidelity_cells(), resolve_device(settings.device)
    total = len(protocols) * len(cells) * settings.seeds
    with tqdm(total=total, desc="fidelity", unit="cell") as bar:
        for protocol in protocols:
            jobs = [job for job in _jobs(settings, protocol.name, cells) if not score_path(directory, *job.key).exists()]
            bar.update(len(cells) * settings.seeds - len(jobs))
            if jobs:
                with open_workers(protocol.create_task, settings.workers, device, protocol.iterations) as workers:
                    for outcome in outcomes(workers, jobs):
                        _record(directory, outcome)
                        bar.update()
            for job in _jobs(settings, protocol.name, cells):  # what a process left that ended between the two
                if score_path(directory, *job.key).exists():
                    _delete_training(directory, job)


def _trainings(directory: Path) -> Path:
    return directory / "end_to_end" / "trainings"


def _delete_training(directory: Path, job: Job) -> None:
    """The score is kept, 62 networks and their optimisers are not."""
    if job.key.protocol == "end_to_end":
        shutil.rmtree(training_folder(_trainings(directory), job.cell, job.seed), ignore_errors=True)
        with suppress(OSError):  # unless others are in training
            _trainings(directory).rmdir()


def _jobs(settings: FidelitySettings, protocol: ProtocolName, cells: dict[str, Cell]) -> Iterator[Job]:
    """Every cell once before any a second time, so that what an early stop leaves can be compared."""
    for seed in range(settings.seeds):
        for index, (name, cell) in enumerate(cells.items()):
            numbers = (settings.seed, PROTOCOLS.index(protocol), seed, index)
            yield Job(TrainingKey(protocol, name, seed), cell, numbers)


def _record(directory: Path, outcome: Outcome[Any]) -> None:
    if outcome.is_passing:
        tqdm.write(f"{outcome.job.key} failed: {outcome.failure}; the same command goes on with it", file=sys.stderr)
    else:
        _write_score(directory, outcome)
        _delete_training(directory, outcome.job)


def _write_score(directory: Path, outcome: Outcome[Any]) -> None:
    training, result, failure = outcome.job.key, outcome.result, outcome.failure
    if result is not None and not math.isfinite(result.mean_iou):
        failure = f"its mIOU is {result.mean_iou}"
    if failure is not None:
        tqdm.write(f"{training} failed: {failure}", file=sys.stderr)
    scored = result if failure is None else None
    mean_iou, seconds = (scored.mean_iou, scored.seconds) if scored is not None else (None, None)
    score = Score(training.protocol, training.cell_name, training.seed, mean_iou, seconds, failure)
    write_json(score_path(directory, *training), asdict(score) | {"cell": json.loads(outcome.job.cell.to_json())})


@contextmanager
def _hold(directory: Path, protocols: list[Protocol]) -> Iterator[None]:
    """Keep a second process out. Raises InputError for one, and for a protocol that was scored with other settings."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(directory / "lock", timeout=0):
            for protocol in protocols:
                _check_identity(directory, protocol)
            for protocol in protocols:
                write_json(directory / protocol.name / "settings.json", protocol.identity)
            yield
    except Timeout as error:
        raise InputError(f"{directory} is in use by another process: wait for it, or give another --name") from error


def _check_identity(directory: Path, protocol: Protocol) -> None:
    path = directory / protocol.name / "settings.json"
    if not path.exists():
        return
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}): delete the folder {path.parent} and run the same command") from error
    now = json.loads(json.dumps(protocol.identity))
    if different := differences(before, now):
        raise InputError(
            f"{protocol.name} in {directory} was scored with {different}: "
            f"use the same values, give another --name, or delete {path.parent}"
        )


def _check(settings: FidelitySettings) -> None:
    """Refuse numbers that cannot work, before anything is written; what `search.train` shares it checks itself."""
    at_least_one = ("seeds", "workers", "iterations", "long_iterations", "end_to_end_iterations", "end_to_end_batch_size")
    for field in (*at_least_one, "batch_size", "branch_channels", "statistics_batches"):
        if getattr(settings, field) < 1:
            raise InputError(f"{_flag(field)} must be at least 1, got {getattr(settings, field)}")
    for field in ("weight_decay", "momentum", "loading_processes", "seed"):
        if not getattr(settings, field) >= 0:  # nor NaN
            raise InputError(f"{_flag(field)} must not be negative, got {getattr(settings, field)}")
    for field in ("learning_rate", "end_to_end_learning_rate"):
        if not getattr(settings, field) > 0:
            raise InputError(f"{_flag(field)} must be above 0, got {getattr(settings, field)}")
    if not 0 <= settings.dropout < 1:
        raise InputError(f"--dropout must be at least 0 and below 1, got {settings.dropout}")
    if not settings.protocols or len(set(settings.protocols)) < len(settings.protocols):
        raise InputError(f"--protocols must name some of {', '.join(PROTOCOLS)}, each once")


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _command() -> str:
    return shlex.join(["python", "-m", "search.fidelity", *sys.argv[1:]])


if __name__ == "__main__":
    run_command(FidelitySettings, main, prog="python -m search.fidelity", goes_on=True)
