"""Backbones from timm: from images to the last feature map, at a chosen output stride."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fast.bilinear_resize import bilinear_resize
from fast.timm_models import DEEPEST, Cut, WeightsOrigin, as_maps, channels_of, cut_of, open_model, strides_of
from reference.grid import Grid

__all__ = ["Backbone", "LowLevel", "PlainBody", "WeightsOrigin", "hash_of_weights", "plain_backbone", "timm_backbone"]

# What weights trained in the authors' code expect (research/deeplab/core/feature_extractor.py): inputs of p / 127.5 − 1,
# epsilon 1e-3 of the norms, and statistics that move by this share per step. MobileNet-v2 pads as TensorFlow's SAME does (at
# stride 2 an even size gets 0 before and 1 after), Xception by 1 on each side at every size, which is timm's own way.
_TENSORFLOW_EPS = 1e-3
_TENSORFLOW_MOMENTUM = {"mobilenetv2": 0.003, "xception": 0.0003}


class LowLevel(NamedTuple):
    """The feature map at stride 4 that a decoder reads: the output of `module` in the body, and its number of channels.

    Without a module it is the first map of those that the body returns.
    """

    channels: int
    module: str | None = None


# The maps that the authors' decoder reads (`networks_to_feature_maps`): of Xception 256 channels after batch norm and before
# ReLU, of MobileNet-v2 144 after the second depthwise convolution at stride 4. For others it is timm's own map at stride 4.
_AUTHORS_LOW_LEVEL = {
    "mobilenetv2_100": LowLevel(144, "blocks.1.1.bn2"),
    "xception41": LowLevel(256, "blocks_1.stack.conv2"),
    "xception65": LowLevel(256, "blocks_1.stack.conv2"),
    "xception71": LowLevel(256, "blocks_2.stack.conv2"),
}


class Backbone(nn.Module):
    """A network cut after its last feature map: images (N, 3, H, W), values 0 to 255 -> (N, channels, h, w).

    Its features lie on `grid`: at output stride s, pictures of s·k + 1 pixels have a feature on every s-th, the corners
    included, or without `align_corners` pictures of s·k pixels have one in the middle of each patch of s × s. `body` gives a
    list of maps from early to late, as timm's `features_only` models do (channels last where its `output_fmt` says so), and
    takes images with `mean` subtracted and divided by `std`, (3,) each. With several numbers of `channels` the features are
    the channels of as many maps, the last one first: the layers −1, −2 and so on that a cell may read. They are resized to
    the last one's size.
    """

    mean: Tensor  # (1, 3, 1, 1), of pixel values 0 to 255
    std: Tensor

    def __init__(
        self,
        name: str,
        body: nn.Module,
        *,
        channels: int | Sequence[int],
        output_stride: int,
        mean: Tensor,
        std: Tensor,
        align_corners: bool = True,
        low_level: LowLevel | None = None,
        weights_origin: WeightsOrigin = "timm",
        cut: Cut | None = None,
    ) -> None:
        super().__init__()
        self.name, self.grid = name, Grid(output_stride, align_corners)
        self.layer_channels = (channels,) if isinstance(channels, int) else tuple(channels)
        self.low_level = low_level
        self.weights_origin: WeightsOrigin = weights_origin
        self.cut = cut  # of a timm model, so `timm_backbone` can build it again
        self.body = body
        self.register_buffer("mean", mean.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", std.view(1, 3, 1, 1), persistent=False)
        self._tapped: list[Tensor] = []
        if low_level is not None and low_level.module is not None:
            _keep_unchanged(body, low_level.module)
            body.get_submodule(low_level.module).register_forward_hook(self._tap)

    @property
    def channels(self) -> int:
        """The number of all channels of a feature."""
        return sum(self.layer_channels)

    @property
    def layers(self) -> tuple[int, ...]:
        """The maps that the features are made of, counted from the end."""
        return tuple(range(-1, -1 - len(self.layer_channels), -1)) if self.cut is None else self.cut.layers

    @property
    def output_stride(self) -> int:
        """Pixels per feature."""
        return self.grid.stride

    @property
    def patch_size(self) -> int | None:
        """The size to which the patches of a vision transformer were resampled; None for its own."""
        return None if self.cut is None else self.cut.patch_size

    def forward(self, images: Tensor, with_low_level: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The features, or with the low-level map before them, as `with_low_level` gives them."""
        maps = self._maps(images)
        layers = maps[: -len(self.layer_channels) - 1 : -1]
        size = layers[0].shape[2], layers[0].shape[3]
        resized = [
            layer if layer.shape[2:] == size else bilinear_resize(layer, size, align_corners=self.grid.align_corners)
            for layer in layers
        ]
        features = resized[0] if len(resized) == 1 else torch.cat(resized, dim=1)
        return (maps[0], features) if with_low_level else features

    def with_low_level(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The map for a decoder (N, low_level.channels, ceil(H / 4), ceil(W / 4)), and the features.

        Raises ValueError for a backbone that was built without the low-level map.
        """
        if self.low_level is None:
            raise ValueError(f"backbone {self.name} was built without the map at stride 4 that a decoder reads")
        maps: tuple[Tensor, Tensor] = self(images, with_low_level=True)  # as a call, so that hooks run
        return maps

    def _maps(self, images: Tensor) -> list[Tensor]:
        self._tapped.clear()
        self._require_whole_patches(images)
        maps = as_maps(self.body, self.body((images - self.mean) / self.std))
        tapped = [*self._tapped, *maps]
        self._tapped.clear()  # keeps no activation alive
        return tapped

    def _require_whole_patches(self, images: Tensor) -> None:
        size = images.shape[2], images.shape[3]
        if not self.grid.align_corners and not torch.compiler.is_compiling() and not self.grid.has(size):
            near = "×".join(map(str, self.grid.nearest(size)))
            raise ValueError(
                f"backbone {self.name} takes pictures of {self.grid} pixels each way, such as {near}, got {size[0]}×{size[1]}"
            )

    def _tap(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self._tapped.append(output)

    def blocks(self) -> list[nn.Module]:
        """The blocks of the body in the order of its modules, such as a ViT's `blocks.0`, or `blocks.6.0` of a MobileNet.

        They are the members of its sequences of blocks, in whatever stages these lie. A body without such sequences has its
        layers: convolutions and linear maps.
        """
        layers = [module for module in self.body.modules() if not any(module.children()) and _has_matrix(module)]
        return _blocks(self.body) or layers

    def weights_hash(self) -> str:
        """A hash of all weights and statistics, by which cached features are told from those of another backbone."""
        return hash_of_weights(self, self.mean, self.std)


_SEQUENCES = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks below: members of sequences that are themselves neither sequences, nor stages, nor a layer or a norm."""
    found = []
    for child in module.children():
        if isinstance(child, _SEQUENCES) or _is_stage(child):
            found += _blocks(child)
        elif isinstance(module, _SEQUENCES) and any(child.children()) and _has_matrix(child):
            found.append(child)
    return found or [block for child in module.children() for block in _blocks(child)]


def _is_stage(module: nn.Module) -> bool:
    """Whether it has a sequence of blocks, as stages of ConvNeXt and Swin do; a block has at most sequences of layers."""
    sequences = (list(child.children()) for child in module.children() if isinstance(child, _SEQUENCES))
    return any(members and all(any(member.children()) for member in members) for members in sequences)


def _has_matrix(module: nn.Module) -> bool:
    """Whether it has the weight of a convolution or a linear map; those of norms are vectors."""
    return any(parameter.ndim > 1 for parameter in module.parameters())


def hash_of_weights(module: nn.Module, *constants: Tensor) -> str:
    """A hash of the module's weights and statistics, and of the constants."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    for constant in constants:
        digest.update(constant.cpu().numpy().tobytes())
    return digest.hexdigest()


class PlainBody(nn.Module):
    """Plain 3×3 convolutions with batch norm and ReLU; the first ones halve the map until `output_stride` is reached.

    At a smaller one than `trained_output_stride`, at which the weights were trained, the layers behind the stride that is left
    out are dilated, so that they still see what they did.
    """

    def __init__(self, channels: tuple[int, ...], output_stride: int, trained_output_stride: int | None = None) -> None:
        super().__init__()
        self.channels = channels
        self.trained_output_stride = output_stride if trained_output_stride is None else trained_output_stride
        if output_stride & (output_stride - 1):
            raise ValueError(
                f"layers that halve the map have no features at output stride {output_stride}, but at 4, 8, 16 or 32"
            )
        if output_stride > self.trained_output_stride:
            raise ValueError(f"weights trained at output stride {trained_output_stride} give no features at {output_stride}")
        layers: list[nn.Module] = []
        stride = trained = 1  # of the map that a layer reads, here and where the weights were trained
        for in_channels, out_channels in zip((3, *channels), channels, strict=False):
            step, dilation = (2 if stride < output_stride else 1), trained // stride
            convolution = nn.Conv2d(
                in_channels, out_channels, kernel_size=3, stride=step, padding=dilation, dilation=dilation, bias=False
            )
            layers += [convolution, nn.BatchNorm2d(out_channels), nn.ReLU()]
            stride, trained = stride * step, trained * (2 if trained < self.trained_output_stride else 1)
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.layers(images)]


def plain_backbone(
    name: str,
    channels: tuple[int, ...],
    *,
    output_stride: int,
    trained_output_stride: int | None = None,
    low_level: bool = False,
) -> Backbone:
    """A small backbone with a `PlainBody` of random weights, for images scaled to −1..1; its low-level map is the second."""
    half = torch.full((3,), 127.5)
    return Backbone(
        name,
        PlainBody(channels, output_stride, trained_output_stride),
        channels=channels[-1],
        output_stride=output_stride,
        mean=half,
        std=half,
        low_level=LowLevel(channels[1], "layers.5") if low_level else None,
    )


def timm_backbone(
    name: str,
    *,
    output_stride: int | None = None,
    layers: Sequence[int] = (-1,),
    patch_size: int | None = None,
    weights: Path | None = None,
    pretrained: bool = False,
    weights_origin: WeightsOrigin = "timm",
    low_level: bool = False,
    cut: Cut | None = None,
) -> Backbone:
    """A backbone from timm, any model with maps of features; the paper's are mobilenetv2_100, xception65 and xception71.

    Without `output_stride` it has 16 pixels per feature, or as many as a patch if it is a vision transformer. Where timm
    cannot build a model at this stride, its last map that has it is taken. `layers` are the maps that make up the features,
    counted from the end: −1 is that one, −2 the one before it. `patch_size` resamples a vision transformer's kernel to other
    patches. The grid is measured (`fast/measured_grid.py`). All this is known where `cut` is that of an earlier backbone.

    `weights` is a local file in timm's key names, safetensors or PyTorch, as any training writes it (`fast/weights.py`);
    `pretrained=True` lets timm download its own; with neither the weights are random. `weights_origin="tensorflow"` is for
    weights that were trained in TensorFlow: its padding, epsilon 1e-3 and inputs scaled to −1..1, where timm's own use the
    mean and deviation in their configuration. `low_level=True` also gives the map at stride 4 that a decoder reads. Raises
    ValueError naming the model, or the file and the keys that do not fit.
    """
    if cut is None:
        cut = cut_of(name, output_stride, tuple(layers), patch_size, weights_origin)
    tap = _AUTHORS_LOW_LEVEL.get(name.split(".")[0]) if low_level else None
    indices = cut.indices
    if low_level and tap is None:
        indices = (_index_at_stride_4(name, cut, weights_origin), *indices)
    body = open_model(name, tuple(dict.fromkeys(indices)), cut, weights_origin, pretrained=pretrained, weights=weights)
    if weights_origin == "tensorflow":
        _follow_tensorflow(body, name)
    mean, std = _normalisation(body, weights_origin)
    channels = channels_of(body)
    return Backbone(
        name,
        body,
        channels=channels[: -len(cut.layers) - 1 : -1],
        output_stride=cut.grid.stride,
        mean=mean,
        std=std,
        align_corners=cut.grid.align_corners,
        low_level=LowLevel(channels[0]) if low_level and tap is None else tap,
        weights_origin=weights_origin,
        cut=cut,
    )


def _index_at_stride_4(name: str, cut: Cut, weights_origin: WeightsOrigin) -> int:
    """Which of timm's maps a decoder reads, counted from the last one."""
    strides = strides_of(open_model(name, (DEEPEST,), cut, weights_origin))
    before = strides[: len(strides) + cut.deepest]
    if 4 not in before:
        has = ", ".join(map(str, sorted(set(strides[: len(before) + 1]))))
        raise ValueError(f"backbone {name!r} has no map at stride 4 for a decoder, only at {has}")
    index = len(before) - 1 - before[::-1].index(4) - len(strides)
    if min(cut.indices) < index:
        raise ValueError(
            f"backbone {name!r} has the map at stride 4 for a decoder behind layer {min(cut.layers)}: leave that layer out"
        )
    return index


def _follow_tensorflow(body: nn.Module, name: str) -> None:
    momentum = next((value for family, value in _TENSORFLOW_MOMENTUM.items() if name.startswith(family)), None)
    for norm in body.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eps = _TENSORFLOW_EPS
            norm.momentum = norm.momentum if momentum is None else momentum


def _keep_unchanged(body: nn.Module, tapped: str) -> None:
    """Make the ReLU behind the tapped map not overwrite it (timm's Xception applies it in place)."""
    for module in body.get_submodule(tapped.rpartition(".")[0]).children():
        if isinstance(module, nn.ReLU):
            module.inplace = False


def _normalisation(body: nn.Module, weights_origin: WeightsOrigin) -> tuple[Tensor, Tensor]:
    if weights_origin == "tensorflow":
        return torch.full((3,), 127.5), torch.full((3,), 127.5)
    config: Any = getattr(body, "pretrained_cfg", None) or {}
    mean, std = config.get("mean", (0.485, 0.456, 0.406)), config.get("std", (0.229, 0.224, 0.225))
    return torch.tensor(mean) * 255, torch.tensor(std) * 255
