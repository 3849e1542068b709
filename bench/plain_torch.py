"""The baseline: operations, cell, head and training step as a good PyTorch user writes them, with `torch.nn` modules.

`weights()` returns the live parameters in the reference's containers, so that ours computes with the same ones.
"""

from itertools import chain
from typing import TypeAlias, assert_never, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.batch_norm import MOMENTUM
from reference.atrous_separable_conv import SeparableConv
from reference.batch_norm import EPS, BatchNorm
from reference.cell import BACKBONE_FEATURE, AtrousSeparableConv, Cell, Conv1x1, Operation, PyramidPooling
from reference.concat_project import DROPOUT_RATE
from reference.dense_prediction_cell import CellWeights
from reference.pointwise_conv import ConvNorm
from reference.pyramid_pooling import window_size
from reference.upsampled_cross_entropy import IGNORE_INDEX


class ConvNormReLU(nn.Sequential):
    """Convolution, batch norm, ReLU: (N, C_in, H, W) -> (N, C_out, H, W); `rate` makes it 3×3 and depthwise."""

    def __init__(self, in_channels: int, channels: int, rate: tuple[int, int] | None = None) -> None:
        if rate is None:
            conv = nn.Conv2d(in_channels, channels, kernel_size=1, bias=False)
        else:
            conv = nn.Conv2d(in_channels, channels, 3, padding=rate, dilation=rate, groups=in_channels, bias=False)
        super().__init__(conv, nn.BatchNorm2d(channels, eps=EPS, momentum=MOMENTUM), nn.ReLU(inplace=True))

    def weights(self) -> ConvNorm[Tensor]:
        conv, norm = cast(nn.Conv2d, self[0]), cast(nn.BatchNorm2d, self[1])
        mean, var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)  # always tracked
        return ConvNorm(conv.weight, BatchNorm(norm.weight, norm.bias, mean, var))


class Separable(nn.Module):
    """Depthwise, BN, ReLU, pointwise, BN, ReLU: (N, C_in, H, W) -> (N, C_out, H, W)."""

    def __init__(self, in_channels: int, channels: int, rate: tuple[int, int]) -> None:
        super().__init__()
        self.depthwise = ConvNormReLU(in_channels, in_channels, rate)
        self.pointwise = ConvNormReLU(in_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.pointwise(self.depthwise(x))
        return output

    def weights(self) -> SeparableConv[Tensor]:
        return SeparableConv(self.depthwise.weights(), self.pointwise.weights())


class Pooling(nn.Module):
    """Sliding means, 1×1 convolution, BN, ReLU, resize back: (N, C_in, H, W) -> (N, C_out, H, W)."""

    def __init__(self, in_channels: int, channels: int, grid_size: tuple[int, int]) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.conv = ConvNormReLU(in_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        window = (window_size(x.shape[2], self.grid_size[0]), window_size(x.shape[3], self.grid_size[1]))
        means = F.avg_pool2d(x, window, stride=1)
        return F.interpolate(self.conv(means), x.shape[2:], mode="bilinear", align_corners=True)

    def weights(self) -> ConvNorm[Tensor]:
        return self.conv.weights()


OperationModule: TypeAlias = ConvNormReLU | Separable | Pooling


def operation_module(operation: Operation, in_channels: int, channels: int) -> OperationModule:
    """One of the 81 operations."""
    match operation:
        case Conv1x1():
            return ConvNormReLU(in_channels, channels)
        case AtrousSeparableConv(rate):
            return Separable(in_channels, channels, rate)
        case PyramidPooling(grid_size):
            return Pooling(in_channels, channels, grid_size)
        case _:
            assert_never(operation)


class PlainCell(nn.Module):
    """A dense prediction cell at output stride 16: (N, C_in, H, W) -> (N, channels, H, W)."""

    def __init__(self, cell: Cell, in_channels: int, channels: int, dropout_rate: float = DROPOUT_RATE) -> None:
        super().__init__()
        self.inputs = [branch.input_index for branch in cell.branches]
        self.branches = nn.ModuleList(
            operation_module(b.operation, in_channels if b.input_index == BACKBONE_FEATURE else channels, channels)
            for b in cell.branches
        )
        self.dropout = nn.Dropout(dropout_rate)
        self.projection = ConvNormReLU(len(cell.branches) * channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        maps: list[Tensor] = []
        for i, branch in zip(self.inputs, self.branches, strict=True):
            maps.append(branch(features if i == BACKBONE_FEATURE else maps[i]))
        output: Tensor = self.projection(self.dropout(torch.cat(maps, dim=1)))
        return output

    def weights(self) -> CellWeights[Tensor]:
        branches = (cast(OperationModule, branch) for branch in self.branches)
        return CellWeights(tuple(branch.weights() for branch in branches), self.projection.weights())


class PlainHead(nn.Sequential):
    """A cell and a 1×1 classifier: features (N, C, h, w) -> logits (N, num_classes, h, w)."""

    def __init__(self, cell: PlainCell, channels: int, num_classes: int) -> None:
        super().__init__(cell, nn.Conv2d(channels, num_classes, kernel_size=1))


class UpsampledLoss(nn.Module):
    """logits (N, K, h, w), labels (N, H, W) uint8 -> the mean loss ()."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        upsampled = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=True)
        return F.cross_entropy(upsampled, labels.long(), ignore_index=IGNORE_INDEX)


class UpsampledConfusion(nn.Module):
    """logits (N, K, h, w), labels (N, H, W) uint8 -> pixels by (label, best class): (K, K)."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        num_classes = logits.shape[1]
        best = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=True).argmax(dim=1)
        # Ignored pixels are counted in an extra bin instead of filtered out, which would wait for their number on a GPU.
        pairs = torch.where(labels == IGNORE_INDEX, num_classes**2, labels.long() * num_classes + best)
        counts = torch.bincount(pairs.flatten(), minlength=num_classes**2 + 1)
        return counts[:-1].view(num_classes, num_classes)


class HeadWithLoss(nn.Module):
    """The module that a user compiles: features and labels -> the loss."""

    def __init__(self, head: PlainHead) -> None:
        super().__init__()
        self.head = head
        self.loss = UpsampledLoss()

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.loss(self.head(features), labels)
        return loss


class PlainTrainStep:
    """`fast.train_step.TrainStep` in plain PyTorch: one call draws crops, goes forward and back, and takes a step of SGD.

    Features: (images, C, H, W) and labels: (images, H_px, W_px) lie on the device. `compile_mode` is that of
    `torch.compile`, None for eager.
    """

    def __init__(
        self,
        head: PlainHead,
        features: Tensor,
        labels: Tensor,
        *,
        output_stride: int,
        crop: tuple[int, int],
        batch_size: int,
        iterations: int,
        learning_rate: float,
        momentum: float,
        weight_decay: float,
        compile_mode: str | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self._features, self._labels, self._memory_format = features, labels, memory_format
        self._stride, self._crop, self._batch_size = output_stride, crop, batch_size
        self._model: nn.Module = HeadWithLoss(head).train()
        groups = [
            {"params": decayed(head), "weight_decay": weight_decay},
            {"params": [p for p in head.parameters() if all(p is not d for d in decayed(head))], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, fused=True)
        self._schedule = torch.optim.lr_scheduler.PolynomialLR(self._optimizer, iterations, power=0.9)
        self._loss = torch.compile(self._model, mode=compile_mode, dynamic=False) if compile_mode else self._model

    def __call__(self) -> Tensor:
        loss: Tensor = self._loss(*self._draw())
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._schedule.step()
        return loss.detach()

    def _draw(self) -> tuple[Tensor, Tensor]:
        """Crops of features, (N, C, h, w) float32, and their labels, (N, H, W) uint8."""
        limits = [self._features.shape[0], *(s - c + 1 for s, c in zip(self._features.shape[2:], self._crop, strict=True))]
        places = [torch.randint(limit, (self._batch_size,)).tolist() for limit in limits]
        height, width = (self._stride * (extent - 1) + 1 for extent in self._crop)
        crops, labels = [], []
        for image, top, left in zip(*places, strict=True):
            crops.append(self._features[image, :, top : top + self._crop[0], left : left + self._crop[1]])
            window = self._labels[image, self._stride * top :, self._stride * left :]
            labels.append(window[:height, :width])
        with torch.autocast(self._features.device.type, enabled=False):  # under bfloat16 autocast it cannot stack float16
            batch = torch.stack(crops).to(torch.float32, memory_format=self._memory_format)
        return batch, torch.stack(labels)


def decayed(head: PlainHead) -> list[Tensor]:
    """The parameters that carry weight decay: weights of pointwise convolutions (deeplab's rule)."""
    return [module.weight for module in head.modules() if isinstance(module, nn.Conv2d) and module.groups == 1]


def randomise(module: nn.Module, seed: int) -> None:
    """Fill all weights with random numbers: convolutions keep their input's variance, norms differ by channel."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, nn.Conv2d):
                fan_in = child.weight[0].numel()
                nn.init.normal_(child.weight, std=fan_in**-0.5, generator=generator)
                if child.bias is not None:
                    nn.init.normal_(child.bias, std=0.1, generator=generator)
            elif isinstance(child, nn.BatchNorm2d):
                for tensor in chain((child.weight,), (cast(Tensor, child.running_var),)):
                    nn.init.uniform_(tensor, 0.5, 1.5, generator=generator)
                for tensor in chain((child.bias,), (cast(Tensor, child.running_mean),)):
                    nn.init.normal_(tensor, std=0.5, generator=generator)
