import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from fast.backbone import Backbone, timm_backbone
from fast.batch_norm import recompute_statistics
from fast.weights_file import read_states

SMALL, OTHER = "test_efficientnet", "test_resnet"
IMAGENET = Path(__file__).parents[2].parent / "shared" / "data" / "weights" / "mobilenetv2_100_imagenet_timm.pth"


def model_state(name: str = SMALL, seed: int = 0) -> dict[str, torch.Tensor]:
    """Of the whole model, classifier included, as timm's files are."""
    torch.manual_seed(seed)
    return dict(timm.create_model(name).state_dict())


def write(path: Path, state: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", [SMALL, "mobilenetv2_035"])
def test_map_size_and_channels(name: str, output_stride: int) -> None:
    backbone = timm_backbone(name, output_stride=output_stride).eval()
    with torch.no_grad():
        features = backbone(torch.full((1, 3, 33, 65), 128.0))
    assert features.shape == (1, backbone.channels, 32 // output_stride + 1, 64 // output_stride + 1)
    assert (backbone.name, backbone.output_stride) == (name, output_stride)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_the_whole_model_fit(tmp_path: Path, suffix: str) -> None:
    state = model_state(seed=1)
    backbone = timm_backbone(SMALL, weights=write(tmp_path / f"weights{suffix}", state))
    for key, value in backbone.body.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_weights_of_the_features_alone_fit(tmp_path: Path) -> None:
    backbone = timm_backbone(SMALL)
    path = write(tmp_path / "features.pth", {"state_dict": backbone.body.state_dict()})
    assert timm_backbone(SMALL, weights=path).weights_hash() == backbone.weights_hash()


def test_tensorflow_weights_get_tensorflows_conventions() -> None:
    backbone = timm_backbone("mobilenetv2_035", weights_origin="tensorflow")
    assert torch.equal(backbone.mean, torch.full((1, 3, 1, 1), 127.5))
    assert torch.equal(backbone.std, torch.full((1, 3, 1, 1), 127.5))
    norms = [module for module in backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {1e-3}


def test_timm_weights_get_the_mean_and_deviation_of_their_configuration() -> None:
    backbone = timm_backbone("mobilenetv2_035")
    config: Any = timm.create_model("mobilenetv2_035").pretrained_cfg
    assert torch.allclose(backbone.mean.flatten(), 255 * torch.tensor(config["mean"]))
    assert torch.allclose(backbone.std.flatten(), 255 * torch.tensor(config["std"]))


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("size", [(33, 65), (34, 64)], ids=["odd", "even"])
@pytest.mark.parametrize(("name", "channels"), [("mobilenetv2_100", 320), ("xception65", 2048), ("xception71", 2048)])
def test_the_papers_backbones(name: str, channels: int, size: tuple[int, int], output_stride: int) -> None:
    backbone = timm_backbone(name, output_stride=output_stride, weights_origin="tensorflow", low_level=True).eval()
    assert backbone.low_level is not None
    with torch.no_grad():
        low_level, features = backbone.with_low_level(torch.full((1, 3, *size), 128.0))
    assert features.shape == (1, channels, *(-(-extent // output_stride) for extent in size))
    assert low_level.shape == (1, backbone.low_level.channels, *(-(-extent // 4) for extent in size))
    norms = [module for module in backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {1e-3}
    assert {norm.momentum for norm in norms} == {0.003 if name == "mobilenetv2_100" else 0.0003}
    assert torch.equal(backbone.mean, torch.full((1, 3, 1, 1), 127.5))


@pytest.mark.parametrize("output_stride", [8, 16])
def test_xception_has_the_same_weights_at_every_output_stride(output_stride: int) -> None:
    """timm itself leaves a shortcut's convolution out of xception71 at output stride 8."""
    whole = timm.create_model("xception71").state_dict()
    wanted = {key: value.shape for key, value in whole.items() if not key.startswith("head.")}
    body = timm_backbone("xception71", output_stride=output_stride).body.state_dict()
    assert {key.replace("_", ".", 1): value.shape for key, value in body.items()} == wanted


def test_xception_at_output_stride_8_samples_what_stride_16_does() -> None:
    """Atrous convolution by its definition: at every second feature the denser map has the coarser one's values."""
    torch.manual_seed(0)
    coarse, dense = (timm_backbone("xception41", output_stride=stride).eval() for stride in (16, 8))
    images = torch.randint(256, (1, 3, 97, 129)).float()
    recompute_statistics(coarse, [images])  # or the initial weights would shrink the features to nothing
    dense.load_state_dict(coarse.state_dict())
    with torch.no_grad():
        expected, features = coarse(images), dense(images)
    assert expected.std() > 0.1
    # absolute, on features up to 5: float32 through 41 convolutions, summed in another order; 4e-5 here
    assert torch.allclose(features[:, :, ::2, ::2], expected, rtol=0, atol=5e-4)


def test_low_level_map_of_xception_is_from_before_the_activation() -> None:
    backbone = timm_backbone("xception65", low_level=True).eval()
    images = torch.randint(256, (1, 3, 33, 33), generator=torch.Generator().manual_seed(0)).float()
    with torch.no_grad():
        low_level, features = backbone.with_low_level(images)
        assert torch.equal(features, timm_like(backbone, images))
    assert low_level.min() < 0


def timm_like(backbone: Backbone, images: torch.Tensor) -> torch.Tensor:
    """The same weights in a backbone that is not tapped."""
    other = timm_backbone(backbone.name).eval()
    other.load_state_dict(backbone.state_dict())
    features: torch.Tensor = other(images)
    return features


@pytest.mark.parametrize("output_stride", [8, 16])
def test_other_models_give_timms_own_map_at_stride_4(output_stride: int) -> None:
    backbone = timm_backbone(OTHER, output_stride=output_stride, low_level=True).eval()
    assert backbone.low_level is not None
    with torch.no_grad():
        low_level, features = backbone.with_low_level(torch.full((1, 3, 33, 65), 128.0))
    assert low_level.shape == (1, backbone.low_level.channels, 9, 17)
    assert features.shape == (1, backbone.channels, 32 // output_stride + 1, 64 // output_stride + 1)


def test_a_backbone_without_low_level_map_says_so() -> None:
    with pytest.raises(ValueError, match="test_efficientnet was built without the map at stride 4"):
        timm_backbone(SMALL).with_low_level(torch.zeros(1, 3, 33, 33))


def test_tapped_backbones_keep_nothing_and_copy() -> None:
    backbone = timm_backbone("mobilenetv2_100", low_level=True).eval()
    twin, images = copy.deepcopy(backbone), torch.full((1, 3, 33, 33), 7.0)
    with torch.no_grad():
        low_level, _ = twin.with_low_level(images)
        backbone(images)
        assert torch.equal(backbone.with_low_level(images)[0], low_level)
    assert (backbone._tapped, twin._tapped) == ([], [])


def test_weights_of_a_model_whose_features_are_hooked_fit(tmp_path: Path) -> None:
    """timm computes xception's features by hooks and writes its keys as blocks_0 instead of blocks.0."""
    state = model_state("xception41", seed=1)
    body = timm_backbone("xception41", weights=write(tmp_path / "weights.safetensors", state)).body.state_dict()
    assert torch.equal(body["blocks_0.stack.conv1.conv_dw.weight"], state["blocks.0.stack.conv1.conv_dw.weight"])
    del state["blocks.0.stack.conv1.conv_dw.weight"]
    with pytest.raises(ValueError, match=r"it lacks 1 keys, first 'blocks_0\.stack\.conv1\.conv_dw\.weight'"):
        timm_backbone("xception41", weights=write(tmp_path / "lacking.safetensors", state))


def test_name_may_carry_the_tag_of_its_weights() -> None:
    assert timm_backbone("test_efficientnet.r160_in1k").channels == timm_backbone(SMALL).channels


@pytest.mark.parametrize(
    ("name", "output_stride", "message"),
    [
        ("mobilenetv2_1000", 16, "'mobilenetv2_1000' is not a timm model; similar names: .*mobilenetv2_100"),
        ("no_such_thing", 16, "'no_such_thing' is not a timm model"),
        (SMALL, 7, f"'{SMALL}' has no features at output stride 7, only at 2, 4, 8, 16, 32"),
        ("test_vit", 8, "'test_vit' has no features at output stride 8, only at 16"),
    ],
)
def test_wrong_name_or_stride_is_refused(name: str, output_stride: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm_backbone(name, output_stride=output_stride)


def changed(change: str) -> dict[str, Any]:
    state = model_state()
    if change == "lacks":
        del state["conv_stem.weight"]
    elif change == "has unknown":
        state["surprise"] = torch.zeros(1)
    else:
        state["conv_stem.weight"] = torch.zeros(1, 2, 3, 3)
    return state


@pytest.mark.parametrize(
    ("change", "key"),
    [("lacks", "conv_stem.weight"), ("has unknown", "surprise"), ("has other shapes for", "conv_stem.weight")],
)
def test_weights_that_do_not_fit_are_refused_by_file_and_key(tmp_path: Path, change: str, key: str) -> None:
    path = write(tmp_path / "weights.pth", changed(change))
    with pytest.raises(ValueError, match=rf"weights\.pth is not of {SMALL}: it {change} 1 keys, first '{key}'"):
        timm_backbone(SMALL, weights=path)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "other.pth", model_state(OTHER))
    with pytest.raises(ValueError, match=rf"other\.pth is not of {SMALL}: it lacks \d+ keys, first 'conv_stem\.weight'"):
        timm_backbone(SMALL, weights=path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.pth does not exist"):
        timm_backbone(SMALL, weights=tmp_path / "absent.pth")


@pytest.mark.skipif(not IMAGENET.is_file(), reason="no ../shared/data/weights beside the repository")
def test_imagenet_weights_load() -> None:
    backbone = timm_backbone("mobilenetv2_100", weights=IMAGENET).eval()
    state = read_states(IMAGENET)[""]
    assert torch.equal(backbone.body.state_dict()["conv_stem.weight"], state["conv_stem.weight"])
    with torch.no_grad():
        features = backbone(torch.full((1, 3, 65, 33), 128.0))
    assert features.shape == (1, 320, 5, 3)
    assert features.isfinite().all()
