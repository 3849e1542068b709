from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fast.concat_project import concat_project, dropout
from fast.dense_prediction_cell import DensePredictionCell
from reference import concat_project as reference
from reference.cell import BACKBONE_FEATURE, CONV1X1, Branch, Cell
from tests.fast.against_reference import (
    LAYOUTS,
    Layout,
    assert_equal_steps,
    check,
    every_device,
    reference_step,
    single_values_allowed,
    to_tensors,
    torch_step,
)
from tests.strategies import map_sizes, random_pointwise, rng_seeds

every_rate = pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])


@single_values_allowed
@every_device
@pytest.mark.parametrize("training", [False, True])
@given(map_sizes(), st.integers(1, 10), st.integers(1, 2), st.sampled_from(LAYOUTS), rng_seeds())
def test_equals_reference(
    device: str, training: bool, size: tuple[int, int], num_branches: int, batch: int, layout: Layout, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    branches = tuple(rng.standard_normal((batch, 3, *size)) for _ in range(num_branches))
    inputs = branches, random_pointwise(3 * num_branches, 4, rng)
    pair = reference.concat_project, reference.concat_project_backward
    check(concat_project, pair, inputs, rng, device, layout, training=training)


@every_device
@pytest.mark.parametrize("training", [False, True])
@every_rate
def test_dropout_equals_reference_with_the_same_mask(device: str, training: bool, rate: float) -> None:
    rng = np.random.default_rng(0)
    branches = rng.standard_normal((2, 3, 5, 7)), rng.standard_normal((2, 3, 5, 7))
    inputs = branches, random_pointwise(6, 4, rng)
    cotangent = rng.standard_normal((2, 4, 5, 7))
    torch.manual_seed(0)
    keep = (dropout(torch.ones(2, 6, 5, 7, dtype=torch.float64, device=device), rate=rate) > 0).cpu().numpy()
    torch.manual_seed(0)
    actual = torch_step(
        lambda b, w: concat_project(b, w, training=training, dropout_rate=rate), to_tensors(inputs, device), cotangent
    )
    arguments: dict[str, Any] = {"training": training, "dropout_keep": keep, "dropout_rate": rate}
    pair = reference.concat_project, reference.concat_project_backward
    assert_equal_steps(actual, reference_step(*pair, inputs, cotangent, **arguments))


@every_device
@every_rate
def test_dropout_zeroes_its_share_and_scales_the_rest(device: str, rate: float) -> None:
    """Zeros are binomial. Within six standard deviations in each of four lanes: a false alarm in 1.3e8 runs."""
    torch.manual_seed(0)
    count = 4 * 50_000 + 3  # not a multiple of what one random draw serves
    x = torch.linspace(1.0, 2.0, count, device=device, dtype=torch.float64)
    output = dropout(x, rate=rate)
    kept = output != 0
    assert torch.allclose(output[kept], x[kept] / (1 - rate), rtol=1e-15, atol=0)
    for lane in range(4):  # one draw of 64 bits serves four neighbours
        dropped = ~kept[lane::4]
        deviation = (dropped.numel() * rate * (1 - rate)) ** 0.5
        assert abs(int(dropped.sum()) - dropped.numel() * rate) <= 6 * deviation


@every_device
def test_dropout_of_neighbours_is_independent(device: str) -> None:
    """Both of two elements are dropped with probability rate²; six standard deviations, for each distance."""
    torch.manual_seed(0)
    rate, count = 0.3, 200_000
    dropped = dropout(torch.ones(count, device=device), rate=rate) == 0
    for distance in (*range(1, 8), count // 4, count // 2):  # within a draw, and between what draws may share
        both = int((dropped[distance:] & dropped[:-distance]).sum())
        # Each pair shares an element with two others: independent pairs' variance plus twice that covariance.
        variance = (count - distance) * (rate**2 * (1 - rate**2) + 2 * (rate**3 - rate**4))
        assert abs(both - (count - distance) * rate**2) <= 6 * variance**0.5


@every_device
@every_rate
def test_dropout_gradient_has_the_same_mask(device: str, rate: float) -> None:
    x = torch.ones(6, 7, 5, device=device, dtype=torch.float64, requires_grad=True)
    output = dropout(x, rate=rate)
    output.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert torch.equal(x.grad, output.detach())  # both are keep / (1 − rate)


@every_device
def test_dropout_follows_the_seed(device: str) -> None:
    def masks(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return [dropout(torch.ones(100, device=device), rate=0.5) for _ in range(2)]

    (first, second), again, other = masks(0), masks(0), masks(1)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, second)
    assert not torch.equal(first, other[0])


@every_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dropout_keeps_dtype_and_shape(device: str, dtype: torch.dtype) -> None:
    for shape in ((), (1,), (2, 3, 5), (0, 4)):
        output = dropout(torch.ones(shape, dtype=dtype, device=device), rate=0.5)
        assert output.shape == shape
        assert output.dtype == dtype
    x = torch.randn(3, 5, dtype=dtype, device=device)
    assert torch.equal(dropout(x, rate=0.0), x)


def test_cell_drops_out_only_in_training() -> None:
    """Whatever its norms do: frozen norms with dropout are a way to train, norms without dropout a way to recompute."""
    cell = DensePredictionCell(Cell((Branch(BACKBONE_FEATURE, CONV1X1),)), 3, branch_channels=16, dropout_rate=0.5).eval()
    features = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cell(features), cell(features))
    cell.dropout.train()
    assert not torch.equal(cell(features), cell(features))
