"""Predictions of a network as files: for test servers, and pictures with a legend to look at."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from search.datasets import Dataset, Sample
from search.dense_tasks import DenseTask, Label

_COLOURS_SHARE = 0.6  # of a map's colours, where they are laid over the picture


def prediction_path(folder: Path, dataset: Dataset, name: str) -> Path:
    """The path at which the data set's test server expects the prediction of picture `name`.

    Cityscapes takes any folder of `<city>_<sequence>_<frame>*.png`, VOC `results/VOC2012/Segmentation/comp6_<split>_cls/`.
    """
    if dataset.name == "pascal_voc":
        return folder / "results" / "VOC2012" / "Segmentation" / f"comp6_{dataset.split}_cls" / f"{name}.png"
    return folder / f"{name}.png"


def write_prediction(path: Path, predicted: Label, task: DenseTask) -> None:
    """Write a prediction in the form of the data set's own label files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    task.encoded(predicted).save(path)


def overlay(sample: Sample, predicted: Label, task: DenseTask) -> Image.Image:
    """Draw the prediction, over the picture if its colours need that, the label beside it, and the legend below."""
    maps = [predicted, sample.label]
    share = _COLOURS_SHARE if task.is_transparent else 1.0
    panels = [_blend(sample.image, colours, share) for colours in task.colours(maps)]
    height, width = predicted.shape
    factor = max(1, round(480 / width))  # small pictures are enlarged, so that the text fits
    gap, line = 8, 22
    names = task.legend(maps)
    page_width = 2 * factor * width + 3 * gap
    columns = max(1, page_width // 170)
    legend = -(-len(names) // columns) * line
    page = Image.new("RGB", (page_width, factor * height + line + legend + 3 * gap), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=14)
    for i, (panel, title) in enumerate(zip(panels, (f"prediction of {sample.name}", "label"), strict=True)):
        left = gap + i * (factor * width + gap)
        draw.text((left, gap // 2), title, fill="black", font=font)
        page.paste(panel.resize((factor * width, factor * height), Image.Resampling.NEAREST), (left, line))
    for i, (name, colour) in enumerate(names):
        left, top = gap + (i % columns) * 170, line + factor * height + gap + (i // columns) * line
        draw.rectangle((left, top + 2, left + 16, top + 16), fill=colour, outline="black")
        draw.text((left + 22, top), name, fill="black", font=font)
    return page


def _blend(image: NDArray[np.uint8], colours: NDArray[np.uint8], share: float) -> Image.Image:
    return Image.blend(Image.fromarray(image).convert("L").convert("RGB"), Image.fromarray(colours), share)
