"""Reads the outputs of the authors' own code: the files of this folder, and more in `../shared/golden` where that exists.

TensorFlow keeps maps as NHWC, convolution weights as [kh, kw, in, out] and depthwise weights as [kh, kw, in, 1]; here they
become float64 arrays in the layout of `reference/`. Reading needs NumPy alone: docs/assignment/ does it in students' clones.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple, assert_never

import numpy as np
from numpy.typing import NDArray

from reference.atrous_separable_conv import SeparableConv
from reference.batch_norm import Array, BatchNorm
from reference.cell import AtrousSeparableConv, Cell, Conv1x1, PyramidPooling
from reference.dense_prediction_cell import BranchOptions, BranchWeights, CellWeights
from reference.hard_example_mining import mined_share
from reference.pointwise_conv import ConvNorm

HERE = Path(__file__).parent
SHARED = Path(__file__).parents[2].parent / "shared" / "golden"

OUTPUT_BOUND = 5e-5  # absolute, on maps of values up to 10 that went through up to ten float32 convolutions
GRADIENT_BOUND = 1e-5  # relative to the tensor's largest; float32 sums over up to 578 pixels, there and back through the cell
STATISTICS_BOUND = 1.5e-7  # float32 rounding of values up to 2; a biased variance is off by momentum · var / (N·H·W) > 4e-7
LOSS_BOUND = 1e-6  # absolute; float32 means of up to 7, over 50,000 pixels
SCORE_BOUND = 1e-7  # of train_facts/miou.npz: float32

Variables = dict[str, NDArray[Any]]  # by TensorFlow's name within the cell's scope, such as branch0_depthwise/BatchNorm/gamma


class CellDump(NamedTuple):
    """One run of the authors' `build_cell` with random weights."""

    arrays: Variables  # everything in the file, as it is
    meta: dict[str, Any]
    cell: Cell
    weights: CellWeights[Array]
    options: BranchOptions
    features: Array  # (N, C, H, W)
    output: Array  # (N, cell_channels, H, W)


class LossDump(NamedTuple):
    """One of the losses in `loss.npz`, of the same logits and labels."""

    logits: Array  # (N, K, h, w)
    labels: NDArray[Any]  # (N, H, W)
    share: float  # of the pixels that count
    class_weights: Array | None
    loss: float
    grad_logits: Array


def dump_files(pattern: str) -> list[Any]:
    """Parameters for `pytest.mark.parametrize`: the copies in this folder, then what else lies in ../shared/golden."""
    import pytest

    copies = [pytest.param(path, id=path.stem) for path in sorted(HERE.glob(pattern))]
    if not SHARED.is_dir():
        absent = pytest.mark.skip(reason="no ../shared/golden beside the repository; the copies in tests/golden are tested")
        return [*copies, pytest.param(None, id="shared", marks=absent)]
    return copies + [pytest.param(path, id=f"shared-{path.stem}") for path in sorted(SHARED.glob(pattern))]


def load_cell_dump(path: Path) -> CellDump:
    with np.load(path) as file:
        arrays = dict(file)
    meta = json.loads(str(arrays["meta_json"]))
    cell = Cell.from_json(json.dumps(meta["config"]))
    stride = meta["output_stride"]
    options = BranchOptions(
        training=meta.get("fine_tune_batch_norm", False),
        rate_multiplier=meta["hparams"]["conv_rate_multiplier"],
        # The authors' window follows the crop: ceil(crop / (stride · grid)) = ceil(ceil(crop / stride) / grid).
        pooling_size=(-(-meta["crop_size"][0] // stride), -(-meta["crop_size"][1] // stride)),
    )
    weights = cell_weights(with_prefix(arrays, "var/meta_architecture/"), cell)
    return CellDump(arrays, meta, cell, weights, options, nchw(arrays["features"]), nchw(arrays["output"]))


def load_loss_dump(path: Path, name: str) -> LossDump:
    with np.load(path) as file:
        (meta,) = (each for each in json.loads(str(file["meta_json"])) if each["name"] == name)
        logits, labels, gradient = nchw(file["logits"]), file["labels"][..., 0], nchw(file[f"grad_{name}"])
    arguments = meta["kwargs"]
    share = mined_share(
        arguments.get("top_k_percent_pixels", 1.0), meta["global_step"], arguments.get("hard_example_mining_step", 0)
    )
    weights = arguments.get("loss_weight")
    return LossDump(logits, labels, share, None if weights is None else np.array(weights), meta["loss"], gradient)


def with_prefix(arrays: Variables, prefix: str) -> Variables:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def nchw(array: NDArray[Any]) -> Array:
    return array.astype(np.float64).transpose(0, 3, 1, 2)


def cell_weights(variables: Variables, cell: Cell) -> CellWeights[Array]:
    """The authors' variables, or their gradients (which have no moving statistics: zero), as the reference's weights."""
    branches: list[BranchWeights[Array]] = []
    for i, branch in enumerate(cell.branches):
        match branch.operation:
            case Conv1x1() | PyramidPooling():
                branches.append(_conv(variables, f"branch{i}"))
            case AtrousSeparableConv():
                parts = (_conv(variables, f"branch{i}_{part}") for part in ("depthwise", "pointwise"))
                branches.append(SeparableConv(*parts))
            case _:
                assert_never(branch.operation)
    return CellWeights(tuple(branches), _conv(variables, "concat_projection"))


def _conv(variables: Variables, scope: str) -> ConvNorm[Array]:
    if scope.endswith("_depthwise"):
        weight = variables[f"{scope}/depthwise_weights"].transpose(2, 3, 0, 1)  # (C, 1, kh, kw)
    else:
        weight = variables[f"{scope}/weights"].transpose(3, 2, 0, 1)  # (C_out, C_in, 1, 1)
    scale, offset = variables[f"{scope}/BatchNorm/gamma"], variables[f"{scope}/BatchNorm/beta"]
    mean = variables.get(f"{scope}/BatchNorm/moving_mean", np.zeros_like(scale))
    variance = variables.get(f"{scope}/BatchNorm/moving_variance", np.zeros_like(scale))
    return ConvNorm(weight.astype(np.float64), BatchNorm(*(v.astype(np.float64) for v in (scale, offset, mean, variance))))
