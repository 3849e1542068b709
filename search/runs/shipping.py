"""Feature caches on the machines of a cluster: opened where they are, or else fetched once per machine from the driver's.

A cache that a machine has already, because the folder is shared or an earlier run has fetched it, is known by its identity,
which names the contents of all files that the features were made from. Pieces of files travel through Ray's object store, each
with its hash; a folder is written aside and gets its name when all of it is there.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from filelock import FileLock

from search.errors import InputError
from search.tasks.feature_cache import FeatureCache, open_cache

PIECE = 2**26  # bytes that travel at a time

ReadPiece = Callable[[str, str, int], tuple[bytes, str]]  # names of cache and file, number of the piece -> piece, its hash


class StoredCache(NamedTuple):
    """What a machine needs to know of a cache to open it: `sizes` are the bytes of its files, by their names."""

    name: str
    directory: Path
    identity: dict[str, Any]
    sizes: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())


def stored(name: str, cache: FeatureCache) -> StoredCache:
    """A cache of this machine, as others are told of it."""
    directory = cache.directory.absolute()
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.suffix in (".bin", ".json")}
    return StoredCache(name, directory, cache.identity, sizes)


class Source:
    """Reads the files of caches piece by piece, on the machine that has them; they stay open, so nobody can change them."""

    def __init__(self, caches: Sequence[StoredCache]) -> None:
        self._files: dict[tuple[str, str], BinaryIO] = {
            (cache.name, name): (cache.directory / name).open("rb") for cache in caches for name in cache.sizes
        }

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def read(self, cache: str, name: str, number: int) -> tuple[bytes, str]:
        """A piece of a file, and its hash."""
        file = self._files[cache, name]
        file.seek(number * PIECE)
        piece = file.read(PIECE)
        return piece, _hash(piece)


def lacking(caches: Sequence[StoredCache]) -> list[StoredCache]:
    """The caches that this machine does not have."""
    return [cache for cache in caches if _opened(cache) is None]


def open_or_fetch(cache: StoredCache, read: ReadPiece) -> FeatureCache:
    """Open a cache, once it is fetched if this machine does not have it; of several processes one fetches it.

    Raises InputError without room for it, and for pieces that do not arrive as they were.
    """
    if (found := _opened(cache)) is not None:
        return found
    place = _place(cache)
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if (found := _opened(cache)) is None:
            _fetch(cache, read, place)
            found = open_cache(place, cache.identity)
    return found


def _opened(cache: StoredCache) -> FeatureCache | None:
    for directory in (cache.directory, _place(cache)):
        with suppress(InputError, OSError):
            return open_cache(directory, cache.identity)
    return None


def _place(cache: StoredCache) -> Path:
    """Where a fetched cache lies: its name has a hash of its identity, so that others do not meet it."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dense-prediction-cell" / "features"
    return home / f"{cache.directory.name}-{_hash(json.dumps(cache.identity, sort_keys=True).encode())[:16]}"


def _fetch(cache: StoredCache, read: ReadPiece, place: Path) -> None:
    aside = place.with_name(f"{place.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
    free = shutil.disk_usage(place.parent).free
    if cache.bytes > free:
        raise InputError(
            f"{place.parent} has {free / 1e9:.1f} GB of free disk, {cache.name} needs {cache.bytes / 1e9:.1f}: make room, or "
            f"share {cache.directory} with this machine"
        )
    aside.mkdir()
    for name, size in cache.sizes.items():
        with (aside / name).open("wb") as file:
            for piece in _pieces(cache.name, name, size, read):
                file.write(piece)
    open_cache(aside, cache.identity)
    shutil.rmtree(place, ignore_errors=True)  # one that cannot be opened
    aside.replace(place)


def _pieces(cache: str, name: str, size: int, read: ReadPiece) -> Iterator[bytes]:
    for number in range(-(-size // PIECE)):
        piece, expected = read(cache, name, number)
        if _hash(piece) != expected or len(piece) != min(PIECE, size - number * PIECE):
            raise InputError(f"{name} of {cache} did not arrive as it was: run the same command again")
        yield piece


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
