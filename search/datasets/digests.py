"""What files hold, as hashes: each file is read once, and again only after it was changed.

A hash is remembered with the file's size, times and inode, in the user's cache ($XDG_CACHE_HOME/dense-prediction-cell, by
default below ~/.cache), because a data set's folder may be read-only. Nothing depends on that memory: where it is absent or
damaged, or cannot be written, files are read. There is a table for each folder of data. It forgets files that are gone, and a
table that nobody has used for a season is removed.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from search.errors import InputError

_THREADS = 8  # hashing and reading both let other threads go on
_RECENT_NS = 3 * 10**9  # no file system's clock is coarser than two seconds
_SEASON_SECONDS = 90 * 24 * 3600


class _Stamp(NamedTuple):
    """What changes with a file; `ctime_ns` also where somebody sets the other time back."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


_Table = dict[str, tuple[_Stamp, str]]  # hashes by the files' absolute paths


def digests(paths: Sequence[Path], description: str) -> list[str]:
    """The SHA-256 of what each file holds, as 64 hexadecimal digits; `description` stands before the progress bar.

    Raises InputError for a file that cannot be read.
    """
    places = [os.path.abspath(path) for path in paths]
    if not places:
        return []
    index = _index(places)
    known, found, unknown = _read(index), {}, []
    try:
        for place in dict.fromkeys(places):
            stamp, digest = known.get(place, (None, ""))
            if stamp == _stamp(place):
                found[place] = digest
            else:
                unknown.append(place)
        hashed = dict(zip(unknown, _hash_all(unknown, description), strict=True))
    except OSError as error:
        raise InputError(f"cannot read {error.filename} ({error.strerror}): restore it, or allow reading it") from error
    _remember(index, {place: (stamp, digest) for place, (stamp, digest) in hashed.items() if stamp is not None})
    found |= {place: digest for place, (_, digest) in hashed.items()}
    return [found[place] for place in places]


def _stamp(place: str) -> _Stamp:
    status = os.stat(place)  # of a link, that of the file it leads to
    return _Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def _hash_all(places: Sequence[str], description: str) -> list[tuple[_Stamp | None, str]]:
    with ThreadPoolExecutor(_THREADS) as pool:
        bar = tqdm(pool.map(_hash, places), total=len(places), desc=description, unit="file", delay=1, leave=False)
        try:
            return list(bar)
        except BaseException:  # Ctrl-C, too, is not to wait for thousands of files
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _hash(place: str) -> tuple[_Stamp | None, str]:
    """The hash, and the stamp to remember it by: None for a file that was written so lately that its times might not tell a
    second change from the first.
    """
    now, stamp = time.time_ns(), _stamp(place)
    with open(place, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    is_settled = stamp == _stamp(place) and max(stamp.mtime_ns, stamp.ctime_ns) < now - _RECENT_NS
    return (stamp if is_settled else None), digest


def _index(places: Sequence[str]) -> Path | None:
    """The table for the folder that all these files are in; None for a user without a home."""
    folder = os.path.commonpath([os.path.dirname(place) for place in places])
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return cache / "dense-prediction-cell" / "digests" / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}.json"


def _read(index: Path | None) -> _Table:
    if index is None:
        return {}
    try:
        table = json.loads(index.read_bytes())
        return {place: (_Stamp(*map(int, stamp)), str(digest)) for place, (*stamp, digest) in table.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # absent or damaged: it is written anew
        return {}


def _remember(index: Path | None, new: Mapping[str, tuple[_Stamp, str]]) -> None:
    """Add hashes to the table: beside what another process has added by now, and without files that are gone."""
    if index is None:
        return
    with suppress(OSError):
        if not new:
            os.utime(index)  # it is in use
            return
        index.parent.mkdir(parents=True, exist_ok=True)
        table = {place: entry for place, entry in {**_read(index), **new}.items() if os.path.lexists(place)}
        content = json.dumps({place: [*stamp, digest] for place, (stamp, digest) in table.items()})
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=index.parent, delete=False) as aside:
            aside.write(content)
        os.replace(aside.name, index)
        for path in index.parent.iterdir():
            if path.stat().st_mtime < time.time() - _SEASON_SECONDS:
                path.unlink()
