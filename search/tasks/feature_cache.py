"""Backbone features of a data set, computed once (paper, section 3.3) and memory-mapped by trainings.

A cache is a folder with the features (N, C, h, w) and labels (N, H, W) as raw arrays, and a manifest that says what they were
made from. The manifest counts the finished images, so the same command finishes a cache that was interrupted. A cache that is
half-written, damaged, or made from something else is refused, with the reason.

With H = s·(h − 1) + 1 for output stride s, feature (i, j) sits on pixel (s·i, s·j); smaller images are padded at the bottom
and right with the mean pixel, which is not labelled.
"""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fast.backbone import Backbone
from search.backbones import create_backbone
from search.datasets import Dataset, open_splits
from search.dense_tasks import DenseTask, restored_task
from search.devices import resolve_device
from search.errors import InputError
from search.files import write_json
from search.folder import Folder
from search.settings import BackboneSettings, DataSettings, FeatureDtype, FeatureSettings, MachineSettings, fingerprints

_DTYPES: dict[FeatureDtype, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_BEHIND = {"data_fingerprint": "`data_dir` (pictures)", "weights_hash": "`weights` (content)"}  # facts, not settings
_BATCH = 8  # images per pass of the backbone


class HalfWrittenError(InputError):
    """A cache is absent or unfinished; computing the features finishes it."""


@dataclass(frozen=True)
class FeatureCache:
    """Features and labels of one split, memory-mapped.

    `features`: (N, C, h, w) float16 or bfloat16, `labels`: (N, H, W) as the task has them; `manifest`: their origin.
    """

    directory: Path
    features: Tensor
    labels: Tensor
    manifest: dict[str, Any]

    @property
    def task(self) -> DenseTask:
        return restored_task(self.manifest)

    @property
    def output_stride(self) -> int:
        return int(self.manifest["output_stride"])


def open_cache(directory: Path, expected: dict[str, Any] | None = None) -> FeatureCache:
    """Open a finished cache. Raises InputError for one that is absent, half-written, damaged, or not made from `expected`."""
    path = directory / "manifest.json"
    if not path.is_file():
        raise HalfWrittenError(f"{directory} holds no feature cache: make it with `python -m search.features`")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        done, features_shape, labels_shape = manifest["done"], manifest["features_shape"], manifest["labels_shape"]
        label_dtype = restored_task(manifest).label_dtype
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}): delete the folder {directory} and run the command again") from error
    for field, value in (expected or {}).items():
        if manifest.get(field) != value:
            before, now, name = _brief(manifest.get(field)), _brief(value), _BEHIND.get(field, f"`{field}`")
            raise InputError(
                f"cache {directory} is stale: it was made with {name} {before}, this run has {now}; delete that folder or "
                "give another `cache_dir`"
            )
    if done < features_shape[0]:
        raise HalfWrittenError(
            f"cache {directory} is half-written ({done} of {features_shape[0]} images): "
            "finish it by running `python -m search.features` with the same flags"
        )
    features = _map(directory / "features.bin", features_shape, np.dtype(np.int16)).view(_DTYPES[manifest["feature_dtype"]])
    return FeatureCache(directory, features, _map(directory / "labels.bin", labels_shape, label_dtype), manifest)


def build_cache(directory: Path, dataset: Dataset, backbone: Backbone, identity: dict[str, Any], device: str) -> FeatureCache:
    """Compute the cache of a split, or finish it; `identity` is kept in the manifest and checked when it is opened.

    Raises InputError for unusable images and for a folder that cannot be written; finished images are kept.
    """
    try:
        with Folder(directory, "cache", "give another `cache_dir`").locked():
            _fill(directory, dataset, backbone.to(device).eval(), identity, device)
    except OSError as error:
        raise InputError(
            f"cannot write {directory} ({error}): give another `cache_dir`, or make room and run again"
        ) from error
    return open_cache(directory, identity)


def prepare_caches(
    data: DataSettings, backbone: BackboneSettings, features: FeatureSettings, machine: MachineSettings
) -> dict[str, FeatureCache]:
    """The caches of the splits "train" and "val", opened if they exist and computed if not."""
    backbone.check()
    features.check(backbone.stride)
    device = resolve_device(machine.device)
    datasets = dict(zip(("train", "val"), open_splits(data), strict=True))
    network = create_backbone(backbone, data.dataset, machine.cache_dir)
    caches = {}
    for role, dataset in datasets.items():
        mirrored = features.mirrored and role == "train"
        identity = _identity(features, dataset, network, mirrored)
        name = f"{dataset.name}-{dataset.split}-{network.name}-os{network.output_stride}" + ("-mirrored" if mirrored else "")
        directory = machine.cache_dir / name
        try:
            caches[role] = open_cache(directory, identity)
        except HalfWrittenError:
            caches[role] = build_cache(directory, dataset, network, identity, device)
    val = caches["val"]
    if not any(val.task.is_labelled(label).any() for label in val.labels):  # the first one that has any ends it
        name = f"{datasets['val'].name} {datasets['val'].split}"
        raise InputError(f"no pixel of {name} has a label to score by: give another `val_split`, or correct its labels")
    return caches


def facts_of(caches: Mapping[str, FeatureCache]) -> dict[str, Any]:
    """What the features are, for the identity of who trains on them: facts in place of what the settings leave open."""
    train, val = caches["train"].manifest, caches["val"].manifest
    facts = {name: train[name] for name in ("dataset", "backbone", "weights_origin", "output_stride", "image_size")}
    pictures = fingerprints(train["data_fingerprint"], val["data_fingerprint"])
    return facts | pictures | {"`weights` (content)": train["weights_hash"]}


def _fill(directory: Path, dataset: Dataset, backbone: Backbone, identity: dict[str, Any], device: str) -> None:
    shape = _shapes(dataset, backbone, identity, device)
    normalisation = {"mean": backbone.mean.flatten().tolist(), "std": backbone.std.flatten().tolist()}  # of pixels 0 to 255
    label_dtype = dataset.task.label_dtype
    manifest = _resumable_manifest(directory, {**identity, **shape, **normalisation, "done": 0}, label_dtype)
    if not manifest["done"]:
        (directory / "manifest.json").unlink(missing_ok=True)  # the images that it counted are about to be overwritten
    _require_space(directory, shape, label_dtype)
    arrays = [
        np.memmap(directory / file, dtype, "r+" if manifest["done"] else "w+", shape=tuple(shape[key]))
        for file, dtype, key in (("features.bin", np.int16, "features_shape"), ("labels.bin", label_dtype, "labels_shape"))
    ]
    dtype = _DTYPES[identity["feature_dtype"]]
    total = shape["features_shape"][0]
    bar = tqdm(total=total, initial=manifest["done"], desc=f"features of {dataset.name} {dataset.split}", unit="image")
    with bar, torch.inference_mode():
        for start in range(manifest["done"], total, _BATCH):
            stop = min(start + _BATCH, total)
            images, labels = _batch(dataset, range(start, stop), identity["image_size"], backbone.mean.cpu())
            features = backbone(images.to(device)).to(dtype)
            if not features.isfinite().all():
                raise InputError(
                    f"features of {dataset.name} leave the range of {identity['feature_dtype']}: give `feature_dtype` bfloat16"
                )
            arrays[0][start:stop] = features.cpu().contiguous().view(torch.int16).numpy()
            arrays[1][start:stop] = labels
            for array in arrays:
                array.flush()  # the data must be on disk before the manifest counts them
            manifest["done"] = stop
            write_json(directory / "manifest.json", manifest)
            bar.update(stop - start)


def _shapes(dataset: Dataset, backbone: Backbone, identity: dict[str, Any], device: str) -> dict[str, list[int]]:
    count = len(dataset) * (2 if identity["mirrored"] else 1)
    (height, width), stride = identity["image_size"], identity["output_stride"]
    if min(height, width) < 1 or (height - 1) % stride or (width - 1) % stride:
        raise InputError(f"`image_size` {height} {width} must be {stride}·k + 1 each, such as {16 * stride + 1}")
    with torch.inference_mode():
        _, channels, h, w = backbone(torch.zeros(1, 3, height, width, device=device)).shape
    if (height, width) != (stride * (h - 1) + 1, stride * (w - 1) + 1):
        raise InputError(
            f"`backbone` {backbone.name} has no feature on every {stride}th pixel, the corners included: give another"
        )
    return {"features_shape": [count, channels, h, w], "labels_shape": [count, height, width]}


def _resumable_manifest(directory: Path, fresh: dict[str, Any], label_dtype: np.dtype[Any]) -> dict[str, Any]:
    """The manifest of an interrupted cache if it has the same identity and complete arrays, or else `fresh`."""
    try:
        manifest: dict[str, Any] = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return fresh
    sizes = _bytes(fresh, label_dtype)
    whole = all((path := directory / file).is_file() and path.stat().st_size == size for file, size in sizes.items())
    return manifest if whole and {**manifest, "done": 0} == fresh else fresh


def _bytes(shape: Mapping[str, list[int]], label_dtype: np.dtype[Any]) -> dict[str, int]:
    """The size of each file of a cache."""
    return {
        "features.bin": 2 * math.prod(shape["features_shape"]),
        "labels.bin": label_dtype.itemsize * math.prod(shape["labels_shape"]),
    }


def _batch(dataset: Dataset, indices: range, size: tuple[int, int], mean: Tensor) -> tuple[Tensor, NDArray[Any]]:
    """Images (n, 3, H, W) float32 padded with the mean pixel, and labels (n, H, W), of which no padded pixel is labelled."""
    images = mean.expand(len(indices), 3, *size).clone()
    labels = np.stack([dataset.task.unlabelled(size)] * len(indices))
    for row, index in enumerate(indices):
        sample = dataset[index % len(dataset)]  # the mirror images follow the images
        image, label = (sample.image, sample.label) if index < len(dataset) else (sample.image[:, ::-1], sample.label[:, ::-1])
        height, width = label.shape
        if height > size[0] or width > size[1]:
            raise InputError(
                f"image {sample.name} is {height}×{width}, larger than {size[0]}×{size[1]}: give a larger `image_size`"
            )
        images[row, :, :height, :width] = torch.from_numpy(image.copy()).permute(2, 0, 1)
        labels[row, :height, :width] = label
    return images, labels


def _identity(settings: FeatureSettings, dataset: Dataset, backbone: Backbone, mirrored: bool) -> dict[str, Any]:
    return {
        "format": 1,
        "dataset": dataset.name,
        "split": dataset.split,
        "data_fingerprint": dataset.fingerprint(),
        **dataset.task.describe(),
        "backbone": backbone.name,
        "weights_hash": backbone.weights_hash(),
        "weights_origin": backbone.weights_origin,
        "output_stride": backbone.output_stride,
        "image_size": list(padded_size(settings, dataset, backbone.output_stride)),
        "mirrored": mirrored,
        "feature_dtype": settings.feature_dtype,
    }


def padded_size(settings: FeatureSettings, dataset: Dataset, output_stride: int) -> tuple[int, int]:
    """Height and width in pixels that images are padded to: as given, or else so that the first image fits."""
    height, width = (-(-(extent - 1) // output_stride) * output_stride + 1 for extent in dataset[0].label.shape)
    return settings.image_size or (height, width)


def _map(path: Path, shape: list[int], dtype: np.dtype[Any]) -> Tensor:
    size = int(np.prod(shape)) * dtype.itemsize
    actual = path.stat().st_size if path.is_file() else 0
    if actual != size:
        raise InputError(
            f"{path} is damaged ({actual} bytes instead of {size}): delete the folder {path.parent} and run again"
        )
    array = np.memmap(path, dtype, "c", shape=tuple(shape))  # copy on write: nothing is written to the file
    return torch.from_numpy(array)


def _require_space(directory: Path, shape: dict[str, list[int]], label_dtype: np.dtype[Any]) -> None:
    """Refuse a disk without enough space: a memory map on a full disk kills the process without a message."""
    needed = sum(_bytes(shape, label_dtype).values())
    present = sum(path.stat().st_blocks * 512 for path in directory.glob("*.bin"))
    if needed - present > shutil.disk_usage(directory).free:
        raise OSError(f"needs {needed / 2**30:.1f} GiB of free disk")


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"
