from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from fast.kernels import library, using
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


def expected_step(
    logits: np.ndarray,
    labels: np.ndarray,
    ignore_index: int = 255,
    class_weights: np.ndarray | None = None,
    *,
    align_corners: bool = True,
) -> Step:
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "class_weights": class_weights,
        "align_corners": align_corners,
    }
    return reference_step(
        lambda x: np.asarray(reference.upsampled_cross_entropy(x, labels, **options)),
        lambda _, x: (reference.upsampled_cross_entropy_backward(x, labels, **options),),
        (logits,),
        ONE,
    )


def draw_labels(
    shape: tuple[int, ...], num_classes: int, ignored: float, ignore_index: int, rng: np.random.Generator
) -> np.ndarray:
    labels = rng.integers(num_classes, size=shape)
    return np.where(rng.random(shape) < ignored, ignore_index, labels)


def draw_weights(num_classes: int, rng: np.random.Generator) -> np.ndarray:
    """One of them is 0, if there are several."""
    return rng.permutation([0.0, *rng.uniform(0.1, 5.0, num_classes - 1)]) if num_classes > 1 else np.array([2.5])


@every_device
@example((2, 1), (6, 1), 1, 1, 0.3, 1, torch.uint8, "contiguous", True, 0)
@example((4, 3), (64, 48), 2, 5, 0.3, 500, torch.uint8, "contiguous", False, 0)
@given(
    map_sizes(6),
    map_sizes(),
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from((0.0, 0.3, 0.95, 1.0)),
    st.sampled_from((1, 500, 1 << 22)),
    st.sampled_from((torch.uint8, torch.int64)),
    st.sampled_from(LAYOUTS),
    st.booleans(),
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
    align_corners: bool,
    seed: int,
) -> None:
    """Bands of one row, of a few, and of all; labels larger and smaller than the logits; down to 1×1 and one class."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0.0, 3.0, (batch, num_classes, *size))
    labels = draw_labels((batch, *label_size), num_classes, ignored, 255, rng)
    on_device = torch.from_numpy(labels).to(device, label_dtype)
    with mock.patch.dict(library.BAND_BYTES, cpu=band_bytes, cuda=band_bytes):
        actual = torch_step(
            lambda x: upsampled_cross_entropy(x, on_device, align_corners=align_corners),
            to_tensors((logits,), device, layout),
            ONE,
        )
    # What the pixels around a logit add to its gradient: of one class alone, terms whose sum is 0.
    terms = 1 / logits[:, 0].size
    assert_equal_steps(actual, expected_step(logits, labels, align_corners=align_corners), terms=terms)


@every_device
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "library"])
@given(
    map_sizes(6),
    map_sizes(20),
    st.integers(1, 5),
    st.sampled_from((0.0, 0.3, 1.0)),
    st.sampled_from((torch.uint8, torch.int64)),
    st.sampled_from((1.0, 100.0)),
    st.sampled_from(LAYOUTS),
    st.booleans(),
    rng_seeds(),
)
def test_class_weights_equal_reference(
    device: str,
    kernels: bool,
    size: tuple[int, int],
    label_size: tuple[int, int],
    num_classes: int,
    ignored: float,
    label_dtype: torch.dtype,
    scale: float,
    layout: Layout,
    align_corners: bool,
    seed: int,
) -> None:
    """With large logits, which the C++ kernel computes by another way; with a weight of 0, one class, nothing labelled."""
    rng = np.random.default_rng(seed)
    logits, weights = rng.normal(0.0, scale, (2, num_classes, *size)), draw_weights(num_classes, rng)
    labels = draw_labels((2, *label_size), num_classes, ignored, 255, rng)
    on_device, given_weights = torch.from_numpy(labels).to(device, label_dtype), torch.from_numpy(weights).to(device)
    with nullcontext() if kernels else using(None):
        actual = torch_step(
            lambda x: upsampled_cross_entropy(x, on_device, class_weights=given_weights, align_corners=align_corners),
            to_tensors((logits,), device, layout),
            ONE,
        )
    expected = expected_step(logits, labels, class_weights=weights, align_corners=align_corners)
    # as above, of pixels with the largest weight
    assert_equal_steps(actual, expected, terms=weights.max() / logits[:, 0].size)


@every_device
@pytest.mark.parametrize("align_corners", [True, False])
def test_class_weights_are_pytorchs_but_for_the_denominator(device: str, align_corners: bool) -> None:
    """PyTorch's sum of weighted losses, divided by the number of labelled pixels; float32 sums of 1,000 pixels."""
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(draw_labels((2, 21, 25), 5, 0.3, 255, rng)).to(device)
    weights = torch.from_numpy(draw_weights(5, rng)).to(device, torch.float32)
    given, plain = (torch.from_numpy(rng.normal(size=(2, 5, 6, 7))).to(device, torch.float32) for _ in range(2))
    plain.copy_(given)
    loss = upsampled_cross_entropy(given.requires_grad_(), labels, class_weights=weights, align_corners=align_corners)
    wide = F.interpolate(plain.requires_grad_(), labels.shape[1:], mode="bilinear", align_corners=align_corners)
    expected = F.cross_entropy(wide, labels, weights, ignore_index=255, reduction="sum") / (labels != 255).sum()
    (loss + expected).backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert given.grad is not None
    assert plain.grad is not None
    assert torch.allclose(given.grad, plain.grad, rtol=0, atol=1e-6 * plain.grad.abs().max().item())


@pytest.mark.parametrize("weights", [torch.ones(2), torch.ones(4), torch.ones(1, 3), torch.ones(())], ids=lambda w: w.shape)
def test_weights_of_other_classes_are_refused(weights: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"class_weights: \(3,\) on cpu are needed, one for each class of the logits, got"):
        upsampled_cross_entropy(torch.zeros(1, 3, 2, 2), torch.zeros(1, 9, 9).long(), class_weights=weights)
    with pytest.raises(ValueError, match=r"class_weights must be a tensor \(3,\), got a list"):
        upsampled_cross_entropy(torch.zeros(1, 3, 2, 2), torch.zeros(1, 9, 9).long(), class_weights=[1.0, 2.0, 3.0])  # type: ignore[arg-type]


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


@pytest.mark.parametrize("align_corners", [True, False])
def test_gradcheck(align_corners: bool) -> None:
    """By central differences of the fast path itself, in float64, with a gradient of the loss that is not 1."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 3, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.randint(3, (2, 5, 4), generator=generator)
    labels[0, 1] = 255
    weights = torch.tensor([0.0, 0.5, 4.0])
    for of_classes in (None, weights):
        loss = partial(upsampled_cross_entropy, labels=labels, class_weights=of_classes, align_corners=align_corners)
        assert torch.autograd.gradcheck(lambda x, loss=loss: 3.0 * loss(x), (logits,))


@every_device
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_within_budget(device: str, dtype: torch.dtype, weighted: bool, align_corners: bool) -> None:
    """Logits in `dtype`; the loss is float32 for all, the gradient in the logits' dtype."""
    actual, expected, yardstick = [], [], []
    for seed in range(9):
        rng = np.random.default_rng(seed)
        logits = rounded(rng.normal(0.0, 3.0, (3, 5, 6, 7)), dtype)
        labels = draw_labels((3, 21, 25), 5, 0.2, 255, rng)
        on_device = torch.from_numpy(labels).to(device)
        inputs, plain_inputs = (to_tensors((logits,), device, dtype=dtype) for _ in range(2))
        weights = rounded(draw_weights(5, rng), torch.float32) if weighted else None
        w = None if weights is None else torch.from_numpy(weights).to(device, torch.float32)
        expected.append(expected_step(logits, labels, class_weights=weights, align_corners=align_corners))
        options: dict[str, Any] = {"labels": on_device, "class_weights": w, "align_corners": align_corners}
        actual.append(torch_step(partial(upsampled_cross_entropy, **options), inputs, ONE))
        yardstick.append(torch_step(partial(plain_cross_entropy, **options), plain_inputs, ONE))
    assert_steps_within_budget(actual, expected, yardstick, dtype)
    assert upsampled_cross_entropy(torch.ones(1, 2, 1, 1, dtype=dtype), torch.zeros(1, 1, 1).long()).dtype == torch.float32


def plain_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, class_weights: torch.Tensor | None, align_corners: bool
) -> torch.Tensor:
    wide = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear", align_corners=align_corners)
    return F.cross_entropy(wide, labels, class_weights, ignore_index=255, reduction="sum") / (labels != 255).sum()


def test_ignore_index_that_the_labels_cannot_hold_is_refused() -> None:
    logits, labels = torch.zeros(1, 3, 2, 2), torch.zeros(1, 9, 9, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"uint8 labels cannot be ignore_index -100: give 0 to 255, or labels as int64"):
        upsampled_cross_entropy(logits, labels, ignore_index=-100)
    assert upsampled_cross_entropy(logits, labels.long(), ignore_index=-100).item() == pytest.approx(np.log(3))
