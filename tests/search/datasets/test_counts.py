"""Counting labels: of files without reading the images, and of data sets that are objects in Python."""

from pathlib import Path

import numpy as np

from search.datasets import open_dataset
from search.datasets.counts import label_counts, label_of
from search.datasets.described import open_split
from tests.search.dataset_folders import values_up_to, write_image, write_label

TOML = """
classes = ["a", "b", "c"]
images = "{split}/images/{name}.png"
labels = "{split}/labels/{name}.png"
[splits.train]
[splits.val]
[splits.test]
labelled = false
"""


def test_labels_of_files_are_counted_though_the_images_are_damaged(tmp_path: Path) -> None:
    (tmp_path / "set.toml").write_text(TOML)
    for index in range(2):
        write_image(tmp_path / f"train/images/{index}.png")
        write_label(tmp_path / f"train/labels/{index}.png", values_up_to(3, shift=index, void=True))
    dataset = open_split(tmp_path / "set.toml", "train", None)
    for pair in dataset.pairs:
        pair.image.write_bytes(b"no picture")
    assert label_counts(dataset, range(2)).tolist() == [27, 27, 26, 16]  # 40 pixels each, from 0 and from 1 on, and 8 void


def test_a_split_without_labels_has_unlabelled_pixels_of_the_images_size(tmp_path: Path) -> None:
    (tmp_path / "set.toml").write_text(TOML)
    write_image(tmp_path / "test/images/0.png", size=(4, 7))
    dataset = open_split(tmp_path / "set.toml", "test", None)
    assert label_counts(dataset, [0]).tolist() == [0, 0, 0, 28]


def test_labels_that_are_no_files_are_those_of_the_samples() -> None:
    dataset = open_dataset("shapes", "val", None)
    assert np.array_equal(label_of(dataset, 3), dataset[3].label)
    assert label_counts(dataset, [3]).sum() == 257 * 257
