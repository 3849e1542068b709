"""Label files: what a number or a colour per pixel means, one reader for each kind of file.

A label file holds what its data set says; a `LabelReader` or a `ColourReader` turns it into a class or 255, a `DepthReader`
into metres. `PictureReader.label` sees to it that the numbers and colours are those that were stored.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from search.datasets import IGNORE_INDEX
from search.datasets.pictures import PictureReader, mode_and_palette
from search.dense_tasks import RGB
from search.errors import InputError

MOST_VALUES = 65536  # of a label with 16 bits

_MANY = 8  # unknown colours in one label, so that it was hardly drawn by hand
_ANY = PictureReader()
_COLOURS = ("1", "L", "LA", "P", "PA", "RGB", "RGBX", "RGBA")  # kinds of pixels that are colours as they are stored
_FORMS = {"1": "with 1 bit", "L": "in 8-bit grey", "P": "with a palette", "I;16": "in 16-bit grey"}
_APART = 8  # least difference of two classes' colours, in one of red, green and blue; Cityscapes' most similar two have 20


@dataclass(frozen=True, eq=False)
class LabelReader:
    """Reads label files of 1, 8 or 16 bits whose value v means the class `train_ids[v]`, or 255.

    Any other value is refused, or means 255 too if `ignores_others`. `remedy` ends the error message about an unusable label.
    `read_mat` reads the values of a `.mat` file, for data sets that have such files. `presumed` are values that mean 255
    though nobody said so.
    """

    train_ids: Mapping[int, int]
    remedy: str
    read_mat: Callable[[Path], NDArray[np.uint8]] | None = None
    ignores_others: bool = False
    presumed: frozenset[int] = frozenset()

    def __call__(self, path: Path, pictures: PictureReader = _ANY) -> NDArray[np.uint8]:
        """(H, W) uint8, classes or 255. Raises InputError naming the file."""
        return self.meaning(self.values(path, pictures), path)

    def values(self, path: Path, pictures: PictureReader = _ANY) -> NDArray[Any]:
        """The values (H, W) as the file has them, whatever they mean. Raises InputError naming the file."""
        return self.read_mat(path) if self.read_mat and path.suffix == ".mat" else self._read_picture(path, pictures)

    def meaning(self, values: NDArray[Any], path: Path) -> NDArray[np.uint8]:
        """What the values of a file mean: (H, W) uint8, classes or 255. Raises InputError for values that mean nothing."""
        present = np.flatnonzero(np.bincount(values.ravel())).tolist()
        unknown = [value for value in present if value not in self.train_ids]
        if unknown and not self.ignores_others:
            raise InputError(
                f"label {path} holds the value{'s' if len(unknown) > 1 else ''} {spans(unknown)}; "
                f"allowed are {self._meaning()}: {self.remedy}"
            )
        table = np.full(MOST_VALUES, IGNORE_INDEX, np.uint8)
        table[list(self.train_ids)] = list(self.train_ids.values())
        classes: NDArray[np.uint8] = table[values]
        return classes

    def _read_picture(self, path: Path, pictures: PictureReader) -> NDArray[Any]:
        picture = pictures.label(path)
        numbers = _numbers(picture)
        if numbers is None:
            raise InputError(
                f"label {path} must be a picture of 8 or 16 bits with one channel that holds class numbers, "
                f"it has mode {picture.mode}; {self.remedy}"
            )
        return _require_16_bits(numbers, path, self.remedy)

    def _meaning(self) -> str:
        classes = [value for value, train_id in self.train_ids.items() if train_id != IGNORE_INDEX]
        void = [value for value, train_id in self.train_ids.items() if train_id == IGNORE_INDEX]
        return f"{spans(classes)} for the classes" + (f" and {spans(void)} for void" if void else "")


@dataclass(frozen=True, eq=False)
class ColourReader:
    """Reads label pictures whose colours mean classes: `train_ids` has the class of each, or 255.

    A fully transparent pixel counts as 255. Any other colour is refused, or means 255 too if `ignores_others`. `remedy` ends
    the error message about an unusable label.
    """

    train_ids: Mapping[RGB, int]
    remedy: str
    ignores_others: bool = False

    def __call__(self, path: Path, pictures: PictureReader = _ANY) -> NDArray[np.uint8]:
        """(H, W) uint8, classes or 255. Raises InputError naming the file, the colour and where it is."""
        pixels = self._pixels(path, pictures)
        colours = _as_numbers(pixels[..., :3])
        numbers = _as_numbers(np.array(list(self.train_ids)))
        order = np.argsort(numbers)
        known = numbers[order]
        nearest = np.minimum(np.searchsorted(known, colours), len(known) - 1)
        is_known, is_opaque = known[nearest] == colours, pixels[..., 3] > 0
        unknown = ~is_known & is_opaque
        if unknown.any() and not self.ignores_others:
            raise InputError(f"label {path} {self._complaint(pixels, unknown)}; {self.remedy}")
        labels = np.array(list(self.train_ids.values()), np.uint8)[order][nearest]
        return np.where(is_known & is_opaque, labels, np.uint8(IGNORE_INDEX))

    def values(self, path: Path, pictures: PictureReader = _ANY) -> NDArray[np.int32]:
        """The colours (H, W) as the file has them, one number each. Raises InputError naming the file."""
        return _as_numbers(self._pixels(path, pictures)[..., :3])

    def _pixels(self, path: Path, pictures: PictureReader) -> NDArray[np.uint8]:
        """The colours with alpha (H, W, 4)."""
        picture = pictures.label(path)
        if picture.mode not in _COLOURS:
            has_numbers = picture.mode.startswith(("I", "F"))
            complaint = "numbers in place of colours" if has_numbers else "colours that are not red, green and blue"
            raise InputError(f"label {path} has {complaint} (mode {picture.mode}); {self.remedy}")
        return np.array(picture.convert("RGBA"))

    def _complaint(self, pixels: NDArray[np.uint8], unknown: NDArray[np.bool_]) -> str:
        row, column = np.argwhere(unknown)[0].tolist()
        count, different = int(unknown.sum()), len(np.unique(_as_numbers(pixels[unknown][:, :3])))
        complaint = f"has the colour {pixels[row, column, :3].tolist()} in row {row}, column {column}, which means no class"
        if count > 1:
            complaint += f" ({count:,} such pixels, {different:,} such colour{'s' if different > 1 else ''})"
        blurred = ", as smoothed edges and JPEG have them: save labels as PNG, unsmoothed" if different > _MANY else ""
        return complaint + blurred


@dataclass(frozen=True, eq=False)
class DepthReader:
    """Reads depth maps with 16 bits per pixel: `scale` times the metres, or 0 where nothing was measured."""

    scale: float
    remedy: str

    def __call__(self, path: Path, pictures: PictureReader = _ANY) -> NDArray[np.float32]:
        """(H, W) float32 metres, NaN where nothing was measured. Raises InputError naming the file."""
        picture = pictures.label(path)
        if not picture.mode.startswith("I"):  # which Pillow has for 16 bits
            raise InputError(
                f"label {path} must be a 16-bit picture with one channel that holds depths, it has mode {picture.mode}; "
                f"{self.remedy}"
            )
        values = _require_16_bits(np.array(picture), path, self.remedy).astype(np.float32)
        return np.where(values > 0, values / np.float32(self.scale), np.float32(np.nan))


def storage(path: Path) -> tuple[str, list[RGB]]:
    """How a label file stores its pixels, in words, and its palette, read from its head alone; nothing of other files."""
    if path.suffix == ".mat":
        return "", []
    mode, palette = mode_and_palette(path)  # of a damaged file nothing; that is said when the label is read
    form = _FORMS.get(mode, f"in mode {mode}") if mode else ""
    return form, [(r, g, b) for r, g, b in palette.tolist()] if mode == "P" else []


def label_colours(path: Path, values: Sequence[int]) -> NDArray[np.uint8] | None:
    """The colours (K, 3) that a label file's palette gives to K label values.

    None if it has no palette, or if not all of these colours can be told apart, as in a ramp of greys.
    """
    _, table = mode_and_palette(path)
    if len(table) <= max(values):
        return None
    colours = table[list(values)]
    apart = np.abs(colours[:, None].astype(int) - colours[None]).max(axis=2)
    return None if (apart + _APART * np.eye(len(values)) < _APART).any() else colours


def spans(values: Iterable[int]) -> str:
    """Numbers as text; three or more in a row are shortened.

    >>> spans([7, 0, 1, 2, 4, 5])
    '0 to 2, 4, 5, 7'
    """
    ordered = sorted(values)
    breaks = [0, *(i for i, (a, b) in enumerate(pairwise(ordered), start=1) if b != a + 1), len(ordered)]
    runs = [ordered[start:stop] for start, stop in pairwise(breaks)]
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _numbers(picture: Image.Image) -> NDArray[Any] | None:
    """The number of each pixel (H, W), 0 and 1 of one bit; None where pixels are no numbers.

    An opaque alpha channel says nothing. WebP has no grey, so three equal channels are one number there.
    """
    pixels = np.array(picture)
    if picture.mode in ("LA", "PA") and (pixels[..., 1] == 255).all():
        return pixels[..., 0]
    if picture.format == "WEBP" and (pixels == pixels[..., :1])[..., :3].all() and (pixels[..., 3:] == 255).all():
        return pixels[..., 0]
    is_number = picture.mode in ("1", "L", "P") or picture.mode.startswith("I")  # which Pillow has for 16 bits
    return pixels.astype(np.uint8) if picture.mode == "1" else pixels if is_number else None


def _require_16_bits(values: NDArray[Any], path: Path, remedy: str) -> NDArray[Any]:
    if values.min() < 0 or values.max() >= MOST_VALUES:  # a picture of 32 bits
        raise InputError(
            f"label {path} holds values from {values.min()} to {values.max()}; allowed are 0 to {MOST_VALUES - 1}: {remedy}"
        )
    return values


def _as_numbers(colours: NDArray[Any]) -> NDArray[np.int32]:
    """Colours (..., 3) as one number each: (...) int32."""
    red, green, blue = np.moveaxis(colours.astype(np.int32), -1, 0)
    numbers: NDArray[np.int32] = (red << 16) | (green << 8) | blue
    return numbers
