"""What is in a folder: files behind links, too, and none of those that systems and editors leave among a user's own."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from search.errors import InputError

# In small letters. Whatever else is hidden begins with a dot: ._a.jpg of macOS, .ipynb_checkpoints of Jupyter.
_LEFT_BY_SYSTEMS = frozenset(
    ("__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "@eadir", "lost+found")
)

# Of pictures, in small letters.
_USUAL = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
SUFFIXES = _USUAL | {".avif", ".jp2", ".ppm", ".pgm", ".pbm", ".pnm"}


class Found(NamedTuple):
    """All files in a folder and the folders in it, each list sorted: the user's, hidden ones, and links that lead nowhere.

    A hidden folder stands for all that is in it.
    """

    files: list[Path]
    hidden: list[Path]
    dangling: list[Path]


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is none of the user's data.

    >>> [is_hidden(name) for name in ("._p0.jpg", ".ipynb_checkpoints", "Thumbs.db", "p0.jpg")]
    [True, True, True, False]
    """
    return name.startswith(".") or name.lower() in _LEFT_BY_SYSTEMS


def walk(folder: Path) -> Found:
    """Look through a folder and all folders in it; links are followed, those to a folder around them but once.

    A folder that does not exist is empty. Raises InputError for one that cannot be read.
    """
    found = Found([], [], [])
    try:
        for entry in _entries(folder, ()):
            if is_hidden(entry.name):
                found.hidden.append(Path(entry.path))
            elif _followed(entry).is_file():
                found.files.append(Path(entry.path))
            elif entry.is_symlink():
                found.dangling.append(Path(entry.path))
    except OSError as error:
        raise InputError(f"cannot read folder {error.filename} ({error.strerror}): allow reading it") from error
    for paths in found:
        paths.sort()
    return found


def _entries(folder: Path, around: tuple[tuple[int, int], ...]) -> Iterator[os.DirEntry[str]]:
    """All that is in the folder but folders; hidden ones are not looked into. `around` identifies the folders around it."""
    try:
        status, entries = folder.stat(), list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    here = status.st_dev, status.st_ino
    if here in around:  # a link led back
        return
    for entry in entries:
        if not is_hidden(entry.name) and _followed(entry).is_dir():
            yield from _entries(Path(entry.path), (*around, here))
        else:
            yield entry


def _followed(entry: os.DirEntry[str]) -> os.DirEntry[str] | Path:
    """What says whether an entry is a folder or a file; for a link a path, to which a link to itself is neither."""
    return Path(entry.path) if entry.is_symlink() else entry
