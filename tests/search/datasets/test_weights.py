"""Weights of classes by the training labels, which are counted once, and anew where the labels are others."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import search.datasets.weights
from search.datasets import Dataset, open_dataset
from search.datasets.weights import completed_loss, kept_counts, weights_in_words
from search.errors import InputError
from search.settings import LossSettings
from tests.search.test_random import write_camvid

BALANCED = LossSettings(class_weights="balanced")


@pytest.fixture
def camvid(tmp_path: Path) -> Dataset:
    return open_dataset("camvid", "train", write_camvid(tmp_path / "camvid"))


def forbid_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("labels were counted again")

    monkeypatch.setattr(search.datasets.weights, "label_counts", refuse)


def test_balanced_weights_are_those_of_the_formula(camvid: Dataset, tmp_path: Path) -> None:
    """N / (K · n), by the K classes that occur: so the pixels of each weigh N / K in all. 0 for the classes that do not."""
    loss = completed_loss(BALANCED, camvid, tmp_path / "cache")
    pixels = np.bincount(np.concatenate([camvid[i].label.ravel() for i in range(len(camvid))]), minlength=11)
    assert loss.numbers is not None
    occur = pixels > 0
    assert 1 < occur.sum() < len(pixels) == len(loss.numbers)
    weighed = pixels * np.array(loss.numbers)
    assert weighed[occur] == pytest.approx(pixels.sum() / occur.sum(), rel=5e-4)  # of four digits
    assert not weighed[~occur].any()
    assert weights_in_words(camvid.task, loss).startswith(f"class weights: sky {loss.numbers[0]:g}, building ")


def test_labels_are_counted_once(camvid: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = completed_loss(BALANCED, camvid, tmp_path / "cache")
    forbid_counting(monkeypatch)
    assert completed_loss(BALANCED, camvid, tmp_path / "cache") == first
    with pytest.raises(AssertionError, match="counted again"):
        kept_counts(camvid, tmp_path / "another cache")


def test_other_labels_are_counted_anew(camvid: Dataset, tmp_path: Path) -> None:
    before = kept_counts(camvid, tmp_path / "cache")
    labels = sorted((tmp_path / "camvid" / "trainannot").iterdir())
    noise = np.random.default_rng(0).integers(6, 8, (33, 49), dtype=np.uint8)
    Image.fromarray(noise).save(labels[0])
    after = kept_counts(open_dataset("camvid", "train", tmp_path / "camvid"), tmp_path / "cache")
    assert (before[7], after[7]) == (0, (noise == 7).sum())
    assert after.sum() == before.sum()


def test_numbers_are_taken_as_they_are_without_counting(
    camvid: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_counting(monkeypatch)
    for weights in (None, tuple(map(float, range(11)))):
        assert completed_loss(LossSettings(class_weights=weights), camvid, tmp_path).class_weights == weights
    with pytest.raises(InputError, match=r"`class_weights` must be 11 numbers, .* in this order: sky, .*, bicyclist; got 2"):
        completed_loss(LossSettings(class_weights=(1.0, 2.0)), camvid, tmp_path)


@pytest.mark.parametrize("weights", ["balanced", (1.0,)])
def test_depth_has_no_class_weights(weights: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_counting(monkeypatch)
    depth = open_dataset("shapes", "train", None, "depth")
    with pytest.raises(InputError, match=r"`class_weights` are for labels that are classes, .* distances: leave them out"):
        completed_loss(LossSettings(class_weights=weights), depth, tmp_path)  # type: ignore[arg-type]


def test_labels_that_say_nothing_are_refused(camvid: Dataset, tmp_path: Path) -> None:
    for path in (tmp_path / "camvid" / "trainannot").iterdir():
        Image.fromarray(np.full((33, 49), 11, np.uint8)).save(path)
    with pytest.raises(InputError, match=r"`class_weights` balanced needs labels, .* correct `train_split`"):
        completed_loss(BALANCED, camvid, tmp_path / "cache")


def test_a_damaged_file_of_counts_is_named(camvid: Dataset, tmp_path: Path) -> None:
    kept_counts(camvid, tmp_path)
    path = tmp_path / "label-counts" / "camvid-train.json"
    path.write_text("{")
    with pytest.raises(InputError, match=r"camvid-train\.json is damaged .*: delete it"):
        kept_counts(camvid, tmp_path)


@pytest.mark.parametrize("weights", [(), (0.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (1.0, float("inf"))], ids=str)
def test_numbers_that_cannot_work_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="`class_weights` must be finite numbers of at least 0, not all of them 0, got"):
        LossSettings(class_weights=weights).check()


@pytest.mark.parametrize("weights", ["Balanced", "1 2", {"car": 4.0}, 3.0, [[1.0], [2.0]]], ids=str)
def test_what_is_no_row_of_numbers_is_refused(weights: Any) -> None:
    words = "`class_weights` must be a number for each class, in the order of the classes, or balanced, got "
    with pytest.raises(InputError, match=re.escape(words + repr(weights))):
        LossSettings(class_weights=weights).check()


@pytest.mark.parametrize(
    "weights", [[0.5, 2], np.array([0.5, 2.0]), torch.tensor([0.5, 2.0])], ids=["list", "array", "tensor"]
)
def test_any_row_of_numbers_is_taken(weights: Any) -> None:
    loss = LossSettings(class_weights=weights)
    loss.check()
    assert loss.class_weights == (0.5, 2.0)


def test_weights_that_work_pass_the_check() -> None:
    for weights in (None, "balanced", (0.0, 2.5)):
        LossSettings(class_weights=weights).check()
