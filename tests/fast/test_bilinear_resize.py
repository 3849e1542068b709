import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fast.bilinear_resize import bilinear_resize
from reference import bilinear_resize as reference
from tests.fast.against_reference import LAYOUTS, Layout, check, every_device
from tests.strategies import map_sizes, rng_seeds


@every_device
@given(map_sizes(), map_sizes(), st.integers(1, 2), st.sampled_from(LAYOUTS), rng_seeds())
def test_equals_reference(
    device: str, in_size: tuple[int, int], out_size: tuple[int, int], batch: int, layout: Layout, seed: int
) -> None:
    """Larger, smaller, and to or from a single pixel."""
    rng = np.random.default_rng(seed)
    inputs = (rng.standard_normal((batch, 3, *in_size)),)
    pair = (
        lambda x: reference.bilinear_resize(x, out_size),
        lambda grad_output, x: (reference.bilinear_resize_backward(grad_output, in_size),),
    )
    check(lambda x: bilinear_resize(x, out_size), pair, inputs, rng, device, layout)
