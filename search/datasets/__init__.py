"""Data sets behind one small protocol: pictures with a label per pixel, and the dense task that says what labels are.

A data set called `x` is the module `search/datasets/x.py`, listed in `DATASETS`, with `LENGTHS` (its splits and how many
pictures each officially has) and a function `open_split(split, data_dir)`. One with labels for more tasks than one has the
others' functions in `OTHER_TASKS`, by the task's name, and one whose pictures are to be padded to one size for evaluation has
that size as `PAD_TO`. Modules are imported on first use, so a reader's dependencies are needed only for that data set. Any
other folder is described by a TOML file (`described.py`), and data that are objects in Python by `from_torch.py`.

What they share, from files to warnings:

    walk, patterns     which files there are, and which of them a pattern or a list means
    pictures, srgb     how a picture is opened, and how its pixels look; labels: what the numbers or colours of a label mean
    files              pairs of an image and a label as a data set; digests: what its files hold, as hashes
    counts, weights    what labels hold, in numbers; the weights of classes that follow from them
    facts, rules       what a label shows, and what is odd in it; copies: what occurs twice
    look, check        these at the start of every command, from a sample; and `python -m search.datasets check`, from all
"""

import importlib
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from reference.grid import Grid
from reference.upsampled_cross_entropy import IGNORE_INDEX as IGNORE_INDEX
from search.commands import spelled
from search.dense_tasks import DenseTask, Label
from search.errors import InputError
from search.folder import CONTENT
from search.settings import MAX_MEGAPIXELS, DataSettings, TaskName, TrainingPictures

DATASETS = ("shapes", "camvid", "cityscapes", "pascal_voc", "pascal_person_part")
SPLITS = ("train", "val")  # what a search needs; a data set may have more
VALIDATION = ("val", "valid", "validation")  # what data sets call the second one


class Sample(NamedTuple):
    """One picture: `image` (H, W, 3) uint8 RGB, `label` (H, W) as the task has it, `name` within its split.

    Where labels are not public (a test split), no pixel of the label is labelled.
    """

    image: NDArray[np.uint8]
    label: Label
    name: str


class Fingerprint(NamedTuple):
    """What a split consists of, as two hexadecimal digests that change with it.

    `images` is of the pictures, their names and their order, `labels` of the labels and what their values mean.
    """

    images: str
    labels: str


class Dataset(Protocol):
    """One split of a data set: `len(dataset)` samples, the same ones whenever they are read. Data sets that differ only in
    their task have different names.
    """

    @property
    def name(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def task(self) -> DenseTask: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`; IndexError beyond the end, InputError for a file that cannot be used."""

    def fingerprint(self) -> Fingerprint:
        """What the split consists of: the generator, or the content of the files. InputError for an unreadable file."""

    def problems(self) -> list[str]:
        """Problems found in lists and file names, one sentence each; pixels are checked when they are read."""


def contents(field: Literal["train_split", "val_split"], fingerprint: Fingerprint) -> dict[str, str]:
    """What stands in an identity for the images and the labels of the split that this field names."""
    return {f"{CONTENT}{part} of `{field}`": digest for part, digest in fingerprint._asdict().items()}


def is_named(name: str) -> bool:
    """Whether `open_dataset` takes the name; a data set that is an object in Python has another one."""
    return name in DATASETS or name.endswith(".toml")


def split_names(name: str) -> tuple[str, ...]:
    """Names of the splits of data set `name`. Raises InputError for an unknown name and for a bad description."""
    if name.endswith(".toml"):
        return tuple(importlib.import_module(".described", __name__).load_description(Path(name)).splits)
    if name not in DATASETS:
        raise InputError(
            f"`dataset` {name} is unknown; choose one of: {', '.join(DATASETS)}, or a TOML file that describes yours"
        )
    return tuple(importlib.import_module(f".{name}", __name__).LENGTHS)


def evaluation_size(name: str | None, grid: Grid) -> tuple[int, int] | None:
    """Height and width that pictures of data set `name` are padded to for evaluation; None: each has its own size.

    With features on another grid than the authors', it is the largest size on that grid within theirs: 512 for their 513.
    """
    if name not in DATASETS:
        return None
    size: tuple[int, int] | None = getattr(importlib.import_module(f".{name}", __name__), "PAD_TO", None)
    return None if size is None else grid.rounded_down(size)


def known_split(split: str, name: str) -> str:
    """The name that data set `name` has for the split: `val` may be called `valid`. Raises InputError for an unknown one."""
    splits = split_names(name)
    for known in VALIDATION if split == "val" else (split,):
        if known in splits:
            return known
    raise InputError(f"split {split!r} of {name} is unknown; choose one of: {', '.join(splits)}")


def open_unchecked(
    name: str,
    split: str,
    data_dir: Path | None,
    task: TaskName | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> Dataset:
    """Like `open_dataset`, but without raising the first of the data set's `problems()`.

    Raises InputError for an unknown name or split, and for a folder without anything to list.
    """
    split = known_split(split, name)
    dataset: Dataset
    if name.endswith(".toml"):
        dataset = importlib.import_module(".described", __name__).open_split(Path(name), split, data_dir)
    else:
        module = importlib.import_module(f".{name}", __name__)
        dataset = getattr(module, "OTHER_TASKS", {}).get(task, module.open_split)(split, data_dir)
    admitting = getattr(dataset, "admitting", None)  # of a data set that is made of files
    return dataset if admitting is None else admitting(max_megapixels)


def open_dataset(
    name: str,
    split: str,
    data_dir: Path | None,
    task: TaskName | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> Dataset:
    """Open `split` of data set `name`, one of `DATASETS` or a TOML file; `data_dir` is its folder, None for generated data.

    `task` chooses among the labels of a data set that has them for several. Files with more than `max_megapixels` are refused
    when they are read. Raises InputError for an unknown name or split, and for a folder that does not hold the whole data set.

    >>> dataset = open_dataset("shapes", "val", None)
    >>> image, label, name = dataset[0]
    >>> name, image.shape, label.shape
    ('val_000', (257, 257, 3), (257, 257))
    """
    dataset = open_unchecked(name, split, data_dir, task, max_megapixels)
    first, *others = dataset.problems() or [""]
    if others:
        check = f"{spelled('datasets check')} {name}"
        if data_dir is not None:
            check = f"{spelled('datasets check')} {name} --data-dir {data_dir}"
        first += f" ({len(others)} more: `{check}` lists them)"
    if first:
        raise InputError(first)
    return dataset


def training_pictures(data: DataSettings, train: Dataset) -> TrainingPictures:
    """What the defaults of a training follow from. Raises InputError for a first picture that cannot be used."""
    height, width = train[0].label.shape
    return TrainingPictures(data.dataset, len(train), (height, width))


def open_splits(data: DataSettings) -> tuple[Dataset, Dataset]:
    """The split to train on and the one to score on. Raises InputError as `open_dataset`, and for labels of another task."""
    data.check()
    train, val = (
        open_dataset(data.dataset, split, data.data_dir, data.task, data.max_megapixels)
        for split in (data.train_split, data.val_split)
    )
    if data.task not in (None, train.task.name):
        raise InputError(
            f"`task` {data.task} needs other labels: those of `dataset` {data.dataset} are for {train.task.name}; leave it "
            "out, or give another data set, such as a TOML file that describes yours"
        )
    return train, val
