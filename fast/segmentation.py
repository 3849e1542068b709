"""From features, or images, to class scores: the cell with its classifier, and with a backbone below."""

import torch
from torch import Tensor, nn

from fast.backbone import Backbone
from fast.bilinear_resize import bilinear_resize
from fast.dense_prediction_cell import DensePredictionCell
from fast.pointwise_conv import lazy_pointwise_conv


class SegmentationHead(nn.Module):
    """A cell and a 1×1 classifier with bias: features (N, C, h, w) -> logits (N, num_classes, h, w).

    This is all that the proxy task trains (paper, section 3.3).
    """

    def __init__(self, context: DensePredictionCell, num_classes: int) -> None:
        super().__init__()
        self.context = context
        self.classifier = nn.Conv2d(context.cell_channels, num_classes, kernel_size=1)
        nn.init.trunc_normal_(self.classifier.weight, std=0.01, a=-0.02, b=0.02)
        nn.init.zeros_(self.classifier.bias)  # type: ignore[arg-type]  # as below

    def forward(self, features: Tensor) -> Tensor:
        logits = lazy_pointwise_conv(self.context.lazy(features), self.classifier.weight)
        bias = self.classifier.bias
        assert bias is not None  # a Conv2d built with a bias has one
        return logits + bias[:, None, None]


class SegmentationNetwork(nn.Module):
    """Backbone and head: images (N, 3, H, W) with values 0 to 255 -> logits (N, K, ceil(H / s), ceil(W / s)) at output stride
    s.

    Raises ValueError where backbone and head disagree on channels or output stride.
    """

    def __init__(self, backbone: Backbone, head: SegmentationHead) -> None:
        super().__init__()
        wanted = (head.context.in_channels, head.context.output_stride)
        if wanted != (backbone.channels, backbone.output_stride):
            raise ValueError(
                f"head was built for {wanted[0]} channels at output stride {wanted[1]}, "
                f"backbone {backbone.name} gives {backbone.channels} at {backbone.output_stride}"
            )
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(images))
        return logits

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """The best class per pixel: (N, 3, H, W) -> (N, H, W), int64; logits are resized before the choice."""
        return bilinear_resize(self(images).float(), (images.shape[2], images.shape[3])).argmax(dim=1)
