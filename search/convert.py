"""Convert a TensorFlow V2 checkpoint of the authors' DeepLab into a network of this project: `python -m search.convert`.

What is read off the checkpoint, and what must be given, says `search/tensorflow/deeplab.py`.
"""

import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fast.checkpoint import save_network
from fast.model_card import write_card
from search.cells.space import load_cell
from search.cli import in_flags, print_next, run_command, spelled, to_type
from search.datasets import cityscapes, evaluation_size, pascal_voc
from search.dense_tasks.segmentation import Segmentation
from search.errors import InputError
from search.settings import require
from search.tensorflow.deeplab import convert
from search.tensorflow.tensor_bundle import TensorBundle

KNOWN = {  # by number of classes: the authors' two data sets
    len(known.CLASS_NAMES): (name, Segmentation(known.CLASS_NAMES, known.PALETTE))
    for name, known in (("cityscapes", cityscapes), ("pascal_voc", pascal_voc))
}


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """Read a TensorFlow checkpoint of the authors' DeepLab into a network file of this project."""

    checkpoint: Path
    """Prefix of the checkpoint, such as folder/model.ckpt, its .index file, a folder with one, or its variables as .npz."""
    out: Path
    """File to write (.safetensors)."""
    cell: str = "dpc"
    """The cell that was trained, if it was one and not ASPP: dpc (the published one), or a cell's JSON file."""
    atrous_rates: tuple[int, ...] = (6, 12, 18)
    """ASPP's rates at output stride 16, if it was ASPP."""
    output_stride: int = 16
    """Pixels per feature, 8 or 16; the weights fit both, and at 8 all rates double."""
    image_pooling_crop_size: tuple[int, int] | None = None
    """Crop in pixels to whose size the pooling windows are pinned, if the authors' flag of this name was given in training."""
    class_names: tuple[str, ...] = ()
    """Names of the classes. Default: Cityscapes' for 19 classes, PASCAL VOC's for 21, else their numbers."""
    moving_averages: bool = False
    """Take the weights' moving averages, where the training kept them, instead of the last weights."""
    show_skipped: bool = False
    """Print every skipped variable with its reason, not only how many there are for each reason."""


def main(settings: ConvertSettings) -> None:
    """Read, convert, check, write, and say what became of every variable."""
    require("output_stride", settings.output_stride, settings.output_stride in (8, 16), "8 or 16")
    if min(settings.atrous_rates, default=1) < 1:
        raise InputError(f"`atrous_rates` {' '.join(map(str, settings.atrous_rates))}: give numbers of at least 1")
    if min(settings.image_pooling_crop_size or (1,)) < 1:
        raise InputError("`image_pooling_crop_size` must be a height and a width of at least 1")
    name, shapes, read = _variables(settings.checkpoint)
    network, used, skipped = convert(
        shapes,
        read,
        cell=load_cell(settings.cell),
        atrous_rates=settings.atrous_rates,
        output_stride=settings.output_stride,
        image_pooling_crop_size=settings.image_pooling_crop_size,
        moving_averages=settings.moving_averages,
    )
    dataset, task = _known(network.head.classifier.out_channels, settings.class_names)
    save_network(
        settings.out,
        network,
        task=task.describe(),
        source={"checkpoint": name, "variables": len(used), "moving_averages": settings.moving_averages},
        evaluation=None
        if dataset is None
        else {"dataset": dataset, "pad_to": evaluation_size(dataset, network.backbone.grid)},
    )
    decoder = "a decoder" if network.decoder is not None else "no decoder"
    print(f"{network.backbone.name} at output stride {settings.output_stride}, {decoder}, {len(task.class_names)} classes")
    print(f"cell: {network.head.context.cell}")
    print(f"{len(used)} variables used, {len(skipped)} skipped" + (":" if skipped else ""))
    for reason, count in Counter(skipped.values()).most_common():
        print(f"{count:6d}  {in_flags(reason, ConvertSettings)}")
    if settings.show_skipped:
        print(*(f"{name}: {in_flags(reason, ConvertSettings)}" for name, reason in skipped.items()), sep="\n")
    print(f"wrote {settings.out} and its model card, {write_card(settings.out)}")
    print_next(*_next(settings.out, dataset))


def _next(network: Path, dataset: str | None) -> list[str]:
    """Evaluate on the data set that the file names, if it does, and export."""
    export = to_type("export", "--network", network, "--out", network.with_suffix(".pt2"))
    if dataset is None:
        return [export]
    return [to_type("evaluate", "--network", network, "--data-dir", f"data/{dataset}"), export]


def _variables(path: Path) -> tuple[str, Mapping[str, tuple[int, ...]], Callable[[str], NDArray[Any]]]:
    """A checkpoint's name, the shapes of its variables, and a function that reads one."""
    if path.suffix != ".npz":
        bundle = TensorBundle(path)
        return bundle.prefix.name, {name: entry.shape for name, entry in bundle.entries.items()}, bundle.read
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(
            f"`checkpoint` {path} cannot be read ({error}): give an .npz with an array for each variable"
        ) from error
    return path.name, {name: array.shape for name, array in arrays.items()}, arrays.__getitem__


def _known(count: int, given: tuple[str, ...]) -> tuple[str | None, Segmentation]:
    """The data set that the checkpoint was trained on, None if only its classes are known, and the task."""
    if given and len(given) != count:
        raise InputError(f"the checkpoint has {count} classes: give as many `class_names`, got {len(given)}")
    if not given and count in KNOWN:
        return KNOWN[count]
    return None, Segmentation(given or tuple(f"class {i}" for i in range(count)))


if __name__ == "__main__":
    run_command(ConvertSettings, main, prog=spelled("convert"))
