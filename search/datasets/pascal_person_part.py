"""PASCAL-Person-Part (Chen et al., CVPR 2014 and 2016): six parts of people in pictures of PASCAL VOC 2010.

    JPEGImages/*.jpg
    SegmentationPart/*.png      or PASCAL-Part's original Annotations_Part/*.mat
    list/train_id.txt, list/val_id.txt

If both kinds of labels exist, the PNGs are used. Some copies of the data set exchange the numbers of upper and lower limbs,
which exchanges their names but does not change the mIOU.
"""

from pathlib import Path

from search.datasets import IGNORE_INDEX
from search.datasets.files import FileDataset, Pair, read_lines, repeated, require_layout
from search.datasets.labels import LabelReader
from search.datasets.matlab import read_person_parts
from search.datasets.pictures import RESTORE
from search.dense_tasks.segmentation import Segmentation, voc_palette
from search.errors import InputError

CLASS_NAMES = ("background", "head", "torso", "upper arms", "lower arms", "upper legs", "lower legs")
PALETTE = voc_palette(len(CLASS_NAMES))
# The papers' validation set has 1,817 pictures; the list that is distributed with the converted labels has 14 more.
LENGTHS = {"train": (1716,), "val": (1817, 1831), "trainval": (3533, 3547)}

_ORIGIN = "PASCAL-Person-Part (pictures of VOC 2010; docs/datasets.md says where from)"
_LABELS = LabelReader(
    {**{value: value for value in range(len(CLASS_NAMES))}, IGNORE_INDEX: IGNORE_INDEX},
    remedy=RESTORE,
    read_mat=read_person_parts,
)


def open_split(split: str, data_dir: Path | None) -> FileDataset:
    """List the pictures of `split` in `data_dir`. Raises InputError for a folder or list that is missing or empty."""
    if data_dir is None:
        raise InputError(f"`dataset` pascal_person_part needs `data_dir`: the folder that holds {_ORIGIN}")
    originals = data_dir / "Annotations_Part"
    converted = data_dir / "SegmentationPart"
    labels, suffix = (originals, ".mat") if originals.is_dir() and not converted.is_dir() else (converted, ".png")
    listings = [data_dir / "list" / f"{part}_id.txt" for part in (("train", "val") if split == "trainval" else (split,))]
    layout = (
        f"expected JPEGImages/, SegmentationPart/ (or Annotations_Part/) and list/{listings[0].name} of {_ORIGIN}; "
        "correct `data_dir` or restore them"
    )
    require_layout(data_dir, [data_dir / "JPEGImages", labels, *listings], layout)
    names = [line for listing in listings for _, line in read_lines(listing, f"restore the list of {_ORIGIN}")]
    listing = listings[0] if len(listings) == 1 else data_dir / "list"
    return FileDataset(
        name="pascal_person_part",
        split=split,
        task=Segmentation(CLASS_NAMES, PALETTE),
        pairs=tuple(Pair(name, data_dir / "JPEGImages" / f"{name}.jpg", labels / f"{name}{suffix}") for name in names),
        read_label=_LABELS,
        listing=listing,
        faults=tuple(repeated(names, listing)),
        official_lengths=LENGTHS[split],
    )
