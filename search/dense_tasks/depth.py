"""Monocular depth: the distance of each pixel from one picture, trained by the L1 loss of its logarithm.

Scores and logarithm follow Eigen et al., "Depth Map Prediction from a Single Image using a Multi-Scale Deep Network"
(NeurIPS 2014): |log p − log d| is how far the ratio of prediction and truth is from 1, whatever the unit of length, which is
also what the score counts, pixels whose ratio is below 1.25.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fast.bilinear_resize import bilinear_resize
from fast.depth_metrics import depth_totals
from fast.hard_example_mining import keep_largest
from fast.upsampled_l1 import pixel_losses, upsampled_l1
from reference.depth_metrics import abs_rel, delta, rmse
from search.dense_tasks import RGB, UNLABELLED_COLOUR, Label, Measure, Scores
from search.errors import InputError
from search.settings import TaskName

_LARGEST_LOG = 10.0  # predictions stay within 0.05 mm and 22 km, so none becomes infinite
_EDGES = (1, 2, 5, 10, 20, 50)  # metres, between the bins that labels are counted by
_TICKS = 5  # depths in a legend
_MOST = 65535  # of 16 bits
_NO_CLASSES = "`class_weights` are for labels that are classes, and those of depth are distances: leave them out"


@dataclass(frozen=True)
class Depth:
    """Labels are float32 metres, or NaN where nothing was measured. The only output is the logarithm of the depth in metres.

    Label files have 16 bits and hold `depth_scale` times the metres, and 0 where nothing was measured.
    """

    depth_scale: float = 1000.0

    name: TaskName = field(default="depth", init=False)
    label_dtype = np.dtype(np.float32)
    bins_heading = "depth"
    bins = ("below 1 m", *(f"{low} to {high} m" for low, high in pairwise(_EDGES)), "from 50 m")
    outputs = ("log depth",)
    score = Measure("δ<1.25", "delta_1")
    details = (
        Measure("RMSE", "rmse", "m", in_tables=True),
        Measure("AbsRel", "abs_rel", ""),
        Measure("δ<1.25²", "delta_2"),
        Measure("δ<1.25³", "delta_3"),
    )
    details_heading = "More scores"
    is_transparent = False
    only_drawn = ()

    def unlabelled(self, size: tuple[int, int]) -> Label:
        return np.full(size, np.nan, np.float32)

    def is_labelled(self, labels: Tensor) -> Tensor:
        return ~labels.isnan()

    def at_scale(self, label: Label, scale: float) -> Label:
        """Whoever sees things `scale` times as large is that much nearer (Eigen et al., in their data augmentation)."""
        return label / np.float32(scale)

    def histogram(self, label: Label) -> NDArray[np.int64]:
        measured = label[~np.isnan(label)]
        counts = np.bincount(np.digitize(measured, _EDGES), minlength=len(self.bins))
        return np.append(counts, label.size - measured.size)

    def predict(self, outputs: Tensor) -> Tensor:
        return outputs[:, 0].clamp(-_LARGEST_LOG, _LARGEST_LOG).exp()

    def to_average(self, outputs: Tensor, scale: float) -> Tensor:
        return outputs + float(np.log(scale))  # of the picture at scale 1

    def loss(self, outputs: Tensor, labels: Tensor, *, align_corners: bool = True) -> Tensor:
        return upsampled_l1(outputs, labels.log(), align_corners=align_corners)

    def hardest(self, outputs: Tensor, labels: Tensor, share: float, *, align_corners: bool = True) -> Tensor:
        losses = pixel_losses(outputs, labels.log(), align_corners=align_corners)
        return keep_largest(losses, labels, share, torch.nan)

    def weighted(self, weights: tuple[float, ...] | None) -> "Depth":
        if weights is not None:
            raise InputError(_NO_CLASSES)
        return self

    def balanced(self, count: Callable[[], NDArray[np.int64]]) -> tuple[float, ...]:
        raise InputError(_NO_CLASSES)

    def count(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """The sums of `reference/depth_metrics.py`: (6,), float64."""
        return depth_totals(predictions, labels)

    def count_upsampled(self, outputs: Tensor, labels: Tensor, *, align_corners: bool = True) -> Tensor:
        size = labels.shape[1], labels.shape[2]
        return self.count(self.predict(bilinear_resize(outputs, size, align_corners=align_corners)), labels)

    def scores(self, totals: NDArray[Any]) -> Scores:
        """The share of pixels whose ratio to the truth is below 1.25; RMSE, AbsRel, and the shares below 1.25² and 1.25³."""
        details = (rmse(totals), abs_rel(totals), delta(totals, 2), delta(totals, 3))
        return Scores(delta(totals), tuple(None if np.isnan(value) else value for value in details))

    def named(self, scores: Scores) -> dict[str, Any]:
        by_key = {measure.key: value for measure, value in zip(self.details, scores.details, strict=True)}
        return {self.score.key: None if np.isnan(scores.score) else scores.score} | by_key

    def facts(self, totals: NDArray[Any]) -> dict[str, Any]:
        return self.named(self.scores(totals)) | {"measured_pixels": int(totals[0])}

    def table(self, totals: NDArray[Any]) -> str:
        """One line a score.

        >>> print(Depth().table(np.array([4.0, 1.0, 0.4, 3.0, 4.0, 4.0])))
        δ<1.25     75.00 %
        RMSE       0.500 m
        AbsRel     0.100
        δ<1.25²   100.00 %
        δ<1.25³   100.00 %
        """
        scores = self.scores(totals)
        rows = [(self.score, scores.score), *zip(self.details, scores.details, strict=True)]
        return "\n".join(f"{measure.name:8} {measure.number(value):>7} {measure.unit}".rstrip() for measure, value in rows)

    def colours(self, maps: Sequence[Label]) -> list[NDArray[np.uint8]]:
        low, high = _log_range(maps)
        return [_painted(each, low, high) for each in maps]

    def legend(self, maps: Sequence[Label]) -> list[tuple[str, RGB]]:
        """A few depths, from near to far."""
        low, high = _log_range(maps)
        ticks = np.exp(np.linspace(low, high, _TICKS))
        colours = _painted(ticks, low, high).tolist()
        names = [f"{depth:.2g} m" if depth < 10 else f"{depth:.0f} m" for depth in ticks]
        shown = {name: (red, green, blue) for name, (red, green, blue) in zip(names, colours, strict=True)}
        unmeasured = [("not measured", UNLABELLED_COLOUR)] if any(np.isnan(each).any() for each in maps) else []
        return [*shown.items(), *unmeasured]  # depths that read the same are one

    def encoded(self, prediction: Label) -> Image.Image:
        """16 bits per pixel, in the scale of the data set's own files; 0 would mean that nothing was measured."""
        return Image.fromarray(np.rint(prediction * self.depth_scale).clip(1, _MOST).astype(np.uint16))

    def describe(self) -> dict[str, Any]:
        return {"depth_scale": self.depth_scale}


def _log_range(maps: Sequence[Label]) -> tuple[float, float]:
    """Logarithms of a near and a far depth, between which nearly all pixels of the maps lie."""
    measured = np.concatenate([each[~np.isnan(each)] for each in maps] or [np.ones(1)])
    low, high = np.log(np.percentile(measured, [1, 99])) if measured.size else (0.0, 1.0)
    return float(low), float(max(high, low + 1e-3))


def _painted(depths: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Orange for near, dark for far: (...) -> (..., 3). The palest tenth of the colours is left to what was not measured."""
    from matplotlib import colormaps  # takes half a second

    place = (np.log(depths) - low) / (high - low)
    shade = 0.15 + 0.85 * np.nan_to_num(place).clip(0, 1)
    picture: NDArray[np.uint8] = colormaps["magma_r"](shade, bytes=True)[..., :3].copy()
    picture[np.isnan(depths)] = UNLABELLED_COLOUR
    return picture
