import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fast.depth_metrics import depth_totals
from reference import depth_metrics as reference
from tests.fast.against_reference import every_device, rounded
from tests.reference.test_depth_metrics import random_maps
from tests.strategies import map_sizes, rng_seeds

ROUNDING = 1e-12  # relative: sums of up to 300 float64 terms, all positive, in another order
DTYPES = st.sampled_from((torch.float64, torch.float32, torch.float16, torch.bfloat16))


@every_device
@given(map_sizes(), st.sampled_from((0.0, 0.3, 1.0)), DTYPES, DTYPES, rng_seeds())
def test_equals_reference(
    device: str,
    size: tuple[int, int],
    unmeasured: float,
    dtype: torch.dtype,
    depth_dtype: torch.dtype,
    seed: int,
) -> None:
    """Also of bfloat16, whose pixels often are exactly equal: a ratio is taken in float64 whatever the dtypes."""
    predictions, depths = random_maps(size, unmeasured, np.random.default_rng(seed))
    predictions, depths = rounded(predictions, dtype), rounded(depths, depth_dtype)
    actual = depth_totals(torch.from_numpy(predictions).to(device, dtype), torch.from_numpy(depths).to(device, depth_dtype))
    expected = reference.depth_totals(predictions, depths)
    assert actual.dtype == torch.float64
    assert actual.device.type == device
    np.testing.assert_allclose(actual.cpu(), expected, rtol=ROUNDING, atol=0)
    assert np.array_equal(actual.cpu()[[0, 3, 4, 5]], expected[[0, 3, 4, 5]])  # numbers of pixels


@every_device
def test_nothing_measured_is_nan(device: str) -> None:
    totals = depth_totals(torch.ones(2, 3, device=device), torch.full((2, 3), torch.nan, device=device))
    assert totals.tolist() == [0.0] * 6
    assert math.isnan(reference.rmse(totals.cpu().numpy()))


@every_device
def test_predictions_at_unmeasured_pixels_are_free(device: str) -> None:
    predictions = torch.tensor([3.0, 0.0, -1.0, torch.nan, torch.inf], device=device)
    depths = torch.tensor([2.0, *[torch.nan] * 4], device=device)
    assert depth_totals(predictions, depths).tolist() == [1.0, 1.0, 0.5, 0.0, 1.0, 1.0]


@every_device
def test_ratios_count_below_the_threshold_in_both_directions(device: str) -> None:
    predictions = torch.tensor([1.0, 1.24, 1.25, 1.5625, 1.953125], device=device)
    for pair in ((predictions, torch.ones_like(predictions)), (torch.ones_like(predictions), predictions)):
        assert depth_totals(*pair)[3:].tolist() == [2.0, 3.0, 4.0]


def test_a_prediction_that_is_not_a_number_is_no_score() -> None:
    totals = depth_totals(torch.tensor([torch.nan, 1.0]), torch.ones(2))
    np.testing.assert_array_equal(totals, reference.depth_totals(np.array([np.nan, 1.0]), np.ones(2)))
    assert totals.isnan().tolist() == [False, True, True, False, False, False]


def test_no_gradient_is_kept() -> None:
    """Totals of a whole data set are added; each would hold its network's maps."""
    assert not depth_totals(torch.ones(2, 3, requires_grad=True), torch.ones(2, 3)).requires_grad


def test_compiles_into_one_graph() -> None:
    """So nothing in it waits for a value."""
    torch._dynamo.reset()
    predictions, depths = (torch.from_numpy(x) for x in random_maps((5, 7), 0.3, np.random.default_rng(0)))
    compiled = torch.compile(depth_totals, backend="eager", fullgraph=True)
    assert torch.equal(compiled(predictions, depths), depth_totals(predictions, depths))


@pytest.mark.parametrize(("shape", "device"), [((2, 4), "cpu"), ((2, 3), "meta")])
def test_other_shapes_and_devices_are_refused(shape: tuple[int, int], device: str) -> None:
    with pytest.raises(ValueError, match=r"one shape and device, got \(2, 3\) on cpu"):
        depth_totals(torch.ones(2, 3), torch.ones(shape, device=device))
