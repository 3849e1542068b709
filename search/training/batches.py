"""The crops of a training in batches, loaded by other processes. They depend on the seed and the iteration alone."""

import signal
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from search.datasets import Dataset
from search.devices import Devices
from search.errors import InputError
from search.settings import RecipeSettings, known
from search.training.augmentation import Augmentation, Crop, TrainingCrops, stack


class Batches:
    """One process's share of every iteration's crops: `accumulate` batches, one for each pass."""

    def __init__(
        self, train: Dataset, augmentation: Augmentation, recipe: RecipeSettings, devices: Devices, seed: int
    ) -> None:
        self._crops = TrainingCrops(train, augmentation, seed)
        self._recipe, self._devices = recipe, devices
        self._batch_size, self._iterations = known(recipe.batch_size), known(recipe.iterations)
        self._passes = recipe.accumulate * devices.count  # all devices together
        self.size = self._batch_size // self._passes  # crops in a pass

    def of_iterations(self, first: int) -> Iterator[list[Crop]]:
        """Yield the batches of iteration `first` and of all later ones.

        Raises InputError for a picture that cannot be used, and if a loading process has died.
        """
        if first >= self._iterations:
            return
        positions = [
            range(start := iteration * self._batch_size + part * self.size, start + self.size)
            for iteration in range(first, self._iterations)
            for part in range(self._devices.rank, self._passes, self._devices.count)
        ]
        loader = DataLoader(
            cast(Any, self._crops),
            batch_sampler=cast(Any, positions),
            collate_fn=stack,
            num_workers=self._recipe.loading_processes,
            worker_init_fn=_ignore_ctrl_c,
            generator=torch.Generator(),  # otherwise it would draw from the random stream of the dropout
            pin_memory=self._devices.device.type == "cuda",
        )
        batches = iter(loader)
        for _ in range(first, self._iterations):
            yield [_usable(_next(batches)) for _ in range(self._recipe.accumulate)]

    def for_statistics(self) -> Iterator[Tensor]:
        """The images (n, 3, h, w) of the first batches, from which batch norm statistics are computed."""
        for start in range(0, self._recipe.statistics_batches * self.size, self.size):
            batch = _usable(stack([self._crops[position] for position in range(start, start + self.size)]))
            yield batch.image.to(self._devices.device)


def _next(batches: Iterator[Crop]) -> Crop:
    try:
        return next(batches)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise InputError(
            f"a process that loads pictures has ended ({reason}): free memory, shared memory (/dev/shm) above all, or give 0 "
            "as `loading_processes`, to load in the training process; the same command goes on"
        ) from error


def _usable(batch: Crop) -> Crop:
    if batch.problem:
        raise InputError(batch.problem)
    return batch


def _ignore_ctrl_c(worker: int) -> None:
    """Ignore Ctrl-C, which the terminal also sends to loading processes: the training would see their end as an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
