"""How good a trained network is: `python -m search.evaluate --network runs/train/shapes/best.safetensors`.

IoU per class and mIOU on whole pictures (`search/training/scoring.py`). Predictions can be written as the test servers of
Cityscapes and PASCAL take them, and as pictures to look at.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from fast.checkpoint import load_network
from fast.mean_iou import confusion_matrix
from fast.segmentation import SegmentationNetwork
from search.cli import Flat, run_command
from search.datasets import Dataset, open_dataset
from search.devices import resolve_device
from search.errors import InputError
from search.files import write_json
from search.reports.predictions import overlay, prediction_path, score_table, write_prediction
from search.settings import DeviceSettings, PictureSettings, require
from search.training.scoring import Scores, predict_classes


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Score a trained network: mIOU and IoU per class, on whole pictures."""

    network: Path
    """The network's file, as search.train and search.convert write it."""
    split: str = "val"
    """Split to predict; one without labels (test) has no score."""
    scales: tuple[float, ...] = (1.0,)
    """Scales of the picture over which class probabilities are averaged, such as 0.75 1.0 1.25."""
    flip: bool = False
    """Average over the mirror images too."""
    pad_to: tuple[int, int] | None = None
    """Height and width that every picture is padded to, such as 513 513. Default: its own, rounded up to stride·k + 1."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number format of the products in the network: float32 or bfloat16."""
    predictions: Path | None = None
    """Folder for predictions as PNG, in the names, folders and label ids of the data set's test server."""
    overlays: Path | None = None
    """Folder for pictures to look at: the prediction over the picture, the label beside it."""
    out: Path | None = None
    """File for the scores, in JSON. None: beside the network, named after it, the data set and the split."""
    data: Flat[PictureSettings] = PictureSettings()
    device: Flat[DeviceSettings] = DeviceSettings()


def main(settings: EvaluateSettings) -> None:
    """Predict every picture of the split, print the table, write the scores."""
    _check(settings)
    device = resolve_device(settings.device.device)
    dataset = open_dataset(settings.data.dataset, settings.split, settings.data.data_dir)
    try:
        network, description = load_network(settings.network)
    except ValueError as error:
        raise InputError(f"{error}; `network` takes what search.train writes, a head has no backbone") from error
    if tuple(description["class_names"]) != dataset.class_names:
        raise InputError(
            f"network {settings.network} was trained on {len(description['class_names'])} classes "
            f"({_some(description['class_names'])}), {dataset.name} has {len(dataset.class_names)} "
            f"({_some(dataset.class_names)}): give the `dataset` it was trained on"
        )
    try:
        confusion = _evaluate(settings, network.to(device), dataset)
    except torch.OutOfMemoryError as error:
        raise InputError("the device's memory is full: give fewer or smaller `scales`, or cpu as `device`") from error
    scores = _scores(settings, dataset, confusion)
    print(score_table(dataset.class_names, confusion))
    path = settings.out or settings.network.with_name(f"{settings.network.stem}-{dataset.name}-{dataset.split}.json")
    write_json(path, scores)
    print(f"scores: {path}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def _evaluate(settings: EvaluateSettings, network: SegmentationNetwork, dataset: Dataset) -> NDArray[np.int64]:
    classes = len(dataset.class_names)
    total = torch.zeros(classes, classes, dtype=torch.int64)
    autocast = torch.autocast(torch.device(network.backbone.mean.device).type, torch.bfloat16)
    with autocast if settings.precision == "bfloat16" else nullcontext():
        for index in tqdm(range(len(dataset)), desc=f"{dataset.name} {dataset.split}", unit="picture"):
            sample = dataset[index]
            if settings.pad_to and any(have > room for have, room in zip(sample.label.shape, settings.pad_to, strict=True)):
                raise InputError(f"picture {sample.name} is {sample.label.shape}, larger than `pad_to` {settings.pad_to}")
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
    scores = Scores.of(confusion)
    return {
        "network": str(settings.network),
        "dataset": dataset.name,
        "split": dataset.split,
        "pictures": len(dataset),
        "scales": settings.scales,
        "flip": settings.flip,
        "mean_iou": None if math.isnan(scores.mean_iou) else scores.mean_iou,
        "class_iou": dict(zip(dataset.class_names, scores.class_iou, strict=True)),
        "confusion": confusion.tolist(),  # rows: label, columns: prediction
    }


def _check(settings: EvaluateSettings) -> None:
    has_scales = bool(settings.scales) and all(0 < scale < math.inf for scale in settings.scales)
    require("scales", settings.scales, has_scales, "numbers above 0, at least one")
    if settings.pad_to is not None:
        require("pad_to", settings.pad_to, min(settings.pad_to) >= 1, "at least 1 each")


if __name__ == "__main__":
    run_command(EvaluateSettings, main, prog="python -m search.evaluate", renamed={"--json": "--out"})
