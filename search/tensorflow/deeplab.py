"""A TensorFlow V2 checkpoint of the authors' DeepLab as a network of this project.

Backbone (MobileNet-v2, Xception-41, -65 or -71), decoder, ASPP or cell and classes are read off the variables' names and
shapes (research/deeplab/core/{feature_extractor,xception,dense_prediction_cell}.py, research/deeplab/model.py). What no
variable shows must be given: the cell, or ASPP's rates, and the output stride. Strict: every variable becomes a weight or is
skipped for a named reason, every weight comes from a variable, and shapes agree; anything else is an error that names the
variable.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, assert_never

import numpy as np
import torch
from numpy.typing import NDArray

from fast.backbone import timm_backbone
from fast.decoder import Decoder
from fast.dense_prediction_cell import DensePredictionCell
from fast.segmentation import SegmentationHead, SegmentationNetwork
from reference.cell import BACKBONE_FEATURE, AtrousSeparableConv, Branch, Cell, Conv1x1, Operation, PyramidPooling
from search.errors import InputError

_BACKBONES = {
    "MobilenetV2": "mobilenetv2_100",
    "xception_41": "xception41",
    "xception_65": "xception65",
    "xception_71": "xception71",
}
_XCEPTION_UNITS = {"xception_41": (3, 8), "xception_65": (3, 16), "xception_71": (5, 16)}  # of the entry and the middle flow

_AVERAGE = "/ExponentialMovingAverage"
_SLOT = re.compile(r"/(Momentum|Adam|Adam_1|RMSProp|RMSProp_1|Adagrad)$")
_CLASSIFIER = re.compile(r"MobilenetV2/(Conv_1|Logits)/|xception_\d+/logits/")

# TensorFlow's axes in our order: [kh, kw, in, out] -> (out, in, kh, kw), and depthwise [kh, kw, C, 1] -> (C, 1, kh, kw).
_CONV_AXES, _DEPTHWISE_AXES, _VECTOR_AXES = (3, 2, 0, 1), (2, 3, 0, 1), (0,)
_NORM = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}


class Conversion(NamedTuple):
    """The network, in evaluation mode; the variables it was made of; the others, each with the reason why it was skipped."""

    network: SegmentationNetwork
    used: tuple[str, ...]
    skipped: dict[str, str]


class _Target(NamedTuple):
    variable: str
    axes: tuple[int, ...]


class _Context(NamedTuple):
    """The cell, and the scopes of its branches and of its projection."""

    cell: Cell
    branches: tuple[str, ...]
    projection: str


def convert(
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], NDArray[Any]],
    *,
    cell: Cell,
    atrous_rates: tuple[int, ...] = (6, 12, 18),
    output_stride: int = 16,
    image_pooling_crop_size: tuple[int, int] | None = None,
    moving_averages: bool = False,
) -> Conversion:
    """The network of a checkpoint with variables of these `shapes`, whose values `read` gives by name.

    `cell` is used if the checkpoint holds a cell, `atrous_rates` if it holds ASPP. `image_pooling_crop_size` pins the windows
    of pyramid pooling to those of pictures of this size. Raises InputError naming the variable that is missing, unknown, of
    another shape or not finite.
    """
    sources, skipped = _sources(shapes, moving_averages)
    scope = _backbone_scope(sources)
    context = _context(sources, cell, atrous_rates)
    network = _build(scope, context.cell, sources, shapes, output_stride)
    if image_pooling_crop_size is not None:
        height, width = (-(-extent // output_stride) for extent in image_pooling_crop_size)  # the authors' scale_dimension
        network.head.context.pin_pooling((height, width))
    targets = _targets(network, scope, context)
    _check(targets, network, sources, shapes)
    state = network.state_dict()
    with torch.no_grad():
        for key, target in targets.items():
            values = read(sources[target.variable])
            if not np.isfinite(values).all():
                raise InputError(f"variable {sources[target.variable]} holds values that are not finite")
            state[key].copy_(torch.from_numpy(values.transpose(target.axes).astype(np.float32)))
    return Conversion(network.eval(), tuple(sources[target.variable] for target in targets.values()), skipped)


def _sources(names: Iterable[str], moving_averages: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Weights' names -> the variables to read them from, and the variables to skip -> why."""
    names = list(names)
    known = set(names)
    sources, skipped = {name: name for name in names}, {}
    for name in names:
        if name == "global_step":
            skipped[name] = "count of training steps"
        elif (slot := _SLOT.search(name)) and name[: slot.start()] in known:
            skipped[name] = f"state of the optimizer ({slot[1]})"
        elif name in ("beta1_power", "beta2_power"):
            skipped[name] = "state of the optimizer (Adam)"
        elif _CLASSIFIER.match(name):
            skipped[name] = "classifier of the pretraining, above the features that DeepLab reads"
        elif name.endswith(_AVERAGE) and (weight := name.removesuffix(_AVERAGE)) in known:
            if moving_averages:
                sources[weight] = name
            skipped[weight if moving_averages else name] = (
                "replaced by its moving average"
                if moving_averages
                else "moving average of a weight; `moving_averages` takes it"
            )
    if moving_averages and not any(name.endswith(_AVERAGE) for name in names):
        raise InputError("the checkpoint holds no moving averages: leave out `moving_averages`")
    averages = {weight + _AVERAGE for weight in known}  # what averages no weight stays, and is refused as unknown
    kept = {name: source for name, source in sources.items() if source not in skipped and name not in averages}
    return kept, skipped


def _backbone_scope(sources: Mapping[str, str]) -> str:
    scopes = sorted({name.split("/")[0] for name in sources} & _BACKBONES.keys())
    if len(scopes) != 1:
        raise InputError(
            f"a checkpoint of DeepLab has variables in one of the scopes {', '.join(_BACKBONES)}, this has "
            f"{' and '.join(scopes) or 'none'} (top scopes: {', '.join(sorted({name.split('/')[0] for name in sources})[:8])})"
        )
    return scopes[0]


def _context(sources: Mapping[str, str], cell: Cell, atrous_rates: tuple[int, ...]) -> _Context:
    """A cell keeps its name scope; ASPP is a cell too, its branches in the authors' order."""
    if any(name.startswith("meta_architecture/") for name in sources):
        branches = tuple(f"meta_architecture/branch{i}" for i in range(len(cell.branches)))
        return _Context(cell, branches, "meta_architecture/concat_projection")
    if "aspp0/weights" not in sources:
        raise InputError("the checkpoint has neither a cell (meta_architecture/...) nor ASPP (aspp0/...): is it of DeepLab?")
    atrous = sum(re.fullmatch(r"aspp\d+_depthwise/depthwise_weights", name) is not None for name in sources)
    if atrous and atrous != len(atrous_rates):
        raise InputError(f"the checkpoint's ASPP has {atrous} atrous convolutions: give `atrous_rates` with as many numbers")
    operations: dict[str, Operation] = {
        **({"image_pooling": PyramidPooling(grid_size=(1, 1))} if "image_pooling/weights" in sources else {}),
        "aspp0": Conv1x1(),
        **{f"aspp{i + 1}": AtrousSeparableConv(rate=(rate, rate)) for i, rate in enumerate(atrous_rates[:atrous])},
    }
    aspp = Cell(tuple(Branch(BACKBONE_FEATURE, operation) for operation in operations.values()))
    return _Context(aspp, tuple(operations), "concat_projection")


def _build(
    scope: str, cell: Cell, sources: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], output_stride: int
) -> SegmentationNetwork:
    if "logits/semantic/biases" not in sources:
        raise InputError("the checkpoint lacks the variable logits/semantic/biases: is it of DeepLab, trained for one task?")
    has_decoder = any(name.startswith("decoder/") for name in sources)
    backbone = timm_backbone(
        _BACKBONES[scope], output_stride=output_stride, weights_origin="tensorflow", low_level=has_decoder
    )
    context = DensePredictionCell(cell, backbone.channels, output_stride=output_stride)
    head = SegmentationHead(context, shapes["logits/semantic/biases"][0])
    decoder = None
    if has_decoder and backbone.low_level is not None:
        decoder = Decoder(backbone.low_level.channels, channels=context.cell_channels)
    return SegmentationNetwork(backbone, head, decoder)


def _targets(network: SegmentationNetwork, scope: str, context: _Context) -> dict[str, _Target]:
    """The variable of every weight and statistic, by its key in the network's state."""
    body = _mobilenet_scopes(network.backbone.body) if scope == "MobilenetV2" else _xception_scopes(scope)
    scopes = {f"backbone.body.{module}": f"{scope}/{name}" for module, name in body.items()}
    for i, (branch, name) in enumerate(zip(context.cell.branches, context.branches, strict=True)):
        match branch.operation:
            case Conv1x1() | PyramidPooling():
                scopes[f"head.context.branches.{i}.pointwise"] = name
            case AtrousSeparableConv():
                scopes[f"head.context.branches.{i}.depthwise"] = f"{name}_depthwise"
                scopes[f"head.context.branches.{i}.pointwise"] = f"{name}_pointwise"
            case _:
                assert_never(branch.operation)
    scopes |= {"head.context.projection": context.projection, "decoder.projection": "decoder/feature_projection0"}
    for i in range(2):
        for part in ("depthwise", "pointwise"):
            scopes[f"decoder.refinement.{i}.{part}"] = f"decoder/decoder_conv{i}_{part}"
    scopes["head.classifier"] = "logits/semantic"
    targets = {}
    for key, tensor in network.state_dict().items():
        module, _, leaf = key.rpartition(".")
        if leaf != "num_batches_tracked":  # a count that TensorFlow does not keep; only momentum=None would read it
            targets[key] = _target(scopes[module.removesuffix(".norm")], leaf, tensor.ndim)
    return targets


def _target(scope: str, leaf: str, dimensions: int) -> _Target:
    if dimensions == 4 and scope.endswith("depthwise"):
        return _Target(f"{scope}/depthwise_weights", _DEPTHWISE_AXES)
    if dimensions == 4:
        return _Target(f"{scope}/weights", _CONV_AXES)
    if scope == "logits/semantic":
        return _Target(f"{scope}/biases", _VECTOR_AXES)
    return _Target(f"{scope}/BatchNorm/{_NORM[leaf]}", _VECTOR_AXES)


def _mobilenet_scopes(body: Any) -> dict[str, str]:
    """timm's modules -> scopes within MobilenetV2; the first block has no expansion."""
    first = {"conv_dw": "depthwise", "bn1": "depthwise", "conv_pw": "project", "bn2": "project"}
    others = {
        **{"conv_pw": "expand", "bn1": "expand", "conv_dw": "depthwise", "bn2": "depthwise"},
        **{"conv_pwl": "project", "bn3": "project"},
    }
    scopes = {"conv_stem": "Conv", "bn1": "Conv"}
    blocks = [f"blocks.{i}.{j}" for i, stage in enumerate(body.blocks) for j in range(len(stage))]
    for n, block in enumerate(blocks):
        scope = f"expanded_conv_{n}" if n else "expanded_conv"
        scopes |= {f"{block}.{module}": f"{scope}/{name}" for module, name in (others if n else first).items()}
    return scopes


def _xception_scopes(scope: str) -> dict[str, str]:
    """timm's modules -> scopes within xception_65 and its kin."""
    entry, middle = _XCEPTION_UNITS[scope]
    units = [
        *(f"entry_flow/block{i}/unit_1" for i in range(1, entry + 1)),
        *(f"middle_flow/block1/unit_{i}" for i in range(1, middle + 1)),
        *(f"exit_flow/block{i}/unit_1" for i in (1, 2)),
    ]
    scopes = {f"stem_{i}.{part}": f"entry_flow/conv1_{i + 1}" for i in (0, 1) for part in ("conv", "bn")}
    for i, unit in enumerate(units):
        module = f"{unit}/xception_module"
        scopes |= {f"blocks_{i}.shortcut.{part}": f"{module}/shortcut" for part in ("conv", "bn")}
        for k in (1, 2, 3):
            convolution = f"blocks_{i}.stack.conv{k}"
            scopes |= {f"{convolution}.{part}_dw": f"{module}/separable_conv{k}_depthwise" for part in ("conv", "bn")}
            scopes |= {f"{convolution}.{part}_pw": f"{module}/separable_conv{k}_pointwise" for part in ("conv", "bn")}
    return scopes


def _check(
    targets: Mapping[str, _Target],
    network: SegmentationNetwork,
    sources: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    hint = f" of {network.backbone.name} with the cell {network.head.context.cell}"
    if "meta_architecture/concat_projection/weights" in sources:
        hint += ": was it trained with another `cell`?"
    wanted = {target.variable for target in targets.values()}
    if missing := sorted(wanted - sources.keys()):
        raise InputError(f"the checkpoint lacks {_some(missing)}{hint}")
    if unknown := sorted(sources.keys() - wanted):
        raise InputError(f"the checkpoint has {_some(unknown)}, which would be no weight{hint}")
    for key, tensor in network.state_dict().items():
        if key in targets:
            variable, axes = targets[key]
            expected = tuple(tensor.shape[axes.index(axis)] for axis in range(len(axes)))
            for name in {variable, sources[variable]}:
                if shapes[name] != expected:
                    raise InputError(f"variable {name} has the shape {list(shapes[name])}, not {list(expected)}{hint}")


def _some(names: list[str]) -> str:
    listed = ", ".join(names[:3])
    return f"the variable {listed}" if len(names) == 1 else f"{len(names)} variables ({listed}{', ...' if names[3:] else ''})"
