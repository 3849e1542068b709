"""Generated scenes in which context tells the classes apart: a data set that needs no files.

Colours and texture of all shapes come from one distribution, so a patch from the inside of a shape says nothing about its
class. The class is decided by extent and aspect ratio, at scales from 1/12 to 3/4 of the picture, and by the surroundings:

- a block is about as wide as it is high, a wide bar two to four times as wide, a tall bar two to four times as high;
- a disc is filled, a ring has a hole through which the background shows;
- the same small disc is a *dot* on the background and an *inlay* within a shape.

Shapes overlap, illumination and noise cover everything, and a thin contour between classes is ignored.

The same scenes have a depth map, from which `ShapesDepth` makes labels. Each kind of shape has one size in metres, so its
distance follows from how large it appears: the cell must tell the kind and see the whole shape. Small discs are painted on
what they lie on, and so are as far away as that; the background is a wall. Where shapes overlap the smaller one shows,
whatever its distance.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from search.datasets import IGNORE_INDEX, Fingerprint, Sample
from search.dense_tasks import DenseTask
from search.dense_tasks.depth import Depth
from search.dense_tasks.segmentation import Segmentation
from search.errors import InputError

CLASS_NAMES = ("background", "block", "wide bar", "tall bar", "disc", "ring", "dot", "inlay")
BACKGROUND, BLOCK, WIDE_BAR, TALL_BAR, DISC, RING, DOT, INLAY = range(len(CLASS_NAMES))
PALETTE = np.array(
    [(60, 64, 72), (0, 114, 178), (230, 159, 0), (0, 158, 115), (213, 94, 0), (204, 121, 167), (240, 228, 66), (86, 180, 233)],
    np.uint8,
)
PALETTE.flags.writeable = False

# Longer side of each class as a share of the picture: log-uniform between the two, so that every scale is equally likely.
EXTENTS = {
    BLOCK: (0.22, 0.6),
    WIDE_BAR: (0.35, 0.75),
    TALL_BAR: (0.35, 0.75),
    DISC: (0.25, 0.6),
    RING: (0.3, 0.7),
    DOT: (1 / 12, 0.16),
}
ASPECT_RATIOS = {BLOCK: (1, 1.25), WIDE_BAR: (2, 4), TALL_BAR: (2, 4)}  # longer side : shorter side; 1 for the others
# Longer side of each class in metres; one that fills the picture's side is as far away as it is long.
METRES = {BLOCK: 0.9, WIDE_BAR: 1.2, TALL_BAR: 1.8, DISC: 0.6, RING: 1.0}
WALL = 5.0  # metres to the background
LENGTHS = {"train": 240, "val": 60}
_STREAMS = {"train": 0, "val": 1}  # of random numbers, for good: another split would not change these scenes

Window = tuple[slice, slice]  # rows, columns of the picture


@dataclass(frozen=True)
class Shapes:
    """`length` scenes of `size` × `size` pixels; scene i depends on (seed, split, i) alone.

    The size is 16 k + 1, so that a feature map of output stride 16 has its corners on pixels.
    """

    split: str
    length: int
    size: int = 257
    seed: int = 0

    name = "shapes"
    task: ClassVar[DenseTask] = Segmentation(CLASS_NAMES, PALETTE)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        scene = self._scene(index)
        return Sample(scene.image, scene.label, f"{self.split}_{index:03d}")

    def _scene(self, index: int) -> "Scene":
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        return draw_scene(np.random.default_rng([self.seed, _STREAMS[self.split], index]), self.size)

    def fingerprint(self) -> Fingerprint:
        image, label, _ = self[0]  # which changes with the generator's code
        images, labels = (hashlib.sha256(repr(astuple(self)).encode() + part.tobytes()) for part in (image, label))
        return Fingerprint(images.hexdigest(), labels.hexdigest())

    def problems(self) -> list[str]:
        return []  # nothing is read


@dataclass(frozen=True)
class ShapesDepth(Shapes):
    """The same scenes; labels are distances in metres, unknown at contours."""

    name = "shapes_depth"
    task: ClassVar[DenseTask] = Depth()

    def __getitem__(self, index: int) -> Sample:
        scene = self._scene(index)
        return Sample(scene.image, scene.depth, f"{self.split}_{index:03d}")


class Scene(NamedTuple):
    """A drawn scene: `image` (size, size, 3) and `label` (size, size) uint8, `depth` (size, size) float32 metres or NaN."""

    image: NDArray[np.uint8]
    label: NDArray[np.uint8]
    depth: NDArray[np.float32]


def open_split(split: str, data_dir: Path | None) -> Shapes:
    """Open the scenes of `split`; InputError if a folder is given, since nothing is read from it."""
    return _open(Shapes, split, data_dir)


def _open(scenes: type[Shapes], split: str, data_dir: Path | None) -> Shapes:
    if data_dir is not None:
        raise InputError(f"`dataset` shapes is generated and reads no files; remove `data_dir` {data_dir}")
    return scenes(split, LENGTHS[split])


OTHER_TASKS = {"depth": partial(_open, ShapesDepth)}


def draw_scene(rng: np.random.Generator, size: int) -> Scene:
    """Draw one scene of size × size pixels."""
    image = np.empty((3, size, size), np.float32)  # colours in separate planes: twice as fast as interleaved ones
    label = np.full((size, size), BACKGROUND, np.uint8)
    depth = np.full((size, size), WALL, np.float32)
    _paint(image, np.s_[:, :], np.ones((size, size), bool), rng, brightness=(20, 60))
    _place_shapes(image, label, depth, rng)
    _place_small_discs(image, label, rng)
    _illuminate(image, rng)
    _ignore_contours(label)
    depth[label == IGNORE_INDEX] = np.nan
    return Scene(np.ascontiguousarray(image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)), label, depth)


def _place_shapes(
    image: NDArray[np.float32], label: NDArray[np.uint8], depth: NDArray[np.float32], rng: np.random.Generator
) -> None:
    """Place each kind once and two more, with little overlap; shapes that find no room are left out."""
    kinds = [*range(BLOCK, DOT), *rng.integers(BLOCK, DOT, size=2).tolist()]
    extents = [(kind, _draw_extent(kind, len(label), rng)) for kind in kinds]
    for kind, extent in sorted(extents, key=lambda pair: -pair[1][0] * pair[1][1]):  # large ones first, so that none is hidden
        for window in _draw_windows(extent, len(label), rng):
            if np.count_nonzero(label[window]) < 0.2 * label[window].size:
                mask = _silhouette(kind, extent, rng)
                _paint(image, window, mask, rng, brightness=(90, 160))
                label[window][mask] = kind
                depth[window][mask] = METRES[kind] * len(label) / max(extent)
                break


def _place_small_discs(image: NDArray[np.float32], label: NDArray[np.uint8], rng: np.random.Generator) -> None:
    """Place small discs of one appearance, each well within one host: as dots on the background, as inlays within shapes."""
    margin = 4  # pixels of the host around the disc
    for kind in [DOT] * 6 + [INLAY] * 5:
        extent = _draw_extent(DOT, len(label), rng)
        for rows, columns in _draw_windows((extent[0] + 2 * margin, extent[1] + 2 * margin), len(label), rng):
            host = label[rows.start, columns.start]
            is_host = host == BACKGROUND if kind == DOT else BACKGROUND < host < DOT
            if is_host and np.all(label[rows, columns] == host):
                window = np.s_[rows.start + margin : rows.stop - margin, columns.start + margin : columns.stop - margin]
                mask = _silhouette(kind, extent, rng)
                _paint(image, window, mask, rng, brightness=(200, 250))
                label[window][mask] = kind
                break


def _draw_extent(kind: int, size: int, rng: np.random.Generator) -> tuple[int, int]:
    """Draw a height and a width in pixels."""
    smallest, largest = EXTENTS[kind]
    long_side = size * smallest * (largest / smallest) ** rng.random()
    short_side = long_side / rng.uniform(*ASPECT_RATIOS.get(kind, (1, 1)))
    wide = kind == WIDE_BAR or (kind != TALL_BAR and rng.random() < 0.5)
    height, width = (short_side, long_side) if wide else (long_side, short_side)
    return round(height), round(width)


def _draw_windows(extent: tuple[int, int], size: int, rng: np.random.Generator) -> Iterator[Window]:
    """Draw random places for a shape of this height and width, as many as are worth trying."""
    height, width = extent
    for down, right in rng.random((30, 2)).tolist():
        top, left = int(down * (size - height + 1)), int(right * (size - width + 1))
        yield slice(top, top + height), slice(left, left + width)


def _silhouette(kind: int, extent: tuple[int, int], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Mask of the pixels of its (height, width) window that belong to the shape."""
    if kind in (BLOCK, WIDE_BAR, TALL_BAR):
        return np.ones(extent, bool)
    y, x = (np.linspace(-1, 1, side, dtype=np.float32) ** 2 for side in extent)
    radius_squared = y[:, None] + x
    hole = rng.uniform(0.45, 0.6) if kind == RING else 0.0
    mask: NDArray[np.bool_] = (radius_squared <= 1) & (radius_squared >= hole**2)
    return mask


def _paint(
    image: NDArray[np.float32],
    window: Window,
    mask: NDArray[np.bool_],
    rng: np.random.Generator,
    *,
    brightness: tuple[float, float],
) -> None:
    """Cover `mask` with stripes or checks in two random colours, independent of the class."""
    angle = rng.uniform(0, np.pi)
    pattern = _wave(mask.shape, angle, rng)
    if rng.random() < 0.5:
        pattern *= _wave(mask.shape, angle + np.pi / 2, rng)
    hue = rng.random()
    first, second = (_draw_colour(hue + shift, brightness, rng) for shift in (0, rng.uniform(-0.15, 0.15)))
    for plane, mean, amplitude in zip(image, (first + second) / 2, (first - second) / 2, strict=True):
        np.copyto(plane[window], pattern * float(amplitude) + float(mean), where=mask)


def _wave(shape: tuple[int, ...], angle: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """A plane sine wave across `angle`, of random wavelength and phase."""
    rows, columns = (np.arange(side, dtype=np.float32) for side in shape)
    frequency = 2 * np.pi / rng.uniform(7, 24)  # wavelength in pixels
    down = rows * (frequency * np.sin(angle)) + rng.uniform(0, 2 * np.pi)
    right = columns * (frequency * np.cos(angle))
    wave = np.outer(np.sin(down), np.cos(right)) + np.outer(np.cos(down), np.sin(right))  # sin(down + right), in fewer sines
    return wave.astype(np.float32)


def _draw_colour(hue: float, brightness: tuple[float, float], rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw an RGB colour, 0 to 255, with random brightness and saturation."""
    return rng.uniform(*brightness) * (1 + rng.uniform(0.1, 0.5) * np.cos(2 * np.pi * (hue + np.array([0, 1 / 3, 2 / 3]))))


def _illuminate(image: NDArray[np.float32], rng: np.random.Generator) -> None:
    """Shade linearly in a random direction by up to 40 % at the corners, and add noise."""
    ramp = np.linspace(-1, 1, image.shape[-1])
    slope_y, slope_x = rng.uniform(-0.2, 0.2, size=2)
    image *= (1 + slope_y * ramp[:, None] + slope_x * ramp).astype(np.float32)
    image += rng.integers(-12, 12, size=image.shape, dtype=np.int8)


def _ignore_contours(label: NDArray[np.uint8]) -> None:
    """Mark the two pixels on either side of each change of class."""
    horizontal = label[:, 1:] != label[:, :-1]
    vertical = label[1:] != label[:-1]
    for pixels, changes in (
        (label[:, 1:], horizontal),
        (label[:, :-1], horizontal),
        (label[1:], vertical),
        (label[:-1], vertical),
    ):
        np.copyto(pixels, IGNORE_INDEX, where=changes)
