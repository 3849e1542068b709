"""Model cards, as the Hugging Face Hub shows them: what a file holds, how good it was, how to load it, and what to cite."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fast.checkpoint import CONTEXT_FORMAT, FORMAT, NETWORK_FORMAT, read_description, write_whole
from fast.hub import FILE
from reference.cell import Cell
from reference.grid import Grid

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

PAPER = "https://arxiv.org/abs/1809.04184"
_CITATION = """@inproceedings{chen2018searching,
  title = {Searching for Efficient Multi-Scale Architectures for Dense Image Prediction},
  author = {Chen, Liang-Chieh and Collins, Maxwell D. and Zhu, Yukun and Papandreou, George and Zoph, Barret and
            Schroff, Florian and Adam, Hartwig and Shlens, Jonathon},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2018},
}"""


class _Kind(NamedTuple):
    """What a file of one format holds, and how code names it."""

    name: str
    variable: str
    loaded: str  # what its loading function returns
    of: str
    reads: str


_FEATURES = "the backbone's features (N, C, h, w) float32"
_KINDS = {
    NETWORK_FORMAT: _Kind(
        "Network", "network", "network, description", "SegmentationNetwork", "images (N, 3, H, W) float32, RGB, 0 to 255"
    ),
    FORMAT: _Kind("Head", "head", "head, description", "SegmentationHead", _FEATURES),
    CONTEXT_FORMAT: _Kind("Cell", "context", "context", "DensePredictionCell", _FEATURES),
}


def write_card(path: Path) -> Path:
    """Write the card of a cell's, head's or network's file beside it, `best.safetensors.md` for `best.safetensors`: its path.

    Raises ValueError naming a file that is none of these.
    """
    return write_card_for(path, *read_description(path))


def write_card_for(path: Path, file_format: str, description: Mapping[str, Any]) -> Path:
    """Write the card of a file whose description is at hand, such as an exported program's."""
    card = path.with_name(f"{path.name}.md")  # whole, because a network may be exported in two formats
    write_whole(card, str(model_card(path.name, file_format, description)).encode())
    return card


def model_card(file_name: str, file_format: str, description: Mapping[str, Any]) -> "ModelCard":
    """The card of a file, from its format and its description alone (`fast.checkpoint.describe`)."""
    from huggingface_hub import ModelCard, ModelCardData  # imported here: the modules need PyTorch and NumPy alone

    kind = _KINDS[file_format]
    tags = ["dense-prediction-cell", "pytorch"]
    data = ModelCardData(library_name="dense-prediction-cell", pipeline_tag=_pipeline(description), tags=tags)
    table = "\n".join(f"| {name} | {_in_table(value)} |" for name, value in _facts(description))
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {kind.name} with a Dense Prediction Cell\n\n"
        f"A context module of [*Searching for Efficient Multi-Scale Architectures for Dense Image Prediction*]({PAPER}).\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        f"## Use\n\n```python\n{_how_to_load(file_name, kind, description)}\n```\n\n"
        "## Licence\n\nThe code is under Apache-2.0. The weights are subject to the terms of the data they were trained on,\n"
        "and of the backbone's weights they began with.\n\n"
        f"## Citation\n\n```bibtex\n{_CITATION}\n```\n"
    )


def _in_table(value: object) -> str:
    """Names that people gave, such as `a | b` or `<b>`, as they are to be read."""
    return str(value).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _pipeline(description: Mapping[str, Any]) -> str | None:
    """The Hub's name of the task."""
    return "depth-estimation" if "depth_scale" in description else "image-segmentation" if "outputs" in description else None


def _facts(description: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Rows of the card's table; what the file does not say is left out."""
    yield "cell", str(Cell.from_json(json.dumps(description["cell"])))
    read = description["in_channels"]  # of several layers a list
    channels = f"{sum(read)} ({' + '.join(map(str, read))})" if isinstance(read, list) else f"{read}"
    yield "channels", f"{channels} in, {description['cell_channels']} out"
    yield "output stride", str(description["output_stride"])
    backbone, source = description.get("backbone") or {}, description.get("source") or {}
    if name := backbone.get("name") or backbone.get("backbone"):
        yield "backbone", name
    if not backbone.get("align_corners", True):
        yield "sizes of pictures", f"{Grid(backbone['output_stride'], align_corners=False)} pixels each way"
    if layers := backbone.get("layers"):
        yield "layers of the backbone", ", ".join(map(str, layers))
    if description.get("decoder"):
        yield "decoder", "DeepLabv3+"
    if names := description.get("class_names"):
        yield f"{len(names)} classes", ", ".join(names)
    trained = source.get("training") or {}
    if dataset := (trained.get("data") or {}).get("dataset") or backbone.get("dataset"):
        yield "data set", str(dataset)
    loss = (trained or source).get("loss")  # a source may say anything, such as a number
    if isinstance(loss, Mapping) and (weights := loss.get("class_weights")):
        yield "class weights in the loss", ", ".join(f"{weight:g}" for weight in weights)
    if "iteration" in source:
        yield "iterations", f"{source['iteration']:,}"
    yield from ((name, f"{value:.4f}") for name, value in source.items() if isinstance(value, float) and name != "seconds")


def _how_to_load(file_name: str, kind: _Kind, description: Mapping[str, Any]) -> str:
    """Three lines of Python."""
    match Path(file_name).suffix:
        case ".onnx":
            name, reads = description["input"]["name"], description["input"]["is"]
            load = f'import onnxruntime\nsession = onnxruntime.InferenceSession("{file_name}")'
            return f'{load}\n(logits,) = session.run(None, {{"{name}": {name}}})  # {reads}'
        case ".pt2":
            name, reads = description["input"]["name"], description["input"]["is"]
            return f'import torch\nprogram = torch.export.load("{file_name}").module()\nlogits = program({name})  # {reads}'
    if file_name == FILE:
        load = f'{kind.variable} = dpc.{kind.of}.from_pretrained("this folder, or its name on the Hub")'
    else:
        load = f'{kind.loaded} = dpc.load_{kind.variable}("{file_name}")'
    is_of_classes = kind.name == "Network" and "class_names" in description
    use = "classes = network.predict(images)" if is_of_classes else f"y = {kind.variable}(x)"
    return f"import dense_prediction_cell as dpc\n{load}\n{use}  # {kind.reads}"
