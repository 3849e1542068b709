"""Re-ranking (paper, section 4.2): the best cells of a search by proxy score, trained end to end: `python -m search.rerank`.

`--out` holds a folder for each cell and seed. While a cell is in training, it is like the folder of `search.train` and can be
continued in the same way. When the training is finished, `result.json` has its result, and `test-<split>.json` that on a test
split; the network stays, the state is deleted.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from fast.backbone import WeightsOrigin
from reference.pyramid_pooling import PoolingVariant
from search.backbones import backbone_in
from search.cells.space import canonical_form, load_cells
from search.cli import Flat, print_defaults, print_next, run_command, spelled, this_command, to_train
from search.datasets import Dataset, is_named, open_splits, training_pictures
from search.datasets.look import look_at
from search.datasets.weights import weights_in_words
from search.devices import resolve_device
from search.errors import InputError
from search.folder import Folder
from search.reports.front import front_of
from search.reports.reranking import Candidate, Reranked, Trainings, finish_reranking, rank
from search.reports.rungs import is_in_full, iterations_of
from search.runs.study import Run, load_run, ranked
from search.runs.workers import Job, Outcome, Workers, open_workers, outcomes
from search.settings import (
    TRAINING_DEFAULTS,
    BackboneSettings,
    ClassWeights,
    DataSettings,
    DeviceSettings,
    HeadSettings,
    LossSettings,
    MachineSettings,
    RecipeSettings,
    TaskName,
    TrainingSettings,
    WorkerSettings,
    given,
    known,
    require,
)
from search.tasks.end_to_end import EndToEndResult, EndToEndTask, read_outcome
from search.tasks.held_out import require_held_out

_PROG = spelled("rerank")


@dataclass(frozen=True, kw_only=True)
class RunOverrides:
    """Settings that default to those of the search. Another data set or backbone brings its own folder, splits, weights."""

    dataset: str | None = None
    """Data set, as in training. None: the run's, with its --data-dir and --train-split."""
    data_dir: Path | None = None
    """Folder of the data set. None: the run's."""
    task: TaskName | None = None
    """What to predict: segmentation or depth. None: the run's."""
    train_split: str | None = None
    """Split to train on. None: the run's."""
    val_split: str | None = None
    """Split to score on. None: the run's."""
    backbone: str | None = None
    """Any timm model with feature maps. None: the run's, with its weights."""
    weights: Path | None = None
    """Local file of the backbone's weights. None: the run's."""
    weights_origin: WeightsOrigin | None = None
    """Where the weights were trained: timm or tensorflow. None: the run's, or timm with other weights."""
    pretrained: bool = False
    """Let timm download its pretrained weights."""
    output_stride: int | None = None
    """Pixels per feature, 4 to 32. None: the run's."""
    branch_channels: int | None = None
    """Filters of each branch and of the cell's output. None: the run's."""
    pooling: PoolingVariant | None = None
    """Pyramid pooling: sliding_window or grid_cells. None: the run's."""
    class_weights: ClassWeights | None = None
    """Factors for the losses of each class's pixels: a number for each class (1 for all: no weights), or balanced. None: the
    run's, which are for the run's classes."""
    cache_dir: Path | None = None
    """Where the small backbone for shapes is kept. None: the run's."""

    def data(self, run: DataSettings) -> DataSettings:
        other = DataSettings(dataset=given(self.dataset, run.dataset), task=run.task, max_megapixels=run.max_megapixels)
        before = run if self.dataset is None else other
        return replace(
            before,
            data_dir=given(self.data_dir, before.data_dir),
            task=given(self.task, before.task),
            train_split=given(self.train_split, before.train_split),
            val_split=given(self.val_split, before.val_split),
        )

    def network(self, run: BackboneSettings) -> BackboneSettings:
        """The backbone's settings; of those of the run, other weights keep the backbone's name and what its features are."""
        is_another = self.backbone is not None or self.weights is not None or self.pretrained
        name = run.backbone if backbone_in(self.weights) is None else None  # a network's file has its own
        before = run
        if is_another:
            patch_size = run.patch_size if self.backbone is None else None  # others may have no patches
            before = BackboneSettings(backbone=name, output_stride=run.output_stride, layers=run.layers, patch_size=patch_size)
        return replace(
            before,
            backbone=given(self.backbone, before.backbone),
            weights=given(self.weights, before.weights),
            weights_origin=given(self.weights_origin, before.weights_origin),
            pretrained=self.pretrained or before.pretrained,
            output_stride=given(self.output_stride, before.output_stride),
        )

    def head(self, run: HeadSettings, dropout: float) -> HeadSettings:
        return replace(
            run,
            branch_channels=given(self.branch_channels, run.branch_channels),
            pooling=given(self.pooling, run.pooling),
            dropout=dropout,
        )

    def loss(self, run: LossSettings) -> LossSettings:
        return LossSettings(class_weights=given(self.class_weights, run.class_weights))


@dataclass(frozen=True, kw_only=True)
class RerankSettings(WorkerSettings):
    """Train the best cells of a search end to end, rank them again, and compare with their ranks on the proxy task."""

    run: Path
    """Folder of the search, such as runs/camvid."""
    top: int = 50
    """Number of cells, the best by proxy score; of a search with two objectives only those on its Pareto front."""
    compare: tuple[str, ...] = ("dpc", "aspp")
    """Cells to train beside them: linear, mlp, aspp, psp, dpc, or paths of cell JSON files."""
    seeds: int = 1
    """Trainings of each cell; the k-th has the same crops for all cells."""
    test_splits: tuple[str, ...] = ()
    """Labelled splits of the data set, on which the trained networks are scored too, and which choose nothing. They may be
    given later."""
    seed: int = 0
    """Seed of everything: initial weights, order of the pictures, crops, dropout."""
    out: Path | None = None
    """Folder of the re-ranking. None: rerank/ in the run's folder."""
    dropout: float = HeadSettings.dropout
    """Share of the concatenated branch outputs that is dropped."""
    recipe: Flat[RecipeSettings] = RecipeSettings()
    overrides: Flat[RunOverrides] = RunOverrides()
    device: Flat[DeviceSettings] = DeviceSettings()


def main(settings: RerankSettings) -> None:
    """Train what is not trained yet, then rank."""
    require("top", settings.top, settings.top >= 1, "at least 1")
    require("seeds", settings.seeds, settings.seeds >= 1, "at least 1")
    settings.check()
    run = load_run(settings.run)
    directory = settings.out or settings.run / "rerank"
    candidates = candidates_of(run, settings)
    training = training_settings(settings, run)

    def create_task() -> EndToEndTask:
        return EndToEndTask(training, directory, settings.test_splits)

    task, folder = create_task(), Folder(directory, "re-ranking")
    if task.dense_task.name != run.task.name:
        raise InputError(
            f"`dataset` {task.train.name} has labels for {task.dense_task.name}, and `run` {settings.run} was scored by "
            f"{run.task.name}: give data of the same task; a cell can be trained on any by `{spelled('train')}`"
        )
    if task.held_out:
        require_held_out(task.held_out, used_splits(run, task))
    look_at(task.train, task.val)
    identity = task.identity()  # builds a network, so that one that cannot be built leaves no folder behind
    workers = open_workers(create_task, settings, settings.device.device, known(task.settings.recipe.iterations))
    with folder.locked():
        folder.begin(identity, this_command(_PROG), defaults=TRAINING_DEFAULTS)
        with workers as opened:
            print_defaults(training_pictures(training.data, task.train), (training.recipe, task.settings.recipe))
            if words := weights_in_words(task.dense_task, task.settings.loss):
                print(words, file=sys.stderr)
            try:
                _train(task, opened, candidates, settings)
            finally:  # also after Ctrl-C: report what there is
                finish_reranking(directory, ranks(task, candidates, settings), settings.seeds, task.dense_task)
    _print_next(task, directory)


def _print_next(task: EndToEndTask, directory: Path) -> None:
    best, had = directory / "best_cell.json", task.settings
    if not best.exists():  # every cell has failed, which is said
        sys.exit(1)
    print_next(to_train(had.data, had.backbone, had.head, had.loss, had.machine, "--cell", best))


def candidates_of(run: Run, settings: RerankSettings) -> list[Candidate]:
    """The cells to compare with, then the best of the run by proxy score, of a search that was cut short those in full first.

    Of a search with two objectives those on its Pareto front. Raises InputError if the run has no score.
    """
    found = ranked(run.trials)
    places = {record.number: place for place, record in enumerate(found, start=1)}
    best = found[: settings.top] if run.cost_kind is None else front_of(run, found, settings.top)
    if not best:
        raise InputError(f"{run.directory} has no cell with a score yet: run its search first")
    if run.cost_kind is not None:
        print(f"{len(best)} of the {len(front_of(run, found))} cells on the Pareto front are trained", file=sys.stderr)
    elif len(best) < settings.top:
        print(f"{run.directory} has {len(best)} cells with a score, not {settings.top}: all are trained", file=sys.stderr)
    candidates, in_full = [], run.rungs[-1] if run.rungs else None
    for name, cell in load_cells(settings.compare, run.space.num_inputs).items():
        same = [r for r in run.baselines if r.name == name and canonical_form(r.cell) == canonical_form(cell)]
        costs = [record.result.cost(run.cost_kind) for record in same] if run.cost_kind else []
        cost = (run.cost_kind, sum(costs) / len(costs)) if run.cost_kind and costs else None
        candidates.append(Candidate(name, cell, tuple(record.result.score for record in same), None, in_full, cost=cost))
    for record in best:
        scores = (record.result.score,) if record.result else ()
        iterations = iterations_of(run, record) if run.rungs else None
        proxy = scores, places[record.number], iterations, is_in_full(run, record)
        cost = (run.cost_kind, record.cost(run.cost_kind)) if run.cost_kind else None
        candidates.append(Candidate(f"trial {record.number}", record.cell, *proxy, cost))
    return candidates


def used_splits(run: Run, task: EndToEndTask) -> list[Dataset]:
    """The splits that cells and networks are chosen by: those of the trainings, and of the search if it had other ones."""
    used, of_search = [task.train, task.val], run.settings.data
    if of_search == task.settings.data:
        return used
    if not is_named(of_search.dataset):
        print(f"warning: nobody knows whether `test_splits` have pictures of {of_search.dataset}", file=sys.stderr)
        return used
    try:
        return [*used, *open_splits(of_search)]
    except InputError as error:
        raise InputError(
            f"`test_splits` must have no picture of the search, and its data cannot be opened ({error}): restore them, or "
            "leave `test_splits` out"
        ) from error


def training_settings(settings: RerankSettings, run: Run) -> TrainingSettings:
    """The settings of each training: what is given, else what the run was made with."""
    overrides, of_run = settings.overrides, run.settings
    training = TrainingSettings(
        data=overrides.data(of_run.data),
        backbone=overrides.network(of_run.backbone),
        head=overrides.head(of_run.head, settings.dropout),
        loss=overrides.loss(of_run.loss),
        recipe=settings.recipe,
        machine=MachineSettings(
            device=resolve_device(settings.device.device),
            cache_dir=given(overrides.cache_dir, of_run.machine.cache_dir),
        ),
        seed=settings.seed,
    )
    return training


def _train(
    task: EndToEndTask, workers: Workers[EndToEndResult], candidates: list[Candidate], settings: RerankSettings
) -> None:
    """Train all that has no `result.json` yet, every cell once before any a second time: early tables have all cells."""
    queue = {}
    for seed in _seeds(settings):
        for candidate in candidates:
            folder = task.folder(candidate.cell, seed)  # equal cells with two names share one folder
            queue[folder] = Job(f"{candidate.name}, seed {seed[-1]}", candidate.cell, seed)
    total = len(queue)
    for folder in [folder for folder in queue if _is_done(task, folder)]:
        del queue[folder]
        _delete_state(folder)  # if an earlier process ended just before doing so
    with tqdm(total=total, initial=total - len(queue), desc="re-ranking", unit="cell") as bar:
        for outcome in outcomes(workers, queue.values()):
            _record(task, outcome)
            bar.update()


def _is_done(task: EndToEndTask, folder: Path) -> bool:
    """Whether a training has failed, or its network is trained and has all scores."""
    outcome = read_outcome(folder)
    if isinstance(outcome, EndToEndResult):
        return all(split.scores(folder) for split in task.held_out)
    return outcome is not None


def _seeds(settings: RerankSettings) -> Iterator[tuple[int, int]]:
    for k in range(settings.seeds):
        yield settings.seed, k


def _record(task: EndToEndTask, outcome: Outcome[EndToEndResult]) -> None:
    folder = task.folder(outcome.job.cell, outcome.job.seed)
    if outcome.is_passing:  # its state stays
        tqdm.write(f"{outcome.job.key} failed: {outcome.failure}; the same command goes on with it", file=sys.stderr)
        return
    if outcome.result is None:
        tqdm.write(f"{outcome.job.key} failed: {outcome.failure}; delete {folder} to try it again", file=sys.stderr)
    else:
        score = task.dense_task.score
        tested = ((split.name, scores) for split in task.held_out if (scores := split.scores(folder)))
        more = "".join(f", on {name} {score.text(scores.score)}" for name, scores in tested)
        tqdm.write(f"{outcome.job.key}: {score.name} {score.text(outcome.result.score)}{more}", file=sys.stderr)
    result = asdict(outcome.result) if outcome.result else None
    Folder(folder).write_result("result", {"result": result, "failure": outcome.failure})
    _delete_state(folder)


def _delete_state(folder: Path) -> None:
    """Delete optimiser, weights in training and best weights: together several times the size of the network that is kept."""
    for name in ("state.pt", "best.safetensors"):
        (folder / name).unlink(missing_ok=True)


def ranks(task: EndToEndTask, candidates: list[Candidate], settings: RerankSettings) -> list[Reranked]:
    """Rank the cells by what is trained so far."""
    rows = []
    for candidate in candidates:
        folders = [task.folder(candidate.cell, seed) for seed in _seeds(settings)]
        tested = {split.name: [split.scores(folder) for folder in folders] for split in task.held_out}
        rows.append(Trainings(candidate, [read_outcome(folder) for folder in folders], folders[0], tested))
    return rank(rows)


if __name__ == "__main__":
    run_command(RerankSettings, main, prog=_PROG, goes_on=True)
