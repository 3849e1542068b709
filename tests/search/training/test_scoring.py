"""Scores against a count by hand, and what pictures are padded with and averaged over."""

import numpy as np
import pytest
import torch
from torch import Tensor

import search.training.memory
from fast.segmentation import SegmentationNetwork, predict_scales
from search.datasets import IGNORE_INDEX, Fingerprint, Sample
from search.dense_tasks import DenseTask, Scores
from search.dense_tasks.segmentation import Segmentation
from search.errors import InputError
from search.settings import RecipeSettings
from search.training.scoring import count_split, predict_picture, require_validation
from tests.search.test_train import small_network


class Made:
    """Pictures of several sizes; a class's grey value is its number, and one class is ignored here and there."""

    name, split = "made", "val"
    task: DenseTask = Segmentation(
        ("sky", "road", "car"), np.array([(0, 0, 255), (90, 90, 90), (255, 0, 0)], np.uint8), (7, 3, 200)
    )

    def __init__(self, sizes: tuple[tuple[int, int], ...] = ((33, 49), (20, 30), (17, 17))) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng(index)
        label = rng.integers(0, 3, self.sizes[index]).astype(np.uint8)
        image = np.repeat(label[..., None], 3, axis=2)
        label[rng.random(label.shape) < 0.1] = IGNORE_INDEX
        return Sample(image, label, f"city/{index}")

    def fingerprint(self) -> Fingerprint:
        return Fingerprint("made", "made")

    def problems(self) -> list[str]:
        return []


class Reader(SegmentationNetwork):
    """Reads the class from the grey value of its pixel, except that it takes every sky for road."""

    def __init__(self) -> None:
        super().__init__(small_network(3).backbone, small_network(3).head)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(tuple(images.shape))
        grey = images[:, :1].round()
        return torch.cat([torch.full_like(grey, -9.0), (grey <= 1) * 5.0, (grey == 2) * 5.0], dim=1)


def test_scores_are_those_counted_by_hand() -> None:
    dataset, network = Made(), Reader()
    expected = np.zeros((3, 3), np.int64)
    for index in range(3):
        for label in dataset[index].label[dataset[index].label != IGNORE_INDEX]:
            expected[label, max(label, 1)] += 1
    np.testing.assert_array_equal(count_split(network, dataset, indices=range(3)).numpy(), expected)
    assert network.seen == [(1, 3, 33, 49), (1, 3, 33, 33), (1, 3, 17, 17)]  # the next 16·k + 1


def test_padding_is_the_mean_pixel_and_not_scored() -> None:
    network = Reader()
    image = np.full((5, 7, 3), 2, np.uint8)
    with torch.no_grad():
        network.backbone.mean.fill_(1.0)
    assert torch.equal(predict_picture(network, image, Made.task, pad_to=(17, 33)), torch.full((5, 7), 2))
    assert network.seen == [(1, 3, 17, 33)]


def test_scales_and_flips_are_averaged() -> None:
    torch.manual_seed(0)
    network = small_network(3).eval()
    with torch.no_grad():
        network.head.classifier.weight.normal_()
    image = np.random.default_rng(0).integers(0, 256, (33, 49, 3), dtype=np.uint8)
    actual = predict_picture(network, image, Made.task, scales=(0.5, 1.0, 1.5), flip=True)
    images = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    expected = predict_scales(network, images, scales=(0.5, 1.0, 1.5), flip=True).argmax(dim=1)[0]
    assert torch.equal(actual, expected)


def test_a_class_that_is_nowhere_has_no_score_and_no_part_in_the_mean() -> None:
    confusion = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    assert Made.task.scores(confusion) == Scores((3 / 4 + 4 / 5) / 2, (3 / 4, 4 / 5, None))
    nothing = Segmentation(("a", "b")).scores(np.zeros((2, 2), np.int64))
    assert np.isnan(nothing.score)
    assert nothing.details == (None, None)


def test_what_a_validation_needs_is_tried_where_it_cannot_be_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, network = Made(((33, 49), (20, 30))), Reader().train()
    require_validation(network, dataset, RecipeSettings(), torch.device("cpu"))
    assert network.seen == []
    assert not network.training
    monkeypatch.setattr(search.training.memory, "free_memory", lambda: None)
    require_validation(network, dataset, RecipeSettings(), torch.device("cpu"))
    assert network.seen == [(1, 3, 33, 49)]
    require_validation(network, dataset, RecipeSettings(tile_size=(33, 33)), torch.device("cpu"))
    assert network.seen[1:] == [(1, 3, 33, 33)] * 2

    def full(images: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(network, "forward", full)
    message = r"picture city/0 \(made val\) of 33 × 49 pixels needs more memory than the device has: "
    with pytest.raises(InputError, match=message):
        require_validation(network, dataset, RecipeSettings(), torch.device("cpu"))
    network.head.context.pin_pooling((3, 3))
    with pytest.raises(InputError, match=r"`tile_size` 33 17 is smaller than the windows .*: give at least 33 33"):
        require_validation(network, dataset, RecipeSettings(tile_size=(33, 17)), torch.device("cpu"))
