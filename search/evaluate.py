"""How good a trained network is: `python -m search.evaluate --network runs/train/shapes/best.safetensors`.

Every picture is seen whole, at its own size, padded at the bottom and right to stride·k + 1 pixels with the mean pixel, as the
authors pad 1024 × 2048 to 1025 × 2049; what was padded is not scored. IoU per class and mIOU are those of
`reference/mean_iou.py`. Predictions can be written as the test servers of Cityscapes and PASCAL take them, and as pictures to
look at.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from fast.bilinear_resize import bilinear_resize
from fast.checkpoint import load_network
from fast.mean_iou import confusion_matrix
from fast.segmentation import SegmentationNetwork, predict_scales
from reference.mean_iou import class_iou, mean_iou
from search.cli import run_command
from search.datasets import IGNORE_INDEX, Dataset, Sample, open_dataset
from search.errors import InputError
from search.features import resolve_device, write_json

_UNLABELLED = np.array((56, 56, 56), np.uint8)  # lighter greys are classes in some palettes


@torch.no_grad()
def predict_classes(
    network: SegmentationNetwork,
    image: NDArray[np.uint8],
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    pad_to: tuple[int, int] | None = None,
) -> Tensor:
    """The best class per pixel: image (H, W, 3) -> (H, W) int64, on the network's device."""
    height, width = image.shape[:2]
    mean, stride = network.backbone.mean, network.backbone.output_stride
    rounded = tuple(-(-(extent - 1) // stride) * stride + 1 for extent in (height, width))
    size = pad_to or (rounded[0], rounded[1])
    padded = mean.expand(1, 3, *size).clone()
    padded[0, :, :height, :width] = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).to(mean.device)
    if tuple(scales) == (1.0,) and not flip:  # the softmax would not change the choice
        scores = bilinear_resize(network(padded).float(), size)
    else:
        scores = predict_scales(network, padded, scales=scales, flip=flip)
    return scores.argmax(dim=1)[0, :height, :width]


def count_pixels(
    network: SegmentationNetwork,
    dataset: Dataset,
    *,
    indices: Sequence[int] | None = None,
    on_picture: Callable[[], None] = lambda: None,
) -> Tensor:
    """Confusion matrix (K, K) of a data set's pictures, at one scale, on the network's device."""
    classes = len(dataset.class_names)
    total = torch.zeros(classes, classes, dtype=torch.int64, device=network.backbone.mean.device)
    for index in range(len(dataset)) if indices is None else indices:
        sample = dataset[index]
        predicted = predict_classes(network, sample.image)
        total += confusion_matrix(predicted, torch.from_numpy(sample.label).to(predicted.device), num_classes=classes)
        on_picture()
    return total


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Score a trained network: mIOU and IoU per class, on whole pictures."""

    network: Path
    """The network's file, as search.train and search.convert write it."""
    dataset: str = "shapes"
    """Data set: shapes (generated), camvid, cityscapes, pascal_voc, pascal_person_part, or a TOML file (docs/datasets.md)."""
    data_dir: Path | None = None
    """Folder of the data set. A TOML file describes the folder it lies in unless told otherwise."""
    split: str = "val"
    """Split to predict; one without labels (test) has no score."""
    scales: tuple[float, ...] = (1.0,)
    """Scales of the picture over which class probabilities are averaged, such as 0.75 1.0 1.25."""
    flip: bool = False
    """Average over the mirror images too."""
    pad_to: tuple[int, int] | None = None
    """Height and width that every picture is padded to, such as 513 513. Default: its own, rounded up to stride·k + 1."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the products in the network."""
    predictions: Path | None = None
    """Folder for predictions as PNG, in the names, folders and label ids of the data set's test server."""
    overlays: Path | None = None
    """Folder for pictures to look at: the prediction over the picture, the label beside it."""
    json: Path | None = None
    """File for the scores. Default: beside the network, named after it, the data set and the split."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the GPU if there is one."""


def main(settings: EvaluateSettings) -> None:
    """Predict every picture of the split, print the table, write the scores."""
    _check(settings)
    device = resolve_device(settings.device)
    dataset = open_dataset(settings.dataset, settings.split, settings.data_dir)
    try:
        network, description = load_network(settings.network)
    except ValueError as error:
        raise InputError(f"{error}; --network takes what search.train writes, a head has no backbone") from error
    if tuple(description["class_names"]) != dataset.class_names:
        raise InputError(
            f"network {settings.network} was trained on {len(description['class_names'])} classes "
            f"({_some(description['class_names'])}), {dataset.name} has {len(dataset.class_names)} "
            f"({_some(dataset.class_names)}): give the --dataset it was trained on"
        )
    try:
        confusion = _evaluate(settings, network.to(device), dataset)
    except torch.OutOfMemoryError as error:
        raise InputError("the device's memory is full: give fewer or smaller --scales, or --device cpu") from error
    scores = _scores(settings, dataset, confusion)
    print(table(dataset.class_names, confusion))
    path = settings.json or settings.network.with_name(f"{settings.network.stem}-{dataset.name}-{dataset.split}.json")
    write_json(path, scores)
    print(f"scores: {path}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def table(class_names: Sequence[str], confusion: NDArray[np.int64]) -> str:
    """IoU of each class, its share of the labelled pixels, and the mIOU; a dash where a class does not occur.

    >>> print(table(("road", "car"), np.array([[3, 1], [0, 4]])))
    class     IoU %  pixels %
    road      75.00     50.00
    car       80.00     50.00
    mIOU      77.50
    """
    width = max(len(name) for name in (*class_names, "class")) + 2
    pixels = confusion.sum(axis=1) / max(confusion.sum(), 1)
    lines = [f"{'class':{width}} {'IoU %':>7} {'pixels %':>9}"]
    for name, iou, share in zip(class_names, class_iou(confusion), pixels, strict=True):
        lines.append(f"{name:{width}} {_percent(float(iou)):>7} {_percent(float(share)):>9}")
    return "\n".join([*lines, f"{'mIOU':{width}} {_percent(mean_iou(confusion)):>7}"])


def prediction_path(folder: Path, dataset: Dataset, name: str) -> Path:
    """Where the data set's test server looks for the prediction of picture `name`.

    Cityscapes takes any folder of `<city>_<sequence>_<frame>*.png`, VOC `results/VOC2012/Segmentation/comp6_<split>_cls/`.
    """
    if dataset.name == "pascal_voc":
        return folder / "results" / "VOC2012" / "Segmentation" / f"comp6_{dataset.split}_cls" / f"{name}.png"
    return folder / f"{name}.png"


def write_prediction(path: Path, predicted: NDArray[np.uint8], dataset: Dataset) -> None:
    """One label id per pixel, 8 bits: as a palette picture where ids are classes (VOC's own form), else in grey."""
    ids = np.array(dataset.label_ids, np.uint8)
    picture = Image.fromarray(ids[predicted])
    if dataset.label_ids == tuple(range(len(dataset.label_ids))):
        picture.putpalette(dataset.palette.tobytes())  # turns it into mode P; the numbers stay
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def overlay(sample: Sample, predicted: NDArray[np.uint8], dataset: Dataset) -> Image.Image:
    """The prediction's colours over the picture, the label's beside it, and below the names of the classes that occur."""
    panels = [
        _blend(sample.image, np.vstack([dataset.palette, _UNLABELLED])[classes])
        for classes in (predicted, np.minimum(sample.label, len(dataset.palette)))
    ]
    height, width = predicted.shape
    factor = max(1, round(480 / width))  # small pictures are enlarged, so that the text fits
    gap, line = 8, 22
    occurring = sorted(set(np.unique(predicted)) | set(np.unique(sample.label)) - {IGNORE_INDEX})
    names = [(dataset.class_names[k], tuple(dataset.palette[k])) for k in occurring] + [("ignored", tuple(_UNLABELLED))]
    page_width = 2 * factor * width + 3 * gap
    columns = max(1, page_width // 170)
    legend = -(-len(names) // columns) * line
    page = Image.new("RGB", (page_width, factor * height + line + legend + 3 * gap), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=14)
    for i, (panel, title) in enumerate(zip(panels, (f"prediction of {sample.name}", "label"), strict=True)):
        left = gap + i * (factor * width + gap)
        draw.text((left, gap // 2), title, fill="black", font=font)
        page.paste(panel.resize((factor * width, factor * height), Image.Resampling.NEAREST), (left, line))
    for i, (name, colour) in enumerate(names):
        left, top = gap + (i % columns) * 170, line + factor * height + gap + (i // columns) * line
        draw.rectangle((left, top + 2, left + 16, top + 16), fill=tuple(int(v) for v in colour), outline="black")
        draw.text((left + 22, top), name, fill="black", font=font)
    return page


def _evaluate(settings: EvaluateSettings, network: SegmentationNetwork, dataset: Dataset) -> NDArray[np.int64]:
    classes = len(dataset.class_names)
    total = torch.zeros(classes, classes, dtype=torch.int64)
    autocast = torch.autocast(torch.device(network.backbone.mean.device).type, torch.bfloat16)
    with autocast if settings.precision == "bfloat16" else nullcontext():
        for index in tqdm(range(len(dataset)), desc=f"{dataset.name} {dataset.split}", unit="picture"):
            sample = dataset[index]
            if settings.pad_to and any(have > room for have, room in zip(sample.label.shape, settings.pad_to, strict=True)):
                raise InputError(f"picture {sample.name} is {sample.label.shape}, larger than --pad-to {settings.pad_to}")
            predicted = predict_classes(
                network, sample.image, scales=settings.scales, flip=settings.flip, pad_to=settings.pad_to
            ).cpu()
            total += confusion_matrix(predicted, torch.from_numpy(sample.label), num_classes=classes)
            array = predicted.to(torch.uint8).numpy()
            if settings.predictions is not None:
                write_prediction(prediction_path(settings.predictions, dataset, sample.name), array, dataset)
            if settings.overlays is not None:
                path = settings.overlays / f"{sample.name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                overlay(sample, array, dataset).save(path)
    return total.numpy()


def _scores(settings: EvaluateSettings, dataset: Dataset, confusion: NDArray[np.int64]) -> dict[str, Any]:
    iou = class_iou(confusion)
    return {
        "network": str(settings.network),
        "dataset": dataset.name,
        "split": dataset.split,
        "pictures": len(dataset),
        "scales": settings.scales,
        "flip": settings.flip,
        "mean_iou": _or_none(mean_iou(confusion)),
        "class_iou": {name: _or_none(float(value)) for name, value in zip(dataset.class_names, iou, strict=True)},
        "confusion": confusion.tolist(),  # rows: label, columns: prediction
    }


def _blend(image: NDArray[np.uint8], colours: NDArray[np.uint8]) -> Image.Image:
    return Image.blend(Image.fromarray(image).convert("L").convert("RGB"), Image.fromarray(colours.astype(np.uint8)), 0.6)


def _percent(fraction: float) -> str:
    return "–" if math.isnan(fraction) else f"{100 * fraction:.2f}"


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _check(settings: EvaluateSettings) -> None:
    if not settings.scales or not all(0 < scale < math.inf for scale in settings.scales):
        raise InputError(f"--scales must be numbers above 0, at least one, got {settings.scales}")
    if settings.pad_to is not None and min(settings.pad_to) < 1:
        raise InputError(f"--pad-to must be at least 1 each, got {settings.pad_to}")


if __name__ == "__main__":
    run_command(EvaluateSettings, main, prog="python -m search.evaluate")
