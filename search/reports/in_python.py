"""The lines of Python that put a search's best head behind its backbone, ready to be pasted where the search was started."""

from dataclasses import fields
from pathlib import Path

from search.backbones import completed_backbone
from search.commands import PACKAGE
from search.runs.study import Run


def in_python(run: Run) -> str:
    """Six lines for a run that a command has made: its backbone, its best head, and the outputs for a picture of zeros."""
    data, (height, width) = run.settings.data, run.identity["image_size"]
    backbone = completed_backbone(run.settings.backbone)
    chosen = {field.name: getattr(backbone, field.name) for field in fields(backbone)}
    arguments = [f"{f.name}={_code(chosen[f.name])}" for f in fields(backbone) if chosen[f.name] != f.default]
    settings = f"BackboneSettings({', '.join(arguments)})"
    return f"""from pathlib import Path
import torch
from {PACKAGE} import BackboneSettings, create_backbone, load_found
backbone = create_backbone({settings}, {data.dataset!r}, {_code(run.settings.machine.cache_dir)})
network = load_found({str(run.directory)!r}).network(backbone)  # refuses other weights than the head was trained on
outputs = network(torch.zeros(1, 3, {height}, {width}))  # RGB, 0 to 255 -> (1, {len(run.task.outputs)}, h, w)"""


def _code(value: object) -> str:
    return f"Path({str(value)!r})" if isinstance(value, Path) else repr(value)
