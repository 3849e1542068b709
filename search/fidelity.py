"""Measure how far the proxy task can be trusted (paper, section 4.1): `python -m search.fidelity`.

Every cell of a small space is scored under several protocols; Spearman's ρ says how alike two protocols order the cells:

    proxy         small backbone, cached features, short training: what a search uses
    long          the same, trained longer
    large         a larger backbone, cached, short
    end_to_end    the small backbone, trained together with the cell

The paper has a space of 31 cells; as far as we know it is nowhere listed. Ours are the 31 = 2⁵ − 1 non-empty choices of ASPP's
five branches, all reading the backbone: 1×1, rates 6, 12 and 18, image pooling. That is a complete family, not a selection,
from a plain 1×1 to ASPP itself, and it shows what a branch adds to the others.

The folder of the run (--out) keeps each score in a file of its own, written when its training ends. After any interruption
the same command continues; more protocols or seeds add to what is there. Each training has its own random numbers, so
agreement never comes from equal initial weights or crops.
"""

import functools
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain, combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple
from zlib import crc32

from tqdm import tqdm

from reference.cell import Cell
from search.backbones import completed_backbone, grid_of
from search.backbones.shapes import WIDE_BACKBONE
from search.cells.space import canonical_form, load_cell
from search.cli import Flat, arguments_of, print_next, run_command, spelled, this_command, to_type
from search.datasets import Dataset, training_pictures
from search.datasets.weights import completed_loss, weights_in_words
from search.dense_tasks import Measure
from search.devices import resolve_device
from search.errors import InputError, fields_in, with_fields
from search.folder import Folder
from search.reports.fidelity import Score, load_scores, score_name, write_report
from search.runs.workers import Job, Outcome, Task, open_workers, outcomes
from search.settings import (
    SHAPES,
    TRAINING_DEFAULTS,
    BackboneSettings,
    DataSettings,
    FeatureSettings,
    HeadSettings,
    LossSettings,
    MachineSettings,
    ProxySettings,
    RecipeSettings,
    TrainingSettings,
    WorkerSettings,
    declared,
    field_names,
    given,
    known,
    plain,
    require,
    scored,
)
from search.tasks.end_to_end import EndToEndTask, training_folder
from search.tasks.feature_cache import FeatureCache, facts_of, open_for_features, padded_size, prepare_caches
from search.tasks.proxy import ProxyTask, crop_in_features

ProtocolName = Literal["proxy", "long", "large", "end_to_end"]
PROTOCOLS: tuple[ProtocolName, ...] = ("proxy", "long", "large", "end_to_end")
_PROG = spelled("fidelity")
_RENAMED = {
    "--name": "--out FOLDER",
    "--runs-dir": "--out FOLDER",
    "--large-backbone": "--large.backbone",
    "--large-weights": "--large.weights",
    "--large-weights-origin": "--large.weights-origin",
    "--large-pretrained": "--large.pretrained",
    "--end-to-end-iterations": "--end-to-end.iterations",
    "--end-to-end-batch-size": "--end-to-end.batch-size",
    "--end-to-end-learning-rate": "--end-to-end.learning-rate",
    "--end-to-end-min-scale": "--end-to-end.min-scale",
    "--end-to-end-max-scale": "--end-to-end.max-scale",
    "--loading-processes": "--end-to-end.loading-processes",
}


@dataclass(frozen=True, kw_only=True)
class LargeSettings(BackboneSettings):
    """The backbone of large."""

    backbone: str | None = None
    """Any timm model with feature maps. None: a wider one trained on the spot for shapes, xception65 for the rest."""
    output_stride: int | None = None
    """Pixels per feature, 4 to 32. None: as --output-stride."""


@dataclass(frozen=True, kw_only=True)
class EndToEndSettings(RecipeSettings):
    """The trainings of end_to_end, which share nothing with those on cached features but head, data and backbone."""

    crop_size: tuple[int, int] | None = None
    """Height and width in pixels of the training crops, stride·k + 1 each, or stride·k for backbones that cut pictures into
    patches. None: whole pictures."""
    min_scale: float | None = None
    """Smallest random scale of a training picture. None: 0.5; 1 for shapes."""
    max_scale: float | None = None
    """Largest random scale. None: 2; 1 for shapes."""
    batch_size: int | None = 4
    """Crops per iteration. The paper: 16."""
    iterations: int | None = 50
    """Steps of the optimiser. The paper: 90,000."""
    learning_rate: float | None = None
    """The learning rate from which it falls to 0. None: 0.1; 0.0001 with adamw. The paper: 0.01."""
    validate_every: int | None = None
    """Iterations between validations. None: only after the last, which alone counts."""


@dataclass(frozen=True, kw_only=True)
class FidelitySettings(WorkerSettings):
    """Score a space of 31 cells under several protocols, and say how alike these order them."""

    protocols: tuple[ProtocolName, ...] = PROTOCOLS
    """What to compare: proxy, long, large, end_to_end."""
    seeds: int = 2
    """Trainings of each cell under each protocol; 2 or more show how well a protocol agrees with itself."""
    seed: int = 0
    """Seed of everything: initial weights, crops, dropout."""
    out: Path | None = None
    """Folder of the run. None: runs/fidelity/ and the data set's name."""
    long_iterations: int = 120
    """Training steps per cell under the protocol long; --iterations is for proxy and large."""
    proxy: Flat[ProxySettings] = ProxySettings(iterations=40)
    head: Flat[HeadSettings] = HeadSettings(branch_channels=64)
    loss: Flat[LossSettings] = LossSettings()
    data: Flat[DataSettings] = DataSettings()
    backbone: Flat[BackboneSettings] = BackboneSettings()
    features: Flat[FeatureSettings] = FeatureSettings()
    machine: Flat[MachineSettings] = MachineSettings()
    large: LargeSettings = LargeSettings()
    end_to_end: EndToEndSettings = EndToEndSettings()


@dataclass(frozen=True)
class Protocol:
    """A way to score cells, ready to be used. `identity` maps the settings that its scores depend on to their values."""

    name: ProtocolName
    create_task: Callable[..., Task[Any]]  # of the caches
    caches: Mapping[str, FeatureCache]
    measure: Measure  # what its scores are
    iterations: int
    identity: dict[str, Any]
    defaults: Mapping[str, Any]  # as in `Folder.check`


class TrainingKey(NamedTuple):
    """Which training: protocol, cell and seed. As text it is the name that is printed."""

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
    """Score what is not scored yet, then report how the protocols agree."""
    head, backbone = settings.head.completed(settings.data.dataset), completed_backbone(settings.backbone)
    settings = replace(settings, head=head, backbone=backbone)
    _check(settings)
    splits = open_for_features(settings.data, settings.backbone, settings.features, settings.machine)
    train = splits[0]
    _check_end_to_end(settings, train)
    settings = replace(settings, loss=completed_loss(settings.loss, train, settings.machine.cache_dir))
    if words := weights_in_words(train.task, settings.loss):
        print(words, file=sys.stderr)
    directory = settings.out or Path("runs") / "fidelity" / train.name
    protocols = prepare_protocols(settings, splits, directory)
    measure = protocols[0].measure
    with Folder(directory).locked():
        for protocol in protocols:
            _folder(directory, protocol.name).check(protocol.identity, protocol.defaults)
        for protocol in protocols:
            folder = _folder(directory, protocol.name)
            folder.begin(protocol.identity, this_command(_PROG), defaults=protocol.defaults)
        try:
            _run(settings, protocols, directory)
        finally:  # also after Ctrl-C: what there is, is shown
            scores = load_scores(directory, PROTOCOLS, list(fidelity_cells()))  # of earlier commands too
            found = {score.protocol for score in scores}
            shown = [protocol for protocol in PROTOCOLS if protocol in found or protocol in settings.protocols]
            print(write_report(directory, scores, shown, this_command(_PROG), measure))
    if all(score.score is None for score in scores):  # every training has failed, which is said
        sys.exit(1)
    print_next(to_type("random", *arguments_of(settings.data, settings.backbone, settings.features, settings.machine)))


def prepare_protocols(settings: FidelitySettings, splits: tuple[Dataset, Dataset], directory: Path) -> list[Protocol]:
    """Prepare the protocols to be run and their caches, so that what cannot work is refused before the first training."""
    device = resolve_device(settings.machine.device)
    with _fields_of("large"):
        large = completed_backbone(settings.large)
    if large.backbone is None:
        large = replace(large, backbone=WIDE_BACKBONE if settings.data.dataset == SHAPES else "xception65")
    if large.output_stride is None:
        large = replace(large, output_stride=settings.backbone.output_stride)
    proxy = settings.proxy.with_defaults(sgd=0.2, adamw=1e-3)
    longer = replace(proxy, iterations=settings.long_iterations)

    @functools.cache  # proxy and long have the same
    def caches(backbone: BackboneSettings) -> dict[str, FeatureCache]:
        groups = settings.data, backbone, settings.features, settings.machine
        return prepare_caches(splits, *groups, this_command(_PROG), settings.proxy.crop_size)

    def prepare(name: ProtocolName) -> Protocol:
        match name:
            case "proxy":
                return _cached(name, settings, proxy, caches(settings.backbone), device)
            case "long":
                return _cached(name, settings, longer, caches(settings.backbone), device)
            case "large":
                return _cached(name, settings, proxy, caches(large), device)
            case "end_to_end":
                return _end_to_end(settings, splits[0], _trainings(directory), device)

    protocols = []
    for name in PROTOCOLS:
        if name in settings.protocols:
            with _fields_of(name):
                protocols.append(prepare(name))
    return protocols


def _fields_of(protocol: ProtocolName) -> AbstractContextManager[None]:
    """A context in which error messages name the settings of one protocol, such as `large.backbone`."""
    match protocol:
        case "large":
            return fields_in("large", field_names(BackboneSettings))
        case "end_to_end":
            return fields_in("end_to_end", field_names(RecipeSettings))
        case "proxy" | "long":
            return nullcontext()


def _cached(
    name: ProtocolName, settings: FidelitySettings, proxy: ProxySettings, caches: dict[str, FeatureCache], device: str
) -> Protocol:
    """A protocol on these cached features, with trainings like this."""

    def create_task(train: FeatureCache, val: FeatureCache) -> ProxyTask:
        return ProxyTask(train, val, proxy, settings.head, device, settings.loss)

    crop_in_features(proxy, caches["train"])  # refuses a wrong one
    facts = facts_of(caches)
    if name == "large":
        facts = {_of_large(name): fact for name, fact in facts.items()}
    groups = settings.data, settings.features, settings.head, settings.loss, proxy
    identity = scored(*groups) | facts | {"seed": settings.seed}
    if name == "long":
        identity["long_iterations"] = identity.pop("iterations")
    measure, defaults = caches["train"].task.score, declared(*map(type, groups))
    return Protocol(name, create_task, caches, measure, proxy.steps, plain(identity), defaults)


def _of_large(name: str) -> str:
    """The name of a fact in an identity, a field or words about one, where it is of the large backbone."""
    fields = field_names(BackboneSettings)
    if name in fields:
        return f"large.{name}"
    return with_fields(name, lambda field: f"`large.{field}`" if field in fields else f"`{field}`")


def _end_to_end(settings: FidelitySettings, train: Dataset, directory: Path, device: str) -> Protocol:
    data, recipe = settings.data, settings.end_to_end.with_defaults(sgd=0.1, adamw=1e-4)
    if recipe.crop_size is None:  # whole pictures, as on cached features
        size = padded_size(settings.features, train, grid_of(settings.backbone, data.dataset))
        recipe = replace(recipe, crop_size=size)
    if data.dataset == SHAPES:  # a short training learns one scale at best
        recipe = replace(recipe, min_scale=given(recipe.min_scale, 1.0), max_scale=given(recipe.max_scale, 1.0))
    training = TrainingSettings(
        data=data,
        backbone=settings.backbone,
        head=settings.head,
        loss=settings.loss,
        recipe=recipe,
        machine=replace(settings.machine, device=device),
        seed=settings.seed,
    )

    def create_task() -> EndToEndTask:
        return EndToEndTask(training, directory)

    task = create_task()
    completed = task.settings.recipe
    own = scored(completed)
    parts = task.identity()
    identity = {f"end_to_end.{name}" if name in own else name: value for name, value in parts.items()}
    measure, iterations = task.dense_task.score, known(completed.iterations)
    return Protocol("end_to_end", create_task, {}, measure, iterations, plain(identity), TRAINING_DEFAULTS)


def _run(settings: FidelitySettings, protocols: list[Protocol], directory: Path) -> None:
    cells = fidelity_cells()
    total = len(protocols) * len(cells) * settings.seeds
    with tqdm(total=total, desc="fidelity", unit="cell") as bar:
        for protocol in protocols:
            folder = _folder(directory, protocol.name)
            jobs = [job for job in _jobs(settings, protocol.name, cells) if not _is_scored(folder, job)]
            bar.update(len(cells) * settings.seeds - len(jobs))
            if jobs:
                opened = open_workers(
                    protocol.create_task, settings, settings.machine.device, protocol.iterations, caches=protocol.caches
                )
                with _fields_of(protocol.name), opened as workers:
                    for outcome in outcomes(workers, jobs):
                        _record(directory, outcome)
                        bar.update()
            for job in _jobs(settings, protocol.name, cells):  # left by a process that ended after writing the score
                if _is_scored(folder, job):
                    _delete_training(directory, job)


def _folder(directory: Path, protocol: ProtocolName) -> Folder:
    return Folder(directory / protocol, "protocol")


def _is_scored(folder: Folder, job: Job) -> bool:
    return folder.result_path(score_name(job.key.cell_name, job.key.seed)).exists()


def _trainings(directory: Path) -> Path:
    return directory / "end_to_end" / "trainings"


def _delete_training(directory: Path, job: Job) -> None:
    """Delete a training's network and optimiser; only its score is kept."""
    if job.key.protocol == "end_to_end":
        shutil.rmtree(training_folder(_trainings(directory), job.cell, job.seed), ignore_errors=True)
        with suppress(OSError):  # unless others are in training
            _trainings(directory).rmdir()


def _jobs(settings: FidelitySettings, protocol: ProtocolName, cells: dict[str, Cell]) -> Iterator[Job]:
    """The jobs: every cell once before any a second time, so that an early stop leaves comparable scores.

    The random numbers of a training follow from its protocol's and cell's names: adding others changes none.
    """
    for seed in range(settings.seeds):
        for name, cell in cells.items():
            numbers = (settings.seed, crc32(protocol.encode()), seed, crc32(name.encode()))
            yield Job(TrainingKey(protocol, name, seed), cell, numbers)


def _record(directory: Path, outcome: Outcome[Any]) -> None:
    if outcome.is_passing:
        tqdm.write(f"{outcome.job.key} failed: {outcome.failure}; the same command goes on with it", file=sys.stderr)
    else:
        _write_score(directory, outcome)
        _delete_training(directory, outcome.job)


def _write_score(directory: Path, outcome: Outcome[Any]) -> None:
    training, result, failure = outcome.job.key, outcome.result, outcome.failure
    if result is not None and not math.isfinite(result.score):
        failure = f"its score is {result.score}"
    if failure is not None:
        tqdm.write(f"{training} failed: {failure}", file=sys.stderr)
    counted = result if failure is None else None
    value, seconds = (counted.score, counted.seconds) if counted is not None else (None, None)
    score = Score(training.protocol, training.cell_name, training.seed, value, seconds, failure)
    content = asdict(score) | {"cell": json.loads(outcome.job.cell.to_json())}
    _folder(directory, training.protocol).write_result(score_name(training.cell_name, training.seed), content)


def _check(settings: FidelitySettings) -> None:
    """Refuse numbers that cannot work, before anything is written."""
    settings.proxy.check()
    settings.head.check()
    settings.loss.check()
    settings.backbone.check()
    require("seeds", settings.seeds, settings.seeds >= 1, "at least 1")
    require("seed", settings.seed, settings.seed >= 0, "at least 0")
    settings.check()
    long, warmup = settings.long_iterations, settings.proxy.warmup_iterations
    require("long_iterations", long, long >= 1, "at least 1")
    if warmup >= long:
        raise InputError(f"`warmup_iterations` {warmup} leaves none of `long_iterations` {long}")
    if not settings.protocols or len(set(settings.protocols)) < len(settings.protocols):
        raise InputError(f"`protocols` must name some of {', '.join(PROTOCOLS)}, each once")
    if "large" in settings.protocols:
        with _fields_of("large"):
            settings.large.check()


def _check_end_to_end(settings: FidelitySettings, train: Dataset) -> None:
    """Refuse numbers of end_to_end that cannot work, before any features are computed."""
    if "end_to_end" in settings.protocols:
        pictures = training_pictures(settings.data, train)
        with _fields_of("end_to_end"):
            grid = grid_of(settings.backbone, settings.data.dataset)
            settings.end_to_end.completed(pictures, grid).check(grid)


if __name__ == "__main__":
    run_command(FidelitySettings, main, prog=_PROG, goes_on=True, renamed=_RENAMED)
