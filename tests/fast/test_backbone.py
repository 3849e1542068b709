import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from fast.backbone import read_weights, timm_backbone

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


@pytest.mark.parametrize(
    ("name", "output_stride", "message"),
    [
        ("mobilenetv2_1000", 16, "'mobilenetv2_1000' is not a timm model; similar names: .*mobilenetv2_100"),
        ("no_such_thing", 16, "'no_such_thing' is not a timm model"),
        (SMALL, 7, f"'{SMALL}' gives output stride 4, asked for 7"),
        ("test_vit", 16, "'test_vit' "),
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


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("keep", [0, 1000, -100])
def test_truncated_file_is_refused(tmp_path: Path, suffix: str, keep: int) -> None:
    path = write(tmp_path / f"weights{suffix}", model_state())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"weights\{suffix} cannot be read"):
        read_weights(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.pth does not exist"):
        timm_backbone(SMALL, weights=tmp_path / "absent.pth")


@pytest.mark.parametrize("content", [torch.zeros(2), [1, 2], {"epoch": 3}, {"state_dict": {"a": 1}}], ids=str)
def test_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    path = write(tmp_path / "weights.pth", content)
    with pytest.raises(ValueError, match=r"weights\.pth holds no state dict"):
        read_weights(path)


class Bomb:
    """Unpickling it would create a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_code_in_a_weights_file_is_not_run(tmp_path: Path, writer: str) -> None:
    path, trace = tmp_path / "weights.pth", tmp_path / "exploded"
    if writer == "torch":
        torch.save({"weight": Bomb(trace)}, path)
    else:
        path.write_bytes(pickle.dumps({"weight": Bomb(trace)}))
    with pytest.raises(ValueError, match=r"weights\.pth cannot be read"):
        read_weights(path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists()  # so it would have been seen


@pytest.mark.skipif(not IMAGENET.is_file(), reason="no ../shared/data/weights beside the repository")
def test_imagenet_weights_load() -> None:
    backbone = timm_backbone("mobilenetv2_100", weights=IMAGENET).eval()
    state = read_weights(IMAGENET)
    assert torch.equal(backbone.body.state_dict()["conv_stem.weight"], state["conv_stem.weight"])
    with torch.no_grad():
        features = backbone(torch.full((1, 3, 65, 33), 128.0))
    assert features.shape == (1, 320, 5, 3)
    assert features.isfinite().all()
