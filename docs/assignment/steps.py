"""The twenty steps: what each asks for, and on which inputs it is checked.

Inputs are such that the likely misreadings give other values: H ≠ W, sizes that grids do not divide, channels of unlike
variance. The first cases of a step are small and have the reference's value; then come the authors' own numbers.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from docs.assignment import expected
from reference.atrous_separable_conv import SeparableConv
from reference.batch_norm import Array, BatchNorm
from reference.cell import Cell
from reference.dense_prediction_cell import CellWeights
from reference.pointwise_conv import ConvNorm
from tests.golden import authors_dumps as authors

Generator = np.random.Generator


class Bound(NamedTuple):
    """How far a value may be off: absolute + relative · the largest expected value of the array."""

    absolute: float
    relative: float


FLOAT64 = Bound(0.0, 1e-9)  # sums of at most 1e6 terms round to 1e-10; the smallest misreading moves a value by 1e-7
AUTHORS_OUTPUT, AUTHORS_GRADIENT = Bound(authors.OUTPUT_BOUND, 0.0), Bound(0.0, authors.GRADIENT_BOUND)
AUTHORS_STATISTICS = Bound(authors.STATISTICS_BOUND, 0.0)


class Case(NamedTuple):
    """One call of one function."""

    function: str
    says: str  # what is special about the input
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    bound: Bound = FLOAT64
    authors_value: Any = None  # else the reference's
    returns: tuple[str, ...] = ()  # names of what is returned, where that is more than one thing
    is_refused: bool = False  # the function has to raise ValueError

    def evaluated(self) -> Any:
        """The reference's value, or that of what the reference has been replaced by."""
        return expected.function(self.function)(*self.arguments, **self.options)

    def value(self) -> Any:
        """What is expected."""
        return self.evaluated() if self.authors_value is None else self.authors_value


class Step(NamedTuple):
    """One step of the assignment."""

    name: str
    points: int
    minutes: int
    anchor: str  # of docs/definitions.md
    functions: tuple[str, ...]
    needs: tuple[str, ...]  # steps whose functions are called by a usual solution
    cases: Callable[[], list[Case]]


def batch_norm_cases() -> Iterator[Case]:
    """Training, inference, one value per channel; the update, also of the authors' training step."""
    rng = np.random.default_rng(1)
    x, norm = _uneven(rng, (2, 3, 4, 5)), _norm(rng, 3)
    for function in ("batch_norm", "batch_norm_relu"):
        for training in (True, False):
            yield Case(function, _mode(training), (x, norm), {"training": training})
        for says, small in _few_values(x):
            yield Case(function, f"in training, {says}", (small, norm), {"training": True})
    yield Case("updated_running_statistics", "momentum 0.25", (x, norm), {"momentum": 0.25})
    for says, small in _few_values(x):
        yield Case("updated_running_statistics", says, (small, norm), {"momentum": 0.25})
    dump = _dump("dpc_train/train_bn_top1_17x17")
    depthwise = dump.weights.branches[0].depthwise  # type: ignore[union-attr]
    raw = expected.function("depthwise_conv")(dump.features, depthwise.weight, rate=(1, 6))
    after = _weights_after(dump).branches[0].depthwise.norm  # type: ignore[union-attr]
    momentum = {"momentum": 1.0 - dump.meta["bn_decay"]}
    yield Case("updated_running_statistics", "decay 0.9997", (raw, depthwise.norm), momentum, AUTHORS_STATISTICS, after)


def conv1x1_cases() -> Iterator[Case]:
    """Equal and unequal numbers of channels; two branches of the authors'."""
    rng = np.random.default_rng(2)
    for channels in ((4, 4), (3, 5)):
        x, weights = _uneven(rng, (2, channels[0], 4, 5)), _conv(rng, *channels)
        yield Case("pointwise_conv", "{} to {} channels".format(*channels), (x, weights.weight), {})
        for training in (True, False):
            yield Case("conv1x1", _mode(training), (x, weights), {"training": training})
    yield _authors_branch("conv1x1", "dpc_cells/u00_conv1x1_int_kernel_9x9", 0)
    yield _authors_branch("conv1x1", "dpc_cells/mix_cascade_1x1", 2)


def depthwise_cases() -> Iterator[Case]:
    """Rates of unlike height and width, and one that is out of reach."""
    rng = np.random.default_rng(3)
    x, weight = _uneven(rng, (2, 3, 7, 9)), rng.standard_normal((3, 1, 3, 3))
    for rate in ((2, 3), (1, 1), (9, 2)):
        yield Case("depthwise_conv", "rate {} x {} on 7 x 9".format(*rate), (x, weight), {"rate": rate})


def separable_cases() -> Iterator[Case]:
    """Both modes; two branches of the authors'."""
    rng = np.random.default_rng(4)
    x, weights = _uneven(rng, (2, 3, 6, 7)), SeparableConv(_depthwise(rng, 3), _conv(rng, 3, 4))
    for training, rate in ((True, (2, 1)), (False, (1, 3))):
        options = {"rate": rate, "training": training}
        yield Case("atrous_separable_conv", f"{_mode(training)}, rate {rate[0]} x {rate[1]}", (x, weights), options)
    for branch in (0, 3):
        yield _authors_branch("atrous_separable_conv", "dpc_cells/mix_cascade_1x1", branch)


def resize_cases() -> Iterator[Case]:
    """Larger, smaller, to and from one pixel."""
    x = np.random.default_rng(5).standard_normal((1, 2, 3, 4))
    for shape, size in (((3, 4), (5, 9)), ((3, 4), (2, 3)), ((3, 4), (1, 6)), ((1, 1), (4, 3))):
        says = "{} x {}".format(*shape) + " to {} x {}".format(*size)
        yield Case("bilinear_resize", says, (x[:, :, : shape[0], : shape[1]], size), {})


def pooling_cases() -> Iterator[Case]:
    """Maps that the grid does not divide; a window of another crop, or of a too large one; the authors' tiny map."""
    for training, grid_size, pooling_size, x, weights in _poolings():
        options = {"grid_size": grid_size, "training": training, "pooling_size": pooling_size}
        yield Case("pyramid_pooling", _pooling_says(training, grid_size, pooling_size), (x, weights), options)
    for branch in range(4):
        yield _authors_branch("pyramid_pooling", "dpc_cells/pool_tiny_3x4", branch)
    *_, (_, _, _, x, weights) = _poolings()
    for pooling_size, which in (((8, 10), "rows"), ((7, 11), "columns")):
        says = f"a window with more {which} than the map: {_pooling_says(False, (1, 1), pooling_size)}"
        options = {"grid_size": (1, 1), "training": False, "pooling_size": pooling_size}
        yield Case("pyramid_pooling", says, (x, weights), options, is_refused=True)


def project_cases() -> Iterator[Case]:
    """With and without dropout; the projections of two of the authors' cells."""
    for says, branches, weights, options in _projections():
        yield Case("concat_project", says, (branches, weights), options)
    for name in ("pool_tiny_3x4", "mix_cascade_1x1"):
        dump = _dump(f"dpc_cells/{name}")
        arguments = (_authors_branches(dump), dump.weights.projection)
        yield Case("concat_project", f"{name}.npz", arguments, {"training": False}, AUTHORS_OUTPUT, dump.output)


def cell_cases() -> Iterator[Case]:
    """Reading; a small cell of all operations in both modes; four of the authors' cells."""
    texts = {"all operations": SMALL_CELL, "kernels as [1, 1] and [3, 3]": OTHER_KERNELS}
    for says, text in texts.items():
        yield Case("read_cell", says, (text,), {})
    for says, index in REFUSED_INPUTS.items():
        yield Case("read_cell", says, (SMALL_CELL.replace('"input": 1', f'"input": {index}'),), {}, is_refused=True)
    for says, features, cell, weights, options in _small_cells():
        yield Case("dense_prediction_cell", says, (features, cell, weights), options)
    for name in ("u00_conv1x1_int_kernel_9x9", "mix_cascade_1x1", "pool_tiny_3x4", "mix_cascade_allops_12x9"):
        dump = _dump(f"dpc_cells/{name}")
        arguments = (dump.features, dump.cell, dump.weights)
        yield Case("dense_prediction_cell", f"{name}.npz", arguments, _options(dump), AUTHORS_OUTPUT, dump.output)


def loss_cases() -> Iterator[Case]:
    """Labels of unlike number in two images, logits of ±1000, no label at all; the authors' loss."""
    for says, logits, labels in _losses():
        yield Case("upsampled_cross_entropy", says, (logits, labels), {})
    dump = _authors_loss()
    bound = Bound(authors.LOSS_BOUND, 0.0)
    yield Case("upsampled_cross_entropy", "loss.npz", (dump.logits, dump.labels), {}, bound, dump.loss)


def score_cases() -> Iterator[Case]:
    """Predictions, counts of pixels with and without labels, absent classes; the authors' score."""
    rng = np.random.default_rng(10)
    yield Case("predicted_labels", "3 x 4 to 9 x 13", (4.0 * rng.standard_normal((2, 5, 3, 4)), (9, 13)), {})
    predictions, labels = rng.integers(0, 4, (2, 9, 13)), rng.integers(0, 3, (2, 9, 13))
    labels = np.where(rng.random(labels.shape) < 0.2, 255, labels)
    yield Case("confusion_matrix", "5 classes, two of them without labels", (predictions, labels), {"num_classes": 5})
    confusion = expected.function("confusion_matrix")(predictions, labels, num_classes=5)
    yield Case("mean_iou", "a class that is predicted only, and one that does not occur", (confusion,), {})
    with np.load(authors.HERE / "train_facts" / "miou.npz") as file:
        counts = expected.function("confusion_matrix")(file["predictions"], file["labels"], num_classes=19)
        value = float(file["mean_iou"])
    yield Case("mean_iou", "miou.npz", (counts,), {}, Bound(authors.SCORE_BOUND, 0.0), value)


def batch_norm_gradient_cases() -> Iterator[Case]:
    """Both modes, few values per channel, and zeros, where the ReLU's input is exactly 0; without and with ReLU."""
    rng = np.random.default_rng(1)
    x, norm = _uneven(rng, (2, 3, 4, 5)), _norm(rng, 3)
    grad_output = rng.standard_normal(x.shape)
    for function in ("batch_norm_backward", "batch_norm_relu_backward"):
        for training in (True, False):
            arguments, options = (grad_output, x, norm), {"training": training}
            yield Case(function, _mode(training), arguments, options, returns=("grad_x", "grad_norm"))
        for says, small in _few_values(x):
            arguments, options = (grad_output[: len(small), :, :1, :1], small, norm), {"training": True}
            yield Case(function, f"in training, {says}", arguments, options, returns=("grad_x", "grad_norm"))
    zero = np.zeros(3)
    at_zero = (grad_output, np.maximum(x, 0.0), norm._replace(offset=zero, running_mean=zero))
    says = "in inference, the ReLU's input exactly 0 in many places"
    yield Case("batch_norm_relu_backward", says, at_zero, {"training": False}, returns=("grad_x", "grad_norm"))


def conv1x1_gradient_cases() -> Iterator[Case]:
    """As for the forward pass."""
    for case in conv1x1_cases():
        if case.authors_value is None:
            name = "grad_weight" if case.function == "pointwise_conv" else "grad_weights"
            yield _gradient_of(case, returns=("grad_x", name))


def depthwise_gradient_cases() -> Iterator[Case]:
    """As for the forward pass."""
    for case in depthwise_cases():
        yield _gradient_of(case, returns=("grad_x", "grad_weight"))


def separable_gradient_cases() -> Iterator[Case]:
    """As for the forward pass."""
    for case in separable_cases():
        if case.authors_value is None:
            yield _gradient_of(case, returns=("grad_x", "grad_weights"))


def resize_gradient_cases() -> Iterator[Case]:
    """As for the forward pass."""
    for case in resize_cases():
        x, size = case.arguments
        grad_output = np.random.default_rng(15).standard_normal((*x.shape[:2], *size))
        yield Case("bilinear_resize_backward", case.says, (grad_output, x.shape[2:]), {})


def pooling_gradient_cases() -> Iterator[Case]:
    """As for the forward pass."""
    for case in pooling_cases():
        if case.authors_value is None and not case.is_refused:
            yield _gradient_of(case, returns=("grad_x", "grad_weights"))


def project_gradient_cases() -> Iterator[Case]:
    """As for the forward pass."""
    for case in project_cases():
        if case.authors_value is None:
            yield _gradient_of(case, returns=("grad_branches", "grad_weights"))


def loss_gradient_cases() -> Iterator[Case]:
    """As for the forward pass, and the authors' gradient."""
    for says, logits, labels in _losses():
        yield Case("upsampled_cross_entropy_backward", says, (logits, labels), {})
    dump = _authors_loss()
    arguments = (dump.logits, dump.labels)
    yield Case("upsampled_cross_entropy_backward", "loss.npz", arguments, {}, AUTHORS_GRADIENT, dump.grad_logits)


def cell_gradient_cases() -> Iterator[Case]:
    """The small cell in both modes, and the authors' gradients through pyramid pooling."""
    for case in cell_cases():
        if case.function == "dense_prediction_cell" and case.authors_value is None:
            yield _gradient_of(case, returns=("grad_features", "grad_weights"))
    yield _authors_gradient("dpc_train/train_frozenbn_pool_9x13")


def published_cell_cases() -> Iterator[Case]:
    """Output, gradients and running statistics of the authors' training step; statistics of a cell with poolings."""
    _, features, cell, weights, _ = next(_small_cells())
    small = (features, cell, weights)
    yield Case(
        "updated_cell_statistics", "a cell with pooling, rates doubled", small, {"momentum": 0.25, "rate_multiplier": 2}
    )
    name = "dpc_train/train_bn_top1_17x17"
    dump = _dump(name)
    arguments = (dump.features, dump.cell, dump.weights)
    yield Case("dense_prediction_cell", "output", arguments, _options(dump), AUTHORS_OUTPUT, dump.output)
    yield _authors_gradient(name)
    options = _options(dump) | {"momentum": 1.0 - dump.meta["bn_decay"]}
    del options["training"]
    after = _weights_after(dump)
    yield Case("updated_cell_statistics", "decay 0.9997", arguments, options, AUTHORS_STATISTICS, after)


SMALL_CELL = """[{"kernel": 3, "rate": [1, 3], "op": "conv", "input": -1},
 {"grid_size": [2, 4], "op": "pyramid_pooling", "input": 0},
 {"kernel": 1, "op": "conv", "input": -1},
 {"kernel": 3, "rate": [2, 1], "op": "conv", "input": 1},
 {"kernel": 1, "op": "conv", "input": 0}]"""
REFUSED_INPUTS = {  # of branch 3
    "an input that is a later branch": 4,
    "an input that is the branch itself": 3,
    "an input below -1 (there is one map of features, so there are no inputs -2, -3)": -2,
}
OTHER_KERNELS = SMALL_CELL.replace('"kernel": 3', '"kernel": [3, 3]').replace('"kernel": 1', '"kernel": [1, 1]')


def _step(number_of_points: int, minutes: int, anchor: str, functions: str, needs: str, cases: Any) -> Step:
    name = cases.__name__.removesuffix("_cases")
    return Step(
        name, number_of_points, minutes, anchor, tuple(functions.split()), tuple(needs.split()), cache(lambda: list(cases()))
    )


STEPS = (
    _step(6, 25, "batch-norm-and-relu", "batch_norm batch_norm_relu updated_running_statistics", "", batch_norm_cases),
    _step(3, 10, "11-convolution", "pointwise_conv conv1x1", "batch_norm", conv1x1_cases),
    _step(5, 20, "depthwise-with-rates", "depthwise_conv", "", depthwise_cases),
    _step(3, 10, "the-separable-pair", "atrous_separable_conv", "conv1x1 depthwise", separable_cases),
    _step(5, 20, "bilinear-resize", "bilinear_resize", "", resize_cases),
    _step(6, 25, "pyramid-pooling", "pyramid_pooling", "conv1x1 resize", pooling_cases),
    _step(4, 15, "concatenate-and-project", "concat_project", "conv1x1", project_cases),
    _step(6, 25, "the-whole-cell", "read_cell dense_prediction_cell", "separable pooling project", cell_cases),
    _step(5, 20, "the-loss", "upsampled_cross_entropy", "resize", loss_cases),
    _step(5, 20, "the-score", "predicted_labels confusion_matrix mean_iou", "resize", score_cases),
    _step(
        8, 35, "batch-norm-and-relu", "batch_norm_backward batch_norm_relu_backward", "batch_norm", batch_norm_gradient_cases
    ),
    _step(
        4,
        15,
        "11-convolution",
        "pointwise_conv_backward conv1x1_backward",
        "conv1x1 batch_norm_gradient",
        conv1x1_gradient_cases,
    ),
    _step(6, 25, "depthwise-with-rates", "depthwise_conv_backward", "depthwise", depthwise_gradient_cases),
    _step(
        3,
        10,
        "the-separable-pair",
        "atrous_separable_conv_backward",
        "separable conv1x1_gradient depthwise_gradient",
        separable_gradient_cases,
    ),
    _step(4, 10, "bilinear-resize", "bilinear_resize_backward", "resize", resize_gradient_cases),
    _step(
        5,
        20,
        "pyramid-pooling",
        "pyramid_pooling_backward",
        "pooling conv1x1_gradient resize_gradient",
        pooling_gradient_cases,
    ),
    _step(3, 15, "concatenate-and-project", "concat_project_backward", "project conv1x1_gradient", project_gradient_cases),
    _step(5, 20, "the-loss", "upsampled_cross_entropy_backward", "loss resize_gradient", loss_gradient_cases),
    _step(
        7,
        30,
        "the-whole-cell",
        "dense_prediction_cell_backward",
        "cell separable_gradient pooling_gradient project_gradient",
        cell_gradient_cases,
    ),
    _step(7, 20, "the-whole-cell", "updated_cell_statistics", "cell_gradient", published_cell_cases),
)


def closure(step: Step) -> set[str]:
    """The names of a step and of all that it needs, directly or not."""
    by_name = {each.name: each for each in STEPS}
    return {step.name}.union(*(closure(by_name[name]) for name in step.needs))


def _mode(training: bool) -> str:
    return "in training" if training else "in inference"


def _uneven(rng: Generator, shape: tuple[int, ...]) -> Array:
    """Normal, with means and deviations from 0.03 on that differ by channel: there ε matters."""
    deviation = np.geomspace(0.03, 2.0, shape[1])[:, None, None]
    return deviation * (rng.standard_normal(shape) + rng.standard_normal((shape[1], 1, 1)))


def _few_values(x: Array) -> Iterator[tuple[str, Array]]:
    """One value per channel, which has no statistics; and two, which have."""
    yield "one value per channel", x[:1, :, :1, :1]
    yield "two images of 1 x 1", x[:, :, :1, :1]


def _norm(rng: Generator, channels: int) -> BatchNorm[Array]:
    scale = rng.uniform(0.5, 1.5, channels) * np.where(np.arange(channels) % 3 == 2, -1.0, 1.0)
    offset, mean = rng.standard_normal((2, channels)) * 0.4
    return BatchNorm(scale, offset, mean, rng.uniform(0.02, 2.0, channels))


def _conv(rng: Generator, channels: int, out_channels: int) -> ConvNorm[Array]:
    weight = rng.standard_normal((out_channels, channels, 1, 1)) / np.sqrt(channels)
    return ConvNorm(weight, _norm(rng, out_channels))


def _depthwise(rng: Generator, channels: int) -> ConvNorm[Array]:
    return ConvNorm(rng.standard_normal((channels, 1, 3, 3)) / 3.0, _norm(rng, channels))


def _poolings() -> Iterator[tuple[bool, tuple[int, int], tuple[int, int] | None, Array, ConvNorm[Array]]]:
    rng = np.random.default_rng(6)
    x, weights = _uneven(rng, (2, 3, 7, 10)), _conv(rng, 3, 4)
    for training, grid_size, pooling_size in (
        (True, (2, 4), None),
        (False, (2, 4), None),
        (True, (1, 1), None),
        (False, (4, 1), (6, 9)),
    ):
        yield training, grid_size, pooling_size, x, weights


def _pooling_says(training: bool, grid_size: tuple[int, int], pooling_size: tuple[int, int] | None) -> str:
    pinned = "" if pooling_size is None else ", pooling_size {} x {}".format(*pooling_size)
    return f"{_mode(training)}, grid {grid_size[0]} x {grid_size[1]} on 7 x 10{pinned}"


def _projections() -> Iterator[tuple[str, list[Array], ConvNorm[Array], dict[str, Any]]]:
    rng = np.random.default_rng(7)
    branches = [_uneven(rng, (2, 2, 4, 5)) for _ in range(3)]
    weights = _conv(rng, 6, 6)
    keep = rng.random((2, 6, 4, 5)) >= 0.1
    yield "in training, with dropout", branches, weights, {"training": True, "dropout_keep": keep}
    yield "in training, without dropout", branches, weights, {"training": True}
    yield "in inference", branches, weights, {"training": False}
    yield "in inference, with a mask", branches, weights, {"training": False, "dropout_keep": keep}


def _small_cells() -> Iterator[tuple[str, Array, Cell, CellWeights[Array], dict[str, Any]]]:
    rng = np.random.default_rng(8)
    cell = Cell.from_json(SMALL_CELL)
    features = _uneven(rng, (2, 3, 7, 10))
    pairs = [branch.operation == "atrous_separable_conv" for branch in expected.listed(cell)]
    branches = tuple(SeparableConv(_depthwise(rng, 3), _conv(rng, 3, 3)) if pair else _conv(rng, 3, 3) for pair in pairs)
    weights = CellWeights(branches, _conv(rng, 15, 4))
    keep = rng.random((2, 15, 7, 10)) >= 0.1
    training: dict[str, Any] = {"training": True, "rate_multiplier": 2, "dropout_keep": keep}
    yield "in training, rates doubled, with dropout", features, cell, weights, training
    yield "in inference, with a mask", features, cell, weights, {"training": False, "dropout_keep": keep}
    yield "in inference, pooling_size 6 x 9", features, cell, weights, {"training": False, "pooling_size": (6, 9)}


def _losses() -> Iterator[tuple[str, Array, Any]]:
    rng = np.random.default_rng(9)
    logits, labels = 2.0 * rng.standard_normal((2, 4, 3, 4)), rng.integers(0, 4, (2, 10, 12))
    labels[0, :6] = 255
    labels[1, 4, 5:] = 255
    yield "3 x 4 logits for 10 x 12 labels, some ignored", logits, labels
    yield "logits of some 1000", 500.0 * logits, labels
    yield "all labels ignored", logits, np.full_like(labels, 255)


def _gradient_of(case: Case, returns: tuple[str, ...]) -> Case:
    shape = case.evaluated().shape
    grad_output = np.random.default_rng(11).standard_normal(shape)
    return Case(f"{case.function}_backward", case.says, (grad_output, *case.arguments), case.options, returns=returns)


@cache
def _dump(name: str) -> authors.CellDump:
    return authors.load_cell_dump(authors.HERE / f"{name}.npz")


def _options(dump: authors.CellDump) -> dict[str, Any]:
    names = ("training", "rate_multiplier", "pooling_size")
    return {name: getattr(dump.options, name) for name in names}


def _authors_branches(dump: authors.CellDump) -> list[Array]:
    arrays = authors.with_prefix(dump.arrays, "branch/")
    return [authors.nchw(arrays[str(i)]) for i in range(len(dump.cell.branches))]


def _authors_branch(function: str, name: str, i: int) -> Case:
    """One branch of the authors' cell: from their map to their map."""
    dump = _dump(name)
    branches, branch = _authors_branches(dump), dump.cell.branches[i]
    x = dump.features if branch.input_index < 0 else branches[branch.input_index]
    _, size, _ = expected.listed(dump.cell)[i]
    options: dict[str, Any] = {"training": False}
    if function == "atrous_separable_conv":
        options["rate"] = size
    elif function == "pyramid_pooling":
        options |= {"grid_size": size, "pooling_size": dump.options.pooling_size}
    says = f"branch {i} of {name.split('/')[1]}.npz"
    return Case(function, says, (x, dump.weights.branches[i]), options, AUTHORS_OUTPUT, branches[i])


def _authors_gradient(name: str) -> Case:
    dump = _dump(name)
    arguments = (authors.nchw(dump.arrays["cotangent"]), dump.features, dump.cell, dump.weights)
    gradients = authors.cell_weights(authors.with_prefix(dump.arrays, "grad/meta_architecture/"), dump.cell)
    value = (authors.nchw(dump.arrays["grad_features"]), gradients)
    returns = ("grad_features", "grad_weights")
    says = f"{name.split('/')[1]}.npz"
    return Case("dense_prediction_cell_backward", says, arguments, _options(dump), AUTHORS_GRADIENT, value, returns)


def _weights_after(dump: authors.CellDump) -> CellWeights[Array]:
    """The authors' weights with the running statistics after their training step."""
    scope = "meta_architecture/"
    variables = authors.with_prefix(dump.arrays, f"var/{scope}") | authors.with_prefix(
        dump.arrays, f"var_after_update/{scope}"
    )
    return authors.cell_weights(variables, dump.cell)


def _authors_loss() -> authors.LossDump:
    dump = authors.load_loss_dump(authors.HERE / "train_facts" / "loss.npz", "plain")
    return dump._replace(labels=dump.labels.astype(np.int64))  # the file has bytes
