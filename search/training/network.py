"""Build a whole network from settings, with initial weights: backbone, cell, decoder if wanted, classifier."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fast.batch_norm import authors_norm
from fast.checkpoint import load_network
from fast.decoder import Decoder
from fast.dense_prediction_cell import DensePredictionCell
from fast.segmentation import SegmentationHead, SegmentationNetwork
from reference.cell import Cell
from search.backbones import create_backbone
from search.datasets import Dataset
from search.dense_tasks import DenseTask, restored_task
from search.devices import Devices
from search.errors import InputError
from search.settings import TrainingSettings, fingerprints, known, scored


def create_network(settings: TrainingSettings, cell: Cell, task: DenseTask) -> SegmentationNetwork:
    """Build a network around the cell, with weights from the backbone's settings and the seed. Raises InputError."""
    torch.manual_seed(settings.seed)
    backbone = create_backbone(
        settings.backbone, settings.data.dataset, settings.machine.cache_dir, low_level=settings.recipe.decoder
    )
    channels = settings.head.channels
    context = DensePredictionCell(
        cell,
        backbone.channels,
        branch_channels=channels,
        cell_channels=channels,
        output_stride=backbone.output_stride,
        dropout_rate=settings.head.dropout,
        pooling=settings.head.pooling,
        norm_layer=authors_norm,
    )
    decoder = None
    if backbone.low_level is not None:
        decoder = Decoder(backbone.low_level.channels, channels=channels, norm_layer=authors_norm)
    return SegmentationNetwork(backbone, SegmentationHead(context, len(task.outputs)), decoder)


def initial_network(settings: TrainingSettings, path: Path, task: DenseTask) -> SegmentationNetwork:
    """Load the network of a file, with its architecture; with other outputs the last layer begins anew. Raises InputError."""
    torch.manual_seed(settings.seed)
    try:
        network, description = load_network(path, norm_layer=authors_norm)
        before = restored_task(description)
    except ValueError as error:
        raise InputError(f"{error}; correct `init`") from error
    except KeyError as error:
        raise InputError(f"network {path} does not say what its outputs are; correct `init`") from error
    if (before.name, before.outputs) != (task.name, task.outputs):
        names = ", ".join(before.outputs[:3]) + ", ..." * (len(before.outputs) > 3)
        print(f"{path} has other outputs ({names}): the last layer begins anew", file=sys.stderr)
        network.head = SegmentationHead(network.head.context, len(task.outputs))
    network.head.context.dropout.p = settings.head.dropout
    return network


def training_identity(
    settings: TrainingSettings,
    network: SegmentationNetwork,
    train: Dataset,
    val: Dataset,
    devices: Devices,
    init: Path | None = None,
) -> dict[str, Any]:
    """The settings that the losses of a training depend on: other values are refused in the same folder.

    Raises InputError for a batch that cannot be divided among passes and devices.
    """
    batch_size, parts = known(settings.recipe.batch_size), settings.recipe.accumulate * devices.count
    if batch_size % parts:
        raise InputError(
            f"`batch_size` {batch_size} cannot be divided into {parts} equal parts (`accumulate` "
            f"{settings.recipe.accumulate}, {devices.count} devices)"
        )
    context = network.head.context
    identity = scored(settings, settings.data, settings.backbone, settings.head, settings.recipe) | {
        "dataset": train.name,
        "cell": str(context.cell),
        "backbone": network.backbone.name,
        "output_stride": network.backbone.output_stride,
        **fingerprints(train.fingerprint(), val.fingerprint()),
        "number of devices": devices.count,
    }
    if init is None:
        return identity | {"`weights` (content)": network.backbone.weights_hash()}
    return identity | {"`init` (content)": str(weights_sum(network))}


def weights_sum(network: nn.Module) -> float:
    """A number by which weights are told from others."""
    return sum(float(value.double().abs().sum()) for value in network.state_dict().values())
