"""Picture files as they are to be looked at."""

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from search.errors import InputError

# What Pillow raises for damaged files and for absurd sizes.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read a picture: (H, W, 3) uint8 RGB. Raises InputError naming the file."""
    return np.array(open_picture(path).convert("RGB"), np.uint8)


def open_picture(path: Path) -> Image.Image:
    """Open and decode a picture, turned as viewers show it. Raises InputError naming the file."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return _upright(picture)
    except UNREADABLE as error:
        raise InputError(
            f"picture {path} is truncated or unreadable ({error}); restore it from the original data set"
        ) from error


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width in pixels as `read_image` gives them. Raises InputError naming the file."""
    return open_picture(path).size[::-1]


def _upright(picture: Image.Image) -> Image.Image:
    """The picture as its orientation tag (EXIF) says; cameras write pixels as the sensor lay."""
    try:
        return ImageOps.exif_transpose(picture)
    except (SyntaxError, ValueError, KeyError, TypeError, struct.error):  # a damaged tag: the pixels are good
        return picture
