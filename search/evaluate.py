"""How good a trained network is: `python -m search.evaluate --network runs/train/shapes/best.safetensors`.

The scores of its task on whole pictures: IoU per class and mIOU, or errors of depth. Predictions can be written as the test
servers of Cityscapes and PASCAL take them, and as pictures to look at.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from tqdm import tqdm

from fast.checkpoint import load_network
from fast.segmentation import SegmentationNetwork
from search.cli import Flat, print_next, run_command, uses_of_network
from search.datasets import Dataset, open_dataset
from search.dense_tasks import restored_task, totals_of_nothing
from search.devices import resolve_device
from search.errors import InputError
from search.files import write_json
from search.reports.predictions import overlay, prediction_path, write_prediction
from search.settings import DeviceSettings, PictureSettings, require
from search.training.scoring import predict_split


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Score a trained network on whole pictures: mIOU and IoU per class, or errors of depth."""

    network: Path
    """The network's file, as search.train and search.convert write it."""
    split: str = "val"
    """Split to predict; one without labels (test) has no score."""
    scales: tuple[float, ...] = (1.0,)
    """Scales of the picture over which predictions are averaged, such as 0.75 1.0 1.25."""
    flip: bool = False
    """Average over the mirror images too."""
    pad_to: tuple[int, int] | None = None
    """Height and width that every picture is padded to, such as 513 513. Default: its own, rounded up to stride·k + 1."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number format of the products in the network: float32 or bfloat16."""
    predictions: Path | None = None
    """Folder for predictions as PNG: in the names, folders and label ids of the data set's test server, depths in 16 bits."""
    overlays: Path | None = None
    """Folder for pictures to look at: the prediction, over the picture if it is of classes, and the label beside it."""
    out: Path | None = None
    """File for the scores, in JSON. None: beside the network, named after it, the data set and the split."""
    data: Flat[PictureSettings] = PictureSettings()
    device: Flat[DeviceSettings] = DeviceSettings()


def main(settings: EvaluateSettings) -> None:
    """Predict every picture of the split, print the table, write the scores."""
    _check(settings)
    device = resolve_device(settings.device.device)
    try:
        network, description = load_network(settings.network)
        task = restored_task(description)
    except ValueError as error:
        raise InputError(f"{error}; `network` takes what search.train writes, a head has no backbone") from error
    except KeyError as error:
        raise InputError(f"network {settings.network} does not say what its outputs are: train or convert it again") from error
    dataset = open_dataset(settings.data.dataset, settings.split, settings.data.data_dir, task.name)
    if task.name != dataset.task.name:
        raise InputError(
            f"network {settings.network} predicts {task.name}, the labels of {dataset.name} are for {dataset.task.name}: "
            "give the `dataset` it was trained on"
        )
    trained, present = task.outputs, dataset.task.outputs
    if trained != present:
        raise InputError(
            f"network {settings.network} was trained on {len(trained)} classes ({_some(trained)}), {dataset.name} has "
            f"{len(present)} ({_some(present)}): give the `dataset` it was trained on"
        )
    try:
        totals = _evaluate(settings, network.to(device), dataset)
    except torch.OutOfMemoryError as error:
        raise InputError("the device's memory is full: give fewer or smaller `scales`, or cpu as `device`") from error
    print(dataset.task.table(totals))
    path = settings.out or settings.network.with_name(f"{settings.network.stem}-{dataset.name}-{dataset.split}.json")
    write_json(path, _scores(settings, dataset, totals))
    print(f"scores: {path}")
    print_next(*uses_of_network(settings.network, settings.data, dataset)[1:])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def _evaluate(settings: EvaluateSettings, network: SegmentationNetwork, dataset: Dataset) -> NDArray[Any]:
    """What the task counts of all pictures; predictions and overlays are written on the way."""
    total = totals_of_nothing(dataset.task)
    autocast = torch.autocast(torch.device(network.backbone.mean.device).type, torch.bfloat16)
    predicted = predict_split(
        network, dataset, range(len(dataset)), scales=settings.scales, flip=settings.flip, pad_to=settings.pad_to
    )
    with autocast if settings.precision == "bfloat16" else nullcontext():
        bar = tqdm(predicted, total=len(dataset), desc=f"{dataset.name} {dataset.split}", unit="picture")
        for sample, prediction, counted in bar:
            total += counted.cpu()
            array = prediction.cpu().numpy().astype(dataset.task.label_dtype)
            if settings.predictions is not None:
                write_prediction(prediction_path(settings.predictions, dataset, sample.name), array, dataset.task)
            if settings.overlays is not None:
                path = settings.overlays / f"{sample.name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                overlay(sample, array, dataset.task).save(path)
    return total.numpy()


def _scores(settings: EvaluateSettings, dataset: Dataset, totals: NDArray[Any]) -> dict[str, Any]:
    return {
        "network": str(settings.network),
        "dataset": dataset.name,
        "split": dataset.split,
        "pictures": len(dataset),
        "scales": settings.scales,
        "flip": settings.flip,
        **dataset.task.facts(totals),
    }


def _check(settings: EvaluateSettings) -> None:
    has_scales = bool(settings.scales) and all(0 < scale < math.inf for scale in settings.scales)
    require("scales", settings.scales, has_scales, "numbers above 0, at least one")
    if settings.pad_to is not None:
        require("pad_to", settings.pad_to, min(settings.pad_to) >= 1, "at least 1 each")


if __name__ == "__main__":
    run_command(EvaluateSettings, main, prog="python -m search.evaluate", renamed={"--json": "--out"})
