from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from fast.kernels import library
from fast.upsampled_cross_entropy import upsampled_cross_entropy
from reference import upsampled_cross_entropy as reference
from tests.fast.against_reference import (
    LAYOUTS,
    Layout,
    Step,
    assert_equal_steps,
    assert_steps_within_budget,
    every_device,
    reference_step,
    rounded,
    to_tensors,
    torch_step,
)
from tests.strategies import map_sizes, rng_seeds

ONE = np.ones(())  # the loss is a scalar: its cotangent


def expected_step(logits: np.ndarray, labels: np.ndarray, ignore_index: int = 255) -> Step:
    return reference_step(
        lambda x: np.asarray(reference.upsampled_cross_entropy(x, labels, ignore_index=ignore_index)),
        lambda _, x: (reference.upsampled_cross_entropy_backward(x, labels, ignore_index=ignore_index),),
        (logits,),
        ONE,
    )


def draw_labels(
    shape: tuple[int, ...], num_classes: int, ignored: float, ignore_index: int, rng: np.random.Generator
) -> np.ndarray:
    labels = rng.integers(num_classes, size=shape)
    return np.where(rng.random(shape) < ignored, ignore_index, labels)


@every_device
@example((2, 1), (6, 1), 1, 1, 0.3, 1, torch.uint8, "contiguous", 0)
@given(
    map_sizes(6),
    map_sizes(),
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from((0.0, 0.3, 0.95, 1.0)),
    st.sampled_from((1, 500, 1 << 22)),
    st.sampled_from((torch.uint8, torch.int64)),
    st.sampled_from(LAYOUTS),
    rng_seeds(),
)
def test_equals_reference(
    device: str,
    size: tuple[int, int],
    label_size: tuple[int, int],
    batch: int,
    num_classes: int,
    ignored: float,
    band_bytes: int,
    label_dtype: torch.dtype,
    layout: Layout,
    seed: int,
) -> None:
    """Bands of one row, of a few, and of all; labels larger and smaller than the logits; down to 1×1 and one class."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0.0, 3.0, (batch, num_classes, *size))
    labels = draw_labels((batch, *label_size), num_classes, ignored, 255, rng)
    on_device = torch.from_numpy(labels).to(device, label_dtype)
    with mock.patch.dict(library.BAND_BYTES, cpu=band_bytes, cuda=band_bytes):
        actual = torch_step(lambda x: upsampled_cross_entropy(x, on_device), to_tensors((logits,), device, layout), ONE)
    # What the pixels around a logit add to its gradient: of one class alone, terms whose sum is 0.
    terms = 1 / logits[:, 0].size
    assert_equal_steps(actual, expected_step(logits, labels), terms=terms)


@pytest.mark.parametrize("ignore_index", [-1, 2, 100])
def test_other_ignore_index(ignore_index: int) -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((2, 3, 3, 4)), draw_labels((2, 6, 5), 3, 0.3, ignore_index, rng)
    actual = torch_step(
        lambda x: upsampled_cross_entropy(x, torch.from_numpy(labels), ignore_index=ignore_index),
        to_tensors((logits,)),
        ONE,
    )
    assert_equal_steps(actual, expected_step(logits, labels, ignore_index))


@every_device
def test_no_labelled_pixel_gives_zero_and_no_gradient(device: str) -> None:
    logits = torch.randn(2, 3, 4, 5, device=device, requires_grad=True)
    loss = upsampled_cross_entropy(logits, torch.full((2, 8, 9), 255, dtype=torch.uint8, device=device))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@every_device
def test_large_logits_do_not_overflow(device: str) -> None:
    logits = torch.tensor([1e4, -1e4, 9.99e3], device=device).view(1, 3, 1, 1)
    loss = upsampled_cross_entropy(logits, torch.tensor([[[1]]], device=device))
    assert loss.item() == pytest.approx(2e4)


def test_gradcheck() -> None:
    """By central differences of the fast path itself, in float64, with a gradient of the loss that is not 1."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 3, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.randint(3, (2, 5, 4), generator=generator)
    labels[0, 1] = 255
    assert torch.autograd.gradcheck(lambda x: 3.0 * upsampled_cross_entropy(x, labels), (logits,))


@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_within_budget(device: str, dtype: torch.dtype) -> None:
    """Logits in `dtype`; the loss is float32 for all, the gradient in the logits' dtype."""
    actual, expected, yardstick = [], [], []
    for seed in range(9):
        rng = np.random.default_rng(seed)
        logits = rounded(rng.normal(0.0, 3.0, (3, 5, 6, 7)), dtype)
        labels = draw_labels((3, 21, 25), 5, 0.2, 255, rng)
        on_device = torch.from_numpy(labels).to(device)
        inputs, plain_inputs = (to_tensors((logits,), device, dtype=dtype) for _ in range(2))
        expected.append(expected_step(logits, labels))
        actual.append(torch_step(lambda x, y=on_device: upsampled_cross_entropy(x, y), inputs, ONE))
        yardstick.append(
            torch_step(
                lambda x, y=on_device: F.cross_entropy(
                    F.interpolate(x.float(), y.shape[1:], mode="bilinear", align_corners=True), y, ignore_index=255
                ),
                plain_inputs,
                ONE,
            )
        )
    assert_steps_within_budget(actual, expected, yardstick, dtype)
    assert upsampled_cross_entropy(torch.ones(1, 2, 1, 1, dtype=dtype), torch.zeros(1, 1, 1).long()).dtype == torch.float32


def test_ignore_index_that_the_labels_cannot_hold_is_refused() -> None:
    logits, labels = torch.zeros(1, 3, 2, 2), torch.zeros(1, 9, 9, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"uint8 labels cannot be ignore_index -100: give 0 to 255, or labels as int64"):
        upsampled_cross_entropy(logits, labels, ignore_index=-100)
    assert upsampled_cross_entropy(logits, labels.long(), ignore_index=-100).item() == pytest.approx(np.log(3))
