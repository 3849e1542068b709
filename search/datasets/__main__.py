"""`python -m search.datasets check <name> --data-dir <folder>`: verify a data set's folder before a long run (`check.py`).

Exit code 0 without problems, also with warnings, 1 with problems, 2 for flags that cannot work.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from search.backbones import grid_of
from search.cli import Flat, arguments_of, in_flags, print_next, run_command, spelled, to_type
from search.datasets import open_splits
from search.datasets.check import check_folder, listed
from search.datasets.counts import size_for_all, size_of
from search.errors import InputError
from search.settings import SHAPES, BackboneSettings, DataSettings, FileSettings, TaskName, require


@dataclass(frozen=True, kw_only=True)
class CheckSettings:
    """Verify a data set's folder: list all that is wrong with it, and print the share of each class."""

    command: Annotated[Literal["check"], tyro.conf.Positional]
    """What to do."""
    dataset: Annotated[str, tyro.conf.Positional]
    """shapes, camvid, cityscapes, pascal_voc, pascal_person_part, or the TOML file that describes your folder."""
    data_dir: Path | None = None
    """Folder of the data set. Default for a TOML file: the folder that the file is in."""
    task: TaskName | None = None
    """Which labels, of a data set that has them for several tasks: segmentation or depth. Default: its first."""
    splits: tuple[str, ...] = ()
    """Splits that must exist. Default: train and val; other splits are checked if they exist."""
    processes: int = 1
    """Processes that read pictures."""
    files: Flat[FileSettings] = FileSettings()


def main(settings: CheckSettings) -> None:
    """Read everything, print the tables, the warnings and the problems, and exit with code 1 if there are problems."""
    require("processes", settings.processes, settings.processes >= 1, "at least 1")
    settings.files.check()
    most = settings.files.max_megapixels
    text, problems = check_folder(
        settings.dataset, settings.data_dir, settings.splits, settings.processes, settings.task, most
    )
    parts = filter(None, [text, *(listed("problem", problems) or ["no problems"])])
    print(in_flags("\n\n".join(parts), CheckSettings))
    if problems:
        sys.exit(1)
    data = DataSettings(dataset=settings.dataset, data_dir=settings.data_dir, task=settings.task, max_megapixels=most)
    weights = ["--pretrained"] if settings.dataset != SHAPES else []
    print_next(to_type("random", *arguments_of(data), *weights, *_image_size(data)))


def _image_size(data: DataSettings) -> list[object]:
    """The flag that a search needs where the first pictures are not the largest ones."""
    try:
        splits = open_splits(data)
    except InputError:  # it has other splits, which were asked for
        return []
    grid = grid_of(BackboneSettings(), data.dataset)
    size = size_for_all(splits, grid)
    is_needed = any(size_for_all([split], grid) != grid.rounded_up(size_of(split, 0)) for split in splits)
    return ["--image-size", *size] if is_needed else []


if __name__ == "__main__":
    run_command(CheckSettings, main, prog=spelled("datasets"))
