"""Predictions of a network as files: for test servers, and pictures with a legend to look at."""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from search.datasets import Dataset
from search.dense_tasks import RGB, DenseTask, Label
from search.files import write_whole

_COLOURS_SHARE = 0.6  # of a map's colours, where they are laid over the picture
_WIDTH = 480  # pixels, to which smaller pictures are enlarged so that the text fits
_GAP, _LINE, _SWATCH, _FONT_SIZE = 8, 22, 16, 14  # pixels


def prediction_path(folder: Path, dataset: Dataset, name: str) -> Path:
    """The path at which the data set's test server expects the prediction of picture `name`.

    Cityscapes takes any folder of `<city>_<sequence>_<frame>*.png`, VOC `results/VOC2012/Segmentation/comp6_<split>_cls/`.
    """
    if dataset.name == "pascal_voc":
        return folder / "results" / "VOC2012" / "Segmentation" / f"comp6_{dataset.split}_cls" / f"{name}.png"
    return folder / f"{name}.png"


def write_prediction(path: Path, predicted: Label, task: DenseTask) -> None:
    """Write a prediction in the form of the data set's own label files, whole or not at all."""
    write_picture(path, task.encoded(predicted))


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture as PNG, whole or not at all."""
    buffer = BytesIO()
    picture.save(buffer, format="PNG")
    write_whole(path, buffer.getvalue())


def laid_over(image: NDArray[np.uint8], colours: NDArray[np.uint8], task: DenseTask) -> Image.Image:
    """A map's colours (H, W, 3) as they are shown: over the picture, in grey so that they stay true, if they need it."""
    grey = Image.fromarray(image).convert("L").convert("RGB")
    return Image.blend(grey, Image.fromarray(colours), _COLOURS_SHARE if task.is_transparent else 1.0)


def overlay(image: NDArray[np.uint8], maps: Mapping[str, Label], task: DenseTask) -> Image.Image:
    """Draw maps of a picture, such as its prediction and its label, side by side below their titles, and the legend below."""
    height, width = image.shape[:2]
    factor = max(1, round(_WIDTH / width))
    size = (factor * width, factor * height)
    panels = [laid_over(image, colours, task) for colours in task.colours(list(maps.values()))]
    page_width = len(panels) * (size[0] + _GAP) + _GAP
    legend = _legend(task.legend(list(maps.values())), page_width - 2 * _GAP)
    page = Image.new("RGB", (page_width, _LINE + size[1] + _GAP + legend.height + _GAP), "white")
    for i, (panel, title) in enumerate(zip(panels, maps, strict=True)):
        left = _GAP + i * (size[0] + _GAP)
        page.paste(_line(title, size[0]), (left, 0))
        page.paste(panel.resize(size, Image.Resampling.NEAREST), (left, _LINE))
    page.paste(legend, (_GAP, _LINE + size[1] + _GAP))
    return page


def _legend(names: list[tuple[str, RGB]], width: int) -> Image.Image:
    """Names with their colours in columns, as many as fit."""
    longest = max((_font().getlength(name) for name, _ in names), default=0)
    column = min(width, _SWATCH + 3 * _GAP + int(longest))
    columns = width // column
    legend = Image.new("RGB", (width, -(-len(names) // columns) * _LINE), "white")
    draw = ImageDraw.Draw(legend)
    for i, (name, colour) in enumerate(names):
        left, top = i % columns * column, i // columns * _LINE
        draw.rectangle((left, top + 2, left + _SWATCH, top + 2 + _SWATCH), fill=colour, outline="black")
        legend.paste(_line(name, column - _SWATCH - _GAP), (left + _SWATCH + _GAP, top))
    return legend


def _line(text: str, width: int) -> Image.Image:
    """A line of text, cut off where it is longer."""
    line = Image.new("RGB", (width, _LINE), "white")
    ImageDraw.Draw(line).text((0, 2), text, fill="black", font=_font())
    return line


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=_FONT_SIZE)
