"""Pictures that occur more than once, by their paths and by what their files hold; and silence where none does."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from search.datasets.check import check_folder
from search.datasets.copies import copies, in_common, overlaps
from search.datasets.described import open_split
from search.datasets.files import FileDataset
from search.datasets.look import look_at
from tests.search.dataset_folders import write_image, write_label

TOML = """
classes = ["a", "b", "c"]
images = "{split}/images/{name}.png"
labels = "{split}/labels/{name}.png"
[splits.train]
[splits.val]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four pictures and labels in each split, all different."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "memory"))
    folder = tmp_path / "set"
    for seed, split in enumerate(("train", "val")):
        for index in range(4):
            write_image(folder / split / "images" / f"{index}.png", seed=10 * seed + index)
            values = np.random.default_rng(10 * seed + index).integers(0, 3, (6, 8)).astype(np.uint8)
            write_label(folder / split / "labels" / f"{index}.png", values)
    (folder / "set.toml").write_text(TOML)
    return folder


def splits(folder: Path) -> list[FileDataset]:
    return [open_split(folder / "set.toml", split, None) for split in ("train", "val")]


def test_different_pictures_are_passed_over_in_silence(folder: Path) -> None:
    assert overlaps(splits(folder)) == copies(splits(folder)) == []


def test_a_training_picture_under_another_name_in_val_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(folder / "train/images/2.png", folder / "val/images/1.png")
    train, val = splits(folder)
    (said,) = copies([train, val])
    both = f"{folder / 'train/images/2.png'} and {folder / 'val/images/1.png'}"
    assert said == (
        f"train and val have 1 picture in common under other names, such as {both}, so that scores on val are too good: "
        "take them out of one"
    )
    assert overlaps([train, val]) == []
    assert f"  {said}" in check_folder(str(folder / "set.toml"), None, (), 1).text
    look_at(train, val)
    assert f"warning: {said}" in capsys.readouterr().err


def test_a_picture_of_both_lists_is_a_problem_and_warned_of_at_the_start(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "set.toml").write_text(
        TOML.replace("{split}", "train").replace("[splits.val]", '[splits.val]\nlist = "val.txt"')
    )
    (folder / "val.txt").write_text("3\n")
    train, val = splits(folder)
    said = f"train and val have pictures in common (1, such as {folder / 'train/images/3.png'}); take them out of one"
    assert overlaps([train, val]) == [said]
    assert copies([train, val]) == []  # it is one file
    assert said in check_folder(str(folder / "set.toml"), None, (), 1).problems
    look_at(train, val)
    assert f"warning: {said}" in capsys.readouterr().err


def test_what_a_split_has_in_common_with_others_is_said_by_path_and_by_content(folder: Path) -> None:
    train, val = splits(folder)
    assert in_common(val, [train]) == in_common(val, []) == ""
    assert in_common(val, [train, val]) == "val is used already"
    twice = replace(val, split="twice", pairs=val.pairs[2:])
    assert in_common(twice, [train, val]) == (
        f"val and twice have 2 pictures in common, such as {folder / 'val/images/2.png'}"
    )
    shutil.copy(folder / "train/images/2.png", folder / "val/images/1.png")
    both = f"{folder / 'train/images/2.png'} and {folder / 'val/images/1.png'}"
    assert in_common(val, [train]) == f"train and val have 1 picture in common under other names, such as {both}"


def test_one_label_for_all_pictures_is_said(folder: Path) -> None:
    for index in range(1, 4):
        shutil.copy(folder / "train/labels/0.png", folder / f"train/labels/{index}.png")
    first = folder / "train/labels/0.png"
    assert copies(splits(folder)) == [f"all 4 labels of train are the same, such as {first}: give each picture its own"]
    for index in range(1, 4):  # one picture four times has one label
        shutil.copy(folder / "train/images/0.png", folder / f"train/images/{index}.png")
    assert copies(splits(folder)) == []


def test_one_picture_with_two_labels_is_said(folder: Path) -> None:
    shutil.copy(folder / "val/images/0.png", folder / "val/images/3.png")
    both = f"{folder / 'val/images/0.png'} and {folder / 'val/images/3.png'}"
    assert copies(splits(folder)) == [f"{both} of val are the same picture and have different labels: take one out"]


def test_missing_files_are_left_to_others(folder: Path) -> None:
    train, val = splits(folder)
    (folder / "train/images/0.png").unlink()
    (folder / "val/labels/0.png").unlink()
    assert copies([train, val]) == []
