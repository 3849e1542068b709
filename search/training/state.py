"""A training on disk: the files of its folder.

    settings.json       what the training depends on; another command in the same folder is refused
    state.pt            weights, optimiser and averages after some iteration; from here the training continues
    last.safetensors    the network at the latest validation, and
    best.safetensors    at the best one, both complete networks (`fast.checkpoint.load_network`)
    curve.csv           loss and learning rate of every iteration, score of every validation
    tensorboard/        the same as event files, where `tensorboard` is installed

Every file is written to a temporary file and renamed, so after any interruption the old or the new one is there. Only the
curve is appended to; lines beyond the state, or cut in the middle, are removed when the training continues.
"""

import csv
import os
from pathlib import Path
from typing import Any

import torch

from search.errors import InputError

_COLUMNS = ("iteration", "loss", "learning_rate")  # and the score, by its own name


def save_state(directory: Path, state: dict[str, Any]) -> None:
    """Write `state.pt`, whole or not at all."""
    partial = directory / "state.pt.partial"
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:  # torch's message for a full disk
        raise OSError(f"cannot write {partial}: {error}") from error
    partial.replace(directory / "state.pt")


def load_state(directory: Path, device: torch.device) -> dict[str, Any] | None:
    """Read what `save_state` wrote, or None. Raises InputError naming a damaged file."""
    path = directory / "state.pt"
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file can fail to load in any way
        raise InputError(f"{path} is damaged: delete the folder {directory} and train again") from error
    return state


class Curve:
    """Writes `curve.csv`, and event files for TensorBoard if it is installed, from `iteration` (validated: `validated`) on.

    `score_key` is the name of the score in both.
    """

    def __init__(self, directory: Path, score_key: str, iteration: int, validated: int) -> None:
        self._score_key = score_key
        self._path = directory / "curve.csv"
        rows = [row for row in read_curve(directory) if row[0] <= (iteration if row[3] is None else validated)]
        partial = self._path.with_name("curve.csv.partial")
        with partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*_COLUMNS, score_key])
            writer.writerows(["" if value is None else value for value in row] for row in rows)
        partial.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8", newline="")
        self._events = _event_writer(directory / "tensorboard", iteration)

    def add(self, iteration: int, *, loss: float | None = None, rate: float | None = None, score: float | None = None) -> None:
        """Write one line: the numbers of the training after `iteration` steps."""
        fields = [iteration, *("" if value is None else repr(value) for value in (loss, rate, score))]
        self._file.write(",".join(map(str, fields)) + "\n")
        if self._events is not None:
            for name, value in (("loss", loss), ("learning_rate", rate), (self._score_key, score)):
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
    """Read the rows (iteration, loss, learning rate, score) of `curve.csv`, if it exists, without a half-written last line."""
    try:
        text = (directory / "curve.csv").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    lines = text[: text.rfind("\n") + 1].splitlines()[1:]
    rows = []
    for line in lines:
        iteration, *values = line.split(",")
        loss, rate, score = (float(value) if value else None for value in values)
        rows.append((int(iteration), loss, rate, score))
    return rows


def _event_writer(directory: Path, iteration: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # TensorBoard is optional
        return None
    return SummaryWriter(str(directory), purge_step=iteration + 1)
