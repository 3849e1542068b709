"""A data set and a backbone as somebody has them who uses the search from Python: tiny ones."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from fast.dense_prediction_cell import DensePredictionCell
from fast.segmentation import SegmentationHead
from search.cells.space import load_cell

CLASS_NAMES = ("left", "middle", "right")


class Strips(Dataset[tuple[NDArray[np.uint8], NDArray[np.int64]]]):
    """Pictures of 33×49 pixels in two colours, one for each class; −1 where the label says nothing."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        rng = np.random.default_rng([self.seed, index])
        label = np.repeat(rng.choice(3, 2, replace=False), (16, 33))[None].repeat(33, axis=0)
        image = (80 * label[..., None] + rng.integers(0, 30, (33, 49, 3))).astype(np.uint8)
        label[0, 0] = -1
        return image, label


class Strided(nn.Module):
    """Convolutions of stride 2 with 8 channels, as many as asked for, with a batch norm."""

    def __init__(self, halvings: int, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                *(nn.Conv2d(8 if i else 3, 8, kernel_size=3, stride=2, padding=1) for i in range(halvings))
            )
        self.norm = nn.BatchNorm2d(8)

    def forward(self, images: Tensor) -> Tensor:
        normed: Tensor = self.norm(self.layers(images))
        return normed


def found_head() -> SegmentationHead:
    """A head for the features of `Strided(4)`."""
    cell = DensePredictionCell(load_cell("aspp"), 8, branch_channels=4, cell_channels=4, output_stride=16)
    return SegmentationHead(cell, len(CLASS_NAMES))
