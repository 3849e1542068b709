import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fast.mean_iou import confusion_matrix, upsampled_confusion_matrix
from reference import mean_iou as reference
from reference.bilinear_resize import bilinear_resize
from tests.fast.against_reference import every_device
from tests.strategies import map_sizes, rng_seeds

LABEL_DTYPES = st.sampled_from((torch.uint8, torch.int64))


@every_device
@given(map_sizes(), st.integers(1, 20), st.sampled_from((0.0, 0.3, 1.0)), LABEL_DTYPES, rng_seeds())
def test_confusion_matrix_equals_reference(
    device: str, size: tuple[int, int], num_classes: int, ignored: float, dtype: torch.dtype, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    predictions = rng.integers(num_classes, size=size)
    labels = np.where(rng.random(size) < ignored, 255, rng.integers(num_classes, size=size))
    on_device = (torch.from_numpy(array).to(device, dtype) for array in (predictions, labels))
    actual = confusion_matrix(*on_device, num_classes=num_classes)
    assert actual.dtype == torch.int64
    assert np.array_equal(actual.cpu(), reference.confusion_matrix(predictions, labels, num_classes=num_classes))


@every_device
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.float64], ids=str)
@given(map_sizes(6), map_sizes(), st.integers(1, 3), st.integers(1, 5), LABEL_DTYPES, st.booleans(), rng_seeds())
def test_upsampled_confusion_matrix_equals_reference(
    device: str,
    logits_dtype: torch.dtype,
    size: tuple[int, int],
    label_size: tuple[int, int],
    batch: int,
    num_classes: int,
    dtype: torch.dtype,
    align_corners: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((batch, num_classes, *size))
    labels = np.where(rng.random((batch, *label_size)) < 0.2, 255, rng.integers(num_classes, size=(batch, *label_size)))
    upsampled = bilinear_resize(logits, label_size, align_corners=align_corners)
    best = np.sort(upsampled, axis=1)[:, -2:]
    assume(num_classes == 1 or np.min(best[:, 1] - best[:, 0]) > 1e-5)  # float32 decides ties by rounding
    on_device = torch.from_numpy(logits).to(device, logits_dtype), torch.from_numpy(labels).to(device, dtype)
    actual = upsampled_confusion_matrix(*on_device, align_corners=align_corners)
    expected = reference.confusion_matrix(upsampled.argmax(axis=1), labels, num_classes=num_classes)
    assert np.array_equal(actual.cpu(), expected)


@every_device
def test_labels_in_bytes_do_not_wrap(device: str) -> None:
    """Label 18 of 19: 18 · 19 + 18 = 360 exceeds a byte."""
    last = torch.full((2, 3), 18, dtype=torch.uint8, device=device)
    confusion = confusion_matrix(last, last, num_classes=19)
    assert confusion[18, 18] == confusion.sum() == 6


def test_other_ignore_index() -> None:
    predictions, labels = torch.tensor([0, 1, 1]), torch.tensor([0, -1, 0])
    assert confusion_matrix(predictions, labels, num_classes=2, ignore_index=-1).tolist() == [[1, 1], [0, 0]]
    logits = torch.tensor([[2.0, 1.0, 1.0], [1.0, 2.0, 2.0]]).view(1, 2, 1, 3)
    assert upsampled_confusion_matrix(logits, labels.view(1, 1, 3), ignore_index=-1).tolist() == [[1, 1], [0, 0]]
