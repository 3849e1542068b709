import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fast import Decoder, DensePredictionCell, SegmentationHead, SegmentationNetwork, predict_scales
from fast.backbone import Backbone, LowLevel, timm_backbone
from fast.batch_norm import recompute_statistics
from fast.bilinear_resize import bilinear_resize as resize
from reference.batch_norm import Array
from reference.bilinear_resize import bilinear_resize
from reference.cell import BACKBONE_FEATURE, Branch, Cell, Conv1x1, PyramidPooling
from reference.grid import Grid
from tests.read_pixels import sampling_backbone

CELL = Cell((Branch(BACKBONE_FEATURE, Conv1x1()),))


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


def test_hooks_run_and_see_values() -> None:
    """Counters of operations, and whoever wants the context itself, hook the modules."""
    model, features = head().train(), torch.randn(2, 3, 3, 4)  # in training mode kernels leave the norm to the classifier
    model.context.dropout.p = 0.0
    expected = model(features)
    seen: dict[str, Tensor] = {}
    model.classifier.register_forward_hook(lambda module, inputs, output: seen.update(logits=output))
    assert torch.equal(model(features), expected)
    assert torch.equal(seen["logits"], expected)
    model.context.register_forward_hook(lambda module, inputs, output: seen.update(context=output))
    # The norm is applied by another kernel, and so rounded once more.
    torch.testing.assert_close(model(features), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(seen["context"], model.context(features))


def test_backward_hooks_of_the_context_run() -> None:
    model, features = head().train(), torch.randn(2, 3, 3, 4, requires_grad=True)
    seen: list[Tensor] = []
    model.context.register_full_backward_hook(lambda module, grad_input, grad_output: seen.extend(grad_output))
    model(features).sum().backward()
    assert [gradient.shape for gradient in seen] == [(2, model.context.cell_channels, 3, 4)]


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


class TwoMaps(nn.Module):
    """Every 4th pixel, then every 16th."""

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images[:, :2, ::4, ::4], images[:, :, ::16, ::16]]


def decoder_backbone() -> Backbone:
    """Gives two channels at stride 4."""
    zeros, ones = torch.zeros(3), torch.full((3,), 100.0)
    return Backbone("two", TwoMaps(), channels=3, output_stride=16, mean=zeros, std=ones, low_level=LowLevel(2))


def network_with_decoder() -> SegmentationNetwork:
    network = SegmentationNetwork(decoder_backbone(), head(), Decoder(2, channels=6, projected_channels=3))
    images = torch.randint(256, (2, 3, 65, 65), generator=torch.Generator().manual_seed(2)).float()
    recompute_statistics(network, [images])  # or the initial weights would shrink the decoder's output to nothing
    return network


@pytest.mark.parametrize("size", [(33, 49), (32, 50)])
def test_decoder_stands_between_context_and_classifier(size: tuple[int, int]) -> None:
    network = network_with_decoder()
    assert (network.logits_stride, SegmentationNetwork(backbone(), head()).logits_stride) == (4, 16)
    images = torch.randint(256, (2, 3, *size), generator=torch.Generator().manual_seed(0)).float()
    low_level, features = network.backbone.with_low_level(images)
    assert network.decoder is not None
    logits = network(images)
    assert logits.shape == (2, 5, -(-size[0] // 4), -(-size[1] // 4))
    refined = network.decoder(network.head.context(features), low_level)
    assert torch.equal(logits, network.head.classifier(refined))
    assert network.predict(images).shape == (2, *size)


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (Decoder(3, channels=6), "built for 6 channels of context and 3 at stride 4, the cell gives 6 and backbone two 2"),
        (Decoder(2, channels=8), "built for 8 channels of context and 2 at stride 4, the cell gives 6 and backbone two 2"),
    ],
)
def test_network_refuses_a_decoder_for_other_maps(decoder: Decoder, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationNetwork(decoder_backbone(), head(), decoder)
    with pytest.raises(ValueError, match="every-16th None"):
        SegmentationNetwork(backbone(), head(), Decoder(2, channels=6))


def expected_probabilities(network: SegmentationNetwork, images: Tensor, scales: list[float], flip: bool) -> Array:
    """Step by step in float64, resizes by the reference."""
    size, stride, total = (images.shape[2], images.shape[3]), network.logits_stride, []
    for scale in scales:
        for step in (1, -1) if flip else (1,):
            pixels = images.double().numpy()[:, :, :, ::step]
            scaled = bilinear_resize(pixels, _at(size, scale))
            logits = network(torch.from_numpy(scaled)).detach().numpy()[:, :, :, ::step]
            middle = _at(size, max(1.0, scale) / stride)
            logits = bilinear_resize(bilinear_resize(logits, middle), size)
            exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
            total.append(exponentials / exponentials.sum(axis=1, keepdims=True))
    mean: Array = np.mean(total, axis=0)
    return mean


def _at(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return int((size[0] - 1) * scale + 1), int((size[1] - 1) * scale + 1)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scales", [[1.0], [0.5, 1.0, 1.75], [0.75]])
@pytest.mark.parametrize("with_decoder", [False, True])
def test_scales_and_mirror_images_are_averaged(scales: list[float], flip: bool, with_decoder: bool) -> None:
    network = network_with_decoder() if with_decoder else SegmentationNetwork(backbone(), head()).eval()
    nn.init.normal_(network.head.classifier.weight, std=3.0)  # so that classes differ
    images = torch.randint(256, (2, 3, 49, 66), generator=torch.Generator().manual_seed(0)).float()
    probabilities = predict_scales(network, images, scales=scales, flip=flip)
    assert probabilities.dtype == torch.float32
    expected = expected_probabilities(copy.deepcopy(network).double(), images, scales, flip)
    assert expected.std() > 0.01
    # absolute, on probabilities: float32 logits up to 20 carry 2e-6 each, resized pixels of 255 as much again
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scales", [[1.0], [0.5, 1.0, 1.8], [0.75]])
@pytest.mark.parametrize("low_level", [False, True])
def test_scales_of_patches_are_whole_patches_and_align_no_corners(scales: list[float], flip: bool, low_level: bool) -> None:
    torch.manual_seed(0)
    decoder = Decoder(3, channels=6, projected_channels=3) if low_level else None
    network = SegmentationNetwork(sampling_backbone(Grid(16, False), low_level=low_level), head(), decoder)
    images = torch.randint(256, (2, 3, 48, 64), generator=torch.Generator().manual_seed(0)).float()
    recompute_statistics(network, [images])
    nn.init.normal_(network.head.classifier.weight, std=1.0)
    assert network.logits_grid == Grid(4 if low_level else 16, align_corners=False)
    network, total = copy.deepcopy(network).double(), np.zeros((2, 5, 48, 64))
    with torch.no_grad():
        for scale in scales:
            size = {0.5: (32, 32), 0.75: (32, 48), 1.0: (48, 64), 1.8: (80, 112)}[scale]  # of 24 × 32, 36 × 48, 86.4 × 115.2
            rows, columns = network.logits_grid.features(max(size, (48, 64)))
            for step in (1, -1) if flip else (1,):
                pixels = bilinear_resize(images.double().numpy()[:, :, :, ::step], size, align_corners=False)
                logits = network(torch.from_numpy(pixels)).numpy()[:, :, :, ::step]
                logits = bilinear_resize(logits, (rows, columns), align_corners=False)
                exponentials = np.exp(bilinear_resize(logits, (48, 64), align_corners=False))
                total += exponentials / exponentials.sum(axis=1, keepdims=True)
    expected = total / (len(scales) * (2 if flip else 1))
    assert expected.std() > 0.01
    actual = predict_scales(network.float(), images, scales=scales, flip=flip)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=5e-5)  # as above


# Of 3 × 4 patches 2 × 3 and 5 × 7 are left, which have so many times their area.
@pytest.mark.parametrize(
    ("grid", "expected"), [(Grid(16), [0.7, 1.0, 1.8]), (Grid(16, False), [(6 / 12) ** 0.5, 1.0, (35 / 12) ** 0.5])]
)
def test_what_is_averaged_is_told_the_true_scale(grid: Grid, expected: list[float]) -> None:
    told: list[float] = []

    def to_average(outputs: Tensor, scale: float) -> Tensor:
        told.append(scale)
        return outputs

    images = torch.zeros(1, 3, *grid.pixels((3, 4)))
    network = SegmentationNetwork(sampling_backbone(grid), head()).eval()
    predict_scales(network, images, scales=(0.7, 1.0, 1.8), to_average=to_average)
    assert told == pytest.approx(expected, abs=1e-12)


def test_a_pinned_window_of_patches_is_scaled_as_patches_are() -> None:
    cell = Cell((Branch(BACKBONE_FEATURE, PyramidPooling((2, 2))),))
    context = DensePredictionCell(cell, 3, branch_channels=4, cell_channels=4, pooling_size=(4, 6))
    network = SegmentationNetwork(sampling_backbone(Grid(16, False)), SegmentationHead(context, 5)).eval()
    seen: list[tuple[int, int] | None] = []
    context.register_forward_pre_hook(lambda module, inputs: seen.append(context.pooling_size))
    predict_scales(network, torch.zeros(1, 3, 64, 96), scales=(0.5, 1.0, 1.75))
    assert seen == [(2, 3), (4, 6), (7, 10)]
    assert context.pooling_size == (4, 6)


def test_one_scale_predicts_as_the_network_does() -> None:
    network = network_with_decoder()
    images = torch.randint(256, (1, 3, 50, 35), generator=torch.Generator().manual_seed(1)).float()
    probabilities = predict_scales(network, images)
    assert probabilities.sum(dim=1).sub(1).abs().max() < 1e-5  # of float32 sums of 5
    top = probabilities.topk(2, dim=1).values
    differs = probabilities.argmax(dim=1) != network.predict(images)
    assert (top[:, 0] - top[:, 1])[differs].lt(1e-6).all()  # only where softmax rounds two classes to one value


def pooling_network(pooling_size: tuple[int, int] | None) -> SegmentationNetwork:
    torch.manual_seed(0)
    cell = Cell((Branch(BACKBONE_FEATURE, PyramidPooling((2, 2))), Branch(BACKBONE_FEATURE, PyramidPooling((1, 1)))))
    context = DensePredictionCell(cell, 3, branch_channels=4, cell_channels=4, pooling_size=pooling_size)
    network = SegmentationNetwork(backbone(), SegmentationHead(context, 5)).eval()
    nn.init.normal_(network.head.classifier.weight, std=3.0)
    return network


@pytest.mark.parametrize(("scale", "scaled"), [(0.5, (2, 3)), (0.75, (2, 4)), (1.0, (3, 5)), (2.0, (5, 9))])
def test_a_pinned_pooling_window_is_scaled_with_the_picture(scale: float, scaled: tuple[int, int]) -> None:
    images = torch.randint(256, (1, 3, 65, 97), generator=torch.Generator().manual_seed(0)).float()
    network = pooling_network((3, 5))
    actual = predict_scales(network, images, scales=(scale,), flip=True)
    assert network.head.context.pooling_size == (3, 5)
    # The network alone, at the scaled size with the window of the scaled size.
    network.head.context.pin_pooling(scaled)
    pictures = resize(images, _at((65, 97), scale)) if scale != 1 else images
    with torch.no_grad():
        pair = [network(pictures), network(pictures.flip(3)).flip(3)]
    at = _at((65, 97), max(1.0, scale) / 16)
    expected = sum(resize(resize(each, at), (65, 97)).softmax(dim=1) for each in pair) / 2
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)  # sums in another order
    if scale != 1:
        network.head.context.pin_pooling((3, 5) if scale > 1 else (1, 1))
        with torch.no_grad():
            other = network(pictures)
        assert (other - pair[0]).abs().max() > 1e-3  # the window matters


def test_a_window_that_does_not_fit_leaves_the_pin_as_it_was() -> None:
    network = pooling_network((9, 9))
    with pytest.raises(ValueError, match="pooling window of 9"):
        predict_scales(network, torch.zeros(1, 3, 65, 65), scales=(1.0, 2.0))
    assert network.head.context.pooling_size == (9, 9)
    with torch.no_grad(), pytest.raises(ValueError, match="pooling window of 9"):
        network(torch.zeros(1, 3, 65, 65))


@pytest.mark.parametrize("scales", [(), (1.0, 0.0), (-1.0,)])
def test_scales_must_be_above_0(scales: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="scales must be numbers above 0"):
        predict_scales(network_with_decoder(), torch.zeros(1, 3, 33, 33), scales=scales)


def test_a_network_whose_decoder_taps_the_backbone_compiles_and_exports() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    tapped = timm_backbone("mobilenetv2_100", weights_origin="tensorflow", low_level=True)
    network = SegmentationNetwork(tapped, head(in_channels=320), Decoder(144, channels=6)).eval()
    images = torch.rand(1, 3, 34, 50) * 255
    with torch.no_grad():
        expected = network(images)
        exported = torch.export.export(network, (images,)).module()(images)
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)(images)
    for actual in (exported, compiled):
        assert torch.allclose(actual, expected, rtol=0, atol=1e-6)  # of logits below 0.1; a compiler may fuse and reorder
