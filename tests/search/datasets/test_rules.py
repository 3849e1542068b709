"""Rules on labels: each speaks, with the right numbers, where labels are wrong, and is silent where they are sound."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import search.datasets.look
from search.datasets import open_dataset
from search.datasets.check import check_folder
from search.datasets.cityscapes import CLASS_NAMES, LABEL_IDS
from search.datasets.counts import size_of
from search.datasets.described import open_split
from search.datasets.facts import LabelFacts, SplitFacts, label_facts
from search.datasets.from_torch import TorchDataset
from search.datasets.look import look_at, require_labels, sampled_facts
from search.datasets.rules import warnings_about
from search.dense_tasks.segmentation import voc_palette
from search.errors import InputError
from tests.search import dataset_folders as made

REAL_CAMVID = made.SHARED / "camvid"
CLASSES = ("sky", "soil", "crop", "weed", "stone", "stick")
SIDE = 96


def write_folder(
    folder: Path,
    splits: Mapping[str, Sequence[NDArray[Any] | Image.Image]],
    classes: Sequence[str] = CLASSES,
    fields: str = "",
    tables: str = "",
) -> Path:
    """A TOML file, and beside it the labels of each split with images of their sizes."""
    for split, labels in splits.items():
        for index, label in enumerate(labels):
            picture = label if isinstance(label, Image.Image) else Image.fromarray(label)
            made.write_image(folder / split / "images" / f"{index:03}.png", size=picture.size[::-1])
            (folder / split / "labels").mkdir(parents=True, exist_ok=True)
            picture.save(folder / split / "labels" / f"{index:03}.png")
    names = ", ".join(f'"{name}"' for name in classes)
    path = folder / "set.toml"
    path.write_text(
        f'classes = [{names}]\nimages = "{{split}}/images/{{name}}.png"\nlabels = "{{split}}/labels/{{name}}.png"\n{fields}\n'
        f"{tables}\n" + "".join(f"[splits.{split}]\n" for split in splits)
    )
    return path


def regions(seed: int, values: Sequence[int] = range(len(CLASSES)), side: int = SIDE) -> NDArray[np.uint8]:
    """A label of forty regions with straight edges, each of which has one of the values; all of them occur."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(0, side, (40, 2))
    own = np.array([*values, *rng.choice(values, 40 - len(values))], np.uint8)
    places = np.moveaxis(np.mgrid[:side, :side], 0, -1)[:, :, None]
    nearest: NDArray[np.uint8] = own[((places - centres) ** 2).sum(axis=-1).argmin(axis=-1)]
    return nearest


def warned(path: Path) -> list[str]:
    """The warnings of the check, which has found no problem."""
    text, problems = check_folder(str(path), None, (), 1)
    assert not problems
    return listed(text)


def listed(text: str) -> list[str]:
    lines = re.search(r"^\d+ warnings?:\n((?:  .*\n?)+)", text, flags=re.MULTILINE)
    return [line.strip() for line in lines[1].splitlines()] if lines else []


# What is counted


def test_edges_and_lone_pixels_are_these() -> None:
    label = np.zeros((40, 50), np.uint8)
    label[:, 20], label[:, 21:] = 1, 2  # a line of one pixel between two others
    label[5, 40] = 3  # a pixel within one other
    dataset = open_dataset("shapes", "val", None)
    facts = label_facts(dataset, 0, label)
    assert facts.edges == 2 * 40 + 4
    assert facts.lone == {1: 40}
    assert facts.lines == {1: 40, 3: 1}
    assert facts.values == {0: 800, 1: 40, 2: 1159, 3: 1}
    label[:, 20] = 255
    assert label_facts(dataset, 0, label).lone == {}  # what is not labelled is no class that is not there


def test_facts_of_a_file_are_those_of_its_numbers(tmp_path: Path) -> None:
    label = regions(0)
    path = write_folder(tmp_path, {"train": [label]}, tables='[label_ids]\n5 = "sky"\n' + numbered(CLASSES[1:], start=0))
    facts = label_facts(open_split(path, "train", None), 0)
    counts = np.bincount(label.ravel()).tolist()
    assert facts.values == dict(enumerate(counts))
    assert facts.pixels.tolist() == [counts[5], *counts[:5], 0]
    assert (facts.form, facts.shown) == ("in 8-bit grey", {})


def numbered(classes: Sequence[str], start: int) -> str:
    return "".join(f'{value} = "{name}"\n' for value, name in enumerate(classes, start))


def test_sizes_are_read_without_the_pixels(tmp_path: Path) -> None:
    path = write_folder(tmp_path, {"train": [np.zeros((33, 47), np.uint8)]})
    assert size_of(open_split(path, "train", None), 0) == (33, 47)
    assert size_of(open_dataset("shapes", "val", None), 0) == (257, 257)


# Sound labels


def test_sound_labels_are_passed_over_in_silence(tmp_path: Path) -> None:
    labels = [regions(seed) for seed in range(3)]
    assert warned(write_folder(tmp_path, {"train": labels, "val": labels[:2]})) == []


@pytest.mark.parametrize(
    ("name", "write", "split"),
    [
        ("cityscapes", made.write_cityscapes, "train"),
        ("pascal_voc", lambda folder: made.add_converted_sbd(folder, made.write_voc(folder)), "train_aug"),
        ("pascal_voc", lambda folder: made.add_sbd_archive(folder, made.write_voc(folder)), "train_aug"),
        ("pascal_person_part", made.write_person_part, "train"),
    ],
)
def test_made_folders_are_passed_over_in_silence(
    tmp_path: Path, name: str, write: Callable[[Path], object], split: str
) -> None:
    write(tmp_path)
    train, val = (sampled_facts(open_dataset(name, each, tmp_path)) for each in (split, "val"))
    assert warnings_about(train, val) == []
    assert listed(check_folder(name, tmp_path, (), 1).text) == []


@pytest.mark.skipif(not REAL_CAMVID.is_dir(), reason="needs CamVid")
def test_camvid_is_passed_over_in_silence() -> None:
    train, val = (sampled_facts(open_dataset("camvid", split, REAL_CAMVID)) for split in ("train", "val"))
    assert 0 < max(train.rates.values()) < 0.05
    assert warnings_about(train, val) == []


def test_generated_scenes_are_passed_over_in_silence() -> None:
    train, val = (sampled_facts(open_dataset("shapes", split, None)) for split in ("train", "val"))
    assert warnings_about(train, val) == []


# Classes without a pixel


def test_classes_that_no_pixel_has_are_named(tmp_path: Path) -> None:
    train, val = np.zeros((40, 40), np.uint8), np.zeros((40, 40), np.uint8)
    train[:10], train[10:12] = 1, 2
    val[:20], val[20:24] = 1, 3
    path = write_folder(tmp_path, {"train": [train], "val": [val]}, (*CLASSES[:4], "void"))
    assert warned(path) == [
        "no pixel of train is weed or void (10.00 % of val are): nothing is learnt of them; correct the labels, or label_ids "
        f"of {path}, or take them out of classes (void too counts as a class; what shall not count, goes into ignore)",
        "no pixel of val is crop (5.00 % of train are): scores say nothing of it; move pictures with it to val",
    ]


def test_a_single_class_is_said_to_prove_nothing(tmp_path: Path) -> None:
    labels = [np.zeros((SIDE, SIDE), np.uint8)] * 2
    path = write_folder(tmp_path, {"train": labels, "val": labels}, ("sky",))
    said = "there is one class, sky, so that every prediction is right: name what is around it as a class, too, in "
    assert said + str(path) in warned(path)


def test_a_class_called_void_that_counts_is_said(tmp_path: Path) -> None:
    label = np.zeros((40, 40), np.uint8)
    label[:10] = 1
    path = write_folder(tmp_path, {"train": [label, label * 0], "val": [label]}, ("soil", "Void"))
    assert warned(path) == [
        "12.50 % of train and 25.00 % of val are Void, which is learnt and scored as any other class: if it is not to count, "
        "take it out of classes and give its value as ignore"
    ]


# Values that nobody spoke of


def test_void_that_nobody_declared_is_said_with_its_share(tmp_path: Path) -> None:
    label = regions(0)
    label[: SIDE // 4] = 255
    path = write_folder(tmp_path, {"train": [label, regions(1)], "val": [label]})
    (warning,) = warned(path)
    assert warning == (
        "12.50 % of the pixels of train and 25.00 % of the pixels of val are 255, which does not count because "
        f"{path} says nothing of it: if it is a class, give 255 a class in label_ids there; if not, write ignore = [255]"
    )
    assert warned(write_folder(tmp_path, {"train": [label, regions(1)], "val": [label]}, fields="ignore = [255]")) == []


def test_masks_of_0_and_255_are_told_the_remedy_that_works(tmp_path: Path) -> None:
    label = np.where(regions(0) == 2, 255, 0).astype(np.uint8)
    splits = {"train": [label], "val": [label]}
    text, problems = check_folder(str(write_folder(tmp_path, splits, ("ground", "disc"))), None, (), 1)
    share = 100 * np.mean(label == 255)
    assert problems == [
        f"every labelled pixel is ground, {share:.2f} % are not labelled: correct the labels, or give 255 a class in "
        f"label_ids of {tmp_path / 'set.toml'}"
    ]
    assert [re.search("no pixel of train is disc|give 255 a class in label_ids", line) is None for line in listed(text)] == [
        False,
        False,
    ]
    table = '[label_ids]\n0 = "ground"\n255 = "disc"'
    assert warned(write_folder(tmp_path, splits, ("ground", "disc"), tables=table)) == []


# Interpolation and compression


def resized(label: NDArray[np.uint8], how: Image.Resampling, side: int) -> NDArray[np.uint8]:
    return np.array(Image.fromarray(label).resize((side, side), how))


@pytest.mark.parametrize(
    ("how", "side"),
    [
        *((how, side) for how in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC) for side in (40, 60, 150)),
        *((Image.Resampling.BOX, side) for side in (40, 60)),  # it enlarges by nearest neighbours
    ],
)
def test_labels_resized_with_smoothing_are_noticed(tmp_path: Path, how: Image.Resampling, side: int) -> None:
    labels = [resized(regions(seed), how, side) for seed in range(3)]
    sharp = resized(regions(3), Image.Resampling.NEAREST, side)
    (warning,) = warned(write_folder(tmp_path, {"train": [sharp, *labels], "val": [labels[0], sharp]}))
    assert re.match(
        r"in 3 labels of train and 1 label of val many pixels lie alone between pixels of two other classes, most in label "
        rf"{tmp_path}/(train/labels/00[123]|val/labels/000)\.png: \d\d for 100 edges, where up to 10 are usual; ",
        warning,
    )


@pytest.mark.parametrize("side", [40, 60, 150])
def test_labels_resized_by_nearest_neighbours_are_passed_over(tmp_path: Path, side: int) -> None:
    labels = [resized(regions(seed), Image.Resampling.NEAREST, side) for seed in range(3)]
    assert warned(write_folder(tmp_path, {"train": labels, "val": labels})) == []


def test_numbers_that_were_compressed_are_noticed(tmp_path: Path) -> None:
    labels = []
    for seed in range(3):
        file = io.BytesIO()
        Image.fromarray(regions(seed) * 8).save(file, "JPEG", quality=75)
        labels.append(np.array(Image.open(file)).clip(0, 63))
    path = write_folder(tmp_path, {"train": labels, "val": labels}, [f"class {k}" for k in range(64)])
    assert any("lossy compression" in warning for warning in warned(path))


@pytest.mark.parametrize("contour", [1, 5])
def test_a_class_that_is_a_contour_is_passed_over(tmp_path: Path, contour: int) -> None:
    label = np.where(np.add.outer(np.arange(SIDE), np.arange(SIDE)) % 48 < 24, 0, 2).astype(np.uint8)
    for row in label:
        row[np.flatnonzero(row[1:] != row[:-1]) + 1] = contour
    names = [f"class {k}" for k in range(6)]
    facts = [sampled_facts(open_split(write_folder(tmp_path, {"train": [label]}, names), "train", None))]
    assert facts[0].rates[0] > 0.2
    assert not any("alone" in warning for warning in warnings_about(facts[0], None))


def test_borders_are_passed_over_that_mostly_lie_within_one_class(tmp_path: Path) -> None:
    label = np.tile(np.arange(SIDE, dtype=np.uint8) // 16 % 2, (SIDE, 1))
    label[::12], label[:, ::16] = 2, 2  # as between cells that touch
    path = write_folder(tmp_path, {"train": [label]}, CLASSES[:3])
    facts = sampled_facts(open_split(path, "train", None))
    assert facts.rates[0] > 0.15
    assert facts.lone[2] < 0.5 * facts.values[2]
    assert warnings_about(facts, None) == []


def test_colours_that_were_compressed_are_noticed_though_others_are_ignored(tmp_path: Path) -> None:
    palette = voc_palette(len(CLASSES))
    named = "[label_colours]\n" + "".join(f"{n} = {c}\n" for n, c in zip(CLASSES, palette.tolist(), strict=True))
    sharp = [Image.fromarray(palette[regions(seed)]) for seed in range(2)]
    smooth = [picture.resize((150, 150), Image.Resampling.BILINEAR) for picture in sharp]
    for labels, count in ((sharp, 0), (smooth, 1)):
        path = write_folder(tmp_path, {"train": labels, "val": labels}, fields='ignore = "others"', tables=named)
        assert sum("pixels lie alone between" in warning for warning in warned(path)) == count


# One that is not like the others


def test_a_label_that_is_stored_in_another_way_is_named(tmp_path: Path) -> None:
    labels: list[Any] = [regions(seed) for seed in range(4)]
    labels[2] = Image.fromarray(labels[2])
    labels[2].putpalette(voc_palette(256).tobytes())
    path = write_folder(tmp_path, {"train": labels, "val": labels[:2]})
    (warning,) = warned(path)
    assert warning == (
        f"label {tmp_path}/train/labels/002.png is stored with a palette, 3 such as label {tmp_path}/train/labels/000.png in "
        "8-bit grey: the same number may mean another class there; look at both, and save all alike"
    )
    labels[2] = regions(2).astype(np.uint16)
    assert (
        "002.png is stored in 16-bit grey, 3 such as"
        in warned(write_folder(tmp_path, {"train": labels, "val": labels[:2]}))[0]
    )


def test_a_label_with_another_palette_is_named(tmp_path: Path) -> None:
    usual, other = voc_palette(256), np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)
    labels = []
    for seed in range(3):
        labels.append(Image.fromarray(regions(seed)))
        labels[-1].putpalette((other if seed == 1 else usual).tobytes())
    path = write_folder(tmp_path, {"train": labels, "val": [labels[0]]})
    (warning,) = warned(path)
    first = f"label {tmp_path}/train/labels/000.png in {usual[0].tolist()}"
    assert warning.startswith(
        f"label {tmp_path}/train/labels/001.png shows the value 0 in the colour {other[0].tolist()}, 3 such as {first}: "
    )
    short = Image.fromarray(regions(1))
    short.putpalette(usual[: len(CLASSES)].tobytes())  # the same palette, without what no pixel has
    assert warned(write_folder(tmp_path, {"train": [labels[0], short, labels[2]], "val": [labels[0]]})) == []


# Another numbering


def test_train_ids_in_place_of_label_ids_are_recognised(tmp_path: Path) -> None:
    made.write_cityscapes(tmp_path)
    for path in (tmp_path / "gtFine").rglob("*_labelIds.png"):
        values = np.array(Image.open(path))
        train_ids = [[made.CITYSCAPES_IDS.get(value, 0) for value in row] for row in values.tolist()]
        made.write_label(path, np.array(train_ids, np.uint8))
    train, val = (sampled_facts(open_dataset("cityscapes", split, tmp_path)) for split in ("train", "val"))
    *_, warning = warnings_about(train, val)
    assert re.fullmatch(
        r"the values of train and val are 0 to 18, as if the 19 classes were numbered from 0, and expected are 7, 8, 11 to "
        r"13, 17, 19 to 28, 31 to 33, so that \d\d % of the pixels are no class: give the files that have these "
        r"\(of Cityscapes \*_labelIds.png, not \*_labelTrainIds.png\)",
        warning,
    )


def test_label_ids_in_place_of_train_ids_are_recognised(tmp_path: Path) -> None:
    labels = [regions(seed, range(34)) for seed in range(2)]
    path = write_folder(tmp_path, {"train": labels, "val": labels}, CLASS_NAMES, fields='ignore = "others"')
    *_, warning = warned(path)
    assert warning == (
        "the values of train and val are 0 to 33, which are Cityscapes' label ids, and expected are its train ids, 0 to 18: "
        f'give label_ids in {path}, such as 7 = "road", or the *_labelTrainIds.png'
    )
    named = [f"class {k}" for k in range(19)]
    others = warned(write_folder(tmp_path, {"train": labels, "val": labels}, named, fields='ignore = "others"'))
    assert not any("Cityscapes" in text for text in others)
    table = "[label_ids]\n" + "".join(f'{v} = "{name}"\n' for v, name in zip(LABEL_IDS, CLASS_NAMES, strict=True))
    right = write_folder(tmp_path, {"train": labels, "val": labels}, CLASS_NAMES, 'ignore = "others"', table)
    assert warned(right) == []


def test_numbers_from_1_are_recognised_also_where_each_label_is_refused(tmp_path: Path) -> None:
    labels = [regions(seed, range(1, 7)) for seed in range(2)]
    expected = (
        "the values of train and val are 1 to 6, as if the 6 classes were numbered from 1, and expected are 0 to 5: "
        f'give label_ids in {tmp_path / "set.toml"}, such as 1 = "sky"'
    )
    splits = {"train": labels, "val": labels}
    assert warned(write_folder(tmp_path, splits, fields='ignore = "others"'))[-1] == expected
    text, problems = check_folder(str(write_folder(tmp_path, splits)), None, (), 1)
    assert len(problems) == 4
    assert listed(text)[-1] == expected
    assert warned(write_folder(tmp_path, splits, tables="[label_ids]\n" + numbered(CLASSES, start=1))) == []


# At the start


def test_a_sample_makes_no_claim_on_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.datasets.look, "_MOST", 64)
    label = np.zeros((8, 8), np.uint8)
    label[:4] = 1
    labels = [label] * 70
    labels[11] = np.full((8, 8), 2, np.uint8)  # which the sample of 64 passes over
    path = write_folder(tmp_path, {"train": labels, "val": [label, labels[11]]}, CLASSES[:3])
    train, val = (open_split(path, split, None) for split in ("train", "val"))
    look_at(train, val)
    text = capsys.readouterr().err
    assert text.startswith(
        "warning: no pixel of train (in 64 of 70 labels) is crop (50.00 % of val are): unless other labels have it, "
    )
    assert warned(path) == []


def test_a_sample_grows_until_it_has_every_class(tmp_path: Path) -> None:
    label = np.zeros((8, 8), np.uint8)
    label[:4] = 1
    labels = [label] * 300
    labels[1] = np.full((8, 8), 2, np.uint8)  # the first one beyond the sample of 64
    splits = {"train": labels, "val": [labels[1], *labels[2:300]]}
    train, val = (
        sampled_facts(open_split(write_folder(tmp_path, splits, CLASSES[:3]), split, None)) for split in ("train", "val")
    )
    assert (train.looked, val.looked) == (65, 64)
    assert warnings_about(train, val) == []
    one = sampled_facts(open_split(write_folder(tmp_path, splits, CLASSES[:4]), "train", None))
    assert one.looked == 256  # and no more, for a class that nothing has


def test_data_from_python_are_looked_at_too(capsys: pytest.CaptureFixture[str]) -> None:
    image = np.zeros((150, 150, 3), np.uint8)
    pairs = [(image, resized(regions(seed), Image.Resampling.BILINEAR, 150)) for seed in range(2)]
    train, val = (TorchDataset(pairs, CLASSES, name="fields", split=split) for split in ("train", "val"))
    look_at(train, val)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"warning: in 2 labels of train and 2 labels of val many pixels lie alone .* most in label \d of ", line)


def test_depths_are_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    train, val = (open_dataset("shapes", split, None, "depth") for split in ("train", "val"))
    look_at(train, val)
    require_labels(train, val)
    assert capsys.readouterr().err == ""


def test_whether_there_is_a_label_is_decided_by_all(tmp_path: Path) -> None:
    void = np.full((8, 8), 255, np.uint8)
    some = void.copy()
    some[0, 0], some[7, 7] = 0, 1
    labels = [void] * 70
    path = write_folder(tmp_path, {"train": labels, "val": [some]}, CLASSES[:2])
    train, val = (open_split(path, split, None) for split in ("train", "val"))
    with pytest.raises(InputError, match=r"^no pixel of set train has a label to learn from: give another `train_split`"):
        require_labels(train, val)
    with pytest.raises(InputError, match=r"^no pixel of set train has a label to score by: give another `val_split`"):
        require_labels(val, train)
    labels[69] = some
    write_folder(tmp_path, {"train": labels, "val": [some]}, CLASSES[:2])
    require_labels(train, val)
    require_labels(val, train)
    some[7, 7] = 0
    write_folder(tmp_path, {"train": labels, "val": [some]}, CLASSES[:2])
    with pytest.raises(InputError, match=r"^all labelled pixels of set val have the same label: give another `val_split`"):
        require_labels(train, val)


def test_facts_add_up() -> None:
    dataset = open_dataset("shapes", "val", None)
    split = SplitFacts(dataset)
    for index in range(3):
        edges = 100 if index else 99  # of which too few say nothing
        shown: Mapping[int, tuple[int, int, int]] = {0: (1, 2, index % 2)}
        split.add(
            index, LabelFacts(np.arange(9), {0: 5, index: 7}, edges, {index: 3 * index}, {7: index}, "in 8-bit grey", shown)
        )
    assert split.pixels.tolist() == [0, 3, 6, 9, 12, 15, 18, 21, 24]
    assert split.values == {0: 17, 1: 7, 2: 7}
    assert split.lines == {7: 3}
    assert (split.lone, split.rates) == ({0: 0, 1: 3, 2: 6}, {1: 0.03, 2: 0.06})
    assert split.forms == {"in 8-bit grey": [0, 1, 2]}
    assert split.shown == {0: {(1, 2, 0): [0, 2], (1, 2, 1): [1]}}
    assert split.name == "val (in 3 of 60 labels)"
