"""A whole search, from features to the report, for the command `search.random` and for who has a data set and a backbone as
objects in Python: `search_cells`, and `train_network` for what it has found. docs/python.md shows both.
"""

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, get_args

from fast.backbone import Backbone, hash_of_weights
from fast.checkpoint import check_network, head_content, load_head, load_network
from fast.model_card import write_card
from fast.segmentation import SegmentationHead, SegmentationNetwork
from reference.cell import GRID_SIZES, NUM_BRANCHES, RATES, Cell
from search.backbones.facts import facts_in
from search.cells.sampler import LAG, CellSampler
from search.cells.samplers import create_sampler
from search.cells.space import ASCENDING, SearchSpace, is_ascending, load_cells
from search.datasets import Dataset, training_pictures
from search.datasets.look import look_at, require_labels
from search.datasets.weights import completed_loss, weights_in_words
from search.devices import Devices, resolve_device
from search.errors import InputError
from search.folder import Folder
from search.runs.cluster import count_workers
from search.runs.database import has_password
from search.runs.halving import LEAST, REDUCTION, Halving, Rule, chosen_rungs
from search.runs.lag import chosen_lag
from search.runs.search import Search
from search.runs.store import SearchPlan
from search.runs.study import Run, RunSettings, TrialRecord, best_head, identity_before, load_run, open_run, ranked
from search.runs.workers import open_workers
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
    changes_no_score,
    declared,
    given,
    known,
    require,
    scored,
)
from search.tasks.feature_cache import MEAN, STD, WEIGHTS, FeatureCache, caches_of, facts_of
from search.tasks.proxy import CostKind, ProxyTask, feature_maps
from search.training.loop import Training
from search.training.network import training_identity
from search.training.scoring import require_validation

EarlyStopping = Literal["none"] | Rule
_EARLY_STOPPING = ("none", *get_args(Rule))
SecondObjective = Literal["none"] | CostKind
_SECOND_OBJECTIVES = ("none", *get_args(CostKind))
KNOWN_CELLS = ("linear", "mlp", "aspp", "psp", "dpc")


@dataclass(frozen=True, kw_only=True)
class SearchSettings(WorkerSettings):
    """Which cells are tried, and beside which ones they are compared."""

    storage: str | None = None
    """Database URL of the study, such as postgresql+psycopg://user@host/name. None: a SQLite file in the run's folder."""
    trials: int | None = changes_no_score(None)
    """Number of cells to try in all, those of earlier runs of this command included. None: 100; 12 for shapes."""
    branches: int = NUM_BRANCHES
    """Branches per cell."""
    rates: tuple[int, ...] = RATES
    """Rates that atrous convolutions may have in height and width, as at output stride 16. None given: no such ones."""
    grids: tuple[int, ...] = GRID_SIZES
    """Grids that pyramid poolings may have in height and width. None given: no poolings."""
    sampler: str = "paper"
    """How cells are proposed: paper (uniform, and near the best so far), random, evolution, local, predictor or tpe."""
    second_objective: SecondObjective = "none"
    """What cells are to have little of, beside a great score: multiply_adds, or latency beside the published cell's; for the
    samplers evolution, tpe and random, without early stopping (docs/objectives.md). none: the score alone counts."""
    early_stopping: EarlyStopping = "none"
    """How cells are left out after a part of their training, so that only the best are trained in full: asha, pasha or halving
    (docs/early_stopping.md); none trains all in full."""
    rungs: tuple[int, ...] | None = None
    """Iterations after which cells are compared, such as 60 250. None: a 64th, a 16th and a 4th of all, if that is at least
    20; with another `reduction_factor` its powers, or with 1 those of 2."""
    reduction_factor: int | None = None
    """One of so many cells goes on from each of these; with 1 all do, which gives their learning curves. None: 4."""
    lag: int | None = None
    """Samplers that look back, and early stopping, ignore this many latest results, so their cells are the same with up to
    lag + 1 workers. None: the run's; of a new one 4, or a multiple of the workers if they are more than 5, so that no one
    waits for a slow cell."""
    seed: int = 0
    """Seed of everything: the cells, their initial weights, crops and dropout."""
    compare: tuple[str, ...] = changes_no_score(KNOWN_CELLS)
    """Cells to score beside the search: linear, mlp, aspp, psp, dpc, or paths of cell JSON files."""
    comparison_seeds: int = changes_no_score(1)
    """Seeds with which these and the best cell found are scored."""
    cells_per_gpu: int = changes_no_score(1)
    """Cells trained at a time on one GPU, which one alone does not fill; scores are the same. It gains nothing on a CPU."""

    def completed(self, dataset: str) -> Self:
        """With the defaults for a data set where nothing was given."""
        return replace(self, trials=given(self.trials, 12 if dataset == SHAPES else 100))

    def with_rungs(self, iterations: int) -> Self:
        """With rungs for trainings of so many iterations if none were given. Raises InputError for those that do not fit."""
        if self.early_stopping == "none":
            return self
        reduction = given(self.reduction_factor, REDUCTION)
        rungs = given(self.rungs, chosen_rungs(iterations, reduction))
        if not rungs:
            raise InputError(
                f"`iterations` {iterations} are too few for `early_stopping` with `reduction_factor` {reduction}: give "
                f"{LEAST * max(2, reduction)} or more, or `rungs`, such as {max(1, iterations // 2)}"
            )
        search = replace(self, rungs=rungs, reduction_factor=reduction)
        search.halving(iterations)
        return search

    def halving(self, iterations: int) -> Halving | None:
        """How the search is cut short, after `with_rungs` and `with_lag`. Raises InputError for rungs that do not fit."""
        if self.early_stopping == "none":
            return None
        rungs = (*known(self.rungs), iterations)
        return Halving(self.early_stopping, rungs, known(self.reduction_factor), given(self.lag, LAG))

    def check_storage(self) -> None:
        """Raise InputError for a password in `storage`."""
        if self.storage is not None and has_password(self.storage):
            raise InputError(
                "`storage` has a password in it, which others would see in the list of processes and in the run's files: "
                "put it into ~/.pgpass, or into the environment as PGPASSWORD"
            )

    def check(self) -> None:
        """Raise InputError for what cannot work."""
        self.check_storage()
        super().check()
        require("trials", self.trials, given(self.trials, 1) >= 1, "at least 1")
        require("branches", self.branches, self.branches >= 1, "at least 1")
        require("rates", _spaced(self.rates), is_ascending(self.rates), ASCENDING)
        require("grids", _spaced(self.grids), is_ascending(self.grids), ASCENDING)
        require("comparison_seeds", self.comparison_seeds, self.comparison_seeds >= 1, "at least 1")
        require("cells_per_gpu", self.cells_per_gpu, self.cells_per_gpu >= 1, "at least 1")
        require("lag", self.lag, given(self.lag, LAG) >= 0, "at least 0")
        second = self.second_objective
        require("second_objective", second, second in _SECOND_OBJECTIVES, " or ".join(_SECOND_OBJECTIVES))
        require("early_stopping", self.early_stopping, self.early_stopping in _EARLY_STOPPING, " or ".join(_EARLY_STOPPING))
        require("reduction_factor", self.reduction_factor, given(self.reduction_factor, 1) >= 1, "at least 1")
        rungs = given(self.rungs, (1,))
        require("rungs", _spaced(rungs) or "none", bool(rungs) and is_ascending(rungs), ASCENDING)
        for name in ("rungs", "reduction_factor"):
            if getattr(self, name) is not None and self.early_stopping == "none":
                raise InputError(f"`{name}` is for `early_stopping`: give asha, pasha or halving, too")
        if self.workers != 1 and self.cells_per_gpu > 1:
            raise InputError(
                f"`cells_per_gpu` {self.cells_per_gpu} needs `workers` 1: with more, each trains one cell at a time"
            )
        sampler = self._sampler()
        if self.cost_kind is not None:
            self._check_two_objectives(sampler)
        load_cells(self.compare)

    def _check_two_objectives(self, sampler: CellSampler) -> None:
        if sampler.uses_scores and not sampler.takes_several_objectives:
            raise InputError(
                f"`sampler` {self.sampler} looks at the score alone: with `second_objective` {self.second_objective} give "
                "`sampler` evolution, tpe or random"
            )
        if self.early_stopping != "none":
            raise InputError(
                f"`early_stopping` {self.early_stopping} keeps cells by their score alone, and cannot be had with "
                f"`second_objective` {self.second_objective}: leave out one of the two"
            )

    @property
    def cost_kind(self) -> CostKind | None:
        """The second objective, if there is one."""
        return None if self.second_objective == "none" else self.second_objective

    @property
    def most_at_once(self) -> int | None:
        """How many cells may be evaluated at a time; None if neither sampler nor early stopping ever waits for results."""
        looks_back = self.early_stopping != "none" or self._sampler().uses_scores
        return given(self.lag, LAG) + 1 if looks_back else None

    def with_lag(self, directory: Path, device: str, iterations: int) -> Self:
        """With the lag of the run in `directory`, or of a new one; says so if that is not as usual, or not enough.

        A sampler that looks back waits for all but the `lag` latest trials. With little more than that at work, a slow cell
        soon stops the others. With early stopping, one that is trained in full is slow.
        """
        before = identity_before(directory, self.storage)
        fixed = self.lag if before is None else given(self.lag, before.get("lag"))
        search = replace(self, lag=given(fixed, LAG))
        if (most := search.most_at_once) is None:
            return search
        wanted = max(count_workers(self, device), self.cells_per_gpu)
        if wanted <= most:
            return search
        if fixed is None:
            search = replace(self, lag=chosen_lag(wanted, self.trials, self.halving(iterations)))
            print(
                f"lag {search.lag} for {wanted} cells at a time: so many latest results are ignored, so that no cell "
                f"waits for another that takes up to {known(search.lag) // wanted} times as long",
                file=sys.stderr,
            )
        else:
            print(
                f"{most} of {wanted} cells are evaluated at a time, because this run waits for all but the "
                f"{fixed} latest (its lag)",
                file=sys.stderr,
            )
        return search

    def _sampler(self) -> CellSampler:
        return create_sampler(
            self.sampler, SearchSpace(self.branches, self.rates, self.grids), self.seed, lag=given(self.lag, LAG)
        )


@dataclass(frozen=True)
class Found:
    """What a search has found: the best cell, its score in 0..1, and its briefly trained head, in evaluation mode.

    `backbone` says which features the head was trained on (name, hash of the weights, and so on).
    """

    directory: Path
    cell: Cell
    score: float
    head: SegmentationHead
    backbone: Mapping[str, Any]

    @property
    def report(self) -> Path:
        """The page that shows all cells."""
        return self.directory / "report.html"

    @property
    def front(self) -> list[TrialRecord]:
        """The cells on the Pareto front, the best score first, of a search with two objectives; else the best one alone.

        Each has `cell`, `score`, `cost("multiply_adds")` and, where it was measured, `cost("latency")`.
        """
        from search.reports.front import front_of

        run = load_run(self.directory)
        best = ranked(run.trials)
        return best[:1] if run.cost_kind is None else front_of(run, best)

    def network(self, backbone: Backbone) -> SegmentationNetwork:
        """Backbone and head: images (N, 3, H, W), values 0 to 255 -> outputs (N, K, h, w) at the backbone's output stride.

        `network.predict(images)` gives the best class per pixel. The head moves to the backbone's device. Raises InputError
        for a backbone with other weights than it was trained on.
        """
        if backbone.weights_hash() != self.backbone["weights_hash"]:
            raise InputError(
                f"the head of {self.directory} was trained on {self.backbone['backbone']} with other weights: give that one, "
                "or build the network with `fast.SegmentationNetwork`"
            )
        return SegmentationNetwork(backbone, self.head.to(backbone.mean.device)).eval()


def search_cells(
    train: Dataset,
    val: Dataset,
    backbone: Backbone,
    out: Path | str,
    *,
    search: SearchSettings | None = None,
    proxy: ProxySettings | None = None,
    head: HeadSettings | None = None,
    loss: LossSettings | None = None,
    features: FeatureSettings | None = None,
    machine: MachineSettings | None = None,
) -> Found:
    """Search cells for these pictures on this backbone, as `python -m search.random` does, in the folder `out`.

    It trains every cell on features of `train` and scores it on `val`. The same call goes on after an interruption, and adds
    cells if `trials` is raised; another data set, backbone or setting is refused in the same folder. The backbone is moved to
    the machine's device and put in evaluation mode. Raises InputError for what cannot be used.
    """
    _require_parts(train=train, val=val, backbone=backbone)
    search, features = given(search, SearchSettings()).completed(train.name), given(features, FeatureSettings())
    proxy, head = given(proxy, ProxySettings()), given(head, HeadSettings()).completed(train.name)
    machine, loss = given(machine, MachineSettings()), given(loss, LossSettings())
    for group in (search, proxy, head, loss):
        group.check()
    if proxy.iterations is not None:
        search.with_rungs(proxy.iterations)  # refuses those that do not fit
    load_cells(search.compare, len(backbone.layer_channels))  # refuses those that read a layer which is not there
    features.check(backbone.grid)
    _require_one_task(train, val)
    look_at(train, val)
    require_labels(train, val)
    loss = completed_loss(loss, train, machine.cache_dir)
    backbone.to(resolve_device(machine.device)).eval()
    directory, command = Path(out), f"search_cells(train, val, backbone, {str(out)!r}, ...) in Python"
    caches = caches_of(train, val, backbone, features, machine, command, proxy.crop_size)
    proxy = proxy.completed(caches["train"].pictures)
    search = search.with_rungs(proxy.steps).with_lag(directory, machine.device, proxy.steps)
    settings = RunSettings(_data_of(train, val), _settings_of(backbone), features, head, machine, loss)
    groups = search, features, head, loss, proxy
    run_search(directory, search, proxy, settings, caches, {"train": train, "val": val}, groups=groups, command=command)
    return load_found(directory)


@dataclass(frozen=True)
class Trained:
    """What a training has come to: the best of the validated networks, in evaluation mode, its score in 0..1, its folder."""

    directory: Path
    score: float
    network: SegmentationNetwork


def train_network(
    network: SegmentationNetwork,
    train: Dataset,
    val: Dataset,
    out: Path | str,
    *,
    recipe: RecipeSettings | None = None,
    loss: LossSettings | None = None,
    machine: MachineSettings | None = None,
    seed: int = 0,
) -> Trained:
    """Train a copy of the network end to end, as `python -m search.train` does on one device, in the folder `out`.

    It begins with the network's weights. The same call goes on after an interruption; the folder has the best network as
    `best.safetensors`. Raises InputError for what cannot be used, also for a backbone that no file could build again.
    """
    machine, loss = given(machine, MachineSettings()), given(loss, LossSettings())
    settings = _training_settings(network, train, val, given(recipe, RecipeSettings()), loss, machine, seed)
    settings.check(network.backbone.grid)
    _require_one_task(train, val)
    _require_trainable(network, train)
    look_at(train, val)
    require_labels(train, val)
    settings = replace(settings, loss=completed_loss(loss, train, machine.cache_dir))
    devices, folder = Devices(machine.device), Folder(Path(out), "training")
    identity = training_identity(settings, network, train, val, devices) | {"`network` (content)": hash_of_weights(network)}
    network = copy.deepcopy(network)
    require_validation(network, val, settings.recipe, devices.device)
    command = f"train_network(network, train, val, {str(out)!r}, ...) in Python"
    with folder.locked():
        folder.begin(identity, command, defaults=TRAINING_DEFAULTS)
        result = Training(settings, network, train, val, folder.path, devices).run()
    path = folder.path / "best.safetensors"
    write_card(path)
    return Trained(folder.path, result.best, load_network(path)[0])


def _require_trainable(network: SegmentationNetwork, train: Dataset) -> None:
    wanted, present = train.task.outputs, network.head.classifier.out_channels
    if present != len(wanted):
        raise InputError(
            f"the network has {present} outputs, {train.name} needs {len(wanted)} ({', '.join(wanted)}): give another head"
        )
    try:
        check_network(network, train.task.describe())
    except ValueError as error:
        raise InputError(f"{error}; train it in a loop of your own") from error


def _training_settings(
    network: SegmentationNetwork,
    train: Dataset,
    val: Dataset,
    recipe: RecipeSettings,
    loss: LossSettings,
    machine: MachineSettings,
    seed: int,
) -> TrainingSettings:
    """The settings that a command would have been given for these objects, completed."""
    context, data = network.head.context, _data_of(train, val)
    return TrainingSettings(
        data=data,
        backbone=_settings_of(network.backbone),
        head=HeadSettings(
            branch_channels=context.branch_channels,
            pooling=context.pooling,
            dropout=getattr(context.dropout, "p", 0.0),  # it may have been replaced, by Identity
        ),
        loss=loss,
        recipe=replace(recipe, decoder=network.decoder is not None),
        machine=machine,
        seed=seed,
    ).completed(training_pictures(data, train), network.backbone.grid)


def load_found(directory: Path | str) -> Found:
    """What the search in this folder has found so far. Raises InputError for a folder that is none, or without a score."""
    run = load_run(Path(directory))
    best = next(iter(ranked(run.trials)), None)
    if best is None or best.result is None:
        raise InputError(f"no cell of {directory} has a score{_first_failure(run)}")
    path = best_head(run.directory)
    try:
        head, description = load_head(path)
    except ValueError as error:
        raise InputError(f"{error}; copy that file too, or search in another folder") from error
    if head.context.cell != best.cell:  # its score is written before it
        raise InputError(
            f"{path} is of another cell than the best by now: let the search go on, or train the best one, {best.cell}"
        )
    return Found(run.directory, best.cell, best.result.score, head, description["backbone"])


def run_search(
    directory: Path,
    search: SearchSettings,
    proxy: ProxySettings,
    settings: RunSettings,
    caches: Mapping[str, FeatureCache],
    pictures: Mapping[str, Dataset],
    *,
    groups: Sequence[Any],
    command: str,
    on_begin: Callable[[], object] = lambda: None,
) -> bool:
    """Search cells on these features, compare and report; `search` has a lag, `settings` have a completed head and loss.

    `caches` and `pictures` have the splits "train" and "val". `groups` are all settings that scores depend on: with other
    values than before, the folder is refused. `command` is what the user typed. `on_begin` is called once nothing is left to
    be refused. Returns whether this process wrote the report: another one may hold the folder and be helped by this one.
    """
    from search.reports import run_files  # loads Matplotlib and SciPy: not a second and a half of every start of a command

    proxy.check()  # once more: its iterations may follow from the number of pictures
    device = resolve_device(settings.machine.device)
    num_inputs = len(caches["train"].layer_channels)
    compare = load_cells(search.compare, num_inputs)
    plan = SearchPlan(known(search.trials), compare, search.comparison_seeds, search.seed)
    maps = feature_maps(proxy, settings.head, **caches)  # refuses a wrong crop size before the run begins
    space = SearchSpace(search.branches, search.rates, search.grids, maps, num_inputs)

    def create_task(train: FeatureCache, val: FeatureCache) -> ProxyTask:
        return ProxyTask(train, val, proxy, settings.head, device, settings.loss, with_latency=search.cost_kind == "latency")

    most = search.most_at_once
    run = open_run(
        directory,
        scored(*groups) | facts_of(caches),
        create_sampler(search.sampler, space, search.seed, lag=known(search.lag)),
        _file_of(caches["train"]),
        storage=search.storage,
        command=command,
        task=pictures["val"].task,
        settings=settings,
        space=space,
        defaults=declared(*map(type, groups)),
        trials=plan.trials,
        halving=search.halving(proxy.steps),
        cost_kind=search.cost_kind,
    )
    with (
        run as study,
        open_workers(
            create_task,
            search,
            settings.machine.device,
            proxy.steps,
            caches=caches,
            in_turns=search.cells_per_gpu if most is None else min(search.cells_per_gpu, most),
            most=most,
        ) as workers,
    ):
        on_begin()
        print(f"search space: {'; '.join(space.describe())}", file=sys.stderr)
        if words := weights_in_words(pictures["val"].task, settings.loss):
            print(words, file=sys.stderr)
        timed_on = None
        refresher = run_files.ReportRefresher(partial(load_run, directory), plan.trials)
        try:
            Search(
                study, workers, plan, pictures["val"].task.score, refresher.tick if study.holds_folder else lambda: None
            ).run()
            timed_on = device
        finally:  # also after Ctrl-C: report what there is, without latencies, which would take seconds
            if study.take_folder():
                run_files.finish_run(directory, pictures, caches["val"], plan.compare, timed_on)
        return study.holds_folder


def _file_of(features: FeatureCache) -> Callable[[SegmentationHead], bytes]:
    """Makes the content of the file of a head that was trained on these features."""
    origin = features.identity
    backbone = {key: origin[key] for key in ("backbone", "weights_origin", "output_stride", "dataset")}
    backbone |= facts_in(origin)
    backbone |= {"weights_hash": origin[WEIGHTS], "mean": origin[MEAN], "std": origin[STD]}
    return partial(head_content, task=features.task.describe(), backbone=backbone)


def _require_parts(*, train: Any, val: Any, backbone: Any) -> None:
    """Refuse a data set and a module of a user's own that are not wrapped yet. Raises InputError."""
    for name, dataset in (("train", train), ("val", val)):
        if not (hasattr(dataset, "task") and hasattr(dataset, "fingerprint")):
            raise InputError(f"`{name}` is a {type(dataset).__name__}: give TorchDataset({name}, ...) of it")
    if not isinstance(backbone, Backbone):
        raise InputError(f"`backbone` is a {type(backbone).__name__}: give backbone_from_module(backbone, ...) of it")


def _require_one_task(train: Dataset, val: Dataset) -> None:
    if (train.name, train.split) == (val.name, val.split) and train.fingerprint() != val.fingerprint():
        raise InputError(
            f"`train` and `val` are different pictures, and both are called {train.name} {train.split}: give another `split`"
        )
    of_train, of_val = ((each.task.name, each.task.outputs) for each in (train, val))
    if of_train != of_val:
        texts = [f"{name} ({', '.join(outputs)})" for name, outputs in (of_train, of_val)]
        raise InputError(f"`train` is for {texts[0]} and `val` for {texts[1]}: give both the same, in one order")


def _data_of(train: Dataset, val: Dataset) -> DataSettings:
    return DataSettings(dataset=train.name, train_split=train.split, val_split=val.split)


def _settings_of(backbone: Backbone) -> BackboneSettings:
    return BackboneSettings(
        backbone=backbone.name,
        output_stride=backbone.output_stride,
        layers=backbone.layers,
        patch_size=backbone.patch_size,
        weights_origin=backbone.weights_origin,
    )


def _spaced(numbers: tuple[int, ...]) -> str:
    return " ".join(map(str, numbers))


def _first_failure(run: Run) -> str:
    failure = next((record.failure for record in run.trials if record.failure), None)
    return f" ({len(run.trials)} failed: {failure})" if failure else " yet: let it go on"
