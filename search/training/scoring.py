"""Predictions of a network for whole pictures, and what their scores on a split follow from.

Every picture is predicted whole, padded at the bottom and right with the mean pixel: to the size that the data set is
evaluated at (513 × 513 for PASCAL VOC), or else from its own size to stride·k + 1 pixels, as the authors pad 1024 × 2048 to
1025 × 2049. Padded pixels are not scored.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fast.bilinear_resize import bilinear_resize
from fast.segmentation import SegmentationNetwork, predict_scales
from search.datasets import Dataset, Sample, evaluation_size
from search.dense_tasks import DenseTask, totals_of_nothing


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
    """The prediction per pixel: image (H, W, 3) -> (H, W), in the values of labels, on the network's device.

    `pad_to` is for pictures that fit into it; larger ones keep their own size.
    """
    height, width = image.shape[:2]
    size, mean = input_size(network, (height, width), pad_to), network.backbone.mean
    padded = mean.expand(1, 3, *size).clone()
    padded[0, :, :height, :width] = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).to(mean.device)
    if tuple(scales) == (1.0,) and not flip:  # there is nothing to average
        outputs = bilinear_resize(network(padded).float(), size)
    else:
        outputs = predict_scales(network, padded, scales=scales, flip=flip, to_average=task.to_average)
    return task.predict(outputs)[0, :height, :width]


def input_size(
    network: SegmentationNetwork, picture: tuple[int, int], pad_to: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Height and width that a picture of this height and width is padded to before the network sees it."""
    stride = network.backbone.output_stride
    height, width = (-(-(extent - 1) // stride) * stride + 1 for extent in picture)
    if pad_to is not None and fits(picture, pad_to):
        height, width = pad_to
    pinned = network.head.context.pooling_size or (1, 1)  # a window must not exceed the map
    return max(height, stride * (pinned[0] - 1) + 1), max(width, stride * (pinned[1] - 1) + 1)


def fits(picture: tuple[int, int], room: tuple[int, int]) -> bool:
    """Whether a picture of this height and width is nowhere larger than `room`."""
    return picture[0] <= room[0] and picture[1] <= room[1]


def predict_split(
    predict: Callable[[Sample], Tensor], dataset: Dataset, indices: Sequence[int]
) -> Iterator[tuple[Sample, Tensor, Tensor]]:
    """Of each picture the sample, what `predict` makes of it (H, W), and what its task counts of that, on the same device."""
    for index in indices:
        sample = dataset[index]
        prediction = predict(sample)
        label = torch.from_numpy(sample.label).to(prediction.device)
        yield sample, prediction, dataset.task.count(prediction[None], label[None])


def count_split(
    network: SegmentationNetwork,
    dataset: Dataset,
    *,
    indices: Sequence[int],
    pad_to: tuple[int, int] | None = None,
    on_picture: Callable[[], object] = lambda: None,
) -> Tensor:
    """The sum of what the task counts of the pictures, on the network's device.

    They are padded to `pad_to`, or else as the data set's are evaluated.
    """
    total = totals_of_nothing(dataset.task).to(network.backbone.mean.device)  # one of several devices may have no picture
    pad_to = pad_to or evaluation_size(dataset.name)

    def predict(sample: Sample) -> Tensor:
        return predict_picture(network, sample.image, dataset.task, pad_to=pad_to)

    for _, _, counted in predict_split(predict, dataset, indices):
        total += counted
        on_picture()
    return total
