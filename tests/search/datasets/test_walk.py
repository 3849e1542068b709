"""What is in a folder: behind links, too, without end nor debris; and what of it patterns and lists mean."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest

import search.datasets.__main__
from search.datasets import open_dataset
from search.datasets.__main__ import CheckSettings
from search.datasets.check import check_folder
from search.datasets.files import FileDataset, omissions
from search.datasets.walk import walk
from search.errors import InputError
from tests.search import dataset_folders as made

DESCRIPTION = """
classes = ["soil", "crop", "weed"]
images = "images/{split}/{name}.jpg"
labels = "labels/{split}/{name}.png"
"""
FOLDERS = f"{DESCRIPTION}[splits.train]\n[splits.val]\n"
LISTS = f'{DESCRIPTION}[splits.train]\nlist = "train.txt"\n[splits.val]\n'
DEBRIS = (
    "._p0.jpg",
    ".DS_Store",
    "Thumbs.db",
    "desktop.ini",
    ".ipynb_checkpoints/p0.jpg",
    "__MACOSX/p0.jpg",
    "@eaDir/p0.jpg",
)
COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "Müller é") for form in ("NFC", "NFD"))


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"debris")


def write_set(folder: Path, description: str = FOLDERS, names: tuple[str, ...] = ("p0", "p1", "p2")) -> Path:
    """A described folder with the same pictures in train and val; returns the TOML file."""
    for split in ("train", "val"):
        for seed, name in enumerate(names):
            made.write_image(folder / "images" / split / f"{name}.jpg", seed)
            made.write_label(folder / "labels" / split / f"{name}.png", made.values_up_to(3, shift=seed))
    (folder / "set.toml").write_text(description)
    return folder / "set.toml"


def opened(path: Path, split: str = "train") -> FileDataset:
    dataset = open_dataset(str(path), split, None)
    assert isinstance(dataset, FileDataset)
    for index in range(len(dataset)):
        dataset[index]
    return dataset


def names_of(path: Path, split: str = "train") -> list[str]:
    return [pair.name for pair in opened(path, split).pairs]


# The walk


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "a.jpg", "deep/b.jpg")
    (tmp_path / "data").mkdir()
    for name in ("first", "second"):  # two names of one folder are two folders
        (tmp_path / "data" / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "deep" / "back").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "itself").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "lost.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "data" / "circle").symlink_to(tmp_path / "data" / "circle")
    found = walk(tmp_path / "data")
    names = ("first/a.jpg", "first/deep/b.jpg", "second/a.jpg", "second/deep/b.jpg")
    assert found.files == [tmp_path / "data" / name for name in names]
    assert found.dangling == [tmp_path / "data" / name for name in ("circle", "lost.jpg")]
    assert not found.hidden


def test_debris_is_told_apart(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg", "b/c.jpg", *DEBRIS)
    found = walk(tmp_path)
    assert found.files == [tmp_path / "a.jpg", tmp_path / "b" / "c.jpg"]
    assert found.hidden == sorted(tmp_path / name.split("/")[0] for name in DEBRIS)  # a folder stands for what is in it


def test_a_folder_that_is_hidden_itself_can_be_given(tmp_path: Path) -> None:
    write(tmp_path / ".data", "a.jpg")
    assert walk(tmp_path / ".data").files == [tmp_path / ".data" / "a.jpg"]
    assert walk(tmp_path / "nowhere").files == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="who is root may read everything")
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write(tmp_path, "locked/a.jpg")
    (tmp_path / "locked").chmod(0)
    with pytest.raises(InputError, match=r"cannot read folder .*locked \(Permission denied\): allow reading it"):
        walk(tmp_path)


# Described folders


def test_folders_behind_links_are_listed(tmp_path: Path) -> None:
    path = write_set(tmp_path / "data")
    for kind in ("images", "labels"):
        (tmp_path / "data" / kind / "train").rename(tmp_path / kind)
        (tmp_path / "data" / kind / "train").symlink_to(tmp_path / kind)
        (tmp_path / kind / "more").mkdir()
        (tmp_path / kind / "more").rmdir()
    (tmp_path / "field").mkdir()
    made.write_image(tmp_path / "field" / "p3.jpg")
    made.write_label(tmp_path / "field" / "p3.png", made.values_up_to(3))
    (tmp_path / "images" / "field").symlink_to(tmp_path / "field")
    (tmp_path / "labels" / "field").symlink_to(tmp_path / "field")
    assert names_of(path) == ["field/p3", "p0", "p1", "p2"]


def test_debris_is_no_picture_and_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_set(tmp_path)
    write(tmp_path / "images" / "train", *DEBRIS, "notes.txt", "p9.jpeg")
    write(tmp_path / "labels" / "train", "._p0.png")
    (tmp_path / "images" / "train" / "p8.jpg").symlink_to("nowhere")
    assert names_of(path) == ["p0", "p1", "p2"]
    said = (
        f"train: 3 pictures; left out: 8 hidden (such as {tmp_path}/images/train/.DS_Store), "
        f"1 linked to nothing (such as {tmp_path}/images/train/p8.jpg), "
        f"2 not named as the patterns say (such as {tmp_path}/images/train/notes.txt)"
    )
    assert omissions(opened(path)) == said
    assert omissions(opened(path, "val")) == ""
    search.datasets.__main__.main(CheckSettings(command="check", dataset=str(path)))
    assert f"\n{said}\n" in capsys.readouterr().out


@pytest.mark.parametrize("image", [COMPOSED, DECOMPOSED])
@pytest.mark.parametrize("label", [COMPOSED, DECOMPOSED])
@pytest.mark.parametrize("listed", [COMPOSED, DECOMPOSED, None])
def test_a_name_is_one_in_every_form_of_unicode(tmp_path: Path, image: str, label: str, listed: str | None) -> None:
    path = write_set(tmp_path, FOLDERS if listed is None else LISTS)
    for kind in ("images", "labels"):
        for old in (tmp_path / kind / "train").iterdir():
            old.unlink()
    made.write_image(tmp_path / "images" / "train" / f"{image}.jpg")
    made.write_label(tmp_path / "labels" / "train" / f"{label}.png", made.values_up_to(3))
    made.write_list(tmp_path / "train.txt", [listed or ""])
    assert names_of(path) == [COMPOSED]


def test_folders_and_lists_may_be_named_in_the_other_form(tmp_path: Path) -> None:
    path = write_set(tmp_path)
    for old in tmp_path.glob("*/train"):
        old.rename(old.with_name(DECOMPOSED))
    made.write_list(tmp_path / f"{DECOMPOSED}.txt", ["p1"])
    split = f'[splits.train]\nfolder = "{COMPOSED}"\nlist = "{COMPOSED}.txt"\n[splits.val]\n'
    path.write_text(f"{DESCRIPTION}{split}")
    assert names_of(path) == ["p1"]


def test_a_suffix_may_be_in_capitals(tmp_path: Path) -> None:
    path = write_set(tmp_path)
    (tmp_path / "images" / "train" / "p1.jpg").rename(tmp_path / "images" / "train" / "p1.JPG")
    (tmp_path / "labels" / "train" / "p2.png").rename(tmp_path / "labels" / "train" / "p2.PNG")
    assert names_of(path) == ["p0", "p1", "p2"]
    made.write_image(tmp_path / "images" / "train" / "p1.jpg")  # which is what the pattern means
    dataset = opened(path)
    assert dataset.pairs[1].image.name == "p1.jpg"
    assert "1 not named as the patterns say (such as" in omissions(dataset)


def test_a_label_whose_image_has_another_suffix_says_so(tmp_path: Path) -> None:
    path = write_set(tmp_path)
    other = (tmp_path / "images" / "train" / "p1.jpg").rename(tmp_path / "images" / "train" / "p1.jpeg")
    with pytest.raises(InputError, match=rf"label .*p1\.png has no image that fits the pattern of images, unlike {other}; "):
        opened(path)
    for image in (tmp_path / "images" / "train").iterdir():
        image.rename(image.with_suffix(".tif"))
    with pytest.raises(InputError, match=r"no file in .*; correct it or `data_dir` \(there is .*images/train/p0\.tif\)"):
        opened(path)


def test_what_lies_beside_pictures_and_is_none_is_passed_over(tmp_path: Path) -> None:
    path = write_set(tmp_path)
    path.write_text(path.read_text().replace("{name}.jpg", "{name}.*"))
    for name in ("p0.json", "p1.txt", "p2.jpg.xmp"):
        (tmp_path / "images" / "train" / name).write_text("{}")
    assert names_of(path) == ["p0", "p1", "p2"]
    assert "3 not named as the patterns say (such as" in omissions(opened(path))


# Lists


@pytest.mark.parametrize(
    "line",
    [
        "p1",
        "p1.jpg",
        "p1.JPG",
        "train/p1.jpg",
        "images/train/p1",
        "./images/train/p1.jpg labels/train/p1.png",
        "images\\train\\p1.jpg;labels\\train\\p1.png",
        '"images/train/p1.jpg","labels/train/p1.png"',
        "/home/somebody/set/images/train/p1.jpg /home/somebody/set/labels/train/p1.png",
        "/home/somebody/set/images/train/p1.JPG",
        "C:\\set\\images\\train\\p1.JPG",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_line_means_its_picture(tmp_path: Path, line: str, encoding: str) -> None:
    path = write_set(tmp_path, LISTS)
    (tmp_path / "train.txt").write_bytes(f"p2\r\n\r\n{line}\r\n".encode(encoding))
    assert names_of(path) == ["p2", "p1"]
    assert "1 not in train.txt (such as" in omissions(opened(path))


def test_labels_without_an_image_are_counted_where_a_list_decides(tmp_path: Path) -> None:
    path = write_set(tmp_path, LISTS)
    made.write_list(tmp_path / "train.txt", ["p2", "p1"])
    (tmp_path / "images" / "train" / "p0.jpg").unlink()
    said = f"train: 2 pictures; left out: 1 without an image (such as {tmp_path}/labels/train/p0.png)"
    assert omissions(opened(path)) == said


def test_names_may_contain_what_separates_columns(tmp_path: Path) -> None:
    path = write_set(tmp_path, LISTS, names=("a b", "a", "a b, c"))
    lines = ["images/train/a b, c.jpg labels/train/a b, c.png", "images/train/a b.jpg,labels/train/a b.png", "a"]
    made.write_list(tmp_path / "train.txt", lines)
    assert names_of(path) == ["a b, c", "a b", "a"]


def test_the_second_column_is_no_picture(tmp_path: Path) -> None:
    for name in ("a", "b"):
        made.write_image(tmp_path / f"{name}.png")
        made.write_label(tmp_path / "labels" / f"{name}.png", np.zeros(made.SIZE, np.uint8))
    path = tmp_path / "set.toml"
    path.write_text(
        'classes = ["soil"]\nimages = "{name}.png"\nlabels = "labels/{name}.png"\n[splits.train]\nlist = "train.txt"\n'
    )
    made.write_list(tmp_path / "train.txt", ["x/a.png y/labels/b.png", "b.png labels/b.png"])
    with pytest.raises(InputError, match=r"train\.txt, line 1: has a beside the label of b, and labels are found by names"):
        opened(path)


def test_a_line_without_a_picture_is_said_with_its_number_and_the_nearest_name(tmp_path: Path) -> None:
    path = write_set(tmp_path, LISTS, names=("street_01", "street_02", "field_01"))
    made.write_list(tmp_path / "train.txt", ["street_01", "", "stret_02.jpg", "q", "field_01"])
    problems = check_folder(str(path), None, ("train",), 1).problems
    assert problems == [
        f"{tmp_path}/train.txt, line 3: 'stret_02.jpg' is no picture that fits 'images/{{split}}/{{name}}.jpg'; the nearest "
        "is 'street_02': correct the line, or restore the picture",
        f"{tmp_path}/train.txt, line 4: 'q' is no picture that fits 'images/{{split}}/{{name}}.jpg'; correct the line",
    ]
    made.write_list(tmp_path / "train.txt", ["street_03"])
    with pytest.raises(
        InputError, match=r"no line of .*train\.txt names a picture: .*line 1: 'street_03' .* is 'street_0\d': "
    ):
        opened(path)


# Other data sets


def test_debris_among_the_cities_is_passed_over(tmp_path: Path) -> None:
    expected = made.write_cityscapes(tmp_path)
    write(tmp_path / "leftImg8bit" / "train", ".DS_Store", "aachen/._aachen_000003_000019_leftImg8bit.png")
    write(tmp_path / "gtFine" / "train", "aachen/._aachen_000003_000019_gtFine_labelIds.png", "__MACOSX/x_gtFine_labelIds.png")
    dataset = open_dataset("cityscapes", "train", tmp_path)
    assert [dataset[index].name for index in range(len(dataset))] == list(expected["train"])
    assert omissions(dataset).startswith("train: 3 pictures; left out: 4 hidden (such as ")


def test_debris_among_the_labels_of_voc_is_passed_over(tmp_path: Path) -> None:
    expected = made.add_converted_sbd(tmp_path, made.write_voc(tmp_path))
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    write(voc / "SegmentationClassAug", "._2008_000015.png")
    val = voc / "ImageSets" / "Segmentation" / "val.txt"
    val.write_text("\ufeff" + val.read_text(), encoding="utf-8")
    dataset = open_dataset("pascal_voc", "train_aug", tmp_path)
    assert [dataset[index].name for index in range(len(dataset))] == list(expected)
    assert open_dataset("pascal_voc", "val", tmp_path)[0].name == "2007_000033"
