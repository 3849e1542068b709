"""Cityscapes with fine annotations (Cordts et al., CVPR 2016): 19 classes of street scenes, 1024 × 2048.

    leftImg8bit/{train,val,test}/<city>/<city>_000000_000019_leftImg8bit.png
    gtFine/{train,val,test}/<city>/<city>_000000_000019_gtFine_labelIds.png

as `leftImg8bit_trainvaltest.zip` and `gtFine_trainvaltest.zip` unpack. 19 of the 34 label ids are classes; the table is
torchvision's copy of the official one. The test split has no real labels, so all of its pixels are 255.
"""

from pathlib import Path

import numpy as np
from torchvision.datasets import Cityscapes

from search.datasets import IGNORE_INDEX
from search.datasets.files import FileDataset, LeftOut, Pair, repeated, require_layout
from search.datasets.labels import LabelReader
from search.datasets.walk import walk
from search.dense_tasks.segmentation import Segmentation
from search.errors import InputError

_CLASSES = sorted(
    (label for label in Cityscapes.classes if 0 <= label.train_id < IGNORE_INDEX), key=lambda label: label.train_id
)
CLASS_NAMES = tuple(label.name for label in _CLASSES)
PALETTE = np.array([label.color for label in _CLASSES], np.uint8)
PALETTE.flags.writeable = False
LABEL_IDS = tuple(label.id for label in _CLASSES)
LENGTHS = {"train": (2975,), "val": (500,), "trainval": (3475,), "test": (1525,)}

_ORIGIN = "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of cityscapes-dataset.com"
_IMAGE, _LABEL = "_leftImg8bit.png", "_gtFine_labelIds.png"
_LABELS = LabelReader(
    # The licence plate has id −1, which occurs in no file.
    {label.id: label.train_id for label in Cityscapes.classes if label.id >= 0},
    remedy=f"it must be a *{_LABEL} of {_ORIGIN}",
)


def open_split(split: str, data_dir: Path | None) -> FileDataset:
    """List the pictures of `split` in `data_dir`, by name. Raises InputError for a folder that is missing or empty."""
    if data_dir is None:
        raise InputError(f"`dataset` cityscapes needs `data_dir`: the folder with leftImg8bit/ and gtFine/ from {_ORIGIN}")
    parts = [_list_pairs(part, data_dir) for part in (("train", "val") if split == "trainval" else (split,))]
    pairs = [pair for part, _, _ in parts for pair in part]
    hidden = [path for _, _, paths in parts for path in paths]
    listing = data_dir / "leftImg8bit" / split
    return FileDataset(
        name="cityscapes",
        split=split,
        task=Segmentation(CLASS_NAMES, PALETTE, LABEL_IDS, grey_files=True),  # what the test server takes
        pairs=tuple(pairs),
        read_label=_LABELS,
        listing=listing,
        faults=(*(fault for _, faults, _ in parts for fault in faults), *repeated((pair.name for pair in pairs), listing)),
        official_lengths=LENGTHS[split],
        left_out=(LeftOut("hidden", len(hidden), hidden[0]),) if hidden else (),
    )


def _list_pairs(split: str, data_dir: Path) -> tuple[list[Pair], list[str], list[Path]]:
    """The pictures in the folder of images, an error sentence for each label without a picture, and the hidden files."""
    image_dir, label_dir = data_dir / "leftImg8bit" / split, data_dir / "gtFine" / split
    layout = f"expected leftImg8bit/{split}/ and gtFine/{split}/ from {_ORIGIN}; correct `data_dir` or unpack them there"
    require_layout(data_dir, (image_dir, label_dir), layout)
    images, labels = walk(image_dir), walk(label_dir)
    if stray := [path for path in images.files if path.parent == image_dir]:
        raise InputError(f"{stray[0]} lies among the folders of the cities; remove it")
    pairs = [
        Pair(name, path, label_dir / path.parent.name / f"{name}{_LABEL}")
        for path in sorted(images.files, key=str)
        if (name := path.name.removesuffix(_IMAGE)) != path.name
    ]
    if not pairs:
        raise InputError(f"folder {image_dir} holds no <city>/*{_IMAGE}; {layout}")
    with_image = {pair.label for pair in pairs}
    widowed = [path for path in labels.files if path.name.endswith(_LABEL) and path not in with_image]
    faults = [f"label {path} has no image in {image_dir}; restore the image, or remove the label" for path in widowed]
    return pairs, faults, [*images.hidden, *labels.hidden]
