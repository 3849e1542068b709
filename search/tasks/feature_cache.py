"""Backbone features of a data set, computed once (paper, section 3.3) and memory-mapped by trainings.

A cache is a `Folder` with the features (N, C, h, w) and labels (N, H, W) as raw arrays. Its settings say what they were made
from, and its only result, `progress.json`, counts the finished images. `open_cache` refuses a cache that is unfinished, made
from something else, or has files of the wrong size; `build_cache` finishes one that was interrupted, and brings one up to date
whose files hold something else by now: labels alone are copied anew, of other images the features are computed anew.

Features sit on the pixels of their backbone's grid (`reference/grid.py`), and the padded images begin and end on it; smaller
ones are padded at the bottom and right with the mean pixel, which is not labelled.
"""

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm, trange

from fast.backbone import Backbone
from reference.grid import Grid
from search.backbones import completed_backbone, create_backbone, grid_of
from search.backbones.facts import described_grid, facts_in, facts_of_backbone
from search.commands import spelled
from search.datasets import Dataset, Fingerprint, contents, open_splits
from search.datasets.counts import size_for_all, size_of
from search.datasets.files import FileDataset, origin_of
from search.datasets.look import look_at, require_labels
from search.dense_tasks import DenseTask, restored_task
from search.devices import resolve_device
from search.errors import InputError
from search.folder import CONTENT, Folder
from search.settings import (
    BackboneSettings,
    DataSettings,
    FeatureDtype,
    FeatureSettings,
    MachineSettings,
    TrainingPictures,
    check_on_grid,
)
from search.tasks.overlap import OnItsWay, one_ahead, one_behind
from search.training.memory import features_in_memory

_DTYPES: dict[FeatureDtype, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_READERS = min(8, os.cpu_count() or 1)  # threads, because decoding lets others go on
_BATCH = 8  # images per pass of the backbone, or fewer where they would not fit into memory
PICTURES, LABELS, WEIGHTS = f"{CONTENT}images", f"{CONTENT}labels", "`weights` (content)"  # names of hashes in an identity
MEAN, STD = "`backbone` (mean pixel)", "`backbone` (deviation of pixels)"  # of values 0 to 255
_IMAGES, _CHANNELS = "number of images", "number of channels"
_LAYER_CHANNELS = "numbers of channels of the layers"  # only where there are several
_EARLIER = "is of an earlier version"
_LABELS_DONE = "labels"  # in the progress while labels are copied anew: of how many images that is done


class HalfWrittenError(InputError):
    """A cache is absent, unfinished, or of files that hold something else by now; computing the features mends that."""


@dataclass(frozen=True)
class _Held:
    """What a cache holds: how many images have features, how many of these have their labels, and why others are worthless."""

    done: int = 0
    labels: int = 0
    fault: str = ""


@dataclass(frozen=True)
class FeatureCache:
    """Features and labels of one split, memory-mapped.

    `features`: (N, C, h, w) float16 or bfloat16, `labels`: (N, H, W) as the task has them; `identity`: all they depend on.
    """

    directory: Path
    features: Tensor
    labels: Tensor
    identity: dict[str, Any]

    @property
    def task(self) -> DenseTask:
        return restored_task(self.identity)

    @property
    def pictures(self) -> TrainingPictures:
        """What the defaults of a training on these features follow from."""
        number, height, width = self.labels.shape
        return TrainingPictures(self.identity["dataset"], number, (height, width))

    @property
    def grid(self) -> Grid:
        return described_grid(self.identity)

    @property
    def layer_channels(self) -> tuple[int, ...]:
        """The channels of each layer of the backbone, which follow each other in the features."""
        return tuple(self.identity.get(_LAYER_CHANNELS, (self.features.shape[1],)))


def open_cache(directory: Path, identity: dict[str, Any]) -> FeatureCache:
    """Open a finished cache. Raises InputError for one that is absent, half-written, damaged, or not made from `identity`."""
    held = _held(_folder(directory), identity)
    if held.fault or held.labels < identity[_IMAGES]:
        complaint = held.fault or f"holds the features of {held.labels} of {identity[_IMAGES]} images"
        raise HalfWrittenError(f"{directory} {complaint}: finish it by running `{spelled('features')}` with the same flags")
    arrays = _arrays(directory, identity)
    for array in arrays:
        if array.bytes_on_disk != array.bytes:
            raise InputError(
                f"{array.path} is damaged ({array.bytes_on_disk} bytes instead of {array.bytes}): "
                f"delete the folder {directory} and run again"
            )
    maps = [np.memmap(path, dtype, "c", shape=shape) for path, dtype, shape in arrays]  # copy on write: no file is changed
    features, labels = map(torch.from_numpy, maps)
    return FeatureCache(directory, features.view(_DTYPES[identity["feature_dtype"]]), labels, identity)


def build_cache(
    directory: Path, dataset: Dataset, backbone: Backbone, identity: dict[str, Any], device: str, command: str
) -> FeatureCache:
    """Compute the cache of a split, or finish it; `identity` is all that it depends on, `command` what the user typed.

    Raises InputError for unusable images and for a folder that cannot be written; finished images are kept.
    """
    folder = _folder(directory)
    try:
        with folder.locked(waits=True):  # then it has what this process needs
            _fill(folder, dataset, backbone.to(device).eval(), identity, device, command)
    except OSError as error:
        raise InputError(
            f"cannot write {directory} ({error}): give another `cache_dir`, or make room and run again"
        ) from error
    return open_cache(directory, identity)


def open_for_features(
    data: DataSettings, backbone: BackboneSettings, features: FeatureSettings, machine: MachineSettings
) -> tuple[Dataset, Dataset]:
    """The splits to train and to score on, after a look at their labels, which prints what is odd in them.

    Raises InputError for settings that cannot work, and for labels that cannot be learnt from or scored on.
    """
    features.check(grid_of(backbone, data.dataset))
    resolve_device(machine.device)  # refuses an absent one before anything is read
    train, val = open_splits(data)
    look_at(train, val)
    require_labels(train, val)
    return train, val


def prepare_caches(
    splits: tuple[Dataset, Dataset],
    data: DataSettings,
    backbone: BackboneSettings,
    features: FeatureSettings,
    machine: MachineSettings,
    command: str,
    crop_size: tuple[int, int] | None = None,
) -> dict[str, FeatureCache]:
    """The caches "train" and "val" of the splits of `data`, opened if they exist and computed if not, by the typed `command`.

    `crop_size` is the height and width of what will be cut from the training pictures. Raises InputError as `caches_of`.
    """
    backbone = completed_backbone(backbone)
    features.check(grid_of(backbone, data.dataset))
    network = create_backbone(backbone, data.dataset, machine.cache_dir)
    return caches_of(*splits, network, features, machine, command, crop_size)


def caches_of(
    train: Dataset,
    val: Dataset,
    network: Backbone,
    features: FeatureSettings,
    machine: MachineSettings,
    command: str,
    crop_size: tuple[int, int] | None = None,
) -> dict[str, FeatureCache]:
    """The caches "train" and "val" of these pictures, opened if they exist and computed if not, by the typed `command`.

    Raises InputError for unusable pictures, and, before anything is computed, for a size that does not hold them all, and for
    crops that cannot be cut from it.
    """
    device = resolve_device(machine.device)
    datasets = {"train": train, "val": val}
    identities, places = {}, {}
    for role, dataset in datasets.items():
        mirrored = features.mirrored and role == "train"
        identities[role] = identity = _identity(features, dataset, network, mirrored)
        name = f"{dataset.name}-{dataset.split}-{network.name}-os{network.output_stride}" + ("-mirrored" if mirrored else "")
        places[role] = _place(machine.cache_dir, name, identity, origin_of(dataset))
    if crop_size is not None:
        require_crop(crop_size, identities["train"]["image_size"], network.grid)
    caches = {role: _opened(places[role], identities[role]) for role in datasets}
    if None in caches.values():
        _require_room(datasets, identities)
    return {
        role: cache or build_cache(places[role], datasets[role], network, identities[role], device, command)
        for role, cache in caches.items()
    }


def require_crop(crop_size: tuple[int, int], size: Sequence[int], grid: Grid) -> None:
    """Refuse crops that do not begin and end on features of the cached images, of this height and width. Raises InputError."""
    height, width = size
    if not grid.has(crop_size) or crop_size[0] > height or crop_size[1] > width:
        near = grid.nearest(crop_size)
        given, most, fits = (" ".join(map(str, each)) for each in (crop_size, size, map(min, near, size)))
        raise InputError(f"`crop_size` {given} must be {grid} each, at most {most}, the cached images' size, such as {fits}")


def _opened(directory: Path, identity: dict[str, Any]) -> FeatureCache | None:
    """A finished cache; None if there is none."""
    try:
        return open_cache(directory, identity)
    except HalfWrittenError:
        return None


def _require_room(datasets: Mapping[str, Dataset], identities: Mapping[str, dict[str, Any]]) -> None:
    """Refuse a size that does not hold all pictures, and say which one does. Images' headers alone are read."""
    for role, dataset in datasets.items():
        height, width = identities[role]["image_size"]
        for index in range(len(dataset)):
            h, w = size_of(dataset, index)
            if h <= height and w <= width:
                continue
            fits = size_for_all(list(datasets.values()), described_grid(identities[role]))
            raise InputError(
                f"image {dataset[index].name} is {h}×{w}, larger than {height}×{width}: give a larger `image_size`; "
                f"{fits[0]} {fits[1]} fits all pictures of {' and '.join(each.split for each in datasets.values())}"
            )


def facts_of(caches: Mapping[str, FeatureCache]) -> dict[str, Any]:
    """What the features are, for the identity of who trains on them: facts in place of what the settings leave open."""
    train, val = caches["train"].identity, caches["val"].identity
    names = ("dataset", "backbone", WEIGHTS, "weights_origin", "output_stride", *facts_in(train), "image_size")
    of_train, of_val = (Fingerprint(identity[PICTURES], identity[LABELS]) for identity in (train, val))
    return {name: train[name] for name in names} | contents("train_split", of_train) | contents("val_split", of_val)


def padded_size(settings: FeatureSettings, dataset: Dataset, grid: Grid) -> tuple[int, int]:
    """Height and width in pixels that images are padded to: as given, or else so that the first image fits."""
    height, width = dataset[0].label.shape
    return settings.image_size or grid.rounded_up((height, width))


def _identity(settings: FeatureSettings, dataset: Dataset, backbone: Backbone, mirrored: bool) -> dict[str, Any]:
    """All that a cache depends on; what no feature depends on is named by `_of_labels`."""
    images, labels = dataset.fingerprint()
    return {
        "dataset": dataset.name,
        "`train_split` or `val_split`": dataset.split,
        PICTURES: images,
        LABELS: labels,
        **dataset.task.describe(),
        "backbone": backbone.name,
        WEIGHTS: backbone.weights_hash(),
        "weights_origin": backbone.weights_origin,
        MEAN: backbone.mean.flatten().tolist(),
        STD: backbone.std.flatten().tolist(),
        "output_stride": backbone.output_stride,
        **facts_of_backbone(backbone),
        "image_size": list(padded_size(settings, dataset, backbone.grid)),
        "mirrored": mirrored,
        "feature_dtype": settings.feature_dtype,
        _IMAGES: len(dataset) * (2 if mirrored else 1),
        _CHANNELS: backbone.channels,
        **({_LAYER_CHANNELS: list(backbone.layer_channels)} if len(backbone.layer_channels) > 1 else {}),
    }


def _of_labels(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an identity that features do not depend on, without what is only drawn."""
    task = restored_task(identity)
    return {name: identity[name] for name in (LABELS, *task.describe()) if name not in task.only_drawn}


def _recipe(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an identity that remains when files change what they hold: what features are, of whatever pictures."""
    of_files = {PICTURES, LABELS, _IMAGES, *restored_task(identity).describe()}
    return {name: value for name, value in identity.items() if name not in of_files}


def _place(cache_dir: Path, name: str, identity: Mapping[str, Any], origin: str) -> Path:
    """The folder in `cache_dir` for these features, whose name begins with `name`: the one that has them, or else a free one.

    The name alone does not tell apart other weights, sizes or number formats, and data sets of one name. A data set whose
    files have changed is still the same one, by its `origin`: its cache is brought up to date.
    """
    recipe, usual = _recipe(identity), cache_dir / name
    own = hashlib.sha256(json.dumps([recipe, origin]).encode()).hexdigest()[:8]
    described = {path: _folder(path).description() for path in (usual, *sorted(cache_dir.glob(f"{name}-{'[0-9a-f]' * 8}")))}
    begun = {path: description for path, description in described.items() if description is not None}
    alike = {
        path: description
        for path, description in begun.items()
        if all(description["identity"].get(field) == value for field, value in recipe.items())
    }
    of_files = {name: identity[name] for name in (PICTURES, LABELS)}
    same = [path for path, each in alike.items() if all(each["identity"].get(name) == of_files[name] for name in of_files)]
    outdated = [path for path, each in alike.items() if each.get("origin") == origin or PICTURES not in each["identity"]]
    return [*same, *outdated, cache_dir / f"{name}-{own}" if usual in begun else usual][0]


class _Array(NamedTuple):
    """A file of a cache, which holds nothing but an array."""

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def bytes_on_disk(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0


def _arrays(directory: Path, identity: Mapping[str, Any]) -> tuple[_Array, _Array]:
    """Features (N, C, h, w), as their bits because NumPy has no bfloat16, and labels (N, H, W)."""
    count, (height, width) = identity[_IMAGES], identity["image_size"]
    shape = count, identity[_CHANNELS], *described_grid(identity).features((height, width))
    features = _Array(directory / "features.bin", np.dtype(np.int16), shape)
    return features, _Array(directory / "labels.bin", restored_task(identity).label_dtype, (count, height, width))


def _folder(directory: Path) -> Folder:
    return Folder(directory, "feature cache", "give another `cache_dir`")


def _as_begun(folder: Folder, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity with the colours that the cache was begun with, if it was: it does not depend on them."""
    before = folder.description()
    drawn = restored_task(identity).only_drawn
    return {**identity, **{name: before["identity"].get(name) for name in drawn if before is not None}}


def _held(folder: Folder, identity: Mapping[str, Any]) -> _Held:
    """What the cache holds of this. Raises InputError if the folder is damaged, or its features are of another kind."""
    description, progress = folder.description(), folder.result("progress")
    if description is None or progress is None:  # no image is finished, so other settings may replace these
        return _Held(fault=_EARLIER if (folder.path / "manifest.json").exists() else "")
    before = description["identity"]
    if PICTURES not in before:
        return _Held(fault=_EARLIER)
    folder.check({**before, **_recipe(identity)})
    if before[PICTURES] != identity[PICTURES]:
        return _Held(fault="was made of images that have changed since")
    done, count = progress.get("done"), identity[_IMAGES]
    labels = progress.get(_LABELS_DONE, done)
    if not (isinstance(done, int) and isinstance(labels, int) and 0 <= labels <= done <= count):
        raise folder.damaged("progress", ValueError(f"{done} of {count} images done"))
    of_labels = _of_labels(identity)
    if any(before.get(name) != value for name, value in of_labels.items()):
        return _Held(done, 0, "was made of labels that have changed since")
    return _Held(done, labels)


def _fill(folder: Folder, dataset: Dataset, backbone: Backbone, identity: dict[str, Any], device: str, command: str) -> None:
    """Compute what is missing; meanwhile other threads read the next files, and write the last features."""
    count, size, precision = identity[_IMAGES], _checked_size(identity), identity["feature_dtype"]
    mean, on_gpu = backbone.mean.cpu(), torch.device(device).type == "cuda"
    with features_in_memory(backbone, size, _BATCH) as at_once, torch.inference_mode():
        _check_grid(backbone, identity, device)
        features, labels, done = _begun(folder, dataset, mean, identity, command)

        def write(indices: range, values: OnItsWay, overflown: OnItsWay, of_batch: NDArray[Any]) -> None:
            if overflown.arrived():
                raise InputError(f"features of {dataset.name} leave the range of {precision}: give `feature_dtype` bfloat16")
            batch = slice(indices.start, indices.stop)
            features[batch], labels[batch] = values.arrived().view(torch.int16).numpy(), of_batch
            for array in (features, labels):
                array.flush()  # the data must be on disk before they are counted
            folder.write_result("progress", {"done": indices.stop})
            bar.update(len(indices))

        parts = [range(start, min(start + at_once, count)) for start in range(done, count, at_once)]
        bar = tqdm(total=count, initial=done, desc=f"features of {dataset.name} {dataset.split}", unit="image")
        with bar, one_behind(write) as written, _read_batches(dataset, parts, size, mean, on_gpu) as ready:
            for indices, images, of_batch in ready:
                values = backbone(images.to(device, non_blocking=True)).to(_DTYPES[precision]).contiguous()
                written(indices, OnItsWay(values), OnItsWay((~values.isfinite()).any()), of_batch)


@contextmanager
def _read_batches(
    dataset: Dataset, parts: Sequence[range], size: tuple[int, int], mean: Tensor, pinned: bool
) -> Iterator[Iterator[tuple[range, Tensor, NDArray[Any]]]]:
    """The parts' indices with their `_batch`: files are read by several threads, one batch ahead.

    Another data set is read by the thread that asks: it may be tied to that one, as a connection to SQLite is.
    """

    def read(indices: range, read_all: Callable[..., Iterable[None]] = map) -> tuple[range, Tensor, NDArray[Any]]:
        return indices, *_batch(dataset, indices, size, mean, read_all, pinned)

    if not isinstance(dataset, FileDataset):
        yield map(read, parts)
        return
    with ThreadPoolExecutor(_READERS) as threads, one_ahead(partial(read, read_all=threads.map), parts) as ready:
        yield ready


def _begun(
    folder: Folder, dataset: Dataset, mean: Tensor, identity: dict[str, Any], command: str
) -> tuple[np.memmap[Any, Any], np.memmap[Any, Any], int]:
    """Begin a cache, or go on with it: features and labels as writable memory maps, and how many images are finished."""
    arrays = _arrays(folder.path, identity)
    _require_space(arrays)
    done = _begin(folder, dataset, mean, identity, command)
    features, labels = (np.memmap(path, dtype, "r+" if done else "w+", shape=shape) for path, dtype, shape in arrays)
    return features, labels, done


def _checked_size(identity: Mapping[str, Any]) -> tuple[int, int]:
    """The size of the padded images. Raises InputError for one off the grid of features."""
    height, width = identity["image_size"]
    check_on_grid("image_size", (height, width), described_grid(identity))
    return height, width


def _begin(folder: Folder, dataset: Dataset, mean: Tensor, identity: dict[str, Any], command: str) -> int:
    """Begin the cache, or bring what it holds up to date; how many images are finished then."""
    held, (features, labels) = _held(folder, identity), _arrays(folder.path, identity)
    has_labels = labels.bytes_on_disk == labels.bytes or held.labels < held.done  # which are replaced
    if features.bytes_on_disk != features.bytes or not has_labels:
        held = _Held(fault=held.fault)
    if held.fault:
        redone = "its labels are copied once more, its features remain" if held.done else "its features are computed once more"
        print(f"{folder.path} {held.fault}: {redone}", file=sys.stderr)
    if not held.done:  # nothing may count what the arrays held, because they are about to be overwritten
        for name in ("progress.json", "settings.json", "manifest.json"):  # earlier versions had the last
            (folder.path / name).unlink(missing_ok=True)
        for array in (features, labels):  # a search that reads them goes on with the files that it has open
            array.path.unlink(missing_ok=True)
    elif held.labels < held.done:
        _copy_labels(folder, dataset, mean, identity, held.done)
    folder.begin(_as_begun(folder, identity), command, origin=origin_of(dataset))
    if held.labels < held.done:
        folder.write_result("progress", {"done": held.done})
    return held.done


def _copy_labels(folder: Folder, dataset: Dataset, mean: Tensor, identity: Mapping[str, Any], done: int) -> None:
    """Copy the labels of the finished images anew, beside the old ones, which a search may be reading."""
    folder.write_result("progress", {"done": done, _LABELS_DONE: 0})  # from here on the cache is unfinished
    _, (path, dtype, shape) = _arrays(folder.path, identity)
    aside = _Array(path.with_name(f"{path.name}.partial"), dtype, shape)
    aside.path.unlink(missing_ok=True)
    _require_space((aside,))
    labels = np.memmap(aside.path, dtype, "w+", shape=shape)
    for start in trange(0, done, _BATCH, desc=f"labels of {dataset.name} {dataset.split}", unit="batch"):
        stop = min(start + _BATCH, done)
        labels[start:stop] = _batch(dataset, range(start, stop), identity["image_size"], mean)[1]
    labels.flush()
    aside.path.replace(path)
    (folder.path / "settings.json").unlink()  # which says what the old ones were made from


def _check_grid(backbone: Backbone, identity: Mapping[str, Any], device: str) -> None:
    """Raise InputError unless the padded images have as many features as their size on the grid says."""
    height, width = _checked_size(identity)
    with torch.inference_mode():
        h, w = backbone(torch.zeros(1, 3, height, width, device=device)).shape[2:]
    if backbone.grid.features((height, width)) != (h, w):
        raise InputError(
            f"`backbone` {backbone.name} has no feature on every {backbone.output_stride}th pixel ({backbone.grid.name}): it "
            f"gives {h}×{w} of {height}×{width} pixels; give another"
        )


def _require_space(arrays: Sequence[_Array]) -> None:
    """Refuse a disk without enough space: a memory map on a full disk kills the process without a message."""
    needed = sum(array.bytes for array in arrays)
    present = sum(array.path.stat().st_blocks * 512 for array in arrays if array.path.is_file())
    if needed - present > shutil.disk_usage(arrays[0].path.parent).free:
        raise OSError(f"needs {needed / 2**30:.1f} GiB of free disk")


def _batch(
    dataset: Dataset,
    indices: range,
    size: tuple[int, int],
    mean: Tensor,
    read_all: Callable[..., Iterable[None]] = map,
    pinned: bool = False,
) -> tuple[Tensor, NDArray[Any]]:
    """Images (n, 3, H, W) float32 padded with the mean pixel, and labels (n, H, W), of which no padded pixel is labelled.

    `read_all` maps a function over the pictures, as a pool of threads may; `pinned` memory can be copied to a GPU meanwhile.
    """
    images = torch.empty((len(indices), 3, *size), pin_memory=pinned)
    canvas = images.numpy()  # PyTorch would begin threads of its own for each of those that read
    canvas[:] = mean.numpy()
    labels = np.stack([dataset.task.unlabelled(size)] * len(indices))

    def read(row: int) -> None:
        index = indices[row]
        sample = dataset[index % len(dataset)]  # the mirror images follow the images
        image, label = (sample.image, sample.label) if index < len(dataset) else (sample.image[:, ::-1], sample.label[:, ::-1])
        height, width = label.shape
        if height > size[0] or width > size[1]:
            raise InputError(
                f"image {sample.name} is {height}×{width}, larger than {size[0]}×{size[1]}: give a larger `image_size`"
            )
        canvas[row, :, :height, :width] = image.transpose(2, 0, 1)
        labels[row, :height, :width] = label

    list(read_all(read, range(len(indices))))  # which raises the first error
    return images, labels
