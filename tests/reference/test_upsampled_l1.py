import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from reference.batch_norm import Array
from reference.upsampled_l1 import upsampled_l1, upsampled_l1_backward
from tests.reference.directional_derivative import STEP, assert_gradient
from tests.reference.test_bilinear_resize import scipy_resize
from tests.strategies import map_sizes, rng_seeds

ROUNDING = 1e-12  # a mean of float64 values of order 1
UNMEASURED_SHARE = st.sampled_from((0.0, 0.3, 0.9))


def random_targets(shape: tuple[int, ...], unmeasured_share: float, rng: np.random.Generator) -> Array:
    return np.where(rng.random(shape) < unmeasured_share, np.nan, rng.standard_normal(shape))


def test_hand_value_on_upsampled_outputs() -> None:
    """Depths of 1 m and 4 m, so 2 m in the middle of three pixels; the truth is half of it, the same, and twice as much."""
    outputs = np.log([1.0, 4.0]).reshape(1, 1, 1, 2)
    targets = np.log([[[0.5, 2.0, 8.0]]])
    assert upsampled_l1(outputs, targets) == pytest.approx(2 * np.log(2.0) / 3, abs=ROUNDING)
    targets[..., 2] = np.nan
    assert upsampled_l1(outputs, targets) == pytest.approx(np.log(2.0) / 2, abs=ROUNDING)
    centimetres = np.log(100.0)
    assert upsampled_l1(outputs + centimetres, targets + centimetres) == pytest.approx(np.log(2.0) / 2, abs=ROUNDING)


@given(map_sizes(6), map_sizes(), UNMEASURED_SHARE, rng_seeds())
def test_equals_a_slow_loop(size: tuple[int, int], target_size: tuple[int, int], unmeasured: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    outputs, targets = rng.standard_normal((2, 1, *size)), random_targets((2, *target_size), unmeasured, rng)
    upsampled = scipy_resize(outputs, target_size)
    losses = [abs(upsampled[n, 0, h, w] - target) for (n, h, w), target in np.ndenumerate(targets) if not np.isnan(target)]
    assert upsampled_l1(outputs, targets) == pytest.approx(sum(losses) / max(len(losses), 1), abs=ROUNDING)


@given(map_sizes(6), map_sizes(), UNMEASURED_SHARE, rng_seeds())
def test_gradient(size: tuple[int, int], target_size: tuple[int, int], unmeasured: float, seed: int) -> None:
    """Of a loss that has no derivative where a difference is 0: the step along the direction must not reach such a place."""
    rng = np.random.default_rng(seed)
    outputs, targets = rng.standard_normal((2, 1, *size)), random_targets((2, *target_size), unmeasured, rng)
    differences = np.abs(scipy_resize(outputs, target_size)[:, 0] - targets)
    assume(not (differences < 10 * STEP).any())  # a standard normal value is never ten

    def loss(outputs: Array) -> Array:
        return np.asarray(upsampled_l1(outputs, targets))

    assert_gradient(loss, (outputs,), (upsampled_l1_backward(outputs, targets),), np.ones(()), rng)


def test_gradient_is_0_where_the_difference_is() -> None:
    """Four pixels: one too low, one too high, one right, one without a measurement; the mean is over three."""
    outputs = np.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 2, 2)
    targets = np.array([[[1.5, 0.0], [3.0, np.nan]]])
    assert upsampled_l1_backward(outputs, targets).ravel().tolist() == [-1 / 3, 1 / 3, 0.0, 0.0]


@given(map_sizes(), rng_seeds())
def test_unmeasured_pixels_change_nothing(size: tuple[int, int], seed: int) -> None:
    """Without resize each output belongs to one pixel: those of unmeasured pixels are free, and get no gradient."""
    rng = np.random.default_rng(seed)
    targets = random_targets((2, *size), 0.5, rng)
    outputs, others = rng.standard_normal((2, 2, 1, *size))
    unmeasured = np.isnan(targets)[:, None]
    changed = np.where(unmeasured, others, outputs)
    assert upsampled_l1(outputs, targets) == upsampled_l1(changed, targets)
    assert not upsampled_l1_backward(outputs, targets)[unmeasured].any()


@given(map_sizes(6), map_sizes(), rng_seeds())
def test_nothing_measured_costs_nothing(size: tuple[int, int], target_size: tuple[int, int], seed: int) -> None:
    outputs = np.random.default_rng(seed).standard_normal((2, 1, *size))
    targets = np.full((2, *target_size), np.nan)
    assert upsampled_l1(outputs, targets) == 0.0
    assert not upsampled_l1_backward(outputs, targets).any()


@pytest.mark.parametrize(
    ("outputs", "targets"), [((2, 1, 3, 3), (1, 9, 9)), ((1, 2, 3, 3), (1, 9, 9)), ((1, 1, 3, 3), (1, 1, 9, 9))]
)
def test_wrong_shapes_are_refused(outputs: tuple[int, ...], targets: tuple[int, ...]) -> None:
    for function in (upsampled_l1, upsampled_l1_backward):
        with pytest.raises(ValueError, match="needs outputs"):
            function(np.zeros(outputs), np.zeros(targets))
