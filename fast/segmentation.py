"""Class scores from features (the cell with its classifier) or from images (with a backbone)."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from fast.backbone import Backbone
from fast.bilinear_resize import bilinear_resize
from fast.decoder import Decoder
from fast.dense_prediction_cell import DensePredictionCell
from fast.fusion import check_traceable, fuses, refuse_script
from fast.hub import HubModule
from fast.kernels import NormedMap, operations_for
from reference.decoder import OUTPUT_STRIDE as DECODER_STRIDE
from reference.grid import Grid


def _classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """A 1×1 convolution with bias."""
    conv = nn.Conv2d(channels, num_classes, kernel_size=1)
    nn.init.trunc_normal_(conv.weight, std=0.01, a=-0.02, b=0.02)
    nn.init.zeros_(cast(Tensor, conv.bias))
    return conv


class SegmentationHead(HubModule):
    """A cell and a 1×1 classifier with bias: features (N, C, h, w) -> logits (N, num_classes, h, w).

    This is all that the proxy task trains (paper, section 3.3).
    """

    def __init__(self, context: DensePredictionCell, num_classes: int) -> None:
        super().__init__()
        self.context = context
        self.classifier = _classifier(context.cell_channels, num_classes)

    __prepare_scriptable__ = refuse_script

    def forward(self, features: Tensor, refine: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """With `refine` the classifier reads what that makes of the context."""
        check_traceable(features)
        if refine is None and fuses(features, self._modules):
            return _classified(self.context.lazy(features), self.classifier)
        context = self.context(features) if refine is None else refine(self.context(features))
        if fuses(context, {"classifier": self.classifier}):
            return _classified(NormedMap(context), self.classifier)
        logits: Tensor = self.classifier(context)
        return logits


def _classified(x: NormedMap, classifier: nn.Conv2d) -> Tensor:
    """The classifier, fused, of a map whose norm may not yet be applied."""
    logits = operations_for(x.raw).pointwise_conv([x], classifier.weight, None).raw
    return logits if classifier.bias is None else logits + classifier.bias[:, None, None]


class SegmentationNetwork(HubModule):
    """Backbone and head, with or without a decoder between context and classifier.

    Images (N, 3, H, W) with values 0 to 255 -> logits (N, K, ceil(H / s), ceil(W / s)), where s is `logits_stride`: 4 with a
    decoder, else the backbone's output stride. Raises ValueError where the parts disagree on channels or output stride.
    """

    def __init__(self, backbone: Backbone, head: SegmentationHead, decoder: Decoder | None = None) -> None:
        super().__init__()
        wanted = (head.context.input_channels, head.context.output_stride)
        if wanted != (backbone.layer_channels, backbone.output_stride):
            needed, present = (" + ".join(map(str, each)) for each in (wanted[0], backbone.layer_channels))
            raise ValueError(
                f"head was built for {needed} channels at output stride {wanted[1]}, "
                f"backbone {backbone.name} gives {present} at {backbone.output_stride}"
            )
        if decoder is not None:
            given = (head.context.cell_channels, backbone.low_level.channels if backbone.low_level is not None else None)
            if given != (decoder.channels, decoder.low_level_channels):
                raise ValueError(
                    f"decoder was built for {decoder.channels} channels of context and {decoder.low_level_channels} at stride "
                    f"4, the cell gives {given[0]} and backbone {backbone.name} {given[1]}"
                )
        self.backbone = backbone
        self.head = head
        self.decoder = decoder

    @property
    def logits_grid(self) -> Grid:
        """Where the logits sit on the pixels of the images."""
        grid = self.backbone.grid
        return grid if self.decoder is None else Grid(DECODER_STRIDE, grid.align_corners)

    @property
    def logits_stride(self) -> int:
        """Pixels per position of the logits."""
        return self.logits_grid.stride

    __prepare_scriptable__ = refuse_script

    def forward(self, images: Tensor) -> Tensor:
        check_traceable(images)
        decoder = self.decoder
        logits: Tensor
        if decoder is None:
            logits = self.head(self.backbone(images))
        else:
            low_level, features = self.backbone.with_low_level(images)
            align_corners = self.backbone.grid.align_corners
            logits = self.head(features, lambda context: decoder(context, low_level, align_corners=align_corners))
        return logits

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """The best class per pixel: (N, 3, H, W) -> (N, H, W), int64; logits are resized before the choice."""
        size, align_corners = (images.shape[2], images.shape[3]), self.backbone.grid.align_corners
        return bilinear_resize(self(images).float(), size, align_corners=align_corners).argmax(dim=1)


def class_probabilities(logits: Tensor, scale: float) -> Tensor:
    """logits: (N, K, H, W) -> their softmax, whatever the scale of the picture."""
    return logits.softmax(dim=1)


@torch.no_grad()
def predict_scales(
    network: SegmentationNetwork,
    images: Tensor,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    to_average: Callable[[Tensor, float], Tensor] = class_probabilities,
) -> Tensor:
    """Class probabilities averaged over scales and mirror images: (N, 3, H, W) -> (N, K, H, W) float32.

    For another task than segmentation, `to_average(outputs, scale)` says what to average instead, of a picture so much larger.
    This follows `predict_labels_multi_scale` of research/deeplab/model.py: the image is resized to int((H − 1)·scale + 1)
    rows, its logits to the size they have at scale 1 (larger for larger scales), then to the image's, and softmax is
    averaged. A pinned `pooling_size` of the cell is scaled as the image is (`multi_scale_logits` in the same file). With
    features in the middle of patches, the image is resized to whole patches, and no resize aligns corners. The best class is
    the argmax over dimension 1. Raises ValueError for scales that are not above 0.
    """
    if not scales or not all(scale > 0 for scale in scales):
        raise ValueError(f"scales must be numbers above 0, at least one, got {scales}")
    size, grid = (images.shape[2], images.shape[3]), network.backbone.grid
    resize = partial(bilinear_resize, align_corners=grid.align_corners)
    total: Tensor | None = None
    for scale in scales:
        scaled = resize(images.float(), grid.scaled(size, scale)) if scale != 1.0 else images.float()
        for mirrored in (False, True) if flip else (False,):
            with _pooling_scaled(network.head.context, Grid(1, grid.align_corners), scale):
                logits = network(scaled.flip(3) if mirrored else scaled).float()
            # For scales below 1, one resize to the image's size would give another result.
            logits = resize(logits, _size_of_logits(network, size, max(1.0, scale)))
            summand = to_average(resize(logits.flip(3) if mirrored else logits, size), _true_scale(grid, size, scale))
            total = summand if total is None else total + summand
    assert total is not None  # at least one scale
    return total / (len(scales) * (2 if flip else 1))


def _true_scale(grid: Grid, size: tuple[int, int], scale: float) -> float:
    """By how much a picture is enlarged once its size is rounded to the grid, both ways taken together.

    On corners it is what was asked for, as with the authors, who round to pixels.
    """
    return scale if grid.align_corners else math.sqrt(math.prod(grid.scaled(size, scale)) / math.prod(size))


def _size_of_logits(network: SegmentationNetwork, size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Height and width of the logits of a picture of this size at this scale; on corners by the authors' formula."""
    grid = network.backbone.grid
    if grid.align_corners:
        return grid.scaled(size, scale / network.logits_stride)
    return network.logits_grid.features(grid.scaled(size, scale))


@contextmanager
def _pooling_scaled(context: DensePredictionCell, grid: Grid, scale: float) -> Iterator[None]:
    """Inside, a pinned window is scaled as a map of its size, on a grid of features."""
    pinned = context.pooling_size
    if pinned is not None:
        context.pin_pooling(grid.scaled(pinned, scale))
    try:
        yield
    finally:
        context.pin_pooling(pinned)
