"""Networks that can be followed by hand, on either grid: features are pixels, and classes say whether they are bright."""

import torch
from torch import Tensor, nn

from fast.backbone import Backbone, LowLevel
from fast.dense_prediction_cell import DensePredictionCell
from fast.segmentation import SegmentationHead, SegmentationNetwork
from reference.cell import Cell
from reference.grid import Grid

CONV1X1 = Cell.from_json('[{"op": "conv", "kernel": 1, "input": -1}]')


class Sampled(nn.Module):
    """The picture on a grid: every s-th pixel, or the mean of each patch of s × s; before it, if wanted, one at stride 4."""

    def __init__(self, *grids: Grid) -> None:
        super().__init__()
        self.grids = grids

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self._sampled(images, grid.stride, grid.align_corners) for grid in self.grids]

    def _sampled(self, images: Tensor, stride: int, align_corners: bool) -> Tensor:
        return images[:, :, ::stride, ::stride] if align_corners else nn.functional.avg_pool2d(images, stride)


def sampling_backbone(grid: Grid, *, low_level: bool = False) -> Backbone:
    """Features are pixels from 0 to 1."""
    early = [Grid(4, grid.align_corners)] if low_level else []
    return Backbone(
        "sampled",
        Sampled(*early, grid),
        channels=3,
        output_stride=grid.stride,
        mean=torch.zeros(3),
        std=torch.full((3,), 255.0),
        align_corners=grid.align_corners,
        low_level=LowLevel(3) if low_level else None,
    )


def brightness_network(grid: Grid) -> SegmentationNetwork:
    """Class 1 is where the mean of the three colours is above a half."""
    context = DensePredictionCell(CONV1X1, 3, branch_channels=1, cell_channels=1, output_stride=grid.stride)
    for weight in context.parameters():
        if weight.ndim == 4:
            nn.init.constant_(weight, 1 / weight.shape[1])
    head = SegmentationHead(context, 2)
    head.classifier.weight.data = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    head.classifier.bias = nn.Parameter(torch.tensor([0.5, 0.0]))
    return SegmentationNetwork(sampling_backbone(grid), head).eval()


def step_edge(size: tuple[int, int], place: int, axis: int) -> Tensor:
    """A picture (1, 3, H, W) that is black before `place` along the axis, 0 for rows, and white from there on."""
    picture = torch.zeros(1, 3, *size)
    picture.narrow(2 + axis, place, size[axis] - place).fill_(255.0)
    return picture
