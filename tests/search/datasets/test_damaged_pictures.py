"""Damaged files of every format are read or refused by one sentence, as images and as labels: nothing else is raised."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, features

from search.datasets.labels import ColourReader, LabelReader
from search.datasets.pictures import PictureReader, mode_and_palette, picture_size
from search.errors import InputError
from tests.search.made_pictures import SRGB, exif, profile_of_colours

PIXELS = np.random.default_rng(0).integers(0, 256, (13, 17, 3), np.uint8)
COLOURED, GREY = Image.fromarray(PIXELS), Image.fromarray(PIXELS[..., 0])
TAGGED: dict[str, Any] = {"exif": exif(6), "icc_profile": profile_of_colours(2.2, SRGB)}
FILES: dict[str, tuple[str, Image.Image, dict[str, Any]]] = {
    "PNG": ("png", COLOURED, TAGGED),
    "palette PNG": ("png", COLOURED.quantize(40), {"bits": 8, "transparency": 3}),
    "PNG of 16 bits": ("png", Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 200), {}),
    "PNG of 1 bit": ("png", GREY.convert("1"), {}),
    "JPEG": ("jpg", COLOURED, TAGGED),
    "JPEG in four inks": ("jpg", COLOURED.convert("CMYK"), {}),
    "MPO": ("mpo", COLOURED, {"save_all": True, "append_images": [COLOURED]}),
    "TIFF": ("tif", COLOURED, TAGGED),
    "TIFF with LZW": ("tif", GREY, {"compression": "tiff_lzw"}),
    "TIFF of pages": ("tif", GREY, {"save_all": True, "append_images": [GREY]}),
    "BMP": ("bmp", COLOURED, {}),
    "palette BMP": ("bmp", COLOURED.quantize(40), {}),
    "GIF": ("gif", COLOURED.quantize(40), {}),
    "GIF of frames": ("gif", COLOURED, {"save_all": True, "append_images": [COLOURED.rotate(90)]}),
    "WebP": ("webp", COLOURED, {"lossless": True, **TAGGED}),
    "lossy WebP": ("webp", COLOURED, {}),
    "PPM": ("ppm", COLOURED, {}),
    "PGM": ("pgm", GREY, {}),
    "JPEG 2000": ("jp2", COLOURED, {}),
}
if features.check("avif"):
    FILES["AVIF"] = ("avif", COLOURED, TAGGED)

# A header may claim any size; one that is allowed would take a second of a test for each file.
SMALL = PictureReader(max_megapixels=0.1)
READERS: dict[Callable[[Path], NDArray[Any] | None], int] = {  # with the dimensions of what they give
    SMALL.image: 3,
    lambda path: LabelReader({value: value for value in range(256)}, remedy="restore it")(path, SMALL): 2,
    lambda path: ColourReader({(0, 0, 0): 0}, "restore it", ignores_others=True)(path, SMALL): 2,
    lambda path: np.array(picture_size(path)): 1,
    lambda path: mode_and_palette(path)[1]: 2,
}


def damaged(whole: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    """The file cut off, with flipped bits, and with other bytes in a stretch; most of it near the head."""
    for share in (0.0, 0.02, 0.3, 0.8, 0.99):
        yield whole[: int(share * len(whole))]
    for reach in (40, 200, len(whole)):
        for flips in (1, 3, 10):
            content = bytearray(whole)
            for place in rng.integers(0, min(reach, len(whole)), flips).tolist():
                content[place] ^= 1 << int(rng.integers(8))
            yield bytes(content)
        start = int(rng.integers(0, min(reach, len(whole))))
        yield whole[:start] + rng.bytes(12) + whole[start + 12 :]


def attempt(read: Callable[[Path], NDArray[Any] | None], path: Path) -> tuple[NDArray[Any] | None, str]:
    try:
        return read(path), ""
    except InputError as error:
        return None, str(error)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_read_or_refused(tmp_path: Path, name: str) -> None:
    suffix, picture, options = FILES[name]
    path = tmp_path / f"whole.{suffix}"
    picture.save(path, **options)
    whole, path = path.read_bytes(), tmp_path / f"a.{suffix}"
    refused = 0
    for content in damaged(whole, np.random.default_rng(1)):
        path.write_bytes(content)
        for read in READERS:
            pixels, message = attempt(read, path)
            refused += bool(message)
            assert not message or (str(path) in message and "\n" not in message)
            assert pixels is None or pixels.ndim == READERS[read]
    assert refused > 20
