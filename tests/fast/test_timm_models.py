"""Any timm model as a backbone: on random weights, models of each way in which timm gives features."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from fast.backbone import Backbone, timm_backbone
from fast.dense_prediction_cell import DensePredictionCell
from fast.segmentation import SegmentationHead, SegmentationNetwork
from fast.timm_models import Cut, cut_of
from reference.grid import Grid
from search.cells.space import load_cell

# A vision transformer, EVA as in DINOv3, windows with channels last, convolutions on patches, and convolutions with symmetric
# strides: the grid at output stride 16, the deepest map of those that timm has, and its channels.
SEVERAL: dict[str, tuple[Cut, int]] = {
    "test_vit": (Cut(Grid(16, False)), 64),
    "vit_tiny_patch16_dinov3_qkvb": (Cut(Grid(16, False)), 192),
    "test_convnext": (Cut(Grid(16, False), deepest=-2), 48),
    "swin_tiny_patch4_window7_224": (Cut(Grid(16, False), deepest=-2), 384),
    "efficientvit_b0": (Cut(Grid(16), deepest=-2), 64),
    "mobilenetv4_conv_small": (Cut(Grid(16)), 960),
    "pvt_v2_b0": (Cut(Grid(16), deepest=-2), 160),
    "regnetx_002": (Cut(Grid(16)), 368),
    "tf_efficientnet_lite0": (Cut(Grid(16)), 320),
    "xcit_nano_12_p16_224": (Cut(Grid(16)), 128),
}
every_kind = pytest.mark.parametrize(
    "name", [name for name in SEVERAL if timm.is_model(name)]
)  # the oldest timm has no DINOv3


def images_on(backbone: Backbone, features: tuple[int, int] = (3, 4)) -> Tensor:
    height, width = backbone.grid.pixels(features)
    return torch.randint(256, (1, 3, height, width), generator=torch.Generator().manual_seed(0)).float()


def whole_model(name: str, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return timm.create_model(name)


def saved(path: Path, model: nn.Module) -> Path:
    torch.save(model.state_dict(), path)
    return path


@every_kind
def test_the_grid_is_measured_and_each_feature_has_a_gradient(name: str) -> None:
    expected, channels = SEVERAL[name]
    assert cut_of(name) == expected
    backbone = timm_backbone(name).eval()
    images = images_on(backbone).requires_grad_()
    features = backbone(images)
    assert features.shape == (1, channels, 3, 4)
    assert (backbone.channels, backbone.grid) == (channels, expected.grid)
    (gradient,) = torch.autograd.grad(features[:, :, 1, 1].square().sum(), images)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", ["test_vit", "eva02_tiny_patch14_224", "test_convnext", "efficientvit_b0"])
def test_a_network_on_it_is_exported(name: str) -> None:
    backbone = timm_backbone(name).eval()
    cell = DensePredictionCell(
        load_cell("aspp"), backbone.layer_channels, branch_channels=4, cell_channels=4, output_stride=backbone.output_stride
    )
    network = SegmentationNetwork(backbone, SegmentationHead(cell, 3)).eval()
    images = images_on(backbone)
    with torch.no_grad():
        program = torch.export.export(network, (images,)).module()
        # float32 through the whole network, with convolutions in another order
        torch.testing.assert_close(program(images), network(images), rtol=1e-4, atol=1e-5)


# How timm wraps them: by the model's method, as outputs of stages, by hooks, and by a class of its own.
WRAPPED = ["test_vit", "test_convnext", "swin_tiny_patch4_window7_224", "xception41", "test_efficientnet"]


@pytest.mark.parametrize("name", WRAPPED)
def test_weights_in_timms_own_names_give_the_models_own_features(name: str, tmp_path: Path) -> None:
    model = whole_model(name).eval()
    backbone = timm_backbone(
        name, output_stride=32 if name != "test_vit" else 16, weights=saved(tmp_path / "w.pth", model)
    ).eval()
    size = backbone.grid.rounded_up((224, 224))
    images = torch.randint(256, (1, 3, *size)).float()
    with torch.no_grad():
        pixels = (images - backbone.mean) / backbone.std
        if name == "test_vit":  # trained at 160, and so are its places
            model = timm.create_model(name, dynamic_img_size=True).eval()
            model.load_state_dict(torch.load(tmp_path / "w.pth", weights_only=True))
        expected = model.forward_intermediates(pixels, indices=1, intermediates_only=True, output_fmt="NCHW")[-1]
        # a dilated last stage, if any, would differ by far more than the order of sums
        torch.testing.assert_close(backbone(images), expected, rtol=1e-4, atol=1e-5)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "other.pth", whole_model("test_convnext"))
    with pytest.raises(ValueError, match=r"other\.pth is not of test_vit: it lacks \d+ keys, first 'model\.cls_token'"):
        timm_backbone("test_vit", weights=path)


def test_layers_are_the_blocks_from_the_deepest_on() -> None:
    torch.manual_seed(0)
    several = timm_backbone("test_vit", layers=(-1, -4)).eval()
    images = images_on(several)
    with torch.no_grad():
        pixels = (images - several.mean) / several.std
        model: Any = several.body.model
        expected = model.forward_intermediates(pixels, indices=[2, 5], intermediates_only=True)
        features = several(images)
    assert several.layer_channels == (64, 64)
    assert torch.equal(features, torch.cat(expected[::-1], dim=1))


@pytest.mark.parametrize(("name", "channels"), [("resnet18", (512, 256, 128)), ("test_convnext", (48, 32, 24))])
def test_finer_stages_are_resized_to_the_deepest(name: str, channels: tuple[int, ...]) -> None:
    backbone = timm_backbone(name, layers=(-1, -2, -3)).eval()
    assert backbone.layer_channels == channels
    with torch.no_grad():
        images = images_on(backbone)
        features, maps = backbone(images), backbone._maps(images)
    assert features.shape == (1, sum(channels), 3, 4)
    if name == "resnet18":  # the stage at stride 8 has a feature where each of those at 16 is
        assert torch.allclose(features[:, -128:], maps[0][:, :, ::2, ::2], rtol=0, atol=1e-5)  # of a resize in float32


def test_a_patch_of_14_is_kept_or_resampled_to_16() -> None:
    own = timm_backbone("vit_tiny_patch16_224", patch_size=14)
    assert (own.grid, own.patch_size) == (Grid(14, False), 14)
    torch.manual_seed(0)
    kept = timm_backbone("vit_tiny_patch16_224").eval()
    torch.manual_seed(0)
    resampled = timm_backbone("vit_tiny_patch16_224", patch_size=32).eval()
    images = images_on(kept, (4, 4))
    with torch.no_grad():
        expected = kept(images)
        # a picture of twice the size has the same patches, up to what an enlargement of pixels loses
        larger = nn.functional.interpolate(images, scale_factor=2, mode="nearest")
        assert nn.functional.cosine_similarity(resampled(larger), expected).mean() > 0.9


@pytest.mark.parametrize("name", ["test_convnext", "swin_tiny_patch4_window7_224", "resnet18", "pvt_v2_b0"])
def test_the_map_at_stride_4_lies_on_the_same_grid(name: str) -> None:
    backbone = timm_backbone(name, low_level=True).eval()
    assert backbone.low_level is not None
    images = images_on(backbone)
    with torch.no_grad():
        low_level, features = backbone.with_low_level(images)
    size = Grid(4, backbone.grid.align_corners).features((images.shape[2], images.shape[3]))
    assert low_level.shape == (1, backbone.low_level.channels, *size)
    assert features.shape == (1, backbone.channels, 3, 4)


# Of each way in which timm wraps models, with means of their own, and two tags of one model.
MEANS = ["swin_tiny_patch4_window7_224", "vit_base_patch16_clip_224.openai", "vit_tiny_patch16_224.augreg_in21k", "xception41"]


@pytest.mark.parametrize("name", [*MEANS, "mobilenetv3_small_050", "tf_efficientnet_lite0"])
def test_pixels_are_normalised_as_the_weights_want_them(name: str) -> None:
    backbone, config = timm_backbone(name), timm.get_pretrained_cfg(name)
    assert config is not None
    torch.testing.assert_close(backbone.mean.flatten() / 255, torch.tensor(config.mean), rtol=0, atol=1e-6)
    torch.testing.assert_close(backbone.std.flatten() / 255, torch.tensor(config.std), rtol=0, atol=1e-6)


def test_means_differ() -> None:
    configs: list[Any] = [timm.get_pretrained_cfg(name) for name in MEANS]
    means = {tuple(config.mean) for config in configs}
    assert len(means) == 3  # ImageNet's, CLIP's and a half


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pictures of one size": (
        {"name": "mixer_s32_224"},
        "takes pictures of 224×224 pixels alone, where any number of features is needed",
    ),
    "features beside the grid": ({"name": "densenet121"}, r"has features at 16·i \+ \d\.\d pixels: neither on every 16th"),
    "a stride that is not there": (
        {"name": "pvt_v2_b0", "output_stride": 12},
        "has no features at output stride 12, only at 4, 8, 16, 32",
    ),
    "a layer that is not there": (
        {"name": "test_vit", "layers": (-1, -7)},
        "has 6 layers down to output stride 16, -1 to -6: there is no -7",
    ),
    "no patches": ({"name": "resnet18", "patch_size": 14}, "does not embed patches, whose size could be changed to 14"),
    "no map at stride 4": ({"name": "test_vit", "low_level": True}, "has no map at stride 4 for a decoder, only at 16"),
    "a layer before that at stride 4": (
        {"name": "resnet18", "layers": (-1, -5), "low_level": True},
        "has the map at stride 4 for a decoder behind layer -5: leave that layer out",
    ),
}


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED.values(), ids=REFUSED.keys())
def test_what_a_model_has_not_is_refused_in_a_sentence(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=rf"^backbone '{arguments['name']}' {sentence}"):
        timm_backbone(**arguments)


@pytest.mark.parametrize("layers", [(), (0,), (-4, -1), (-1, -1)])
def test_layers_are_counted_from_the_end(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="counted from the end, each once, the deepest first, such as -1 -4, got"):
        timm_backbone("test_vit", layers=layers)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_pictures_off_the_grid_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"takes pictures of 16·k pixels each way, such as 64×48, got 65×48"):
        timm_backbone(name)(torch.zeros(1, 3, 65, 48))


def test_it_is_built_in_inference_mode_too() -> None:
    cut_of.cache_clear()
    with torch.inference_mode():
        backbone = timm_backbone("test_vit").eval()
        assert backbone(images_on(backbone)).shape == (1, 64, 3, 4)


def test_measuring_draws_no_random_numbers_and_costs_once() -> None:
    cut_of.cache_clear()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = cut_of("test_vit", 16)
    assert torch.equal(torch.get_rng_state(), before)
    assert cut_of("test_vit", 16) is first
