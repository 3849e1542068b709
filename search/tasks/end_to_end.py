"""The true task (paper, section 4.2): train a whole network around a cell, from pictures to predictions, and score it.

Each training has its own folder, in which it continues after an interruption. With Ray on several machines, all of them must
see the same folder.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fast.segmentation import SegmentationNetwork
from reference.cell import Cell
from search.cells.cost import module_cost
from search.cells.space import cell_hash, load_cell
from search.datasets import open_splits, training_pictures
from search.datasets.look import require_labels
from search.datasets.weights import completed_loss
from search.dense_tasks import DenseTask, Scores
from search.devices import Devices
from search.errors import InputError
from search.files import write_text
from search.folder import Folder
from search.settings import TRAINING_DEFAULTS, TrainingSettings
from search.tasks.held_out import forget_scores, open_held_out
from search.tasks.proxy import NotFiniteError
from search.training.loop import NotFiniteTrainingError, Training, TrainingResult
from search.training.network import completed_training, create_network, training_identity
from search.training.scoring import require_validation


@dataclass(frozen=True)
class EndToEndResult:
    """The score of a cell in a network trained around it, and its cost.

    The score is that of the weights after the last iteration, not of the best validation: taking the best of several noisy
    validations would favour the cells whose scores vary most.
    """

    scores: Scores  # on the whole validation split
    parameters: int  # of the cell, as in the paper's Table 1
    multiply_adds: int  # of the cell, as in the paper's Table 1, for the first validation picture
    seconds: float  # training and validation, in all processes that worked on it

    @property
    def score(self) -> float:
        return self.scores.score


@dataclass(frozen=True)
class Failed:
    """A training that failed, and why."""

    reason: str


def read_outcome(folder: Path) -> EndToEndResult | Failed | None:
    """Read what came of the training in a folder, None before its end. Raises InputError for a damaged file."""
    training = Folder(folder)
    content = training.result("result")
    if content is None:
        return None
    try:
        if content["result"] is None:
            return Failed(str(content["failure"]))
        return EndToEndResult(**{**content["result"], "scores": Scores.restored(content["result"]["scores"])})
    except (KeyError, TypeError) as error:
        raise training.damaged("result", error) from error


def training_folder(directory: Path, cell: Cell, seed: Sequence[int]) -> Path:
    """The folder in the task's directory in which a cell is trained with a seed."""
    return directory / "-".join([cell_hash(cell), *map(str, seed)])


class EndToEndTask:
    """Scores cells by whole trainings in folders below `directory`; each with random numbers of its own.

    Unless told otherwise, each has one validation, after the last iteration. Its network is scored on the test splits too.

    Raises InputError for settings that cannot work.
    """

    def __init__(self, settings: TrainingSettings, directory: Path, test_splits: Sequence[str] = ()) -> None:
        self.directory = directory
        self.devices = Devices(settings.machine.device)
        self.train, self.val = open_splits(settings.data)
        require_labels(self.train, self.val)
        self.held_out = open_held_out(test_splits, settings.data)
        completed = completed_training(settings, training_pictures(settings.data, self.train)).validated_last()
        self.settings = replace(completed, loss=completed_loss(completed.loss, self.train, completed.machine.cache_dir))

    @property
    def dense_task(self) -> DenseTask:
        return self.train.task

    def identity(self) -> dict[str, Any]:
        """The settings that all scores depend on. A network is built for it, so what cannot work is refused here."""
        with torch.random.fork_rng(devices=[]):
            network = create_network(self.settings, load_cell("dpc"), self.dense_task)
            parts = training_identity(self.settings, network, self.train, self.val, self.devices)
            require_validation(network, self.val, self.settings.recipe, self.devices.device)
            for split in self.held_out:
                try:
                    require_validation(network, split.dataset, self.settings.recipe, self.devices.device)
                except InputError as error:
                    raise InputError(f"{error}, or leave `test_splits` out") from error
        return {name: value for name, value in parts.items() if name not in ("cell", "number of devices", "validate_every")}

    def folder(self, cell: Cell, seed: Sequence[int]) -> Path:
        """The folder of the training with this seed: state, curve, and at the end the network as `last.safetensors`."""
        return training_folder(self.directory, cell, seed)

    def evaluate(
        self, cell: Cell, seed: Sequence[int], on_step: Callable[[int], None] = lambda iteration: None
    ) -> tuple[EndToEndResult, None]:
        """Train a network with this cell, or continue to, and score it; of one that is trained, make the scores that lack.

        Returns no head, because the network is in the folder. Raises NotFiniteError, InputError and OSError.
        """
        folder = self.folder(cell, seed)
        result = read_outcome(folder)
        if not isinstance(result, EndToEndResult):
            forget_scores(folder)
            result = self._train(cell, seed, folder, on_step)
        for split in self.held_out:
            if split.scores(folder) is None:
                split.score(folder, self.settings.recipe, self.devices)
        return result, None

    def _train(self, cell: Cell, seed: Sequence[int], folder: Path, on_step: Callable[[int], None]) -> EndToEndResult:
        if not (folder / "cell.json").exists():  # a training keeps the order of branches that it began with
            write_text(folder / "cell.json", cell.to_json())
        cell = load_cell(str(folder / "cell.json"))
        number = int(np.random.SeedSequence(list(seed)).generate_state(1)[0])
        settings = replace(self.settings, seed=number)
        device = self.devices.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            network = create_network(settings, cell, self.dense_task)
            identity = training_identity(settings, network, self.train, self.val, self.devices)
            training = Folder(folder, "training")
            with training.locked():
                training.begin(identity, command="", defaults=TRAINING_DEFAULTS)
                try:
                    result = Training(settings, network, self.train, self.val, folder, self.devices).run(on_step)
                except NotFiniteTrainingError as error:
                    raise NotFiniteError(str(error)) from error
            return self._result(network, result)

    def _result(self, network: SegmentationNetwork, result: TrainingResult) -> EndToEndResult:
        height, width = self.val[0].label.shape
        cost = module_cost(network.head.context, network.backbone.grid.features((height, width))).total
        return EndToEndResult(
            scores=result.last,
            parameters=cost.parameters,
            multiply_adds=cost.multiply_adds,
            seconds=result.seconds,
        )
