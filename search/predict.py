"""Predict pictures by a trained network: `python -m search.predict --network best.safetensors --pictures photos --out masks`.

From Python, `search/training/predictor.py` does the same for one picture. The folder holds, for each picture, at its place in
the folder that was given:

    masks/      the prediction as PNG: class numbers with the classes' colours as palette, or depths in 16 bits
    overlays/   a picture to look at: the prediction, over the picture if it is of classes, with its legend
    shares.csv  one line a picture: the share of its pixels of each class, or of each range of depths
    task.json   what the numbers in the masks mean
"""

import csv
import hashlib
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from tqdm import tqdm

from search.cli import Flat, in_flags, print_next, run_command, spelled, this_command, to_export
from search.datasets.walk import SUFFIXES, walk
from search.dense_tasks import DenseTask
from search.errors import InputError
from search.files import write_json, write_text
from search.folder import Folder
from search.reports.predictions import overlay, write_picture, write_prediction
from search.settings import PREDICTION_DEFAULTS, DeviceSettings, PredictionSettings, scored
from search.training.predictor import Predictor

_PROG = spelled("predict")


@dataclass(frozen=True, kw_only=True)
class PredictSettings:
    """Predict pictures by a trained network: masks, overlays, and the share of each class."""

    network: Path
    """The network's file, as training and conversion write it."""
    pictures: tuple[Path, ...]
    """Pictures, and folders that are searched for pictures, with all folders in them."""
    out: Path
    """Folder to write. The same command goes on in it, and predicts anew only pictures that have changed since."""
    prediction: Flat[PredictionSettings] = PredictionSettings()
    device: Flat[DeviceSettings] = DeviceSettings()


def main(settings: PredictSettings) -> None:
    """Predict every picture that is not yet done; exit with code 1 if some cannot be read or are too large."""
    pictures = _pictures(settings.pictures, settings.out)
    predictor = Predictor.load(settings.network, settings.prediction, device=settings.device.device)
    folder = Folder(settings.out, "prediction")
    with folder.locked():
        folder.begin(_identity(settings, predictor), this_command(_PROG), defaults=PREDICTION_DEFAULTS)
        write_json(settings.out / "task.json", {"task": predictor.task.name, **predictor.task.describe()})
        failures = _predict(predictor, pictures, settings.out)
    done = len(pictures) - failures
    counted = f"{done} picture{'' if done == 1 else 's'}"
    print(f"{counted}: masks, overlays and shares.csv in {settings.out}; task.json says what the masks' values mean")
    if failures:
        print(f"{failures} of {len(pictures)} pictures could not be predicted, as said above", file=sys.stderr)
        sys.exit(1)
    print_next(to_export(settings.network, settings.prediction))


def _pictures(given: tuple[Path, ...], out: Path) -> dict[str, Path]:
    """The pictures by their names in the output, sorted. Raises InputError if there are none, or two of one name."""
    if not given:
        raise InputError("`pictures` must name a picture or a folder")
    found: dict[str, Path] = {}
    for place in given:
        if not place.exists():
            raise InputError(f"`pictures` {place} does not exist: give pictures or a folder")
        paths = sorted(_in_folder(place, out)) if place.is_dir() else [place]
        if not paths:
            raise InputError(f"folder {place} holds no picture ({', '.join(sorted(SUFFIXES))}): correct `pictures`")
        for path in paths:
            name = (path.relative_to(place) if place.is_dir() else Path(path.name)).with_suffix("").as_posix()
            if (other := found.setdefault(name, path)) != path:
                raise InputError(
                    f"{other} and {path} would both become {name}.png: give them as `pictures` one after the other, each "
                    "with an `out` of its own"
                )
    return dict(sorted(found.items()))


def _in_folder(folder: Path, out: Path) -> Iterator[Path]:
    for path in walk(folder).files:
        is_output = path.resolve().is_relative_to(out.resolve())  # of an earlier call
        if path.suffix.lower() in SUFFIXES and not is_output:
            yield path


def _identity(settings: PredictSettings, predictor: Predictor) -> dict[str, Any]:
    with settings.network.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    return {"`network` (content)": content, **scored(settings.prediction), "pad_to": predictor.padding or "own"}


def _predict(predictor: Predictor, pictures: dict[str, Path], out: Path) -> int:
    """Predict what is not yet done, and return for how many pictures that was impossible, each with a line that says why."""
    shares, failures = _Shares(out / "shares.csv", predictor.task), 0
    bar = tqdm(pictures.items(), desc=predictor.network.backbone.name, unit="picture")
    for name, path in bar:
        mask, page = out / "masks" / f"{name}.png", out / "overlays" / f"{name}.png"
        if name in shares.rows and _is_newer(mask, path) and _is_newer(page, path):
            continue
        try:
            image = predictor.pictures.image(path)
            prediction = predictor.predict_pixels(image, str(path))
        except InputError as error:
            bar.write(in_flags(str(error), PredictSettings), file=sys.stderr)
            shares.rows.pop(name, None)
            failures += 1
            continue
        array = prediction.cpu().numpy().astype(predictor.task.label_dtype)
        write_prediction(mask, array, predictor.task)
        write_picture(page, overlay(image, {PurePath(name).name: array}, predictor.task))
        shares.add(name, predictor.task.histogram(array)[:-1] / array.size)
    shares.finish(pictures)
    return failures


def _is_newer(made: Path, origin: Path) -> bool:
    """Whether it was made after the picture came to be what it is, also where that has an older time, as copies may."""
    times = origin.stat()
    return made.is_file() and made.stat().st_mtime_ns >= max(times.st_mtime_ns, times.st_ctime_ns)


class _Shares:
    """The table `shares.csv`: a line is added with each picture, so that what is done is known after an interruption."""

    def __init__(self, path: Path, task: DenseTask) -> None:
        self.path, self.heading = path, ["picture", *task.bins]
        self.rows: dict[str, list[str]] = {}
        if path.is_file():
            complete = path.read_text(encoding="utf-8").rpartition("\n")[0]  # an interruption may have cut off the last line
            self.rows = {row[0]: row[1:] for row in list(csv.reader(io.StringIO(complete)))[1:]}
        self._write(self.rows)

    def add(self, name: str, shares: Any) -> None:
        self.rows[name] = [f"{share:.6f}" for share in shares]
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([name, *self.rows[name]])

    def finish(self, names: dict[str, Path]) -> None:
        """Sort the lines, one for each picture, and leave out those of pictures that are no longer given."""
        self._write({name: self.rows[name] for name in names if name in self.rows})

    def _write(self, rows: dict[str, list[str]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.heading, *([name, *row] for name, row in rows.items())])
        write_text(self.path, text.getvalue())


if __name__ == "__main__":
    run_command(PredictSettings, main, prog=_PROG, goes_on=True)
