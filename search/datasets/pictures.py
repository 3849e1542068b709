"""Picture files, opened in one way: which kinds are read, how large they may be, which way is up, and what is refused.

Images come out as a viewer shows them (`srgb.py`), labels with the numbers or colours that their files store. The table of
what is read and what is refused is in docs/datasets.md.
"""

import math
import os
import re
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from search.datasets.srgb import RefusedError, in_srgb, is_white_zero, raw_mode
from search.errors import InputError
from search.settings import MAX_MEGAPIXELS

RESTORE = "restore it from the original data set"  # what can be done about a damaged file of a public data set

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000", "AVIF")  # JPEG is also what phones write, MPO
_LOSSLESS = ("PNG", "BMP", "GIF", "PPM", None)  # always; the last is no file. TIFF and WebP may be
_LOSSLESS_TIFF = {"raw", "tiff_raw_16", "tiff_ccitt", "group3", "group4", "tiff_lzw", "packbits"}
_LOSSLESS_TIFF |= {"tiff_adobe_deflate", "tiff_deflate", "lzma", "zstd"}
_CHANGED = {  # how files store numbers of which Pillow gives others: in its words, and in ours
    r"L;[24]": "with 2 or 4 bits of grey",
    r"I;12": "with 12 bits",
    r"1;I": "with 1 as black",
    r"(RGB|LA|CMYK)\w*;16": "with 16 bits a channel",
    r"BGR;1[56]": "with 5 bits a colour",
}

_ORIENTATION, _SUBFILE, _WIDTH, _HEIGHT = 274, 254, 256, 257  # tags of TIFF and EXIF
_REDUCED = 1  # bit of the second: a smaller copy of the page before, as aerial pictures have
_TURNS = {  # what undoes an orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class PictureReader:
    """Reads picture files of at most so many megapixels (10⁶); `remedy` says what can be done about a damaged one."""

    max_megapixels: float = MAX_MEGAPIXELS
    remedy: str = RESTORE

    def image(self, path: Path) -> NDArray[np.uint8]:
        """Read an image as a viewer shows it: (H, W, 3) uint8 sRGB, upright. Raises InputError naming the file."""
        with self._opened(path) as picture:
            return as_shown(picture)

    def label(self, path: Path) -> Image.Image:
        """Read a picture whose pixels are exactly those that its file stores. Raises InputError naming the file."""
        with self._opened(path, "label") as picture:
            return as_stored(picture)

    @contextmanager
    def _opened(self, path: Path, kind: str = "picture") -> Iterator[Image.Image]:
        """Open a file that is not too large; what goes wrong with it inside becomes an InputError."""
        try:
            with _open(path) as picture:
                self._require_small(picture)
                yield picture
        except RefusedError as error:
            raise InputError(f"{kind} {path} {error}") from error
        except FileNotFoundError as error:
            raise InputError(f"{kind} {path} does not exist: correct the path") from error
        except MemoryError as error:  # of a sound file too; a damaged one may claim any size
            raise InputError(f"{kind} {path} needs more memory than there is: cut it into parts") from error
        except Exception as error:  # damaged files make Pillow raise whatever it stumbles over
            raise _unreadable(path, error, self.remedy) from error

    def _require_small(self, picture: Image.Image) -> None:
        megapixels = picture.width * picture.height / 1e6
        if not megapixels <= self.max_megapixels:
            raise RefusedError(
                f"has {picture.height} × {picture.width} pixels, {megapixels:.1f} megapixels, and `max_megapixels` is "
                f"{self.max_megapixels:g}: give `max_megapixels` {math.ceil(megapixels)}, or cut it into parts"
            )


def as_shown(picture: Image.Image) -> NDArray[np.uint8]:
    """The pixels of a Pillow picture as a viewer shows them: (H, W, 3) uint8 sRGB, upright. Raises RefusedError."""
    _require_one_page(picture)
    pixels = in_srgb(picture)
    orientation = _orientation(picture)  # of a TIFF file 1 by now, because Pillow turns it when it decodes it
    return pixels if orientation == 1 else np.array(Image.fromarray(pixels).transpose(_TURNS[orientation]))


def as_stored(picture: Image.Image) -> Image.Image:
    """The same picture, decoded, if its pixels are exactly what its file stores. Raises RefusedError.

    Refuses what compression or reading may have changed: lossy formats, several pages, and numbers that Pillow scales.
    """
    _require_one_page(picture)
    if not _is_lossless(picture):
        raise RefusedError(f"is {picture.format}, whose compression may change class numbers: save labels as PNG")
    if form := _changed_form(picture):
        raise RefusedError(f"stores its pixels {form}, which programs read as different numbers: save it as PNG with 8 bits")
    before = _orientation(picture) if picture.format == "TIFF" else 1  # which Pillow forgets as it decodes
    picture.load()
    if (orientation := before if before != 1 else _orientation(picture)) != 1:
        raise RefusedError(
            f"has the orientation tag {orientation} (EXIF), and labels must be stored as they are shown: save it upright, "
            "as PNG without that tag"
        )
    return picture


def picture_size(path: Path, remedy: str = RESTORE) -> tuple[int, int]:
    """Height and width in pixels of an image when it is read; no pixel is decoded. Raises InputError naming the file."""
    try:
        with _open(path) as picture:
            tags = getattr(picture, "tag_v2", {})  # Pillow's own size of a TIFF is turned or not, by its version
            height, width = tags.get(_HEIGHT, picture.height), tags.get(_WIDTH, picture.width)
            if picture.format == "PNG" and (exif := _exif_of_png(path)):
                picture.info["exif"] = exif
            return (width, height) if _orientation(picture) > 4 else (height, width)
    except FileNotFoundError as error:
        raise InputError(f"picture {path} does not exist: correct the path") from error
    except Exception as error:
        raise _unreadable(path, error, remedy) from error


def mode_and_palette(path: Path) -> tuple[str, NDArray[np.uint8]]:
    """Pillow's name for a file's kind of pixels, and the colours (K, 3) of a palette's numbers 0 to K − 1, or (0, 3) without.

    No pixel is decoded; of a damaged file the name is empty.
    """
    try:
        with _open(path) as picture:
            pixel = Image.new(picture.mode, (1, 1))
            pixel.palette = picture.palette  # the file's own getpalette would decode all pixels first
            return picture.mode, np.array(pixel.getpalette() or [], np.uint8).reshape(-1, 3)
    except Exception:  # said when the file is read
        return "", np.empty((0, 3), np.uint8)


class _SetAside:
    """A context in which Pillow's own limit and warnings are set aside: the limit here is another, and damage is an error.

    They belong to the process, so they come back when the last thread leaves.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._restored = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._restored.enter_context(warnings.catch_warnings(action="ignore"))
                self._restored.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
                Image.MAX_IMAGE_PIXELS = None
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._restored.close()

    def outlive_forks(self) -> None:
        """See to it that a loading process begins without the threads that are inside here, and without their lock."""
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._lock.acquire, after_in_parent=self._lock.release, after_in_child=self._begin_alone
            )

    def _begin_alone(self) -> None:
        self._inside = 0
        self._restored.close()
        self._lock.release()


_set_aside = _SetAside()
_set_aside.outlive_forks()


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    with _set_aside:
        Image.init()
        with Image.open(path, formats=[name for name in _FORMATS if name in Image.OPEN]) as picture:
            yield picture


def _unreadable(path: Path, error: Exception, remedy: str) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        reason = f"it is none of {', '.join(_FORMATS)}"
    return InputError(f"picture {path} is truncated or unreadable ({reason}); {remedy}")


def _require_one_page(picture: Image.Image) -> None:
    """Refuse films and documents; a phone's MPO has the picture first, and smaller copies of a page do not count."""
    is_open = getattr(picture, "fp", None) is not None  # else only what was decoded is there
    pages = getattr(picture, "n_frames", 1) if is_open and picture.format != "MPO" else 1
    if pages > 1 and picture.format == "TIFF":
        pages = 1 + sum(not _is_reduced(picture, page) for page in range(1, pages))
        picture.seek(0)
    if pages > 1:
        raise RefusedError(f"has {pages} pages or frames: save the one that is meant as a picture of its own")


def _is_reduced(picture: Image.Image, page: int) -> bool:
    picture.seek(page)
    return bool(getattr(picture, "tag_v2", {}).get(_SUBFILE, 0) & _REDUCED)


def _orientation(picture: Image.Image) -> int:
    """1 to 8 as EXIF has it so far (a PNG file's may come after the pixels); 1 for a damaged tag, as the pixels are good."""
    try:
        value = Image.Image.getexif(picture).get(_ORIENTATION)  # PNG's own version would decode the pixels
    except (OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError, struct.error):
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def _exif_of_png(path: Path) -> bytes:
    """A PNG file's EXIF, which may come after the pixels, found without decoding them."""
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                return file.read(length)
            file.seek(length + 4, os.SEEK_CUR)
    return b""


def _changed_form(picture: Image.Image) -> str | None:
    """How the file stores its numbers, if Pillow gives others."""
    decoder, _, _, arguments = next(iter(getattr(picture, "tile", [])), ("", None, 0, None))
    if decoder in ("ppm", "ppm_plain") and isinstance(arguments, tuple) and arguments[1] not in (255, 65535):
        return f"with maximum {arguments[1]}"  # to which Pillow scales them
    if is_white_zero(picture):
        return "with 0 as white"
    return next((form for pattern, form in _CHANGED.items() if re.match(pattern, raw_mode(picture))), None)


def _is_lossless(picture: Image.Image) -> bool:
    if picture.format == "TIFF":
        return picture.info.get("compression") in _LOSSLESS_TIFF
    if picture.format == "WEBP":
        path = getattr(picture, "filename", "")  # of bytes in memory there is none
        return bool(path) and _is_lossless_webp(Path(path))
    return picture.format in _LOSSLESS


def _is_lossless_webp(path: Path) -> bool:
    """Whether the pixels are in a chunk VP8L, not in "VP8 "; chunks of metadata may come before it."""
    with path.open("rb") as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:
            kind, length = struct.unpack("<4sI", head)
            if kind in (b"VP8L", b"VP8 "):
                return bool(kind == b"VP8L")
            file.seek(length + length % 2, os.SEEK_CUR)
    return False
