"""Train a whole network end to end, from pictures to predictions, as the authors do: `python -m search.train`.

Without flags it trains a small network on generated scenes in about two minutes. The same command continues an interrupted
training and gives the same losses as if it had not been interrupted. docs/training.md explains what follows the authors and
where the defaults differ.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fast.model_card import write_card
from reference.cell import Cell
from search.cells.space import load_cell
from search.cli import Flat, print_defaults, print_next, run_command, spelled, this_command, uses_of_network
from search.datasets import Dataset, open_splits, training_pictures
from search.datasets.look import look_at, require_labels
from search.datasets.weights import completed_loss
from search.devices import Devices, join_devices
from search.errors import InputError
from search.folder import Folder
from search.settings import (
    SHAPES,
    TRAINING_DEFAULTS,
    BackboneSettings,
    DataSettings,
    HeadSettings,
    LossSettings,
    MachineSettings,
    RecipeSettings,
    TrainingPictures,
    TrainingSettings,
    plain,
)
from search.training.loop import NotFiniteTrainingError, Training, TrainingResult
from search.training.network import completed_training, create_network, initial_network, kind_of, training_identity
from search.training.scoring import require_validation

_PROG = spelled("train")
_RENAMED = {"--workers": "--loading-processes"}


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Train a whole network: backbone, dense prediction cell, decoder if wanted, classifier.

    On several devices: start it by torchrun or accelerate launch.
    """

    cell: str | None = None
    """linear, mlp, aspp, psp, dpc, or the path of a cell's JSON file. None: dpc."""
    run: Path | None = None
    """Folder of a search (runs/x), to train its best cell."""
    init: Path | None = None
    """Network to start from, with its architecture; with other outputs its last layer begins anew."""
    head: Path | None = None
    """Head to start from, which a search has kept (runs/x/heads/best.safetensors), behind the backbone that it was trained on;
    where that one's weights are, the flags of the search say."""
    seed: int = 0
    """Seed of everything: initial weights, order of the pictures, crops, dropout."""
    out: Path | None = None
    """Folder of the training. None: runs/train/ and the data set's name."""
    data: Flat[DataSettings] = DataSettings()
    backbone: Flat[BackboneSettings] = BackboneSettings()
    new_head: Flat[HeadSettings] = HeadSettings()
    loss: Flat[LossSettings] = LossSettings()
    recipe: Flat[RecipeSettings] = RecipeSettings()
    machine: Flat[MachineSettings] = MachineSettings()

    def training(self, pictures: TrainingPictures) -> TrainingSettings:
        """The settings that every training has, completed for the pictures to train on, and checked. Raises InputError."""
        settings = TrainingSettings(
            data=self.data,
            backbone=self.backbone,
            head=self.new_head,
            loss=self.loss,
            recipe=self.recipe,
            machine=self.machine,
            seed=self.seed,
        )
        return completed_training(settings, pictures, self.begun)

    @property
    def begun(self) -> Path | None:
        """The file that the training begins with, a network or a head."""
        return self.head if self.init is None else self.init


def main(settings: TrainSettings) -> None:
    """Train, or continue a training, then print where the network is."""
    _check(settings)
    train, val = open_splits(settings.data)
    training = settings.training(training_pictures(settings.data, train))
    devices = join_devices(settings.machine.device)
    try:
        if devices.rank == 0:
            look_at(train, val)
        require_labels(train, val)
        training = replace(training, loss=completed_loss(training.loss, train, training.machine.cache_dir))
        directory = settings.out or Path("runs") / "train" / train.name
        result = _train(settings, training, train, val, directory, devices)
        if devices.rank == 0:
            score = val.task.score
            print(f"best {score.name} on {val.name} {val.split}: {score.text(result.best)}")
            print(f"network: {directory / 'best.safetensors'}")
            print(f"its model card: {write_card(directory / 'best.safetensors')}")
            print_next(*uses_of_network(directory / "best.safetensors", settings.data, val))
    except NotFiniteTrainingError as error:
        raise InputError(
            f"{error}: begin again with a lower `learning_rate` or more `slow_start_iterations`, and another `out`; "
            f"{directory} keeps what was good before"
        ) from error
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"the device's memory is full: give `accumulate` {2 * settings.recipe.accumulate}, or a smaller `crop_size`"
        ) from error
    finally:
        devices.close()


def _train(
    settings: TrainSettings, training: TrainingSettings, train: Dataset, val: Dataset, directory: Path, devices: Devices
) -> TrainingResult:
    if settings.begun is not None:
        network = initial_network(training, settings.begun, train.task)
    else:
        network = create_network(training, _cell(settings, train.name, len(training.backbone.layers)), train.task)
    identity = training_identity(training, network, train, val, devices, settings.begun)
    require_validation(network, val, training.recipe, devices.device)
    folder = Folder(directory, "training")
    with folder.locked() if devices.rank == 0 else nullcontext():  # only the first process writes
        if devices.rank == 0:
            folder.begin(identity, this_command(_PROG), defaults=TRAINING_DEFAULTS)
            pictures = training_pictures(settings.data, train)
            head = [] if settings.begun is not None else [(settings.new_head, training.head)]  # else it is in the file
            print_defaults(pictures, *head, (settings.recipe, training.recipe))
        source = plain(settings) | plain(training) | {"init": plain(settings.begun)}
        begins_with_head = settings.head is not None
        return Training(
            training, network, train, val, directory, devices, source=source, validates_first=begins_with_head
        ).run()


def _cell(settings: TrainSettings, dataset: str, num_inputs: int) -> Cell:
    """The named cell, or the best of a search on this data set. Raises InputError if it has scored no cell yet."""
    if settings.run is None:
        return load_cell(settings.cell or "dpc", num_inputs)
    path = settings.run / "best_cells" / "rank_01.json"
    if not path.is_file():
        raise InputError(
            f"`run` {settings.run} has no {path.relative_to(settings.run)}: give the folder of a search that has scored a cell"
        )
    description = Folder(settings.run, remedy=f"give the folder of another search, or {path} as `cell`").description() or {
        "identity": {}
    }
    searched = description["identity"].get("dataset", dataset)
    if settings.data.dataset == SHAPES and searched != dataset:  # hardly meant: whoever wants it names the cell
        raise InputError(
            f"`run` {settings.run} searched on {searched}, and this would train on {dataset}: give that `dataset` and `task`, "
            f"or {path} as `cell`"
        )
    return load_cell(str(path))


def _check(settings: TrainSettings) -> None:
    if settings.cell is not None and settings.run is not None:
        raise InputError("`cell` and `run` both name a cell: leave one out")
    if settings.init is not None and settings.head is not None:
        raise InputError("`init` and `head` both begin a training: leave one out")
    if settings.init is not None and kind_of(settings.init) == "head":
        raise InputError(f"`init` {settings.init} is a head, which has no backbone: give it as `head`")
    if settings.head is not None and kind_of(settings.head) == "network":
        raise InputError(f"`head` {settings.head} is a whole network: give it as `init`")
    brought: dict[str, object] = {} if settings.begun is None else {"`cell`": settings.cell, "`run`": settings.run}
    if settings.init is not None:
        names = ("backbone", "weights", "pretrained", "output_stride", "layers", "patch_size")
        values = {name: getattr(settings.backbone, name) for name in names}
        brought |= {f"`{name}`": value for name, value in values.items() if value != getattr(BackboneSettings, name)}
        brought["`decoder`"] = settings.recipe.decoder
    if given := [field for field, value in brought.items() if value]:
        begun = "`init`" if settings.head is None else "`head`"
        raise InputError(f"{begun} brings its own architecture and weights: leave out {', '.join(given)}")


if __name__ == "__main__":
    run_command(TrainSettings, main, prog=_PROG, goes_on=True, renamed=_RENAMED)
