"""Write a page of cells: `python -m search.report --cells dpc mine.json head.safetensors`.

It shows pictures, parameters and multiply-adds as in the paper's Table 1, and latency on this machine. With trained weights,
from a head or network file, also the weights of the branches (figure 5b of the paper) and the effective receptive field. Each
cell can be opened in the explorer at the page's end, and changed there.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from fast.checkpoint import load_context
from fast.dense_prediction_cell import DensePredictionCell
from reference.cell import Cell
from reference.dense_prediction_cell import BranchOptions, rate_multiplier_for
from reference.pyramid_pooling import PoolingVariant
from search.cells.cost import CellCost, module_cost
from search.cells.latency import Latency, measure_latencies
from search.cells.reach import FeatureMaps, Size
from search.cells.receptive_field import options_of, structural_receptive_field
from search.cells.space import load_cell
from search.errors import InputError
from search.reports.diagram import branch_weights, branch_weights_svg, cell_svg, effective_field_svg, paths_svg
from search.reports.explorer import Opened, explorer
from search.reports.page import write_page


@dataclass(frozen=True)
class Pictures:
    """SVG elements of one cell, of which the last two need trained weights, and what lies out of reach on the map drawn.

    A cell without branches has no weights of branches.
    """

    diagram: Markup
    paths: Markup
    remarks: list[str]
    branch_weights: Markup | None = None
    effective_field: Markup | None = None


@dataclass(frozen=True)
class ShownCell:
    """One cell of the page."""

    label: str
    context: DensePredictionCell
    is_trained: bool
    cost: CellCost
    pictures: Pictures
    positions: int  # number of features that are read at all
    latency: Latency

    @property
    def branch_weights(self) -> list[float] | None:
        return branch_weights(self.context) if self.is_trained else None


def draw_pictures(
    cell: Cell, maps: FeatureMaps, trained: DensePredictionCell | None = None, layers: Sequence[int] = (-1,)
) -> Pictures:
    """Draw the pictures of a cell on the validation map, and of its weights if there are trained ones.

    `layers` are those of the backbone that its inputs are.
    """
    size, options = maps.validation, BranchOptions(False, maps.rate_multiplier, maps.pooling, maps.pooling_size)
    diagram, paths, remarks = Markup(cell_svg(cell, layers)), Markup(paths_svg(cell, size, options)), maps.cell_remarks(cell)
    if trained is None:
        return Pictures(diagram, paths, remarks)
    field = Markup(effective_field_svg(trained, size))
    weights = Markup(branch_weights_svg(trained)) if cell.branches else None
    return Pictures(diagram, paths, remarks, weights, field)


def write_cell_report(
    path: Path,
    names: Sequence[str],
    *,
    in_channels: Sequence[int],
    branch_channels: int,
    output_stride: int,
    pooling: PoolingVariant,
    feature_size: Size,
    device: str,
) -> None:
    """Write the page of the named cells: names of known ones, JSON files, head and network files.

    Channels, output stride and pooling are for cells without weights; a file with weights states its own. Raises InputError
    for a cell that cannot be read or does not fit the map.
    """
    widths: dict[str, Any] = {"branch_channels": branch_channels, "cell_channels": branch_channels}
    contexts = {
        name: _trained_cell(Path(name))
        if _has_weights(name)
        else DensePredictionCell(
            _known_cell(name, len(in_channels)), in_channels, output_stride=output_stride, pooling=pooling, **widths
        )
        for name in names
    }
    costs = {name: _cost(name, context, feature_size) for name, context in contexts.items()}
    latencies = measure_latencies(contexts, feature_size, device=device)
    shown = [
        ShownCell(
            label=label,
            context=contexts[name],
            is_trained=_has_weights(name),
            cost=costs[name],
            pictures=draw_pictures(
                contexts[name].cell, _maps(contexts[name], feature_size), contexts[name] if _has_weights(name) else None
            ),
            positions=_positions(contexts[name], feature_size),
            latency=latencies.by_name[name],
        )
        for name, label in _labels(names).items()
    ]
    opened = [Opened.of(each.label, each.context, feature_size) for each in shown]
    write_page(path, "cell_report.html.jinja", {"cells": shown, "latencies": latencies, "explorer": explorer(opened)})


def _known_cell(name: str, num_inputs: int) -> Cell:
    cell = load_cell(name, num_inputs)
    try:
        cell.require_inputs(num_inputs)
    except ValueError as error:
        raise InputError(f"`cells` {name}: {error}; give as many `in_channels`, or another cell") from error
    return cell


def _has_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def _trained_cell(path: Path) -> DensePredictionCell:
    try:
        return load_context(path)
    except ValueError as error:
        raise InputError(f"{error}; give a head or network file of this project") from error


def _cost(name: str, context: DensePredictionCell, feature_size: Size) -> CellCost:
    try:
        return module_cost(context, feature_size)
    except ValueError as error:
        raise InputError(f"cell {name} does not fit `feature_size` {feature_size[0]} {feature_size[1]}: {error}") from error


def _labels(names: Sequence[str]) -> dict[str, str]:
    """The files' names without folder and suffix, if these are all different."""
    stems = Counter(Path(name).stem for name in dict.fromkeys(names))
    return {name: Path(name).stem if stems[Path(name).stem] == 1 else name for name in names}


def _maps(context: DensePredictionCell, feature_size: Size) -> FeatureMaps:
    """The one map of the page, as the cell reads it."""
    multiplier = rate_multiplier_for(context.output_stride)
    return FeatureMaps(feature_size, feature_size, multiplier, context.pooling, context.pooling_size)


def _positions(context: DensePredictionCell, feature_size: Size) -> int:
    return int(np.count_nonzero(structural_receptive_field(context.cell, feature_size, options_of(context))))
