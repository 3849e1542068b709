"""Functions of the reference replaced for a while, wherever one file of it calls another's.

The files of `reference/` import functions by name, so several of them may have their own name for one function. All of these
names are changed, and changed back. A change is made of the function that is there, so two changes of one function add up.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

Function: TypeAlias = Callable[..., Any]
Changes: TypeAlias = Mapping[str, Callable[[Function], Function]]  # by "file.function", such as "pyramid_pooling.window_size"

PACKAGE = "reference."
EXPECTED = "docs.assignment.expected"  # what the reference has no function for; named "expected.function"


@contextmanager
def replaced(changes: Changes) -> Iterator[None]:
    """Within the block, every call of the named functions is one of what `changes` makes of them."""
    undo: list[tuple[Any, str, Any]] = []
    try:
        for name, change in changes.items():
            original = _named(name)
            changed = change(original)
            for module in _modules():
                for attribute, value in list(vars(module).items()):
                    if value is original:
                        undo.append((module, attribute, original))
                        setattr(module, attribute, changed)
        yield
    finally:
        for module, attribute, original in reversed(undo):
            setattr(module, attribute, original)


def _named(name: str) -> Function:
    file, function = name.split(".")
    module = sys.modules[EXPECTED if file == "expected" else PACKAGE + file]
    found: Function = getattr(module, function)
    return found


def _modules() -> list[Any]:
    return [module for name, module in list(sys.modules.items()) if name.startswith(PACKAGE) or name == EXPECTED]
