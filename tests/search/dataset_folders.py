"""Small folders in the layout of each data set, with the labels that must come out of them."""

import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

from search.datasets import IGNORE_INDEX, Dataset
from search.dense_tasks.segmentation import Segmentation, voc_palette

Labels = dict[str, NDArray[np.uint8]]  # by the picture's name
SHARED = Path(__file__).parents[2].parent / "shared" / "data"  # real samples, never part of the repository
SIZE = (6, 8)  # height and width of the made pictures: 48 pixels, more than Cityscapes has label ids

CITYSCAPES_IDS = dict(zip((7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33), range(19), strict=True))  # id: train id
CITIES = {"train": "aachen", "val": "lindau", "test": "berlin"}


def classes_of(dataset: Dataset) -> Segmentation:
    """The task of a data set whose pixels have classes."""
    assert isinstance(dataset.task, Segmentation)
    return dataset.task


def write_image(path: Path, seed: int | None = None, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    """A picture that no other path has, unless the seed is given."""
    own = zlib.crc32("/".join(path.parts[-4:]).encode()) if seed is None else seed
    pixels = np.random.default_rng(own).integers(0, 256, (*size, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def write_label(path: Path, values: NDArray[Any], *, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values)
    if palette:
        picture.putpalette(voc_palette(256).tobytes())
    picture.save(path)


def write_list(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def values_up_to(count: int, *, shift: int = 0, void: bool = False) -> NDArray[np.uint8]:
    """All values below `count`, and 255 in the last row if asked for."""
    values = ((np.arange(np.prod(SIZE)) + shift) % count).astype(np.uint8).reshape(SIZE)
    if void:
        values[-1] = IGNORE_INDEX
    return values


def write_cityscapes(folder: Path) -> dict[str, Labels]:
    """Two pictures per split, three in train: one per label id 0 to 33, or none of them in test."""
    expected: dict[str, Labels] = {}
    for split, city in CITIES.items():
        expected[split] = {}
        for frame in (19, 3, 7)[: 3 if split == "train" else 2]:
            name = f"{city}_{frame:06d}_000019"
            values = values_up_to(34, shift=frame) if split != "test" else values_up_to(4)
            write_image(folder / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png")
            for kind in ("labelIds", "instanceIds", "color"):  # the other kinds are to be passed over
                write_label(folder / "gtFine" / split / city / f"{name}_gtFine_{kind}.png", values)
            decoded = [[CITYSCAPES_IDS.get(value, IGNORE_INDEX) for value in row] for row in values.tolist()]
            expected[split][name] = np.array(decoded, np.uint8)
        expected[split] = dict(sorted(expected[split].items()))
    return expected | {"trainval": expected["train"] | expected["val"]}


def write_voc(folder: Path) -> dict[str, Labels]:
    """Two pictures in train and val each and one in test, with all classes and 255."""
    voc = folder / "VOCdevkit" / "VOC2012"
    names = {"train": ["2007_000032", "2008_000008"], "val": ["2007_000033", "2009_000012"], "test": ["2008_000006"]}
    expected: dict[str, Labels] = {}
    for split, of_split in names.items():
        write_list(voc / "ImageSets" / "Segmentation" / f"{split}.txt", of_split)
        expected[split] = {}
        for seed, name in enumerate(of_split):
            write_image(voc / "JPEGImages" / f"{name}.jpg")
            values = values_up_to(21, shift=seed, void=True)
            if split == "test":
                values = np.full(SIZE, IGNORE_INDEX, np.uint8)
            else:
                write_label(voc / "SegmentationClass" / f"{name}.png", values, palette=True)
            expected[split][name] = values
    write_list(voc / "ImageSets" / "Segmentation" / "trainval.txt", [*names["train"], *names["val"]])
    return expected | {"trainval": expected["train"] | expected["val"]}


def add_converted_sbd(folder: Path, voc: Mapping[str, Labels]) -> Labels:
    """`SegmentationClassAug` with VOC's labels and two of SBD's; returns what train_aug must be."""
    augmented = {"2008_000015": values_up_to(21, shift=3), "2010_000002": values_up_to(21, shift=5)}
    for name, values in (augmented | voc["trainval"]).items():
        write_image(folder / "VOCdevkit" / "VOC2012" / "JPEGImages" / f"{name}.jpg")
        write_label(folder / "VOCdevkit" / "VOC2012" / "SegmentationClassAug" / f"{name}.png", values)
    return dict(sorted((voc["train"] | augmented).items()))


def add_sbd_archive(folder: Path, voc: Mapping[str, Labels]) -> Labels:
    """SBD's archive: pictures of its own, and one of VOC's train and of VOC's val with another label than VOC's."""
    sbd = folder / "benchmark_RELEASE" / "dataset"
    own = {"2008_000015": values_up_to(21, shift=3), "2010_000002": values_up_to(21, shift=5)}
    for name, values in {**own, **dict.fromkeys(("2008_000008", "2009_000012"), np.zeros(SIZE, np.uint8))}.items():
        write_image(sbd / "img" / f"{name}.jpg")
        write_sbd_label(sbd / "cls" / f"{name}.mat", values)
    write_list(sbd / "train.txt", ["2008_000015", "2009_000012"])  # SBD's split is not VOC's
    write_list(sbd / "val.txt", ["2010_000002", "2008_000008"])
    return dict(sorted((voc["train"] | own).items()))


def write_sbd_label(path: Path, values: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    present = np.setdiff1d(values, [0, IGNORE_INDEX])
    savemat(path, {"GTcls": {"Boundaries": np.zeros(20), "Segmentation": values, "CategoriesPresent": present}})


def write_person_part(folder: Path, *, originals: bool = False) -> dict[str, Labels]:
    """Two pictures of train and val each: converted palette pictures, or PASCAL-Part's own files."""
    names = {"train": ["2008_000008", "2008_000036"], "val": ["2008_000003", "2008_000026"]}
    expected: dict[str, Labels] = {}
    for split, of_split in names.items():
        write_list(folder / "list" / f"{split}_id.txt", of_split)
        expected[split] = {}
        for seed, name in enumerate(of_split):
            write_image(folder / "JPEGImages" / f"{name}.jpg")
            values = values_up_to(7, shift=seed)
            if originals:
                write_parts(folder / "Annotations_Part" / f"{name}.mat", values)
            else:
                write_label(folder / "SegmentationPart" / f"{name}.png", values, palette=True)
            expected[split][name] = values
    return expected | {"trainval": expected["train"] | expected["val"]}


def write_parts(path: Path, values: NDArray[np.uint8]) -> None:
    """A file of PASCAL-Part with a dog that is to be passed over, and one person whose later parts hide the earlier ones."""
    parts = [("head", values > 0), ("torso", values > 1), ("luarm", values > 2), ("rhand", values > 3)]
    parts += [("ruleg", values > 4), ("lfoot", values > 5)]
    dog, person = part_object("dog", [("head", values >= 0)]), part_object("person", parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"anno": {"imname": path.stem, "objects": np.array([dog, person], OBJECT)}})


OBJECT = [("class", object), ("class_ind", object), ("mask", object), ("parts", object)]


def part_object(name: str, parts: list[tuple[str, NDArray[np.bool_]]]) -> tuple[str, float, NDArray[np.uint8], object]:
    masks = [(part, mask.astype(np.uint8)) for part, mask in parts]
    return name, 1.0, np.ones(SIZE, np.uint8), np.array(masks, [("part_name", object), ("mask", object)])
