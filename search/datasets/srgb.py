"""Pixels of any kind as a viewer shows them: 8-bit sRGB, opaque, by the picture's colour profile.

Where viewers differ, or would show something else than the numbers say, the picture is refused.
"""

import io
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

# What a kind of pixels is turned into before its profile applies; transparency, if any, is known to be opaque by then.
_PLAIN = {
    "1": "L",
    "L": "L",
    "LA": "L",
    "P": "RGB",
    "PA": "RGB",
    "RGB": "RGB",
    "RGBX": "RGB",
    "RGBA": "RGB",
    "YCbCr": "RGB",
    "HSV": "RGB",
    "LAB": "RGB",
    "CMYK": "CMYK",
}
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
_OF_PROFILE = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # what a profile calls its colours
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # a tag of TIFF, and a value of it
_ROUNDING = 2  # levels by which two implementations of sRGB may differ
_TRANSPARENT = "is transparent in places, and viewers lay it over different backgrounds: save it without transparency"


class RefusedError(ValueError):
    """A picture that cannot be taken as it is; the message continues "the picture ..." and ends with the remedy."""


def in_srgb(picture: Image.Image) -> NDArray[np.uint8]:
    """The pixels of a picture as they are shown: (H, W, 3) uint8 sRGB. Raises RefusedError.

    16 bits of grey are rounded to 8, of 16 bits a colour Pillow gives the upper 8. A picture that is transparent somewhere is
    refused, and so are 32 bits and floating-point numbers, whose range is unknown. A damaged profile is ignored.
    """
    profile = picture.info.get("icc_profile")
    if picture.mode.startswith("I"):
        plain = Image.fromarray(_eight_bits(picture))
    else:
        picture = _opaque(picture)
        if picture.mode not in _PLAIN:
            numbers = "has floating-point pixels, which have no known range" * (picture.mode == "F")
            raise RefusedError(f"{numbers or f'has pixels of mode {picture.mode}'}: save it with 8 or 16 bits")
        plain = _converted(picture, _PLAIN[picture.mode])
    transform = _transform(profile, plain.mode) if isinstance(profile, bytes) else None
    shown = _converted(plain, "RGB") if transform is None else ImageCms.applyTransform(plain, transform)
    assert shown is not None  # which only a change in place gives
    return np.array(shown, np.uint8)


def raw_mode(picture: Image.Image) -> str:
    """How the file stores the pixels, in Pillow's words, such as L;4 or RGB;16B; the mode, once they are decoded."""
    tile = getattr(picture, "tile", None)
    arguments = tile[0][3] if tile else None
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else picture.mode


def is_white_zero(picture: Image.Image) -> bool:
    """Whether a TIFF file stores white as 0."""
    return bool(getattr(picture, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO)


def _converted(picture: Image.Image, mode: str) -> Image.Image:
    return picture if picture.mode == mode else picture.convert(mode)  # which copies where there is nothing to convert


def _eight_bits(picture: Image.Image) -> NDArray[np.uint8]:
    """Grey of 16 bits in 8, rounded."""
    if "transparency" in picture.info:
        raise RefusedError(_TRANSPARENT)
    stored = raw_mode(picture)
    if stored == "I;12":
        raise RefusedError("has 12 bits a pixel, which viewers show in different ways: save it with 8 or 16 bits")
    if picture.mode == "I" and picture.format not in ("PNG", "PPM"):  # of which Pillow has 16 bits in this mode too
        raise RefusedError("has pixels of 32 bits or with a sign, which have no known range: save it with 8 or 16 bits")
    values = np.array(picture).astype(np.int32)
    if is_white_zero(picture):  # Pillow inverts 8 bits, not 16
        values = 65535 - values
    return ((values + 128) // 257).astype(np.uint8)


def _opaque(picture: Image.Image) -> Image.Image:
    """The same pixels, whose transparency no longer counts, because there is none. Raises RefusedError if there is."""
    if not picture.has_transparency_data:
        return picture
    if "transparency" in picture.info and picture.mode != "P" and raw_mode(picture) not in ("L", "RGB"):
        raise RefusedError(_TRANSPARENT)  # Pillow compares the transparent colour in other bits than the pixels'
    with_alpha = picture if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") else picture.convert("RGBA")
    least, _ = with_alpha.getchannel(len(with_alpha.getbands()) - 1).getextrema()
    if isinstance(least, int | float) and least < 255:
        raise RefusedError(_TRANSPARENT)
    return _converted(with_alpha, _PREMULTIPLIED.get(with_alpha.mode, with_alpha.mode))


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From the profile's colours to sRGB; None if they are sRGB's, or if the profile is damaged or of other pixels."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _OF_PROFILE[mode]:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        return None if mode != "CMYK" and _changes_nothing(transform, mode) else transform
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError, ImportError):  # viewers ignore it too
        return None


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether colours stay as they are, but for rounding: most profiles are sRGB's, and are to leave the pixels alone."""
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    if mode == "RGB":
        grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(len(levels), -1, 3)
    else:
        grid = levels[None]
    sample = Image.fromarray(grid)
    shown = ImageCms.applyTransform(sample, transform)
    assert shown is not None
    return bool(np.abs(np.array(shown, np.int16) - np.array(sample.convert("RGB"), np.int16)).max() <= _ROUNDING)
