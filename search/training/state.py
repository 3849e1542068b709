"""A training on disk: one folder that says what is trained, how far it is, and how it went.

    settings.json       what the training depends on; another command in the same folder is refused
    state.pt            weights, optimiser and averages after some iteration: from here it goes on
    last.safetensors    the network at the latest validation, and
    best.safetensors    at the best one, each whole in itself (`fast.checkpoint.load_network`)
    curve.csv           loss and learning rate of every iteration, mIOU of every validation
    tensorboard/        the same as event files, where `tensorboard` is installed

Every file is written aside and renamed, so whatever ends the process leaves the old or the new one. The curve alone is
appended to; what it holds beyond the state, an interrupted line included, is cut off when the training goes on.
"""

import csv
import os
from pathlib import Path
from typing import Any

import torch

from search.errors import InputError

_COLUMNS = ("iteration", "loss", "learning_rate", "mean_iou")


def save_state(directory: Path, state: dict[str, Any]) -> None:
    """Write `state.pt`, whole or not at all."""
    partial = directory / "state.pt.partial"
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:  # torch's own words for a full disk
        raise OSError(f"cannot write {partial}: {error}") from error
    partial.replace(directory / "state.pt")


def load_state(directory: Path, device: torch.device) -> dict[str, Any] | None:
    """What `save_state` wrote, None if there is nothing yet. Raises InputError naming a damaged file."""
    path = directory / "state.pt"
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file can fail in any way
        raise InputError(f"{path} is damaged: delete the folder {directory} and train again") from error
    return state


class Curve:
    """`curve.csv`, and TensorBoard's event files where that is installed, from `iteration` on, `validated` the last to be."""

    def __init__(self, directory: Path, iteration: int, validated: int) -> None:
        self._path = directory / "curve.csv"
        rows = [row for row in read_curve(directory) if row[0] <= (iteration if row[3] is None else validated)]
        partial = self._path.with_name("curve.csv.partial")
        with partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(_COLUMNS)
            writer.writerows(["" if value is None else value for value in row] for row in rows)
        partial.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8", newline="")
        self._events = _event_writer(directory / "tensorboard", iteration)

    def add(
        self, iteration: int, *, loss: float | None = None, rate: float | None = None, mean_iou: float | None = None
    ) -> None:
        """One line: what is known of the training after `iteration` steps."""
        fields = [iteration, *("" if value is None else repr(value) for value in (loss, rate, mean_iou))]
        self._file.write(",".join(map(str, fields)) + "\n")
        if self._events is not None:
            for name, value in (("loss", loss), ("learning_rate", rate), ("mean_iou", mean_iou)):
                if value is not None:
                    self._events.add_scalar(name, value, iteration)

    def flush(self) -> None:
        self._file.flush()
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def read_curve(directory: Path) -> list[tuple[int, float | None, float | None, float | None]]:
    """Rows (iteration, loss, learning rate, mIOU) of `curve.csv`; none without it. An interrupted last line is left out."""
    try:
        text = (directory / "curve.csv").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    lines = text[: text.rfind("\n") + 1].splitlines()[1:]
    rows = []
    for line in lines:
        iteration, *values = line.split(",")
        loss, rate, mean_iou = (float(value) if value else None for value in values)
        rows.append((int(iteration), loss, rate, mean_iou))
    return rows


def _event_writer(directory: Path, iteration: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # the optional dependency
        return None
    return SummaryWriter(str(directory), purge_step=iteration + 1)
