"""What the CPU kernels promise beyond the mathematics, to which `tests/fast` holds them in float64 like everything else."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fast.kernels
from fast.atrous_separable_conv import depthwise_conv
from fast.dense_prediction_cell import DensePredictionCell
from fast.kernels import Dropout, NormedMap, Unfolded, backend_for, cpp, using
from fast.kernels.cpp import build
from fast.mean_iou import upsampled_confusion_matrix
from fast.pointwise_conv import pointwise_conv
from fast.segmentation import SegmentationHead
from fast.upsampled_cross_entropy import upsampled_cross_entropy
from reference.cell import Cell
from search.cells.space import load_cell
from tests.fast.error_budget import assert_within_budget

pytestmark = pytest.mark.skipif(cpp.supports(torch.ones(1)) is not None, reason="no C++ compiler")

EVERY_KIND = Cell.from_json(
    '[{"op": "conv", "kernel": 3, "rate": [6, 21], "input": -1}, {"op": "conv", "kernel": 3, "rate": [1, 1], "input": 0},'
    ' {"op": "conv", "kernel": 1, "input": 1}, {"op": "pyramid_pooling", "grid_size": [2, 4], "input": 0},'
    ' {"op": "pyramid_pooling", "grid_size": [1, 1], "input": -1}]'
)


def make_head(cell: Cell = EVERY_KIND, in_channels: int = 20, channels: int = 36) -> SegmentationHead:
    """Channel counts that are no multiple of a tile's."""
    torch.manual_seed(0)
    context = DensePredictionCell(cell, in_channels, branch_channels=channels, cell_channels=channels, dropout_rate=0.0)
    head = SegmentationHead(context, 7)
    torch.nn.init.normal_(head.classifier.weight, std=0.3)
    return head.train()


def training_step(head: SegmentationHead, features: Tensor, labels: Tensor) -> list[Tensor]:
    """Loss, gradients and statistics, with fresh gradients."""
    head.zero_grad()
    features = features.clone().requires_grad_()
    loss = upsampled_cross_entropy(head(features), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in head.parameters() if p.grad is not None]
    assert features.grad is not None
    return [loss.detach(), features.grad, *gradients, *(buffer.clone() for buffer in head.buffers())]


def random_batch(seed: int = 0, size: tuple[int, int] = (25, 31), in_channels: int = 20) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    features = torch.from_numpy(rng.standard_normal((2, in_channels, *size), dtype=np.float32))
    labels = rng.choice([*range(7), 255], (2, 4 * size[0] - 3, 4 * size[1] - 3)).astype(np.uint8)
    return features, torch.from_numpy(labels)


@pytest.mark.parametrize("cell", [EVERY_KIND, load_cell("dpc"), load_cell("aspp")], ids=["every kind", "dpc", "aspp"])
def test_float32_is_within_budget(cell: Cell) -> None:
    """A whole training step against float64, with plain PyTorch in float32 as the yardstick; sizes that fill no tile."""
    actual, expected, yardstick = [], [], []
    for seed in range(3):
        features, labels = random_batch(seed)
        actual.append(joined(training_step(make_head(cell), features, labels)))
        with using(None):
            yardstick.append(joined(training_step(make_head(cell), features, labels)))
            expected.append(joined(training_step(make_head(cell).double(), features.double(), labels)))
    for part in range(len(expected[0])):
        assert_within_budget(
            [step[part] for step in actual],
            [step[part] for step in expected],
            [step[part] for step in yardstick],
            torch.float32,
        )


def test_bfloat16_products_are_within_budget() -> None:
    """Under autocast only the products are rounded: no worse than PyTorch's own autocast, which rounds maps too."""
    features, labels = random_batch()
    with torch.autocast("cpu", torch.bfloat16):
        actual = joined(training_step(make_head(), features, labels))
        with using(None):
            yardstick = joined(training_step(make_head(), features, labels))
    with using(None):
        expected = joined(training_step(make_head().double(), features.double(), labels))
    for part in range(len(expected)):
        assert_within_budget([actual[part]], [expected[part]], [yardstick[part]], torch.bfloat16)


def test_results_are_the_same_on_any_number_of_threads() -> None:
    """Bit for bit, and at every call: no sum depends on who takes which task."""
    features, labels = random_batch()
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            runs.append(training_step(make_head(), features, labels))
    finally:
        torch.set_num_threads(before)
    # Small vectors of C values are PyTorch's own work; at this size it does not share it among threads.
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_no_output_is_left_unwritten(poisoned_memory: None) -> None:
    assert all(torch.isfinite(tensor).all() for tensor in training_step(make_head(), *random_batch()))
    logits = make_head().eval()(random_batch()[0])
    assert torch.isfinite(logits).all()
    assert torch.isnan(torch.empty(3)).all()  # the poison works


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New memory is NaN, as PyTorch can be told."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_nan_is_not_hidden() -> None:
    """A ReLU written as max(x, 0) would turn NaN into 0, and a diverged training into a fair score."""
    features, labels = random_batch()
    features[0, 3, 2, 2] = torch.nan
    loss, *_ = training_step(make_head(), features, labels)
    assert torch.isnan(loss)
    x = NormedMap(torch.tensor([torch.nan, -1.0, 1.0]).view(1, 1, 1, 3), torch.ones(1), torch.zeros(1))
    assert torch.equal(cpp.normalise(x).isnan().flatten(), torch.tensor([True, False, False]))


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e5])
def test_variance_survives_a_large_mean(mean: float) -> None:
    """E[x²] - E[x]² has lost every digit at a mean of 1e4; deviations from a neighbour lose none but the input's own."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy((mean + rng.standard_normal((3, 20, 17, 19))).astype(np.float32))
    centre = torch.zeros(20, 1, 3, 3)
    centre[:, :, 1, 1] = 1.0
    identity = torch.eye(20)[:, :, None, None]
    for _, moments in (
        cpp.depthwise_forward(NormedMap(x), centre, (1, 1), statistics=True),
        cpp.pointwise_forward([NormedMap(x)], identity, None, statistics=True),
    ):
        expected = x.double().var(dim=(0, 2, 3), correction=0)
        assert torch.allclose(moments.var.double(), expected, rtol=1e-4, atol=0)  # sums of 323 float32 deviations
        assert torch.allclose(moments.mean.double(), x.double().mean(dim=(0, 2, 3)), rtol=1e-6, atol=1e-6)


def test_rates_beyond_the_map_leave_the_centre() -> None:
    x = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(3, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    output, _ = cpp.depthwise_forward(NormedMap(x), weight, (10**6, 10**6), statistics=False)
    assert torch.allclose(output, x * weight[:, 0, 1, 1, None, None], rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("function", [upsampled_cross_entropy, upsampled_confusion_matrix])
def test_foreign_labels_are_refused(function: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    labels = torch.zeros(2, 9, 9, dtype=dtype)
    labels[1, 8, 8] = 200
    with pytest.raises(ValueError, match=r"labels must be 0 to 3, or 255 to be ignored, got \[200\]"):
        function(torch.zeros(2, 4, 3, 3), labels)


def test_empty_batches_are_the_librarys() -> None:
    head = make_head().eval()
    assert backend_for(torch.zeros(0, 3, 5, 5)) is None
    assert head(torch.zeros(0, 20, 5, 5)).shape == (0, 7, 5, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(3, 1, 3, 3, dtype=torch.float64)}, "tensors must share dtype and device"),
        ({"scale": torch.ones(3, dtype=torch.float64)}, "tensors must share dtype and device"),
        ({"raw": torch.ones(2, 3, 4, 4).transpose(2, 3)[:, :, ::2]}, "kernels need contiguous tensors"),
    ],
)
def test_what_a_kernel_cannot_read_is_refused(change: dict[str, Tensor], message: str) -> None:
    given: dict[str, Any] = {"raw": torch.ones(2, 3, 4, 4), "scale": torch.ones(3), "weight": torch.ones(3, 1, 3, 3)} | change
    x = NormedMap(given["raw"], given["scale"], torch.zeros(3))
    with pytest.raises(ValueError, match=message):
        cpp.depthwise_forward(x, given["weight"], (1, 1), statistics=True)


@pytest.mark.parametrize("shape", [(4, 6, 1, 1), (4, 8, 3, 3), (8, 4)])
def test_weights_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    for training in (False, True):
        with torch.set_grad_enabled(training), pytest.raises(ValueError, match="does not fit the weight"):
            pointwise_conv(torch.ones(2, 8, 5, 5), torch.ones(shape))
    with pytest.raises(ValueError, match="does not fit the weight"):
        depthwise_conv(torch.ones(2, 8, 5, 5), torch.ones(4, 1, 3, 3), rate=(1, 1))
    with pytest.raises(ValueError, match="does not fit the weight"):
        depthwise_conv(torch.ones(2, 8, 5, 5), torch.ones(8, 1, 3, 3), rate=(1, -1))


@pytest.mark.parametrize("function", [upsampled_cross_entropy, upsampled_confusion_matrix])
@pytest.mark.parametrize("shape", [(2, 1, 13, 13), (1, 13, 13), (13, 13)])
def test_labels_of_another_shape_are_refused(function: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="on one device are needed"):
        function(torch.zeros(2, 3, 4, 4), torch.zeros(shape, dtype=torch.uint8))


def test_variance_survives_an_outlier_in_the_first_place() -> None:
    x = torch.randn(1, 2, 300, 300, generator=torch.Generator().manual_seed(0))
    x[:, :, 0, 0] = 1e4
    centre = torch.zeros(2, 1, 3, 3)
    centre[:, :, 1, 1] = 1.0
    _, moments = cpp.depthwise_forward(NormedMap(x), centre, (1, 1), statistics=True)
    assert torch.allclose(moments.var.double(), x.double().var(dim=(0, 2, 3), correction=0), rtol=1e-3)  # float32 sums


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "library"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nan_under_ignored_labels_is_as_pytorchs(dtype: torch.dtype, kernels: bool, align_corners: bool) -> None:
    """The loss is that of the labelled pixels, the gradient NaN: cross_entropy(ignore_index) does the same.

    The library's operations upsample by dense products, which spread the NaN over the image: the loss is NaN as well.
    """
    logits = torch.randn(2, 5, 6, 7, dtype=dtype, generator=torch.Generator().manual_seed(0))
    logits[1, 2, 1, 2] = torch.nan
    labels = torch.randint(0, 5, (2, 21, 25), generator=torch.Generator().manual_seed(1))
    labels[1, :12, :16] = 255  # every pixel that reads the NaN
    results = []
    for loss_of in (upsampled_cross_entropy, plain_upsampled_cross_entropy):
        given = logits.clone().requires_grad_()
        with using(cpp if kernels else None):
            loss = loss_of(given, labels, align_corners=align_corners)
        loss.backward()  # type: ignore[no-untyped-call]
        assert given.grad is not None
        results.append((loss.item(), given.grad))
    (actual, grad), (expected, expected_grad) = results
    # float32 sums of 800 pixels
    assert actual == pytest.approx(expected if kernels else torch.nan, rel=1e-6, nan_ok=not kernels)
    assert torch.isnan(grad[1, 2, 1, 2])
    assert torch.isnan(expected_grad[1, 2, 1, 2])
    assert torch.isfinite(grad[0]).all()


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_loss_where_neighbouring_logits_are_far_apart(scale: float, align_corners: bool) -> None:
    """Between two rows that prefer other classes by far, all logits lie far below a straight line through the largest."""
    logits = scale * torch.randn(2, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    size = (21, 25) if align_corners else (24, 28)  # positions in quarters, or in eighths, which float32 holds exactly
    labels = torch.randint(0, 5, (2, *size), generator=torch.Generator().manual_seed(1))
    assert_loss_within_budget(logits, labels, align_corners)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("rise", [10.0, 100.0, 4000.0])
def test_loss_where_one_class_rises_from_far_below_to_level_with_another(rise: float, align_corners: bool) -> None:
    """Beyond 87 its power at the upper row is less than a float holds: the rows below must not grow from what it became."""
    logits = torch.zeros(1, 2, 2, 3)
    logits[0, 1, 0] = -rise
    assert_loss_within_budget(logits, torch.zeros(1, 8, 9, dtype=torch.uint8), align_corners)


def assert_loss_within_budget(logits: Tensor, labels: Tensor, align_corners: bool) -> None:
    results = []
    for given, backend in ((logits, cpp), (logits.double(), None), (logits, None)):
        leaf = given.clone().requires_grad_()
        with using(backend):
            loss = upsampled_cross_entropy(leaf, labels, align_corners=align_corners)
        loss.backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        results.append(joined([loss.detach(), leaf.grad]))
    for actual, expected, yardstick in zip(*results, strict=True):
        assert_within_budget([actual], [expected], [yardstick], torch.float32)


def plain_upsampled_cross_entropy(logits: Tensor, labels: Tensor, *, align_corners: bool) -> Tensor:
    wide = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=align_corners)
    return F.cross_entropy(wide, labels, ignore_index=255)


def test_images_of_a_large_batch_share_parts_of_the_weight_gradient() -> None:
    """A part is as large as the weight, so beyond 32 images several add to one."""
    x, grad = (torch.randn(40, 16, 2, 2, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    weight = torch.ones(16, 16, 1, 1)
    _, grad_weight = cpp.pointwise_backward(grad, grad, None, [NormedMap(x)], weight, None, need_input=[False])
    expected = torch.einsum("nohw,nchw->oc", grad.double(), x.double())
    assert torch.allclose(grad_weight[:, :, 0, 0].double(), expected, atol=1e-4)  # 160 products of order 1 in float32


def test_transforms_of_functions_use_the_library() -> None:
    x, weight = torch.randn(1, 3, 4, 4), torch.randn(2, 3, 1, 1)
    gradient = torch.func.grad(lambda w: pointwise_conv(x, w).square().sum())(weight)
    assert gradient.shape == weight.shape


def test_float64_is_left_alone_by_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert pointwise_conv(torch.ones(1, 3, 4, 4).double(), torch.ones(2, 3, 1, 1).double()).dtype == torch.float64


def test_dropped_elements_get_no_gradient() -> None:
    dropout = Dropout(0.5, torch.tensor([7]))
    maps = [NormedMap(torch.ones(2, 3, 5, 6)) for _ in range(2)]
    identity = torch.eye(6)[:, :, None, None]
    output, _ = cpp.pointwise_forward(maps, identity, dropout, statistics=False)
    unfolded: Unfolded | None = None
    ones = torch.ones_like(output)
    grads, _ = cpp.pointwise_backward(ones, output, unfolded, maps, identity, dropout, need_input=[True, True])
    gradient = torch.cat([g.raw for g in grads if g is not None], dim=1)
    assert torch.equal(gradient, output)  # both are keep / (1 - rate)


# Where the kernels come from


def test_compiled_once_per_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = build.compiled("c++")
    assert list((tmp_path / "dense-prediction-cell").iterdir()) == [library]
    monkeypatch.setattr(build, "compile_to", lambda *arguments: pytest.fail("compiled again"))
    assert build.compiled("c++") == library


@pytest.mark.parametrize(
    ("refused", "kept"),
    [("-fopenmp", ["-march=native", "-ffp-contract=fast"]), ("-march=native", ["-fopenmp"]), ("-fopenmp|-march=native", [])],
)
def test_a_flag_that_the_compiler_lacks_costs_no_other(tmp_path: Path, refused: str, kept: list[str]) -> None:
    """A compiler that refuses a flag, and otherwise writes its arguments to the library's place."""
    compiler, library = tmp_path / "compiler", tmp_path / "cpu.so"
    compiler.write_text(
        f'#!/bin/sh\nfor flag; do case "$flag" in {refused}) exit 1;; esac; done\necho "$@" > {library}\n', encoding="utf-8"
    )
    compiler.chmod(0o755)
    missing = [flag for flag in ("-march=native", "-ffp-contract=fast", "-fopenmp") if flag not in kept]
    with pytest.warns(UserWarning, match=f"only without {' '.join(missing)}: they are slower"):
        build.compile_to(library, str(compiler))
    given = library.read_text(encoding="utf-8").split()
    assert [flag for flag in given if flag in ("-march=native", "-ffp-contract=fast", "-fopenmp")] == kept


@pytest.mark.parametrize(
    ("environment", "warning"),
    [
        ({"PATH": "/nowhere"}, "no C++ compiler found (install g++, or set CXX)"),
        ({"CXX": "false"}, "the C++ kernels do not work here"),
        ({"CXX": "/no/such/compiler"}, "the C++ kernels do not work here"),
    ],
)
def test_without_a_compiler_all_works_and_one_warning_says_so(
    tmp_path: Path, environment: dict[str, str], warning: str
) -> None:
    program = (
        "import torch; from fast import DensePredictionCell; from search.cells.space import load_cell\n"
        "cell = DensePredictionCell(load_cell('dpc'), 4, branch_channels=8, cell_channels=8).train()\n"
        "for _ in range(3): cell(torch.randn(2, 4, 5, 5)).sum().backward()\n"
        "print('trained')"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={"PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)} | environment,
        cwd=Path(fast.kernels.__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.stdout == "trained\n", run.stderr
    assert run.stderr.count(warning) == 1
    assert run.stderr.count("Warning") == 1


def joined(tensors: list[Tensor]) -> list[np.typing.NDArray[np.float64]]:
    """The loss, and all else as one vector."""
    arrays = [tensor.double().numpy().ravel() for tensor in tensors]
    return [arrays[0], np.concatenate(arrays[1:])]
