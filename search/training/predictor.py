"""A trained network's file as a function from pictures to predictions, for `search.predict` and `search.evaluate`.

From Python:

    from search.training.predictor import Predictor
    predictor = Predictor.load("best.safetensors")
    mask = predictor.predict("street.jpg")  # (H, W) class numbers, whose names are predictor.task.outputs
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fast.checkpoint import load_network
from fast.segmentation import SegmentationNetwork
from search.commands import spelled
from search.datasets import evaluation_size
from search.datasets.pictures import PictureReader, as_shown
from search.datasets.srgb import RefusedError
from search.dense_tasks import DenseTask, Label, restored_task
from search.devices import resolve_device
from search.errors import InputError
from search.settings import PredictionSettings, check_on_grid
from search.training.memory import PredictionMemory
from search.training.scoring import check_tiles, fits, input_size, predict_picture
from search.training.tiles import Tiles

Picture = str | Path | Image.Image | NDArray[Any]

_DEFAULTS = PredictionSettings()
_DTYPES = (np.uint8, np.uint16, np.bool_)  # of arrays, whose range is known


@dataclass(frozen=True)
class Predictor:
    """A network that predicts whole pictures by its settings.

    `dataset` is what it was trained on, as commands take it, None if its file does not say; `pad_to` is the size that pictures
    are padded to where the settings do not say, None for their own; `validated_in` are the tiles where they do not say, None
    for whole pictures.
    """

    network: SegmentationNetwork
    task: DenseTask
    settings: PredictionSettings = _DEFAULTS
    dataset: str | None = None
    pad_to: tuple[int, int] | None = None
    validated_in: Tiles | None = None

    def __post_init__(self) -> None:
        self.settings.check()

    @classmethod
    def load(
        cls,
        path: str | Path,
        settings: PredictionSettings = _DEFAULTS,
        *,
        device: str = "auto",
        dataset: str | None = None,
    ) -> "Predictor":
        """Load a network's file. `dataset` is for files that do not say theirs. Raises InputError."""
        settings.check()
        place = resolve_device(device)
        try:
            network, description = load_network(Path(path), output_stride=settings.output_stride)
            task = restored_task(description)
        except ValueError as error:
            stride = "leave out `output_stride`, or give another network: " if settings.output_stride is not None else ""
            raise InputError(
                f"{error}; {stride}`network` takes what {spelled('train')} and, of a search's head, {spelled('join')} write"
            ) from error
        except KeyError as error:
            raise InputError(f"network {path} does not say what its outputs are: train or convert it again") from error
        dataset = _trained_on(description) or dataset
        evaluation = _evaluation(description)
        grid = network.backbone.grid
        size, tile = evaluation.get("pad_to", evaluation_size(dataset, grid)), evaluation.get("tile_size")
        tiles = Tiles((tile[0], tile[1]), float(evaluation["tile_overlap"])) if tile else None
        predictor = cls(network.to(place), task, settings, dataset, (size[0], size[1]) if size else None, tiles)
        check_tiles(network, predictor.tiles)
        if isinstance(settings.pad_to, tuple):
            check_on_grid("pad_to", settings.pad_to, grid)
        return predictor

    @property
    def padding(self) -> tuple[int, int] | None:
        """The size that pictures are padded to if they fit into it, None for their own."""
        asked = self.settings.pad_to
        return self.pad_to if asked is None else asked if isinstance(asked, tuple) else None

    @property
    def pictures(self) -> PictureReader:
        """Reads picture files by the settings."""
        return PictureReader(self.settings.max_megapixels, remedy="save it anew, as PNG or JPEG")

    def predict(self, picture: Picture) -> Label:
        """The prediction of a picture: (H, W), class numbers as uint8, or what else labels of the task hold.

        Takes a file, a Pillow picture, or an array (H, W, 3) of RGB, (H, W, 4) with alpha, or (H, W) of grey. A file or a
        Pillow picture is taken as a viewer shows it: upright, in sRGB. Raises InputError for what cannot be read, is
        transparent in places or is too large.
        """
        if isinstance(picture, str | Path):
            image, name = self.pictures.image(Path(picture)), str(picture)
        else:
            image, name = _pixels(picture), "in memory"
        prediction = self.predict_pixels(image, name)
        return prediction.cpu().numpy().astype(self.task.label_dtype)

    @property
    def tiles(self) -> Tiles | None:
        """The tiles that pictures are predicted in, None for whole pictures."""
        size, overlap = self.settings.tile_size, self.settings.tile_overlap
        if size == "whole":
            return None
        tiles = self.validated_in if size is None else Tiles(size)
        return tiles if tiles is None or overlap is None else replace(tiles, overlap=overlap)

    def require(self, picture: tuple[int, int], name: str) -> None:
        """Refuse a picture of this height and width that cannot be predicted, before it is read. Raises InputError.

        On a GPU, where nothing tells what a picture needs, only by `pad_to`.
        """
        with self._room(picture, name):
            pass

    def predict_pixels(self, image: NDArray[np.uint8], name: str) -> Tensor:
        """The prediction of RGB pixels (H, W, 3) -> (H, W), on the device; `name` is the picture's in error messages."""
        device, settings = self.network.backbone.mean.device.type, self.settings
        with (
            self._room((image.shape[0], image.shape[1]), name),
            torch.autocast(device, torch.bfloat16, enabled=settings.precision == "bfloat16"),
        ):
            return predict_picture(
                self.network,
                image,
                self.task,
                scales=settings.scales,
                flip=settings.flip,
                pad_to=self.padding,
                tiles=self.tiles,
            )

    def _room(self, picture: tuple[int, int], name: str) -> AbstractContextManager[None]:
        """Inside, a picture of this size is predicted; InputError before or when it does not fit."""
        pad_to = self.padding
        if self.settings.pad_to is not None and pad_to is not None and not fits(picture, pad_to):
            raise InputError(f"picture {name} is {picture}, larger than `pad_to` {pad_to}: give more, or own")
        return self._memory.of_picture(picture, input_size(self.network, picture, pad_to), name)

    @cached_property
    def _memory(self) -> PredictionMemory:
        return PredictionMemory(self.network, len(self.task.outputs), self.settings.scales, self.tiles)


def _pixels(picture: Image.Image | NDArray[Any]) -> NDArray[np.uint8]:
    """The pixels (H, W, 3) of a picture in memory."""
    try:
        return as_shown(picture if isinstance(picture, Image.Image) else _from_array(picture))
    except RefusedError as error:
        raise InputError(f"the picture {error}") from error


def _from_array(picture: NDArray[Any]) -> Image.Image:
    try:
        if picture.dtype not in _DTYPES:
            raise TypeError
        return Image.fromarray(picture)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        got = f"{getattr(picture, 'shape', '')} {getattr(picture, 'dtype', type(picture).__name__)}".strip()
        raise InputError(f"a picture must be a path, a Pillow picture or an array (H, W, 3) of uint8, got {got}") from error


def _evaluation(description: Mapping[str, Any]) -> Mapping[str, Any]:
    return description.get("evaluation") or {}


def _trained_on(description: Mapping[str, Any]) -> str | None:
    """The data set, which files of earlier versions say among the settings of their training."""
    training = (description.get("source") or {}).get("training") or {}
    name = _evaluation(description).get("dataset") or training.get("data", {}).get("dataset")
    return None if name is None else str(name)
