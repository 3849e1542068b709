"""Backbone features of a data set, computed once (paper, section 3.3): `python -m search.features`.

A cache is a folder with the features (N, C, h, w) and labels (N, H, W) as raw arrays that are mapped into memory, and a
manifest that says what they were made from. The manifest counts the finished images, so that a cache that was interrupted is
finished by the same command, and one that is half-written, damaged, or made from something else is refused by name.

With H = s·(h − 1) + 1 for output stride s, feature (i, j) sits on pixel (s·i, s·j); smaller images are padded at the bottom
and right with the mean pixel and label 255.
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fast.backbone import Backbone, WeightsOrigin, timm_backbone
from fast.checkpoint import write_whole
from reference.upsampled_cross_entropy import IGNORE_INDEX
from search.backbones.shapes import SHAPES_BACKBONES, SMALL_BACKBONE, shapes_backbone
from search.datasets import SPLITS, Dataset, open_dataset
from search.errors import InputError

FeatureDtype = Literal["float16", "bfloat16"]
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_BATCH = 8  # images per pass of the backbone


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """Which features: the data set and the backbone that turns its images into them."""

    dataset: str = "shapes"
    """Data set: shapes (generated), camvid, cityscapes, pascal_voc, pascal_person_part, or a TOML file (docs/datasets.md)."""
    data_dir: Path | None = None
    """Folder of the data set. A TOML file describes the folder it lies in unless told otherwise."""
    train_split: str = "train"
    """Split to train on, such as pascal_voc's train_aug."""
    backbone: str | None = None
    """Any timm model with feature maps. Default: a small one trained on the spot for shapes, mobilenetv2_100 for the rest."""
    weights: Path | None = None
    """Local file of the backbone's weights (safetensors or PyTorch state dict, in timm's key names)."""
    weights_origin: WeightsOrigin = "timm"
    """Where the weights were trained: tensorflow ones expect its padding, batch norm epsilon 1e-3 and inputs in -1..1."""
    pretrained: bool = False
    """Let timm download its pretrained weights."""
    output_stride: int = 16
    """Pixels per feature, 8 or 16; at 8 the cells' rates double."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels that images are padded to. Default: the first image's size, rounded up to stride·k + 1."""
    mirrored: bool = False
    """Cache each training image's mirror image too."""
    feature_dtype: FeatureDtype = "float16"
    """Number format of the cached features: float16 or bfloat16."""
    cache_dir: Path = Path("cache")
    """Folder of the caches, one folder in it for each."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the GPU if there is one."""


class HalfWrittenError(InputError):
    """A cache that is absent or unfinished, and that computing the features will finish."""


@dataclass(frozen=True)
class FeatureCache:
    """Features and labels of one split, memory-mapped.

    `features`: (N, C, h, w) float16 or bfloat16, `labels`: (N, H, W) uint8 with 255 ignored; `manifest`: what they are.
    """

    directory: Path
    features: Tensor
    labels: Tensor
    manifest: dict[str, Any]

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.manifest["class_names"])

    @property
    def output_stride(self) -> int:
        return int(self.manifest["output_stride"])


def open_cache(directory: Path, expected: dict[str, Any] | None = None) -> FeatureCache:
    """Map a finished cache. Raises InputError for one that is absent, half-written, damaged, or not made from `expected`."""
    path = directory / "manifest.json"
    if not path.is_file():
        raise HalfWrittenError(f"{directory} holds no feature cache: make it with `python -m search.features`")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        done, features_shape, labels_shape = manifest["done"], manifest["features_shape"], manifest["labels_shape"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}): delete the folder {directory} and run the command again") from error
    for field, value in (expected or {}).items():
        if manifest.get(field) != value:
            raise InputError(
                f"cache {directory} is stale: it was made with {field} {_brief(manifest.get(field))}, this run has "
                f"{_brief(value)}; delete that folder or give another --cache-dir"
            )
    if done < features_shape[0]:
        raise HalfWrittenError(
            f"cache {directory} is half-written ({done} of {features_shape[0]} images): "
            "finish it by running `python -m search.features` with the same flags"
        )
    features = _map(directory / "features.bin", features_shape, np.dtype(np.int16)).view(_DTYPES[manifest["feature_dtype"]])
    return FeatureCache(directory, features, _map(directory / "labels.bin", labels_shape, np.dtype(np.uint8)), manifest)


def build_cache(directory: Path, dataset: Dataset, backbone: Backbone, identity: dict[str, Any], device: str) -> FeatureCache:
    """Compute, or finish, the cache of a split; `identity` is kept in the manifest and checked by whoever opens it.

    Raises InputError for unusable images and for a folder that cannot be written; what is finished stays finished.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(directory / "lock", timeout=0):
            _fill(directory, dataset, backbone.to(device).eval(), identity, device)
    except Timeout as error:
        raise InputError(f"cache {directory} is being written by another process: wait for it to finish") from error
    except OSError as error:
        raise InputError(
            f"cannot write {directory} ({error}): give another --cache-dir, or make room and run again"
        ) from error
    return open_cache(directory, identity)


def prepare_caches(settings: FeatureSettings) -> dict[str, FeatureCache]:
    """The caches to train and to validate on, by "train" and "val", opened if they exist and computed if not."""
    device = resolve_device(settings.device)
    names = dict(zip(SPLITS, (settings.train_split, "val"), strict=True))
    datasets = {role: open_dataset(settings.dataset, split, settings.data_dir) for role, split in names.items()}
    backbone = create_backbone(settings)
    caches = {}
    for role, dataset in datasets.items():
        mirrored = settings.mirrored and role == "train"
        identity = _identity(settings, dataset, backbone, mirrored)
        name = f"{dataset.name}-{dataset.split}-{backbone.name}-os{settings.output_stride}" + ("-mirrored" if mirrored else "")
        directory = settings.cache_dir / name
        try:
            caches[role] = open_cache(directory, identity)
        except HalfWrittenError:
            caches[role] = build_cache(directory, dataset, backbone, identity, device)
    return caches


def create_backbone(settings: FeatureSettings, *, low_level: bool = False) -> Backbone:
    """The backbone that the settings name, with its weights. Raises InputError naming the flag.

    `low_level=True` also gives the map at stride 4 that a decoder reads.
    """
    if settings.output_stride not in (8, 16):
        raise InputError(f"--output-stride must be 8 or 16, got {settings.output_stride}")
    name = settings.backbone or (SMALL_BACKBONE if settings.dataset == "shapes" else "mobilenetv2_100")
    if settings.dataset == "shapes" and name in SHAPES_BACKBONES:
        if settings.weights is not None or settings.pretrained:
            raise InputError("--weights and --pretrained belong to a --backbone: name it, or leave them out")
        return shapes_backbone(settings.cache_dir, settings.output_stride, name=name, low_level=low_level)
    if settings.weights is None and not settings.pretrained:
        raise InputError(
            "the backbone would have random weights: give --weights FILE, or --pretrained to let timm download its own"
        )
    try:
        return timm_backbone(
            name,
            output_stride=settings.output_stride,
            weights=settings.weights,
            pretrained=settings.pretrained,
            weights_origin=settings.weights_origin,
            low_level=low_level,
        )
    except ValueError as error:
        flags = ["--backbone", "--weights", "--output-stride", *(["--decoder"] if low_level else [])]
        raise InputError(f"{error}; correct {', '.join(flags[:-1])} or {flags[-1]}") from error
    except OSError as error:
        raise InputError(f"timm could not load its weights of {name} ({error}): give --weights FILE") from error


def resolve_device(device: str) -> str:
    """The device that a --device flag names, a GPU with its number. Raises InputError where it is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        if place.type == "cuda" and torch.cuda.is_available():  # asked without a tensor, whose context takes half a gigabyte
            index = torch.cuda.current_device() if place.index is None else place.index
            torch.cuda.get_device_properties(index)
            return f"cuda:{index}"
        return str(torch.empty(1, device=place).device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device} cannot be used ({reason}): give --device cpu or leave it out") from error


def _fill(directory: Path, dataset: Dataset, backbone: Backbone, identity: dict[str, Any], device: str) -> None:
    shape = _shapes(dataset, backbone, identity, device)
    normalisation = {"mean": backbone.mean.flatten().tolist(), "std": backbone.std.flatten().tolist()}  # of pixels 0 to 255
    manifest = _resumable_manifest(directory, {**identity, **shape, **normalisation, "done": 0})
    if not manifest["done"]:
        (directory / "manifest.json").unlink(missing_ok=True)  # what it counted is about to be overwritten
    _require_space(directory, shape)
    arrays = [
        np.memmap(directory / file, dtype, "r+" if manifest["done"] else "w+", shape=tuple(shape[key]))
        for file, dtype, key in (("features.bin", np.int16, "features_shape"), ("labels.bin", np.uint8, "labels_shape"))
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
                raise InputError(f"features of {dataset.name} leave the range of {identity['feature_dtype']}: use bfloat16")
            arrays[0][start:stop] = features.cpu().contiguous().view(torch.int16).numpy()
            arrays[1][start:stop] = labels
            for array in arrays:
                array.flush()  # the data are on disk before the manifest says so
            manifest["done"] = stop
            write_json(directory / "manifest.json", manifest)
            bar.update(stop - start)


def _shapes(dataset: Dataset, backbone: Backbone, identity: dict[str, Any], device: str) -> dict[str, list[int]]:
    count = len(dataset) * (2 if identity["mirrored"] else 1)
    (height, width), stride = identity["image_size"], identity["output_stride"]
    if min(height, width) < 1 or (height - 1) % stride or (width - 1) % stride:
        raise InputError(f"--image-size {height} {width} must be {stride}·k + 1 each, such as {16 * stride + 1}")
    with torch.inference_mode():
        _, channels, h, w = backbone(torch.zeros(1, 3, height, width, device=device)).shape
    if (height, width) != (stride * (h - 1) + 1, stride * (w - 1) + 1):
        raise InputError(
            f"--backbone {backbone.name} has no feature on every {stride}th pixel, the corners included: give another"
        )
    return {"features_shape": [count, channels, h, w], "labels_shape": [count, height, width]}


def _resumable_manifest(directory: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a cache that was interrupted, if it is of the same identity and its arrays are whole."""
    try:
        manifest: dict[str, Any] = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return fresh
    sizes = {"features.bin": 2 * math.prod(fresh["features_shape"]), "labels.bin": math.prod(fresh["labels_shape"])}
    whole = all((path := directory / file).is_file() and path.stat().st_size == size for file, size in sizes.items())
    return manifest if whole and {**manifest, "done": 0} == fresh else fresh


def _batch(dataset: Dataset, indices: range, size: tuple[int, int], mean: Tensor) -> tuple[Tensor, NDArray[np.uint8]]:
    """Images (n, 3, H, W) float32 padded with the mean pixel, and labels (n, H, W) padded with 255."""
    images = mean.expand(len(indices), 3, *size).clone()
    labels = np.full((len(indices), *size), IGNORE_INDEX, dtype=np.uint8)
    for row, index in enumerate(indices):
        sample = dataset[index % len(dataset)]  # the mirror images follow the images
        image, label = (sample.image, sample.label) if index < len(dataset) else (sample.image[:, ::-1], sample.label[:, ::-1])
        height, width = label.shape
        if height > size[0] or width > size[1]:
            raise InputError(
                f"image {sample.name} is {height}×{width}, larger than {size[0]}×{size[1]}: give a larger --image-size"
            )
        images[row, :, :height, :width] = torch.from_numpy(image.copy()).permute(2, 0, 1)
        labels[row, :height, :width] = label
    return images, labels


def _identity(settings: FeatureSettings, dataset: Dataset, backbone: Backbone, mirrored: bool) -> dict[str, Any]:
    stride = settings.output_stride
    return {
        "format": 1,
        "dataset": dataset.name,
        "split": dataset.split,
        "data_fingerprint": dataset.fingerprint(),
        "class_names": list(dataset.class_names),
        "palette": dataset.palette.tolist(),
        "backbone": backbone.name,
        "weights_hash": backbone.weights_hash(),
        "weights_origin": settings.weights_origin,
        "output_stride": stride,
        "image_size": list(padded_size(settings, dataset)),
        "mirrored": mirrored,
        "feature_dtype": settings.feature_dtype,
    }


def padded_size(settings: FeatureSettings, dataset: Dataset) -> tuple[int, int]:
    """Height and width in pixels that images are padded to: as the settings say, else so that the first image fits."""
    stride = settings.output_stride
    height, width = (-(-(extent - 1) // stride) * stride + 1 for extent in dataset[0].label.shape)
    return settings.image_size or (height, width)


def _map(path: Path, shape: list[int], dtype: np.dtype[Any]) -> Tensor:
    size = int(np.prod(shape)) * dtype.itemsize
    actual = path.stat().st_size if path.is_file() else 0
    if actual != size:
        raise InputError(
            f"{path} is damaged ({actual} bytes instead of {size}): delete the folder {path.parent} and run again"
        )
    array = np.memmap(path, dtype, "c", shape=tuple(shape))  # copy on write: nothing reaches the file
    return torch.from_numpy(array)


def _require_space(directory: Path, shape: dict[str, list[int]]) -> None:
    """A memory map on a full disk dies by a signal, without a message; so look before."""
    needed = 2 * int(np.prod(shape["features_shape"])) + int(np.prod(shape["labels_shape"]))
    present = sum(path.stat().st_blocks * 512 for path in directory.glob("*.bin"))
    if needed - present > shutil.disk_usage(directory).free:
        raise OSError(f"needs {needed / 2**30:.1f} GiB of free disk")


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"


def write_text(path: Path, text: str) -> None:
    """`write_whole` of the text in UTF-8."""
    write_whole(path, text.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """`write_text` of the content as JSON."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def main(settings: FeatureSettings) -> None:
    """Compute the caches of both splits and say what they hold."""
    for split, cache in prepare_caches(settings).items():
        gigabytes = cache.features.numel() * cache.features.element_size() / 1e9
        print(f"{split}: {cache.directory}, features {tuple(cache.features.shape)} {cache.features.dtype}, {gigabytes:.2f} GB")


if __name__ == "__main__":
    from search.cli import run_command  # what imports the features needs no library of flags

    run_command(FeatureSettings, main, prog="python -m search.features", goes_on=True)
