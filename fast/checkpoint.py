"""A trained head or network as one file: weights beside the architecture they belong to, so that loading needs the file alone.

The format is safetensors; its metadata hold a JSON description. Nothing in it is ever executed.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fast.backbone import Backbone, PlainBody, plain_backbone, timm_backbone
from fast.decoder import Decoder
from fast.dense_prediction_cell import DensePredictionCell
from fast.segmentation import SegmentationHead, SegmentationNetwork
from reference.cell import Cell

FORMAT = "dense-prediction-cell head 1"
NETWORK_FORMAT = "dense-prediction-cell network 1"


def save_head(path: Path, head: SegmentationHead, *, task: Mapping[str, Any], backbone: dict[str, Any]) -> None:
    """Write atomically; `task` says what the outputs mean, such as {"class_names": ("road", "car")}, and `backbone` which
    features the head was trained on (name, weights hash, and so on).

    Raises ValueError for class names that are not as many as the outputs.
    """
    _write(path, head, FORMAT, {**_describe_head(head, task), "backbone": backbone})


def load_head(path: Path) -> tuple[SegmentationHead, dict[str, Any]]:
    """Load a head: the module in evaluation mode, and its description. Raises ValueError naming the file."""
    description, state = _read(path, "head", FORMAT)
    with _building(path, "head"):
        head = _build_head(description)
    _fill(head, state, path, "head")
    return head, description


def load_context(path: Path) -> DensePredictionCell:
    """Load the cell alone from a head or network file, with weights, in evaluation mode. Raises ValueError naming the file."""
    description, state = _read(path, "head or network", FORMAT, NETWORK_FORMAT)
    with _building(path, "head or network"):
        context = _build_head(description).context
    by_head_key = {key.removeprefix("head."): tensor for key, tensor in state.items()}
    inner = {key.removeprefix("context."): tensor for key, tensor in by_head_key.items() if key.startswith("context.")}
    _fill(context, inner, path, "head or network")
    return context


def save_network(
    path: Path, network: SegmentationNetwork, *, task: Mapping[str, Any], source: dict[str, Any] | None = None
) -> None:
    """Write atomically; `task` says what the outputs mean, as in `save_head`, and `source` where the weights come from
    (training settings, a converted file, and so on).

    Raises ValueError for a backbone that is neither from timm nor plain, and so could not be built again from the file, and
    for class names that are not as many as the outputs.
    """
    description = {
        **_describe_head(network.head, task),
        "backbone": _describe_backbone(network.backbone),
        "decoder": None if network.decoder is None else {"projected_channels": network.decoder.projected_channels},
        "source": source or {},
    }
    _write(path, network, NETWORK_FORMAT, description)


def load_network(path: Path) -> tuple[SegmentationNetwork, dict[str, Any]]:
    """Load a network: the module in evaluation mode, and its description. Raises ValueError naming the file."""
    description, state = _read(path, "network", NETWORK_FORMAT)
    with _building(path, "network"):
        backbone = _build_backbone(description["backbone"], low_level=description["decoder"] is not None)
        decoder = None
        if description["decoder"] is not None and backbone.low_level is not None:
            decoder = Decoder(backbone.low_level.channels, channels=description["cell_channels"], **description["decoder"])
        network = SegmentationNetwork(backbone, _build_head(description), decoder)
    _fill(network, state, path, "network")
    return network, description


def describe_file(path: Path) -> tuple[Literal["head", "network"], dict[str, Any]] | None:
    """Which of the two a file is, and its description; None for any other file, a state dict among them, or none at all.

    Raises ValueError naming a file of this format whose description cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return None
    kinds: dict[str, Literal["head", "network"]] = {FORMAT: "head", NETWORK_FORMAT: "network"}
    kind = kinds.get(metadata.get("format", ""))
    if kind is None:
        return None
    with _building(path, kind):
        return kind, dict(json.loads(metadata["description"]))


def load_backbone(path: Path, *, output_stride: int | None = None, low_level: bool = False) -> Backbone:
    """Load the backbone alone from a network file, with weights, in evaluation mode. Raises ValueError naming the file.

    It may get another `output_stride` than in the network, and the map at stride 4 for a decoder, because the weights are the
    same for both.
    """
    description, state = _read(path, "network", NETWORK_FORMAT)
    with _building(path, "network"):
        described = description["backbone"]
        described |= {"output_stride": output_stride or described["output_stride"]}
        backbone = _build_backbone(described, low_level=low_level)
    inner = {key.removeprefix("backbone."): tensor for key, tensor in state.items() if key.startswith("backbone.")}
    _fill(backbone, inner, path, "network")
    return backbone


def _describe_head(head: SegmentationHead, task: Mapping[str, Any]) -> dict[str, Any]:
    context, outputs = head.context, head.classifier.out_channels
    if "class_names" in task and len(task["class_names"]) != outputs:
        raise ValueError(f"the classifier has {outputs} classes, got {len(task['class_names'])} class names")
    return {
        **task,
        "outputs": outputs,
        "cell": json.loads(context.cell.to_json()),
        "in_channels": context.in_channels,
        "branch_channels": context.branch_channels,
        "cell_channels": context.cell_channels,
        "output_stride": context.output_stride,
        "dropout_rate": context.dropout.p,
        "pooling": context.pooling,
        "pooling_size": context.pooling_size,
    }


def _build_head(description: dict[str, Any]) -> SegmentationHead:
    pooling_size = description["pooling_size"]
    context = DensePredictionCell(
        Cell.from_json(json.dumps(description["cell"])),
        description["in_channels"],
        branch_channels=description["branch_channels"],
        cell_channels=description["cell_channels"],
        output_stride=description["output_stride"],
        dropout_rate=description["dropout_rate"],
        pooling=description["pooling"],
        pooling_size=tuple(pooling_size) if pooling_size else None,
    )
    outputs = description["outputs"] if "outputs" in description else len(description["class_names"])  # as in earlier files
    return SegmentationHead(context, outputs)


def _describe_backbone(backbone: Backbone) -> dict[str, Any]:
    if isinstance(backbone.body, PlainBody):
        return {
            "name": backbone.name,
            "output_stride": backbone.output_stride,
            "plain_channels": backbone.body.channels,
            "mean": backbone.mean.flatten().tolist(),
            "std": backbone.std.flatten().tolist(),
        }
    if not backbone.from_timm:
        raise ValueError(f"backbone {backbone.name} is not from timm, so a file could not tell how to build it again")
    return {
        "name": backbone.name,
        "output_stride": backbone.output_stride,
        "weights_origin": backbone.weights_origin,  # decides padding and the norms' epsilon
        "mean": backbone.mean.flatten().tolist(),
        "std": backbone.std.flatten().tolist(),
    }


def _build_backbone(description: dict[str, Any], *, low_level: bool) -> Backbone:
    name, output_stride = description["name"], description["output_stride"]
    if "plain_channels" in description:
        channels = tuple(description["plain_channels"])
        backbone = plain_backbone(name, channels, output_stride=output_stride, low_level=low_level)
    else:
        origin = description["weights_origin"]
        backbone = timm_backbone(name, output_stride=output_stride, weights_origin=origin, low_level=low_level)
    for buffer, values in ((backbone.mean, description["mean"]), (backbone.std, description["std"])):
        buffer.copy_(torch.tensor(values).view(1, 3, 1, 1))
    return backbone


def _write(path: Path, module: nn.Module, file_format: str, description: dict[str, Any]) -> None:
    state = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
    content = save(state, metadata={"format": file_format, "description": json.dumps(description)})
    write_whole(path, content)  # not save_file: only their owner could read its files, whatever the umask


def write_whole(path: Path, content: bytes) -> None:
    """Write to a temporary file, flush it to disk, then rename it: after a crash the old or the new file is there, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with suppress(OSError):  # the disk may be full
            partial.unlink()
        raise


def _read(path: Path, kind: str, *formats: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if path.is_dir():  # whose error would speak of a device
        raise ValueError(f"{kind} {path} is a folder: give a file in it, such as best.safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict, has no iterator
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{kind} {path} cannot be read as safetensors: {error}") from error
    if metadata.get("format") not in formats:
        wanted = " or ".join(map(repr, formats))
        raise ValueError(f"{kind} {path} is not in the format {wanted}, got {metadata.get('format')!r}")
    with _building(path, kind):
        return json.loads(metadata["description"]), state


@contextmanager
def _building(path: Path, kind: str) -> Iterator[None]:
    """Turn errors inside into a ValueError that names the file, and let nothing that is built draw random numbers."""
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = f"lacks the field {error}" if isinstance(error, KeyError) else f"cannot be used: {error}"
        raise ValueError(f"{kind} {path} has a description that {reason}") from error


def _fill(module: nn.Module, state: dict[str, Tensor], path: Path, kind: str) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{kind} {path} does not hold the weights that its description names: {error}") from error
    module.eval()
