"""Errors about what a user gave. All parts of `search` name settings by their fields, commands print the flags.

A message has a field in backticks. Callers from Python read `crop_size`, the argument's name; users of a command read
--crop-size, because `search.cli` knows the fields of the command's settings.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_FORBIDDEN = frozenset("/\\\0")
_LONGEST = 200  # bytes; file systems take 255, with the suffix
_FIELD = re.compile(r"`([a-z_]+(?:\.[a-z_]+)*)`")


class InputError(ValueError):
    """Something the user gave cannot be used; the message names the file or field and the remedy."""


def require_file_name(name: str, what: str) -> str:
    """The name, which comes from a file or a database, if it can be that of one file in a folder, with a suffix behind it.

    Raises InputError, beginning with `what` it is the name of, for one that leads elsewhere, or that no file can have.

    >>> require_file_name("my cell_seed0", "a head")
    'my cell_seed0'
    >>> require_file_name("../heads", "a head")
    Traceback (most recent call last):
    search.errors.InputError: a head is called '../heads', which is no name of a file: use a short one without slashes
    """
    if name.startswith(".") or not name or len(name.encode(errors="replace")) > _LONGEST or not _FORBIDDEN.isdisjoint(name):
        brief = name if len(name) <= 40 else name[:40] + "…"
        raise InputError(f"{what} is called {brief!r}, which is no name of a file: use a short one without slashes")
    return name


def with_fields(text: str, spelling: Callable[[str], str]) -> str:
    """Replace every `field` in the text by its spelling.

    >>> with_fields("`crop_size` is larger than `large.image_size`", str.upper)
    'CROP_SIZE is larger than LARGE.IMAGE_SIZE'
    """
    return _FIELD.sub(lambda match: spelling(match[1]), text)


def as_flag(field: str) -> str:
    """How a command spells the field.

    >>> as_flag("large.crop_size")
    '--large.crop-size'
    """
    return f"--{field.replace('_', '-')}"


@contextmanager
def fields_in(group: str, fields: frozenset[str]) -> Iterator[None]:
    """Add the group's name to these fields in the message of an InputError that is raised inside.

    For commands that have two groups of settings of the same kind.

    >>> with fields_in("large", frozenset({"backbone"})):
    ...     raise InputError("`backbone` is unknown in `cache_dir`")
    Traceback (most recent call last):
    search.errors.InputError: `large.backbone` is unknown in `cache_dir`
    """
    try:
        yield
    except InputError as error:
        text = with_fields(str(error), lambda field: f"`{group}.{field}`" if field in fields else f"`{field}`")
        raise type(error)(text) from error
