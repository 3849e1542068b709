"""Build a whole network from settings, with initial weights: backbone, cell, decoder if wanted, classifier."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fast.backbone import hash_of_weights
from fast.batch_norm import authors_norm
from fast.checkpoint import FileKind, describe_file, load_head, load_network
from fast.decoder import Decoder
from fast.dense_prediction_cell import DensePredictionCell
from fast.segmentation import SegmentationHead, SegmentationNetwork
from reference.cell import Cell
from reference.grid import Grid
from search.backbones import completed_backbone, create_backbone, grid_of
from search.backbones.facts import described_grid, described_layers, facts_of_backbone
from search.cells.space import require_layers
from search.datasets import Dataset, contents
from search.dense_tasks import DenseTask, restored_task
from search.devices import Devices
from search.errors import InputError
from search.settings import BackboneSettings, TrainingPictures, TrainingSettings, given, known, scored
from search.training.frozen import require_blocks


def completed_training(settings: TrainingSettings, pictures: TrainingPictures, begun: Path | None = None) -> TrainingSettings:
    """The settings with what follows from the pictures to train on, and from the file that `weights`, `init` or `head` is.

    They are checked. Raises InputError for what cannot work, before anything is written.
    """
    settings, grid = _with_grid(settings, begun)
    completed = settings.completed(pictures, grid)
    completed.check(grid)
    return completed


def _with_grid(settings: TrainingSettings, begun: Path | None) -> tuple[TrainingSettings, Grid]:
    """The settings with the backbone of the file that `weights`, `init` or `head` is, and the grid of its features."""
    backbone, found = completed_backbone(settings.backbone), _described(begun)
    if found is None:
        return replace(settings, backbone=backbone), grid_of(backbone, settings.data.dataset)
    _, description = found
    grid = described_grid({"output_stride": description["output_stride"], **description.get("backbone", {})})
    backbone = replace(backbone, output_stride=given(backbone.output_stride, grid.stride))
    return replace(settings, backbone=backbone), grid


def kind_of(path: Path) -> FileKind | None:
    """Whether a file is a head, which has no backbone, or a network. Raises InputError for a damaged one."""
    found = _described(path)
    return None if found is None else found[0]


def _described(path: Path | None) -> tuple[FileKind, dict[str, Any]] | None:
    try:
        return None if path is None else describe_file(path)
    except ValueError as error:
        raise InputError(f"{error}; give another file") from error


def create_network(settings: TrainingSettings, cell: Cell, task: DenseTask) -> SegmentationNetwork:
    """Build a network around the cell, with weights from the backbone's settings and the seed. Raises InputError."""
    require_layers("cell", str(cell), cell, len(settings.backbone.layers))
    torch.manual_seed(settings.seed)
    backbone = create_backbone(
        settings.backbone, settings.data.dataset, settings.machine.cache_dir, low_level=settings.recipe.decoder
    )
    channels = settings.head.channels
    context = DensePredictionCell(
        cell,
        backbone.layer_channels,
        branch_channels=channels,
        cell_channels=channels,
        output_stride=backbone.output_stride,
        dropout_rate=settings.head.dropout,
        pooling=settings.head.pooling,
        norm_layer=authors_norm,
    )
    decoder = None
    if backbone.low_level is not None:
        decoder = Decoder(backbone.low_level.channels, channels=context.cell_channels, norm_layer=authors_norm)
    return SegmentationNetwork(backbone, SegmentationHead(context, len(task.outputs)), decoder)


def join_head(
    path: Path, settings: BackboneSettings, cache_dir: Path, *, decoder: bool = False
) -> tuple[SegmentationNetwork, dict[str, Any]]:
    """A network of the head in a file and the backbone that it was trained on, in evaluation mode, and the head's description.

    `settings` say where the backbone's weights are; its name, origin and output stride are in the file. A decoder begins anew.
    Raises InputError for other weights than the head was trained on.
    """
    try:
        head, description = load_head(path, norm_layer=authors_norm)
    except ValueError as error:
        raise InputError(f"{error}; give another file") from error
    described = description["backbone"]
    if not {"backbone", "output_stride", "weights_origin", "weights_hash"} <= described.keys():
        raise InputError(f"head {path} does not say which backbone it was trained on: give one that a search has kept")
    name, stride = described["backbone"], described["output_stride"]
    asked = completed_backbone(settings)
    if (given(asked.backbone, name), given(asked.output_stride, stride)) != (name, stride):
        raise InputError(
            f"head {path} was trained on {name} at output stride {stride}: leave out `backbone` and `output_stride`, which "
            "are in the file"
        )
    own = replace(
        asked,
        backbone=name,
        output_stride=stride,
        layers=described_layers(described),
        patch_size=described.get("patch_size"),
        weights_origin=described["weights_origin"],
    )
    for field in ("layers", "patch_size"):
        if getattr(asked, field) not in (getattr(own, field), getattr(BackboneSettings, field)):
            raise InputError(
                f"head {path} was trained on other `{field}`: leave that out, or give the `weights` of its search"
            )
    backbone = create_backbone(own, described.get("dataset", ""), cache_dir, low_level=decoder)
    if backbone.weights_hash() != described["weights_hash"]:
        hashes = [each[:12] for each in (described["weights_hash"], backbone.weights_hash())]
        raise InputError(
            f"head {path} was trained on {name} with the weights {hashes[0]}…, these are {hashes[1]}…: give the `weights`, "
            "`pretrained` or `cache_dir` of its search"
        )
    low_level, channels = backbone.low_level, head.context.cell_channels
    part = Decoder(low_level.channels, channels=channels, norm_layer=authors_norm) if low_level else None
    return SegmentationNetwork(backbone, head, part).eval(), description


def initial_network(settings: TrainingSettings, path: Path, task: DenseTask) -> SegmentationNetwork:
    """The network of a file, with its architecture; with other outputs the last layer begins anew. Raises InputError.

    A head's file brings all but the backbone, which is that of the settings.
    """
    torch.manual_seed(settings.seed)
    if kind_of(path) == "head":
        network, description = join_head(path, settings.backbone, settings.machine.cache_dir, decoder=settings.recipe.decoder)
    else:
        network, description = _load_network(path)
    try:
        before = restored_task(description)
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} does not say what its outputs are: give another file") from error
    if (before.name, before.outputs) != (task.name, task.outputs):
        names = ", ".join(before.outputs[:3]) + ", ..." * (len(before.outputs) > 3)
        print(f"{path} has other outputs ({names}): the last layer begins anew", file=sys.stderr)
        network.head = SegmentationHead(network.head.context, len(task.outputs))
    network.head.context.dropout.p = settings.head.dropout
    return network


def _load_network(path: Path) -> tuple[SegmentationNetwork, dict[str, Any]]:
    try:
        return load_network(path, norm_layer=authors_norm)
    except ValueError as error:
        raise InputError(f"{error}; give another file") from error


def training_identity(
    settings: TrainingSettings,
    network: SegmentationNetwork,
    train: Dataset,
    val: Dataset,
    devices: Devices,
    begun: Path | None = None,
) -> dict[str, Any]:
    """The settings that the losses of a training depend on: other values are refused in the same folder.

    Raises InputError for a batch that cannot be divided among passes and devices, and for blocks that there are not.
    """
    require_blocks(network.backbone, settings.recipe.trainable_blocks)
    batch_size, parts = known(settings.recipe.batch_size), settings.recipe.accumulate * devices.count
    if batch_size % parts:
        raise InputError(
            f"`batch_size` {batch_size} cannot be divided into {parts} equal parts (`accumulate` "
            f"{settings.recipe.accumulate}, {devices.count} devices)"
        )
    context = network.head.context
    identity = scored(settings, settings.data, settings.backbone, settings.head, settings.loss, settings.recipe) | {
        "dataset": train.name,
        "cell": str(context.cell),
        "backbone": network.backbone.name,
        "output_stride": network.backbone.output_stride,
        **facts_of_backbone(network.backbone),
        **contents("train_split", train.fingerprint()),
        **contents("val_split", val.fingerprint()),
        "number of devices": devices.count,
    }
    if begun is None:
        return identity | {"`weights` (content)": network.backbone.weights_hash()}
    return identity | {"`init` (content)": hash_of_weights(network)}
