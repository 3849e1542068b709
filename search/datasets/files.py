"""Data sets made of files: pairs of an image and a label, listed and checked in one way, with the same error messages."""

import codecs
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Self

from numpy.typing import NDArray

from search.datasets import Dataset, Fingerprint, Sample
from search.datasets.digests import digests
from search.datasets.labels import ColourReader, DepthReader, LabelReader
from search.datasets.pictures import PictureReader, picture_size
from search.dense_tasks import DenseTask, Label
from search.errors import InputError

_READING = 1  # to be raised when the same files are read as other pictures, or labels, than before


class Pair(NamedTuple):
    """A picture's name within its split, its image, and its label; None where the truth is not public."""

    name: str
    image: Path
    label: Path | None


class LeftOut(NamedTuple):
    """Files that lie among those of a split and are none of its pictures or labels: why, how many, and one of them."""

    reason: str
    number: int
    example: Path


@dataclass(frozen=True, kw_only=True, eq=False)
class FileDataset:
    """One split of pictures on disk, a `Dataset`.

    `listing` is the list or folder from which the pairs' names come, and `faults` are its problems. `official_lengths` are the
    numbers of pictures that a complete split may have (none if unknown), `alternative` is added to the message about a missing
    file, `recipe` is what the labels depend on besides their files, and `description` the TOML file that says what they mean:
    then the files are the user's own, so that nobody can restore them. `left_out` are files that are passed over. `pictures`
    reads the files.
    """

    name: str
    split: str
    task: DenseTask = field(repr=False)
    pairs: tuple[Pair, ...] = field(repr=False)
    read_label: LabelReader | ColourReader | DepthReader = field(repr=False)
    listing: Path
    faults: tuple[str, ...] = ()
    official_lengths: tuple[int, ...] = ()
    alternative: str = ""
    recipe: str = ""
    description: Path | None = None
    left_out: tuple[LeftOut, ...] = ()
    pictures: PictureReader = field(default=PictureReader(), repr=False)

    def __post_init__(self) -> None:
        """Refuse names, which a list may give, that would lead out of a folder in which something is written by them."""
        for pair in self.pairs:
            parts = PurePosixPath(pair.name.replace("\\", "/")).parts
            if not parts or ".." in parts or parts[0] == "/" or "\0" in pair.name:
                raise InputError(
                    f"{self.listing} names a picture {pair.name!r}, which leads out of its folder: correct the list"
                )

    def admitting(self, max_megapixels: float) -> Self:
        """The same pictures, of which those with more megapixels are refused."""
        return replace(self, pictures=replace(self.pictures, max_megapixels=max_megapixels))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self.pairs):
            raise IndexError(f"picture {index} of {len(self.pairs)}")
        name, image_path, label_path = self.pairs[index]
        image, image_error = self._attempt(self.pictures.image, image_path)
        if label_path is None and image is not None:
            return Sample(image, self.task.unlabelled((image.shape[0], image.shape[1])), name)
        label, label_error = self._attempt(self._read_label, label_path) if label_path else (None, "")
        if image is None or label is None:
            raise InputError("; ".join(filter(None, (image_error, label_error))))
        if image.shape[:2] != label.shape:
            remedy = "restore both from the original data set"
            if self.description:
                remedy = "scale the label without interpolation, or take the picture out of the split"
                if image.shape[1::-1] == label.shape:
                    remedy = "turn the label as viewers show the image, or save the image upright without its tag"
            raise InputError(
                f"label {label_path} is {_size(label)}, its image {image_path} is {_size(image)} (height × width); "
                f"they must be equal: {remedy}"
                + " (an image is turned as its orientation tag, EXIF, says)"
                * (image.shape[1::-1] == label.shape)
            )
        return Sample(image, label, name)

    def label(self, index: int) -> Label:
        """The label alone (H, W), of which no pixel is labelled where it is not public; InputError if it cannot be used."""
        _, image_path, label_path = self.pairs[index]
        if label_path is None:
            return self.task.unlabelled(picture_size(image_path, self.pictures.remedy))
        label, error = self._attempt(self._read_label, label_path)
        if label is None:
            raise InputError(error)
        return label

    def fingerprint(self) -> Fingerprint:
        """What the files hold, wherever they are; a label corrected in place is another one. Each is read once."""
        labels = [pair.label for pair in self.pairs if pair.label is not None]
        held = iter(digests([*(pair.image for pair in self.pairs), *labels], f"content of {self.name} {self.split}"))
        of_images = [[pair.name, next(held)] for pair in self.pairs]
        of_labels = [None if pair.label is None else next(held) for pair in self.pairs]
        parts = [_READING, self.split, of_images], [_READING, self.recipe, of_labels]
        return Fingerprint(*(hashlib.sha256(json.dumps(part).encode()).hexdigest() for part in parts))

    def problems(self) -> list[str]:
        if fault := self.absence_of_all_labels():
            images = [pair.image for pair in self.pairs if not pair.image.is_file()]
            return [*self.faults, fault, *map(self._absence, images)]
        absent = [path for pair in self.pairs for path in pair[1:] if path is not None and not path.is_file()]
        return [*self.faults, *map(self._absence, absent)]

    def absence_of_all_labels(self) -> str:
        """A sentence if no label is there, in place of one for each, which would say too little; nothing otherwise."""
        labels = {pair.label for pair in self.pairs if pair.label is not None}
        if len(labels) < 2 or any(label.is_file() for label in labels):
            return ""
        where = f"labels in {self.description}" if self.description else "where labels are looked for"
        example = f"such as {min(labels)}{self.alternative}"
        return f"none of the {len(labels)} labels of {self.split} is there, {example}: restore them, or correct {where}"

    @property
    def _read_label(self) -> Callable[[Path], NDArray[Any]]:
        return partial(self.read_label, pictures=self.pictures)

    def _attempt(self, read: Callable[[Path], NDArray[Any]], path: Path) -> tuple[NDArray[Any] | None, str]:
        """Return what was read or the error, so that an image's error does not hide that of its label."""
        if not path.is_file():
            return None, self._absence(path)
        try:
            return read(path), ""
        except InputError as error:
            return None, str(error)

    def _absence(self, path: Path) -> str:
        return (
            f"{path}{self.alternative} is missing though {self.listing} names it; "
            "restore the file, or take the picture out of the split"
        )


def example_picture(dataset: Dataset) -> Path | None:
    """The file of the first picture; None if pictures are not in files."""
    return dataset.pairs[0].image if isinstance(dataset, FileDataset) else None


def largest_picture(dataset: Dataset) -> tuple[str, tuple[int, int]]:
    """Name, height and width of the picture with the most pixels; of the first one if pictures are not in files."""
    if isinstance(dataset, FileDataset):
        sizes = ((pair.name, picture_size(pair.image, dataset.pictures.remedy)) for pair in dataset.pairs)
        return max(sizes, key=lambda found: math.prod(found[1]))
    image, _, name = dataset[0]
    return name, (image.shape[0], image.shape[1])


def origin_of(dataset: Dataset) -> str:
    """The list or folder that names the pictures, which tells data sets of one name apart; "" if pictures are not in files."""
    return str(dataset.listing.absolute()) if isinstance(dataset, FileDataset) else ""


def require_layout(data_dir: Path, paths: Iterable[Path], layout: str) -> None:
    """Refuse a folder without one of `paths` (files if they have a suffix, else folders); `layout` says what is expected."""
    if not data_dir.is_dir():
        raise InputError(f"`data_dir` {data_dir} is not a folder; {layout}")
    if not any(data_dir.iterdir()):
        raise InputError(f"`data_dir` {data_dir} is empty; {layout}")
    for path in paths:
        if path.suffix and not path.is_file():
            raise InputError(f"list {path} is missing; {layout}")
        if not path.suffix and not path.is_dir():
            raise InputError(f"folder {path} is missing; {layout}")


def read_lines(path: Path, remedy: str) -> list[tuple[int, str]]:
    """Read the non-blank lines of a list, with their numbers. Raises InputError for a list that is empty or not text."""
    try:
        text = decoded(path.read_bytes())
    except UnicodeDecodeError as error:
        raise InputError(f"list {path} is no text in UTF-8 ({error.reason} at byte {error.start}); {remedy}") from error
    except FileNotFoundError as error:
        raise InputError(f"list {path} is missing; {remedy}") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not lines:
        raise InputError(f"list {path} is empty; {remedy}")
    return lines


def decoded(content: bytes) -> str:
    """A text in UTF-8, or in UTF-16 if it begins with its mark, as PowerShell writes. Raises UnicodeDecodeError otherwise."""
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if marked else "utf-8-sig").replace("\r\n", "\n")  # editors begin UTF-8 with a mark, too


def omissions(dataset: Dataset) -> str:
    """What is passed over in the split's folders, as a sentence; "" if nothing is."""
    if not isinstance(dataset, FileDataset) or not dataset.left_out:
        return ""
    parts = [f"{number:,} {reason} (such as {example})" for reason, number, example in dataset.left_out]
    return f"{dataset.split}: {len(dataset):,} pictures; left out: {', '.join(parts)}"


def repeated(names: Iterable[str], listing: Path) -> list[str]:
    """An error sentence for each name that occurs more than once."""
    return [
        f"{listing} lists {name} {count} times; keep one of its lines" for name, count in Counter(names).items() if count > 1
    ]


def _size(pixels: NDArray[Any]) -> str:
    return f"{pixels.shape[0]}×{pixels.shape[1]}"
