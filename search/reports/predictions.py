"""Results of a network on pictures: table of scores, predictions for test servers, pictures with a legend."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from reference.mean_iou import class_iou, mean_iou
from search.datasets import IGNORE_INDEX, Dataset, Sample

_UNLABELLED = np.array((56, 56, 56), np.uint8)  # a lighter grey may be a class's colour


def score_table(class_names: Sequence[str], confusion: NDArray[np.int64]) -> str:
    """IoU of each class, its share of the labelled pixels, and the mIOU; a dash where a class does not occur.

    >>> print(score_table(("road", "car"), np.array([[3, 1], [0, 4]])))
    class     IoU %  pixels %
    road      75.00     50.00
    car       80.00     50.00
    mIOU      77.50
    """
    width = max(len(name) for name in (*class_names, "class")) + 2
    pixels = confusion.sum(axis=1) / max(confusion.sum(), 1)
    lines = [f"{'class':{width}} {'IoU %':>7} {'pixels %':>9}"]
    for name, iou, share in zip(class_names, class_iou(confusion), pixels, strict=True):
        lines.append(f"{name:{width}} {_percent(float(iou)):>7} {_percent(float(share)):>9}")
    return "\n".join([*lines, f"{'mIOU':{width}} {_percent(mean_iou(confusion)):>7}"])


def prediction_path(folder: Path, dataset: Dataset, name: str) -> Path:
    """The path at which the data set's test server expects the prediction of picture `name`.

    Cityscapes takes any folder of `<city>_<sequence>_<frame>*.png`, VOC `results/VOC2012/Segmentation/comp6_<split>_cls/`.
    """
    if dataset.name == "pascal_voc":
        return folder / "results" / "VOC2012" / "Segmentation" / f"comp6_{dataset.split}_cls" / f"{name}.png"
    return folder / f"{name}.png"


def write_prediction(path: Path, predicted: NDArray[np.uint8], dataset: Dataset) -> None:
    """Write one 8-bit label id per pixel: as a palette picture if ids are classes (VOC's own form), or else in grey."""
    ids = np.array(dataset.label_ids, np.uint8)
    picture = Image.fromarray(ids[predicted])
    if dataset.label_ids == tuple(range(len(dataset.label_ids))):
        picture.putpalette(dataset.palette.tobytes())  # turns it into mode P; the numbers stay
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def overlay(sample: Sample, predicted: NDArray[np.uint8], dataset: Dataset) -> Image.Image:
    """Draw the prediction's colours over the picture, the label's beside it, and the names of the classes below."""
    panels = [
        _blend(sample.image, np.vstack([dataset.palette, _UNLABELLED])[classes])
        for classes in (predicted, np.minimum(sample.label, len(dataset.palette)))
    ]
    height, width = predicted.shape
    factor = max(1, round(480 / width))  # small pictures are enlarged, so that the text fits
    gap, line = 8, 22
    occurring = sorted(set(np.unique(predicted)) | set(np.unique(sample.label)) - {IGNORE_INDEX})
    names = [(dataset.class_names[k], tuple(dataset.palette[k])) for k in occurring] + [("ignored", tuple(_UNLABELLED))]
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
        draw.rectangle((left, top + 2, left + 16, top + 16), fill=tuple(int(v) for v in colour), outline="black")
        draw.text((left + 22, top), name, fill="black", font=font)
    return page


def _blend(image: NDArray[np.uint8], colours: NDArray[np.uint8]) -> Image.Image:
    return Image.blend(Image.fromarray(image).convert("L").convert("RGB"), Image.fromarray(colours.astype(np.uint8)), 0.6)


def _percent(fraction: float) -> str:
    return "–" if math.isnan(fraction) else f"{100 * fraction:.2f}"
