"""Backbones by timm: from images to the last feature map at a chosen output stride."""

import hashlib
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

WeightsOrigin = Literal["timm", "tensorflow"]

# What TensorFlow-trained weights expect of timm's model: padding, epsilon of the norms, and inputs of p / 127.5 − 1.
_TENSORFLOW = {"pad_type": "same", "bn_eps": 1e-3}


class Backbone(nn.Module):
    """A network cut after its last feature map: images (N, 3, H, W), values 0 to 255 -> (N, channels, h, w).

    At output stride s and H = s·k + 1 the map has h = k + 1 rows, and feature (i, j) sits on pixel (s·i, s·j). `body` gives a
    list of maps, as timm's `features_only` models do, and takes images with `mean` subtracted and divided by `std`, (3,) each.
    """

    mean: Tensor  # (1, 3, 1, 1), of pixel values 0 to 255
    std: Tensor

    def __init__(self, name: str, body: nn.Module, *, channels: int, output_stride: int, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.name, self.channels, self.output_stride = name, channels, output_stride
        self.body = body
        self.register_buffer("mean", mean.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", std.view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        features: list[Tensor] = self.body((images - self.mean) / self.std)
        return features[-1]

    def weights_hash(self) -> str:
        """A hash of all weights and statistics: features cached with one backbone are not mistaken for another's."""
        digest = hashlib.sha256()
        for key, value in sorted(self.state_dict().items()):
            digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        for constant in (self.mean, self.std):
            digest.update(constant.cpu().numpy().tobytes())
        return digest.hexdigest()


def timm_backbone(
    name: str,
    *,
    output_stride: int = 16,
    weights: Path | None = None,
    pretrained: bool = False,
    weights_origin: WeightsOrigin = "timm",
) -> Backbone:
    """A backbone from timm, any model with `features_only`; the paper's are mobilenetv2_100, xception65 and xception71.

    `weights` is a local file (safetensors, or a PyTorch state dict read with `weights_only=True`) in timm's key names;
    `pretrained=True` lets timm download its own; with neither the weights are random. `weights_origin="tensorflow"` is for
    weights that were trained in TensorFlow: SAME padding, epsilon 1e-3 and inputs scaled to −1..1, where timm's own use the
    mean and deviation in their configuration. Raises ValueError naming the model, or the file and the keys that do not fit.
    """
    if name not in timm.list_models():
        similar = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:8]) or "see timm.list_models()"
        raise ValueError(f"backbone {name!r} is not a timm model; similar names: {similar}")
    options: dict[str, Any] = _TENSORFLOW if weights_origin == "tensorflow" else {}
    try:
        body: Any = timm.create_model(
            name, pretrained=pretrained, features_only=True, out_indices=(-1,), output_stride=output_stride, **options
        )
    except (TypeError, NotImplementedError, AssertionError, RuntimeError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"backbone {name!r} cannot give features at output stride {output_stride} ({reason})") from error
    reduction = body.feature_info.reduction()[-1]
    if reduction != output_stride:
        raise ValueError(f"backbone {name!r} gives output stride {reduction}, asked for {output_stride}")
    if weights is not None:
        _load_body(body, name, options, weights)
    mean, std = _normalisation(body, weights_origin)
    channels = body.feature_info.channels()[-1]
    return Backbone(name, body, channels=channels, output_stride=output_stride, mean=mean, std=std)


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from safetensors or a PyTorch file, without running code from it. Raises ValueError naming the file."""
    if not path.is_file():
        raise ValueError(f"weights file {path} does not exist")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a stranger's file can fail in any way
        # torch's own words would advise to read it with weights_only=False, which runs a stranger's code
        raise ValueError(f"weights file {path} cannot be read as safetensors or as a PyTorch state dict") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights file {path} holds no state dict (a mapping from names to tensors)")
    return state


def _load_body(body: nn.Module, name: str, options: dict[str, Any], path: Path) -> None:
    """Strict: the file must fit the whole timm model, or exactly the part of it that computes features."""
    state = read_weights(path)
    wanted = body.state_dict()
    head = timm.create_model(name, **options).state_dict().keys() - wanted.keys()  # conv_head, classifier and the like
    missing = [key for key in wanted if key not in state]
    unknown = [key for key in state if key not in wanted and key not in head]
    misshapen = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    for problem, keys in (("lacks", missing), ("has unknown", unknown), ("has other shapes for", misshapen)):
        if keys:
            raise ValueError(f"weights file {path} is not of {name}: it {problem} {len(keys)} keys, first {keys[0]!r}")
    body.load_state_dict({key: state[key] for key in wanted})


def _normalisation(body: nn.Module, weights_origin: WeightsOrigin) -> tuple[Tensor, Tensor]:
    if weights_origin == "tensorflow":
        return torch.full((3,), 127.5), torch.full((3,), 127.5)
    config: Any = getattr(body, "pretrained_cfg", None) or {}
    mean, std = config.get("mean", (0.485, 0.456, 0.406)), config.get("std", (0.229, 0.224, 0.225))
    return torch.tensor(mean) * 255, torch.tensor(std) * 255
