"""The baseline: network and training step as a good PyTorch user writes them, of `torch.nn` alone.

All state has the keys of ours, so that either side can load the other's. The tests of `fast/` take it as their yardstick too.
"""

from typing import Any, TypeVar, assert_never, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.batch_norm import MOMENTUM
from fast.dense_prediction_cell import decays
from reference.atrous_separable_conv import SeparableConv
from reference.batch_norm import EPS, BatchNorm
from reference.cell import BACKBONE_FEATURE, AtrousSeparableConv, Cell, Conv1x1, Operation, PyramidPooling
from reference.dense_prediction_cell import BranchWeights, CellWeights
from reference.grid import Grid
from reference.pointwise_conv import ConvNorm
from reference.pyramid_pooling import PoolingVariant, window_size
from reference.upsampled_cross_entropy import IGNORE_INDEX


class ConvNormReLU(nn.Conv2d):
    """Convolution, batch norm, ReLU: (N, C_in, H, W) -> (N, C, H, W); `rate` makes it 3×3 and depthwise."""

    def __init__(self, in_channels: int, channels: int, rate: tuple[int, int] | None = None) -> None:
        depthwise: Any = {} if rate is None else {"padding": rate, "dilation": rate, "groups": in_channels}
        super().__init__(in_channels, channels, 1 if rate is None else 3, bias=False, **depthwise)
        self.norm = nn.BatchNorm2d(channels, eps=EPS, momentum=MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(super().forward(x)), inplace=True)

    def weights(self) -> ConvNorm[Tensor]:
        """The live parameters and statistics, in the reference's container."""
        mean, var = cast(Tensor, self.norm.running_mean), cast(Tensor, self.norm.running_var)  # always tracked
        return ConvNorm(self.weight, BatchNorm(self.norm.weight, self.norm.bias, mean, var))


class PlainBranch(nn.Module):
    """Any of the 81 operations: (N, C_in, H, W) -> (N, C, H, W)."""

    def __init__(
        self, operation: Operation, in_channels: int, channels: int, pooling: PoolingVariant = "sliding_window"
    ) -> None:
        super().__init__()
        self.operation, self.pooling = operation, pooling
        self.depthwise: ConvNormReLU | None = None
        match operation:
            case AtrousSeparableConv(rate):
                self.depthwise = ConvNormReLU(in_channels, in_channels, rate)
            case Conv1x1() | PyramidPooling():
                pass
            case _:
                assert_never(operation)
        self.pointwise = ConvNormReLU(in_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor
        match self.operation:
            case Conv1x1():
                output = self.pointwise(x)
            case AtrousSeparableConv():
                output = self.pointwise(cast(ConvNormReLU, self.depthwise)(x))
            case PyramidPooling(grid_size):
                output = F.interpolate(
                    self.pointwise(self._means(x, grid_size)), x.shape[2:], mode="bilinear", align_corners=True
                )
            case _:
                assert_never(self.operation)
        return output

    def _means(self, x: Tensor, grid_size: tuple[int, int]) -> Tensor:
        if self.pooling == "grid_cells":
            return F.adaptive_avg_pool2d(x, grid_size)
        window = (window_size(x.shape[2], grid_size[0]), window_size(x.shape[3], grid_size[1]))
        return F.avg_pool2d(x, window, stride=1)

    def weights(self) -> BranchWeights[Tensor]:
        pointwise = self.pointwise.weights()
        return pointwise if self.depthwise is None else SeparableConv(self.depthwise.weights(), pointwise)


class PlainCell(nn.Module):
    """A dense prediction cell at output stride 16: (N, C_in, H, W) -> (N, cell_channels, H, W)."""

    def __init__(
        self,
        cell: Cell,
        in_channels: int,
        branch_channels: int,
        cell_channels: int,
        dropout_rate: float = 0.0,
        pooling: PoolingVariant = "sliding_window",
    ) -> None:
        super().__init__()
        self.inputs = [branch.input_index for branch in cell.branches]
        widths = [in_channels if i == BACKBONE_FEATURE else branch_channels for i in self.inputs]
        self.branches = nn.ModuleList(
            PlainBranch(branch.operation, width, branch_channels, pooling)
            for branch, width in zip(cell.branches, widths, strict=True)
        )
        self.dropout = nn.Dropout(dropout_rate)
        self.projection = ConvNormReLU(len(cell.branches) * branch_channels, cell_channels)

    def forward(self, features: Tensor) -> Tensor:
        maps: list[Tensor] = []
        for i, branch in zip(self.inputs, self.branches, strict=True):
            maps.append(branch(features if i == BACKBONE_FEATURE else maps[i]))
        output: Tensor = self.projection(self.dropout(torch.cat(maps, dim=1)))
        return output

    def weights(self) -> CellWeights[Tensor]:
        branches = tuple(cast(PlainBranch, branch).weights() for branch in self.branches)
        return CellWeights(branches, self.projection.weights())


class PlainHead(nn.Module):
    """A cell and a 1×1 classifier: features (N, C, h, w) -> logits (N, num_classes, h, w)."""

    def __init__(self, context: PlainCell, channels: int, num_classes: int) -> None:
        super().__init__()
        self.context, self.classifier = context, nn.Conv2d(channels, num_classes, kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.context(features))
        return logits


def upsampled_loss(logits: Tensor, labels: Tensor, *, align_corners: bool) -> Tensor:
    """logits (N, K, h, w), labels (N, H, W) uint8 -> the mean loss ()."""
    upsampled = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=align_corners)
    return F.cross_entropy(upsampled, labels.long(), ignore_index=IGNORE_INDEX)


def upsampled_confusion(logits: Tensor, labels: Tensor, *, align_corners: bool) -> Tensor:
    """logits (N, K, h, w), labels (N, H, W) uint8 -> pixels by (label, best class): (K, K)."""
    num_classes = logits.shape[1]
    best = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=align_corners).argmax(dim=1)
    # Ignored pixels are counted behind the matrix, instead of selected away: no wait for their number on a GPU.
    pairs = torch.where(labels == IGNORE_INDEX, num_classes**2, labels.long() * num_classes + best)
    counts = torch.bincount(pairs.flatten(), minlength=num_classes**2 + 1)
    return counts[:-1].view(num_classes, num_classes)


class HeadWithLoss(nn.Module):
    """The module that a user compiles: features and labels -> the loss."""

    def __init__(self, head: PlainHead, *, align_corners: bool) -> None:
        super().__init__()
        self.head, self.align_corners = head, align_corners

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return upsampled_loss(self.head(features), labels, align_corners=self.align_corners)


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
        grid: Grid,
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
        self._grid, self._crop, self._batch_size = grid, crop, batch_size
        self._dtype = next(head.parameters()).dtype
        decayed, parameters = decays(head), dict(head.named_parameters())
        groups = [
            {"params": [parameters[name] for name in decayed if decayed[name] == decay], "weight_decay": weight_decay * decay}
            for decay in (True, False)
        ]
        self._optimizer = torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, fused=True)
        self._schedule = torch.optim.lr_scheduler.PolynomialLR(self._optimizer, iterations, power=0.9)
        model: nn.Module = HeadWithLoss(head, align_corners=grid.align_corners).train()
        self._loss = torch.compile(model, mode=compile_mode, dynamic=False) if compile_mode else model

    def __call__(self) -> Tensor:
        loss: Tensor = self._loss(*self._draw())
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._schedule.step()
        return loss.detach()

    def _draw(self) -> tuple[Tensor, Tensor]:
        """Crops of features, (N, C, h, w) in the head's dtype, and their labels, (N, H, W) uint8."""
        limits = [self._features.shape[0], *(s - c + 1 for s, c in zip(self._features.shape[2:], self._crop, strict=True))]
        places = [torch.randint(limit, (self._batch_size,)).tolist() for limit in limits]
        (height, width), stride = self._grid.pixels(self._crop), self._grid.stride
        crops, labels = [], []
        for image, top, left in zip(*places, strict=True):
            crops.append(self._features[image, :, top : top + self._crop[0], left : left + self._crop[1]])
            window = self._labels[image, stride * top :, stride * left :]
            labels.append(window[:height, :width])
        with torch.autocast(self._features.device.type, enabled=False):  # under bfloat16 autocast it cannot stack float16
            batch = torch.stack(crops).to(self._dtype, memory_format=self._memory_format)
        return batch, torch.stack(labels)


ModuleT = TypeVar("ModuleT", bound=nn.Module)


def randomise(module: ModuleT, seed: int) -> ModuleT:
    """The module, all weights drawn from the seed: convolutions keep their input's variance, norms differ by channel."""
    generator = torch.Generator().manual_seed(seed)
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.normal_(child.weight, std=child.weight[0].numel() ** -0.5, generator=generator)
            if child.bias is not None:
                nn.init.normal_(child.bias, std=0.1, generator=generator)
        elif isinstance(child, nn.BatchNorm2d):
            for tensor in (child.weight, cast(Tensor, child.running_var)):
                nn.init.uniform_(tensor, 0.5, 1.5, generator=generator)
            for tensor in (child.bias, cast(Tensor, child.running_mean)):
                nn.init.normal_(tensor, std=0.5, generator=generator)
    return module
