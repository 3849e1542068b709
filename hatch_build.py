"""Builds the wheel: the folders `reference`, `fast` and `search` become parts of one package, `dense_prediction_cell`.

In a checkout they are packages of their own, under names that a project of a user's may have too. The wheel therefore holds
them inside the package, whose face is `dense_prediction_cell.py`, with every import rewritten to lead there. Whatever names a
module otherwise, such as a string, cannot be seen as an import; it ends the build.
"""

import ast
import re
import shutil
from collections.abc import Iterator
from doctest import DocTestParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PACKAGE = "dense_prediction_cell"
FOLDERS = ("reference", "fast", "search")
DATA = {".json", ".h", ".cpp", ".jinja", ".js"}
LEFT_OUT = {".md", ".jsonl", ".pyc"}

_IN_A_DOCSTRING = re.compile(rf"((?:>>>|\.\.\.) (?:from|import) |python -m )(?=(?:{'|'.join(FOLDERS)})\b)")
_NAME_OF_A_MODULE = re.compile(rf"\b(?:{'|'.join(FOLDERS)})\.[a-z_]+")


def get_build_hook() -> type[Any]:
    """Give hatchling, which calls this, the class of its build hook. All else here needs the standard library alone."""
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface

    class MoveIntoPackage(BuildHookInterface[Any]):
        """Gives the moved sources to the wheel. An editable installation is the checkout itself, where nothing moves."""

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            if version == "standard":
                self._moved = TemporaryDirectory()
                write_package(Path(self.root), Path(self._moved.name))
                build_data["force_include"][self._moved.name] = PACKAGE

        def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
            if version == "standard":
                self._moved.cleanup()

    return MoveIntoPackage


def write_package(root: Path, package: Path) -> None:
    """Write the content of the package. Raises ValueError, naming the file, for what cannot be moved."""
    face = root / f"{PACKAGE}.py"
    _write(package / "__init__.py", moved(face.read_text(encoding="utf-8"), face.name))
    _write(package / "py.typed", "")
    for folder in FOLDERS:
        for path in sorted(each for each in (root / folder).rglob("*") if each.is_file()):
            name = path.relative_to(root)
            if path.suffix == ".py":
                text = path.read_text(encoding="utf-8")
                refuse_names_of_modules(text, str(name))
                _write(package / name, moved(text, str(name)))
            elif path.suffix in DATA:
                (package / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, package / name)
            elif path.suffix not in LEFT_OUT:
                raise ValueError(f"{name}: say in hatch_build.py whether files of this kind belong in the package")


def moved(source: str, name: str) -> str:
    """The source with all imports of the folders leading into the package, also in docstrings; lines keep their numbers.

    Raises ValueError, naming the file and the line, for an import that cannot be moved.

    >>> moved("from fast.checkpoint import load_head", "x.py")
    'from dense_prediction_cell.fast.checkpoint import load_head'
    >>> moved("import fast.kernels", "x.py")
    'import dense_prediction_cell.fast.kernels; from dense_prediction_cell import fast'
    """
    lines = source.encode().splitlines(keepends=True)  # columns of a syntax tree count bytes
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            old, new = (text.encode() for text in _edit_of(node))
            line, column = lines[node.lineno - 1], node.col_offset
            if not line[column:].startswith(old):
                raise ValueError(f"{name}, line {node.lineno}: write this import with single blanks")
            lines[node.lineno - 1] = line[:column] + new + line[column + len(old) :]
        elif isinstance(node, ast.Expr) and _is_text(node.value):
            for i in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[i] = _IN_A_DOCSTRING.sub(rf"\g<1>{PACKAGE}.", lines[i].decode()).encode()
    text = b"".join(lines).decode()
    if left := [line for line, module in _imports(text) if module.partition(".")[0] in FOLDERS]:
        raise ValueError(f"{name}, line {left[0]}: this import cannot be moved into {PACKAGE}")
    return text


def refuse_names_of_modules(source: str, name: str) -> None:
    """Raise ValueError for a string that names a module, as in `import_module("fast.x")`: nobody would move it."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings):
        if isinstance(node.value, str) and (found := _NAME_OF_A_MODULE.search(node.value)):
            raise ValueError(
                f"{name}, line {node.lineno}: the string {found[0]!r} names a module, whose name is another one in the wheel; "
                "import it, name it relatively, or name a command by `spelled`"
            )


def _edit_of(node: ast.Import | ast.ImportFrom) -> tuple[str, str]:
    """The beginning of an import of the folders, and what it becomes; nothing twice for any other import."""
    match node:
        case ast.ImportFrom(module=str(module), level=0) if module.partition(".")[0] in FOLDERS:
            return f"from {module} ", f"from {PACKAGE}.{module} "
        case ast.Import(names=[ast.alias(name=module, asname=as_name)]) if (top := module.partition(".")[0]) in FOLDERS:
            if as_name is not None:
                return f"import {module} ", f"import {PACKAGE}.{module} "
            only_top = f"from {PACKAGE} import {top}"
            return f"import {module}", only_top if module == top else f"import {PACKAGE}.{module}; {only_top}"
    return "", ""


def _imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of every module that is imported, also in the examples of docstrings."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            yield node.lineno, node.module
        elif isinstance(node, ast.Expr) and _is_text(node.value):
            for example in DocTestParser().get_examples(ast.literal_eval(node.value)):
                yield from ((node.lineno + example.lineno, module) for _, module in _imports(example.source))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
