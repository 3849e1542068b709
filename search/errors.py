"""What goes wrong because of what a user gave: parts say it of fields, commands print the flags of these fields.

A field stands in backticks in a message. Who calls a part from Python reads `crop_size`, the argument's name; who starts a
command reads --crop-size, because `search.cli` knows the fields of the command's settings.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_FIELD = re.compile(r"`([a-z_]+(?:\.[a-z_]+)*)`")


class InputError(ValueError):
    """Something the user gave cannot be used; the message names the file or field and the remedy."""


def with_fields(text: str, spelling: Callable[[str], str]) -> str:
    """The text with every field in it spelled anew.

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
    """Of errors raised inside, these fields are said to be of a group of settings, for whoever has a second one like it.

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
