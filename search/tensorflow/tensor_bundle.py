"""Reads TensorFlow's V2 checkpoints ("tensor bundles") without TensorFlow, which would be 600 MB for one file format.

`<prefix>.index` is a sorted table as LevelDB writes them: blocks of key-value entries with shared key prefixes, found through
an index block, found through a footer of 48 bytes. Its entry "" is a BundleHeaderProto, all others map a variable's name to a
BundleEntryProto: type, shape, and the place and CRC-32C of its raw bytes in `<prefix>.data-00000-of-0000N`. Sources:
tensorflow/core/protobuf/tensor_bundle.proto, tensorflow/core/util/tensor_bundle/tensor_bundle.cc and
tensorflow/core/lib/io/format.cc. The checksum of every block and tensor is verified by google-crc32c (extra `convert`).
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from search.commands import to_install
from search.errors import InputError

_FOOTER_BYTES, _MAGIC = 48, 0xDB4775248B80FB57
_BLOCK_TRAILER_BYTES = 5  # compression type, CRC-32C
_DTYPES: dict[int, np.dtype[Any]] = {n: np.dtype(t) for n, t in ((1, "<f4"), (2, "<f8"), (3, "<i4"), (9, "<i8"), (19, "<f2"))}


class Entry(NamedTuple):
    """One variable of a checkpoint, not read yet. `dtype` is TensorFlow's number of the type."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    sliced: bool


class TensorBundle:
    """An open checkpoint: `entries` by variable name, in the file's order (sorted); `read` gives the values of one.

    `path` is the prefix (`model.ckpt`), the index file, or a folder with one index file in it. Raises InputError for files
    that are not there, damaged, or of another kind.
    """

    def __init__(self, path: Path) -> None:
        self.prefix = _prefix(path)
        index = self.prefix.with_name(self.prefix.name + ".index")
        try:
            table = dict(_table(index.read_bytes()))
            header = _fields(table.pop(b""))
            self.shards = int(header.get(1, [1])[0])
            self.entries = {name.decode(): _entry(value) for name, value in table.items()}
        except InputError:
            raise
        except (ValueError, KeyError, IndexError, TypeError, struct.error) as error:
            raise InputError(f"{index} is not the index of a TensorFlow V2 checkpoint, or damaged ({error})") from error
        if header.get(2, [0])[0] != 0:
            raise InputError(f"{index} was written on a big-endian machine, which is not supported")

    def read(self, name: str) -> NDArray[Any]:
        """Read the values of a variable. Raises InputError if they are damaged or of a type that is not supported."""
        entry = self.entries[name]
        data = self.prefix.with_name(f"{self.prefix.name}.data-{entry.shard:05d}-of-{self.shards:05d}")
        if entry.dtype not in _DTYPES or entry.sliced:
            form = "stored in slices" if entry.sliced else f"of TensorFlow's type {entry.dtype}"
            raise InputError(f"variable {name} of {self.prefix} is {form}, which is not supported")
        if not data.is_file():
            raise InputError(f"{data} is missing: it must lie beside its index file")
        with data.open("rb") as file:
            file.seek(entry.offset)
            values = file.read(entry.size)
        count = int(np.prod(entry.shape, dtype=np.int64))
        if len(values) != entry.size or entry.size != count * _DTYPES[entry.dtype].itemsize or _crc(values) != entry.crc:
            raise InputError(f"{data} is damaged at variable {name}: get the checkpoint anew")
        return np.frombuffer(values, _DTYPES[entry.dtype]).reshape(entry.shape)


def _prefix(path: Path) -> Path:
    if path.is_dir():
        found = sorted(path.glob("*.index"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise InputError(f"folder {path} must hold one .index file to be a checkpoint, it has {names}: name one of them")
        path = found[0]
    prefix = path.with_suffix("") if path.suffix == ".index" else path
    if not prefix.with_name(prefix.name + ".index").is_file():
        raise InputError(
            f"{prefix}.index does not exist: give the prefix of a TensorFlow V2 checkpoint, such as folder/model.ckpt "
            "(files .index and .data-00000-of-00001; a frozen graph .pb is not one)"
        )
    return prefix


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    if len(data) < _FOOTER_BYTES or struct.unpack_from("<Q", data, len(data) - 8)[0] != _MAGIC:
        raise ValueError("wrong last bytes")
    _, position = _handle(data, len(data) - _FOOTER_BYTES)  # of the meta index, which is empty
    index, _ = _handle(data, position)
    for _, value in _entries(_block(data, index)):
        yield from _entries(_block(data, _handle(value, 0)[0]))


def _handle(data: bytes, position: int) -> tuple[tuple[int, int], int]:
    offset, position = _varint(data, position)
    size, position = _varint(data, position)
    return (offset, size), position


def _block(data: bytes, handle: tuple[int, int]) -> bytes:
    """Read a block without its trailer and its restart points, which are only needed to search in it."""
    offset, size = handle
    compression, crc = struct.unpack_from("<BI", data, offset + size)
    if compression:
        raise ValueError(f"compressed by method {compression}")
    if _crc(data[offset : offset + size + 1]) != crc:
        raise ValueError(f"wrong checksum of the block at byte {offset}")
    (restarts,) = struct.unpack_from("<I", data, offset + size - 4)
    return data[offset : offset + size - 4 - 4 * restarts]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    position, key = 0, b""
    while position < len(block):
        shared, position = _varint(block, position)
        unshared, position = _varint(block, position)
        size, position = _varint(block, position)
        key = key[:shared] + block[position : position + unshared]
        position += unshared
        yield key, block[position : position + size]
        position += size


def _entry(value: bytes) -> Entry:
    fields = _fields(value)
    dimensions = _fields(fields.get(2, [b""])[0]).get(2, [])
    shape = tuple(int(_fields(dimension).get(1, [0])[0]) for dimension in dimensions)
    dtype, shard, offset, size, crc = (int(fields.get(number, [0])[0]) for number in (1, 3, 4, 5, 6))
    return Entry(dtype, shape, shard, offset, size, crc, sliced=7 in fields)


def _fields(message: bytes) -> dict[int, list[Any]]:
    """Parse a protocol buffer: field number -> integers, or bytes for strings and inner messages."""
    fields: dict[int, list[Any]] = {}
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        value: int | bytes
        match tag & 7:
            case 0:
                value, position = _varint(message, position)
            case 2:
                size, position = _varint(message, position)
                value, position = message[position : position + size], position + size
            case 5:
                (value,), position = struct.unpack_from("<I", message, position), position + 4
            case wire_type:
                raise ValueError(f"unknown wire type {wire_type}")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position


def _crc(data: bytes) -> int:
    """CRC-32C, masked as LevelDB does because it is stored beside the data that it covers."""
    try:
        import google_crc32c
    except ModuleNotFoundError as error:
        raise InputError(f"reading TensorFlow checkpoints needs google-crc32c: {to_install('convert')}") from error
    crc: int = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
