import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fast import DensePredictionCell, SegmentationHead, SegmentationNetwork
from fast.backbone import Backbone
from reference.bilinear_resize import bilinear_resize
from reference.cell import BACKBONE_FEATURE, CONV1X1, Branch, Cell

CELL = Cell((Branch(BACKBONE_FEATURE, CONV1X1),))


class Body(nn.Module):
    """A list of maps, as timm's features_only models give: every 16th pixel."""

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images, images[:, :, ::16, ::16]]


def backbone(channels: int = 3, output_stride: int = 16) -> Backbone:
    mean, std = torch.tensor([10.0, 20.0, 30.0]), torch.tensor([2.0, 4.0, 8.0])
    return Backbone("every-16th", Body(), channels=channels, output_stride=output_stride, mean=mean, std=std)


def head(num_classes: int = 5, in_channels: int = 3, output_stride: int = 16) -> SegmentationHead:
    torch.manual_seed(0)
    context = DensePredictionCell(CELL, in_channels, branch_channels=4, cell_channels=6, output_stride=output_stride)
    return SegmentationHead(context, num_classes).eval()


def test_head_classifies_each_feature() -> None:
    model, features = head(), torch.randn(2, 3, 3, 4)
    weight, bias = model.classifier.weight[:, :, 0, 0], torch.linspace(-1.0, 1.0, 5)
    model.classifier.bias = nn.Parameter(bias)
    expected = torch.einsum("oc,nchw->nohw", weight, model.context(features)) + bias[:, None, None]
    assert torch.allclose(model(features), expected, rtol=0, atol=1e-6)


def test_classifier_starts_as_the_authors_does() -> None:
    classifier = SegmentationHead(DensePredictionCell(CELL, 3), 50).classifier  # 12800 weights
    assert classifier.bias is not None
    assert torch.equal(classifier.bias, torch.zeros(50))
    assert classifier.weight.abs().max() <= 0.02
    assert classifier.weight.std().item() == pytest.approx(0.01 * 0.8796, rel=0.05)  # of a normal truncated at two deviations


def test_backbone_normalises_pixel_values() -> None:
    images = torch.tensor([12.0, 16.0, 38.0]).view(1, 3, 1, 1).expand(1, 3, 17, 33)
    features = backbone()(images)
    assert features.shape == (1, 3, 2, 3)
    assert torch.equal(features[0, :, 0, 0], torch.tensor([1.0, -1.0, 1.0]))


@pytest.mark.parametrize(("height", "width"), [(33, 49), (1, 1), (32, 50)])
def test_network_predicts_at_the_images_size(height: int, width: int) -> None:
    network = SegmentationNetwork(backbone(), head()).eval()
    images = torch.randint(256, (2, 3, height, width), generator=torch.Generator().manual_seed(0)).float()
    logits = network(images)
    assert logits.shape == (2, 5, -(-height // 16), -(-width // 16))
    predictions = network.predict(images)
    assert predictions.dtype == torch.int64
    upsampled = bilinear_resize(logits.detach().double().numpy(), (height, width))
    best = np.take_along_axis(upsampled, predictions[:, None].numpy(), axis=1)[:, 0]
    assert np.all(best >= upsampled.max(axis=1) - 1e-6)  # float32 decides ties by rounding


@pytest.mark.parametrize(
    ("backbone_arguments", "message"),
    [
        ({"channels": 7}, "head was built for 3 channels at output stride 16, backbone every-16th gives 7 at 16"),
        ({"output_stride": 8}, "head was built for 3 channels at output stride 16, backbone every-16th gives 3 at 8"),
    ],
)
def test_network_refuses_a_head_for_other_features(backbone_arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationNetwork(backbone(**backbone_arguments), head())


def test_weights_hash_follows_weights_statistics_and_normalisation() -> None:
    def build(seed: int) -> Backbone:
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        return Backbone("small", body, channels=4, output_stride=16, mean=torch.zeros(3), std=torch.ones(3))

    first = build(0)
    assert first.weights_hash() == build(0).weights_hash()
    hashes = {first.weights_hash(), build(1).weights_hash()}
    statistics, normalisation = build(0), build(0)
    statistics.get_buffer("body.1.running_var").fill_(2.0)
    normalisation.std.fill_(2.0)
    hashes |= {statistics.weights_hash(), normalisation.weights_hash()}
    assert len(hashes) == 4
