"""A `torch.utils.data.Dataset` of pictures and labels as a data set of this project, for who has one already."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from search.datasets import IGNORE_INDEX, Fingerprint, Sample
from search.datasets.labels import spans
from search.datasets.pictures import as_shown, as_stored
from search.datasets.srgb import RefusedError
from search.dense_tasks import DenseTask
from search.dense_tasks.segmentation import Segmentation
from search.errors import InputError

_READINGS = 4  # of the first sample, which must all give the same


class Samples(Protocol):
    """What is needed of a `torch.utils.data.Dataset`: a length, and pairs (image, label) by their index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class TorchDataset:
    """One split of a data set, a `Dataset`: the pairs (image, label) of a `torch.utils.data.Dataset`.

    An image is a PIL picture, which is taken as a viewer shows it (upright, in sRGB), an array (H, W, 3) or a tensor (3, H, W)
    of uint8. A label is a PIL picture, an array (H, W), or a tensor (H, W) or (1, H, W) of integers: the classes in the order
    of `class_names`, or `ignore_index` where a pixel does not count. `name` is part of the names of caches and runs; `colours`
    are the classes', RGB from 0 to 255, by default PASCAL VOC's. Pairs must be the same whenever they are read, so without
    random augmentation.

    `fingerprint` tells these pairs from others, such as a version. Without one, every pair is read once in each process, for
    a hash of all pixels. Raises InputError for what cannot be used; that of a pair when it is read.
    """

    def __init__(
        self,
        samples: Samples,
        class_names: Sequence[str],
        *,
        name: str,
        split: str,
        ignore_index: int | None = IGNORE_INDEX,
        colours: Sequence[tuple[int, int, int]] | None = None,
        fingerprint: str | None = None,
    ) -> None:
        for field, text in (("name", name), ("split", split)):
            if not re.fullmatch(r"\w[\w.-]*", text):
                raise InputError(f"`{field}` {text!r} cannot be part of a file name: use letters, digits, '_', '-' and '.'")
        if not 1 <= len(class_names) <= IGNORE_INDEX or isinstance(class_names, str):
            raise InputError(f"`class_names` must be 1 to {IGNORE_INDEX} names, got {class_names!r}")
        if colours is not None and len(colours) != len(class_names):
            raise InputError(f"`colours` has {len(colours)} colours for {len(class_names)} classes: give one for each")
        if not (hasattr(samples, "__getitem__") and hasattr(samples, "__len__") and len(samples)):
            raise InputError(f"{name} {split} has no samples by number: give a data set with a length and an index, not empty")
        self.name, self.split, self._samples, self._ignored = name, split, samples, ignore_index
        self.task: DenseTask = Segmentation(tuple(class_names), None if colours is None else np.array(colours, np.uint8))
        self._fingerprint: Fingerprint | None = None
        if fingerprint is not None:
            digest = hashlib.sha256(f"{self._meaning()} {fingerprint}".encode()).hexdigest()
            self._fingerprint = Fingerprint(digest, digest)
        self._require_same(_READINGS)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        name = f"{self.split}_{index}"
        pair = self._samples[index]
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise self._error(index, f"is no pair (image, label) but {type(pair).__name__}", "return these two")
        image, label = self._image(index, pair[0]), self._label(index, pair[1])
        if image.shape[:2] != label.shape:
            sizes = f"has an image of {image.shape[:2]} and a label of {label.shape}"
            raise self._error(index, sizes, "they must be equal (height, width)")
        return Sample(image, label, name)

    def fingerprint(self) -> Fingerprint:
        if self._fingerprint is None:
            images, labels = (hashlib.sha256(text.encode()) for text in (f"{self.split} {len(self)}", self._meaning()))
            for index in tqdm(range(len(self)), desc=f"fingerprint of {self.name} {self.split}", unit="image"):
                image, label, _ = self[index]
                images.update(f"{image.shape}".encode() + image.tobytes())
                labels.update(f"{label.shape}".encode() + label.tobytes())
            self._fingerprint = Fingerprint(images.hexdigest(), labels.hexdigest())
        return self._fingerprint

    def problems(self) -> list[str]:
        return []  # what is wrong with a pair is found when it is read

    def _meaning(self) -> str:
        return f"{self.split} {len(self)} {self.task.outputs} {self._ignored}"

    def _require_same(self, readings: int) -> None:
        first = self[0]
        for again in (self[0] for _ in range(readings - 1)):
            if not (np.array_equal(first.image, again.image) and np.array_equal(first.label, again.label)):
                raise self._error(0, "is another one when it is read again", "give the data set without random augmentation")

    def _image(self, index: int, value: Any) -> NDArray[np.uint8]:
        if isinstance(value, Image.Image):
            with self._telling(index, "an image"):
                return as_shown(value)
        pixels = _array(value)
        if pixels.dtype != np.uint8:
            remedy = "give pixels from 0 to 255 as uint8, not normalised: the backbone has `mean` and `std`"
            raise self._error(index, f"has an image of {pixels.dtype}", remedy)
        if isinstance(value, Tensor) and pixels.ndim == 3:
            pixels = np.moveaxis(pixels, 0, -1)
        if pixels.ndim != 3 or pixels.shape[2] != 3:
            remedy = "give a PIL picture, an array (H, W, 3) or a tensor (3, H, W)"
            raise self._error(index, f"has an image of the shape {tuple(value.shape)}", remedy)
        return np.ascontiguousarray(pixels)

    def _label(self, index: int, value: Any) -> NDArray[np.uint8]:
        if isinstance(value, Image.Image):
            with self._telling(index, "a label"):
                value = as_stored(value)
        values = _array(value)
        if values.ndim == 3 and values.shape[0] == 1 and isinstance(value, Tensor):
            values = values[0]
        if values.ndim != 2 or values.dtype.kind not in "uib":
            remedy = "give the classes as integers: a PIL picture of one channel, or an array or tensor (H, W)"
            raise self._error(index, f"has a label of the shape {values.shape} of {values.dtype}", remedy)
        classes = len(self.task.outputs)
        void = np.zeros(values.shape, bool) if self._ignored is None else values == self._ignored
        if unknown := np.unique(values[~void & ((values < 0) | (values >= classes))]).tolist():
            remedy = f"allowed are 0 to {classes - 1} and `ignore_index`, which is {self._ignored}"
            raise self._error(index, f"has a label with the values {spans(unknown)}", remedy)
        return np.where(void, IGNORE_INDEX, values).astype(np.uint8)

    @contextmanager
    def _telling(self, index: int, what: str) -> Iterator[None]:
        """Say of which sample a picture is that is refused inside."""
        try:
            yield
        except RefusedError as error:
            raise InputError(f"sample {index} of {self.name} {self.split} has {what} that {error}") from error

    def _error(self, index: int, complaint: str, remedy: str) -> InputError:
        return InputError(f"sample {index} of {self.name} {self.split} {complaint}: {remedy}")


def _array(value: Any) -> NDArray[Any]:
    return np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
