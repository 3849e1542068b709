"""A trained head or network as one file: weights beside the architecture they belong to, so that loading needs the file alone.

The format is safetensors; its metadata hold a JSON description. Nothing in it is ever executed.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fast.backbone import Backbone, PlainBody, plain_backbone, timm_backbone
from fast.conv_norm import NormLayer
from fast.decoder import Decoder
from fast.dense_prediction_cell import DensePredictionCell
from fast.segmentation import SegmentationHead, SegmentationNetwork
from reference.batch_norm import EPS
from reference.cell import Cell

FORMAT = "dense-prediction-cell head 1"
NETWORK_FORMAT = "dense-prediction-cell network 1"


def save_head(path: Path, head: SegmentationHead, *, task: Mapping[str, Any], backbone: dict[str, Any]) -> None:
    """Write atomically; `task` says what the outputs mean, such as {"class_names": ("road", "car")}, and `backbone` which
    features the head was trained on (name, weights hash, and so on).

    Raises ValueError for class names that are not as many as the outputs, and for a head that a file cannot describe, such as
    one with other norms than batch norms.
    """
    description = _describe_head(head, task)
    _check_described(head, lambda: _build_head(description))
    _write(path, head, FORMAT, {**description, "backbone": backbone})


def load_head(path: Path, *, norm_layer: NormLayer = nn.BatchNorm2d) -> tuple[SegmentationHead, dict[str, Any]]:
    """Load a head: the module in evaluation mode, and its description. Raises ValueError naming the file.

    For a training that goes on, `norm_layer` says with what momentum: PyTorch's, or by `authors_norm` the authors'.
    """
    description, state = _read(path, "head", FORMAT)
    with _building(path, "head"):
        head = _build_head(description, norm_layer)
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
    path: Path,
    network: SegmentationNetwork,
    *,
    task: Mapping[str, Any],
    source: dict[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> None:
    """Write atomically; `task` says what the outputs mean, as in `save_head`, `source` where the weights come from
    (training settings, a converted file, and so on), and `evaluation` how it is evaluated unless told otherwise: `dataset`,
    and the size `pad_to` that pictures are padded to.

    Raises ValueError for a backbone that is neither from timm nor plain, and so could not be built again from the file, for
    class names that are not as many as the outputs, and for a head or decoder that a file cannot describe.
    """
    description = {
        **_describe_head(network.head, task),
        "backbone": _describe_backbone(network.backbone),
        "decoder": None if network.decoder is None else {"projected_channels": network.decoder.projected_channels},
        "source": source or {},
        "evaluation": dict(evaluation or {}),
    }
    _check_described(network.head, lambda: _build_head(description))
    decoder = network.decoder
    if decoder is not None:
        low_level_channels = decoder.low_level_channels
        _check_described(decoder, lambda: _build_decoder(description, low_level_channels))
    _write(path, network, NETWORK_FORMAT, description)


def load_network(path: Path, *, norm_layer: NormLayer = nn.BatchNorm2d) -> tuple[SegmentationNetwork, dict[str, Any]]:
    """Load a network: the module in evaluation mode, and its description. Raises ValueError naming the file.

    `norm_layer`, of head and decoder, is as in `load_head`.
    """
    description, state = _read(path, "network", NETWORK_FORMAT)
    with _building(path, "network"):
        backbone = _build_backbone(description["backbone"], low_level=description["decoder"] is not None)
        decoder = None
        if description["decoder"] is not None and backbone.low_level is not None:
            decoder = _build_decoder(description, backbone.low_level.channels, norm_layer)
        network = SegmentationNetwork(backbone, _build_head(description, norm_layer), decoder)
    _fill(network, state, path, "network")
    return network, description


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
        "dropout_rate": getattr(context.dropout, "p", 0.0),  # it may have been replaced, by Dropout2d or Identity
        "pooling": context.pooling,
        "pooling_size": context.pooling_size,
    }


def _build_head(description: dict[str, Any], norm_layer: NormLayer = nn.BatchNorm2d) -> SegmentationHead:
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
        norm_layer=norm_layer,
    )
    outputs = description["outputs"] if "outputs" in description else len(description["class_names"])  # as in earlier files
    return SegmentationHead(context, outputs)


def _check_described(module: nn.Module, build: Callable[[], nn.Module]) -> None:
    """Raises ValueError for a part of a head or decoder that is another one in what `build` makes of its description."""
    with torch.device("meta"):
        built = build()
    ours, theirs = ({(key, tensor.shape) for key, tensor in part.state_dict().items()} for part in (module, built))
    others = sorted(key.rpartition(".")[0] for key, _ in ours ^ theirs)
    if not others:  # then all norms can be looked up
        norms = (name for name, child in built.named_modules() if isinstance(child, nn.BatchNorm2d))
        others = [name for name in norms if getattr(module.get_submodule(name), "eps", EPS) != EPS]
    if others:
        raise ValueError(
            f"a file cannot describe {others[0]} of this {type(module).__name__}: it is read back with plain convolutions and "
            f"nn.BatchNorm2d of eps {EPS}, and so would be another one; keep its state_dict() instead"
        )


def _build_decoder(description: dict[str, Any], low_level_channels: int, norm_layer: NormLayer = nn.BatchNorm2d) -> Decoder:
    channels = description["cell_channels"]
    return Decoder(low_level_channels, channels=channels, **description["decoder"], norm_layer=norm_layer)


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
