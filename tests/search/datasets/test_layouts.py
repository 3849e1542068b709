"""Cityscapes, PASCAL VOC with SBD and PASCAL-Person-Part: every layout gives the right classes, real samples included."""

import importlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

from search.datasets import IGNORE_INDEX, Dataset, cityscapes, open_dataset, split_names
from search.datasets.matlab import PERSON_PARTS, read_class_map, read_person_parts
from search.errors import InputError
from tests.search import dataset_folders as made
from tests.search.dataset_folders import Labels
from tests.strategies import rng_seeds

SAMPLES = made.SHARED / "samples"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="the real samples of ../shared are not on this machine")


def assert_holds(dataset: Dataset, expected: Labels) -> None:
    """The named labels in their order, as uint8 classes, with images of their size."""
    samples = [dataset[i] for i in range(len(dataset))]
    assert [sample.name for sample in samples] == list(expected)
    for image, label, name in samples:
        assert image.dtype == label.dtype == np.uint8
        assert image.shape == (*label.shape, 3)
        np.testing.assert_array_equal(label, expected[name])
        assert set(np.unique(label)) <= {*range(len(made.classes_of(dataset).class_names)), IGNORE_INDEX}


# The layouts


WRITERS: dict[str, tuple[str, Callable[[Path], dict[str, Labels]]]] = {
    "cityscapes": ("cityscapes", made.write_cityscapes),
    "pascal_voc": ("pascal_voc", made.write_voc),
    "pascal_person_part": ("pascal_person_part", made.write_person_part),
    "PASCAL-Part's originals": ("pascal_person_part", lambda folder: made.write_person_part(folder, originals=True)),
}
every_layout = pytest.mark.parametrize(("name", "write"), WRITERS.values(), ids=WRITERS.keys())


@every_layout
def test_every_split_holds_its_labels(tmp_path: Path, name: str, write: Callable[[Path], dict[str, Labels]]) -> None:
    expected = write(tmp_path)
    assert set(split_names(name)) - {"train_aug"} == expected.keys()
    for split, labels in expected.items():
        dataset = open_dataset(name, split, tmp_path)
        assert (dataset.name, dataset.split) == (name, split)
        assert_holds(dataset, labels)
        with pytest.raises(IndexError):
            dataset[len(labels)]


@every_layout
def test_label_ids_are_the_values_of_the_files(tmp_path: Path, name: str, write: Callable[[Path], dict[str, Labels]]) -> None:
    write(tmp_path)
    dataset = open_dataset(name, "train", tmp_path)
    assert (
        len(made.classes_of(dataset).label_ids)
        == len(made.classes_of(dataset).class_names)
        == len(made.classes_of(dataset).palette)
    )
    assert made.classes_of(dataset).label_ids == (
        tuple(made.CITYSCAPES_IDS) if name == "cityscapes" else tuple(range(len(made.classes_of(dataset).class_names)))
    )


@every_layout
def test_fingerprint_follows_the_files(tmp_path: Path, name: str, write: Callable[[Path], dict[str, Labels]]) -> None:
    write(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    before = open_dataset(name, "train", tmp_path / "first").fingerprint()
    assert before == open_dataset(name, "train", tmp_path / "second").fingerprint()
    assert before != open_dataset(name, "val", tmp_path / "first").fingerprint()
    with next((tmp_path / "first").rglob("*_000008*.jpg" if name != "cityscapes" else "aachen*_leftImg8bit.png")).open(
        "ab"
    ) as file:
        file.write(b"0")
    assert before != open_dataset(name, "train", tmp_path / "first").fingerprint()


@pytest.mark.parametrize("list_style", ["none", "train_aug.txt", "trainaug.txt of paths"])
@pytest.mark.parametrize("add", [made.add_converted_sbd, made.add_sbd_archive], ids=["converted", "archive"])
def test_train_aug_is_all_that_is_labelled_but_val(
    tmp_path: Path, add: Callable[[Path, dict[str, Labels]], Labels], list_style: str
) -> None:
    expected = add(tmp_path, made.write_voc(tmp_path))
    lists = tmp_path / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation"
    if list_style != "none":
        expected = dict(reversed(expected.items()))  # the list's order counts
    if list_style == "train_aug.txt":
        made.write_list(lists / "train_aug.txt", expected)
    elif list_style == "trainaug.txt of paths":
        made.write_list(lists / "trainaug.txt", [f"/JPEGImages/{n}.jpg /SegmentationClassAug/{n}.png" for n in expected])
    assert len(expected) == 4
    assert_holds(open_dataset("pascal_voc", "train_aug", tmp_path), expected)


@pytest.mark.parametrize(
    ("name", "split", "counts"),
    [
        ("cityscapes", "train", (2975,)),
        ("cityscapes", "val", (500,)),
        ("cityscapes", "trainval", (3475,)),
        ("cityscapes", "test", (1525,)),
        ("pascal_voc", "train", (1464,)),
        ("pascal_voc", "train_aug", (10582,)),
        ("pascal_voc", "val", (1449,)),
        ("pascal_voc", "trainval", (2913,)),
        ("pascal_voc", "test", (1456,)),
        ("pascal_person_part", "train", (1716,)),
        ("pascal_person_part", "val", (1817, 1831)),
        ("camvid", "train", (367,)),
        ("camvid", "val", (101,)),
        ("camvid", "test", (233,)),
    ],
)
def test_official_numbers_of_pictures(name: str, split: str, counts: tuple[int, ...]) -> None:
    assert importlib.import_module(f"search.datasets.{name}").LENGTHS[split] == counts


# What cannot be used


def remove(pattern: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def write_text(pattern: str, text: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for path in folder.glob(pattern):
            path.write_text(text)

    return spoil


def write_values(pattern: str, value: int) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for path in folder.glob(pattern):
            made.write_label(path, np.full(made.SIZE, value, np.uint8))

    return spoil


def add_converted_without_image(folder: Path) -> None:
    made.add_converted_sbd(folder, made.write_voc(folder))
    (folder / "VOCdevkit/VOC2012/JPEGImages/2010_000002.jpg").unlink()


VOC = "VOCdevkit/VOC2012"
BAD_FOLDERS: dict[str, tuple[str, str, Callable[[Path], object], str]] = {
    "cityscapes: empty": ("cityscapes", "train", remove("*"), r"`data_dir` .* is empty; expected leftImg8bit/train/"),
    "cityscapes: no labels": ("cityscapes", "val", remove("gtFine"), r"folder .*gtFine/val is missing; .* unpack them there"),
    "cityscapes: no image": (
        "cityscapes",
        "val",
        remove("leftImg8bit/val/*/*"),
        r"leftImg8bit/val holds no <city>/\*_leftImg8bit\.png",
    ),
    "cityscapes: one image less": (
        "cityscapes",
        "train",
        remove("leftImg8bit/train/*/*000003*"),
        r"label .*aachen_000003_000019_gtFine_labelIds\.png has no image .*; restore the image, or remove the label$",
    ),
    "cityscapes: two labels less": (
        "cityscapes",
        "val",
        remove("gtFine/val/*/*labelIds.png"),
        r"none of the 2 labels of val is there, such as .*_gtFine_labelIds\.png: restore them",
    ),
    "cityscapes: a file among the cities": (
        "cityscapes",
        "train",
        lambda folder: (folder / "leftImg8bit/train/notes.txt").write_text(""),
        r"notes\.txt lies among the folders of the cities; remove it",
    ),
    "cityscapes: label value": (
        "cityscapes",
        "train",
        write_values("gtFine/train/*/*labelIds.png", 34),
        r"labelIds\.png holds the value 34; allowed are 7, 8, 11 to 13, .* for the classes and 0 to 6, .* for void: it must",
    ),
    "voc: no devkit": (
        "pascal_voc",
        "train",
        remove("VOCdevkit/VOC2012"),
        r"folder .*JPEGImages is missing; expected VOCdevkit",
    ),
    "voc: no list": ("pascal_voc", "val", remove(f"{VOC}/ImageSets/*/val.txt"), r"list .*val\.txt is missing; expected"),
    "voc: empty list": (
        "pascal_voc",
        "val",
        write_text(f"{VOC}/ImageSets/*/val.txt", "\n"),
        r"list .*val\.txt is empty; restore",
    ),
    "voc: name twice": (
        "pascal_voc",
        "val",
        write_text(f"{VOC}/ImageSets/*/val.txt", "2007_000033\n2007_000033\n"),
        r"val\.txt lists 2007_000033 2 times; keep one of its lines",
    ),
    "voc: no SBD": (
        "pascal_voc",
        "train_aug",
        remove("nothing"),
        r"train_aug of pascal_voc needs SBD's labels: unpack them as",
    ),
    "voc: augmented label without image": (
        "pascal_voc",
        "train_aug",
        add_converted_without_image,
        r"2010_000002\.jpg is missing though .*SegmentationClassAug names it",
    ),
    "voc: label value": (
        "pascal_voc",
        "train",
        write_values(f"{VOC}/SegmentationClass/*.png", 21),
        r"holds the value 21; allowed are 0 to 20 for the classes and 255 for void",
    ),
    "person part: no labels": (
        "pascal_person_part",
        "train",
        remove("SegmentationPart"),
        r"SegmentationPart is missing; expected JPEGImages/, SegmentationPart/ \(or Annotations_Part/\) and list/train_id",
    ),
    "person part: label value": (
        "pascal_person_part",
        "train",
        write_values("SegmentationPart/*.png", 7),
        r"holds the value 7; allowed are 0 to 6 for the classes",
    ),
}


@pytest.mark.parametrize(("name", "split", "spoil", "sentence"), BAD_FOLDERS.values(), ids=BAD_FOLDERS.keys())
def test_bad_folder_is_refused_by_one_sentence(
    tmp_path: Path, name: str, split: str, spoil: Callable[[Path], object], sentence: str
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    WRITERS[name][1](folder)
    spoil(folder)
    with pytest.raises(InputError, match=sentence) as caught:
        list(map(open_dataset(name, split, folder).__getitem__, range(2)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cityscapes", "pascal_voc", "pascal_person_part"])
def test_a_folder_is_asked_for(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"`dataset` {name} needs `data_dir`: the folder"):
        open_dataset(name, "train", None)
    with pytest.raises(InputError, match=r"`data_dir` .*nowhere is not a folder; expected"):
        open_dataset(name, "train", tmp_path / "nowhere")


def test_archives_beside_an_empty_folder_are_not_unpacked(tmp_path: Path) -> None:
    for archive in ("leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip"):
        (tmp_path / archive).write_bytes(b"PK\5\6" + bytes(18))  # torchvision alone would unpack them
    with pytest.raises(InputError, match=r"leftImg8bit/train is missing"):
        open_dataset("cityscapes", "train", tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


# MATLAB files


BAD_MATLAB: dict[str, tuple[Callable[[Path], NDArray[np.uint8]], bytes | dict[str, object], str]] = {
    "empty": (read_class_map, b"", r"is truncated or no MATLAB file"),
    "text": (read_person_parts, b"hello world" * 30, r"is truncated or no MATLAB file"),
    "no GTcls": (read_class_map, {"GTinst": 1}, r"holds no GTcls\.Segmentation; it must be a file of SBD's folder cls"),
    "no map": (read_class_map, {"GTcls": {"Boundaries": 1}}, r"holds no GTcls\.Segmentation"),
    "no objects": (read_person_parts, {"anno": {"imname": "a"}}, r"is no list of objects and their parts \(AttributeError"),
    "unknown part": (
        read_person_parts,
        {"anno": {"objects": np.array([made.part_object("person", [("tail", np.ones(made.SIZE, bool))])], made.OBJECT)}},
        r"is no list of objects and their parts \(KeyError: 'tail'\)",
    ),
}


@pytest.mark.parametrize(("read", "content", "sentence"), BAD_MATLAB.values(), ids=BAD_MATLAB.keys())
def test_bad_matlab_file_is_refused_by_one_sentence(
    tmp_path: Path, read: Callable[[Path], NDArray[np.uint8]], content: bytes | dict[str, object], sentence: str
) -> None:
    path = tmp_path / "a.mat"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        savemat(path, content)
    with pytest.raises(InputError, match=rf"label {path} {sentence}") as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("write", [made.write_sbd_label, made.write_parts])
@pytest.mark.parametrize("kept", [0.03, 0.3, 0.5, 0.7, 0.97])
def test_truncated_matlab_file_is_refused(
    tmp_path: Path, write: Callable[[Path, NDArray[np.uint8]], None], kept: float
) -> None:
    path = tmp_path / "a.mat"
    write(path, made.values_up_to(7))
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(InputError, match=str(path)):
        (read_class_map if write is made.write_sbd_label else read_person_parts)(path)


@given(seed=rng_seeds())
def test_damaged_matlab_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """As the originals are, compressed; damage may hit what does not matter, but nothing else than InputError may come."""
    path = tmp_path_factory.mktemp("damaged") / "a.mat"
    savemat(path, {"GTcls": {"Segmentation": made.values_up_to(7)}}, do_compression=True)
    content, rng = bytearray(path.read_bytes()), np.random.default_rng(seed)
    for place in rng.integers(0, len(content), 4).tolist():
        content[place] = rng.integers(256)
    path.write_bytes(content)
    try:
        read_class_map(path)
        message = ""
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    assert not message or message.startswith(f"label {path} ")


def test_every_part_of_a_person_has_a_class() -> None:
    sides = {
        name: [f"l{name}", f"r{name}"] for name in ("ear", "eye", "ebrow", "uarm", "larm", "hand", "uleg", "lleg", "foot")
    }
    classes = {
        1: ["head", "hair", "nose", "mouth", *sides["ear"], *sides["eye"], *sides["ebrow"]],
        2: ["torso", "neck"],
        3: sides["uarm"],
        4: [*sides["larm"], *sides["hand"]],
        5: sides["uleg"],
        6: [*sides["lleg"], *sides["foot"]],
    }
    assert {part: PERSON_PARTS[part] for parts in classes.values() for part in parts} == {
        part: number for number, parts in classes.items() for part in parts
    }


# Real samples


def pixels(path: Path) -> NDArray[np.uint8]:
    return np.array(Image.open(path), np.uint8)


def table(path: Path) -> list[dict[str, str]]:
    header, *rows = (line.split("\t") for line in path.read_text().splitlines())
    return [dict(zip(header, row, strict=True)) for row in rows]


@needs_samples
def test_cityscapes_classes_are_the_official_ones() -> None:
    rows = table(SAMPLES / "cityscapes_facts" / "cityscapes_labels.tsv")
    official = sorted((row for row in rows if row["trainId"] not in ("255", "-1")), key=lambda row: int(row["trainId"]))
    assert tuple(row["name"] for row in official) == cityscapes.CLASS_NAMES
    assert cityscapes.PALETTE.tolist() == [list(map(int, row["color"].split(","))) for row in official]
    assert tuple(int(row["id"]) for row in official) == cityscapes.LABEL_IDS
    assert {int(row["id"]): int(row["trainId"]) for row in rows if int(row["id"]) >= 0} == dict(cityscapes._LABELS.train_ids)


@needs_samples
@pytest.mark.parametrize("split", ["train", "val", "trainval", "test"])
def test_cityscapes_of_official_size_is_whole(tmp_path: Path, split: str) -> None:
    image, label = tmp_path / "image.png", tmp_path / "label.png"
    made.write_image(image)
    made.write_label(label, made.values_up_to(34))
    for part in ("train", "val") if split == "trainval" else (split,):
        for line in (SAMPLES / "cityscapes_facts" / "lists" / f"{part}.txt").read_text().split():
            mask = line.replace("leftImg8bit/", "gtFine/", 1).replace("_leftImg8bit.png", "_gtFine_labelIds.png")
            for source, target in ((image, tmp_path / line), (label, tmp_path / mask)):
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(source, target)
    dataset = open_dataset("cityscapes", split, tmp_path)
    assert len(dataset) == {"train": 2975, "val": 500, "trainval": 3475, "test": 1525}[split]


@needs_samples
def test_real_voc_pairs_have_their_labels(tmp_path: Path) -> None:
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    real = SAMPLES / "pascal_voc" / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass"):
        voc.mkdir(parents=True, exist_ok=True)
        (voc / folder).symlink_to(real / folder)
    names = (real / "ImageSets" / "Segmentation" / "sample.txt").read_text().split()
    made.write_list(voc / "ImageSets" / "Segmentation" / "val.txt", names)
    dataset = open_dataset("pascal_voc", "val", tmp_path)
    assert_holds(dataset, {name: pixels(real / "SegmentationClass" / f"{name}.png") for name in names})
    rows = table(SAMPLES / "pascal_voc" / "voc_labels.tsv")[:21]
    assert [name.replace(" ", "") for name in made.classes_of(dataset).class_names] == [row["name"] for row in rows]
    assert made.classes_of(dataset).palette.tolist() == [list(map(int, row["color"].split(","))) for row in rows]


@needs_samples
def test_voc_of_official_size_is_whole(tmp_path: Path) -> None:
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    shutil.copytree(SAMPLES / "pascal_voc" / "VOCdevkit" / "VOC2012" / "ImageSets", voc / "ImageSets")
    image, label = tmp_path / "image.jpg", tmp_path / "label.png"
    made.write_image(image)
    made.write_label(label, made.values_up_to(21))
    lists = {
        split: (voc / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split() for split in split_names("pascal_voc")
    }
    annotated = {*lists["trainval"]}
    augmented = annotated | {*lists["train_aug"]}
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug"):
        (voc / folder).mkdir()
    for name in augmented | {*lists["test"]}:
        os.link(image, voc / "JPEGImages" / f"{name}.jpg")
    for folder, names in (("SegmentationClass", annotated), ("SegmentationClassAug", augmented)):
        for name in names:
            os.link(label, voc / folder / f"{name}.png")
    lengths = {split: len(open_dataset("pascal_voc", split, tmp_path)) for split in lists}
    assert lengths == {"train": 1464, "train_aug": 10582, "val": 1449, "trainval": 2913, "test": 1456}
    os.chmod(voc / "ImageSets" / "Segmentation", 0o755)  # the samples may be read-only, and their copy with them
    (voc / "ImageSets" / "Segmentation" / "train_aug.txt").unlink()
    without_list = open_dataset("pascal_voc", "train_aug", tmp_path)
    assert len(without_list) == 10582
    assert {pair.name for pair in without_list.pairs} == {*lists["train_aug"]}  # type: ignore[attr-defined]


@needs_samples
def test_sbd_files_hold_the_maps_they_were_made_from() -> None:
    paths = sorted((SAMPLES / "sbd_synthetic" / "cls").glob("*.mat"))
    assert len(paths) == 5
    for path in paths:
        own = pixels(SAMPLES / "pascal_voc" / "VOCdevkit" / "VOC2012" / "SegmentationClass" / f"{path.stem}.png")
        np.testing.assert_array_equal(read_class_map(path), np.where(own == IGNORE_INDEX, 0, own))


@needs_samples
def test_real_person_parts_have_their_labels(tmp_path: Path) -> None:
    real = SAMPLES / "pascal_person_part"
    for folder in ("JPEGImages", "SegmentationPart"):
        (tmp_path / folder).symlink_to(real / folder)
    names = (real / "list" / "sample.txt").read_text().split()
    made.write_list(tmp_path / "list" / "val_id.txt", names)
    dataset = open_dataset("pascal_person_part", "val", tmp_path)
    assert len(dataset) == 12
    assert_holds(dataset, {name: pixels(real / "SegmentationPart" / f"{name}.png") for name in names})
    rows = table(real / "person_part_labels.tsv")
    assert made.classes_of(dataset).class_names == tuple(row["name"] for row in rows)
    assert made.classes_of(dataset).palette.tolist() == [list(map(int, row["color"].split(","))) for row in rows]


@needs_samples
def test_real_annotations_of_parts_give_the_published_maps(tmp_path: Path) -> None:
    real = SAMPLES / "pascal_part_mat"
    for folder in ("JPEGImages", "Annotations_Part"):
        (tmp_path / folder).symlink_to(real / folder)
    names = sorted(path.stem for path in (real / "Annotations_Part").glob("*.mat"))
    assert len(names) == 18
    made.write_list(tmp_path / "list" / "train_id.txt", names)
    expected = {name: pixels(real / "derived" / "SegmentationPerson7" / f"{name}.png") for name in names}
    assert_holds(open_dataset("pascal_person_part", "train", tmp_path), expected)
    assert set(np.unique(np.concatenate([label.ravel() for label in expected.values()]))) == set(range(7))
