"""Predictions in the servers' numbers and places, overlays, what the command prints and writes, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import search.evaluate
import search.training.memory
from fast.checkpoint import load_network, save_network
from fast.segmentation import SegmentationNetwork
from search.datasets import IGNORE_INDEX, Sample, cityscapes, open_dataset, pascal_voc
from search.dense_tasks.segmentation import Segmentation
from search.errors import InputError
from search.evaluate import EvaluateSettings
from search.reports.predictions import overlay, prediction_path, write_prediction
from search.training.scoring import count_split
from search.training.tiles import Tiles
from tests.search import dataset_folders as made
from tests.search.composed import changed, composed
from tests.search.test_random import write_camvid
from tests.search.test_train import small_network
from tests.search.training.test_scoring import Made


def test_predictions_are_label_ids_in_the_servers_places(tmp_path: Path) -> None:
    predicted = np.array([[0, 1], [18, 13]], np.uint8)

    class City(Made):
        name = "cityscapes"
        task = Segmentation(cityscapes.CLASS_NAMES, cityscapes.PALETTE, cityscapes.LABEL_IDS, grey_files=True)

    path = prediction_path(tmp_path, City(), "bonn_000000_000019")
    assert path == tmp_path / "bonn_000000_000019.png"
    write_prediction(path, predicted, City.task)
    with Image.open(path) as picture:
        assert picture.mode == "L"
        np.testing.assert_array_equal(np.array(picture), [[7, 8], [33, 26]])  # road, sidewalk, bicycle, car

    class Voc(Made):
        name, split = "pascal_voc", "test"
        task = Segmentation(pascal_voc.CLASS_NAMES, pascal_voc.PALETTE)

    path = prediction_path(tmp_path, Voc(), "2008_000006")
    assert path == tmp_path / "results/VOC2012/Segmentation/comp6_test_cls/2008_000006.png"
    write_prediction(path, predicted, Voc.task)
    with Image.open(path) as picture:
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.array(picture), predicted)
        assert picture.convert("RGB").getpixel((1, 0)) == (128, 0, 0)


def test_an_overlay_shows_prediction_and_label_side_by_side() -> None:
    sample = Sample(np.full((20, 480, 3), 100, np.uint8), np.full((20, 480), 2, np.uint8), "x")
    sample.label[:, :240] = IGNORE_INDEX
    maps = {"prediction of x": np.zeros((20, 480), np.uint8), "label": sample.label}
    page = np.array(overlay(sample.image, maps, Made.task)).astype(int)
    row = 22 + 10  # a heading, then the pictures
    blended = [np.round(0.4 * 100 + 0.6 * np.array(colour)) for colour in ((0, 0, 255), (255, 255, 255), (255, 0, 0))]
    for column, colour in zip((8 + 240, 8 + 488 + 120, 8 + 488 + 360), blended, strict=True):
        assert np.abs(page[row, column] - colour).max() <= 1  # Pillow truncates
    assert (page[:22] < 128).any()  # text
    assert page.shape[1] == 2 * 480 + 3 * 8


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> EvaluateSettings:
    folder = tmp_path_factory.mktemp("tiny")
    data_dir = write_camvid(folder / "camvid")
    names = open_dataset("camvid", "val", data_dir).task.outputs
    with torch.random.fork_rng():
        torch.manual_seed(1)
        save_network(folder / "n.safetensors", small_network(len(names)), task={"class_names": names})
    return composed(EvaluateSettings, network=folder / "n.safetensors", dataset="camvid", data_dir=data_dir, device="cpu")


def test_the_command_prints_and_writes_everything(
    tiny: EvaluateSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = changed(
        tiny, predictions=tmp_path / "predictions", overlays=tmp_path / "overlays", out=tmp_path / "scores.json"
    )
    search.evaluate.main(settings)
    table = capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    dataset = open_dataset("camvid", "val", tiny.data_dir)
    assert all(f"\n{name} " in table for name in dataset.task.outputs)
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
        ({"tile_size": (20, 17)}, r"`tile_size` 20 17 must be 16·k \+ 1 each, such as 17 17"),
        ({"tile_size": (17, 25)}, r"`tile_size` 17 25 must be 16·k \+ 1 each, such as 17 33"),  # 8·k + 1 it is
        ({"tile_overlap": -0.1}, "`tile_overlap` must be at least 0 and below 1"),
        ({"pad_to": (17, 17)}, r"picture 0 is .*larger than `pad_to`"),
        ({"network": Path("absent.safetensors")}, r"absent\.safetensors.*`network`"),
        ({"dataset": "shapes", "data_dir": None}, "trained on 11 classes .* shapes has 8"),
        ({"split": "nonsense"}, "split 'nonsense'"),
    ],
)
def test_what_cannot_work_is_refused(tiny: EvaluateSettings, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        search.evaluate.main(changed(tiny, **change))


def test_pictures_that_do_not_fit_in_memory_are_refused_before_any_is_predicted(
    tiny: EvaluateSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "camvid"
    shutil.copytree(tiny.data_dir or "", folder)
    names = [sample.name for sample in (open_dataset("camvid", "val", folder)[i] for i in range(2))]
    for part in ("val", "valannot"):
        path = folder / part / f"{names[1]}.png"
        Image.open(path).resize((300, 200), Image.Resampling.NEAREST).save(path)
    monkeypatch.setattr(search.training.memory, "free_memory", lambda: 7_000_000)
    settings = changed(tiny, data_dir=folder, predictions=tmp_path / "predictions", out=tmp_path / "scores.json")
    with pytest.raises(InputError, match=rf"picture {names[1]} of .* pixels needs about .*: give `tile_size` 65 65$"):
        search.evaluate.main(settings)
    assert list(tmp_path.iterdir()) == [folder]


def test_tiles_and_output_stride_are_those_that_are_asked_for(tiny: EvaluateSettings, tmp_path: Path) -> None:
    settings = changed(tiny, out=tmp_path / "scores.json", tile_size=(17, 25), tile_overlap=0.5, output_stride=8)
    search.evaluate.main(settings)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["tile_size"], scores["tile_overlap"], scores["output_stride"]) == ([17, 25], 0.5, 8)
    network, dataset = load_network(tiny.network, output_stride=8)[0], open_dataset("camvid", "val", tiny.data_dir)
    counts = [
        count_split(network, dataset, indices=range(len(dataset)), tiles=tiles).tolist()
        for tiles in (Tiles((17, 25), 0.5), Tiles((17, 25), 0.0), None)
    ]
    assert scores["confusion"] == counts[0]
    assert counts[0] not in counts[1:]
    search.evaluate.main(changed(settings, tile_size=None))
    assert json.loads((tmp_path / "scores.json").read_text())["confusion"] == counts[2]


def test_scores_say_the_tiles_and_output_stride_that_the_networks_file_says(tiny: EvaluateSettings, tmp_path: Path) -> None:
    network, description = load_network(tiny.network)
    path, out = tmp_path / "tiled.safetensors", tmp_path / "scores.json"
    evaluation = {"dataset": "camvid", "tile_size": (17, 33), "tile_overlap": 0.5}
    save_network(path, network, task={"class_names": description["class_names"]}, evaluation=evaluation)

    def said(**changes: Any) -> list[Any]:
        search.evaluate.main(changed(tiny, network=path, out=out, **changes))
        return [json.loads(out.read_text())[name] for name in ("tile_size", "tile_overlap", "output_stride")]

    assert said() == [[17, 33], 0.5, 16]
    assert said(tile_overlap=0.0) == [[17, 33], 0.0, 16]
    assert said(tile_size="whole") == ["whole", None, 16]


@pytest.mark.parametrize(
    "said", [{"evaluation": {"dataset": "camvid"}}, {"source": {"training": {"data": {"dataset": "camvid"}}}}]
)
def test_the_networks_own_data_set_is_the_default(tiny: EvaluateSettings, tmp_path: Path, said: dict[str, Any]) -> None:
    network, description = load_network(tiny.network)
    path = tmp_path / "n.safetensors"
    save_network(path, network, task={"class_names": description["class_names"]}, **said)
    search.evaluate.main(changed(tiny, network=path, dataset=None))
    search.evaluate.main(changed(tiny, out=tmp_path / "given.json"))
    ours, given = (json.loads(file.read_text()) for file in (tmp_path / "n-camvid-val.json", tmp_path / "given.json"))
    assert ours["confusion"] == given["confusion"]
    with pytest.raises(InputError, match="`dataset` camvid needs `data_dir`"):
        search.evaluate.main(changed(tiny, network=path, dataset=None, data_dir=None))


def test_a_data_set_that_is_not_known_or_not_there_is_asked_for(tiny: EvaluateSettings, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"n\.safetensors does not say what it was trained on: give the `dataset`"):
        search.evaluate.main(changed(tiny, dataset=None))
    network, description = load_network(tiny.network)
    path = tmp_path / "n.safetensors"
    task = {"class_names": description["class_names"]}
    save_network(path, network, task=task, evaluation={"dataset": "gone/street.toml"})
    with pytest.raises(InputError, match=r"was trained on gone/street\.toml, which is not there: give that file as `dataset`"):
        search.evaluate.main(changed(tiny, network=path, dataset=None))


def test_voc_is_padded_as_the_authors_do_unless_told_otherwise(tmp_path: Path) -> None:
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    made.write_image(voc / "JPEGImages" / "a.jpg", size=(20, 30))
    made.write_label(voc / "SegmentationClass" / "a.png", np.zeros((20, 30), np.uint8))
    made.write_list(voc / "ImageSets" / "Segmentation" / "val.txt", ["a"])
    seen: list[tuple[int, ...]] = []

    def watched(self: SegmentationNetwork, images: Tensor) -> Tensor:
        seen.append(tuple(images.shape[2:]))
        return torch.zeros(1, 21, 1, 1)

    path = tmp_path / "n.safetensors"
    save_network(path, small_network(21), task={"class_names": pascal_voc.CLASS_NAMES})
    settings = composed(EvaluateSettings, network=path, dataset="pascal_voc", data_dir=tmp_path, device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SegmentationNetwork, "forward", watched)
        search.evaluate.main(settings)
        assert json.loads((tmp_path / "n-pascal_voc-val.json").read_text())["pad_to"] == [513, 513]
        search.evaluate.main(changed(settings, pad_to="own"))
        assert json.loads((tmp_path / "n-pascal_voc-val.json").read_text())["pad_to"] == "own"
        search.evaluate.main(changed(settings, pad_to=(65, 49)))
        count_split(small_network(21), open_dataset("pascal_voc", "val", tmp_path), indices=[0])  # as a training validates
    assert seen == [(513, 513), (33, 33), (65, 49), (513, 513)]


def test_predictions_of_own_data_are_label_ids_in_the_classes_colours(tmp_path: Path) -> None:
    task = Segmentation(("soil", "crop"), np.array([(1, 2, 3), (4, 5, 60)], np.uint8), (9, 4))
    write_prediction(tmp_path / "a.png", np.array([[0, 1]], np.uint8), task)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.array(picture), [[9, 4]])
        assert [picture.convert("RGB").getpixel((x, 0)) for x in (0, 1)] == [(1, 2, 3), (4, 5, 60)]


def test_label_ids_above_255_have_16_bits(tmp_path: Path) -> None:
    write_prediction(tmp_path / "a.png", np.array([[0, 1]], np.uint8), Segmentation(("soil", "crop"), label_ids=(9, 300)))
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "I;16"
        np.testing.assert_array_equal(np.array(picture), [[9, 300]])


def test_a_legend_has_what_occurs_and_room_for_it() -> None:
    names = ("a class whose name is as long as a sentence", *(f"class {i}" for i in range(1, 9)))
    task = Segmentation(names)
    image, label = np.zeros((20, 480, 3), np.uint8), np.zeros((20, 480), np.uint8)
    one = overlay(image, {"x": label}, task)
    nine = overlay(image, {"x": (np.arange(9600) % 9).reshape(20, 480).astype(np.uint8)}, task)
    assert one.size == (496, 22 + 20 + 8 + 22 + 8)
    assert nine.size == (496, one.height + 8 * 22)  # one column, because the longest name leaves no room for two
    assert nine.getpixel((8 + 4, one.height - 8 - 22 + 22 + 4)) == task.details[1].colour


UNLABELLED = """
classes = ["soil", "crop"]
images = "{split}/{name}.jpg"
labels = "{split}/{name}.png"
[splits.val]
[splits.test]
[splits.field]
labelled = false
"""


def test_a_split_without_labels_is_refused_unless_they_are_not_public(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("val", "test", "field"):
        made.write_image(tmp_path / split / "a.jpg", size=(33, 33))
        made.write_label(tmp_path / split / "a.png", np.full((33, 33), IGNORE_INDEX, np.uint8))
    (tmp_path / "set.toml").write_text(UNLABELLED)
    save_network(tmp_path / "n.safetensors", small_network(2), task={"class_names": ("soil", "crop")})
    named = {"network": tmp_path / "n.safetensors", "dataset": str(tmp_path / "set.toml"), "device": "cpu"}
    with pytest.raises(InputError, match=r"^no pixel of set val has a label to score by: give another `split`, or correct"):
        search.evaluate.main(composed(EvaluateSettings, **named))
    assert not (tmp_path / "n-set-val.json").exists()
    said = capsys.readouterr().err
    assert said.startswith("warning: 100.00 % of the pixels of val are 255, which does not count because ")
    for split in ("test", "field"):
        search.evaluate.main(composed(EvaluateSettings, split=split, **named))
        assert json.loads((tmp_path / f"n-set-{split}.json").read_text())["mean_iou"] is None
    assert "warning" not in capsys.readouterr().err
