"""Training crops as the authors make them (research/deeplab/input_preprocess.py): scale, pad, crop, mirror.

1. a scale from {0.5, 0.75, ..., 2}: the picture bilinearly, its label by the nearest pixel, corners aligned in both, to
   int(H · scale) rows and int(W · scale) columns;
2. padding at the bottom and right with the mean pixel, which is not labelled, where that is smaller than the crop;
3. a crop anywhere within;
4. mirrored with probability 1/2.

Only the part of the picture that the crop shows is scaled. A crop depends on (seed, position) alone; position p of a training
is slot p mod B of iteration p div B. So neither the number of loading processes nor an interruption changes any crop.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from search.datasets import Dataset
from search.dense_tasks import DenseTask, Label
from search.errors import InputError

_ORDER, _CROP = 0, 1  # number of the random stream


class Crop(NamedTuple):
    """`image` (3, h, w) float32, 0 to 255, and `label` (h, w); or the reason why the picture cannot be used."""

    image: Tensor
    label: Tensor
    problem: str = ""


@dataclass(frozen=True)
class Augmentation:
    """Draws crops of `crop_size` for a task; `mean` is the pixel to pad with. With scale step 0, any scale in the range may be
    drawn.
    """

    task: DenseTask
    crop_size: tuple[int, int]
    mean: tuple[float, float, float]
    min_scale: float = 0.5
    max_scale: float = 2.0
    scale_step: float = 0.25

    def scales(self) -> list[float]:
        """All scales there are, each as likely as the other; none if any between the two may be drawn.

        >>> from search.dense_tasks.segmentation import Segmentation
        >>> Augmentation(Segmentation(("road", "car")), (33, 33), (127.5, 127.5, 127.5)).scales()
        [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
        """
        if self.scale_step == 0:
            return []
        count = int((self.max_scale - self.min_scale) / self.scale_step + 1)
        return [float(scale) for scale in np.linspace(self.min_scale, self.max_scale, count)]

    def __call__(self, image: NDArray[np.uint8], label: Label, rng: np.random.Generator) -> tuple[NDArray[np.float32], Label]:
        """image (H, W, 3), label (H, W) -> a crop of both, (h, w, 3) and (h, w)."""
        scales = self.scales()
        scale = scales[rng.integers(len(scales))] if scales else rng.uniform(self.min_scale, self.max_scale)
        scaled = (int(label.shape[0] * scale), int(label.shape[1] * scale))
        corner = [int(rng.integers(max(have - want, 0) + 1)) for have, want in zip(scaled, self.crop_size, strict=True)]
        picture, cut = self._cut(image, label, scaled, corner)
        cut = self.task.at_scale(cut, scale)
        if rng.random() < 0.5:
            picture, cut = picture[:, ::-1], cut[:, ::-1]
        return picture, cut

    def _cut(
        self, image: NDArray[np.uint8], label: Label, scaled: tuple[int, int], corner: list[int]
    ) -> tuple[NDArray[np.float32], Label]:
        picture = np.empty((*self.crop_size, 3), np.float32)
        picture[:] = self.mean
        cut = self.task.unlabelled(self.crop_size)
        rows, columns = (_SourcePixels.of(*sizes) for sizes in zip(label.shape, scaled, corner, self.crop_size, strict=True))
        shown = np.s_[: len(rows.nearest), : len(columns.nearest)]
        cut[shown] = label[rows.nearest[:, None], columns.nearest]
        if scaled == label.shape:
            picture[shown] = image[rows.nearest[:, None], columns.nearest]
        else:
            band = _interpolated(image, rows, axis=0)  # (shown rows, W, 3)
            picture[shown] = _interpolated(band, columns, axis=1)
        return picture, cut


class TrainingCrops:
    """The crops of an endless training, for a `DataLoader`: every picture once per round, each round in a new order."""

    def __init__(self, dataset: Dataset, augmentation: Augmentation, seed: int) -> None:
        self.dataset = dataset
        self.augmentation = augmentation
        self.seed = seed

    def __getitem__(self, position: int) -> Crop:
        number, place = divmod(position, len(self.dataset))
        order = np.random.default_rng([self.seed, _ORDER, number]).permutation(len(self.dataset))
        try:
            sample = self.dataset[int(order[place])]
        except InputError as error:  # as a value, because a loading process would put its own traceback around the message
            return Crop(torch.empty(0), torch.empty(0), str(error))
        rng = np.random.default_rng([self.seed, _CROP, position])
        image, label = self.augmentation(sample.image, sample.label, rng)
        channels_first = np.ascontiguousarray(image.transpose(2, 0, 1))
        return Crop(torch.from_numpy(channels_first), torch.from_numpy(np.ascontiguousarray(label)))


def stack(crops: list[Crop]) -> Crop:
    """Make a batch: images (N, 3, h, w) and labels (N, h, w), or the first problem of its crops."""
    for crop in crops:
        if crop.problem:
            return crop
    return Crop(torch.stack([crop.image for crop in crops]), torch.stack([crop.label for crop in crops]))


class _SourcePixels(NamedTuple):
    """Positions of output pixels along one axis of the picture; in integers, so that rounding cannot change the nearest."""

    below: NDArray[np.int64]
    above: NDArray[np.int64]
    fraction: NDArray[np.float32]  # fraction of the way from `below` to `above`
    nearest: NDArray[np.int64]

    @classmethod
    def of(cls, size: int, scaled: int, start: int, length: int) -> "_SourcePixels":
        """Pixels start, start + 1, ... of a picture scaled from `size` to `scaled` pixels, at most `length` of them."""
        output = np.arange(start, min(start + length, scaled))
        steps = max(scaled - 1, 1)
        below, remainder = np.divmod(output * (size - 1), steps)
        nearest = (2 * output * (size - 1) + steps) // (2 * steps)
        return cls(below, np.minimum(below + 1, size - 1), (remainder / steps).astype(np.float32), nearest)


def _interpolated(pixels: NDArray[np.generic], at: _SourcePixels, *, axis: int) -> NDArray[np.float32]:
    fraction = at.fraction.reshape([-1 if i == axis else 1 for i in range(pixels.ndim)])
    below, above = (np.take(pixels, indices, axis).astype(np.float32) for indices in (at.below, at.above))
    interpolated: NDArray[np.float32] = below + fraction * (above - below)
    return interpolated
