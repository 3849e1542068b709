"""Crops: the authors' sizes and scales, picture and label in step, padding, and nothing that depends on who loads them."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fast.bilinear_resize import bilinear_resize
from search.datasets import IGNORE_INDEX, Sample, open_dataset
from search.dense_tasks.segmentation import Segmentation
from search.errors import InputError
from search.training.augmentation import Augmentation, TrainingCrops, stack

MEAN = (10.0, 20.0, 30.0)
TASK = Segmentation(("soil", "crop", "weed"))


def draw(augmentation: Augmentation, image: Any, label: Any, seed: int = 0) -> tuple[Any, Any]:
    return augmentation(image, label, np.random.default_rng(seed))


def whole(height: int, width: int, scale: float) -> Augmentation:
    """Shows all of a picture of height × width at one scale, in the upper left corner."""
    return Augmentation(TASK, (int(height * scale), int(width * scale)), MEAN, scale, scale)


def test_scales_are_the_authors() -> None:
    assert Augmentation(TASK, (33, 33), MEAN).scales() == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]


@given(st.integers(2, 40), st.integers(2, 40), st.sampled_from([0.5, 0.75, 1.0, 1.25, 2.0]), st.integers(0, 99))
def test_a_crop_of_everything_is_the_resized_picture(height: int, width: int, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    label = rng.integers(0, 5, (height, width), dtype=np.uint8)
    size = (int(height * scale), int(width * scale))
    picture, classes = draw(whole(height, width, scale), image, label, seed)
    expected = bilinear_resize(torch.from_numpy(image).permute(2, 0, 1)[None].double(), size)[0].permute(1, 2, 0).numpy()
    source = [np.floor(np.arange(n) * (m - 1) / max(n - 1, 1) + 0.5 + 1e-9) for n, m in zip(size, label.shape, strict=True)]
    nearest = label[source[0].astype(int)[:, None], source[1].astype(int)]
    mirrored = not np.array_equal(classes, nearest)
    if mirrored:
        expected, nearest = expected[:, ::-1], nearest[:, ::-1]
    np.testing.assert_array_equal(classes, nearest)
    if not (mirrored and np.array_equal(nearest, nearest[:, ::-1])) and not np.array_equal(nearest, nearest[:, ::-1]):
        # float32 products of values up to 255 with three roundings: 3 · 255 · 2^-24 = 5e-5
        np.testing.assert_allclose(picture, expected, atol=1e-4, rtol=0)


@given(st.integers(5, 60), st.integers(5, 60), st.integers(0, 999))
def test_picture_and_label_stay_in_step(height: int, width: int, seed: int) -> None:
    """Where a picture shows the class as its grey value, so does every crop, but for the seams that bilinear scaling blurs."""
    label = np.zeros((height, width), np.uint8)
    label[: height // 2, width // 3 :] = 1
    label[height // 2 :, : width // 2] = 2
    image = np.repeat(100 * label[..., None], 3, axis=2)
    picture, classes = draw(Augmentation(TASK, (33, 49), MEAN), image, label, seed)
    shown = classes != IGNORE_INDEX
    # The nearest of four neighbours has a weight of at least 1/4; the others are at most 200 grey values away.
    assert np.all(np.abs(picture[shown] - 100.0 * classes[shown][:, None]) <= 150 + 1e-3)
    flat = shown & np.all(np.isin(picture, (0.0, 100.0, 200.0)), axis=2)
    # Between two classes a blurred pixel can have a third one's grey by chance, at seams alone.
    assert np.mean(picture[flat][:, 0] == 100.0 * classes[flat]) > 0.75
    np.testing.assert_array_equal(picture[~shown], np.broadcast_to(np.array(MEAN, np.float32), picture[~shown].shape))


def test_padding_is_at_the_bottom_and_right_before_mirroring() -> None:
    image, label = np.full((3, 4, 3), 200, np.uint8), np.ones((3, 4), np.uint8)
    seen = set()
    for seed in range(20):
        picture, classes = draw(Augmentation(TASK, (5, 9), MEAN, 1.0, 1.0), image, label, seed)
        mirrored = bool(classes[0, 0] == IGNORE_INDEX)
        expected = np.full((5, 9), IGNORE_INDEX)
        expected[:3, 5:] = 1 if mirrored else IGNORE_INDEX
        expected[:3, :4] = IGNORE_INDEX if mirrored else 1
        np.testing.assert_array_equal(classes, expected)
        np.testing.assert_array_equal(picture[classes == IGNORE_INDEX], np.tile(np.array(MEAN, np.float32), (45 - 12, 1)))
        seen.add(mirrored)
    assert seen == {False, True}


def test_all_scales_corners_and_both_mirror_images_occur() -> None:
    """Over 2,000 draws; each of 7 scales is missed with probability (6/7)^2000 < 1e-130."""
    label = np.arange(200, dtype=np.uint8).reshape(10, 20)
    image = np.repeat(label[..., None], 3, axis=2)
    shown = {draw(Augmentation(TASK, (21, 41), MEAN), image, label, seed)[1].tobytes() for seed in range(2000)}
    assert len(shown) == 7 * 2  # at any scale the whole picture fits, so only scale and mirror image differ
    corners = {draw(Augmentation(TASK, (5, 5), MEAN, 1.0, 1.0), image, label, seed)[1].min() for seed in range(2000)}
    assert corners == {20 * row + column for row in range(6) for column in range(16)}


def test_step_zero_draws_any_scale() -> None:
    label = np.ones((100, 100), np.uint8)
    image = np.zeros((100, 100, 3), np.uint8)
    augmentation = Augmentation(TASK, (201, 201), MEAN, scale_step=0)
    sizes = {int((draw(augmentation, image, label, seed)[1] == 1).sum() ** 0.5) for seed in range(100)}
    assert min(sizes) >= 50
    assert max(sizes) <= 200
    assert len(sizes) > 40


def test_crops_depend_on_seed_and_position_alone() -> None:
    dataset = open_dataset("shapes", "val", None)
    augmentation = Augmentation(TASK, (65, 65), MEAN)
    crops = TrainingCrops(dataset, augmentation, seed=3)
    later = crops[70]
    again = TrainingCrops(dataset, augmentation, seed=3)[70]
    assert torch.equal(later.image, again.image)
    assert torch.equal(later.label, again.label)
    assert not torch.equal(later.image, TrainingCrops(dataset, augmentation, seed=4)[70].image)


def test_every_round_shows_every_picture_once_in_another_order() -> None:
    class Numbers:
        def __len__(self) -> int:
            return 7

        def __getitem__(self, index: int) -> Sample:
            return Sample(np.full((9, 9, 3), index, np.uint8), np.full((9, 9), index, np.uint8), str(index))

    dataset: Any = Numbers()
    crops = TrainingCrops(dataset, Augmentation(TASK, (5, 5), MEAN, 1.0, 1.0), seed=0)
    rounds = [[int(crops[7 * number + i].label[0, 0]) for i in range(7)] for number in range(4)]
    assert all(sorted(order) == list(range(7)) for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1


def test_a_broken_picture_arrives_as_its_sentence() -> None:
    class Broken:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Sample:
            raise InputError("picture x.png is truncated")

    dataset: Any = Broken()
    crops = TrainingCrops(dataset, Augmentation(TASK, (5, 5), MEAN), seed=0)
    assert stack([crops[0], crops[1]]).problem == "picture x.png is truncated"


@pytest.mark.parametrize(("scale", "size"), [(0.5, (30, 48)), (0.75, (45, 72)), (1.25, (76, 121)), (1.75, (106, 169))])
def test_scaled_sizes_are_the_authors(scale: float, size: tuple[int, int]) -> None:
    """Of a picture of 61 × 97, as research/deeplab/core/preprocess_utils.py gave them."""
    _, classes = draw(
        Augmentation(TASK, (130, 200), MEAN, scale, scale), np.zeros((61, 97, 3), np.uint8), np.ones((61, 97), np.uint8)
    )
    rows, columns = (classes == 1).any(axis=1).sum(), (classes == 1).any(axis=0).sum()
    assert (rows, columns) == size
