"""Scores against a count by hand, predictions in the servers' numbers and places, overlays, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import search.evaluate
from fast.checkpoint import save_network
from fast.segmentation import SegmentationNetwork, predict_scales
from search.datasets import IGNORE_INDEX, Sample, cityscapes, open_dataset, pascal_voc
from search.errors import InputError
from search.evaluate import EvaluateSettings, count_pixels, overlay, predict_classes, prediction_path, write_prediction
from tests.search.composed import changed, composed
from tests.search.test_random import write_camvid
from tests.search.test_train import small_network


class Made:
    """Pictures of several sizes; a class's grey value is its number, and one class is ignored here and there."""

    name, split = "made", "val"
    class_names: tuple[str, ...] = ("sky", "road", "car")
    label_ids: tuple[int, ...] = (7, 3, 200)
    palette = np.array([(0, 0, 255), (90, 90, 90), (255, 0, 0)], np.uint8)

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

    def fingerprint(self) -> str:
        return "made"

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
    np.testing.assert_array_equal(count_pixels(network, dataset).numpy(), expected)
    assert network.seen == [(1, 3, 33, 49), (1, 3, 33, 33), (1, 3, 17, 17)]  # the next 16·k + 1


def test_padding_is_the_mean_pixel_and_not_scored() -> None:
    network = Reader()
    image = np.full((5, 7, 3), 2, np.uint8)
    with torch.no_grad():
        network.backbone.mean.fill_(1.0)
    assert torch.equal(predict_classes(network, image, pad_to=(17, 33)), torch.full((5, 7), 2))
    assert network.seen == [(1, 3, 17, 33)]


def test_scales_and_flips_are_averaged() -> None:
    torch.manual_seed(0)
    network = small_network(3).eval()
    with torch.no_grad():
        network.head.classifier.weight.normal_()
    image = np.random.default_rng(0).integers(0, 256, (33, 49, 3), dtype=np.uint8)
    actual = predict_classes(network, image, scales=(0.5, 1.0, 1.5), flip=True)
    images = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    expected = predict_scales(network, images, scales=(0.5, 1.0, 1.5), flip=True).argmax(dim=1)[0]
    assert torch.equal(actual, expected)


def test_predictions_are_label_ids_in_the_servers_places(tmp_path: Path) -> None:
    predicted = np.array([[0, 1], [18, 13]], np.uint8)

    class City(Made):
        name, class_names, label_ids, palette = "cityscapes", cityscapes.CLASS_NAMES, cityscapes.LABEL_IDS, cityscapes.PALETTE

    path = prediction_path(tmp_path, City(), "bonn_000000_000019")
    assert path == tmp_path / "bonn_000000_000019.png"
    write_prediction(path, predicted, City())
    with Image.open(path) as picture:
        assert picture.mode == "L"
        np.testing.assert_array_equal(np.array(picture), [[7, 8], [33, 26]])  # road, sidewalk, bicycle, car

    class Voc(Made):
        name, split, palette = "pascal_voc", "test", pascal_voc.PALETTE
        label_ids = tuple(range(21))

    path = prediction_path(tmp_path, Voc(), "2008_000006")
    assert path == tmp_path / "results/VOC2012/Segmentation/comp6_test_cls/2008_000006.png"
    write_prediction(path, predicted, Voc())
    with Image.open(path) as picture:
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.array(picture), predicted)
        assert picture.convert("RGB").getpixel((1, 0)) == (128, 0, 0)


def test_an_overlay_shows_prediction_and_label_side_by_side() -> None:
    dataset = Made()
    sample = Sample(np.full((20, 480, 3), 100, np.uint8), np.full((20, 480), 2, np.uint8), "x")
    sample.label[:, :240] = IGNORE_INDEX
    page = np.array(overlay(sample, np.zeros((20, 480), np.uint8), dataset)).astype(int)
    row = 22 + 10  # a heading, then the pictures
    blended = [np.round(0.4 * 100 + 0.6 * np.array(colour)) for colour in ((0, 0, 255), (56, 56, 56), (255, 0, 0))]
    for column, colour in zip((8 + 240, 8 + 488 + 120, 8 + 488 + 360), blended, strict=True):
        assert np.abs(page[row, column] - colour).max() <= 1  # Pillow truncates
    assert (page[:22] < 128).any()  # text
    assert page.shape[1] == 2 * 480 + 3 * 8


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> EvaluateSettings:
    folder = tmp_path_factory.mktemp("tiny")
    data_dir = write_camvid(folder / "camvid")
    names = open_dataset("camvid", "val", data_dir).class_names
    save_network(folder / "n.safetensors", small_network(len(names)), class_names=names)
    return composed(EvaluateSettings, network=folder / "n.safetensors", dataset="camvid", data_dir=data_dir, device="cpu")


def test_the_command_prints_and_writes_everything(
    tiny: EvaluateSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(
        tiny, predictions=tmp_path / "predictions", overlays=tmp_path / "overlays", json=tmp_path / "scores.json"
    )
    search.evaluate.main(settings)
    table = capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    dataset = open_dataset("camvid", "val", tiny.data_dir)
    assert all(f"\n{name} " in table for name in dataset.class_names)
    assert f"mIOU {100 * scores['mean_iou']:>20.2f}".split() == table[table.index("mIOU") :].split()[:2]
    confusion = np.zeros((11, 11), np.int64)
    for sample in (dataset[i] for i in range(len(dataset))):
        predicted = np.array(Image.open(tmp_path / "predictions" / f"{sample.name}.png"))
        for label, prediction in zip(sample.label.ravel(), predicted.ravel(), strict=True):
            if label != IGNORE_INDEX:
                confusion[label, prediction] += 1
        assert (tmp_path / "overlays" / f"{sample.name}.png").is_file()
    assert scores["confusion"] == confusion.tolist()
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - np.diagonal(confusion)
    expected = (np.diagonal(confusion)[union > 0] / union[union > 0]).mean()
    assert scores["mean_iou"] == pytest.approx(expected, rel=1e-12)  # float64
    assert [value is None for value in scores["class_iou"].values()] == (union == 0).tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": ()}, "`scales` must be numbers above 0"),
        ({"scales": (1.0, -1.0)}, "`scales` must be numbers above 0"),
        ({"pad_to": (17, 17)}, r"picture 0 is .*larger than `pad_to`"),
        ({"network": Path("absent.safetensors")}, r"absent\.safetensors.*`network`"),
        ({"dataset": "shapes", "data_dir": None}, "trained on 11 classes .* shapes has 8"),
        ({"split": "nonsense"}, "split 'nonsense'"),
    ],
)
def test_what_cannot_work_is_refused(tiny: EvaluateSettings, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        search.evaluate.main(changed(tiny, **change))
