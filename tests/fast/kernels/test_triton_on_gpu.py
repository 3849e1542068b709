"""What only a GPU can show: error budgets at real sizes in each dtype, equal bits in ten runs, capture in a CUDA graph."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fast import kernels
from fast.decoder import Decoder
from fast.dense_prediction_cell import DensePredictionCell
from fast.depth_metrics import depth_totals
from fast.kernels import Dropout, Folded, NormedMap
from fast.segmentation import SegmentationHead
from fast.upsampled_cross_entropy import upsampled_cross_entropy
from fast.upsampled_l1 import upsampled_l1
from reference.batch_norm import EPS, Array, BatchNorm
from reference.cell import BACKBONE_FEATURE, AtrousSeparableConv, Branch, Cell, Conv1x1, PyramidPooling
from reference.pyramid_pooling import PoolingVariant
from search.dense_tasks.segmentation import Segmentation
from tests.fast.error_budget import assert_within_budget

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from fast.kernels import triton as triton_backend

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(8, 256, 49, 49), (3, 72, 37, 53), (2, 19, 5, 101)]  # N, C, H, W
OUT_CHANNELS = 136
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_size = pytest.mark.parametrize("size", SIZES, ids=str)


class Layer:
    """Depthwise, norm, ReLU, dropout, pointwise of one map: the weights, and one training step by kernels or by PyTorch."""

    def __init__(self, size: tuple[int, int, int, int], dtype: torch.dtype, seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        channels = size[1]

        def draw(*shape: int, like: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(shape, generator=generator, device="cuda").to(like)

        self.x = draw(*size, like=dtype).contiguous(memory_format=torch.channels_last)
        self.depthwise, self.pointwise = draw(channels, 1, 3, 3) / 3, draw(OUT_CHANNELS, channels, 1, 1) / channels**0.5
        self.gamma, self.beta = draw(channels), draw(channels)
        grad = draw(size[0], OUT_CHANNELS, *size[2:], like=dtype)
        self.grad = grad.contiguous(memory_format=torch.channels_last)
        self.rate, self.count = (3, 6), self.x[:, 0].numel()

    def by_kernels(self, dropout: Dropout | None = None) -> list[Tensor]:
        """Output, gradients of x, both weights, γ and β, and the running statistics."""
        running = BatchNorm(self.gamma, self.beta, torch.zeros_like(self.gamma), torch.ones_like(self.gamma))
        x = NormedMap(self.x)
        raw, moments = triton_backend.depthwise_forward(x, self.depthwise, self.rate, statistics=True)
        assert moments is not None
        folded: Folded = triton_backend.fold(moments, running, count=self.count, momentum=0.1, eps=EPS)
        middle = NormedMap(raw, folded.scale, folded.offset)
        out, _ = triton_backend.pointwise_forward([middle], self.pointwise, dropout, statistics=False)
        (grad_middle,), grad_pointwise = triton_backend.pointwise_backward(
            self.grad, out, None, [middle], self.pointwise, dropout, need_input=[True]
        )
        assert grad_middle is not None
        assert grad_middle.scale is not None
        assert grad_middle.offset is not None
        unfolded = triton_backend.unfold(grad_middle.scale, grad_middle.offset, folded, self.gamma, count=self.count)
        grad_x, grad_depthwise = triton_backend.depthwise_backward(
            grad_middle.raw, raw, unfolded, x, self.depthwise, self.rate, need_input=True
        )
        assert grad_x is not None
        gradients = [grad_x.raw, grad_depthwise, grad_pointwise, unfolded.gamma, unfolded.beta]
        return [out, *gradients, running.running_mean, running.running_var]

    def by_pytorch(self, dtype: torch.dtype) -> list[Tensor]:
        """The same in `dtype`; in float64 the truth, with the same inputs."""
        tensors = (self.x, self.depthwise, self.pointwise)
        x, depthwise, pointwise = (tensor.to(dtype).detach().requires_grad_() for tensor in tensors)
        norm_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        gamma, beta = (tensor.to(norm_dtype).detach().requires_grad_() for tensor in (self.gamma, self.beta))
        mean, var = torch.zeros_like(gamma), torch.ones_like(gamma)
        raw = F.conv2d(x, depthwise, padding=self.rate, dilation=self.rate, groups=x.shape[1])
        out = F.conv2d(F.relu(F.batch_norm(raw, mean.detach(), var.detach(), gamma, beta, True, 0.1, EPS)), pointwise)
        out.backward(self.grad.to(dtype))  # type: ignore[no-untyped-call]
        gradients = [leaf.grad for leaf in (x, depthwise, pointwise, gamma, beta)]
        assert all(gradient is not None for gradient in gradients)
        return [out, *(gradient for gradient in gradients if gradient is not None), mean.detach(), var.detach()]


@every_dtype
@every_size
def test_separable_step_is_within_budget(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert_budget_over_draws(
        lambda seed: Layer(size, dtype, seed),
        lambda layer: layer.by_kernels(),
        lambda layer, precision: layer.by_pytorch(precision),
        dtype,
    )


@every_dtype
def test_tiles_of_large_maps_are_within_budget(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second column of the launch table, on a map of which the truth takes no minutes."""
    monkeypatch.setattr(triton_backend, "LARGE", 1)
    test_separable_step_is_within_budget(SIZES[0], dtype)


@every_size
def test_tf32_is_within_tf32_budget(size: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where TF32 is allowed, both use it; and then an error is a thousand times as large."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    test_separable_step_is_within_budget(size, torch.float32)
    layer = Layer(size, torch.float32, 0)
    errors = [arrays_error(layer.by_kernels()[0], layer.by_pytorch(torch.float64)[0])]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    errors.append(arrays_error(layer.by_kernels()[0], layer.by_pytorch(torch.float64)[0]))
    assert errors[0] > 30 * errors[1]


def arrays_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).double().square().mean().sqrt() / expected.abs().max())


@every_dtype
def test_separable_inference_is_within_budget(dtype: torch.dtype) -> None:
    def fused(layer: Layer) -> list[Tensor]:
        numbers = torch.ones(OUT_CHANNELS, device="cuda"), torch.zeros(OUT_CHANNELS, device="cuda")
        norms = (layer.gamma, layer.beta), numbers
        raw, _ = triton_backend.depthwise_forward(NormedMap(layer.x), layer.depthwise, layer.rate, statistics=False)
        return [triton_backend.pointwise_inference([NormedMap(raw, *norms[0])], layer.pointwise, norms[1])]

    def plain(layer: Layer, precision: torch.dtype) -> list[Tensor]:
        x, depthwise, pointwise = (tensor.to(precision) for tensor in (layer.x, layer.depthwise, layer.pointwise))
        gamma, beta = (tensor.to(precision)[:, None, None] for tensor in (layer.gamma, layer.beta))
        raw = F.conv2d(x, depthwise, padding=layer.rate, dilation=layer.rate, groups=x.shape[1])
        return [F.relu(F.conv2d(F.relu(gamma * raw + beta), pointwise))]

    for size in SIZES:
        assert_budget_over_draws(lambda seed, size=size: Layer(size, dtype, seed), fused, plain, dtype)  # type: ignore[misc]


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("lead", [0.0, 40.0])  # of a class in every third row: then pixels between are computed one by one
@pytest.mark.parametrize(
    ("classes", "size", "label_size", "align_corners"),
    [(19, (49, 49), (769, 769), True), (150, (33, 17), (100, 333), True), (19, (32, 32), (512, 512), False)],
)
def test_loss_is_within_budget(
    classes: int, size: tuple[int, int], label_size: tuple[int, int], align_corners: bool, lead: float, weighted: bool
) -> None:
    weights = torch.arange(classes, device="cuda") % 7 / 4 if weighted else None

    def draw(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator("cuda").manual_seed(seed)
        logits = 3.0 * torch.randn(4, classes, *size, generator=generator, device="cuda")
        logits[:, 0, ::3] += lead
        labels = torch.randint(classes + 1, (4, *label_size), generator=generator, device="cuda")
        return logits, labels.where(labels < classes, 255).to(torch.uint8)

    def plain(drawn: tuple[Tensor, Tensor], dtype: torch.dtype) -> list[Tensor]:
        logits = drawn[0].to(dtype).requires_grad_()
        upsampled = F.interpolate(logits, label_size, mode="bilinear", align_corners=align_corners)
        of_classes = None if weights is None else weights.to(dtype)
        loss = F.cross_entropy(upsampled, drawn[1].long(), of_classes, ignore_index=255, reduction="sum")
        loss = loss / (drawn[1] != 255).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        assert logits.grad is not None
        return [loss, logits.grad]

    def ours(drawn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return triton_backend.upsampled_cross_entropy(*drawn, 255, weights, align_corners)

    assert_budget_over_draws(draw, ours, plain, torch.float32)


@pytest.mark.parametrize(("size", "label_size", "align_corners"), [(49, 769, True), (48, 768, False)])
def test_confusion_matrix_counts_every_pixel(size: int, label_size: int, align_corners: bool) -> None:
    """Predictions may differ where two classes are equal up to rounding: of 2.4 million random pixels, by far below 100."""
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(4, 19, size, size, generator=generator, device="cuda")
    labels = torch.randint(19, (4, label_size, label_size), generator=generator, device="cuda").to(torch.uint8)
    wide = F.interpolate(logits.double(), (label_size, label_size), mode="bilinear", align_corners=align_corners)
    predictions = wide.argmax(dim=1)
    expected = torch.bincount((labels.long() * 19 + predictions).ravel(), minlength=361).view(19, 19)
    actual = triton_backend.upsampled_confusion_matrix(logits, labels, 255, align_corners)
    assert actual.sum() == labels.numel()
    assert (actual - expected).abs().sum() <= 100


@every_dtype
def test_ten_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    layer, dropout = Layer(SIZES[0], dtype, 0), Dropout(0.1, torch.tensor([7], device="cuda"))
    logits = torch.randn(8, 19, 49, 49, device="cuda")
    labels = torch.randint(19, (8, 769, 769), device="cuda").to(torch.uint8)
    runs = [[*layer.by_kernels(dropout), *triton_backend.upsampled_cross_entropy(logits, labels, 255)] for _ in range(10)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("pooling", ["sliding_window", "grid_cells"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_cell_with_every_kind_of_branch_trains_to_the_same_bits(precision: str, pooling: PoolingVariant) -> None:
    """Pooling, whose resize PyTorch differentiates by atomics, 1×1 and separable convolutions; three steps of two runs."""
    cell = Cell(
        (
            Branch(BACKBONE_FEATURE, PyramidPooling(grid_size=(2, 4))),
            Branch(BACKBONE_FEATURE, Conv1x1()),
            Branch(0, AtrousSeparableConv(rate=(3, 6))),
            Branch(2, PyramidPooling(grid_size=(1, 1))),
        )
    )
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        context = DensePredictionCell(cell, 40, branch_channels=24, cell_channels=24, pooling=pooling)
        head = SegmentationHead(context, 5).cuda().train()
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
        features = torch.randn(2, 40, 17, 19, device="cuda")
        labels = torch.randint(5, (2, 257, 289), device="cuda").to(torch.uint8)
        for _ in range(3):
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
                logits = head(features)
            optimizer.zero_grad()
            upsampled_cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        states.append(head.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_decoder_has_the_same_gradients_at_every_run() -> None:
    torch.manual_seed(0)
    decoder = Decoder(24, channels=32, projected_channels=16).cuda().train()
    context, low_level = torch.randn(2, 32, 17, 19, device="cuda"), torch.randn(2, 24, 65, 73, device="cuda")
    context.requires_grad_()
    gradients = [torch.autograd.grad(decoder(context, low_level).square().sum(), context)[0] for _ in range(10)]
    assert all(torch.equal(gradients[0], gradient) for gradient in gradients)


@every_dtype
def test_captured_step_equals_the_step(dtype: torch.dtype) -> None:
    """Forward and backward in one CUDA graph; a new seed on the device gives a new mask at the next replay."""
    layer, seed = Layer(SIZES[1], dtype, 0), torch.tensor([7], device="cuda")
    dropout = Dropout(0.1, seed)
    expected = layer.by_kernels(dropout)  # compiles, too
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer.by_kernels(dropout)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(expected, captured, strict=True))
    seed.fill_(8)
    graph.replay()
    assert not torch.equal(expected[0], captured[0])


def test_captured_depth_loss_and_totals_equal_the_step() -> None:
    """Forward and backward in one CUDA graph, with pixels that were not measured; each replay has the same bits."""
    generator = torch.Generator("cuda").manual_seed(0)
    outputs = torch.randn(4, 1, 33, 41, generator=generator, device="cuda", requires_grad=True)
    targets, predictions = torch.randn(2, 4, 129, 161, generator=generator, device="cuda")
    targets[:, ::3] = torch.nan

    def step() -> list[Tensor]:
        loss = upsampled_l1(outputs, targets)
        return [loss.detach(), *torch.autograd.grad(loss, outputs), depth_totals(predictions.exp(), targets.exp())]

    expected = step()  # makes the matrices, too
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(10):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(expected, captured, strict=True))


def test_captured_loss_with_class_weights_equals_the_step() -> None:
    """The weights come from the host once, at the first call: in a capture they could not."""
    task = Segmentation(("a", "b", "c")).weighted((0.0, 1.0, 4.0))
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(4, 3, 33, 41, generator=generator, device="cuda", requires_grad=True)
    labels = torch.randint(3, (4, 513, 641), generator=generator, device="cuda").to(torch.uint8)

    def step() -> list[Tensor]:
        loss = task.loss(logits, labels)
        return [loss.detach(), *torch.autograd.grad(loss, logits)]

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(10):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(expected, captured, strict=True))


def test_backend_is_chosen_for_the_device() -> None:
    for dtype in DTYPES:
        assert kernels.backend_for(torch.zeros(1, device="cuda", dtype=dtype)) is triton_backend
    assert kernels.backend_for(torch.zeros(1, device="cuda", dtype=torch.float64)) is None


def assert_budget_over_draws(
    draw: Callable[[int], Any],
    fast: Callable[[Any], Sequence[Tensor]],
    plain: Callable[[Any, torch.dtype], Sequence[Tensor]],
    dtype: torch.dtype,
) -> None:
    """Each result's median error over nine draws, against PyTorch's own in the same dtype."""
    drawn = [draw(seed) for seed in range(9)]
    actual, expected, yardstick = [], [], []
    for case in drawn:
        actual.append(list(arrays(fast(case))))
        expected.append(list(arrays(plain(case, torch.float64))))
        yardstick.append(list(arrays(plain(case, dtype))))
    for actual_part, expected_part, yardstick_part in zip(
        *(zip(*parts, strict=True) for parts in (actual, expected, yardstick)), strict=True
    ):
        assert_within_budget(actual_part, expected_part, yardstick_part, dtype)


def arrays(tensors: Sequence[Tensor]) -> Iterator[Array]:
    for tensor in tensors:
        yield np.asarray(tensor.detach().cpu().double().numpy())
