"""A student's file: loaded, its functions called, and whatever goes wrong there said in one sentence."""

import _thread
import ast
import importlib.util
import inspect
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from docs.assignment import expected
from reference.cell import Cell
from reference.dense_prediction_cell import CellWeights

LIMIT_S = 60.0  # for one call; six nested loops of Python need a tenth of it for the largest input
MODULE = "student"
ROUNDABOUT = {"__import__", "eval", "exec", "importlib", "importlib.util", "open", "os._exit", "runpy", "sys.modules"}


class Fault(Exception):
    """What is wrong, as sentences for the student; `cause` is the exception that a function raised."""

    def __init__(self, sentence: str, cause: BaseException | None = None) -> None:
        super().__init__(sentence)
        self.cause = cause


class NotWrittenError(Exception):
    """The name of a function that raised NotImplementedError."""


class Student:
    """The functions of one file. Raises Fault if it cannot be loaded."""

    def __init__(self, path: Path, limit_s: float = LIMIT_S) -> None:
        self.path = path.absolute()
        self.limit_s = limit_s
        self.module = self._guarded(self._load, "the file")

    def uses(self) -> list[str]:
        """What the file imports, anywhere in it, beside NumPy and the standard library, and other ways to get at code."""
        tree = ast.parse(self.path.read_bytes())
        imports = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        imports += [node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | set(imports)
        names |= {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        others = {name.split(".")[0] for name in imports} - sys.stdlib_module_names - {"numpy"}
        return sorted(others | (names & ROUNDABOUT))

    def call(self, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, list[str]]:
        """What the function returns, and remarks. Raises Fault or NotWrittenError."""
        function = getattr(self.module, name, None)
        if not callable(function):
            raise Fault(f"{self.path.name} has no function {name}; its stub is in the original dpc.py.")
        given, given_options = [self.converted(each) for each in arguments], {k: self.converted(v) for k, v in options.items()}
        result = self._guarded(lambda: function(*given, **given_options), name)
        names = list(inspect.signature(expected.function(name)).parameters)
        pairs = [*zip(names, arguments, given, strict=False), *((k, options[k], given_options[k]) for k in options)]
        remarks = []
        for argument, before, after in pairs:
            if not _same(self.converted(before), after):
                raise Fault(
                    f"{name} changes its argument {argument}, which others still need: write `y = y - 1`, not `y -= 1`, "
                    f"and to a copy, not to {argument}[...]."
                )
            is_weights = hasattr(after, "_fields")  # a container with some arrays replaced may well keep the others
            if not is_weights and any(np.may_share_memory(x, y) for x in maps(after) for y in maps(result)):
                remarks.append(
                    f"{name} returns a view of its argument {argument}: whoever changes the result changes {argument} too. "
                    "A copy would be safer."
                )
        return result, remarks

    def converted(self, value: Any) -> Any:
        """A deep copy, in the containers of the student's file."""
        if isinstance(value, np.ndarray):
            return value.copy()
        if isinstance(value, Cell):
            return [self._container("Branch", fields) for fields in expected.listed(value)]
        if isinstance(value, CellWeights):
            return self._container("CellWeights", [self.converted(each) for each in value])
        if hasattr(value, "_fields"):
            return self._container(type(value).__name__, [self.converted(each) for each in value])
        return type(value)(self.converted(each) for each in value) if isinstance(value, list | tuple) else value

    def _container(self, name: str, fields: Any) -> Any:
        try:
            return getattr(self.module, name)(*fields)
        except (AttributeError, TypeError):
            raise Fault(f"The container {name} at the top of {self.path.name} must stay as it is in the original.") from None

    def _load(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location(MODULE, self.path)
        if spec is None or spec.loader is None:
            raise Fault(f"{self.path.name} is not a Python file.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[MODULE] = module
        spec.loader.exec_module(module)
        return module

    def _guarded(self, call: Callable[[], Any], name: str) -> Any:
        """call(), with every way to fail turned into a Fault."""
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            _thread.interrupt_main()

        timer = threading.Timer(self.limit_s, expire)
        timer.daemon = True
        timer.start()
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                return call()
        except Fault:
            raise
        except NotImplementedError as error:
            raise NotWrittenError(self._frames(error)[-1].name if self._frames(error) else name) from None
        except KeyboardInterrupt as error:
            if not expired.is_set():
                raise
            raise Fault(f"{name} was stopped after {self.limit_s:.0f} s{self._place(error)}. Does a loop never end?") from None
        except RecursionError as error:
            raise Fault(f"{name} calls itself without end{self._place(error)}.") from None
        except (Exception, SystemExit) as error:
            raise Fault(self._sentence(error, name), error) from None
        finally:
            timer.cancel()

    def _sentence(self, error: BaseException, name: str) -> str:
        kind = type(error).__name__
        if isinstance(error, SyntaxError):
            return f"{self.path.name} is not valid Python: {error.msg}, line {error.lineno}: `{(error.text or '').strip()}`."
        if isinstance(error, OSError) and not self._frames(error):
            return f"{self.path} cannot be read: {error.strerror}."
        if not self._frames(error):
            return f"{name} cannot be called as its stub says: {kind}: {error}."
        return f"{name} raises {kind}{self._place(error)}: {str(error) or 'without a message'}."

    def _place(self, error: BaseException) -> str:
        """The innermost line of the student's."""
        frames = self._frames(error)
        return f" in line {frames[-1].lineno} of {self.path.name}, `{frames[-1].line}`" if frames else ""

    def _frames(self, error: BaseException) -> list[traceback.FrameSummary]:
        return [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(self.path)]


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All arrays and numbers of nested tuples and lists, each with how one gets there: ".depthwise.norm.scale", "[1]"."""
    if isinstance(tree, list | tuple):
        names = [f".{field}" for field in tree._fields] if hasattr(tree, "_fields") else [f"[{i}]" for i in range(len(tree))]
        for name, child in zip(names, tree, strict=True):
            yield from leaves(child, path + name)
    else:
        yield path, tree


def maps(tree: Any) -> list[Any]:
    """All maps (N, C, H, W) of nested tuples and lists."""
    return [leaf for _, leaf in leaves(tree) if isinstance(leaf, np.ndarray) and leaf.ndim == 4]


def _same(before: Any, after: Any) -> bool:
    pairs = list(leaves(before)), list(leaves(after))
    return len(pairs[0]) == len(pairs[1]) and all(
        np.array_equal(x, y, equal_nan=isinstance(x, np.ndarray) and x.dtype.kind == "f")
        for (_, x), (_, y) in zip(*pairs, strict=True)
    )


def without_running(path: str) -> bool:
    """Whether a leaf of a gradient counts: the running statistics are constants."""
    return not path.endswith((".running_mean", ".running_var"))
