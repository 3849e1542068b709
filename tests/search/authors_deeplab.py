"""The authors' DeepLab a second time, for tests: its variables by name, and what it computes from them in float64.

Written from research/deeplab/core/{xception,feature_extractor}.py, research/deeplab/model.py and
research/slim/nets/mobilenet/mobilenet_v2.py, on TensorFlow's names and layouts and plain PyTorch functions, so that it shares
nothing with the code under test. Inference only.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
Variables = dict[str, NDArray[np.float32]]

MOBILENET_BLOCKS = [  # expansion, channels, stride
    (1, 16, 1),
    *[(6, 24, 2), (6, 24, 1)],
    *[(6, 32, 2), *[(6, 32, 1)] * 2],
    *[(6, 64, 2), *[(6, 64, 1)] * 3],
    *[(6, 96, 1)] * 3,
    *[(6, 160, 2), *[(6, 160, 1)] * 2],
    (6, 320, 1),
]


def xception_blocks(variant: str) -> Iterator[tuple[str, tuple[int, int, int], str, int]]:
    """Scope of each unit, depths, kind of the skip connection, stride."""
    entry = {
        "xception_41": [(128, 2), (256, 2), (728, 2)],
        "xception_65": [(128, 2), (256, 2), (728, 2)],
        "xception_71": [(128, 2), (256, 1), (256, 2), (728, 1), (728, 2)],
    }[variant]
    for i, (depth, stride) in enumerate(entry, 1):
        yield f"entry_flow/block{i}/unit_1", (depth, depth, depth), "conv", stride
    for i in range(1, 9 if variant == "xception_41" else 17):
        yield f"middle_flow/block1/unit_{i}", (728, 728, 728), "sum", 1
    yield "exit_flow/block1/unit_1", (728, 1024, 1024), "conv", 2
    yield "exit_flow/block2/unit_1", (1536, 1536, 2048), "none", 1


def variable_shapes(variant: str, *, context: str, decoder: bool, classes: int = 5) -> Shapes:
    """All variables of a network; `context` is "dpc" (the published cell), "aspp", or "image_pooling" (ASPP without rates)."""
    shapes: Shapes = {}

    def conv(scope: str, kernel: int, channels: int, out: int) -> int:
        shapes[f"{scope}/weights"] = (kernel, kernel, channels, out)
        norm(scope, out)
        return out

    def depthwise(scope: str, channels: int) -> None:
        shapes[f"{scope}/depthwise_weights"] = (3, 3, channels, 1)
        norm(scope, channels)

    def norm(scope: str, channels: int) -> None:
        for leaf in ("beta", "gamma", "moving_mean", "moving_variance"):
            shapes[f"{scope}/BatchNorm/{leaf}"] = (channels,)

    def separable(scope: str, channels: int, out: int) -> int:
        depthwise(f"{scope}_depthwise", channels)
        return conv(f"{scope}_pointwise", 1, channels, out)

    if variant == "MobilenetV2":
        channels = conv("MobilenetV2/Conv", 3, 3, 32)
        for i, (expansion, out, _) in enumerate(MOBILENET_BLOCKS):
            scope = f"MobilenetV2/expanded_conv_{i}" if i else "MobilenetV2/expanded_conv"
            wide = conv(f"{scope}/expand", 1, channels, channels * expansion) if i else channels
            depthwise(f"{scope}/depthwise", wide)
            channels = conv(f"{scope}/project", 1, wide, out)
        low_level = 24 * 6
    else:
        channels = conv(f"{variant}/entry_flow/conv1_2", 3, conv(f"{variant}/entry_flow/conv1_1", 3, 3, 32), 64)
        for unit, depths, skip, _ in xception_blocks(variant):
            scope = f"{variant}/{unit}/xception_module"
            if skip == "conv":
                conv(f"{scope}/shortcut", 1, channels, depths[-1])
            for k, depth in enumerate(depths, 1):
                channels = separable(f"{scope}/separable_conv{k}", channels, depth)
        low_level = 256
    if context == "dpc":
        for i, branch_channels in enumerate((channels, 256, 256, 256, 256)):
            separable(f"meta_architecture/branch{i}", branch_channels, 256)
        conv("meta_architecture/concat_projection", 1, 5 * 256, 256)
    else:
        rates = 3 if context == "aspp" else 0
        conv("image_pooling", 1, channels, 256)
        conv("aspp0", 1, channels, 256)
        for i in range(rates):
            separable(f"aspp{i + 1}", channels, 256)
        conv("concat_projection", 1, (2 + rates) * 256, 256)
    if decoder:
        conv("decoder/feature_projection0", 1, low_level, 48)
        separable("decoder/decoder_conv0", 256 + 48, 256)
        separable("decoder/decoder_conv1", 256, 256)
    return shapes | {"logits/semantic/weights": (1, 1, 256, classes), "logits/semantic/biases": (classes,)}


def random_variables(shapes: Shapes, seed: int = 0) -> Variables:
    """Values that keep the maps' size through all layers, none of them neutral (no gamma of 1, no mean of 0)."""
    rng = np.random.default_rng(seed)
    variables = {}
    for name, shape in shapes.items():
        if name.endswith(("gamma", "moving_variance")):
            values: Any = rng.uniform(0.5, 1.5, shape)
        elif len(shape) == 4:
            fan_in = 9 if name.endswith("depthwise_weights") else shape[0] * shape[1] * shape[2]
            values = rng.standard_normal(shape, dtype=np.float32) * np.float32(np.sqrt(1 / fan_in))
        else:
            values = 0.2 * rng.standard_normal(shape)
        variables[name] = np.asarray(values, dtype=np.float32)
    return variables


class AuthorsDeepLab:
    """What the authors' graph computes from `variables`, image (1, 3, H, W) of 0 to 255 -> logits at the decoder's size."""

    def __init__(self, variant: str, variables: Variables, output_stride: int) -> None:
        self.variant, self.variables, self.output_stride = variant, variables, output_stride

    def logits(self, image: Tensor) -> Tensor:
        net = image.double() * 2 / 255 - 1
        low_level, net = self._mobilenet(net) if self.variant == "MobilenetV2" else self._xception(net)
        net = self._dpc(net) if "meta_architecture/concat_projection/weights" in self.variables else self._aspp(net)
        if "decoder/feature_projection0/weights" in self.variables:
            size = [int((extent - 1) / 4 + 1) for extent in image.shape[2:]]
            parts = [net, self._conv(low_level, "decoder/feature_projection0", eps=1e-5)]
            net = torch.cat([F.interpolate(part, size, mode="bilinear", align_corners=True) for part in parts], dim=1)
            net = self._separable(net, "decoder/decoder_conv0", rate=(1, 1), eps=1e-5)
            net = self._separable(net, "decoder/decoder_conv1", rate=(1, 1), eps=1e-5)
        weight = self._tensor("logits/semantic/weights").permute(3, 2, 0, 1)
        return F.conv2d(net, weight, self._tensor("logits/semantic/biases"))

    def _xception(self, net: Tensor) -> tuple[Tensor, Tensor]:
        variant, low_level = self.variant, net
        net = self._conv(net, f"{variant}/entry_flow/conv1_1", eps=1e-3, stride=2)
        net = self._conv(net, f"{variant}/entry_flow/conv1_2", eps=1e-3)
        stride, rate = 2, 1
        tapped = f"entry_flow/block{3 if variant == 'xception_71' else 2}/unit_1"
        for unit, _, skip, block_stride in xception_blocks(variant):
            scope = f"{variant}/{unit}/xception_module"
            unit_stride = 1 if stride == self.output_stride else block_stride
            residual = net
            for k in (1, 2, 3):
                residual = residual if skip == "none" else F.relu(residual)
                residual = self._separable(
                    residual,
                    f"{scope}/separable_conv{k}",
                    rate=(rate, rate),
                    eps=1e-3,
                    stride=unit_stride if k == 3 else 1,
                    relu=skip == "none",
                )
                if unit == tapped and k == 2:
                    low_level = residual
            if skip == "conv":
                residual = residual + self._conv(net, f"{scope}/shortcut", eps=1e-3, stride=unit_stride, relu=False)
            net = residual + net if skip == "sum" else residual
            if unit_stride == block_stride:
                stride *= block_stride
            else:
                rate *= block_stride
        return low_level, net

    def _mobilenet(self, net: Tensor) -> tuple[Tensor, Tensor]:
        def relu6(x: Tensor) -> Tensor:
            return x.clamp(0, 6)

        net = relu6(self._conv(net, "MobilenetV2/Conv", eps=1e-3, stride=2, relu=False, pad=_same))
        low_level, stride, rate = net, 2, 1
        for i, (_, out, block_stride) in enumerate(MOBILENET_BLOCKS):
            scope = f"MobilenetV2/expanded_conv_{i}" if i else "MobilenetV2/expanded_conv"
            unit_stride = 1 if stride == self.output_stride else block_stride
            wide = relu6(self._conv(net, f"{scope}/expand", eps=1e-3, relu=False)) if i else net
            wide = self._depthwise(wide, f"{scope}/depthwise", (rate, rate), eps=1e-3, stride=unit_stride, pad=_same)
            wide = relu6(wide)
            if i == 2:
                low_level = wide
            narrow = self._conv(wide, f"{scope}/project", eps=1e-3, relu=False)
            net = narrow + net if block_stride == 1 and net.shape[1] == out else narrow
            if unit_stride == block_stride:
                stride *= block_stride
            else:
                rate *= block_stride
        return low_level, net

    def _dpc(self, net: Tensor) -> Tensor:
        double = 16 // self.output_stride
        maps = {-1: net}
        for i, (source, rate) in enumerate([(-1, (1, 6)), (0, (18, 15)), (1, (6, 3)), (0, (1, 1)), (0, (6, 21))]):
            rates = (rate[0] * double, rate[1] * double)
            maps[i] = self._separable(maps[source], f"meta_architecture/branch{i}", rate=rates, eps=1e-5)
        return self._conv(torch.cat([maps[i] for i in range(5)], 1), "meta_architecture/concat_projection", eps=1e-5)

    def _aspp(self, net: Tensor) -> Tensor:
        pooled = self._conv(net.mean(dim=(2, 3), keepdim=True), "image_pooling", eps=1e-5)
        branches = [pooled.expand(-1, -1, *net.shape[2:]), self._conv(net, "aspp0", eps=1e-5)]
        for i, rate in enumerate((6, 12, 18), 1):
            if f"aspp{i}_depthwise/depthwise_weights" in self.variables:
                rates = (rate * 16 // self.output_stride,) * 2
                branches.append(self._separable(net, f"aspp{i}", rate=rates, eps=1e-5))
        return self._conv(torch.cat(branches, 1), "concat_projection", eps=1e-5)

    def _separable(
        self, x: Tensor, scope: str, *, rate: tuple[int, int], eps: float, stride: int = 1, relu: bool = True
    ) -> Tensor:
        x = self._depthwise(x, f"{scope}_depthwise", rate, eps=eps, stride=stride)
        return self._conv(F.relu(x) if relu else x, f"{scope}_pointwise", eps=eps, relu=relu)

    def _conv(
        self, x: Tensor, scope: str, *, eps: float, stride: int = 1, relu: bool = True, pad: "Pad | None" = None
    ) -> Tensor:
        weight = self._tensor(f"{scope}/weights").permute(3, 2, 0, 1)
        x = F.conv2d((pad or _fixed)(x, weight.shape[2], (1, 1), stride), weight, stride=stride)
        return F.relu(self._norm(x, scope, eps)) if relu else self._norm(x, scope, eps)

    def _depthwise(
        self, x: Tensor, scope: str, rate: tuple[int, int], *, eps: float, stride: int = 1, pad: "Pad | None" = None
    ) -> Tensor:
        weight = self._tensor(f"{scope}/depthwise_weights").permute(2, 3, 0, 1)
        x = (pad or _fixed)(x, 3, rate, stride)
        return self._norm(F.conv2d(x, weight, stride=stride, dilation=rate, groups=x.shape[1]), scope, eps)

    def _norm(self, x: Tensor, scope: str, eps: float) -> Tensor:
        beta, gamma, mean, variance = (
            self._tensor(f"{scope}/BatchNorm/{leaf}")[:, None, None]
            for leaf in ("beta", "gamma", "moving_mean", "moving_variance")
        )
        return (x - mean) / torch.sqrt(variance + eps) * gamma + beta

    def _tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.variables[name]).double()


Pad = Callable[[Tensor, int, tuple[int, int], int], Tensor]


def _fixed(x: Tensor, kernel: int, rate: tuple[int, int], stride: int) -> Tensor:
    """Half of the kernel's reach on each side, whatever the size."""
    (high, wide) = ((kernel - 1) * rate[0] // 2, (kernel - 1) * rate[1] // 2)
    return F.pad(x, (wide, wide, high, high))


def _same(x: Tensor, kernel: int, rate: tuple[int, int], stride: int) -> Tensor:
    """TensorFlow's SAME: as much as ceil(size / stride) outputs need, the odd pixel at the bottom and right."""
    pads = []
    for size, r in ((x.shape[3], rate[1]), (x.shape[2], rate[0])):
        total = max((-(-size // stride) - 1) * stride + (kernel - 1) * r + 1 - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)
