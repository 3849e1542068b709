"""What PyTorch makes of a cell ahead of time computes the same, and nothing needs a GPU's tools at import."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fast
from fast import DensePredictionCell, checkpoint, explain, mean_iou, upsampled_cross_entropy
from fast.bilinear_resize import bilinear_resize
from reference.cell import BACKBONE_FEATURE, AtrousSeparableConv, Branch, Cell, Conv1x1, PyramidPooling
from tests.fast.test_fusion import needs_kernels, network

ROOT = Path(__file__).parents[2]
CELL = Cell(
    (
        Branch(BACKBONE_FEATURE, AtrousSeparableConv(rate=(6, 3))),
        Branch(0, PyramidPooling(grid_size=(2, 4))),
        Branch(BACKBONE_FEATURE, Conv1x1()),
    )
)
ROUNDING = 1e-5  # float32 through a few convolutions, values of order 1; a compiler may fuse and reorder


def build(dropout_rate: float = 0.0) -> DensePredictionCell:
    torch.manual_seed(0)
    return DensePredictionCell(CELL, 3, branch_channels=4, cell_channels=5, dropout_rate=dropout_rate)


def train_step(module: DensePredictionCell, features: Tensor, backend: str | None = None) -> list[Tensor]:
    """Output, gradients and all state after one step, which holds the running statistics."""
    features = features.clone().requires_grad_()
    output = (torch.compile(module, backend=backend, fullgraph=True) if backend else module)(features)
    output.square().sum().backward()
    assert features.grad is not None
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    assert len(gradients) == len(list(module.parameters()))
    return [output.detach(), features.grad, *gradients, *module.buffers()]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert torch.allclose(a, e, rtol=0, atol=ROUNDING * max(1.0, e.abs().max().item()))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_step_is_the_same(backend: str) -> None:
    torch._dynamo.reset()
    features = torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(0))
    assert_same(train_step(build(), features, backend), train_step(build(), features))


@needs_kernels
def test_beside_a_compiled_backbone_the_cell_keeps_its_kernels() -> None:
    torch._dynamo.reset()
    model, images = network().eval(), torch.randn(1, 3, 65, 49, generator=torch.Generator().manual_seed(0))
    expected, names, seen = model(images), list(model.state_dict()), []
    model.backbone.compile(backend="aot_eager")
    model.head.register_forward_pre_hook(lambda head, inputs: seen.append(explain(head, inputs[0])))
    assert torch.allclose(model(images), expected, rtol=0, atol=ROUNDING)
    assert seen == ["fused, on C++ kernels"]
    assert list(model.state_dict()) == names


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # of a constant matrix
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.0, 2.0, 0.5])], ids=["", "weighted"])
def test_a_compiled_loss_has_its_gradient(weights: torch.Tensor | None, align_corners: bool) -> None:
    torch._dynamo.reset()
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.ones(2, 49, 49, dtype=torch.int64)
    gradients = []
    eager = upsampled_cross_entropy.upsampled_cross_entropy
    for loss in (eager, torch.compile(eager, backend="aot_eager", fullgraph=True)):
        x = logits.clone().requires_grad_()
        loss(x, labels, class_weights=weights, align_corners=align_corners).backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        gradients.append(x.grad)
    assert torch.allclose(gradients[0], gradients[1], rtol=0, atol=ROUNDING)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # of a constant matrix
@pytest.mark.parametrize("align_corners", [True, False])
def test_exported_resizes_and_scores_are_the_same(align_corners: bool) -> None:
    class Counts(nn.Module):
        def forward(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            confusion = mean_iou.upsampled_confusion_matrix(logits, labels, align_corners=align_corners)
            return bilinear_resize(logits, (19, 23), align_corners=align_corners), confusion

    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(3, (2, 32, 40), generator=torch.Generator().manual_seed(1))
    program = torch.export.export(Counts(), (logits, labels))
    for actual, expected in zip(program.module()(logits, labels), Counts()(logits, labels), strict=True):
        assert torch.allclose(actual.float(), expected.float(), rtol=0, atol=ROUNDING)


def test_compiled_dropout_draws_afresh() -> None:
    torch._dynamo.reset()
    cell = build(dropout_rate=0.5).train()
    compiled = torch.compile(cell, backend="aot_eager", fullgraph=True)
    features = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(compiled(features), compiled(features))


@pytest.mark.parametrize("training", [False, True])
def test_exported_program_is_the_same(training: bool) -> None:
    features = torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(build().train(training), (features,))
    assert torch.allclose(program.module()(features), build().train(training)(features), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("cell", [Cell(()), Cell((Branch(-2, Conv1x1()), *CELL.branches[:1]))], ids=["no branches", "second"])
def test_cells_of_several_layers_are_compiled_and_exported(cell: Cell) -> None:
    torch._dynamo.reset()

    def build() -> DensePredictionCell:
        torch.manual_seed(0)
        return DensePredictionCell(cell, (3, 2), branch_channels=4, cell_channels=5, dropout_rate=0.0)

    features = torch.randn(2, 5, 7, 9, generator=torch.Generator().manual_seed(0))
    assert_same(train_step(build(), features, "aot_eager"), train_step(build(), features))
    program = torch.export.export(build().eval(), (features,))
    assert torch.allclose(program.module()(features), build().eval()(features), rtol=0, atol=ROUNDING)


def test_import_without_triton() -> None:
    modules = ", ".join(module.__name__ for module in (fast, checkpoint, mean_iou, upsampled_cross_entropy))
    code = f"import sys; sys.modules['triton'] = None; import {modules}"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
