"""A trained head or network as one file: weights beside the architecture they belong to, so that loading needs the file alone.

The format is safetensors; its metadata hold a JSON description. Nothing in it is ever executed. The package `safetensors` is
imported when a file is read or written, because the modules themselves need PyTorch and NumPy alone.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from fast.backbone import Backbone, PlainBody, WeightsOrigin, plain_backbone, timm_backbone
from fast.conv_norm import NormLayer
from fast.decoder import Decoder
from fast.dense_prediction_cell import DensePredictionCell
from fast.hub import HubModule
from fast.segmentation import SegmentationHead, SegmentationNetwork
from fast.timm_models import DEEPEST, Cut, cut_of, open_model
from fast.weights_file import OWN_FORMATS, describe_unusable
from reference.batch_norm import EPS
from reference.cell import Cell
from reference.grid import Grid

FileKind = Literal["cell", "head", "network"]

CONTEXT_FORMAT = f"{OWN_FORMATS} context 1"
FORMAT = f"{OWN_FORMATS} head 1"
NETWORK_FORMAT = f"{OWN_FORMATS} network 1"
_CONTEXT_IN = {CONTEXT_FORMAT: "", FORMAT: "context.", NETWORK_FORMAT: "head.context."}  # what its weights' names begin with


Module = TypeVar("Module", bound=HubModule)


def save(path: str | Path, module: HubModule) -> None:
    """Write a cell, head or network atomically; its `description` says what is to be known besides.

    Raises ValueError as `save_head` and `save_network`.
    """
    _write(path, module, *describe(module))


def load(path: str | Path, kind: type[Module]) -> Module:
    """Load a module of this kind, in evaluation mode. Raises ValueError naming the file, TypeError for a subclass."""
    module: HubModule
    if issubclass(kind, SegmentationNetwork):
        module, _ = load_network(path)
    else:
        module = load_head(path)[0] if issubclass(kind, SegmentationHead) else load_context(path)
    if not isinstance(module, kind):
        raise TypeError(f"{path} holds a {type(module).__name__}, which is no {kind.__name__}")
    return module


def describe(module: HubModule) -> tuple[str, dict[str, Any]]:
    """The format and the description of the module's file. Raises ValueError as `save_head` and `save_network`."""
    match module:
        case SegmentationNetwork(description=given):
            return NETWORK_FORMAT, _describe_network(module, given, given.get("source"), given.get("evaluation"))
        case SegmentationHead(description=given):
            return FORMAT, {**_describe_head(module, given), "backbone": given.get("backbone", {})}
        case DensePredictionCell():
            return CONTEXT_FORMAT, _describe_context(module)
    raise TypeError(f"a file holds a cell, a head or a network, not a {type(module).__name__}")


def save_head(path: str | Path, head: SegmentationHead, *, task: Mapping[str, Any], backbone: dict[str, Any]) -> None:
    """Write atomically; `task` says what the outputs mean, such as {"class_names": ("road", "car")}, and `backbone` which
    features the head was trained on (name, weights hash, and so on).

    Raises ValueError for class names that are not as many as the outputs, and for a head that a file cannot describe, such as
    one with other norms than batch norms.
    """
    write_whole(Path(path), head_content(head, task=task, backbone=backbone))


def head_content(head: SegmentationHead, *, task: Mapping[str, Any], backbone: dict[str, Any]) -> bytes:
    """What `save_head` writes."""
    return _content(head, FORMAT, {**_describe_head(head, task), "backbone": backbone})


def load_head(path: str | Path, *, norm_layer: NormLayer = nn.BatchNorm2d) -> tuple[SegmentationHead, dict[str, Any]]:
    """Load a head: the module in evaluation mode, and its description. Raises ValueError naming the file.

    For a training that goes on, `norm_layer` says with what momentum: PyTorch's, or by `authors_norm` the authors'.
    """
    _, description, state = _read(path, "head", FORMAT)
    with _building(path, "head"):
        head = _build_head(description, norm_layer)
    _fill(head, state, path, "head")
    head.description = description
    return head, description


def save_context(path: str | Path, context: DensePredictionCell) -> None:
    """Write the cell alone, atomically."""
    _write(path, context, CONTEXT_FORMAT, _describe_context(context))


def load_context(path: str | Path) -> DensePredictionCell:
    """Load the cell alone, with weights, in evaluation mode, from its own file or from that of a head or network.

    Raises ValueError naming the file.
    """
    kind = "cell, head or network"
    file_format, description, state = _read(path, kind, *_CONTEXT_IN)
    with _building(path, kind):
        context = _build_context(description) if file_format == CONTEXT_FORMAT else _build_head(description).context
    prefix = _CONTEXT_IN[file_format]
    inner = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    _fill(context, inner, path, kind)
    return context


def save_network(
    path: str | Path,
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
    _write(path, network, NETWORK_FORMAT, _describe_network(network, task, source, evaluation))


def load_network(
    path: str | Path, *, norm_layer: NormLayer = nn.BatchNorm2d, output_stride: int | None = None
) -> tuple[SegmentationNetwork, dict[str, Any]]:
    """Load a network: the module in evaluation mode, and its description. Raises ValueError naming the file.

    `norm_layer`, of head and decoder, is as in `load_head`. `output_stride` is another one than the network was trained at, as
    the authors evaluate at 8 what they train at 16: the weights are the same, strides become dilations, and rates double.
    """
    _, description, state = _read(path, "network", NETWORK_FORMAT)
    with _building(path, "network", output_stride):
        if output_stride is not None:
            description |= _at_output_stride(description, output_stride)
        backbone = _build_backbone(description["backbone"], low_level=description["decoder"] is not None)
        decoder = None
        if description["decoder"] is not None and backbone.low_level is not None:
            decoder = _build_decoder(description, backbone.low_level.channels, norm_layer)
        network = SegmentationNetwork(backbone, _build_head(description, norm_layer), decoder)
    _fill(network, state, path, "network")
    network.description = description
    return network, description


def read_description(path: str | Path) -> tuple[str, dict[str, Any]]:
    """The format and the description of a cell, head or network, without its weights. Raises ValueError naming the file."""
    file_format, description, _ = _read(path, "cell, head or network", *_CONTEXT_IN, with_weights=False)
    return file_format, description


def describe_file(path: str | Path) -> tuple[FileKind, dict[str, Any]] | None:
    """Which of these a file is, and its description; None for any other file, a state dict among them, or none at all.

    Raises ValueError naming a file of this format whose description cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return None
    kinds: dict[str, FileKind] = {CONTEXT_FORMAT: "cell", FORMAT: "head", NETWORK_FORMAT: "network"}
    kind = kinds.get(metadata.get("format", ""))
    if kind is None:
        return None
    with _building(path, kind):
        return kind, dict(json.loads(metadata["description"]))


def load_backbone(path: str | Path, *, output_stride: int | None = None, low_level: bool = False) -> Backbone:
    """Load the backbone alone from a network file, with weights, in evaluation mode. Raises ValueError naming the file.

    It may get another `output_stride` than in the network, and the map at stride 4 for a decoder, because the weights are the
    same for both.
    """
    _, description, state = _read(path, "network", NETWORK_FORMAT)
    with _building(path, "network", output_stride):
        described = description["backbone"]
        if output_stride is not None:
            described |= _backbone_at(described, output_stride)
        backbone = _build_backbone(described, low_level=low_level)
    inner = {key.removeprefix("backbone."): tensor for key, tensor in state.items() if key.startswith("backbone.")}
    _fill(backbone, inner, path, "network")
    return backbone


def _describe_network(
    network: SegmentationNetwork,
    task: Mapping[str, Any],
    source: Mapping[str, Any] | None,
    evaluation: Mapping[str, Any] | None,
) -> dict[str, Any]:
    return {
        **_describe_head(network.head, task),
        "backbone": describe_backbone(network.backbone),
        "decoder": None if network.decoder is None else {"projected_channels": network.decoder.projected_channels},
        "source": dict(source or {}),
        "evaluation": dict(evaluation or {}),
    }


def _describe_head(head: SegmentationHead, task: Mapping[str, Any]) -> dict[str, Any]:
    context, outputs = head.context, head.classifier.out_channels
    if "class_names" in task and len(task["class_names"]) != outputs:
        raise ValueError(f"the classifier has {outputs} classes, got {len(task['class_names'])} class names")
    return {**task, "outputs": outputs, **_describe_context(context)}


def _describe_context(context: DensePredictionCell) -> dict[str, Any]:
    return {
        "cell": json.loads(context.cell.to_json()),
        "in_channels": context.in_channels if len(context.input_channels) == 1 else [*context.input_channels],
        "branch_channels": context.branch_channels,
        "cell_channels": context.cell_channels,
        "output_stride": context.output_stride,
        "dropout_rate": getattr(context.dropout, "p", 0.0),  # it may have been replaced, by Dropout2d or Identity
        "pooling": context.pooling,
        "pooling_size": context.pooling_size,
    }


def _at_output_stride(description: Mapping[str, Any], output_stride: int) -> dict[str, Any]:
    """What differs in the description of a network at another output stride. Pinned windows keep their size in pixels."""
    backbone, trained = description["backbone"], description["output_stride"]
    pinned, border = description["pooling_size"], int(backbone.get("align_corners", True))
    return {
        "backbone": {**backbone, **_backbone_at(backbone, output_stride)},
        "output_stride": output_stride,
        "pooling_size": [(extent - border) * trained // output_stride + border for extent in pinned] if pinned else None,
    }


def _backbone_at(backbone: Mapping[str, Any], output_stride: int) -> dict[str, Any]:
    """What differs in the description of a backbone at another output stride. Raises ValueError for one that has none."""
    trained = backbone["output_stride"]
    if output_stride == trained:
        return {}
    if "plain_channels" in backbone:
        return {"output_stride": output_stride, "trained_output_stride": backbone.get("trained_output_stride", trained)}
    cut = _cut_at(backbone["name"], _described_cut(backbone), output_stride, backbone["weights_origin"])
    return {"output_stride": output_stride, **_describe_cut(cut)}


def _build_context(description: dict[str, Any], norm_layer: NormLayer = nn.BatchNorm2d) -> DensePredictionCell:
    pooling_size = description["pooling_size"]
    return DensePredictionCell(
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


def _build_head(description: dict[str, Any], norm_layer: NormLayer = nn.BatchNorm2d) -> SegmentationHead:
    outputs = description["outputs"] if "outputs" in description else len(description["class_names"])  # as in earlier files
    return SegmentationHead(_build_context(description, norm_layer), outputs)


def _check_described(module: nn.Module, description: dict[str, Any]) -> None:
    """Raises ValueError for a cell, head or decoder that would be another one if it were built of its description."""
    with torch.device("meta"):
        match module:
            case SegmentationNetwork(head=head, decoder=decoder):
                _check_same(head, _build_head(description))
                if decoder is not None:
                    _check_same(decoder, _build_decoder(description, decoder.low_level_channels))
            case SegmentationHead():
                _check_same(module, _build_head(description))
            case DensePredictionCell():
                _check_same(module, _build_context(description))


def _check_same(module: nn.Module, built: nn.Module) -> None:
    """Raises ValueError for a part of the module that is another one in what was built of its description."""
    ours, theirs = ({(key, tensor.shape) for key, tensor in part.state_dict().items()} for part in (module, built))
    others = sorted(key.rpartition(".")[0] for key, _ in ours ^ theirs)
    if not others:  # then all parts can be looked up
        others = [name for name, part in built.named_modules() if not _computes_as(part, module.get_submodule(name))]
    if others:
        raise ValueError(
            f"a file cannot describe {others[0]} of this {type(module).__name__}: it is read back with convolutions as they "
            f"are built here and nn.BatchNorm2d of eps {EPS}, and so would be another one; keep its state_dict() instead"
        )


def _computes_as(built: nn.Module, part: nn.Module) -> bool:
    """Whether a convolution or norm computes what the one that was built does, of the same weights."""
    match built:
        case nn.Conv2d():
            geometry = attrgetter("stride", "padding", "dilation", "groups", "padding_mode")
            return type(part) is nn.Conv2d and bool(geometry(part) == geometry(built))
        case nn.BatchNorm2d():
            return type(part) in (nn.BatchNorm2d, nn.SyncBatchNorm) and bool(part.eps == built.eps)
    return True


def _build_decoder(description: dict[str, Any], low_level_channels: int, norm_layer: NormLayer = nn.BatchNorm2d) -> Decoder:
    channels = description["cell_channels"]
    return Decoder(low_level_channels, channels=channels, **description["decoder"], norm_layer=norm_layer)


def describe_backbone(backbone: Backbone) -> dict[str, Any]:
    """What builds the backbone again, but for its weights. Raises ValueError for one that is neither from timm nor plain."""
    if isinstance(backbone.body, PlainBody):
        trained = backbone.body.trained_output_stride
        return {
            "name": backbone.name,
            "output_stride": backbone.output_stride,
            **({"trained_output_stride": trained} if trained != backbone.output_stride else {}),
            "plain_channels": backbone.body.channels,
            "mean": backbone.mean.flatten().tolist(),
            "std": backbone.std.flatten().tolist(),
        }
    if backbone.cut is None:
        raise ValueError(
            f"backbone {backbone.name} is not from timm, so a file could not tell how to build it again: save the head by "
            "`save_head`, and the backbone as your own module"
        )
    return {
        "name": backbone.name,
        "output_stride": backbone.output_stride,
        "weights_origin": backbone.weights_origin,  # decides padding and the norms' epsilon
        **_describe_cut(backbone.cut),
        "mean": backbone.mean.flatten().tolist(),
        "std": backbone.std.flatten().tolist(),
    }


def _describe_cut(cut: Cut) -> dict[str, Any]:
    """What is not as in files from before there were these fields."""
    before = _facts_of(_described_cut({"output_stride": cut.grid.stride}))
    return {name: fact for name, fact in _facts_of(cut).items() if fact != before[name]}


def _facts_of(cut: Cut) -> dict[str, Any]:
    return {
        "align_corners": cut.grid.align_corners,
        "layers": cut.layers,
        "deepest": cut.deepest,
        "patch_size": cut.patch_size,
    }


def _described_cut(description: Mapping[str, Any]) -> Cut:
    return Cut(
        Grid(description["output_stride"], description.get("align_corners", True)),
        tuple(description.get("layers", (DEEPEST,))),
        description.get("deepest", DEEPEST),
        description.get("patch_size"),
    )


def _cut_at(name: str, cut: Cut, output_stride: int, origin: WeightsOrigin) -> Cut:
    """The cut of the same weights at another output stride. Raises ValueError for a model that has none there."""
    if cut.deepest == DEEPEST and cut.grid.align_corners:  # strides become dilations, which keep features on their pixels
        coarser_or_finer = replace(cut, grid=Grid(output_stride))
        open_model(name, (DEEPEST,), coarser_or_finer, origin)  # refuses where timm builds none
        return coarser_or_finer
    refusal = f"backbone {name!r} gives its features at {cut.grid.stride} alone"
    try:
        other = cut_of(name, output_stride, cut.layers, cut.patch_size, origin)
    except ValueError as error:
        raise ValueError(refusal) from error
    if (other.deepest, other.grid.align_corners) != (cut.deepest, cut.grid.align_corners):
        raise ValueError(refusal)
    return other


def check_network(network: SegmentationNetwork, task: Mapping[str, Any]) -> None:
    """Raises ValueError for a network that `save_network` would refuse, before it is trained."""
    _check_described(network, _describe_network(network, task, None, None))


def _build_backbone(description: dict[str, Any], *, low_level: bool) -> Backbone:
    name, output_stride = description["name"], description["output_stride"]
    if "plain_channels" in description:
        channels = tuple(description["plain_channels"])
        trained = description.get("trained_output_stride")
        backbone = plain_backbone(
            name, channels, output_stride=output_stride, trained_output_stride=trained, low_level=low_level
        )
    else:
        origin, cut = description["weights_origin"], _described_cut(description)
        backbone = timm_backbone(name, weights_origin=origin, low_level=low_level, cut=cut)
    for buffer, values in ((backbone.mean, description["mean"]), (backbone.std, description["std"])):
        buffer.copy_(torch.tensor(values).view(1, 3, 1, 1))
    return backbone


def _write(path: str | Path, module: nn.Module, file_format: str, description: dict[str, Any]) -> None:
    content = _content(module, file_format, description)
    write_whole(Path(path), content)  # not save_file: only their owner could read its files, whatever the umask


def _content(module: nn.Module, file_format: str, description: dict[str, Any]) -> bytes:
    from safetensors.torch import save as to_bytes

    _check_described(module, description)
    state = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
    content: bytes = to_bytes(state, metadata={"format": file_format, "description": json.dumps(description)})
    return content


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


def _read(
    path: str | Path, kind: str, *formats: str, with_weights: bool = True
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if Path(path).is_dir():  # whose error would speak of a device
        raise ValueError(f"{kind} {path} is a folder: give a file in it, such as best.safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            keys = file.keys() if with_weights else ()
            state = {key: file.get_tensor(key) for key in keys}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{kind} {path} cannot be read as safetensors: {error}") from error
    if metadata.get("format") not in formats:
        wanted = " or ".join(map(repr, formats))
        raise ValueError(f"{kind} {path} is not in the format {wanted}, got {metadata.get('format')!r}")
    with _building(path, kind):
        return metadata["format"], json.loads(metadata["description"]), state


@contextmanager
def _building(path: str | Path, kind: str, output_stride: int | None = None) -> Iterator[None]:
    """Turn errors inside into a ValueError that names the file, and the output stride if one was asked for.

    Nothing that is built draws random numbers.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, KeyError):
            fault = f"has a description that lacks the field {error}"
        elif output_stride is not None:
            fault = f"cannot be used at output stride {output_stride}: {error}"
        else:
            fault = f"has a description that cannot be used: {error}"
        raise ValueError(f"{kind} {path} {fault}") from error


def _fill(module: nn.Module, state: dict[str, Tensor], path: str | Path, kind: str) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{kind} {path} does not hold the weights that its description names: {error}") from error
    unusable = describe_unusable(state)
    if unusable is not None:
        raise ValueError(f"{kind} {path} has {unusable}")
    module.eval()
