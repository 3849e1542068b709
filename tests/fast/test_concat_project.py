from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fast.concat_project import concat_project
from fast.dense_prediction_cell import DensePredictionCell
from fast.kernels import NormedMap, operations_for
from reference import concat_project as reference
from reference.cell import BACKBONE_FEATURE, Branch, Cell, Conv1x1
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
    keep = (dropped_out(torch.ones(2, 6, 5, 7, dtype=torch.float64, device=device), rate) > 0).cpu().numpy()
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
    """Zeros are binomial. Within six standard deviations: a false alarm in 5e8 runs."""
    torch.manual_seed(0)
    x = torch.linspace(1.0, 2.0, 2 * 16 * 79 * 81, device=device, dtype=torch.float32).view(2, 16, 79, 81)
    output = dropped_out(x, rate)
    kept = output != 0
    assert torch.allclose(output[kept], x[kept] / (1 - rate), rtol=1e-6, atol=0)  # float32 rounding
    deviation = (x.numel() * rate * (1 - rate)) ** 0.5
    assert abs(int((~kept).sum()) - x.numel() * rate) <= 6 * deviation


@every_device
@pytest.mark.parametrize("distance", [(0, 0, 0, 1), (0, 0, 0, 8), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0), (0, 3, 2, 16)])
def test_dropout_of_neighbours_is_independent(device: str, distance: tuple[int, int, int, int]) -> None:
    """Both of two elements are dropped with probability rate²; six standard deviations."""
    torch.manual_seed(0)
    rate, shape = 0.3, (4, 32, 40, 41)
    dropped = dropped_out(torch.ones(shape, device=device), rate) == 0
    there = dropped[tuple(slice(d, None) for d in distance)]
    here = dropped[tuple(slice(None, size - d) for d, size in zip(distance, shape, strict=True))]
    # Each pair shares an element with two others: independent pairs' variance plus twice that covariance.
    variance = here.numel() * (rate**2 * (1 - rate**2) + 2 * (rate**3 - rate**4))
    assert abs(int((there & here).sum()) - here.numel() * rate**2) <= 6 * variance**0.5


@every_device
def test_dropout_follows_the_seed(device: str) -> None:
    def masks(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return [dropped_out(torch.ones(1, 4, 5, 5, device=device), 0.5) for _ in range(2)]

    (first, second), again, other = masks(0), masks(0), masks(1)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, second)
    assert not torch.equal(first, other[0])


def dropped_out(x: torch.Tensor, rate: float) -> torch.Tensor:
    """What `concat_project` makes of its concatenation (N, C, H, W), seen through a product by the identity."""
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[:, :, None, None]
    return operations_for(x).pointwise_conv([NormedMap(x)], identity, None, dropout_rate=rate).raw


def test_cell_drops_out_only_in_training() -> None:
    """Whatever its norms do: frozen norms with dropout are a way to train, norms without dropout a way to recompute."""
    cell = DensePredictionCell(Cell((Branch(BACKBONE_FEATURE, Conv1x1()),)), 3, branch_channels=16, dropout_rate=0.5).eval()
    features = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cell(features), cell(features))
    cell.dropout.train()
    assert not torch.equal(cell(features), cell(features))
