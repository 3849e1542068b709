"""Predictions of a network for whole pictures, and what their scores on a split follow from.

Every picture is predicted whole, at its own size, padded at the bottom and right with the mean pixel to stride·k + 1 pixels,
as the authors pad 1024 × 2048 to 1025 × 2049. Padded pixels are not scored.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fast.bilinear_resize import bilinear_resize
from fast.segmentation import SegmentationNetwork, predict_scales
from search.datasets import Dataset, Sample
from search.dense_tasks import DenseTask, totals_of_nothing
from search.errors import InputError


@torch.no_grad()
def predict_picture(
    network: SegmentationNetwork,
    image: NDArray[np.uint8],
    task: DenseTask,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    pad_to: tuple[int, int] | None = None,
) -> Tensor:
    """The prediction per pixel: image (H, W, 3) -> (H, W), in the values of labels, on the network's device."""
    height, width = image.shape[:2]
    mean, stride = network.backbone.mean, network.backbone.output_stride
    rounded = tuple(-(-(extent - 1) // stride) * stride + 1 for extent in (height, width))
    size = pad_to or (rounded[0], rounded[1])
    padded = mean.expand(1, 3, *size).clone()
    padded[0, :, :height, :width] = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).to(mean.device)
    if tuple(scales) == (1.0,) and not flip:  # there is nothing to average
        outputs = bilinear_resize(network(padded).float(), size)
    else:
        outputs = predict_scales(network, padded, scales=scales, flip=flip, to_average=task.to_average)
    return task.predict(outputs)[0, :height, :width]


def predict_split(
    network: SegmentationNetwork,
    dataset: Dataset,
    indices: Sequence[int],
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    pad_to: tuple[int, int] | None = None,
) -> Iterator[tuple[Sample, Tensor, Tensor]]:
    """Of each picture the sample, the prediction (H, W), and what its task counts of it, on the network's device.

    Raises InputError for a picture that is larger than `pad_to`.
    """
    task = dataset.task
    for index in indices:
        sample = dataset[index]
        if pad_to and any(have > room for have, room in zip(sample.label.shape, pad_to, strict=True)):
            raise InputError(f"picture {sample.name} is {sample.label.shape}, larger than `pad_to` {pad_to}")
        prediction = predict_picture(network, sample.image, task, scales=scales, flip=flip, pad_to=pad_to)
        label = torch.from_numpy(sample.label).to(prediction.device)
        yield sample, prediction, task.count(prediction[None], label[None])


def count_split(
    network: SegmentationNetwork,
    dataset: Dataset,
    *,
    indices: Sequence[int],
    pad_to: tuple[int, int] | None = None,
    on_picture: Callable[[], None] = lambda: None,
) -> Tensor:
    """The sum of what the task counts of the pictures, on the network's device."""
    total = totals_of_nothing(dataset.task).to(network.backbone.mean.device)  # one of several devices may have no picture
    for _, _, counted in predict_split(network, dataset, indices, pad_to=pad_to):
        total += counted
        on_picture()
    return total
