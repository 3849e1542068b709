"""Picture files that Pillow cannot write, and colour profiles of which one can say what they do to a pixel."""

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ORIENTATION = 274  # a tag of EXIF and TIFF
GREY, COLOUR = 0, 2  # kinds of PNG files

# The colours red, green and blue of sRGB, as a profile has them: X, Y, Z in the light D50 (IEC 61966-2-1, Bradford).
SRGB = ((0.4360747, 0.2225045, 0.0139322), (0.3850649, 0.7168786, 0.0971045), (0.1430804, 0.0606169, 0.7141733))


def shown(stored: NDArray[Any], orientation: int) -> NDArray[Any]:
    """What is seen of stored pixels: where EXIF says that row 0 and column 0 of them lie (EXIF 2.32, table 6)."""
    turned = {
        1: stored,
        2: stored[:, ::-1],  # top, right
        3: stored[::-1, ::-1],  # bottom, right
        4: stored[::-1],  # bottom, left
        5: stored.swapaxes(0, 1),  # left, top
        6: stored[::-1].swapaxes(0, 1),  # right, top
        7: stored[::-1, ::-1].swapaxes(0, 1),  # right, bottom
        8: stored[:, ::-1].swapaxes(0, 1),  # left, bottom
    }
    return turned[orientation]


def exif(orientation: int) -> bytes:
    """EXIF of one tag, little endian, as JPEG has it."""
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHIHHI", 1, ORIENTATION, 3, 1, orientation, 0, 0)


def write_png(
    path: Path,
    rows: NDArray[Any],
    bits: int,
    kind: int,
    before: Mapping[bytes, bytes] | None = None,
    after: Mapping[bytes, bytes] | None = None,
) -> None:
    """Write samples (H, W) or (H, W, 3) with so many bits each, and other chunks before and after them."""
    if bits == 16:
        lines = [row.astype(">u2").tobytes() for row in rows]
    else:
        samples = [np.unpackbits(row.astype(np.uint8).reshape(-1, 1), axis=1)[:, 8 - bits :] for row in rows]
        lines = [np.packbits(row.ravel()).tobytes() for row in samples]
    head = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], bits, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + line for line in lines))
    chunks = [(b"IHDR", head), *(before or {}).items(), (b"IDAT", pixels), *(after or {}).items(), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(map(_chunk, *zip(*chunks, strict=True))))


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def claim_size(path: Path, height: int, width: int) -> None:
    """Let the head of a PNG file claim another size."""
    content = bytearray(path.read_bytes())
    struct.pack_into(">II", content, 16, width, height)
    struct.pack_into(">I", content, 29, zlib.crc32(content[12:29]))
    path.write_bytes(content)


def set_tag(path: Path, tag: int, value: int) -> None:
    """Give a tag of a little-endian TIFF file another number; the file has the tag already."""
    content = bytearray(path.read_bytes())
    start = struct.unpack_from("<I", content, 4)[0]
    for place in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", content, start)[0], 12):
        if struct.unpack_from("<H", content, place)[0] == tag:
            struct.pack_into("<I", content, place + 8, value)
            path.write_bytes(content)
            return
    raise AssertionError(f"{path} has no tag {tag}")


def profile_of_colours(gamma: float, colours: tuple[tuple[float, ...], ...]) -> bytes:
    """A profile of a screen: light of these three colours (X, Y, Z), by a power of the numbers."""
    curve = _curve(gamma)
    return _profile(
        b"mntr",
        b"RGB ",
        b"XYZ ",
        dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(_xyz, colours), strict=True))
        | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    )


def profile_of_grey(gamma: float) -> bytes:
    """A profile of grey, by a power of the numbers."""
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": _curve(gamma)})


def profile_of_inks(lightness: NDArray[np.uint8]) -> bytes:
    """A profile of four inks, whose 16 mixtures of none and all of each are greys of this lightness (0 to 255 is 0 to 100)."""
    entries = np.stack([lightness, np.full_like(lightness, 128), np.full_like(lightness, 128)], axis=1)
    identity = np.arange(256, dtype=np.uint8).tobytes()
    matrix = struct.pack(">9i", *(np.eye(3, dtype=int).ravel() << 16))
    table = (
        b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + matrix + 4 * identity + entries.astype(np.uint8).tobytes() + 3 * identity
    )
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table})


def encoded(light: NDArray[Any]) -> NDArray[np.float64]:
    """Linear light in 0..1 as numbers of sRGB in 0..255 (IEC 61966-2-1)."""
    light = np.clip(light, 0, 1)
    numbers: NDArray[np.float64] = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return numbers


def light_of(lightness: NDArray[Any]) -> NDArray[np.float64]:
    """CIE's lightness in 0..100 as linear light in 0..1."""
    root = (lightness + 16) / 116
    light: NDArray[np.float64] = np.where(root > 6 / 29, root**3, 3 * (6 / 29) ** 2 * (root - 4 / 29))
    return light


def _curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * gamma)) + bytes(2)


def _xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65536 * value) for value in values))


def _profile(kind: bytes, colours: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A profile of version 2.4 (ICC.1:2001-04)."""
    d50 = (0.9642, 1.0, 0.8249)
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"made\0" + bytes(79), b"wtpt": _xyz(d50)} | tags
    tags[b"cprt"] = b"text" + bytes(4) + b"none\0\0\0\0"
    place = 128 + 4 + 12 * len(tags)
    table, contents = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", place + len(contents), len(content))
        contents += content
    size = place + len(contents)
    head = struct.pack(">I4sI4s4s4s12s4s", size, bytes(4), 0x02400000, kind, colours, connection, bytes(12), b"acsp")
    head += bytes(28) + struct.pack(">3i", *(round(65536 * value) for value in d50)) + bytes(48)
    return head + table + contents
