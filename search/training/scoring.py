"""Predictions of a network for whole pictures, and what their scores on a split follow from.

Every picture is padded at the bottom and right with the mean pixel: to the size that the data set is evaluated at (513 × 513
for PASCAL VOC), or else from its own size to the grid of features: stride·k + 1 pixels with corners, as the authors pad 1024 ×
2048 to 1025 × 2049, and stride·k with centres. Padded pixels are not scored. It is predicted whole, or in tiles if it is
larger than those that are given.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fast.bilinear_resize import bilinear_resize
from fast.segmentation import SegmentationNetwork, predict_scales
from search.datasets import Dataset, Sample, evaluation_size
from search.datasets.files import largest_picture
from search.dense_tasks import DenseTask, totals_of_nothing
from search.errors import InputError
from search.settings import RecipeSettings, check_tile_size
from search.training.memory import PredictionMemory
from search.training.tiles import Tiles, blended_rows, least_size

_COUNTED_PIXELS = 2**24  # at once


@torch.no_grad()
def predict_picture(
    network: SegmentationNetwork,
    image: NDArray[np.uint8],
    task: DenseTask,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    pad_to: tuple[int, int] | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """The prediction per pixel: image (H, W, 3) -> (H, W), in the values of labels, on the network's device.

    `pad_to` is for pictures that fit into it; larger ones keep their own size. In tiles, what scales and mirror images are
    averaged over is blended; outputs of the whole picture never exist.
    """
    height, width = image.shape[:2]
    size = input_size(network, (height, width), pad_to)
    tile, grid, mean = size if tiles is None else tiles.within(size), network.backbone.grid, network.backbone.mean

    def outputs(top: int, left: int) -> Tensor:
        """Of the tile that begins there: (1, K, *tile)."""
        pixels = image[top : top + tile[0], left : left + tile[1]]
        padded = mean.expand(1, 3, *tile).clone()
        padded[0, :, : pixels.shape[0], : pixels.shape[1]] = torch.from_numpy(
            np.ascontiguousarray(pixels.transpose(2, 0, 1))
        ).to(mean.device)
        if tuple(scales) == (1.0,) and not flip:  # there is nothing to average
            return bilinear_resize(network(padded).float(), tile, align_corners=grid.align_corners)
        return predict_scales(network, padded, scales=scales, flip=flip, to_average=task.to_average)

    if tiles is None or tile == size:
        return task.predict(outputs(0, 0))[0, :height, :width]
    bands = blended_rows(lambda top, left: outputs(top, left)[0], size, tile, tiles.overlap, grid)
    prediction, top = torch.from_numpy(task.unlabelled((height, width))).to(mean.device), 0
    for band in bands:
        rows = task.predict(band[None])[0, : max(0, height - top), :width]
        prediction[top : top + len(rows)] = rows
        top += len(rows)
    return prediction


def input_size(
    network: SegmentationNetwork, picture: tuple[int, int], pad_to: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Height and width that a picture of this height and width is padded to before the network sees it."""
    height, width = network.backbone.grid.rounded_up(picture)
    if pad_to is not None and fits(picture, pad_to):
        height, width = pad_to
    least = least_size(network)
    return max(height, least[0]), max(width, least[1])


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
        yield sample, prediction, _counted(dataset.task, prediction, label)


def _counted(task: DenseTask, prediction: Tensor, label: Tensor) -> Tensor:
    """What the task counts of a picture, in parts where it is so large that the count would take more memory than it."""
    rows = max(1, _COUNTED_PIXELS // label.shape[1])
    parts = (slice(top, top + rows) for top in range(0, label.shape[0], rows))
    first, *others = (task.count(prediction[None, part], label[None, part]) for part in parts)
    return sum(others, first)


def count_split(
    network: SegmentationNetwork,
    dataset: Dataset,
    *,
    indices: Sequence[int],
    pad_to: tuple[int, int] | None = None,
    tiles: Tiles | None = None,
    on_picture: Callable[[], object] = lambda: None,
) -> Tensor:
    """The sum of what the task counts of the pictures, on the network's device.

    They are padded to `pad_to`, or else as the data set's are evaluated. Raises InputError for one that does not fit.
    """
    total = totals_of_nothing(dataset.task).to(network.backbone.mean.device)  # one of several devices may have no picture
    pad_to = pad_to or evaluation_size(dataset.name, network.backbone.grid)
    memory = PredictionMemory(network, len(dataset.task.outputs), tiles=tiles)

    def predict(sample: Sample) -> Tensor:
        picture = (sample.image.shape[0], sample.image.shape[1])
        with memory.of_picture(picture, input_size(network, picture, pad_to), sample.name):
            return predict_picture(network, sample.image, dataset.task, pad_to=pad_to, tiles=tiles)

    for _, _, counted in predict_split(predict, dataset, indices):
        total += counted
        on_picture()
    return total


def require_validation(network: SegmentationNetwork, dataset: Dataset, recipe: RecipeSettings, device: torch.device) -> None:
    """Refuse, before a training begins, what its validations could not do: the largest picture must fit into memory.

    On the CPU that is an estimate; where there is none, a picture of that size is predicted. Moves the network to the device,
    in evaluation mode. Raises InputError.
    """
    tiles, pad_to = Tiles.of(recipe), evaluation_size(dataset.name, network.backbone.grid)
    check_tiles(network.to(device).eval(), tiles)
    name, picture = largest_picture(dataset)
    memory = PredictionMemory(network, len(dataset.task.outputs), tiles=tiles)
    with memory.of_picture(picture, input_size(network, picture, pad_to), f"{name} ({dataset.name} {dataset.split})"):
        if memory.free() is None:
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
                predict_picture(network, np.zeros((*picture, 3), np.uint8), dataset.task, pad_to=pad_to, tiles=tiles)


def check_tiles(network: SegmentationNetwork, tiles: Tiles | None) -> None:
    """Raise InputError for tiles that are off the grid of features, or smaller than the windows of the network's pooling."""
    if tiles is None:
        return
    check_tile_size(tiles.size, network.backbone.grid)
    least = least_size(network)
    if not fits(least, tiles.size):
        raise InputError(
            f"`tile_size` {tiles.size[0]} {tiles.size[1]} is smaller than the windows of the network's pooling: give at least "
            f"{least[0]} {least[1]}"
        )
