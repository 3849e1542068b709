"""Writes TensorFlow V2 checkpoints for tests, as tensorflow/core/util/tensor_bundle/tensor_bundle.cc does."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

DTYPES = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "float16": 19}
RESTART_INTERVAL = 16  # LevelDB's: every 16th key is written in full


def write_bundle(prefix: Path, arrays: Mapping[str, NDArray[Any]], *, block_entries: int = 100, shards: int = 1) -> None:
    """`<prefix>.index` and its data files; `block_entries` variables per block of the table."""
    data = [bytearray() for _ in range(shards)]
    entries = [(b"", field(1, shards) + field(2, 0) + field(3, field(1, 1)))]
    for i, (name, array) in enumerate(sorted(arrays.items())):
        raw, shard = array.astype(array.dtype.newbyteorder("<")).tobytes(), i % shards
        shape = b"".join(field(2, field(1, extent)) for extent in array.shape)
        place = field(3, shard) + field(4, len(data[shard])) + field(5, len(raw))
        crc = struct.pack("<BI", 6 << 3 | 5, masked_crc(raw))
        entries.append((name.encode(), field(1, DTYPES[array.dtype.name]) + field(2, shape) + place + crc))
        data[shard] += raw
    for shard, content in enumerate(data):
        prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}").write_bytes(content)
    prefix.with_name(f"{prefix.name}.index").write_bytes(table(entries, block_entries))


def table(entries: list[tuple[bytes, bytes]], block_entries: int) -> bytes:
    written, index = b"", []
    for start in range(0, len(entries), block_entries):
        chunk = entries[start : start + block_entries]
        content = block(chunk)
        index.append((chunk[-1][0], varint(len(written)) + varint(len(content))))
        written += trailed(content)
    handles = b""
    for content in (block([]), block(index)):  # the meta index, then the index
        handles += varint(len(written)) + varint(len(content))
        written += trailed(content)
    return written + handles.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def block(entries: list[tuple[bytes, bytes]]) -> bytes:
    written, restarts, last = b"", [0], b""
    for i, (key, value) in enumerate(entries):
        shared = 0
        if i % RESTART_INTERVAL:
            shared = next((j for j, (a, b) in enumerate(zip(key, last, strict=False)) if a != b), min(len(key), len(last)))
        elif i:
            restarts.append(len(written))
        written += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    return written + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def trailed(content: bytes, compression: int = 0) -> bytes:
    kind = bytes([compression])
    return content + kind + struct.pack("<I", masked_crc(content + kind))


def field(number: int, value: int | bytes) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    written = b""
    while value > 127:
        written += bytes([value & 127 | 128])
        value >>= 7
    return written + bytes([value])


def masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(bytes(data))
    return int(((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def slots(arrays: Mapping[str, NDArray[np.float32]], name: str = "Momentum") -> dict[str, NDArray[np.float32]]:
    """An optimizer's slot beside each trainable variable."""
    return {f"{key}/{name}": np.ones_like(array) for key, array in arrays.items() if "moving_" not in key}
