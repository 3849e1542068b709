"""The explorer: a part of a page where a cell is changed by hand, and what it reads and what it costs follows at once.

The pages of `search.report --cells` have it, and docs/explorer.html is little else (docs/build_explorer.py). All that it knows
comes from Python: rates, grids and cells, colours, the answers to its questions. What must follow while somebody drags is
computed in the browser by `browser/cell.js` and `browser/numbers.js`, and tests hold these to reference/ and search/cells/, in
a real browser. The page loads nothing, and its policy lets no script run but this one.
"""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.colors import to_hex
from numpy.typing import NDArray

from fast.dense_prediction_cell import DensePredictionCell
from reference.cell import GRID_SIZES, NUM_BRANCHES, RATES, AtrousSeparableConv, Cell, Conv1x1, PyramidPooling
from reference.dense_prediction_cell import MAX_STRIDE, MIN_STRIDE, BranchOptions, rate_multiplier_for
from reference.pyramid_pooling import PoolingVariant
from search.cells.cost import CellCost, cell_cost
from search.cells.reach import Size
from search.cells.receptive_field import structural_receptive_field
from search.reports import diagram

CITYSCAPES = (65, 129)  # features of an image of 1025 × 2049 pixels at output stride 16
MOBILENET_V2_CHANNELS = 320  # of its feature, which the paper searched with
_SCRIPTS = ("cell", "numbers", "elements", "state", "address", "graph", "map", "editor", "facts", "controls", "files", "start")


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What the explorer opens: a cell and what it is read with; lengths in features."""

    label: str
    cell: Cell
    about: str = ""
    feature_size: Size = CITYSCAPES
    in_channels: Sequence[int] = (MOBILENET_V2_CHANNELS,)
    branch_channels: int = 256
    cell_channels: int = 256
    output_stride: int = 16
    pooling: PoolingVariant = "sliding_window"
    pooling_size: Size | None = None
    at: Size | None = None  # the output's place; None: the centre
    selected: int = 0  # the branch to change

    @classmethod
    def of(cls, label: str, context: DensePredictionCell, feature_size: Size) -> "Opened":
        """A cell with weights, which are not shown."""
        return cls(
            label=label,
            cell=context.cell,
            feature_size=feature_size,
            in_channels=context.input_channels,
            branch_channels=context.branch_channels,
            cell_channels=context.cell_channels,
            output_stride=context.output_stride,
            pooling=context.pooling,
            pooling_size=context.pooling_size,
        )

    @property
    def field(self) -> NDArray[np.float64]:
        """Paths to the output from each position, (h, w)."""
        options = BranchOptions(False, rate_multiplier_for(self.output_stride), self.pooling, self.pooling_size)
        return structural_receptive_field(self.cell, self.feature_size, options, at=self.at)

    @property
    def cost(self) -> CellCost:
        return cell_cost(
            self.cell,
            self.in_channels,
            self.feature_size,
            branch_channels=self.branch_channels,
            cell_channels=self.cell_channels,
            pooling=self.pooling,
            pooling_size=self.pooling_size,
        )

    def to_json(self) -> dict[str, Any]:
        """As browser/state.js reads it."""
        return {
            "label": self.label,
            "about": self.about,
            "cell": self.cell.to_json(),
            "featureSize": self.feature_size,
            "inChannels": list(self.in_channels),
            "branchChannels": self.branch_channels,
            "cellChannels": self.cell_channels,
            "outputStride": self.output_stride,
            "pooling": self.pooling,
            "poolingSize": self.pooling_size,
            "at": self.at,
            "selected": self.selected,
        }


@dataclass(frozen=True)
class Question:
    """A question about a cell that the explorer opens, and its answer."""

    text: str
    answer: str
    opened: Opened


@dataclass(frozen=True)
class Explorer:
    """All that a page needs to show the explorer; `explorer.html.jinja` places it."""

    data: dict[str, Any]
    script: Markup
    policy: Markup  # what the page's Content-Security-Policy lets run, besides what it says on every page
    questions: Sequence[Question]
    definitions: str | None  # relative link to docs/definitions.md, if it lies beside the page


def explorer(cells: Sequence[Opened], questions: Sequence[Question] = (), definitions: str | None = None) -> Explorer:
    """The explorer with the first of the cells open and a button for each."""
    script = "\n".join((Path(__file__).parent / "browser" / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS)
    digest = b64encode(sha256(script.encode()).digest()).decode()
    data = {
        "rates": RATES,
        "gridSizes": GRID_SIZES,
        "numBranches": NUM_BRANCHES,
        "rateMultipliers": {stride: rate_multiplier_for(stride) for stride in range(MIN_STRIDE, MAX_STRIDE + 1)},
        "poolings": get_args(PoolingVariant),
        "colours": {
            "conv1x1": diagram.operation_colours(Conv1x1()),
            "sep3x3": diagram.operation_colours(AtrousSeparableConv((1, 1))),
            "pool": diagram.operation_colours(PyramidPooling((1, 1))),
            "bar": diagram.BAR_COLOURS,
        },
        "colourMap": [to_hex(colour)[1:] for colour in matplotlib.colormaps["inferno"](np.linspace(0, 1, 256))],
        "layout": {
            "boxWidth": diagram.BOX_WIDTH,
            "boxHeight": diagram.BOX_HEIGHT,
            "barHeight": diagram.BAR_HEIGHT,
            "columnGap": diagram.COLUMN_GAP,
            "layerGap": diagram.LAYER_GAP,
            "laneWidth": diagram.LANE_WIDTH,
            "margin": diagram.MARGIN,
        },
        "cells": [cell.to_json() for cell in cells],
        "questions": [{**each.opened.to_json(), "question": each.text, "answer": each.answer} for each in questions],
    }
    policy = Markup(f"; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'")
    return Explorer(data, Markup(script), policy, questions, definitions)
