"""Draw the pictures of definitions.md into docs/images: `python docs/draw_definitions.py`.

Every map, matrix and number in them is computed by `reference/`; this file only chooses small inputs and places the results.
Two runs write the same bytes.

For slides and papers, `--format svg pdf --out slides` draws all of them in these formats, one file each, on white.
"""

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, get_args

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, FancyBboxPatch, Rectangle
from numpy.typing import NDArray
from PIL import Image

from reference.atrous_separable_conv import SeparableConv, depthwise_conv
from reference.batch_norm import EPS, Array, BatchNorm, batch_norm, batch_norm_relu, updated_running_statistics
from reference.bilinear_resize import bilinear_resize, interpolation_matrix
from reference.cell import GRID_SIZES, RATES, Cell
from reference.concat_project import DROPOUT_RATE, concat_project, dropout
from reference.decoder import DecoderWeights, decoder, decoder_backward
from reference.dense_prediction_cell import BranchOptions, CellWeights, branch_outputs
from reference.depth_metrics import DELTA, POWERS, abs_rel, delta, depth_totals, rmse
from reference.hard_example_mining import hardest_pixels, mined_cross_entropy, mined_cross_entropy_backward
from reference.mean_iou import class_iou, confusion_matrix, mean_iou
from reference.pointwise_conv import ConvNorm, pointwise_conv, pointwise_conv_backward
from reference.pyramid_pooling import PoolingVariant, pooling_matrix, window_size
from reference.upsampled_cross_entropy import (
    IGNORE_INDEX,
    pixel_losses,
    upsampled_cross_entropy,
    upsampled_cross_entropy_backward,
)
from reference.upsampled_l1 import upsampled_l1, upsampled_l1_backward
from search.files import write_whole
from search.reports.diagram import DATE_IN, SAME_EACH_TIME, draw_cell

Format = Literal["png", "svg", "pdf"]
IMAGES = Path(__file__).parent / "images"
CELLS = Path(__file__).parents[1] / "search" / "cells"

WIDTH = 9.0  # inches; 1800 pixels, shown at about 900
INK, SOFT = "#20242c", "#7a828f"
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
MAP, SIGNED, WEIGHTS, COUNTS = "cividis", "PuOr_r", "Blues", "inferno"

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "savefig.dpi": 200,
}

CLASSES = ("sky", "building", "road", "vehicle", "tree", "pole")
PALETTE = np.array([to_rgb(colour) for colour in (SKY, ORANGE, "#666a73", VERMILION, GREEN, PURPLE)])  # (K, 3)


def street(height: int, width: int) -> tuple[Array, NDArray[np.int64]]:
    """A painted street: image (height, width, 3) in 0..1 and labels (height, width) that index `CLASSES`."""
    y, x = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None, :]
    image = np.array([0.62, 0.78, 0.92]) + y[:, :, None] * np.array([0.5, 0.25, 0.0]) + 0.0 * x[:, :, None]
    labels = np.zeros((height, width), dtype=np.int64)

    def paint(mask: NDArray[np.bool_], colour: str, label: int | None = None) -> None:
        image[mask] = to_rgb(colour)
        if label is not None:
            labels[mask] = label

    def box(left: float, right: float, top: float, bottom: float) -> NDArray[np.bool_]:
        return (x >= left) & (x < right) & (y >= top) & (y < bottom)

    def disc(centre_x: float, centre_y: float, radius: float) -> NDArray[np.bool_]:
        return ((x - centre_x) * (width / height)) ** 2 + (y - centre_y) ** 2 < radius**2

    for left, right, top, colour in ((0, 0.2, 0.12, "#b08968"), (0.2, 0.36, 0.28, "#8d99ae"), (0.66, 1.01, 0.2, "#a8a29a")):
        paint(box(left, right, top, 0.66), colour, 1)
        paint(box(left, right, top + 0.05, 0.56) & (x * 24 % 1 > 0.45) & (y * 14 % 1 > 0.5), "#47515f")
    paint(box(0, 1.01, 0.62, 1.01), "#c9c4bb", 2)
    paint((np.abs(x - 0.46) < 0.1 + 1.05 * (y - 0.6)) & (y >= 0.62), "#5b606a", 2)
    paint((np.abs(x - 0.46) < 0.04 * (y - 0.5)) & (y >= 0.66) & (4 / np.maximum(y - 0.4, 0.1) % 1 > 0.45), "#f4f1e8")
    paint(box(0.255, 0.27, 0.5, 0.76), "#5a4632", 4)
    paint(disc(0.262, 0.4, 0.15) | disc(0.235, 0.47, 0.1) | disc(0.3, 0.46, 0.1), "#3f7d4e", 4)
    paint(box(0.6, 0.88, 0.36, 0.76), "#a8a29a", 3)  # the bus has the colour of the building behind it
    paint(box(0.62, 0.86, 0.42, 0.54) & (x * 17 % 1 > 0.12), "#2e3947")
    paint(disc(0.66, 0.76, 0.045) | disc(0.82, 0.76, 0.045), "#1f2329", 3)
    paint(box(0.36, 0.5, 0.66, 0.75) | box(0.39, 0.475, 0.6, 0.67), "#b23a48", 3)
    paint(box(0.4, 0.465, 0.615, 0.66), "#2e3947")
    paint(disc(0.388, 0.755, 0.025) | disc(0.472, 0.755, 0.025), "#1f2329", 3)
    paint(box(0.945, 0.955, 0.1, 0.84), "#20242c", 5)
    paint(box(0.925, 0.975, 0.12, 0.26), "#20242c", 5)
    paint(disc(0.95, 0.16, 0.018), "#d55e00")
    return np.clip(image, 0.0, 1.0), labels


def street_depths(height: int, width: int) -> Array:
    """Metres from a camera at the lower edge to each pixel of the street, NaN in the sky: (height, width)."""
    _, labels = street(height, width)
    below_horizon = np.broadcast_to(np.linspace(0, 1, height)[:, None] - 0.5, labels.shape)
    feet = {"building": 0.16, "vehicle": 0.26, "tree": 0.26, "pole": 0.34}  # how far below the horizon each stands
    for name, foot in feet.items():
        below_horizon = np.where(labels == CLASSES.index(name), foot, below_horizon)
    depths: Array = 2.6 / np.where(labels == CLASSES.index("sky"), np.nan, below_horizon)
    return depths


def street_map(height: int = 33, width: int = 49) -> Array:
    """Brightness of the street at feature size, for pictures that need one channel: (1, 1, height, width) in 0..1."""
    image, _ = street(8 * height, 8 * width)
    brightness: Array = image.mean(axis=2).reshape(height, 8, width, 8).mean(axis=(1, 3))
    return brightness[None, None]


def street_logits() -> Array:
    """Logits of the street's classes at feature size, with some noise: (1, K, 9, 13)."""
    _, small = street(9, 13)
    noise = np.random.default_rng(2).normal(0, 0.8, (len(CLASSES), 9, 13))
    logits: Array = 4.0 * (small == np.arange(len(CLASSES))[:, None, None]) + noise
    return logits[None]


def identity_norm(channels: int) -> BatchNorm[Array]:
    """A batch norm that, with running statistics, changes nothing."""
    one, zero = np.ones(channels), np.zeros(channels)
    return BatchNorm(scale=one, offset=zero, running_mean=zero, running_var=one - EPS)


def draw_context() -> Figure:
    """Why context: one pixel of a bus through windows of growing size."""
    image, _ = street(385, 577)
    row, column = 240, 480  # on the bus, below its windows
    figure = Figure(figsize=(WIDTH, 2.3), layout="constrained")
    panels = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.5))
    questions = ("17 pixels: grey", "65 pixels: a wall?", "193 pixels: a bus", "the whole image: a bus on a street")
    for axes, half, question, colour in zip(panels, (8, 32, 96, None), questions, (VERMILION, BLUE, GREEN, None), strict=True):
        if half is None:
            axes.imshow(image)
            for reach, edge in ((8, VERMILION), (32, BLUE), (96, GREEN)):
                corner = (column - reach, row - reach)
                axes.add_patch(Rectangle(corner, 2 * reach, 2 * reach, fill=False, edgecolor=edge, linewidth=2))
        else:
            axes.imshow(image[row - half : row + half + 1, column - half : column + half + 1])
        frame(axes, colour or SOFT, 2.0 if colour else 0.7)
        axes.set_title(question)
    return figure


def draw_layout() -> Figure:
    """The axes (N, C, H, W), and where features sit on image pixels at output stride 16."""
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    stack, grid = figure.subplots(1, 2, width_ratios=(1, 1.75))
    image, _ = street(33, 65)
    for channel in reversed(range(3)):
        left, bottom = 0.9 * channel, 0.7 * channel
        extent = (left, left + 5, bottom, bottom + 3)
        features = image[::16, ::16, channel]
        stack.imshow(features, cmap=MAP, vmin=0, vmax=1, extent=extent, zorder=3 - channel)
        stack.add_patch(Rectangle((left, bottom), 5, 3, fill=False, edgecolor="white", linewidth=1.5, zorder=3 - channel))
    stack.set(xlim=(-0.9, 7.4), ylim=(-1.0, 5.0), title="one feature array: (N, C, H, W) = (1, 3, 3, 5)")
    stack.set_axis_off()
    arrow = {"arrowstyle": "<->", "color": INK, "linewidth": 0.9}
    stack.annotate("", (0, -0.25), (5, -0.25), arrowprops=arrow)
    stack.text(2.5, -0.75, "W, to the right (j)", ha="center")
    stack.annotate("", (-0.25, 0), (-0.25, 3), arrowprops=arrow)
    stack.text(-0.45, 1.5, "H, down (i)", ha="right", va="center", rotation=90)
    stack.annotate("", (5.25, 0), (7.05, 1.4), arrowprops=arrow)
    stack.text(6.35, 0.35, "C", ha="left")

    grid.imshow(image, alpha=0.55)
    rows, columns = np.mgrid[0:33:16, 0:65:16]
    grid.scatter(columns, rows, s=46, color=VERMILION, edgecolor="white", linewidth=1.2, zorder=3, clip_on=False)
    for row, column in zip(rows.ravel(), columns.ravel(), strict=True):
        side = {0: "left", 64: "right"}.get(column, "center")
        name, (shift, side_v) = f"({row // 16}, {column // 16})", (2.0, "top") if row < 32 else (-2.0, "bottom")
        grid.text(column, row + shift, name, ha=side, va=side_v, fontsize=8.5, fontweight="bold")
    grid.set(xticks=range(0, 65, 16), yticks=range(0, 33, 16), xlabel="pixel column", ylabel="pixel row")
    grid.set_title("feature (i, j) sits on pixel (16 i, 16 j): 33 × 65 pixels, 3 × 5 features", pad=10)
    frame(grid, SOFT)
    return figure


def draw_operations() -> Figure:
    """The 81 operations: where each reads for one output position, at one scale for all."""
    figure = Figure(figsize=(WIDTH, 4.7))
    places = ((0.025, 0.1, 0.05, 0.1), (0.155, 0.1, 0.43, 0.82), (0.655, 0.1, 0.34, 0.65))
    point, convolutions, poolings = (figure.add_axes(place) for place in places)
    tile = 54
    for axes, count in ((point, 1), (convolutions, 8), (poolings, 4)):
        for row, column in np.ndindex(count, count):
            corner = (column * tile - tile / 2 + 1, row * tile - tile / 2 + 1)
            axes.add_patch(Rectangle(corner, tile - 2, tile - 2, facecolor="#eef1f5", edgecolor="none"))
        axes.set(xlim=(-tile / 2, (count - 0.5) * tile), ylim=((count - 0.5) * tile, -tile / 2), aspect="equal")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set(xticks=[], yticks=[])
    point.scatter(0, 0, s=5, color=GREEN)
    point.set_title("1 × 1\nconvolution")

    impulse = np.zeros((1, 1, 45, 45))
    impulse[0, 0, 22, 22] = 1.0
    for row, rate_h in enumerate(RATES):
        for column, rate_w in enumerate(RATES):
            response = depthwise_conv(impulse, np.ones((1, 1, 3, 3)), rate=(rate_h, rate_w))
            i, j = np.nonzero(response[0, 0])
            convolutions.scatter(j - 22 + column * tile, i - 22 + row * tile, s=2.2, color=BLUE, linewidth=0)
    convolutions.set_title("64 atrous separable convolutions, 3 × 3")
    convolutions.set_xticks([tile * k for k in range(8)], [str(rate) for rate in RATES])
    convolutions.set_yticks([tile * k for k in range(8)], [str(rate) for rate in RATES])
    convolutions.set(xlabel="rate$_w$", ylabel="rate$_h$")

    for row, grid_h in enumerate(GRID_SIZES):
        for column, grid_w in enumerate(GRID_SIZES):
            high, wide = window_size(33, grid_h), window_size(33, grid_w)
            corner = (column * tile - wide / 2, row * tile - high / 2)
            poolings.add_patch(Rectangle(corner, wide, high, facecolor=ORANGE, edgecolor="none"))
            outline = (column * tile - 16.5, row * tile - 16.5)
            poolings.add_patch(Rectangle(outline, 33, 33, fill=False, edgecolor=SOFT, linewidth=0.72))
    poolings.set_title("16 pyramid poolings (of 33 × 33)")
    poolings.set_xticks([tile * k for k in range(4)], [str(grid) for grid in GRID_SIZES])
    poolings.set_yticks([tile * k for k in range(4)], [str(grid) for grid in GRID_SIZES])
    poolings.set(xlabel="grid$_w$", ylabel="grid$_h$")
    return figure


def draw_batch_norm() -> Figure:
    """Histograms before and after, and why the running variance is the unbiased one."""
    rng = np.random.default_rng(0)
    centres, widths = np.array([-2.0, 1.0, 6.0]), np.array([0.5, 2.0, 1.0])
    x = rng.standard_normal((8, 3, 33, 33)) * widths[:, None, None] + centres[:, None, None]
    norm = BatchNorm(np.array([1.0, 1.0, 0.5]), np.array([0.0, 0.0, 1.0]), np.zeros(3), np.ones(3))
    stages = (
        ("before: three channels", x),
        ("after (training)", batch_norm(x, norm, training=True)),
        ("after ReLU", batch_norm_relu(x, norm, training=True)),
    )
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    panels = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.25))
    for axes, (title, values) in zip(panels, stages, strict=False):
        span = (-6.0, 10.0) if values is x else (-4.0, 4.0)
        for channel, colour in enumerate((BLUE, ORANGE, GREEN)):
            axes.hist(values[:, channel].ravel(), bins=64, range=span, color=colour, histtype="stepfilled", alpha=0.25)
            axes.hist(values[:, channel].ravel(), bins=64, range=span, color=colour, histtype="step", linewidth=1.4)
        axes.set(title=title, yticks=[], xlabel="value", xlim=span)
        axes.spines["left"].set_visible(False)
    panels[0].set_ylim(0, 1900)
    panels[1].set_ylim(0, 1500)
    panels[2].set_ylim(0, 1500)
    panels[1].text(4.0, 1350, "green has scale ½,\noffset 1", color=GREEN, fontsize=8.5, ha="right", va="top")
    panels[2].text(0.35, 1350, "negative values\nare now 0", fontsize=8.5, va="top")

    sizes = np.arange(2, 21)
    plain = BatchNorm(*(np.full(20_000, value) for value in (1.0, 0.0, 0.0, 1.0)))
    batches = [rng.standard_normal((1, 20_000, 1, size)) for size in sizes]  # 20,000 channels are 20,000 batches
    unbiased = [updated_running_statistics(batch, plain, momentum=1.0).running_var.mean() for batch in batches]
    biased = [batch.var(axis=(0, 2, 3)).mean() for batch in batches]
    panels[3].axhline(1.0, color=SOFT, linewidth=0.8, linestyle="--")
    panels[3].plot(sizes, unbiased, "o-", color=BLUE, markersize=3.5)
    panels[3].plot(sizes, biased, "s-", color=VERMILION, markersize=3.5)
    panels[3].set(title="mean variance estimate, truth 1", xlabel="values n per channel in the batch", ylim=(0.4, 1.25))
    panels[3].text(20, 1.04, "unbiased, ÷ (n − 1): remembered", color=BLUE, fontsize=8.5, ha="right")
    panels[3].text(20, 0.72, "biased, ÷ n: normalises", color=VERMILION, fontsize=8.5, ha="right")
    return figure


def draw_pointwise_conv() -> Figure:
    """A 1×1 convolution as one small matrix, applied at every pixel."""
    image, _ = street(66, 98)
    x = image.transpose(2, 0, 1)[None]
    weight = np.array([[0.33, 0.33, 0.33], [-1.0, 2.0, -1.0], [1.5, -0.5, -1.0]])
    y = pointwise_conv(x, weight[:, :, None, None])
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    panels = figure.subplots(3, 3, width_ratios=(1, 1.25, 1))
    for row, (name, meaning) in enumerate(zip("RGB", ("brightness", "greenness", "redness"), strict=True)):
        show(panels[row, 0], x[0, row], vmin=0, vmax=1)
        panels[row, 0].set_ylabel(f"c = {row}\n({name})", rotation=0, ha="right", va="center", labelpad=6)
        panels[row, 1].set_axis_off()
        if row:
            show(panels[row, 2], y[0, row], cmap=SIGNED, vmin=-1, vmax=1)
        else:
            show(panels[row, 2], y[0, row], vmin=0, vmax=1)
        panels[row, 2].yaxis.set_label_position("right")
        panels[row, 2].set_ylabel(f"o = {row}\n{meaning}", rotation=0, ha="left", va="center", labelpad=6)
    matrix = figure.add_subplot(panels[0, 1].get_gridspec()[:, 1])
    matrix.imshow(weight, cmap=SIGNED, vmin=-2, vmax=2)
    for (o, c), value in np.ndenumerate(weight):
        matrix.text(c, o, f"{value:g}".replace("-", "−"), ha="center", va="center", color="white" if abs(value) > 1.2 else INK)
    matrix.set(xticks=range(3), yticks=range(3), xlabel="input channel c", ylabel="output channel o", title="weight[o, c]")
    frame(matrix, SOFT)
    panels[0, 0].set_title("x: three channels")
    panels[0, 2].set_title("y = weight · x, pixel by pixel")
    return figure


def draw_depthwise_conv() -> Figure:
    """Three rates: what an impulse becomes, what a map becomes, and how many taps stay inside at the border."""
    x = street_map()
    impulse = np.zeros_like(x)
    impulse[0, 0, 16, 24] = 1.0
    figure = Figure(figsize=(WIDTH, 4.75), layout="constrained")
    panels = figure.subplots(3, 4)
    mean, ones = np.full((1, 1, 3, 3), 1 / 9), np.ones((1, 1, 3, 3))
    inputs = (impulse, x, np.ones_like(x))
    for axes, values, name in zip(panels[:, 0], inputs, ("an impulse", "a map", "ones, 33 × 49"), strict=True):
        show(axes, values[0, 0], vmin=0, vmax=1)
        axes.set_ylabel(name)
    panels[0, 0].set_title("input")
    for column, rate in enumerate(((1, 6), (6, 3), (18, 15)), start=1):
        panels[0, column].set_title("rate {} × {}".format(*rate))
        show(panels[0, column], depthwise_conv(impulse, ones, rate=rate)[0, 0], vmin=0, vmax=1)
        show(panels[1, column], depthwise_conv(x, mean, rate=rate)[0, 0], vmin=0, vmax=1)
        taps = depthwise_conv(inputs[2], ones, rate=rate)[0, 0]
        show(panels[2, column], taps, cmap="Blues", vmin=0, vmax=13)
        edge_h, edge_w = (min(r, size - r) / 2 - 0.5 for r, size in zip(rate, (33, 49), strict=True))
        for row, col in ((16, 24), (16, edge_w), (edge_h, 24), (edge_h, edge_w)):
            if min(row, col) >= 1.0:  # there is room for the number
                count = f"{taps[int(row), int(col)]:.0f}"
                panels[2, column].text(col, row, count, ha="center", va="center", fontweight="bold")
    for axes, note in zip(panels[:, 3], ("weights all 1", "weights all 1/9", "taps inside the map"), strict=True):
        axes.yaxis.set_label_position("right")
        axes.set_ylabel(note, rotation=270, va="bottom", labelpad=6)
    return figure


def draw_out_of_reach() -> Figure:
    """How many taps stay inside a map of 17 × 17 as the rate grows: from rate 17 on it is one everywhere."""
    ones = np.ones((1, 1, 17, 17))
    rates = (1, 6, 12, 15, 18, 21)
    figure = Figure(figsize=(WIDTH, 1.85), layout="constrained")
    for axes, rate in zip(figure.subplots(1, len(rates)), rates, strict=True):
        taps = depthwise_conv(ones, np.ones((1, 1, 3, 3)), rate=(rate, rate))[0, 0]
        show(axes, taps, cmap="Blues", vmin=0, vmax=13)
        axes.set_title(f"rate {rate} × {rate}")
        axes.text(8, 8, f"{taps[8, 8]:.0f}", ha="center", va="center", fontweight="bold")
        axes.set_xlabel(f"in a corner: {taps[0, 0]:.0f}")
    return figure


def draw_separable_conv() -> Figure:
    """The six steps of the separable pair, three channels through two."""
    image, _ = street(66, 98)
    x = image.transpose(2, 0, 1)[None]
    depthwise = np.stack([np.full((3, 3), 1 / 9), np.tile([-1.0, 0.0, 1.0], (3, 1)) / 3, np.full((3, 3), -1 / 8)])[:, None]
    depthwise[2, 0, 1, 1] = 1.0
    pointwise = np.array([[1.0, -1.0, 0.0], [0.0, 1.0, 1.0], [-1.0, 0.0, 1.0]])[:, :, None, None]
    norm = identity_norm(3)
    raw = depthwise_conv(x, depthwise, rate=(3, 3))
    normalised = batch_norm(raw, norm, training=True)
    middle = batch_norm_relu(raw, norm, training=True)
    mixed = pointwise_conv(middle, pointwise)
    stages = (
        ("x", x, None),
        ("depthwise\n3×3, rate 3×3", raw, BLUE),
        ("batch norm", normalised, VERMILION),
        ("ReLU", middle, VERMILION),
        ("pointwise\n1×1", mixed, BLUE),
        ("batch norm", batch_norm(mixed, norm, training=True), BLUE),
        ("ReLU", batch_norm_relu(mixed, norm, training=True), BLUE),
    )
    figure = Figure(figsize=(WIDTH, 3.05))
    pitch, left = 0.1365, 0.045
    centres = []
    for column, (name, values, colour) in enumerate(stages):
        start = left + column * pitch
        centres.append(start + 0.0625)
        if colour:
            fill = "#fbe3d6" if colour == VERMILION else "#dbe8fb"
            shape, corner = "round,pad=0,rounding_size=0.012", (start + 0.004, 0.775)
            box = FancyBboxPatch(corner, 0.117, 0.12, shape, facecolor=fill, edgecolor=colour, linewidth=1.2)
            figure.add_artist(box)
        figure.text(centres[-1], 0.835, name, ha="center", va="center", fontsize=8.5)
        largest = np.abs(values).max()
        for channel in range(3):
            axes = figure.add_axes((start, 0.5 - 0.235 * channel, 0.125, 0.22))
            if colour is None:
                show(axes, values[0, channel], vmin=0, vmax=1)
            else:
                show(axes, values[0, channel], cmap=SIGNED, vmin=-0.7 * largest, vmax=0.7 * largest)
            if column == 0:
                axes.set_ylabel(f"c = {channel}")
    for column in range(len(stages) - 1):
        ends = ((centres[column] + (0.0605 if column else 0.014), 0.835), (centres[column + 1] - 0.0595, 0.835))
        arrow = ConnectionPatch(*ends, "figure fraction", arrowstyle="-|>", mutation_scale=8, color=SOFT, shrinkA=0, shrinkB=0)
        figure.add_artist(arrow)
    note = "in the authors’ code, not in the paper’s words"
    figure.text((centres[2] + centres[3]) / 2, 0.945, note, ha="center", color=VERMILION, fontsize=9)
    return figure


def draw_bilinear_resize() -> Figure:
    """The 1-D weights, the curve they draw, and where corners land on the image grid."""
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    mosaic = figure.subplot_mosaic([["matrix", "curve"], ["grid", "grid"]], height_ratios=(2.4, 1))
    matrix = interpolation_matrix(4, 10)
    axes = mosaic["matrix"]
    axes.imshow(matrix.T, cmap=WEIGHTS, vmin=0, vmax=1.3, aspect="auto")
    names = {0: "", 1 / 3: "⅓", 2 / 3: "⅔", 1: "1"}
    for (i, k), value in np.ndenumerate(matrix):
        label = min(names.items(), key=lambda item: abs(item[0] - value))[1]
        axes.text(i, k, label, ha="center", va="center", color="white" if value > 0.9 else INK)
    axes.set(xticks=range(10), yticks=range(4), xlabel="output pixel i", ylabel="input pixel k")
    axes.set_title("the weights of 4 → 10 pixels (drawn transposed)")
    frame(axes, SOFT)

    samples = np.array([1.0, 3.0, 2.0, 2.5])
    axes = mosaic["curve"]
    axes.plot(np.arange(10), matrix @ samples, "o-", color=BLUE, markersize=5, linewidth=1.2, label="output, 10 pixels")
    rings: dict[str, Any] = {"s": 90, "facecolor": "none", "edgecolor": VERMILION, "linewidth": 1.8, "zorder": 3}
    axes.scatter(np.arange(4) * 3, samples, label="input, 4 pixels", **rings)
    axes.set(xticks=range(10), ylim=(0.6, 3.6), xlabel="output pixel i", title="first and last pixels coincide")
    axes.legend(loc="upper right", ncols=2)

    axes = mosaic["grid"]
    aligned = np.array([np.argmax(interpolation_matrix(4, 49)[:, k]) for k in range(4)])
    half_pixel = (np.arange(4) + 0.5) * 49 / 4 - 0.5
    for level, positions, colour in ((1, aligned, VERMILION), (0, half_pixel, SOFT)):
        axes.scatter(np.arange(49), np.full(49, level), marker="s", s=34, color="#e6e8ec", linewidth=0)
        axes.scatter(positions, np.full(4, level), s=60, color=colour, zorder=3)
        for k, position in enumerate(positions):
            axes.text(position, level + 0.27, f"{k} at {position:g}", ha="center", va="bottom", fontsize=8.5, color=INK)
    axes.set(ylim=(-0.5, 1.75), xlim=(-2, 50), xticks=range(0, 49, 16), xlabel="image pixel")
    axes.set_yticks((1, 0), ("corners aligned:\nfeature k on pixel 16 k", "corners not aligned:\nbetween pixels"))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return figure


def draw_pyramid_pooling() -> Figure:
    """Both variants on one map: where they average, the means, and the means resized."""
    x, grid = street_map(), (2, 4)
    figure = Figure(figsize=(WIDTH, 3.75), layout="constrained")
    panels = figure.subplots(2, 4, width_ratios=(1, 1.15, 1, 1))
    variants: tuple[PoolingVariant, PoolingVariant] = ("sliding_window", "grid_cells")
    for row, variant in enumerate(variants):
        rows, columns = (pooling_matrix(size, count, variant=variant) for size, count in zip((33, 49), grid, strict=True))
        means = rows @ x @ columns.T
        source, matrix, pooled, resized = panels[row]
        show(source, x[0, 0], vmin=0.35, vmax=0.95)
        for top, left in ((0, 0), (8, 17), (16, 36)) if row == 0 else np.ndindex(grid):
            i, j = (top, left)
            span_h, span_w = np.flatnonzero(rows[i]), np.flatnonzero(columns[j])
            corner = (span_w[0] - 0.5, span_h[0] - 0.5)
            source.add_patch(Rectangle(corner, len(span_w), len(span_h), fill=False, edgecolor=VERMILION, linewidth=1.3))
        window = f"{np.count_nonzero(rows[0])} × {np.count_nonzero(columns[0])}"
        source.set_ylabel(variant.replace("_", " "))
        source.set_xlabel(f"every window of {window}" if row == 0 else f"{grid[0]} × {grid[1]} cells of {window}")
        show(matrix, columns, cmap=WEIGHTS, vmin=0, vmax=1.4 * columns.max())
        matrix.set_aspect("auto")
        matrix.set_xlabel(f"{columns.shape[0]} × {columns.shape[1]}")
        show(pooled, means[0, 0], vmin=0.35, vmax=0.95)
        pooled.set_xlabel(f"{means.shape[2]} × {means.shape[3]}")
        show(resized, bilinear_resize(means, (33, 49))[0, 0], vmin=0.35, vmax=0.95)
        resized.set_xlabel("33 × 49")
    for axes, title in zip(panels[0], ("x, 33 × 49", "Q: means along a row", "P X Qᵀ", "resized"), strict=True):
        axes.set_title(title)
    return figure


def draw_pyramid_grids() -> Figure:
    """Six grids on one map: the coarser the grid, the wider the context."""
    x = street_map()
    figure = Figure(figsize=(WIDTH, 4.3), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    for axes, grid in zip(panels, ((1, 1), (2, 2), (4, 4), (8, 8), (1, 8), (8, 1)), strict=True):
        rows = pooling_matrix(33, grid[0], variant="sliding_window")
        columns = pooling_matrix(49, grid[1], variant="sliding_window")
        means = rows @ x @ columns.T
        show(axes, bilinear_resize(means, (33, 49))[0, 0], vmin=0.35, vmax=0.95)
        high, wide = window_size(33, grid[0]), window_size(49, grid[1])
        axes.set_title(f"grid {grid[0]} × {grid[1]}: window {high} × {wide}")
        axes.set_xlabel(f"{means.shape[2]} × {means.shape[3]} means, resized", fontsize=8.5)
        axes.add_patch(Rectangle((24 - wide / 2, 16 - high / 2), wide, high, fill=False, edgecolor=VERMILION, linewidth=1.8))
    return figure


def draw_concat_project() -> Figure:
    """Concatenation, dropout and projection as one matrix product over pixels."""
    rng = np.random.default_rng(1)
    branches = [np.maximum(rng.normal(0.4, 0.5, (1, 3, 4, 6)), 0.0) for _ in range(5)]
    keep = rng.random((1, 15, 4, 6)) >= DROPOUT_RATE
    weight = rng.normal(0.0, 0.4, (4, 15, 1, 1))
    concat = np.concatenate(branches, axis=1)
    dropped = dropout(concat, keep, rate=DROPOUT_RATE)[0].reshape(15, 24)
    output = concat_project(branches, ConvNorm(weight, identity_norm(4)), training=True, dropout_keep=keep)

    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1))
    colours = (BLUE, ORANGE, GREEN, VERMILION, PURPLE)
    middle.imshow(np.ma.masked_array(dropped, ~keep[0].reshape(15, 24)), cmap=MAP, aspect="auto")
    middle.set_facecolor("white")
    for row, column in np.argwhere(~keep[0].reshape(15, 24)):
        middle.text(column, row, "×", ha="center", va="center", fontsize=9, color=VERMILION, fontweight="bold")
    middle.set(title="concatenation after dropout\n(B·C rows, one column per pixel)", xticks=[], yticks=[], xlabel="24 pixels")
    frame(middle, SOFT)
    left.imshow(weight[:, :, 0, 0], cmap=SIGNED, vmin=-1, vmax=1, aspect="auto")
    left.set(title="projection weight\n(4 outputs × B·C inputs)", xticks=[], yticks=range(4), ylabel="output channel")
    frame(left, SOFT)
    right.imshow(output[0].reshape(4, 24), cmap=MAP, aspect="auto")
    right.set(title="ReLU(BN(weight · concatenation))\n(4 rows)", xticks=[], yticks=range(4), xlabel="24 pixels")
    frame(right, SOFT)
    left.text(-0.6, 3.82, "branch", ha="right", va="top")
    for i, colour in enumerate(colours):
        middle.add_patch(Rectangle((-1.6, 3 * i - 0.45), 0.7, 2.9, color=colour, clip_on=False, linewidth=0))
        middle.text(-2.0, 3 * i + 1, str(i), ha="right", va="center", fontweight="bold", color=colour)
        left.add_patch(Rectangle((3 * i - 0.45, 3.58), 2.9, 0.16, color=colour, clip_on=False, linewidth=0))
        left.text(3 * i + 1, 3.82, str(i), ha="center", va="top", fontweight="bold", color=colour)
    return figure


def impulse_responses(cell: Cell) -> list[Array]:
    """What each branch, a separable convolution, makes of an impulse amid a map when every weight is one: (65, 65) each."""
    unit = ConvNorm(np.ones((1, 1, 1, 1)), identity_norm(1))
    separable = SeparableConv(ConvNorm(np.ones((1, 1, 3, 3)), identity_norm(1)), unit)
    weights = CellWeights((separable,) * len(cell.branches), unit)
    impulse = np.zeros((1, 1, 65, 65))
    impulse[0, 0, 32, 32] = 1.0
    return [output[0, 0] for output in branch_outputs(impulse, cell, weights, BranchOptions(training=False))]


def draw_dense_prediction_cell() -> Figure:
    """The published cell: its graph, and what each branch makes of an impulse when every weight is one."""
    cell = Cell.load(CELLS / "dpc.json")
    outputs = impulse_responses(cell)
    figure = Figure(figsize=(WIDTH, 4.3))
    draw_cell(cell, figure.add_axes((0.0, 0.03, 0.36, 0.94)))
    for k, field in enumerate([*outputs, sum(outputs, np.zeros((65, 65)))]):
        row, column = divmod(k, 3)
        axes = figure.add_axes((0.385 + 0.2 * column, 0.525 - 0.475 * row, 0.188, 0.393))
        axes.set_facecolor("black")
        visible = np.ma.masked_less(field, 0.5)
        axes.imshow(visible, cmap=COUNTS, norm=LogNorm(0.12, 40), extent=(-32.5, 32.5, 32.5, -32.5))
        axes.set(xticks=(-25, 0, 25), yticks=(-25, 0, 25))
        axes.tick_params(labelsize=7.5, labelleft=column == 0, labelbottom=row == 1)
        frame(axes, SOFT, ticks=True)
        if k < len(cell.branches):
            source = "F" if cell.branches[k].input_index < 0 else f"branch {cell.branches[k].input_index}"
            axes.set_title(f"branch {k}, reads {source}", fontsize=9)
        else:
            axes.set_title("all five together", fontsize=9)
        axes.text(-30, 30, f"{np.count_nonzero(field > 0.5)} positions", color="white", fontsize=8)
    return figure


def draw_decoder() -> Figure:
    """Context alone, and with what a decoder makes of it and of an early map, after a short training on this one street."""
    image, labels = street(129, 193)
    context, low_level = street_logits(), image[::4, ::4].transpose(2, 0, 1)[None] - 0.5
    decoded = trained_decoder(context, low_level, labels[None, ::4, ::4], iterations=160, rate=0.1)

    figure = Figure(figsize=(WIDTH, 1.4), layout="constrained")
    panels = figure.subplots(1, 5)
    colours, options = ListedColormap(PALETTE), {"vmin": -0.5, "vmax": 5.5}
    show(panels[0], context[0].argmax(axis=0), cmap=colours, **options)
    panels[0].set_title("context, 9 × 13")
    panels[1].imshow(low_level[0].transpose(1, 2, 0) + 0.5, interpolation="nearest")
    frame(panels[1], SOFT)
    panels[1].set_title("low-level map, 33 × 49")
    for axes, logits, name in zip(panels[2:], (context, decoded), ("without", "with"), strict=False):
        classes = bilinear_resize(logits, (129, 193))[0].argmax(axis=0)
        show(axes, classes, cmap=colours, **options)
        axes.set_title(f"{name} decoder: {100 * (classes == labels).mean():.0f} %")
    show(panels[4], labels, cmap=colours, **options)
    panels[4].set_title("labels, 129 × 193")
    return figure


def trained_decoder(context: Array, low_level: Array, labels: NDArray[np.int64], *, iterations: int, rate: float) -> Array:
    """Logits (1, K, H, W) of a decoder of 16 channels and a classifier, trained by SGD with momentum 0.9."""
    rng, classes, channels = np.random.default_rng(0), len(CLASSES), 16

    def conv_norm(width: int, *shape: int) -> ConvNorm[Array]:
        return ConvNorm(rng.normal(0, (2 / np.prod(shape)) ** 0.5, (width, *shape)), identity_norm(width))

    refinement = [
        SeparableConv(conv_norm(width, 1, 3, 3), conv_norm(channels, width, 1, 1)) for width in (classes + 4, channels)
    ]
    matrix = rng.normal(0, 0.1, (classes, channels, 1, 1))
    weights: Any = DecoderWeights(conv_norm(4, 3, 1, 1), tuple(refinement)), matrix
    velocity = combined(weights, weights, lambda w, _: np.zeros_like(w))
    for _ in range(iterations):
        of_decoder, matrix = weights
        decoded = decoder(context, low_level, of_decoder, training=True)
        grad_logits = upsampled_cross_entropy_backward(pointwise_conv(decoded, matrix), labels)
        grad_decoded, grad_matrix = pointwise_conv_backward(grad_logits, decoded, matrix)
        *_, grad_decoder = decoder_backward(grad_decoded, context, low_level, of_decoder, training=True)
        velocity = combined(velocity, (grad_decoder, grad_matrix), lambda v, g: 0.9 * v + g)
        weights = combined(weights, velocity, lambda w, v: w - rate * v)
    return pointwise_conv(decoder(context, low_level, weights[0], training=True), weights[1])


def combined(left: Any, right: Any, function: Callable[[Array, Array], Array]) -> Any:
    """A container of weights from two of its kind, array by array."""
    if isinstance(left, np.ndarray):
        return function(left, right)
    children = [combined(*pair, function) for pair in zip(left, right, strict=True)]
    return type(left)(*children) if hasattr(left, "_fields") else tuple(children)


def draw_upsampled_cross_entropy() -> Figure:
    """Small logits, upsampled probabilities, loss map, and the gradient back at the small logits."""
    _, labels = street(129, 193)
    labels[126:] = IGNORE_INDEX
    logits = street_logits()
    upsampled = bilinear_resize(logits, (129, 193))
    probabilities = np.exp(upsampled) / np.exp(upsampled).sum(axis=1, keepdims=True)
    surprise = np.ma.masked_where(labels == IGNORE_INDEX, pixel_losses(logits, labels[None])[0])
    gradient = upsampled_cross_entropy_backward(logits, labels[None])[0]
    loss = upsampled_cross_entropy(logits, labels[None])

    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    panels = figure.subplots(2, 3)
    colours = ListedColormap(PALETTE)
    panels[0, 0].imshow(np.where((labels == IGNORE_INDEX)[:, :, None], 1.0, PALETTE[np.minimum(labels, 5)]))
    panels[0, 0].set_title("labels, 129 × 193 (white: ignored)")
    show(panels[0, 1], logits[0].argmax(axis=0), cmap=colours, vmin=-0.5, vmax=5.5)
    panels[0, 1].set_title("largest of the small logits, 9 × 13")
    panels[0, 2].imshow(np.clip(np.einsum("khw,kc->hwc", probabilities[0], PALETTE), 0, 1))
    panels[0, 2].set_title("probabilities after the resize, mixed")
    loss_image = panels[1, 0].imshow(surprise, cmap=MAP, vmin=0, vmax=5)
    panels[1, 0].set_title(f"loss per pixel, mean {loss:.2f} nats")
    figure.colorbar(loss_image, ax=panels[1, 0], shrink=0.8, pad=0.02)
    for axes, name in zip(panels[1, 1:], ("vehicle", "building"), strict=True):
        values = gradient[CLASSES.index(name)] * 1000
        picture = axes.imshow(values, cmap=SIGNED, vmin=-3, vmax=3)
        axes.set_title(f"gradient for “{name}”, 9 × 13 (× 10⁻³)")
        figure.colorbar(picture, ax=axes, shrink=0.8, pad=0.02)
    for axes in panels.ravel():
        frame(axes, SOFT)
    keys = [Rectangle((0, 0), 1, 1, color=colour) for colour in PALETTE]
    figure.legend(keys, CLASSES, loc="outside lower center", ncols=6, handlelength=1.0, columnspacing=1.6)
    return figure


def draw_hard_example_mining() -> Figure:
    """Which pixels of the street count at three shares, and the gradient back at the small logits."""
    _, labels = street(129, 193)
    labels[126:] = IGNORE_INDEX
    logits, labels = street_logits(), labels[None]
    losses = pixel_losses(logits, labels)[0]

    figure = Figure(figsize=(WIDTH, 3.7), layout="constrained")
    panels = figure.subplots(2, 3)
    for (above, below), share, name in zip(
        panels.T, (1, 1 / 4, 1 / 16), ("all pixels", "a quarter", "a sixteenth"), strict=True
    ):
        kept = hardest_pixels(logits, labels, share)[0] != IGNORE_INDEX
        picture = above.imshow(np.ma.masked_where(~kept, losses), cmap=MAP, vmin=0, vmax=5, interpolation="nearest")
        above.set_title(f"{name}: mean {mined_cross_entropy(logits, labels, share):.2f} nats")
        gradient = mined_cross_entropy_backward(logits, labels, share)[0, CLASSES.index("vehicle")] * 1000
        slopes = below.imshow(gradient, cmap=SIGNED, vmin=-25, vmax=25)
    panels[0, 0].set_ylabel("loss per pixel")
    panels[1, 0].set_ylabel("gradient for “vehicle”")
    for row, image, unit in zip(panels, (picture, slopes), ("nats", "10⁻³ nats"), strict=True):
        figure.colorbar(image, ax=row, shrink=0.8, pad=0.01, label=unit)
    for axes in panels.ravel():
        frame(axes, SOFT)
    return figure


def draw_mean_iou() -> Figure:
    """Two overlapping regions, the counts, and the score."""
    y, x = np.mgrid[0:12, 0:20]
    labels = ((x - 5.5) ** 2 + (y - 5.5) ** 2 < 5.1**2).astype(np.int64)
    predictions = ((x - 11.5) ** 2 + (y - 5.5) ** 2 < 5.1**2).astype(np.int64)
    labels[:, 19] = IGNORE_INDEX
    confusion = confusion_matrix(predictions, labels, num_classes=2)
    iou = class_iou(confusion)
    kind = np.where(labels == IGNORE_INDEX, 4, labels + 2 * predictions)  # 0 neither, 1 label, 2 prediction, 3 both, 4 ignored
    colours = ListedColormap(["#eef1f5", ORANGE, SKY, BLUE, "white"])

    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    regions, table, score = figure.subplots(1, 3, width_ratios=(1.8, 1, 1.1))
    show(regions, kind, cmap=colours, norm=BoundaryNorm(np.arange(-0.5, 5), 5))
    regions.set_xticks(np.arange(0.5, 19.5), minor=True)
    regions.set_yticks(np.arange(0.5, 11.5), minor=True)
    regions.grid(which="minor", color="white", linewidth=0.8)
    regions.tick_params(which="minor", length=0)
    regions.set_title("class 1: label and prediction")
    places = ((3.5, 5.5, 1, "label\nonly", INK), (8.5, 5.5, 3, "both", "white"), (13.5, 5.5, 2, "predicted\nonly", INK))
    for column, row, value, name, colour in places:
        count = np.count_nonzero(kind == value)
        regions.text(column, row, f"{name}\n{count}", ha="center", va="center", color=colour, fontweight="bold")
    regions.text(19, 5.5, "ignored", ha="center", va="center", rotation=90, color=SOFT, fontsize=8.5)

    table.imshow(confusion, cmap=WEIGHTS, vmin=0, vmax=1.6 * confusion.max())
    for (label, prediction), count in np.ndenumerate(confusion):
        table.text(prediction, label, str(count), ha="center", va="center", fontsize=12, fontweight="bold")
    table.set(xticks=(0, 1), yticks=(0, 1), xlabel="prediction", ylabel="label", title="M[label, prediction]")
    frame(table, SOFT, ticks=True)

    score.bar((0, 1), iou, color=("#b7bfca", BLUE), width=0.72)
    for k in range(2):
        intersection, union = confusion[k, k], confusion[k].sum() + confusion[:, k].sum() - confusion[k, k]
        text = f"{intersection} / {union}\n= {iou[k]:.3f}"
        score.text(k, 0.03, text, ha="center", va="bottom", color="white" if k else INK)
    score.axhline(mean_iou(confusion), color=VERMILION, linewidth=1.2, linestyle="--")
    score.text(1.45, mean_iou(confusion) + 0.02, f"mIOU\n{mean_iou(confusion):.3f}", color=VERMILION, va="bottom", ha="left")
    score.set(xticks=(0, 1), ylim=(0, 1), xlim=(-0.5, 2.1), title="intersection / union")
    score.set_xticklabels(("class 0", "class 1"))
    return figure


Steps = list[tuple[str, Array]]  # a name and the map after it, (1, C, height, width)


def tiny_conv(x: Array, *rows: Sequence[float]) -> Array:
    """A 1×1 convolution, given the rows of its matrix."""
    return pointwise_conv(x, np.array(rows)[:, :, None, None])


def tiny_norm(x: Array, scale: float, offset: float) -> Steps:
    """Batch norm, and ReLU."""
    channels = x.shape[1]
    norm = BatchNorm(np.full(channels, scale), np.full(channels, offset), np.zeros(channels), np.ones(channels))
    name = f"BN, {scale:g} · x̂" + (f" + {offset:g}" if offset else "")
    return [(name, batch_norm(x, norm, training=True)), ("ReLU", batch_norm_relu(x, norm, training=True))]


def tiny_branches() -> dict[str, Steps]:
    """Every map of the three branches of the page's tiny cell."""
    feature = np.array([[1.0, 9.0], [7.0, 15.0]]).reshape(1, 1, 2, 2)
    first: Steps = [("F", feature), ("1×1: 2", tiny_conv(feature, [2.0]))]
    first += tiny_norm(first[-1][1], 5.0, 3.0)

    branch_0 = first[-1][1]
    kernel = np.array([[0.0, 1.0, 0.0], [-1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]).reshape(1, 1, 3, 3)
    second: Steps = [("branch 0", branch_0), ("depthwise", depthwise_conv(branch_0, kernel, rate=(1, 1)))]
    second += tiny_norm(second[-1][1], 2.0, 0.0)
    second.append(("pointwise: 3", tiny_conv(second[-1][1], [3.0])))
    second += tiny_norm(second[-1][1], 3.0, 1.0)

    rows, columns = (pooling_matrix(2, grid, variant="sliding_window") for grid in (1, 2))
    third: Steps = [("branch 0", branch_0), ("means of 2 × 1", rows @ branch_0 @ columns.T)]
    third.append(("1×1: 2", tiny_conv(third[-1][1], [2.0])))
    third += tiny_norm(third[-1][1], 2.0, 0.0)
    third.append(("resized", bilinear_resize(third[-1][1], (2, 2))))
    return {"branch 0,\n1×1": first, "branch 1,\nseparable": second, "branch 2,\npooling 1×2": third}


def tiny_head(branches: Sequence[Array]) -> Steps:
    """Every map from the branches to the loss, which is NaN at the ignored pixel."""
    steps: Steps = [("", tiny_conv(np.concatenate(branches, axis=1), [1.0, 3.0, 1.0], [1.0, -3.0, 5.0]))]
    steps += tiny_norm(steps[-1][1], 0.9, 0.1)
    bias = np.array([0.2, 0.0])[:, None, None]
    steps.append(("logits", tiny_conv(steps[-1][1], [1.0, -1.0], [-1.0, 1.0]) + bias))
    upsampled = bilinear_resize(steps[-1][1], (2, 3))
    probability = np.exp(upsampled) / np.exp(upsampled).sum(axis=1, keepdims=True)
    labels = np.array([[0, 1, 1], [0, IGNORE_INDEX, 1]])[None, None]
    ignored = labels == IGNORE_INDEX
    surprise = -np.log(np.take_along_axis(probability, np.where(ignored, 0, labels), axis=1))
    last = np.concatenate([np.where(ignored, np.nan, labels), np.where(ignored, np.nan, surprise)], axis=1)
    return [*steps, ("resized", upsampled), ("softmax", probability), ("", last)]


def draw_tiny_cell() -> Figure:
    """A cell on four positions, every number from F to the loss."""
    branches = tiny_branches()
    head = tiny_head([steps[-1][1] for steps in branches.values()])
    named = (("1×1: 1, 3, 1", "logits of class 0", "labels"), ("1×1: 1, −3, 5", "logits of class 1", "loss"))
    for k, (weights, logits, last) in enumerate(named):
        names = {0: weights, 3: logits, 6: last}
        channel = [(names.get(column, name), values[:, k : k + 1]) for column, (name, values) in enumerate(head)]
        branches[f"all three,\nchannel {k}"] = channel
    figure = Figure(figsize=(WIDTH, 5.5))
    left, pitch, high = 0.09, 0.1295, 0.192
    for row, (label, steps) in enumerate(branches.items()):
        middle, end = 0.885 - high * row, 0.0
        figure.text(0.006, middle, label, va="center", fontsize=9)
        for column, (name, values) in enumerate(steps):
            centre, half = left + pitch * (column + 0.5), 0.0165 * values.shape[3]
            draw_numbers(figure, values[0, 0], (centre - half, middle - 0.0605 * values.shape[2] / 2))
            figure.text(centre, middle + 0.068, name, ha="center", va="bottom", fontsize=8)
            if column and name not in ("labels", "loss"):
                ends = ((end + 0.008, middle), (centre - half - 0.008, middle))
                arrow: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 7, "color": SOFT, "shrinkA": 0, "shrinkB": 0}
                figure.add_artist(ConnectionPatch(*ends, "figure fraction", **arrow))
            end = centre + half
    mean = f"mean {np.nanmean(head[-1][1][:, 1]):.4f}"
    figure.text(left + 6.5 * pitch, 0.885 - 4 * high - 0.068, mean, ha="center", va="top", fontsize=8.5)
    return figure


def draw_numbers(figure: Figure, numbers: Array, corner: tuple[float, float]) -> None:
    """A map of few positions with its numbers, its lower left corner there; NaN is a dash."""
    size = (0.033 * numbers.shape[1], 0.0605 * numbers.shape[0])
    axes = figure.add_axes((*corner, *size))
    largest = 2.2 * np.nanmax(np.abs(numbers))
    show(axes, np.ma.masked_invalid(numbers), cmap=SIGNED, vmin=-largest, vmax=largest, aspect="auto")
    for (row, column), value in np.ndenumerate(numbers):
        text = "–" if np.isnan(value) else f"{round(value, 2) + 0.0:g}".replace("-", "−")
        axes.text(column, row, text, ha="center", va="center", fontsize=8)


def draw_depth() -> Figure:
    """Small outputs against measured depths: loss map, gradient back at the small outputs, and the scores."""
    depths = street_depths(129, 193)
    rng = np.random.default_rng(3)
    outputs = np.log(np.nan_to_num(street_depths(9, 13), nan=30.0)) + rng.normal(0, 0.12, (9, 13))
    outputs = outputs[None, None]  # (1, 1, 9, 13)
    upsampled = bilinear_resize(outputs, (129, 193))[0, 0]
    targets = np.log(depths)[None]
    gradient = upsampled_l1_backward(outputs, targets)[0, 0] * 1000
    totals = depth_totals(np.exp(upsampled), depths)
    ratio = np.exp(np.abs(upsampled - targets[0]))

    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    panels = figure.subplots(2, 3)
    metres = LogNorm(4, 32)
    names = ("measured depths d (white: none)", "outputs, 9 × 13, as depths", "predicted depths p, 129 × 193")
    for axes, values, name in zip(panels[0], (depths, np.exp(outputs[0, 0]), np.exp(upsampled)), names, strict=True):
        picture = axes.imshow(values, cmap=f"{MAP}_r", norm=metres, interpolation="nearest")
        axes.set_title(name)
    bar = figure.colorbar(picture, ax=panels[0], shrink=0.8, pad=0.01, ticks=(4, 8, 16, 32), label="metres")
    bar.ax.set_yticklabels(("4", "8", "16", "32"))
    bar.ax.minorticks_off()
    picture = panels[1, 0].imshow(np.log(ratio), cmap=MAP, vmin=0, vmax=1)
    panels[1, 0].set_title(f"loss per pixel, mean {upsampled_l1(outputs, targets):.3f}")
    figure.colorbar(picture, ax=panels[1, 0], shrink=0.8, pad=0.02)
    picture = panels[1, 1].imshow(gradient, cmap=SIGNED, vmin=-16, vmax=16)
    panels[1, 1].set_title("gradient, 9 × 13 (× 10⁻³)")
    figure.colorbar(picture, ax=panels[1, 1], shrink=0.8, pad=0.02)
    for axes in panels.ravel()[:5]:
        frame(axes, SOFT)

    scores, shares = panels[1, 2], np.arange(1, np.isfinite(ratio).sum() + 1) / np.isfinite(ratio).sum()
    scores.plot(np.sort(ratio[np.isfinite(ratio)]), shares, color=BLUE)
    for power in POWERS:
        share = delta(totals, power)
        scores.plot([DELTA**power] * 2, [0, share], color=SOFT, linewidth=0.8, linestyle="--")
        scores.text(DELTA**power + 0.03, 0.15 + 0.2 * power, f"$δ_{power}$\n{share:.3f}", fontsize=8.5)
    scores.text(2.0, 0.05, f"RMSE {rmse(totals):.2f} m\nAbsRel {abs_rel(totals):.3f}", color=VERMILION, va="bottom")
    scores.set(xlim=(1, 2.6), ylim=(0, 1.03), xlabel="max(p / d, d / p)", title="share of pixels below a ratio")
    return figure


def show(axes: Axes, values: NDArray[np.generic], cmap: str | ListedColormap = MAP, **options: object) -> None:
    """A map with square pixels and no ticks."""
    axes.imshow(values, cmap=cmap, interpolation="nearest", **options)  # type: ignore[arg-type]
    frame(axes, SOFT)


def frame(axes: Axes, colour: str, width: float = 0.7, *, ticks: bool | None = None) -> None:
    """A thin line around a picture; ticks stay where they were set on purpose."""
    for spine in axes.spines.values():
        spine.set(visible=True, color=colour, linewidth=width)
    if ticks is None and not axes.get_xlabel():
        axes.set(xticks=[], yticks=[])


PICTURES: dict[str, Callable[[], Figure]] = {
    "context": draw_context,
    "layout": draw_layout,
    "operations": draw_operations,
    "batch_norm": draw_batch_norm,
    "pointwise_conv": draw_pointwise_conv,
    "depthwise_conv": draw_depthwise_conv,
    "out_of_reach": draw_out_of_reach,
    "separable_conv": draw_separable_conv,
    "bilinear_resize": draw_bilinear_resize,
    "pyramid_pooling": draw_pyramid_pooling,
    "pyramid_grids": draw_pyramid_grids,
    "concat_project": draw_concat_project,
    "dense_prediction_cell": draw_dense_prediction_cell,
    "decoder": draw_decoder,
    "upsampled_cross_entropy": draw_upsampled_cross_entropy,
    "hard_example_mining": draw_hard_example_mining,
    "mean_iou": draw_mean_iou,
    "tiny_cell": draw_tiny_cell,
    "depth": draw_depth,
}


# On a slide a picture must look as it was drawn, whatever fonts are there: an SVG has outlines in place of letters, because
# its viewer would take another font; a PDF brings its font along, so its letters stay text. Photographs and maps are resampled
# to `savefig.dpi` in both, which is a full HD screen over the width, for viewers would blur the edges of a map's squares.
OUTPUT: dict[Any, Any] = {"svg.fonttype": "path", **SAME_EACH_TIME}


def draw_all(folder: Path, names: Sequence[str] = tuple(PICTURES), formats: Sequence[Format] = ("png",)) -> None:
    """Write `folder`/<name>.<format> for each name and format, nothing of the moment in the file. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        for suffix in formats:
            write_whole(folder / f"{name}.{suffix}", drawn(name, suffix))


def drawn(name: str, suffix: Format) -> bytes:
    """The picture as a file's content; a PNG has 256 colours."""
    buffer, metadata = BytesIO(), {DATE_IN[suffix]: None} if suffix in DATE_IN else None
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, **OUTPUT}):
        PICTURES[name]().savefig(buffer, format=suffix, facecolor="white", metadata=metadata)
    if suffix != "png":
        return buffer.getvalue()
    with Image.open(buffer) as picture:
        reduced = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    reduced.save(buffer := BytesIO(), format="png", optimize=True)
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw what the command line asks for; ends with a sentence for what cannot be."""
    parser = ArgumentParser(description="Draw the pictures of definitions.md.")
    parser.add_argument("--format", nargs="+", choices=get_args(Format), default=["png"], help="kinds of files; default: png")
    parser.add_argument("--out", type=Path, help="folder to write to; default, for png alone: docs/images")
    parser.add_argument("--pictures", nargs="+", choices=PICTURES, default=list(PICTURES), metavar="NAME", help="default: all")
    asked = parser.parse_args(arguments)
    if asked.out is None and asked.format != ["png"]:
        parser.error("--out is missing: docs/images is for PNG files alone; give a folder, such as --out slides")
    folder = asked.out or IMAGES
    try:
        draw_all(folder, asked.pictures, asked.format)
    except OSError as error:
        parser.error(f"--out {folder}: cannot be written ({error.strerror}); give another folder")


if __name__ == "__main__":
    main()
