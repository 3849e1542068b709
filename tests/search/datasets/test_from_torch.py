"""A torch data set as one of ours: what its pairs may be, and what is said of those that cannot be used."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from search import InputError, TorchDataset
from search.dense_tasks.segmentation import voc_palette
from tests.search import dataset_folders
from tests.search.python_parts import CLASS_NAMES, Strips

IMAGE = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
LABEL = np.resize(np.array([0, 1, 2, 7], np.uint8), (4, 6))
EXPECTED = np.resize(np.array([0, 1, 2, 255], np.uint8), (4, 6))


def dataset_of(*pairs: Any, **changes: Any) -> TorchDataset:
    options: dict[str, Any] = {"name": "mine", "split": "train", "ignore_index": 7} | changes
    return TorchDataset(pairs, CLASS_NAMES, **options)


@pytest.mark.parametrize(
    "image",
    [IMAGE, Image.fromarray(IMAGE), Image.fromarray(IMAGE).convert("RGBA"), torch.from_numpy(IMAGE.transpose(2, 0, 1).copy())],
    ids=["array", "PIL", "PIL with alpha", "tensor"],
)
@pytest.mark.parametrize(
    "label",
    [LABEL, LABEL.astype(np.int64), Image.fromarray(LABEL), torch.from_numpy(LABEL), torch.from_numpy(LABEL)[None].long()],
    ids=["array", "array of int64", "PIL", "tensor", "tensor with a channel"],
)
def test_a_pair_may_be_of_any_usual_kind(image: Any, label: Any) -> None:
    dataset = dataset_of((image, label))
    assert len(dataset) == 1
    sample = dataset[0]
    np.testing.assert_array_equal(sample.image, IMAGE)
    np.testing.assert_array_equal(sample.label, EXPECTED)
    assert sample.image.dtype == sample.label.dtype == np.uint8
    assert sample.name == "train_0"
    with pytest.raises(IndexError):
        dataset[1]


def test_the_value_to_ignore_may_be_negative_or_absent() -> None:
    strips = TorchDataset(Strips(2), CLASS_NAMES, name="strips", split="val", ignore_index=-1)
    assert strips[1].label[0, 0] == 255
    assert np.unique(strips[1].label[1:]).max() <= 2
    assert dataset_of((IMAGE, LABEL % 3), ignore_index=None)[0].label.max() == 2


def test_classes_and_colours_are_as_given() -> None:
    task = dataset_folders.classes_of(dataset_of((IMAGE, LABEL)))
    assert task.class_names == CLASS_NAMES
    np.testing.assert_array_equal(task.palette, voc_palette(3))
    coloured = dataset_folders.classes_of(dataset_of((IMAGE, LABEL), colours=[(1, 2, 3), (4, 5, 6), (7, 8, 9)]))
    assert coloured.palette.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_the_fingerprint_follows_every_pixel() -> None:
    other_label, other_image = LABEL.copy(), IMAGE.copy()
    other_label[-1, -1], other_image[-1, -1, -1] = 0, IMAGE[-1, -1, -1] ^ 1
    pair = IMAGE, LABEL
    datasets = [
        dataset_of(pair, pair),
        dataset_of(pair),
        dataset_of(pair, (IMAGE, other_label)),
        dataset_of(pair, (other_image, LABEL)),
        dataset_of(pair, pair, split="val"),
        TorchDataset((pair, pair), ("left", "right", "middle"), name="mine", split="train", ignore_index=7),
    ]
    assert len({dataset.fingerprint() for dataset in datasets}) == len(datasets)
    assert dataset_of(pair, pair, name="other").fingerprint() == datasets[0].fingerprint()


def test_a_given_fingerprint_spares_the_reading() -> None:
    class Counted(Strips):
        """Counts what is read."""

        read = 0

        def __getitem__(self, index: int) -> Any:
            Counted.read += 1
            return super().__getitem__(index)

    options: dict[str, Any] = {"name": "strips", "split": "val", "ignore_index": -1}
    first, second, again = (
        TorchDataset(Counted(9), CLASS_NAMES, fingerprint=version, **options) for version in ("v1", "v2", "v1")
    )
    before = Counted.read
    assert first.fingerprint() == again.fingerprint() != second.fingerprint()
    assert Counted.read == before
    whole = TorchDataset(Counted(9), CLASS_NAMES, **options)
    assert whole.fingerprint() == whole.fingerprint()
    assert Counted.read == before + 4 + 9  # the first one four times, to see whether it stays the same; and each once


PAIRS: dict[str, tuple[Any, str]] = {
    "no pair": ({"image": IMAGE, "label": LABEL}, r"is no pair \(image, label\) but dict: return these two"),
    "image alone": (IMAGE, r"is no pair \(image, label\) but ndarray"),
    "floats": ((IMAGE / 255, LABEL), r"has an image of float64: give pixels from 0 to 255 as uint8, not normalised"),
    "grey": (
        (IMAGE[..., 0], LABEL),
        r"has an image of the shape \(4, 6\): give a PIL picture, an array \(H, W, 3\) or a tensor",
    ),
    "rows last": ((torch.from_numpy(IMAGE), LABEL), r"has an image of the shape \(4, 6, 3\): give a PIL"),
    "label of floats": ((IMAGE, LABEL / 2), r"has a label of the shape \(4, 6\) of float64: give the classes as integers"),
    "label in colours": ((IMAGE, Image.fromarray(IMAGE)), r"has a label of the shape \(4, 6, 3\) of uint8: give the classes"),
    "label too large": (
        (IMAGE, LABEL + 1),
        r"has a label with the values 3, 8: allowed are 0 to 2 and `ignore_index`, which is 7",
    ),
    "label negative": ((IMAGE, LABEL.astype(int) - 1), r"has a label with the values -1, 6: allowed are 0 to 2 and"),
    "sizes": ((IMAGE, LABEL[1:]), r"has an image of \(4, 6\) and a label of \(3, 6\): they must be equal"),
}


@pytest.mark.parametrize(("pair", "sentence"), PAIRS.values(), ids=PAIRS.keys())
def test_a_bad_pair_is_refused_when_it_is_read(pair: Any, sentence: str) -> None:
    dataset = dataset_of((IMAGE, LABEL), pair)
    with pytest.raises(InputError, match=rf"^sample 1 of mine train {sentence}"):
        dataset[1]


class Augmented(Strips):
    """Pictures that are others whenever they are read."""

    def __getitem__(self, index: int) -> Any:
        self.seed += 1
        return super().__getitem__(index)


BAD: dict[str, tuple[Callable[[], TorchDataset], str]] = {
    "augmented": (
        lambda: TorchDataset(Augmented(2), CLASS_NAMES, name="mine", split="train", ignore_index=-1),
        r"sample 0 of mine train is another one when it is read again: give the data set without random augmentation",
    ),
    "a stream": (
        lambda: TorchDataset(iter([]), CLASS_NAMES, name="mine", split="train"),  # type: ignore[arg-type]
        r"mine train has no samples by number: give a data set with a length and an index",
    ),
    "empty": (lambda: dataset_of(), r"mine train has no samples by number"),
    "name": (lambda: dataset_of((IMAGE, LABEL), name="a/b"), r"`name` 'a/b' cannot be part of a file name: use letters"),
    "split": (lambda: dataset_of((IMAGE, LABEL), split=""), r"`split` '' cannot be part of a file name"),
    "one name": (
        lambda: TorchDataset([(IMAGE, LABEL)], "left", name="mine", split="train"),
        r"`class_names` must be 1 to 255 names, got 'left'",
    ),
    "colours": (lambda: dataset_of((IMAGE, LABEL), colours=[(0, 0, 0)]), r"`colours` has 1 colours for 3 classes: give one"),
}


@pytest.mark.parametrize(("create", "sentence"), BAD.values(), ids=BAD.keys())
def test_a_bad_data_set_is_refused_at_once(create: Callable[[], TorchDataset], sentence: str) -> None:
    with pytest.raises(InputError, match=rf"^{sentence}"):
        create()
