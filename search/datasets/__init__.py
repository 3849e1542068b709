"""Data sets for the search: pictures with one class per pixel, behind one small protocol.

A data set called `x` is the module `search/datasets/x.py` with a function `open_split(split, data_dir)`, listed in
`DATASETS`; modules are imported on first use, so that a reader's dependencies matter only to those who ask for it.
"""

import importlib
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from reference.upsampled_cross_entropy import IGNORE_INDEX as IGNORE_INDEX
from search.cli import InputError

DATASETS = ("shapes", "camvid")
SPLITS = ("train", "val")


class Sample(NamedTuple):
    """One picture: `image` (H, W, 3) uint8 RGB, `label` (H, W) uint8 classes or `IGNORE_INDEX`, `name` within its split."""

    image: NDArray[np.uint8]
    label: NDArray[np.uint8]
    name: str


class Dataset(Protocol):
    """One split of a data set: `len(dataset)` samples, the same ones at every reading.

    `class_names` names the K classes 0 to K − 1, `palette` (K, 3) uint8 RGB colours them.
    """

    @property
    def name(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def class_names(self) -> tuple[str, ...]: ...
    @property
    def palette(self) -> NDArray[np.uint8]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`; IndexError beyond the end, InputError for a file that cannot be used."""

    def fingerprint(self) -> str:
        """Hexadecimal digest of what the samples come from: the generator, or the names and sizes of the files."""


def open_dataset(name: str, split: str, data_dir: Path | None) -> Dataset:
    """Open `split` ("train" or "val") of data set `name`; `data_dir` is its folder, None for generated data.

    Raises InputError for an unknown name or split, and for a folder that does not hold the data set.

    >>> dataset = open_dataset("shapes", "val", None)
    >>> image, label, name = dataset[0]
    >>> name, image.shape, label.shape
    ('val_000', (257, 257, 3), (257, 257))
    """
    if name not in DATASETS:
        raise InputError(f"--dataset {name} is unknown; choose one of: {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise InputError(f"split {split!r} is unknown; choose one of: {', '.join(SPLITS)}")
    dataset: Dataset = importlib.import_module(f"search.datasets.{name}").open_split(split, data_dir)
    return dataset
