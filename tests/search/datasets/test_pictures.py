"""Kinds of pixels × formats × bit depths × orientations: an image is what a viewer shows, a label what its file stores.

Files are made from known arrays; what must come out is computed from these by the standards' formulas, without Pillow.
"""

import colorsys
import multiprocessing
import os
import pickle
import re
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms, features

from search.datasets import open_dataset, open_splits
from search.datasets.check import check_folder
from search.datasets.from_torch import TorchDataset
from search.datasets.labels import ColourReader, DepthReader, LabelReader, label_colours, storage
from search.datasets.pictures import PictureReader, as_shown, picture_size
from search.errors import InputError
from search.settings import DataSettings
from tests.search import dataset_folders
from tests.search.made_pictures import (
    COLOUR,
    GREY,
    ORIENTATION,
    SRGB,
    claim_size,
    encoded,
    exif,
    light_of,
    profile_of_colours,
    profile_of_grey,
    profile_of_inks,
    set_tag,
    shown,
    write_png,
)

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), np.uint8)
SHADES = np.ascontiguousarray(RGB[..., 0])
DEEP = RNG.integers(0, 65536, (5, 7)).astype(np.uint16)
DEEP_RGB = RNG.integers(0, 65536, (5, 7, 3)).astype(np.uint16)
BITS = RNG.integers(0, 2, (5, 7)).astype(bool)
FLAT = np.full((16, 16, 3), (200, 100, 50), np.uint8)
INDEX = RNG.integers(0, 20, (5, 7)).astype(np.uint8)
PALETTE = RNG.integers(0, 256, (20, 3)).astype(np.uint8)
READER = PictureReader()

File = Callable[[Path], None]
Pixels = NDArray[Any]


def saved(pixels: Pixels | Image.Image, mode: str | None = None, **options: Any) -> File:
    """How Pillow writes these pixels; `mode` says what their channels mean where that is not plain."""
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    if mode is not None:
        picture = Image.frombytes(mode, picture.size, picture.tobytes())
    return lambda path: picture.save(path, **{"optimize": False} | options)  # which would renumber the colours of a GIF


def written(content: bytes) -> File:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


def indexed(values: Pixels = INDEX, alpha: Pixels | None = None) -> Image.Image:
    """A palette picture, with a channel of alpha or without."""
    picture = Image.fromarray(values)
    picture.putpalette(PALETTE.tobytes())
    if alpha is not None:
        both = Image.frombytes("PA", picture.size, np.stack([values, alpha], axis=-1).tobytes())
        both.putpalette(PALETTE.tobytes())
        return both
    return picture


def png(rows: Pixels, bits: int, kind: int, **chunks: dict[bytes, bytes]) -> File:
    return lambda path: write_png(path, rows, bits, kind, **chunks)


def tagged(write: File, tag: int, value: int) -> File:
    def write_both(path: Path) -> None:
        write(path)
        set_tag(path, tag, value)

    return write_both


def pages(*pictures: Pixels, **options: Any) -> File:
    first, *others = map(Image.fromarray, pictures)
    return lambda path: first.save(path, save_all=True, append_images=others, **options)


def with_preview(path: Path) -> None:
    """A TIFF with a smaller copy of its page, as geographic programs write it."""
    small = Image.fromarray(255 - RGB[::2, ::2])
    small.encoderinfo = {"tiffinfo": {254: 1}}
    Image.fromarray(RGB).save(path, save_all=True, append_images=[small])


def grey(values: Pixels) -> Pixels:
    return np.repeat(np.rint(values)[..., None], 3, axis=-1)


def of_inks(inks: Pixels) -> Pixels:
    """Cyan, magenta, yellow and black without a profile: each takes its share of the light."""
    share = 1 - inks / 255.0
    return np.asarray(255 * share[..., :3] * share[..., 3:])


def of_jfif(values: Pixels) -> Pixels:
    """Y, Cb and Cr in RGB (ITU-T T.871)."""
    y, cb, cr = np.moveaxis(values.astype(float) - (0, 128, 128), -1, 0)
    colours = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=-1)
    return np.asarray(colours.clip(0, 255))


def of_hsv(values: Pixels) -> Pixels:
    flat = (values.reshape(-1, 3) / 255.0).tolist()
    return np.array([colorsys.hsv_to_rgb(*each) for each in flat]).reshape(values.shape) * 255


def of_lab(values: Pixels) -> Pixels:
    """CIE L*a*b* (D50) with L of 0 to 255 for 0 to 100 and a, b with 128 for 0, which files store as 0, in sRGB."""
    lightness, a, b = np.moveaxis(values.astype(float), -1, 0)
    y = (lightness / 2.55 + 16) / 116
    xyz = np.stack([light_of(116 * part - 16) for part in (y + (a - 128) / 500, y, y - (b - 128) / 200)], axis=-1)
    return encoded((xyz * (0.9642, 1, 0.8249)) @ np.linalg.inv(np.array(SRGB)))


# Modest colours, so that none lies outside sRGB.
LAB = np.stack([RNG.integers(80, 180, (5, 7)), *(RNG.integers(118, 139, (5, 7)) for _ in "ab")], axis=-1).astype(np.uint8)
FLAT_INKS = np.full((16, 16, 4), (10, 80, 160, 40), np.uint8)
INKS = RNG.integers(0, 256, (5, 7, 4), np.uint8)
CORNERS = (255 * np.indices((2, 2, 2, 2)).reshape(4, 16).T).astype(np.uint8)[None]
LIGHTNESS = np.array([255, *RNG.integers(0, 256, 14), 0], np.uint8)  # no ink is white paper, all of them are black
ROTATED = profile_of_colours(2.2, (SRGB[1], SRGB[2], SRGB[0]))  # its red is sRGB's green, and so on
REAL_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
OPAQUE, HOLES = np.full((5, 7), 255, np.uint8), np.where(SHADES > 250, 254, 255).astype(np.uint8)
HOLES[2, 3] = 254

IMAGES: dict[str, tuple[str, File, Pixels, int]] = {  # suffix, file, what is seen, by how many levels it may differ
    **{f"RGB in {suffix}": (suffix, saved(RGB), RGB, 0) for suffix in ("png", "bmp", "tif", "ppm")},
    "RGB in TIFF with LZW": ("tif", saved(RGB, compression="tiff_lzw"), RGB, 0),
    "RGB in TIFF with deflate": ("tif", saved(RGB, compression="tiff_adobe_deflate"), RGB, 0),
    "RGB in lossless WebP": ("webp", saved(RGB, lossless=True), RGB, 0),
    "RGB in lossless JPEG 2000": ("jp2", saved(RGB, irreversible=False), RGB, 0),
    "RGB in JPEG": ("jpg", saved(FLAT, quality=95), FLAT, 2),
    "RGB in lossy WebP": ("webp", saved(FLAT, quality=95), FLAT, 3),
    "RGB in a file of another suffix": ("jpg", saved(RGB, format="PNG"), RGB, 0),
    "RGB of 16 bits in PNG": ("png", png(DEEP_RGB, 16, COLOUR), DEEP_RGB >> 8, 0),
    "RGB with a transparent colour that no pixel has": (
        "png",
        png(RGB, 8, COLOUR, before={b"tRNS": bytes([0, 1, 0, 2, 0, 3])}),
        RGB,
        0,
    ),
    "RGBA": ("png", saved(np.dstack([RGB, OPAQUE])), RGB, 0),
    "RGBX": ("tif", saved(np.dstack([RGB, SHADES]), "RGBX"), RGB, 0),
    **{f"grey in {suffix}": (suffix, saved(SHADES), grey(SHADES), 0) for suffix in ("png", "bmp", "tif", "pgm", "gif")},
    "grey with 0 as white": ("tif", tagged(saved(SHADES), 262, 0), grey(255 - SHADES.astype(int)), 0),
    "grey with alpha": ("png", saved(np.dstack([SHADES, OPAQUE])), grey(SHADES), 0),
    **{
        f"grey of {bits} bits in PNG": (
            "png",
            png(SHADES >> (8 - bits), bits, GREY),
            grey((SHADES >> (8 - bits)) * (255 / (2**bits - 1))),
            0,
        )
        for bits in (1, 2, 4)
    },
    **{f"one bit in {suffix}": (suffix, saved(BITS), grey(255 * BITS), 0) for suffix in ("png", "bmp", "tif", "pbm")},
    "one bit in TIFF as fax": ("tif", saved(BITS, compression="group4"), grey(255 * BITS), 0),
    **{f"16 bits in {suffix}": (suffix, saved(DEEP), grey(DEEP / 257), 0) for suffix in ("png", "tif")},
    "16 bits in big-endian TIFF": ("tif", saved(DEEP.astype(">u2")), grey(DEEP / 257), 0),
    "16 bits in TIFF with 0 as white": ("tif", tagged(saved(DEEP), 262, 0), grey((65535 - DEEP.astype(int)) / 257), 0),
    "16 bits in PGM": ("pgm", saved(DEEP.astype(np.int32)), grey(DEEP / 257), 0),
    **{f"palette in {suffix}": (suffix, saved(indexed()), PALETTE[INDEX], 0) for suffix in ("png", "bmp", "tif", "gif")},
    "palette of 4 bits": ("png", saved(indexed(INDEX % 16), bits=4), PALETTE[INDEX % 16], 0),
    "palette with alpha": ("tif", saved(indexed(alpha=OPAQUE)), PALETTE[INDEX], 0),
    "palette with a transparent colour that no pixel has": (
        "png",
        saved(indexed(INDEX % 19), transparency=19),
        PALETTE[INDEX % 19],
        0,
    ),
    "palette with an opaque alpha for each colour": ("png", saved(indexed(), transparency=b"\xff" * 20), PALETTE[INDEX], 0),
    "CMYK in TIFF": ("tif", saved(INKS, "CMYK"), of_inks(INKS), 1),
    "CMYK in JPEG": (
        "jpg",
        saved(FLAT_INKS, "CMYK", quality=95),
        of_inks(FLAT_INKS),
        3,
    ),
    "CMYK with a profile": (
        "tif",
        saved(CORNERS, "CMYK", icc_profile=profile_of_inks(LIGHTNESS)),
        grey(encoded(light_of(LIGHTNESS / 2.55)))[None],
        1,
    ),
    "LAB": ("tif", saved(LAB ^ np.array([0, 128, 128], np.uint8), "LAB"), of_lab(LAB), 2),
    "profile of other colours": ("png", saved(RGB, icc_profile=ROTATED), encoded((RGB / 255) ** 2.2)[..., [2, 0, 1]], 1),
    "palette with a profile": (
        "png",
        saved(indexed(), icc_profile=ROTATED),
        encoded((PALETTE[INDEX] / 255) ** 2.2)[..., [2, 0, 1]],
        1,
    ),
    "profile of grey": ("png", saved(SHADES, icc_profile=profile_of_grey(1.8)), grey(encoded((SHADES / 255) ** 1.8)), 1),
    "profile of sRGB": ("png", saved(RGB, icc_profile=REAL_SRGB), RGB, 0),
    "profile of sRGB in JPEG": ("jpg", saved(FLAT, quality=95, icc_profile=REAL_SRGB), FLAT, 2),
    "profile of inks on RGB": ("png", saved(RGB, icc_profile=profile_of_inks(LIGHTNESS)), RGB, 0),
    "profile of colours on grey": ("png", saved(SHADES, icc_profile=ROTATED), grey(SHADES), 0),
    "damaged profile": ("png", saved(RGB, icc_profile=ROTATED[:200]), RGB, 0),
    "profile that is none": ("tif", saved(RGB, icc_profile=b"no profile" * 30), RGB, 0),
    "TIFF with a smaller copy": ("tif", with_preview, RGB, 0),
    "the first of two in MPO": ("mpo", pages(FLAT, 255 - FLAT, quality=95), FLAT, 2),
    "one frame of WebP": ("webp", pages(RGB, lossless=True), RGB, 0),
}
if features.check("avif"):
    IMAGES["RGB in AVIF"] = ("avif", saved(FLAT, quality=95), FLAT, 3)


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_what_a_viewer_shows(tmp_path: Path, name: str) -> None:
    suffix, write, expected, tolerance = IMAGES[name]
    path = tmp_path / f"a.{suffix}"
    write(path)
    pixels = READER.image(path)
    assert pixels.dtype == np.uint8
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(float) - np.rint(expected)).max() <= tolerance
    assert picture_size(path) == expected.shape[:2]


IN_MEMORY: dict[str, tuple[str, Pixels, Pixels, int]] = {  # kinds of pixels that not every Pillow writes to a file
    "La": ("La", np.stack([SHADES, OPAQUE], axis=-1), grey(SHADES), 0),
    "RGBa": ("RGBa", np.dstack([RGB, OPAQUE]), RGB, 0),
    "YCbCr": ("YCbCr", RGB, of_jfif(RGB), 2),
    "HSV": ("HSV", RGB, of_hsv(RGB), 3),
    "I;16B": ("I;16B", DEEP.astype(">u2"), grey(DEEP / 257), 0),
}


@pytest.mark.parametrize("suffix", ["png", "tif", "gif", "webp"])
def test_a_closed_file_is_what_was_decoded_of_it(tmp_path: Path, suffix: str) -> None:
    saved(RGB if suffix != "gif" else indexed(), lossless=True)(tmp_path / f"a.{suffix}")
    with Image.open(tmp_path / f"a.{suffix}") as picture:
        picture.load()
    np.testing.assert_array_equal(as_shown(picture), RGB if suffix != "gif" else PALETTE[INDEX])


@pytest.mark.parametrize(("mode", "pixels", "expected", "tolerance"), IN_MEMORY.values(), ids=IN_MEMORY)
def test_a_picture_in_memory_is_what_a_viewer_shows(mode: str, pixels: Pixels, expected: Pixels, tolerance: int) -> None:
    picture = Image.frombytes(mode, (7, 5), pixels.tobytes())
    assert np.abs(as_shown(picture).astype(float) - np.rint(expected)).max() <= tolerance


TRANSPARENT = r"is transparent in places, and viewers lay it over different backgrounds: save it without transparency$"
UNKNOWN = r"has pixels of 32 bits or with a sign, which have no known range: save it with 8 or 16 bits$"
FRAMES = r"has 2 pages or frames: save the one that is meant as a picture of its own$"
REFUSED_IMAGES: dict[str, tuple[str, File, str]] = {
    "RGBA": ("png", saved(np.dstack([RGB, HOLES])), TRANSPARENT),
    "RGBA in WebP": ("webp", saved(np.dstack([RGB, HOLES]), lossless=True), TRANSPARENT),
    "premultiplied RGBA": ("tif", tagged(saved(np.dstack([RGB, HOLES])), 338, 1), TRANSPARENT),
    "grey with alpha": ("png", saved(np.dstack([SHADES, HOLES])), TRANSPARENT),
    "palette with alpha": ("tif", saved(indexed(alpha=HOLES)), TRANSPARENT),
    "palette with a transparent colour": ("png", saved(indexed(), transparency=int(INDEX[0, 0])), TRANSPARENT),
    "palette with an alpha for each colour": ("png", saved(indexed(), transparency=b"\xff" * 5 + b"\xfe" * 15), TRANSPARENT),
    "GIF with a transparent colour": ("gif", saved(indexed(), transparency=int(INDEX[0, 0])), TRANSPARENT),
    "RGB with a transparent colour": ("png", saved(RGB, transparency=tuple(RGB[1, 1].tolist())), TRANSPARENT),
    "grey with a transparent number": ("png", saved(SHADES, transparency=int(SHADES[1, 1])), TRANSPARENT),
    "16 bits with a transparent number": (
        "png",
        png(DEEP, 16, GREY, before={b"tRNS": DEEP[:1, :1].astype(">u2").tobytes()}),
        TRANSPARENT,
    ),
    "4 bits with a transparent number": (
        "png",
        png(SHADES >> 4, 4, GREY, before={b"tRNS": bytes([0, SHADES[0, 0] >> 4])}),
        TRANSPARENT,
    ),
    "32 bits": ("tif", saved(DEEP.astype(np.int32)), UNKNOWN),
    "16 bits with a sign": ("tif", tagged(tagged(saved(DEEP.astype(np.int32)), 258, 16), 339, 2), UNKNOWN),
    "floats in TIFF": ("tif", saved(DEEP.astype(np.float32)), r"has floating-point pixels, which have no known range: save"),
    "floats in PFM": ("pfm", saved(DEEP.astype(np.float32)), r"has floating-point pixels, which have no known range: save"),
    **{f"frames in {suffix}": (suffix, pages(RGB, 255 - RGB), FRAMES) for suffix in ("gif", "webp", "png", "tif")},
    "what is no picture": ("png", written(b"no picture"), "is truncated or unreadable"),
    "PostScript, which would be run": ("png", saved(RGB, format="EPS"), "is truncated or unreadable"),
    "nothing": ("png", lambda path: None, "does not exist: correct the path"),
}


@pytest.mark.parametrize(("suffix", "write", "sentence"), REFUSED_IMAGES.values(), ids=REFUSED_IMAGES)
def test_what_viewers_show_differently_is_refused_as_an_image(tmp_path: Path, suffix: str, write: File, sentence: str) -> None:
    path = tmp_path / f"a.{suffix}"
    write(path)
    with pytest.raises(InputError, match=rf"^picture {path} {sentence}"):
        READER.image(path)


# Which way is up


def plainly(path: Path, **options: Any) -> None:
    Image.fromarray(RGB).save(path, lossless=True, **options)


def compressed(path: Path, **options: Any) -> None:
    Image.fromarray(RGB).save(path, compression="tiff_lzw", **options)


def after_the_pixels(path: Path, **options: Any) -> None:
    """A PNG file whose EXIF comes last, which the standard allows."""
    write_png(path, RGB, 8, COLOUR, after={b"eXIf": options["exif"][6:]})


def in_xmp(path: Path, **options: Any) -> None:
    orientation = options["exif"][-8]
    packet = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'
    Image.fromarray(RGB).save(path, lossless=True, xmp=packet.encode())


ORIENTED: dict[str, tuple[str, Callable[..., None]]] = {
    **{
        suffix: (suffix, lambda path, **options: Image.fromarray(RGB).save(path, lossless=True, **options))
        for suffix in ("png", "tif", "webp")
    },
    "TIFF with LZW": ("tif", lambda path, **options: Image.fromarray(RGB).save(path, compression="tiff_lzw", **options)),
    "PNG, last": ("png", after_the_pixels),
    "WebP, as XMP": ("webp", in_xmp),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("suffix", "write"), ORIENTED.values(), ids=ORIENTED)
def test_images_are_turned_and_turned_labels_are_refused(
    tmp_path: Path, suffix: str, write: Callable[..., None], orientation: int
) -> None:
    path, expected = tmp_path / f"a.{suffix}", shown(RGB, orientation)
    write(path, exif=exif(orientation))
    np.testing.assert_array_equal(READER.image(path), expected)
    assert picture_size(path) == expected.shape[:2]
    colours = {(int(r), int(g), int(b)): number for number, (r, g, b) in enumerate(RGB.reshape(-1, 3))}
    read = ColourReader(colours, "restore it")
    if orientation == 1:
        np.testing.assert_array_equal(read(path), np.arange(35).reshape(5, 7))
    else:
        with pytest.raises(
            InputError, match=rf"^label {path} has the orientation tag {orientation} \(EXIF\), and labels must"
        ):
            read(path)


def test_photographs_are_turned(tmp_path: Path) -> None:
    halves = np.repeat(np.array([[[250, 10, 10]], [[10, 10, 250]]], np.uint8), 16, axis=0).repeat(16, axis=1)
    for orientation in range(1, 9):
        Image.fromarray(halves).save(tmp_path / "a.jpg", quality=95, subsampling=0, exif=exif(orientation))
        pixels = READER.image(tmp_path / "a.jpg")
        assert np.abs(pixels.astype(int) - shown(halves, orientation)).max() <= 4
        assert picture_size(tmp_path / "a.jpg") == pixels.shape[:2]


@pytest.mark.parametrize("damage", [exif(0), exif(9), exif(6)[:12], exif(6)[:-9], b"II*\0\xff\xff\xff\xff", b"nonsense"])
def test_a_damaged_orientation_says_nothing(tmp_path: Path, damage: bytes) -> None:
    for suffix in ("png", "webp"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(RGB).save(path, lossless=True, exif=damage)
        np.testing.assert_array_equal(READER.image(path), RGB)
        assert picture_size(path) == (5, 7)
    np.testing.assert_array_equal(
        ColourReader({(1, 2, 3): 0}, "", ignores_others=True)(tmp_path / "a.png"), np.full((5, 7), 255)
    )


def test_a_size_is_known_without_decoding(tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "tif", "bmp", "gif"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(np.repeat(np.repeat(RGB, 40, axis=0), 40, axis=1)).save(path, exif=exif(6))
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * 3 // 4])
        assert picture_size(path) == ((200, 280) if suffix in ("bmp", "gif") else (280, 200))  # which have no EXIF
        with pytest.raises(InputError, match="is truncated or unreadable"):
            READER.image(path)


# Labels


CLASSES = {value: value for value in range(256)}
LABELS: dict[str, tuple[str, File, Pixels]] = {  # suffix, file, the numbers
    **{f"numbers in {suffix}": (suffix, saved(INDEX), INDEX) for suffix in ("png", "bmp", "tif", "pgm")},
    **{f"palette in {suffix}": (suffix, saved(indexed()), INDEX) for suffix in ("png", "bmp", "tif", "gif")},
    "plain PGM": ("pgm", written(b"P2 7 5 255\n" + " ".join(map(str, INDEX.ravel().tolist())).encode()), INDEX),
    **{
        f"TIFF with {name}": ("tif", saved(INDEX, compression=name), INDEX)
        for name in ("tiff_lzw", "packbits", "tiff_adobe_deflate")
    },
    **{f"palette of {bits} bits": ("png", saved(indexed(INDEX % 2**bits), bits=bits), INDEX % 2**bits) for bits in (1, 2, 4)},
    **{f"one bit in {suffix}": (suffix, saved(BITS), BITS) for suffix in ("png", "bmp", "tif")},
    "one bit in TIFF as fax": ("tif", saved(BITS, compression="group4"), BITS),
    **{f"16 bits in {suffix}": (suffix, saved(INDEX.astype(np.uint16)), INDEX) for suffix in ("png", "tif")},
    "16 bits in big-endian TIFF": ("tif", saved(INDEX.astype(">u2")), INDEX),
    "16 bits in PGM": ("pgm", saved(INDEX.astype(np.int32)), INDEX),
    "32 bits in TIFF": ("tif", saved(INDEX.astype(np.int32)), INDEX),
    "numbers and opaque alpha": ("png", saved(np.dstack([INDEX, OPAQUE])), INDEX),
    "palette and opaque alpha": ("tif", saved(indexed(alpha=OPAQUE)), INDEX),
    "palette with a transparent number": ("png", saved(indexed(), transparency=0), INDEX),
    "GIF with a transparent number": ("gif", saved(indexed(), transparency=19), INDEX),
    "lossless WebP": ("webp", saved(INDEX, lossless=True), INDEX),
    "lossless WebP with metadata": ("webp", saved(INDEX, lossless=True, exif=exif(1), icc_profile=ROTATED), INDEX),
    "numbers with a profile": ("png", saved(INDEX, icc_profile=profile_of_grey(1.8)), INDEX),
    "a file of another suffix": ("jpg", saved(INDEX, format="PNG"), INDEX),
}


@pytest.mark.parametrize(("suffix", "write", "expected"), LABELS.values(), ids=LABELS)
def test_a_label_holds_the_numbers_that_are_stored(tmp_path: Path, suffix: str, write: File, expected: Pixels) -> None:
    path = tmp_path / f"a.{suffix}"
    write(path)
    label = LabelReader(CLASSES, "restore it")(path)
    assert label.dtype == np.uint8
    np.testing.assert_array_equal(label, expected)


DIFFERENT = r"stores its pixels {}, which programs read as different numbers: save it as PNG with 8 bits$"
LOSSES = r"is {}, whose compression may change class numbers: save labels as PNG$"
NOT_NUMBERS = r"must be a picture of 8 or 16 bits with one channel that holds class numbers, it has mode {}; restore it$"
REFUSED_LABELS: dict[str, tuple[str, File, str]] = {
    "JPEG": ("jpg", saved(INDEX), LOSSES.format("JPEG")),
    "JPEG with another suffix": ("png", saved(INDEX, format="JPEG"), LOSSES.format("JPEG")),
    "MPO": ("mpo", pages(FLAT, FLAT), LOSSES.format("MPO")),
    "lossy WebP": ("webp", saved(RGB), LOSSES.format("WEBP")),
    "lossy WebP with metadata": ("webp", saved(RGB, exif=exif(1), icc_profile=ROTATED), LOSSES.format("WEBP")),
    "JPEG 2000": ("jp2", saved(INDEX), LOSSES.format("JPEG2000")),
    "TIFF with JPEG": ("tif", saved(INDEX, compression="jpeg"), LOSSES.format("TIFF")),
    "2 bits": ("png", png(INDEX % 4, 2, GREY), DIFFERENT.format("with 2 or 4 bits of grey")),
    "4 bits": ("png", png(INDEX % 16, 4, GREY), DIFFERENT.format("with 2 or 4 bits of grey")),
    "0 as white": ("tif", tagged(saved(INDEX), 262, 0), DIFFERENT.format("with 0 as white")),
    "16 bits with 0 as white": ("tif", tagged(saved(DEEP), 262, 0), DIFFERENT.format("with 0 as white")),
    "one bit in PBM": ("pbm", saved(BITS), DIFFERENT.format("with 1 as black")),
    "a maximum": (
        "pgm",
        written(b"P5 7 5 19\n" + INDEX.tobytes()),
        DIFFERENT.format("with maximum 19"),
    ),
    "a maximum in text": (
        "pgm",
        written(b"P2 2 1 19 0 19\n"),
        DIFFERENT.format("with maximum 19"),
    ),
    "RGB of 16 bits": ("png", png(DEEP_RGB, 16, COLOUR), DIFFERENT.format("with 16 bits a channel")),
    "frames": ("gif", pages(RGB, 255 - RGB), FRAMES),
    "pages": ("tif", pages(INDEX, INDEX), FRAMES),
    "RGB": ("png", saved(RGB), NOT_NUMBERS.format("RGB")),
    "three equal channels": ("png", saved(np.dstack([INDEX] * 3)), NOT_NUMBERS.format("RGB")),
    "numbers and alpha": ("png", saved(np.dstack([INDEX, HOLES])), NOT_NUMBERS.format("LA")),
    "lossless WebP in colours": ("webp", saved(RGB, lossless=True), NOT_NUMBERS.format("RGB")),
    "CMYK": ("tif", saved(INKS, "CMYK"), NOT_NUMBERS.format("CMYK")),
    "floats": ("tif", saved(INDEX.astype(np.float32)), NOT_NUMBERS.format("F")),
    "a sign": ("tif", saved(INDEX.astype(np.int32) - 1), r"holds values from -1 to 1\d; allowed are 0 to 65535: restore it$"),
}


@pytest.mark.parametrize(("suffix", "write", "sentence"), REFUSED_LABELS.values(), ids=REFUSED_LABELS)
def test_a_label_whose_numbers_are_in_doubt_is_refused(tmp_path: Path, suffix: str, write: File, sentence: str) -> None:
    path = tmp_path / f"a.{suffix}"
    write(path)
    with pytest.raises(InputError, match=rf"^label {path} {sentence}"):
        LabelReader(CLASSES, "restore it")(path)


COLOURS = {(int(r), int(g), int(b)): number for number, (r, g, b) in enumerate(PALETTE)}
COLOURED: dict[str, tuple[str, File]] = {
    **{f"RGB in {suffix}": (suffix, saved(PALETTE[INDEX], lossless=True)) for suffix in ("png", "bmp", "tif", "ppm", "webp")},
    **{f"palette in {suffix}": (suffix, saved(indexed())) for suffix in ("png", "bmp", "tif", "gif")},
    "RGBA": ("png", saved(np.dstack([PALETTE[INDEX], HOLES]))),
    "with a profile": ("png", saved(PALETTE[INDEX], icc_profile=ROTATED)),
}


@pytest.mark.parametrize(("suffix", "write"), COLOURED.values(), ids=COLOURED)
def test_a_label_holds_the_colours_that_are_stored(tmp_path: Path, suffix: str, write: File) -> None:
    path = tmp_path / f"a.{suffix}"
    write(path)
    np.testing.assert_array_equal(ColourReader(COLOURS, "restore it")(path), INDEX)


def test_colours_of_another_space_are_refused(tmp_path: Path) -> None:
    saved(INKS, "CMYK")(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"has colours that are not red, green and blue \(mode CMYK\); restore it"):
        ColourReader(COLOURS, "restore it")(tmp_path / "a.tif")
    saved(DEEP)(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"has numbers in place of colours \(mode I;16\); restore it"):
        ColourReader(COLOURS, "restore it")(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("suffix", "pixels"), [("png", DEEP), ("tif", DEEP), ("tif", DEEP.astype(">u2")), ("pgm", DEEP.astype(np.int32))]
)
def test_depths_of_sixteen_bits_are_exact(tmp_path: Path, suffix: str, pixels: Pixels) -> None:
    saved(pixels)(tmp_path / f"a.{suffix}")
    metres = DepthReader(1000.0, "restore it")(tmp_path / f"a.{suffix}")
    np.testing.assert_allclose(metres, DEEP / 1000, rtol=1e-6)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "gif"])
def test_the_palette_says_what_numbers_look_like(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    saved(indexed())(path)
    colours = label_colours(path, range(20))
    assert colours is not None
    np.testing.assert_array_equal(colours, PALETTE)
    form, palette = storage(path)
    assert form == "with a palette"
    assert {colour: palette.index(colour) for colour in COLOURS} == COLOURS
    saved(INDEX)(tmp_path / "b.png")
    assert label_colours(tmp_path / "b.png", range(2)) is None
    assert storage(tmp_path / "b.png") == ("in 8-bit grey", [])


# Large pictures


def test_a_large_picture_is_refused_with_the_number_that_admits_it(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_png(path, INDEX, 8, GREY)
    claim_size(path, 10_001, 30_000)
    sentence = (
        rf"{path} has 10001 × 30000 pixels, 300\.0 megapixels, and `max_megapixels` is 179: give `max_megapixels` 301, or"
    )
    with pytest.raises(InputError, match=rf"^picture {sentence}"):
        READER.image(path)
    with pytest.raises(InputError, match=rf"^label {sentence}"):
        LabelReader(CLASSES, "restore it")(path)
    assert picture_size(path) == (10_001, 30_000)


def test_pillows_own_limit_and_warnings_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix in ("png", "tif", "gif", "webp"):
        saved(FLAT)(tmp_path / f"a.{suffix}")
    for limit in (10, 200):  # refused by Pillow, and warned of
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for suffix in ("png", "tif", "gif", "webp"):
            assert READER.image(tmp_path / f"a.{suffix}").shape == (16, 16, 3)
        assert limit == Image.MAX_IMAGE_PIXELS


def test_threads_read_at_once(tmp_path: Path) -> None:
    saved(FLAT)(tmp_path / "a.png")
    limit = Image.MAX_IMAGE_PIXELS
    with ThreadPoolExecutor(8) as pool:
        for pixels in pool.map(READER.image, [tmp_path / "a.png"] * 64):
            np.testing.assert_array_equal(pixels, FLAT)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_what_is_set_aside_comes_back_with_the_last_thread(tmp_path: Path) -> None:
    saved(FLAT)(tmp_path / "a.png")
    limit, filters = Image.MAX_IMAGE_PIXELS, warnings.filters[:]
    meeting = threading.Barrier(4)

    def read() -> None:
        with READER._opened(tmp_path / "a.png"):
            meeting.wait(60)  # all have the file open
            assert Image.MAX_IMAGE_PIXELS is None

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(read) for _ in range(4)]:
            future.result()
    assert (Image.MAX_IMAGE_PIXELS, warnings.filters) == (limit, filters)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="loading processes are not forked here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_loading_process_begins_with_what_was_set_aside_by_others(tmp_path: Path) -> None:
    saved(FLAT)(tmp_path / "a.png")
    limit = Image.MAX_IMAGE_PIXELS
    opened, forked = threading.Event(), threading.Event()

    def read() -> None:
        with READER._opened(tmp_path / "a.png"):
            opened.set()
            assert forked.wait(60)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(read)
        assert opened.wait(60)
        context = multiprocessing.get_context("fork")
        child = context.Process(target=read_alone, args=(tmp_path / "a.png", limit))
        child.start()
        forked.set()
        future.result()
        child.join(60)
    assert child.exitcode == 0


def read_alone(path: Path, limit: int) -> None:
    assert limit == Image.MAX_IMAGE_PIXELS
    assert READER.image(path).shape == FLAT.shape
    assert limit == Image.MAX_IMAGE_PIXELS


def write_set(folder: Path) -> Path:
    for split in ("train", "val"):
        dataset_folders.write_image(folder / split / "a.png")
        dataset_folders.write_label(folder / split / "a_label.png", dataset_folders.values_up_to(2))
    path = folder / "set.toml"
    patterns = 'images = "{split}/{name}.png"\nlabels = "{split}/{name}_label.png"\n'
    path.write_text(
        f'classes = ["no", "yes"]\n{patterns}[splits.train]\nlist = "names.txt"\n[splits.val]\nlist = "names.txt"\n'
    )
    (folder / "names.txt").write_text("a\n")
    return path


@pytest.mark.parametrize("processes", [1, 2])
def test_the_limit_goes_with_the_data_set(tmp_path: Path, processes: int) -> None:
    path = write_set(tmp_path)
    few, many = (open_dataset(str(path), "train", None, max_megapixels=limit) for limit in (1e-5, 1e-4))
    with pytest.raises(InputError, match=r"^picture .*a\.png has 6 × 8 pixels.*; label .*a_label\.png has 6 × 8 pixels"):
        pickle.loads(pickle.dumps(few))[0]  # as a loading process gets it
    assert pickle.loads(pickle.dumps(many))[0].image.shape == (6, 8, 3)
    problems = check_folder(str(path), None, (), processes, max_megapixels=1e-5).problems
    assert [problem.count("`max_megapixels` is 1e-05") for problem in problems] == [2, 2]
    assert not check_folder(str(path), None, (), processes, max_megapixels=1e-4).problems
    with pytest.raises(InputError, match="`max_megapixels` must be above 0, got -1"):
        open_splits(DataSettings(dataset=str(path), max_megapixels=-1))


# What can be done


def test_an_owner_is_not_told_to_restore_the_original(tmp_path: Path) -> None:
    path = write_set(tmp_path)
    (tmp_path / "val" / "a.png").write_bytes(b"no picture")
    dataset_folders.write_image(tmp_path / "train" / "a.png", size=(5, 8))
    damaged, differing = check_folder(str(path), None, ("val", "train"), 1).problems
    assert re.search(r"a\.png is truncated or unreadable \(.*\); save it anew, or take the picture out of the split$", damaged)
    assert differing.endswith(
        "they must be equal: scale the label without interpolation, or take the picture out of the split"
    )


def test_another_format_is_called_that(tmp_path: Path) -> None:
    saved(RGB, format="TGA")(tmp_path / "a.png")
    formats = "PNG, JPEG, TIFF, BMP, GIF, WEBP, PPM, JPEG2000, AVIF"
    with pytest.raises(InputError, match=rf"a\.png is truncated or unreadable \(it is none of {formats}\); restore it"):
        READER.image(tmp_path / "a.png")


def test_pictures_of_torch_data_sets_are_taken_as_they_are_shown() -> None:
    turned = Image.fromarray(RGB)
    turned.getexif()[ORIENTATION] = 6
    label = Image.fromarray(INDEX % 2)
    turned_label = label.copy()
    turned_label.getexif()[ORIENTATION] = 3
    pairs = [
        (turned, shown(INDEX, 6) % 2),
        (Image.fromarray(np.dstack([RGB, HOLES])), label),
        (RGB, turned_label),
        (RGB, label),
    ]
    dataset = TorchDataset(pairs, ("no", "yes"), name="mine", split="train")
    np.testing.assert_array_equal(dataset[0].image, shown(RGB, 6))
    with pytest.raises(InputError, match=r"^sample 1 of mine train has an image that is transparent in places"):
        dataset[1]
    with pytest.raises(InputError, match=r"^sample 2 of mine train has a label that has the orientation tag 3 \(EXIF\), and"):
        dataset[2]
    np.testing.assert_array_equal(dataset[3].label, INDEX % 2)
