"""Hard example mining against the authors' losses and gradients where they are at hand, and by its definition."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fast.bilinear_resize import bilinear_resize
from fast.hard_example_mining import hardest_pixels, keep_largest, mined_share
from fast.kernels.library import BAND_BYTES
from fast.upsampled_cross_entropy import upsampled_cross_entropy
from fast.upsampled_l1 import pixel_losses, upsampled_l1
from reference.upsampled_cross_entropy import IGNORE_INDEX

LOSSES = Path(__file__).parents[3] / "shared" / "golden" / "train_facts" / "loss.npz"


@pytest.mark.parametrize(
    ("name", "share", "loss"),
    [("plain", 1.0, 3.751829), ("topk25", 0.25, 5.41752), ("topk25_mining100_step40", mined_share(0.25, 40, 100), 4.163314)],
)
def test_losses_and_gradients_are_the_authors(name: str, share: float, loss: float) -> None:
    if not LOSSES.exists():
        pytest.skip("the authors' losses are not on this machine")
    with np.load(LOSSES) as golden:
        logits = torch.from_numpy(golden["logits"]).permute(0, 3, 1, 2).contiguous().requires_grad_()
        labels = torch.from_numpy(golden["labels"][..., 0]).long()
        expected = torch.from_numpy(golden[f"grad_{name}"]).permute(0, 3, 1, 2)
    mined = hardest_pixels(logits.detach(), labels, share) if share < 1 else labels
    actual = upsampled_cross_entropy(logits, mined)
    actual.backward()  # type: ignore[no-untyped-call]
    assert actual.item() == pytest.approx(loss, rel=2e-6)  # the values above have seven digits
    assert logits.grad is not None
    # sums of 50,000 float32 terms in another order, relative to the largest; a pixel more or less would be 1 / 12,000
    assert (logits.grad - expected).abs().max() <= 1e-5 * expected.abs().max()


def some_pixels(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (2, 33, 49), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = IGNORE_INDEX
    return torch.randn(2, 5, 3, 4, generator=generator), labels


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("share", [0.01, 0.25, 0.75])
def test_exactly_the_largest_losses_are_kept(share: float, align_corners: bool) -> None:
    logits, labels = some_pixels()
    wide = bilinear_resize(logits, (33, 49), align_corners=align_corners)
    losses = F.cross_entropy(wide, labels, ignore_index=IGNORE_INDEX, reduction="none")
    kept = hardest_pixels(logits, labels, share, align_corners=align_corners) != IGNORE_INDEX
    assert kept.sum() == int(share * labels.numel())
    assert losses[kept].min() >= losses[~kept].max() - 1e-5  # two float32 ways to the same loss


def test_the_largest_are_those_of_weighted_losses() -> None:
    """Weights multiply before the choice: the loss is the authors', the mean over the kept of what is not 0."""
    logits, labels = some_pixels()
    weights = torch.tensor([0.0, 0.5, 1.0, 2.0, 8.0])
    wide = bilinear_resize(logits, (33, 49))
    losses = F.cross_entropy(wide, labels, weights, ignore_index=IGNORE_INDEX, reduction="none")
    mined = hardest_pixels(logits, labels, 0.25, class_weights=weights)
    expected = losses.flatten().topk(int(0.25 * labels.numel())).values.mean()
    loss = upsampled_cross_entropy(logits, mined, class_weights=weights)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # float32 sums
    everything = hardest_pixels(logits, labels, 1.0, class_weights=weights)
    assert torch.equal(everything, labels.where(labels != 0, IGNORE_INDEX))  # a loss of 0 is never kept


def test_ignored_pixels_are_counted_but_never_kept() -> None:
    logits, labels = some_pixels()
    labels[:, :30] = IGNORE_INDEX
    mined = hardest_pixels(logits, labels, 0.9)
    assert torch.equal(mined, labels)


def test_bands_do_not_change_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = some_pixels()
    expected = hardest_pixels(logits, labels, 0.25)
    monkeypatch.setitem(BAND_BYTES, "cpu", 1)
    assert torch.equal(hardest_pixels(logits, labels, 0.25), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_targets_in_floating_point_become_nan(dtype: torch.dtype) -> None:
    """Of six pixels three are to be kept, but only two have a loss; the others, measured or not, become NaN."""
    targets = torch.tensor([[[1.0, 2.0, torch.nan], [4.0, torch.nan, 6.0]]], dtype=dtype)
    losses = torch.tensor([[[0.0, 0.5, 0.0], [0.25, 0.0, 0.0]]])
    mined = keep_largest(losses, targets, 0.5, torch.nan)
    assert mined.dtype == dtype
    assert torch.equal(mined.isnan(), torch.tensor([[[True, False, True], [False, True, True]]]))
    assert mined[~mined.isnan()].tolist() == [2.0, 4.0]
    assert keep_largest(losses, targets, 0.2, torch.nan).nan_to_num(0.0).flatten().tolist() == [0.0, 2.0, 0.0, 0.0, 0.0, 0.0]
    assert keep_largest(losses, targets, 0.0, torch.nan).isnan().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_integer_labels_keep_their_dtype(dtype: torch.dtype) -> None:
    labels = torch.tensor([[[3, 4, 5]]], dtype=dtype)
    mined = keep_largest(torch.tensor([[[1.0, 3.0, 2.0]]]), labels, 2 / 3, 255)
    assert mined.dtype == dtype
    assert mined.flatten().tolist() == [255, 4, 5]


def test_the_largest_differences_of_depths_are_kept() -> None:
    """A mean over a share of the pixels: the largest losses of the whole batch, whose sum is divided by their number."""
    generator = torch.Generator().manual_seed(0)
    outputs, targets = torch.randn(2, 1, 3, 4, generator=generator), torch.randn(2, 33, 49, generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.2] = torch.nan
    losses = pixel_losses(outputs, targets)
    count = int(0.25 * targets.numel())
    loss = upsampled_l1(outputs, keep_largest(losses, targets, 0.25, torch.nan))
    assert loss.item() == pytest.approx(losses.flatten().sort().values[-count:].mean().item(), rel=1e-6)  # float32 sums


def test_the_share_falls_linearly() -> None:
    assert [mined_share(0.5, i, 4) for i in (0, 2, 4, 9)] == [1.0, 0.75, 0.5, 0.5]
    assert mined_share(0.5, 0, 0) == 0.5
