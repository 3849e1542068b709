"""How good a trained network is: `python -m search.evaluate --network runs/train/shapes/best.safetensors`.

The scores of its task on whole pictures: IoU per class and mIOU, or errors of depth. Predictions can be written as the test
servers of Cityscapes and PASCAL take them, and as pictures to look at.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from search.cli import Flat, print_next, run_command, spelled, uses_of_network
from search.datasets import Dataset, Sample, open_dataset
from search.datasets.files import FileDataset, largest_picture
from search.datasets.look import look_at, require_labelled
from search.dense_tasks import totals_of_nothing
from search.errors import InputError
from search.files import write_json
from search.reports.predictions import overlay, prediction_path, write_picture, write_prediction
from search.settings import DeviceSettings, PictureSettings, PredictionSettings, known, scored
from search.training.predictor import Predictor
from search.training.scoring import predict_split


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Score a trained network on whole pictures: mIOU and IoU per class, or errors of depth."""

    network: Path
    """The network's file, as training and conversion write it."""
    dataset: str | None = None
    """Data set: shapes, camvid, cityscapes, pascal_voc, pascal_person_part, or a TOML file. None: what it was trained on."""
    data_dir: Path | None = None
    """Folder of the data set. Default for a TOML file: the folder that the file is in."""
    split: str = "val"
    """Split to predict; one without labels (test) has no score."""
    predictions: Path | None = None
    """Folder for predictions as PNG: in the names, folders and label ids of the data set's test server, depths in 16 bits."""
    overlays: Path | None = None
    """Folder for pictures to look at: the prediction, over the picture if it is of classes, and the label beside it."""
    out: Path | None = None
    """File for the scores, in JSON. None: beside the network, named after it, the data set and the split."""
    prediction: Flat[PredictionSettings] = PredictionSettings()
    device: Flat[DeviceSettings] = DeviceSettings()


def main(settings: EvaluateSettings) -> None:
    """Predict every picture of the split, print the table, write the scores."""
    predictor = Predictor.load(settings.network, settings.prediction, device=settings.device.device, dataset=settings.dataset)
    dataset = _open(settings, predictor)
    if not _is_withheld(dataset):
        look_at(None, dataset)
        require_labelled(dataset, "split")
    name, picture = largest_picture(dataset)
    predictor.require(picture, name)
    totals = _evaluate(settings, predictor, dataset)
    print(dataset.task.table(totals))
    path = settings.out or settings.network.with_name(f"{settings.network.stem}-{dataset.name}-{dataset.split}.json")
    write_json(path, _scores(settings, predictor, dataset, totals))
    print(f"scores: {path}")
    data = PictureSettings(
        dataset=settings.dataset or known(predictor.dataset),
        data_dir=settings.data_dir,
        max_megapixels=settings.prediction.max_megapixels,
    )
    print_next(*uses_of_network(settings.network, data, dataset, settings.prediction)[1:])


def _open(settings: EvaluateSettings, predictor: Predictor) -> Dataset:
    """The data set that is given, or else the network's own. Raises InputError for one whose labels are not its outputs."""
    name = settings.dataset or predictor.dataset
    if name is None:
        raise InputError(f"network {settings.network} does not say what it was trained on: give the `dataset`")
    if settings.dataset is None and name.endswith(".toml") and not Path(name).is_file():
        raise InputError(f"network {settings.network} was trained on {name}, which is not there: give that file as `dataset`")
    task = predictor.task
    dataset = open_dataset(name, settings.split, settings.data_dir, task.name, settings.prediction.max_megapixels)
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
    return dataset


def _is_withheld(dataset: Dataset) -> bool:
    """Whether the labels are known not to be public, so that predictions are all there can be."""
    return dataset.split == "test" or (isinstance(dataset, FileDataset) and all(pair.label is None for pair in dataset.pairs))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def _evaluate(settings: EvaluateSettings, predictor: Predictor, dataset: Dataset) -> NDArray[Any]:
    """What the task counts of all pictures; predictions and overlays are written on the way."""

    def predict(sample: Sample) -> Tensor:
        return predictor.predict_pixels(sample.image, sample.name)

    total = totals_of_nothing(dataset.task)
    predicted = predict_split(predict, dataset, range(len(dataset)))
    for sample, prediction, counted in tqdm(
        predicted, total=len(dataset), desc=f"{dataset.name} {dataset.split}", unit="picture"
    ):
        total += counted.cpu()
        array = prediction.cpu().numpy().astype(dataset.task.label_dtype)
        if settings.predictions is not None:
            write_prediction(prediction_path(settings.predictions, dataset, sample.name), array, dataset.task)
        if settings.overlays is not None:
            page = overlay(sample.image, {f"prediction of {sample.name}": array, "label": sample.label}, dataset.task)
            write_picture(settings.overlays / f"{sample.name}.png", page)
    return total.numpy()


def _scores(settings: EvaluateSettings, predictor: Predictor, dataset: Dataset, totals: NDArray[Any]) -> dict[str, Any]:
    tiles = predictor.tiles
    return {
        "network": str(settings.network),
        "dataset": dataset.name,
        "split": dataset.split,
        "pictures": len(dataset),
        **scored(settings.prediction),
        "pad_to": predictor.padding or "own",
        "tile_size": "whole" if tiles is None else tiles.size,
        "tile_overlap": None if tiles is None else tiles.overlap,
        "output_stride": predictor.network.backbone.output_stride,
        **dataset.task.facts(totals),
    }


if __name__ == "__main__":
    run_command(EvaluateSettings, main, prog=spelled("evaluate"), renamed={"--json": "--out"})
