"""A trained head as one file: weights beside the architecture they belong to, so that loading needs the file alone.

The format is safetensors; its metadata hold a JSON description. Nothing in it is ever executed.
"""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fast.dense_prediction_cell import DensePredictionCell
from fast.segmentation import SegmentationHead
from reference.cell import Cell

FORMAT = "dense-prediction-cell head 1"


def save_head(path: Path, head: SegmentationHead, *, class_names: tuple[str, ...], backbone: dict[str, Any]) -> None:
    """Write atomically; `backbone` says which features the head was trained on (name, weights hash, and so on)."""
    context = head.context
    description = {
        "cell": json.loads(context.cell.to_json()),
        "in_channels": context.in_channels,
        "branch_channels": context.branch_channels,
        "cell_channels": context.cell_channels,
        "output_stride": context.output_stride,
        "dropout_rate": context.dropout.p,
        "pooling": context.pooling,
        "pooling_size": context.pooling_size,
        "class_names": class_names,
        "backbone": backbone,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    state = {key: value.detach().cpu().contiguous() for key, value in head.state_dict().items()}
    try:
        save_file(state, partial, metadata={"format": FORMAT, "description": json.dumps(description)})
    except SafetensorError as error:
        raise OSError(f"cannot write {partial}: {error}") from error
    os.replace(partial, path)


def load_head(path: Path) -> tuple[SegmentationHead, dict[str, Any]]:
    """The head in evaluation mode, and its description. Raises ValueError naming the file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict, has no iterator
    except (SafetensorError, OSError) as error:
        raise ValueError(f"head {path} cannot be read as safetensors: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"head {path} is not in the format {FORMAT!r}, got {metadata.get('format')!r}")
    description = json.loads(metadata["description"])
    pooling_size = description["pooling_size"]
    context = DensePredictionCell(
        Cell.from_json(json.dumps(description["cell"])),
        description["in_channels"],
        branch_channels=description["branch_channels"],
        cell_channels=description["cell_channels"],
        output_stride=description["output_stride"],
        dropout_rate=description["dropout_rate"],
        pooling=description["pooling"],
        pooling_size=tuple(pooling_size) if pooling_size else None,
    )
    head = SegmentationHead(context, len(description["class_names"]))
    try:
        head.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"head {path} does not hold the weights that its description names: {error}") from error
    return head.eval(), description
