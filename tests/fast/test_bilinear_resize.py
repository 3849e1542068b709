from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fast.bilinear_resize import bilinear_resize
from fast.kernels import NormedMap, operations_for
from fast.kernels.matrices import resize_matrix
from reference import bilinear_resize as reference
from tests.fast.against_reference import LAYOUTS, Layout, check, every_device
from tests.strategies import map_sizes, rng_seeds


@every_device
@pytest.mark.parametrize(
    "resize", [bilinear_resize, lambda x, size, **grid: operations_for(x).resize(NormedMap(x), size, **grid)]
)
@given(map_sizes(), map_sizes(), st.integers(1, 2), st.sampled_from(LAYOUTS), st.booleans(), rng_seeds())
def test_equals_reference(
    device: str,
    resize: Callable[..., Tensor],
    in_size: tuple[int, int],
    out_size: tuple[int, int],
    batch: int,
    layout: Layout,
    align_corners: bool,
    seed: int,
) -> None:
    """Larger, smaller, and to or from a single pixel."""
    rng = np.random.default_rng(seed)
    inputs = (rng.standard_normal((batch, 3, *in_size)),)
    pair = (
        lambda x: reference.bilinear_resize(x, out_size, align_corners=align_corners),
        lambda grad_output, x: (reference.bilinear_resize_backward(grad_output, in_size, align_corners=align_corners),),
    )
    check(lambda x: resize(x, out_size, align_corners=align_corners), pair, inputs, rng, device, layout)


def test_matrix_is_made_once_and_serves_inference_and_training() -> None:
    with torch.inference_mode():
        first = resize_matrix(3, 9, torch.float32, torch.device("cpu"))
    assert resize_matrix(3, 9, torch.float32, torch.device("cpu")) is first
    x = torch.randn(1, 1, 3, 3, requires_grad=True)
    (first @ x @ first.T).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close((first @ x.detach() @ first.T), bilinear_resize(x.detach(), (9, 9)))


def test_matrix_outlives_any_number_of_others() -> None:
    """A captured CUDA graph goes on reading it while maps of a thousand other sizes are evaluated."""
    first = resize_matrix(3, 5, torch.float64, torch.device("cpu"))
    for size in range(1, 1001):
        resize_matrix(size, 2, torch.float64, torch.device("cpu"))
    assert resize_matrix(3, 5, torch.float64, torch.device("cpu")) is first
