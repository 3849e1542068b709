"""The true task (paper, section 4.2): train a whole network around a cell, from images to classes, and score it.

It is `search.train` for one cell after another, by the workers of the search. Each training has a folder of its own, and one
that was interrupted goes on in it. Under Ray on several machines they must see the same folder.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fast.checkpoint import load_network
from reference.cell import Cell
from search.cells.cost import module_cost
from search.cells.space import cell_hash
from search.cli import flags_called
from search.datasets import open_dataset
from search.devices import Devices
from search.errors import InputError
from search.features import write_text
from search.tasks.proxy import NotFiniteError
from search.train import NotFiniteTrainingError, TrainSettings, check, complete, create_network, identity, train_network


@dataclass(frozen=True)
class EndToEndResult:
    """What a cell is worth in a network trained around it, and what it costs.

    The score is that of the weights after the last iteration, not of the best validation: a maximum over noisy validations
    would favour the cells whose scores vary most.
    """

    mean_iou: float  # on the whole validation split, 0..1
    class_iou: tuple[float | None, ...]  # None: the class is neither in the labels nor predicted
    parameters: int  # of the cell, as in the paper's Table 1
    multiply_adds: int  # of the cell, as in the paper's Table 1, for the first validation picture
    seconds: float  # of training and validation, in all processes that worked on it


def training_folder(directory: Path, cell: Cell, seed: Sequence[int]) -> Path:
    """Where in the task's directory a cell is trained with a seed."""
    return directory / "-".join([cell_hash(cell), *map(str, seed)])


class EndToEndTask:
    """Scores cells by whole trainings in folders below `directory`; the cell, folder and seed of `settings` are not used.

    `flags` are the flags of `search.train` that the command of the caller has by other names, for errors. Raises InputError
    for settings that cannot work.
    """

    def __init__(self, settings: TrainSettings, directory: Path, flags: Mapping[str, str] | None = None) -> None:
        self.settings = complete(settings)
        self.directory = directory
        self.flags = flags or {}
        with flags_called(self.flags):
            check(replace(self.settings, cell="dpc", run=None))  # any cell: an --init would bring one of its own
            self.devices = Devices(settings.device)
            self.train, self.val = (
                open_dataset(settings.dataset, split, settings.data_dir)
                for split in (settings.train_split, settings.val_split)
            )

    def identity(self) -> dict[str, Any]:
        """What all scores depend on, by the names of the flags; it takes building a network, whose problems show here."""
        settings = replace(self.settings, cell=None, run=None)
        with torch.random.fork_rng(devices=[]), flags_called(self.flags):
            network = create_network(settings, self.train)
            parts = identity(settings, network, self.train, self.val, self.devices)
        return {field: value for field, value in parts.items() if field != "cell"}

    def folder(self, cell: Cell, seed: Sequence[int]) -> Path:
        """Where the cell is trained with this seed: state, curve, and at the end the network as `last.safetensors`."""
        return training_folder(self.directory, cell, seed)

    def evaluate(
        self, cell: Cell, seed: Sequence[int], on_step: Callable[[int], None] = lambda iteration: None
    ) -> tuple[EndToEndResult, None]:
        """Train, or go on with, and score a network with this cell.

        Returns the result alone, because the network lies in the folder. Raises NotFiniteError, InputError and OSError.
        """
        folder = self.folder(cell, seed)
        if not (folder / "cell.json").exists():  # what began with its branches in another order goes on in that order
            write_text(folder / "cell.json", cell.to_json())
        number = int(np.random.SeedSequence(list(seed)).generate_state(1)[0])
        settings = replace(self.settings, cell=str(folder / "cell.json"), run=None, out=folder, seed=number)
        device = self.devices.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), flags_called(self.flags):
            try:
                train_network(settings, self.train, self.val, folder, self.devices, [], on_step)
            except NotFiniteTrainingError as error:
                raise NotFiniteError(str(error)) from error
            return self._result(folder / "last.safetensors"), None

    def _result(self, path: Path) -> EndToEndResult:
        try:
            network, description = load_network(path)
        except ValueError as error:
            raise InputError(f"{error}; delete the folder {path.parent} and run the same command again") from error
        context, stride = network.head.context, network.backbone.output_stride
        height, width = (-(-(extent - 1) // stride) + 1 for extent in self.val[0].label.shape)
        cost = module_cost(context, (height, width)).total
        source = description["source"]
        return EndToEndResult(
            mean_iou=source["mean_iou"],
            class_iou=tuple(source["class_iou"]),
            parameters=cost.parameters,
            multiply_adds=cost.multiply_adds,
            seconds=source["seconds"],
        )
