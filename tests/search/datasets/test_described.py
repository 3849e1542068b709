"""A folder described by a TOML file: every way to say where its pictures are and what labels mean, right and wrong."""

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

import search.random
from search.datasets import IGNORE_INDEX, described, open_dataset, open_splits, split_names
from search.datasets.check import check_folder
from search.datasets.files import FileDataset
from search.datasets.labels import LabelReader
from search.dense_tasks.depth import Depth
from search.dense_tasks.segmentation import Segmentation, voc_palette
from search.errors import InputError
from search.settings import DataSettings, TaskName
from tests.search import dataset_folders as made
from tests.search.composed import changed, composed

DOCUMENTATION = Path(__file__).parents[3] / "docs" / "datasets.md"
FOLDERS = """
classes = ["soil", "crop", "weed"]
images = "{split}/images/{name}.png"
labels = "{split}/labels/{name}.png"

[splits.train]
[splits.val]
"""
LISTS = """
classes = ["soil", "crop", "weed"]
images = "images/{name}.*"
labels = "labels/{name}_mask.png"

[splits.train]
list = "train.txt"
[splits.val]
list = "val.txt"
"""


SHARES = """
classes = ["soil", "crop", "weed"]
images = "images/{name}.png"
labels = "labels/{name}.png"

[splits.train]
share = 0.7
[splits.val]
share = 0.3
"""
COLOURS = """
[label_colours]
soil = [10, 20, 30]
crop = [[0, 0, 255], [0, 255, 0]]
weed = [255, 0, 0]
"""


def write_folders(folder: Path, description: str = FOLDERS) -> Path:
    """Two pictures in each of train/ and val/, values 0 to 2 and 255; returns the TOML file."""
    for split in ("train", "val"):
        for seed, name in enumerate(("b", "a")):
            made.write_image(folder / split / "images" / f"{name}.png", seed)
            made.write_label(folder / split / "labels" / f"{name}.png", made.values_up_to(3, shift=seed, void=True))
    return write_description(folder, description)


def write_lists(folder: Path, description: str = LISTS) -> Path:
    """Pictures of several kinds in one folder, told apart by lists; returns the TOML file."""
    for seed, name in enumerate(("a.jpg", "field/b.png", "field/c.png", "d.webp")):
        made.write_image(folder / "images" / name, seed)
        made.write_label(folder / "labels" / f"{name.rpartition('.')[0]}_mask.png", made.values_up_to(3, shift=seed))
    made.write_list(folder / "train.txt", ["field/c", "", "a"])
    made.write_list(folder / "val.txt", ["d", "field/b"])
    return write_description(folder, description)


def write_description(folder: Path, description: str) -> Path:
    path = folder / "fields.toml"
    path.write_text(description)
    return path


def open_first(path: Path, data_dir: Path | None = None, split: str = "train") -> FileDataset:
    dataset = open_dataset(str(path), split, data_dir)
    assert isinstance(dataset, FileDataset)
    dataset[0]
    return dataset


# What is read


@pytest.mark.parametrize("elsewhere", [False, True])
def test_split_folders(tmp_path: Path, elsewhere: bool) -> None:
    path = write_folders(tmp_path / "data")
    if elsewhere:
        (tmp_path / "descriptions").mkdir()
        path = path.rename(tmp_path / "descriptions" / path.name)
    assert split_names(str(path)) == ("train", "val")
    for split in ("train", "val"):
        dataset = open_dataset(str(path), split, tmp_path / "data" if elsewhere else None)
        assert (dataset.name, dataset.split, made.classes_of(dataset).class_names) == (
            "fields",
            split,
            ("soil", "crop", "weed"),
        )
        assert [dataset[i].name for i in range(len(dataset))] == ["a", "b"]
        image, label, _ = dataset[1]
        np.testing.assert_array_equal(image, np.array(Image.open(tmp_path / "data" / split / "images" / "b.png")))
        np.testing.assert_array_equal(label, made.values_up_to(3, void=True))
        assert image.dtype == label.dtype == np.uint8
        assert made.classes_of(dataset).label_ids == (0, 1, 2)
        np.testing.assert_array_equal(made.classes_of(dataset).palette, voc_palette(4)[1:])  # soil is no background


def test_lists_give_the_order_and_any_file_that_fits_counts(tmp_path: Path) -> None:
    path = write_lists(tmp_path)
    train, val = (open_dataset(str(path), split, None) for split in ("train", "val"))
    assert [train[i].name for i in range(2)] == ["field/c", "a"]
    assert [val[i].name for i in range(2)] == ["d", "field/b"]
    np.testing.assert_array_equal(train[0].label, made.values_up_to(3, shift=2))


def test_folders_with_other_names_and_splits_without_labels(tmp_path: Path) -> None:
    write_folders(tmp_path)
    (tmp_path / "train").rename(tmp_path / "training set")
    made.write_image(tmp_path / "test" / "images" / "z.png")
    path = write_description(
        tmp_path,
        FOLDERS.replace("[splits.train]", '[splits.train]\nfolder = "training set"') + "[splits.test]\nlabelled = false\n",
    )
    assert len(open_first(path)) == 2
    image, label, name = open_dataset(str(path), "test", None)[0]
    assert (name, label.shape) == ("z", image.shape[:2])
    assert np.all(label == IGNORE_INDEX)


@given(
    values=st.lists(st.integers(0, 255), min_size=6, max_size=6, unique=True),
    by_name=st.booleans(),
)
def test_label_ids_decide_what_a_value_means(
    tmp_path_factory: pytest.TempPathFactory, values: list[int], by_name: bool
) -> None:
    *ids, ignored, other = values
    meanings = [0, 1, 2, 1]
    names = ("soil", "crop", "weed")
    table = "\n".join(
        f"{value} = " + (f'"{names[meaning]}"' if by_name else str(meaning))
        for value, meaning in zip(ids, meanings, strict=True)
    )
    folder = tmp_path_factory.mktemp("fields")
    path = write_folders(folder, f"ignore = [{ignored}]\n{FOLDERS}\n[label_ids]\n{table}\n")
    stored = np.resize(np.array([*ids, ignored], np.uint8), made.SIZE)
    expected = np.resize(np.array([*meanings, IGNORE_INDEX], np.uint8), made.SIZE)
    made.write_label(folder / "train" / "labels" / "a.png", stored)
    dataset = open_first(path)
    np.testing.assert_array_equal(dataset[0].label, expected)
    assert made.classes_of(dataset).label_ids == tuple(ids[:3])

    made.write_label(folder / "train" / "labels" / "a.png", np.full(made.SIZE, other, np.uint8))
    with pytest.raises(
        InputError, match=rf"holds the value {other}; allowed are .* correct the file, or ignore and label_ids"
    ):
        dataset[0]


def test_name_colours_and_count(tmp_path: Path) -> None:
    colours = [[1, 2, 3], [4, 5, 6], [7, 8, 255]]
    path = write_folders(tmp_path, f'name = "my-fields"\ncolours = {colours}\n{FOLDERS}'.replace("[splits.val]", "count = 7"))
    dataset = open_first(path)
    assert (dataset.name, made.classes_of(dataset).palette.tolist(), dataset.official_lengths) == ("my-fields", colours, (7,))


PALETTE = [(9, 60, 9), (80, 200, 30), (200, 40, 90)]


def write_palette(path: Path, colours: Sequence[tuple[int, int, int]]) -> None:
    """Give a label file these colours, from value 0 on; it then holds no other values."""
    with Image.open(path) as picture:
        values = np.array(picture)
    label = Image.fromarray(np.where(values < len(colours), values, 0).astype(np.uint8))
    label.putpalette([value for colour in colours for value in colour])
    label.save(path)


def test_label_files_bring_their_colours(tmp_path: Path) -> None:
    path = write_folders(tmp_path, FOLDERS + "[splits.test]\nlabelled = false\n")
    made.write_image(tmp_path / "test" / "images" / "z.png")
    write_palette(tmp_path / "train" / "labels" / "a.png", [*PALETTE, (1, 1, 1)])
    write_palette(tmp_path / "val" / "labels" / "a.png", PALETTE[::-1])
    for split in ("train", "val", "test"):  # a class has one colour in all of them
        dataset = open_dataset(str(path), split, None)
        assert made.classes_of(dataset).palette.tolist() == [list(colour) for colour in PALETTE]
    colours = [[1, 2, 3], [4, 5, 6], [7, 8, 255]]
    write_description(tmp_path, f"colours = {colours}\n{FOLDERS}")
    assert made.classes_of(open_first(path)).palette.tolist() == colours


def test_label_files_colour_the_classes_by_their_label_ids(tmp_path: Path) -> None:
    path = write_folders(tmp_path, f'{FOLDERS}[label_ids]\n0 = "weed"\n1 = "soil"\n2 = "crop"\n')
    write_palette(tmp_path / "train" / "labels" / "a.png", PALETTE)
    dataset = open_first(path)
    assert made.classes_of(dataset).label_ids == (1, 2, 0)
    assert made.classes_of(dataset).palette.tolist() == [list(PALETTE[value]) for value in (1, 2, 0)]


@pytest.mark.parametrize(
    "colours",
    [[(value, value, value) for value in range(3)], PALETTE[:2], [PALETTE[0], PALETTE[1], PALETTE[1]]],
    ids=["ramp of greys", "too few", "two alike"],
)
def test_a_palette_that_tells_no_classes_apart_is_no_palette(tmp_path: Path, colours: Sequence[tuple[int, int, int]]) -> None:
    path = write_folders(tmp_path)
    write_palette(tmp_path / "train" / "labels" / "a.png", colours)
    assert made.classes_of(open_first(path)).palette.tolist() == voc_palette(4)[1:].tolist()


def test_only_a_background_is_black_by_default(tmp_path: Path) -> None:
    path = write_folders(tmp_path, FOLDERS.replace('"soil"', '"Background"'))
    assert made.classes_of(open_first(path)).palette.tolist() == voc_palette(3).tolist()
    (tmp_path / "train" / "labels" / "a.png").write_bytes(b"no picture")
    assert made.classes_of(cast(FileDataset, open_dataset(str(path), "val", None))).palette.tolist() == voc_palette(3).tolist()


def test_fingerprint_follows_the_files_and_the_meaning_of_labels(tmp_path: Path) -> None:
    path = write_folders(tmp_path)
    before = open_first(path).fingerprint()
    path.write_text(f"# a remark\n{FOLDERS}")
    assert open_first(path).fingerprint() == before
    path.write_text(f'{FOLDERS}[label_ids]\n0 = "crop"\n1 = "soil"\n2 = "weed"\n')
    assert open_first(path).fingerprint() != before


def documented_examples() -> list[str]:
    return re.findall(r"^```toml\n(.*?)^```", DOCUMENTATION.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def test_the_documented_example_is_complete_and_works(tmp_path: Path) -> None:
    example, *others = documented_examples()
    path = tmp_path / "street.toml"
    path.write_text(example)
    description = described.load_description(path)
    elsewhere = {"depth_scale", "label_colours", "split_seed"}
    assert set(tomllib.loads(example)) == set(described._FIELDS) - elsewhere
    assert elsewhere <= {field for other in others for field in tomllib.loads(other)}
    fields = {field for split in tomllib.loads(example)["splits"].values() for field in split}
    assert fields == set(described._SPLIT_FIELDS) - {"share"}
    assert isinstance(description.task, Segmentation)
    assert isinstance(description.read_label, LabelReader)
    meanings = {*description.read_label.train_ids.values()}
    assert meanings == {*range(len(description.task.class_names)), IGNORE_INDEX}


# Labels of more than a byte, and in colours


def test_labels_of_sixteen_bits_are_read_exactly(tmp_path: Path) -> None:
    meaning = "[label_ids]\n7001 = 'soil'\n256 = 'crop'\n65535 = 'weed'\n"
    path = write_folders(tmp_path, FOLDERS + meaning)
    values = np.resize(np.array([7001, 256, 65535, 255], np.uint16), made.SIZE)
    made.write_label(tmp_path / "train" / "labels" / "a.png", values)
    dataset = open_first(path)
    np.testing.assert_array_equal(dataset[0].label, np.resize(np.array([0, 1, 2, 255], np.uint8), made.SIZE))

    dataset.task.encoded(np.array([[0, 1, 2]], np.uint8)).save(tmp_path / "p.png")  # as predictions are written
    np.testing.assert_array_equal(dataset.read_label(tmp_path / "p.png"), [[0, 1, 2]])

    made.write_label(tmp_path / "train" / "labels" / "a.png", np.full(made.SIZE, 7002, np.uint16))
    with pytest.raises(
        InputError, match=r"a\.png holds the value 7002; allowed are 256, 7001, 65535 for the classes and 255 f"
    ):
        dataset[0]
    before = dataset.fingerprint()
    path.write_text(f'ignore = "others"\n{FOLDERS}{meaning}')
    others = open_first(path)
    assert (others[0].label == IGNORE_INDEX).all()
    assert others.fingerprint() != before


def test_a_label_of_32_bits_is_refused(tmp_path: Path) -> None:
    path = write_folders(tmp_path, FOLDERS.replace("labels/{name}.png", "labels/{name}.*"))
    (tmp_path / "train" / "labels" / "a.png").unlink()
    Image.fromarray(np.full(made.SIZE, 70_000, np.int32)).save(tmp_path / "train" / "labels" / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif holds values from 70000 to 70000; allowed are 0 to 65535: correct the file"):
        open_first(path)


def test_255_is_a_class_where_label_ids_say_so(tmp_path: Path) -> None:
    path = write_folders(tmp_path, f"{FOLDERS}[label_ids]\n0 = 'soil'\n1 = 'crop'\n2 = 'weed'\n255 = 'weed'\n")
    label = open_first(path)[1].label
    assert label[-1].tolist() == [2] * made.SIZE[1]


def write_colours(path: Path, colours: list[tuple[int, ...]]) -> None:
    """A label of these colours, in turn."""
    Image.fromarray(np.resize(np.array(colours, np.uint8), (*made.SIZE, len(colours[0])))).save(path)


@pytest.mark.parametrize("form", ["RGB", "RGBA", "palette"])
def test_colours_of_labels_mean_classes(tmp_path: Path, form: str) -> None:
    path = write_folders(tmp_path, f"ignore = [[255, 255, 255]]\n{FOLDERS}{COLOURS}")
    label = tmp_path / "train" / "labels" / "a.png"
    colours = [(255, 0, 0), (10, 20, 30), (0, 0, 255), (0, 255, 0), (255, 255, 255)]
    if form == "RGBA":  # what is transparent has no colour
        write_colours(label, [*((*colour, 255) for colour in colours[:-1]), (255, 0, 0, 0)])
    else:
        write_colours(label, [*colours])
    if form == "palette":
        Image.open(label).convert("P", palette=Image.Palette.ADAPTIVE).save(label)
    dataset = open_first(path)
    expected = np.resize(np.array([2, 0, 1, 1, 255], np.uint8), made.SIZE)
    np.testing.assert_array_equal(dataset[0].label, expected)
    assert made.classes_of(dataset).palette.tolist() == [[10, 20, 30], [0, 0, 255], [255, 0, 0]]


def test_a_colour_without_a_meaning_is_named_with_its_place(tmp_path: Path) -> None:
    path = write_folders(tmp_path, f"{FOLDERS}{COLOURS}")
    label = tmp_path / "train" / "labels" / "a.png"
    pixels = np.full((*made.SIZE, 3), (255, 0, 0), np.uint8)
    pixels[2, 5] = pixels[3, 1] = 7, 8, 9
    Image.fromarray(pixels).save(label)
    sentence = (
        r"^label .*a\.png has the colour \[7, 8, 9\] in row 2, column 5, which means no class \(2 such pixels, 1 such colour\)"
        "; "
        r"correct the file, or add the colour to label_colours or ignore in .*fields\.toml$"
    )
    with pytest.raises(InputError, match=sentence):
        open_first(path)
    assert any(re.match(sentence, problem) for problem in check_folder(str(path), None, (), 1).problems)
    before = open_dataset(str(path), "train", None).fingerprint()
    path.write_text(f'ignore = "others"\n{FOLDERS}{COLOURS}')
    assert open_dataset(str(path), "train", None).fingerprint() != before
    expected = np.full(made.SIZE, 2, np.uint8)
    expected[2, 5] = expected[3, 1] = IGNORE_INDEX
    np.testing.assert_array_equal(open_first(path)[0].label, expected)


def test_smoothed_labels_are_recognised(tmp_path: Path) -> None:
    path = write_folders(tmp_path, f"{FOLDERS}{COLOURS}")
    made.write_image(tmp_path / "train" / "labels" / "a.png")
    with pytest.raises(
        InputError, match=r"such colours\), as smoothed edges and JPEG have them: save labels as PNG, unsmoothed"
    ):
        open_first(path)
    Image.fromarray(np.zeros(made.SIZE, np.uint16)).save(tmp_path / "train" / "labels" / "a.png")
    with pytest.raises(InputError, match=r"a\.png has numbers in place of colours \(mode I;16\); correct the file"):
        open_first(path)


# Shares of the pictures


def write_shares(folder: Path, names: list[str], description: str = SHARES) -> Path:
    for name in names:
        made.write_image(folder / "images" / f"{name}.png")
        made.write_label(folder / "labels" / f"{name}.png", made.values_up_to(3))
    return write_description(folder, description)


def test_shares_divide_the_pictures_and_added_ones_move_none(tmp_path: Path) -> None:
    names = [f"field {number}" for number in range(40)]
    path = write_shares(tmp_path, names)
    train, val = ({pair.name for pair in open_first(path, split=split).pairs} for split in ("train", "val"))
    assert train | val == set(names)
    assert not train & val
    assert len(train) == 30  # the same on every machine; 28 would be 0.7 of them

    write_shares(tmp_path, [f"other {number}" for number in range(10)])
    assert train < {pair.name for pair in open_first(path).pairs}
    assert val < {pair.name for pair in open_first(path, split="val").pairs}

    path.write_text(f"split_seed = 1\n{SHARES}")
    assert not train <= {pair.name for pair in open_first(path).pairs}


def test_a_list_can_be_divided(tmp_path: Path) -> None:
    path = write_shares(tmp_path, [f"{number}" for number in range(20)], SHARES.replace("share", 'list = "all.txt"\nshare'))
    made.write_list(tmp_path / "all.txt", map(str, range(10)))
    parts = [{pair.name for pair in open_first(path, split=split).pairs} for split in ("train", "val")]
    assert sorted([*parts[0], *parts[1]]) == [str(number) for number in range(10)]


def test_a_share_without_a_picture_is_refused(tmp_path: Path) -> None:
    path = write_shares(tmp_path, ["e"])  # which falls to train
    assert len(open_first(path)) == 1
    with pytest.raises(
        InputError, match=r"fields\.toml, field splits\.val\.share: no picture falls to it; give another split_s"
    ):
        open_first(path, split="val")


# Lists and descriptions as editors and tools write them


@pytest.mark.parametrize(
    "content",
    [
        "\ufefffield/c\r\n\r\na\r\n",
        "field/c.png\na.jpg\n",
        "images/field/c.png labels/field/c_mask.png\n./images/a.jpg\tlabels/a_mask.png",
        "/images/field/c.png,/labels/field/c_mask.png\nimages\\a.jpg",
    ],
    ids=["mark and CR", "file names", "pairs", "other separators"],
)
def test_a_list_may_name_pictures_in_several_ways(tmp_path: Path, content: str) -> None:
    path = write_lists(tmp_path)
    (tmp_path / "train.txt").write_bytes(content.encode())
    assert [pair.name for pair in open_first(path).pairs] == ["field/c", "a"]


def test_accents_are_the_same_in_every_form_of_unicode(tmp_path: Path) -> None:
    path = write_lists(tmp_path)
    made.write_image(tmp_path / "images" / "Mu\u0308ller 0.jpg")
    made.write_label(tmp_path / "labels" / "Mu\u0308ller 0_mask.png", made.values_up_to(3))
    made.write_list(tmp_path / "train.txt", ["M\u00fcller 0"])
    assert len(open_first(path)) == 1


def test_a_description_may_begin_with_a_mark(tmp_path: Path) -> None:
    path = write_folders(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + FOLDERS.replace("\n", "\r\n").encode())
    assert len(open_first(path)) == 2


def test_the_validation_split_may_be_called_valid(tmp_path: Path) -> None:
    path = write_folders(tmp_path, FOLDERS.replace("[splits.val]", '[splits.valid]\nfolder = "val"'))
    assert [dataset.split for dataset in open_splits(DataSettings(dataset=str(path)))] == ["train", "valid"]
    (tmp_path / "val" / "labels" / "a.png").unlink()
    assert len(check_folder(str(path), None, (), 1).problems) == 1
    with pytest.raises(InputError, match=r"split 'trainval' of .* is unknown; choose one of: train, valid"):
        open_dataset(str(path), "trainval", None)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_viewers_show_them(tmp_path: Path, orientation: int) -> None:
    path = write_folders(tmp_path)
    image = tmp_path / "train" / "images" / "a.png"
    pixels = np.random.default_rng(0).integers(0, 256, (*made.SIZE, 3), np.uint8)
    tag = Image.Exif()
    tag[0x0112] = orientation
    stored = {  # by the standard: what the sensor wrote, of what is seen
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, 1),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(pixels, -1),
    }
    Image.fromarray(np.ascontiguousarray(stored[orientation])).save(image, exif=tag)
    np.testing.assert_array_equal(open_first(path)[0].image, pixels)

    made.write_label(tmp_path / "train" / "labels" / "a.png", made.values_up_to(3).T.copy())
    with pytest.raises(
        InputError,
        match=r"must be equal: turn the label as viewers show .* \(an image is turned as its orientation tag, EXIF, says\)",
    ):
        open_first(path)


# What the check finds in the values of labels


def test_the_check_finds_palettes_of_different_orders(tmp_path: Path) -> None:
    path = write_folders(tmp_path)
    palette = voc_palette(3)
    for name, order in (("a", [0, 1, 2]), ("b", [0, 2, 1])):
        picture = Image.fromarray(made.values_up_to(3))
        picture.putpalette(palette[order].tobytes())
        picture.save(tmp_path / "train" / "labels" / f"{name}.png")
    (problem,) = check_folder(str(path), None, (), 1).problems
    assert re.match(
        r"label .*b\.png shows the value \d in the colour \[\d+, \d+, \d+\], which is \d in .*a\.png: .* give label_colours",
        problem,
    )
    named = "".join(f"{name} = {colour}\n" for name, colour in zip(("soil", "crop", "weed"), palette.tolist(), strict=True))
    made.write_label(tmp_path / "val" / "labels" / "a.png", made.values_up_to(3), palette=True)
    made.write_label(tmp_path / "val" / "labels" / "b.png", made.values_up_to(3), palette=True)
    path.write_text(f"{FOLDERS}[label_colours]\n{named}")
    assert not check_folder(str(path), None, (), 1).problems
    train = open_first(path)
    swapped = np.array([0, 2, 1], np.uint8)
    np.testing.assert_array_equal(train[1].label, swapped[train[0].label])


def test_the_check_finds_masks_of_0_and_255(tmp_path: Path) -> None:
    path = write_folders(tmp_path, FOLDERS.replace(', "weed"', ""))
    for label in tmp_path.glob("*/labels/*.png"):
        made.write_label(label, np.repeat(np.array([[0], [255]], np.uint8), 3, axis=0).repeat(8, axis=1))
    (problem,) = check_folder(str(path), None, (), 1).problems
    assert problem.startswith("every labelled pixel is soil, 50.00 % are not labelled: correct the labels")
    path.write_text(path.read_text() + "[label_ids]\n0 = 'soil'\n255 = 'crop'\n")
    assert not check_folder(str(path), None, (), 1).problems


# Depths


def write_depths(folder: Path, description: str | None = None) -> Path:
    """Two pictures in each of train/ and val/, with depths of 0.5 m and 64 m, and a hole; as documented unless described."""
    for split in ("train", "val"):
        for seed, name in enumerate(("b", "a")):
            made.write_image(folder / split / "rgb" / f"{name}.jpg", seed)
            write_depth(folder / split / "depth" / f"{name}.png", DEPTHS)
    return write_description(folder, documented_examples()[3] if description is None else description)


def write_depth(path: Path, metres: NDArray[np.float32]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.nan_to_num(1000 * metres).astype(np.uint16)).save(path)


DEPTHS = np.full(made.SIZE, 0.5, np.float32)
DEPTHS[0], DEPTHS[-1, 0] = 64, np.nan


def test_depths_are_metres_and_nan_where_nothing_was_measured(tmp_path: Path) -> None:
    dataset = open_first(write_depths(tmp_path))
    assert dataset.task == Depth(1000.0)
    label = dataset[0].label
    assert label.dtype == np.float32
    np.testing.assert_array_equal(label, DEPTHS)  # 500 and 64,000 thousandths are exact


def test_written_predictions_are_read_back_as_labels(tmp_path: Path) -> None:
    dataset = open_first(write_depths(tmp_path))
    metres = np.array([[0.25, 3.0], [1e-9, 1e9]], np.float32)
    dataset.task.encoded(metres).save(tmp_path / "p.png")
    np.testing.assert_array_equal(dataset.read_label(tmp_path / "p.png"), np.array([[0.25, 3], [0.001, 65.535]], np.float32))


def test_the_scale_of_depths_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    path = write_depths(tmp_path)
    before = open_first(path).fingerprint()
    path.write_text(path.read_text().replace("1000 ", "256 "))
    assert open_first(path).fingerprint() != before


def test_the_labels_decide_the_task(tmp_path: Path) -> None:
    depths, classes = write_depths(tmp_path / "depths"), write_folders(tmp_path / "classes")
    assert open_splits(DataSettings(dataset=str(depths), task="depth"))[0].task.name == "depth"
    assert open_splits(DataSettings(dataset=str(depths)))[1].task.name == "depth"
    for path, task, labels in ((depths, "segmentation", "depth"), (classes, "depth", "segmentation")):
        with pytest.raises(InputError, match=rf"`task` {task} needs other labels: those of .* are for {labels}"):
            open_splits(DataSettings(dataset=str(path), task=cast(TaskName, task)))


def test_a_depth_with_eight_bits_is_refused(tmp_path: Path) -> None:
    path = write_depths(tmp_path)
    made.write_label(tmp_path / "train" / "depth" / "a.png", made.values_up_to(3))
    with pytest.raises(InputError, match=r"label .*a\.png must be a 16-bit picture .* it has mode L; store the metres times"):
        open_first(path)


def test_a_depth_beyond_sixteen_bits_is_refused(tmp_path: Path) -> None:
    path = write_depths(tmp_path)
    (tmp_path / "train" / "depth" / "a.png").rename(tmp_path / "train" / "depth" / "a.old")
    path.write_text(path.read_text().replace("depth/{name}.png", "depth/{name}.tif"))
    for name, value in (("a", 70_000), ("b", 1)):
        Image.fromarray(np.full(made.SIZE, value, np.int32)).save(tmp_path / "train" / "depth" / f"{name}.tif")
    with pytest.raises(InputError, match=r"a\.tif holds values from 70000 to 70000; allowed are 0 to 65535: store the metres"):
        open_first(path)


def test_the_check_names_a_split_without_any_depth(tmp_path: Path) -> None:
    path = write_depths(tmp_path)
    for name in ("a", "b"):
        write_depth(tmp_path / "val" / "depth" / f"{name}.png", np.full(made.SIZE, np.nan, np.float32))
    _, problems = check_folder(str(path), None, (), 1)
    assert [problem.split(":")[0] for problem in problems] == ["no pixel of val is labelled"]


def test_the_check_counts_depths_by_distance(tmp_path: Path) -> None:
    text, problems = check_folder(str(write_depths(tmp_path)), None, (), 1)
    assert not problems
    shares = {line.split("  ")[1].strip(): line.split()[-1] for line in text.split("\n\n")[1].splitlines()[-7:]}
    pixels = made.SIZE[0] * made.SIZE[1] - 1
    far = made.SIZE[1]
    assert float(shares["from 50 m"]) == pytest.approx(100 * far / pixels, abs=0.005)
    assert float(shares["below 1 m"]) == pytest.approx(100 * (pixels - far) / pixels, abs=0.005)


# What cannot be used


BAD_DESCRIPTIONS: dict[str, tuple[str, str]] = {
    "no TOML": ("classes = [", r"is no TOML file \(.*\); docs/datasets.md shows one"),
    "unknown field": (f"clases = []\n{FOLDERS}", r"field clases: is unknown; the fields are classes, depth_scale, images,"),
    "no scale": (f"depth_scale = 0\n{FOLDERS}", r"field depth_scale: must be a number from 0.001 to 1e\+06, got 0; give what"),
    "scale as text": (f"depth_scale = 'mm'\n{FOLDERS}", r"field depth_scale: must be a number .*, got 'mm'; give what"),
    "scale beyond floats": (f"depth_scale = 1{'0' * 400}\n{FOLDERS}", r"field depth_scale: must be a number from"),
    "scale of nothing": (f"depth_scale = 1e-320\n{FOLDERS}", r"field depth_scale: must be a number from"),
    "two tasks": (f"depth_scale = 256\n{FOLDERS}", r"field classes: is for classes, and depth_scale for depths; leave one"),
    "no classes": (FOLDERS.replace("classes", "ignore"), r"field classes: is missing; add it"),
    "classes no list": (FOLDERS.replace('["soil", "crop", "weed"]', "3"), r"field classes: must be a list, got 3; put it in"),
    "classes not names": (FOLDERS.replace('"crop"', "7"), r"field classes: must be 1 to 255 names, got .*; name each"),
    "class twice": (FOLDERS.replace('"crop"', '"soil"'), r"field classes: names soil more than once; give every class its"),
    "colours too few": (f"colours = [[0, 0, 0]]\n{FOLDERS}", r"field colours: has 1 colours for 3 classes; give one for each"),
    "no colour": (f"colours = [[0, 0, 0], [0, 0], [0, 0, 0]]\n{FOLDERS}", r"field colours: \[0, 0\] is no colour; give"),
    "colour too large": (f"colours = [[0, 0, 0], [0, 0, 256], [0, 0, 0]]\n{FOLDERS}", r"\[0, 0, 256\] is no colour"),
    "bad name": (f'name = "a/b"\n{FOLDERS}', r"field name: 'a/b' cannot be part of a file name; use letters"),
    "ignore too large": (
        f"ignore = [65536]\n{FOLDERS}",
        r"field ignore: must be label values, 0 to 65535, or .*, got \[65536\]",
    ),
    "ignore a class": (f"ignore = [1, 255]\n{FOLDERS}", r"field ignore: 1 also means a class; say which by label_ids"),
    "label id no number": (f"{FOLDERS}[label_ids]\nsoil = 0", r"field label_ids\.soil: is no label value; give a number"),
    "label id too large": (f"{FOLDERS}[label_ids]\n65536 = 0", r"field label_ids\.65536: is no label value; give .* to 65535"),
    "label id of no class": (f'{FOLDERS}[label_ids]\n7 = "tree"', r"field label_ids\.7: 'tree' is no class; give one of"),
    "label id of a bad number": (f"{FOLDERS}[label_ids]\n7 = 3", r"field label_ids\.7: 3 is no class"),
    "label ids missing": (f"{FOLDERS}[label_ids]\n7 = 0", r"field label_ids: gives no value to crop, weed; add one for each"),
    "label ids no table": (f"label_ids = 3\n{FOLDERS}", r"field label_ids: must be a table, got 3; write \[label_ids\] above"),
    "colours of no class": (f"{FOLDERS}[label_colours]\ntree = [0, 0, 0]", r"label_colours\.tree: is no class; add it to"),
    "no label colour": (
        f"{FOLDERS}[label_colours]\nsoil = [0, 0]",
        r"label_colours\.soil: must be a colour or a list of them",
    ),
    "label colours missing": (
        f"{FOLDERS}[label_colours]\nsoil = [0, 0, 0]\ncrop = []",
        r"label_colours: gives no colour to crop, weed; add one for each class",
    ),
    "label colour twice": (
        f"{FOLDERS}[label_colours]\nsoil = [0, 0, 0]\ncrop = [0, 0, 0]\nweed = [1, 0, 0]",
        r"label_colours: \[0, 0, 0\] has two meanings; leave it out of one class",
    ),
    "label colour void": (
        f"ignore = [[9, 0, 0]]\n{FOLDERS}[label_colours]\nsoil = [9, 0, 0]\ncrop = [2, 0, 0]\nweed = [1, 0, 0]",
        r"label_colours: \[9, 0, 0\] has two meanings",
    ),
    "void value of colours": (
        f"ignore = [255]\n{FOLDERS}[label_colours]\nsoil = [9, 0, 0]\ncrop = [2, 0, 0]\nweed = [1, 0, 0]",
        r"field ignore: must be a colour or a list of them, got \[255\]; give \[red",
    ),
    "values and colours": (
        f"{FOLDERS}[label_ids]\n0 = 0\n[label_colours]\nsoil = [0, 0, 0]",
        r"label_ids: is for labels of num",
    ),
    "share too large": (
        f"{FOLDERS}share = 1.5",
        r"field splits\.val\.share: must be above 0 and below 1, got 1\.5; give such",
    ),
    "shares of less": (
        f"{FOLDERS}share = 0.5",
        r"field splits: val have 0\.5 of the pictures in all, not 1; give each of them",
    ),
    "seed no number": (f"split_seed = 'a'\n{FOLDERS}", r"field split_seed: must be a whole number, got 'a'"),
    "shares of folders": (
        SHARES.replace("images/{name}", "{split}/{name}"),
        r"field images: must not contain \{split\}, because",
    ),
    "shares of lists": (SHARES + "list = 'a.txt'", r"field splits: train and val divide different lists; give them the same"),
    "no images": (FOLDERS.replace("images =", "name ="), r"field images: is missing; add it"),
    "no labels": (FOLDERS.replace("labels =", "name ="), r"field labels: is missing; add it"),
    "images no text": (
        FOLDERS.replace('"{split}/images/{name}.png"', "[]"),
        r"field images: must be a text, got \[\]; put it",
    ),
    "no placeholder": (FOLDERS.replace("images/{name}", "images/a"), r"field images: .* must contain \{name\} once, and may"),
    "unknown placeholder": (
        FOLDERS.replace("{split}/images", "{city}/images"),
        r"field images: .* may contain \{split\}; corr",
    ),
    "outside": (FOLDERS.replace("{split}/labels", "../labels"), r"field labels: .* leaves the folder; give a path within it"),
    "folder outside": (f'{FOLDERS}folder = "/data"', r"field splits\.val\.folder: '/data' leaves the folder"),
    "no splits": (FOLDERS.partition("[splits")[0], r"field splits: is missing; add \[splits\.train\] and \[splits\.val\]"),
    "split no table": (
        FOLDERS.partition("[splits")[0] + "[splits]\ntrain = 3",
        r"field splits\.train: must be a table, got 3",
    ),
    "unknown split field": (f"{FOLDERS}lst = 3", r"field splits\.val\.lst: is unknown; the fields are list, folder,"),
    "labelled no boolean": (f"{FOLDERS}labelled = 3", r"field splits\.val\.labelled: must be true or false, got 3"),
    "count no number": (f"{FOLDERS}count = 0", r"field splits\.val\.count: must be a number of pictures, got 0"),
    "splits the same": (
        FOLDERS.replace("{split}/images", "images"),
        r"field images: must contain \{split\}, or train and val hold the same pictures; add it, or give them lists or shares",
    ),
}


@pytest.mark.parametrize(("description", "sentence"), BAD_DESCRIPTIONS.values(), ids=BAD_DESCRIPTIONS.keys())
def test_bad_description_is_refused_by_file_field_and_remedy(tmp_path: Path, description: str, sentence: str) -> None:
    path = write_folders(tmp_path, description)
    with pytest.raises(InputError, match=rf"^{path}.*{sentence}") as caught:
        open_dataset(str(path), "train", None)
    assert "\n" not in str(caught.value)


def test_bad_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`dataset` .*nowhere\.toml does not exist; give the TOML file"):
        open_dataset(str(tmp_path / "nowhere.toml"), "train", None)
    path = write_folders(tmp_path)
    with pytest.raises(InputError, match=r"`data_dir` .*nowhere is not a folder; give the one that .*fields\.toml describes"):
        open_dataset(str(path), "train", tmp_path / "nowhere")
    with pytest.raises(
        InputError, match=r"no file in .*labels fits .*fields\.toml, field images: '.*'; correct it or `data_dir`"
    ):
        open_dataset(str(path), "train", tmp_path / "train" / "labels")
    with pytest.raises(InputError, match=r"split 'test' of .* is unknown; choose one of: train, val"):
        open_dataset(str(path), "test", None)


def test_missing_and_superfluous_files_are_named(tmp_path: Path) -> None:
    path = write_folders(tmp_path / "folders")
    (tmp_path / "folders" / "train" / "labels" / "a.png").unlink()
    with pytest.raises(InputError, match=r"train/labels/a\.png is missing though .*train/images names it; restore the file"):
        open_dataset(str(path), "train", None)
    for label in (tmp_path / "folders" / "train" / "labels").iterdir():
        label.unlink()
    with pytest.raises(InputError, match=r"none of the \d labels of train is there, such as .*train/labels/a\.png: restore"):
        open_dataset(str(path), "train", None)
    (tmp_path / "folders" / "val" / "images" / "b.png").unlink()
    with pytest.raises(InputError, match=r"label .*val/labels/b\.png has no image; restore the image, or remove the label"):
        open_dataset(str(path), "val", None)

    path = write_lists(tmp_path / "lists")
    made.write_image(tmp_path / "lists" / "images" / "a.png")
    with pytest.raises(InputError, match=r"a\.jpg and .*a\.png both fit 'images/\{name\}\.\*'; remove one"):
        open_dataset(str(path), "train", None)
    (tmp_path / "lists" / "images" / "a.png").unlink()
    made.write_list(tmp_path / "lists" / "val.txt", ["d", "e", "d"])
    with pytest.raises(InputError, match=r"val\.txt lists d 2 times; .* \(1 more: `python -m search.datasets check "):
        open_dataset(str(path), "val", None)
    (tmp_path / "lists" / "val.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"val\.txt is no text in UTF-8 .*; correct .*, field splits\.val\.list, or restore"):
        open_dataset(str(path), "val", None)
    (tmp_path / "lists" / "val.txt").unlink()
    with pytest.raises(InputError, match=r"val\.txt is missing; correct .*fields\.toml, field splits\.val\.list"):
        open_dataset(str(path), "val", None)


# In use


def test_a_search_runs_on_a_described_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels keep the ids of another data set, and the training split has another name, as a user's may."""
    rng = np.random.default_rng(0)
    for split, count in (("all", 5), ("val", 4)):
        for i in range(count):
            left, right = rng.integers(0, 3, 2)
            label = np.repeat(np.array([left, right], np.uint8), (16, 33))[None].repeat(33, axis=0)
            image = (70 * label[..., None] + rng.integers(0, 30, (33, 49, 3))).astype(np.uint8)
            for kind, pixels in (("images", image), ("labels", label * 10 + 5)):
                path = tmp_path / split / kind / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    meaning = '[label_ids]\n5 = "soil"\n15 = "crop"\n25 = "weed"\n'
    path = write_description(tmp_path, FOLDERS.replace("[splits.train]", "[splits.all]") + meaning)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / "weights.pth")
    monkeypatch.chdir(tmp_path)
    settings = composed(
        search.random.RandomSettings,
        dataset=str(path),
        train_split="all",
        backbone="test_efficientnet",
        weights=tmp_path / "weights.pth",
        cache_dir=tmp_path / "cache",
        device="cpu",
        trials=2,
        iterations=4,
        branch_channels=8,
        batch_size=2,
        crop_size=(33, 33),
        compare=("aspp",),
    )
    search.random.main(settings)
    assert sorted(folder.name for folder in (tmp_path / "cache").iterdir()) == [
        "fields-all-test_efficientnet-os16",
        "fields-val-test_efficientnet-os16",
    ]
    assert "trial" in capsys.readouterr().out
    assert (tmp_path / "runs" / "fields" / "report.html").stat().st_size > 0
    (tmp_path / "descriptions").mkdir()
    moved = path.rename(tmp_path / "descriptions" / path.name)  # a run is known by its data, not by where they are described
    search.random.main(changed(settings, dataset=str(moved), data_dir=tmp_path, trials=3))
    assert len((tmp_path / "runs" / "fields" / "cells.csv").read_text().splitlines()) == 1 + 3


def test_a_wrong_pattern_of_labels_is_one_problem_of_each_split(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("a", "b", "c"):
            made.write_image(tmp_path / split / "images" / f"{name}.png")
            made.write_label(tmp_path / split / "masks" / f"{name}.png", made.values_up_to(3))
    (tmp_path / "train" / "images" / "c.png").write_text("no picture")  # is found nevertheless
    path = tmp_path / "fields.toml"
    path.write_text(FOLDERS)
    problems = check_folder(str(path), None, (), 1).problems
    expected = [
        f"none of the 3 labels of {split} is there, such as {tmp_path}/{split}/labels/a.png" for split in ("train", "val")
    ]
    assert [problem.partition(": ")[0] for problem in problems[:2]] == expected
    assert [problem.partition(": ")[2] for problem in problems[:2]] == [f"restore them, or correct labels in {path}"] * 2
    (damaged,) = problems[2:]
    assert re.match(r"picture .*c\.png is truncated or unreadable", damaged)
