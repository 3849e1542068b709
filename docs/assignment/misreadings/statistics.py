"""Misreadings of the running statistics of a whole cell after a training step."""

from collections.abc import Callable
from typing import Any

import numpy as np

from docs.assignment.misreadings.misreading import Misreading
from docs.assignment.mutation import Changes, Function
from reference import batch_norm as bn
from reference import dense_prediction_cell as whole_cell
from reference import pointwise_conv as pointwise
from reference.batch_norm import EPS, Array, BatchNorm
from reference.cell import BACKBONE_FEATURE, Cell
from reference.concat_project import DROPOUT_RATE
from reference.dense_prediction_cell import BranchOptions, CellWeights
from reference.pointwise_conv import ConvNorm


def _updated(change: Callable[..., CellWeights[Array]]) -> Changes:
    """Other weights after the step: a function of those before, those after, all maps by index, the cell and the momentum."""

    def changed(original: Function) -> Function:
        def update(
            features: Array, cell: Cell, weights: CellWeights[Array], *, momentum: float, **options: Any
        ) -> CellWeights[Array]:
            after = original(features, cell, weights, momentum=momentum, **options)
            branches = whole_cell.branch_outputs(features, cell, weights, BranchOptions(training=True, **options))
            maps = {BACKBONE_FEATURE: features} | dict(enumerate(branches))
            return change(weights, after, maps, cell, momentum)

        return update

    return {"expected.updated_cell_statistics": changed}


def _moved(weights: ConvNorm[Array], raw: Array, momentum: float) -> ConvNorm[Array]:
    return weights._replace(norm=bn.updated_running_statistics(raw, weights.norm, momentum=momentum))


def _projection_of(raw: Callable[[Array, Array], Array]) -> Changes:
    """Statistics of the projection from something else: a function of the concatenation and the weight."""

    def change(before: Any, after: Any, maps: dict[int, Array], cell: Cell, momentum: float) -> CellWeights[Array]:
        concat = np.concatenate([maps[i] for i in range(len(cell.branches))], axis=1)
        value = raw(concat, before.projection.weight)
        projected: CellWeights[Array] = after._replace(output=_moved(before.projection, value, momentum))
        return projected

    return _updated(change)


def _whole_maps(before: Any, after: Any, maps: dict[int, Array], cell: Cell, momentum: float) -> CellWeights[Array]:
    branches = list(after.branches)
    for i, branch in enumerate(cell.branches):
        if isinstance(before.branches[i], ConvNorm):  # a pooling's; those of a 1×1 convolution stay what they are
            raw = pointwise.pointwise_conv(maps[branch.input_index], before.branches[i].weight)
            branches[i] = _moved(before.branches[i], raw, momentum)
    changed: CellWeights[Array] = after._replace(branches=tuple(branches))
    return changed


def _depthwise_forgotten(before: Any, after: Any, *_: Any) -> CellWeights[Array]:
    pairs = zip(before.branches, after.branches, strict=True)
    branches = tuple(
        new._replace(depthwise=new.depthwise._replace(norm=old.depthwise.norm)) if hasattr(new, "depthwise") else new
        for old, new in pairs
    )
    changed: CellWeights[Array] = after._replace(branches=branches)
    return changed


def _of_the_output(original: Function) -> Function:
    def update(x: Array, norm: BatchNorm[Array], *, momentum: float) -> Any:
        normalised, _ = bn._normalise(x, norm, True, EPS)
        output = np.maximum(norm.scale.reshape(1, -1, 1, 1) * normalised + norm.offset.reshape(1, -1, 1, 1), 0.0)
        return original(output, norm, momentum=momentum)

    return update


STATISTICS = (
    Misreading(
        "statistics_of_the_output",
        "published_cell",
        "with the statistics of what comes out of batch norm and ReLU",
        "they are of what comes into each batch norm",
        {"batch_norm.updated_running_statistics": _of_the_output},
    ),
    Misreading(
        "statistics_of_the_whole_map",
        "published_cell",
        "where a pooling's statistics are of the whole map, convolved",
        "they are of what comes into its batch norm: of the convolved means",
        _updated(_whole_maps),
    ),
    Misreading(
        "projection_statistics_after_relu",
        "published_cell",
        "where the projection's statistics are taken after the ReLU",
        "they are of what comes into its batch norm",
        _projection_of(lambda concat, weight: np.maximum(pointwise.pointwise_conv(concat, weight), 0.0)),
    ),
    Misreading(
        "projection_statistics_rescaled",
        "published_cell",
        "with dropout's factor in the projection's statistics",
        "without a mask there is no dropout, and so no factor",
        _projection_of(lambda concat, weight: pointwise.pointwise_conv(concat / (1.0 - DROPOUT_RATE), weight)),
    ),
    Misreading(
        "depthwise_norm_forgotten",
        "published_cell",
        "where the batch norms between two convolutions do not move",
        "a separable convolution has two batch norms, and both move",
        _updated(_depthwise_forgotten),
    ),
)
