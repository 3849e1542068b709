"""Write explorer.html: `python docs/build_explorer.py`.

The explorer of search/reports/explorer.py with the known cells, and questions about them whose answers are computed. The page
needs no other file and no network; two runs write the same bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference.atrous_separable_conv import depthwise_conv
from reference.cell import RATES, AtrousSeparableConv, Branch, Cell, PyramidPooling
from reference.grid import Grid
from search.cells.reach import FeatureMaps, Size, size_text
from search.cells.space import known_cells
from search.reports.explorer import CITYSCAPES, MOBILENET_V2_CHANNELS, Opened, Question, explorer
from search.reports.page import percent, quantity, write_page

PAGE = Path(__file__).with_name("explorer.html")
CHANNELS_OF_TABLE_1 = {"MobileNet-v2": MOBILENET_V2_CHANNELS, "Xception": 2048}
_COUNTS = tuple(CHANNELS_OF_TABLE_1.values())
_SHOWN = {  # label, and what it is
    "dpc": ("Published DPC", "the cell that the paper found"),
    "aspp": ("ASPP", "of DeepLabv3"),
    "psp": ("PSP", "of PSPNet, on the space's grids"),
    "mlp": ("MLP", "of SegFormer"),
    "linear": ("Linear", "the linear probe: no branches"),
}


def write_explorer(path: Path) -> None:
    """Write the page, to lie beside definitions.md."""
    known = known_cells()
    cells = [Opened(label=label, cell=known[name], about=about) for name, (label, about) in _SHOWN.items()]
    content = {
        "explorer": explorer(cells, questions(), "definitions.md"),
        "known": [(cell, span_of(cell.field), [_with_channels(cell, count).cost for count in _COUNTS]) for cell in cells],
        "channels": _COUNTS,
        "pixels": Grid(16).pixels(CITYSCAPES),
    }
    write_page(path, "explorer_page.html.jinja", content, folder=PAGE.parent)


@dataclass(frozen=True)
class Span:
    """How many positions are read, and the height and width of the box that they span."""

    positions: int
    box: Size

    @property
    def share(self) -> float:
        return self.positions / (self.box[0] * self.box[1])


def span_of(field: NDArray[np.float64]) -> Span:
    """The span of all positions that are not 0."""
    read = np.nonzero(field)
    height, width = (int(indices.max() - indices.min()) + 1 for indices in read)
    return Span(len(read[0]), (height, width))


def questions() -> list[Question]:
    """Questions for a class, each with a cell to begin with."""
    known = known_cells()
    return [
        _holes(),
        _without_holes(),
        _border(known["dpc"]),
        _out_of_reach(known["aspp"]),
        _mean_first(),
        _channels(known["dpc"]),
        _output_stride(known["dpc"]),
    ]


def _holes() -> Question:
    start = _chain(6, 6, feature_size=(65, 65))
    span = span_of(start.field)
    spans = {rate: span_of(_chain(6, rate, feature_size=(65, 65)).field) for rate in RATES}
    most = max(each.positions for each in spans.values())
    rates = [rate for rate, each in spans.items() if each.positions == most]
    densest = max(rates, key=lambda rate: spans[rate].share)
    return Question(
        "Two convolutions of rate 6 × 6, one after the other. Which positions are never read, wherever the output is? With "
        "which other rate of branch 1 is most of the square read?",
        f"All that are not a multiple of 6 rows and columns away: {span.positions} of {size_text(span.box)} positions are "
        f"read, {percent(span.share, 1)}. Nine taps of nine taps could be {most} different positions, but with equal rates "
        f"many paths meet. {_listed(rates)} give all {most}; with {densest} they lie closest, "
        f"{percent(spans[densest].share, 0)} of a square of {size_text(spans[densest].box)}. Equal rates in a chain are what "
        "is called gridding.",
        start,
    )


def _without_holes() -> Question:
    chains = [(a, b, c) for a in RATES for b in RATES if b >= a for c in RATES if c >= b]
    row = (1, 2 * 3 * max(RATES) + 1)  # rows and columns do the same, so one row tells
    spans = {rates: span_of(_chain(*rates, feature_size=row).field) for rates in chains}
    full = {rates: span.positions for rates, span in spans.items() if span.share == 1}
    best = max(full, key=lambda rates: full[rates])
    side = full[best]
    return Question(
        "Three convolutions of rate 1 × 1 in a chain read a square without holes, but a small one. Which three rates read the "
        "largest square without holes? How many paths lead to each of its positions through branch 2 alone?",
        f"{_listed(best)}, in any order: {side} × {side} positions. Branch 2 alone reads each of them by exactly one path, as "
        "each number has one way to be written with three digits −1, 0 and 1 for ones, threes and nines.",
        _chain(1, 1, 1, feature_size=(33, 33)),
    )


def _border(dpc: Cell) -> Question:
    start, corner = (Opened(label="", cell=dpc, at=at) for at in (None, (0, 0)))
    whole, left = start.field, corner.field
    lost = 1 - left.sum() / whole.sum()
    return Question(
        "The published cell, in the middle of the map. Drag the output into a corner. How many positions does it still read, "
        "and how many paths are lost?",
        f"{np.count_nonzero(left)} of {np.count_nonzero(whole)} positions, and {percent(lost, 0)} of the paths are lost: "
        "their taps lie beyond the border, where all is zero. The weights are the same everywhere, so the cell can tell from "
        "the zeros where the border is.",
        start,
    )


def _out_of_reach(aspp: Cell) -> Question:
    small = Opened(label="", cell=aspp, feature_size=(17, 17), selected=3)
    ones, taps = np.ones((1, 1, *small.feature_size)), np.ones((1, 1, 3, 3))
    means = [f"{depthwise_conv(ones, taps, rate=(rate, rate)).mean():.2f} at rate {rate}" for rate in RATES]
    (remark,) = FeatureMaps(small.feature_size, small.feature_size).cell_remarks(aspp)
    return Question(
        "ASPP on a map of 17 × 17, as of a picture of 257 × 257 pixels. Which of its branches has become another one's equal?",
        f"{remark[0].upper()}{remark[1:]}. Of its nine taps only the middle one ever lies on the map, so it reads what the "
        f"1×1 convolution reads. Of nine taps there lie inside the map on average: {', '.join(means)}.",
        small,
    )


def _mean_first() -> Question:
    convs = [Branch(i, AtrousSeparableConv((6, 6))) for i in range(4)]
    start = Opened(label="", cell=Cell((Branch(-1, PyramidPooling((1, 1))), *convs)), selected=1)
    return Question(
        "The global mean comes first, and four convolutions follow it. What do they see? Change rates, and move the output.",
        f"All {span_of(start.field).positions:,} positions are read, equally often, whatever the rates: the mean makes all "
        "positions equal, and the convolutions have nothing to look at but the zeros beyond the border. The paper reports "
        "such cells as the worst.",
        start,
    )


def _channels(dpc: Cell) -> Question:
    few, many = (_with_channels(Opened(label="", cell=dpc), count) for count in _COUNTS)
    pairs = zip(few.cost.branches, many.cost.branches, strict=True)
    (i,) = (i for i, (before, after) in enumerate(pairs) if before != after)  # one branch of this cell reads the feature
    before, after = (each.cost.branches[i].parameters for each in (few, many))
    totals = [quantity(each.cost.total.parameters) for each in (few, many)]
    (small, a), (large, b) = CHANNELS_OF_TABLE_1.items()
    return Question(
        f"Give the published cell features of {b} channels ({large}) instead of {a} ({small}). Which branches have more "
        "parameters now?",
        f"Branch {i} alone, as no other reads F: {before:,} become {after:,}. The total goes from {totals[0]} to {totals[1]}, "
        "both as in Table 1. A cell whose branches all read F, such as ASPP, gets dearer in all of them.",
        few,
    )


def _output_stride(dpc: Cell) -> Question:
    coarse = Opened(label="", cell=dpc)
    fine = replace(coarse, feature_size=Grid(8).features(Grid(16).pixels(CITYSCAPES)), output_stride=8)
    spans = [span_of(each.field) for each in (coarse, fine)]
    reaches = [size_text(Grid(each.output_stride).pixels(span.box)) for each, span in zip((coarse, fine), spans, strict=True)]
    ratio = fine.cost.total.multiply_adds / coarse.cost.total.multiply_adds
    return Question(
        "Go from output stride 16 to 8: the same image now has twice as many features along each side. What happens to the "
        "reach in pixels, to the holes, and to the cost?",
        f"The cell reads a box of {reaches[0]} pixels at 16 and of {reaches[1]} at 8: rates and map double alike. In it lie "
        f"{spans[0].positions} positions that are read, {percent(spans[0].share, 1)} of its features, and at 8 "
        f"{spans[1].positions}, {percent(spans[1].share, 1)}: the features between are new holes. The parameters do not "
        f"change; there are {ratio:.2f} times as many multiply-adds, as many times as there are more features.",
        coarse,
    )


def _chain(*rates: int, **fields: Any) -> Opened:
    """Square convolutions of which each reads the one before."""
    branches = [Branch(i - 1, AtrousSeparableConv((rate, rate))) for i, rate in enumerate(rates)]
    return Opened(label="", cell=Cell(tuple(branches)), selected=len(rates) - 1, **fields)


def _with_channels(opened: Opened, channels: int) -> Opened:
    return replace(opened, in_channels=(channels,))


def _listed(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last


if __name__ == "__main__":
    write_explorer(PAGE)
    print(f"{PAGE}: {PAGE.stat().st_size:,} bytes")
