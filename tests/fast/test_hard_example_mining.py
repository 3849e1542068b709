from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fast.hard_example_mining import hardest_pixels, keep_largest
from fast.kernels import library
from fast.upsampled_cross_entropy import upsampled_cross_entropy
from fast.upsampled_l1 import pixel_losses, upsampled_l1
from reference import hard_example_mining as reference
from reference.bilinear_resize import bilinear_resize
from reference.upsampled_cross_entropy import IGNORE_INDEX
from reference.upsampled_cross_entropy import pixel_losses as reference_losses
from reference.upsampled_l1 import upsampled_l1 as reference_l1
from reference.upsampled_l1 import upsampled_l1_backward as reference_l1_backward
from tests.fast.against_reference import assert_equal_steps, every_device, reference_step, rounded, to_tensors, torch_step
from tests.golden.authors_dumps import dump_files, load_loss_dump
from tests.strategies import map_sizes, rng_seeds

ONE = np.ones(())  # the loss is a scalar: its cotangent
SHARES = st.floats(0.0, 1.0)
ROUNDING = 1e-4  # the hardest are chosen in float32, of losses up to 20 times weights up to 5: 1e-5, and another one


@pytest.mark.parametrize("name", ["topk25", "topk25_mining100_step40", "topk25_weights"])
@pytest.mark.parametrize("path", dump_files("train_facts/loss.npz"))
def test_losses_and_gradients_are_the_authors(path: Path, name: str) -> None:
    dump = load_loss_dump(path, name)
    logits, labels = torch.from_numpy(dump.logits).float().requires_grad_(), torch.from_numpy(dump.labels).long()
    weights = None if dump.class_weights is None else torch.from_numpy(dump.class_weights).float()
    mined = hardest_pixels(logits.detach(), labels, dump.share, class_weights=weights)
    loss = upsampled_cross_entropy(logits, mined, class_weights=weights)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(dump.loss, rel=1e-6)
    assert logits.grad is not None
    # sums of 50,000 float32 terms in another order, relative to the largest; a pixel more or less would be half a percent
    bound = 1e-5 * np.abs(dump.grad_logits).max()
    np.testing.assert_allclose(logits.grad, dump.grad_logits, rtol=0, atol=bound)


@every_device
@given(
    map_sizes(6),
    map_sizes(),
    st.integers(1, 5),
    st.sampled_from((0.0, 0.3, 1.0)),
    SHARES,
    st.booleans(),
    st.sampled_from((1, 500, 1 << 22)),
    st.sampled_from((torch.uint8, torch.int64)),
    st.booleans(),
    rng_seeds(),
)
def test_equals_reference(
    device: str,
    size: tuple[int, int],
    label_size: tuple[int, int],
    num_classes: int,
    ignored: float,
    share: float,
    weighted: bool,
    band_bytes: int,
    label_dtype: torch.dtype,
    align_corners: bool,
    seed: int,
) -> None:
    """The same pixels, but for those of equal losses up to rounding, and the same loss; bands of one row, a few, and all."""
    rng = np.random.default_rng(seed)
    logits = rounded(rng.normal(0.0, 2.0, (2, num_classes, *size)), torch.float32)
    labels = rng.integers(num_classes, size=(2, *label_size))
    labels[rng.random(labels.shape) < ignored] = IGNORE_INDEX
    weights = rounded(rng.permutation([0.0, *rng.uniform(0.1, 5.0, num_classes - 1)]), torch.float32) if weighted else None
    options: dict[str, Any] = {"class_weights": weights, "align_corners": align_corners}
    losses = reference_losses(logits, labels, **options)
    assume(not ((losses > 0.0) & (losses < ROUNDING)).any())  # float32 may call them 0, which are not counted

    on_device = torch.from_numpy(labels).to(device, label_dtype)
    given_weights = None if weights is None else torch.from_numpy(weights).to(device)
    with mock.patch.dict(library.BAND_BYTES, cpu=band_bytes, cuda=band_bytes):
        mined = hardest_pixels(
            torch.from_numpy(logits).to(device), on_device, share, class_weights=given_weights, align_corners=align_corners
        )
    assert mined.dtype == label_dtype
    actual, expected = mined.cpu().numpy(), reference.hardest_pixels(logits, labels, share, **options)
    kept, kept_by_reference = actual != IGNORE_INDEX, expected != IGNORE_INDEX
    assert np.array_equal(actual[kept], labels[kept])
    assert kept.sum() == kept_by_reference.sum()
    smallest = losses[kept_by_reference].min(initial=np.inf)
    assert (np.abs(losses - smallest)[kept != kept_by_reference] < ROUNDING).all()

    step = torch_step(
        lambda x: upsampled_cross_entropy(x, mined, class_weights=given_weights, align_corners=align_corners),
        to_tensors((logits,), device),
        ONE,
    )
    truth = reference_step(
        lambda x: np.asarray(reference.mined_cross_entropy(x, labels, share, **options)),
        lambda _, x: (reference.mined_cross_entropy_backward(x, labels, share, **options),),
        (logits,),
        ONE,
    )
    np.testing.assert_allclose(step.output, truth.output, rtol=0, atol=ROUNDING)
    if np.array_equal(kept, kept_by_reference):  # else the pixels of equal losses pull elsewhere
        assert_equal_steps(step, truth, terms=1.0 if weights is None else weights.max())


@every_device
def test_nan_is_not_hidden(device: str) -> None:
    logits, labels = torch.randn(2, 3, 4, 5, device=device), torch.ones(2, 7, 9, dtype=torch.int64, device=device)
    logits[1] = torch.nan  # one of two pictures
    assert upsampled_cross_entropy(logits, hardest_pixels(logits, labels, 0.25)).isnan()


@every_device
@given(map_sizes(), SHARES, st.sampled_from(("uint8", "int64", "float32", "float64")), rng_seeds())
def test_keep_largest_equals_reference(device: str, size: tuple[int, int], share: float, dtype: str, seed: int) -> None:
    """Of losses that all differ but for zeros, labels of any dtype keep it; those in floating point become NaN."""
    rng = np.random.default_rng(seed)
    shape = (2, *size)
    losses = rng.permutation(np.arange(float(np.prod(shape)))).reshape(shape) * (rng.random(shape) < 0.7)
    labels = rng.integers(100, size=shape).astype(dtype)
    ignore = np.nan if dtype.startswith("float") else IGNORE_INDEX
    actual = keep_largest(torch.from_numpy(losses).to(device), torch.from_numpy(labels).to(device), share, ignore)
    expected = reference.keep_largest(losses, labels, share, ignore)
    assert str(actual.dtype) == f"torch.{dtype}"
    np.testing.assert_array_equal(actual.cpu(), expected)


@every_device
@given(map_sizes(6), map_sizes(), st.sampled_from((0.0, 0.3, 1.0)), SHARES, st.booleans(), rng_seeds())
def test_the_largest_differences_of_depths_are_kept(
    device: str,
    size: tuple[int, int],
    target_size: tuple[int, int],
    unmeasured: float,
    share: float,
    align_corners: bool,
    seed: int,
) -> None:
    """Of any loss: here the reference's L1 loss of the targets that the reference keeps, both in float64."""
    rng = np.random.default_rng(seed)
    outputs, targets = rng.standard_normal((2, 1, *size)), rng.standard_normal((2, *target_size))
    targets[rng.random(targets.shape) < unmeasured] = np.nan
    wide = bilinear_resize(outputs, target_size, align_corners=align_corners)[:, 0]
    mined = reference.keep_largest(np.nan_to_num(np.abs(wide - targets)), targets, share, np.nan)
    expected = reference_step(
        lambda x: np.asarray(reference_l1(x, mined, align_corners=align_corners)),
        lambda _, x: (reference_l1_backward(x, mined, align_corners=align_corners),),
        (outputs,),
        ONE,
    )
    on_device = torch.from_numpy(targets).to(device)
    losses = pixel_losses(torch.from_numpy(outputs).to(device), on_device, align_corners=align_corners)
    kept = keep_largest(losses, on_device, share, torch.nan)
    actual = torch_step(lambda x: upsampled_l1(x, kept, align_corners=align_corners), to_tensors((outputs,), device), ONE)
    assert_equal_steps(actual, expected, terms=1.0)
