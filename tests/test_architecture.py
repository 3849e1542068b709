"""Holds the arrows reference <- fast <- search <- bench, and a few rules that no linter knows, by reading the source."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {  # of the project's own folders
    "reference": {"reference"},
    "fast": {"reference", "fast"},
    "search": {"reference", "fast", "search"},
    "bench": {"reference", "fast", "search", "bench"},
    "tests": {"reference", "fast", "search", "bench", "tests"},
}
SOURCES = [path.relative_to(ROOT) for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))]
every_source = pytest.mark.parametrize("path", SOURCES, ids=str)


def imports(tree: ast.AST, path: Path) -> Iterator[str]:
    """Full names of all imported modules, wherever in the file; of `from a import b` both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            own = path.parts[: len(path.parts) - node.level] if node.level else ()
            module = ".".join((*own, *([node.module] if node.module else [])))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def forbidden_imports(tree: ast.AST, path: Path) -> list[str]:
    folder = path.parts[0]
    found = []
    for name in imports(tree, path):
        top = name.split(".")[0]
        third_party = top not in MAY_IMPORT and top not in sys.stdlib_module_names
        if (
            (top in MAY_IMPORT and top not in MAY_IMPORT[folder])
            or (folder == "reference" and third_party and top != "numpy")
            or (folder != "tests" and top == "triton" and path.parts[:2] != ("fast", "kernels"))
        ):
            found.append(name)
    return found


def called_name(node: ast.AST) -> str:
    """`torch.load` for torch.load(...), `load` for x().load(...), nothing for what is not a call."""
    if not isinstance(node, ast.Call):
        return ""
    if isinstance(node.func, ast.Attribute):
        owner = f"{node.func.value.id}." if isinstance(node.func.value, ast.Name) else ""
        return owner + node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def unsafe_loads(tree: ast.AST) -> list[int]:
    """Lines of `torch.load` (or `load` imported from torch) that would run a pickle's code."""
    from_torch = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "torch"
        for alias in node.names
        if alias.name == "load"
    }
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and called_name(node) in {"torch.load"} | from_torch
        if not any(
            k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True for k in node.keywords
        )
    ]


def unasserted_comparisons(tree: ast.AST) -> list[int]:
    """Lines that call `allclose` anywhere but in an assert; it raises nothing by itself."""
    asserted = {id(node) for statement in ast.walk(tree) if isinstance(statement, ast.Assert) for node in ast.walk(statement)}
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and called_name(node).rpartition(".")[2] == "allclose" and id(node) not in asserted
    ]


def test_sources_are_found() -> None:
    assert {path.parts[0] for path in SOURCES} >= {"reference", "fast", "search", "tests"}


@every_source
def test_imports_follow_the_arrows(path: Path) -> None:
    assert forbidden_imports(parse(path), path) == []


@every_source
def test_torch_loads_weights_only(path: Path) -> None:
    assert unsafe_loads(parse(path)) == []


@every_source
def test_comparisons_are_asserted(path: Path) -> None:
    assert path.parts[0] != "tests" or unasserted_comparisons(parse(path)) == []


@every_source
def test_names_say_what_is_inside(path: Path) -> None:
    assert {"utils", "helpers", "common", "misc"}.isdisjoint(
        word for part in path.with_suffix("").parts for word in part.split("_")
    )


@pytest.mark.parametrize(
    ("path", "source", "found"),
    [
        ("reference/a.py", "import scipy.signal", ["scipy.signal"]),
        ("reference/a.py", "from fast import b", ["fast", "fast.b"]),
        ("reference/a.py", "import json, numpy.typing\nfrom reference.b import c\nfrom . import d", []),
        (
            "fast/a.py",
            "def f():\n    from search.cells.space import SearchSpace",
            ["search.cells.space", "search.cells.space.SearchSpace"],
        ),
        ("fast/a.py", "from ..search import space", ["search", "search.space"]),
        ("fast/a.py", "import torch, reference.cell", []),
        ("fast/a.py", "import triton.language as tl", ["triton.language"]),
        ("fast/kernels/a.py", "import triton", []),
        ("search/a.py", "import bench.run", ["bench.run"]),
        ("search/datasets/a.py", "from tests.strategies import cells", ["tests.strategies", "tests.strategies.cells"]),
        ("bench/run.py", "import search, fast, reference, bench.cases", []),
    ],
)
def test_forbidden_imports_are_noticed(path: str, source: str, found: list[str]) -> None:
    assert forbidden_imports(ast.parse(source), Path(path)) == found


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("import torch\ntorch.load(path)", [2]),
        ("torch.load(path, weights_only=False)", [1]),
        ("torch.load(path, weights_only=flag)", [1]),
        ("from torch import load as read\nread(path)", [2]),
        ("torch.load(path, weights_only=True)\nnp.load(path)\njson.load(file)", []),
    ],
)
def test_unsafe_loads_are_noticed(source: str, lines: list[int]) -> None:
    assert unsafe_loads(ast.parse(source)) == lines


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("torch.allclose(a, b)", [1]),
        ("same = np.allclose(a, b)", [1]),
        ("x = 1\na.double().allclose(b)", [2]),
        ("assert torch.allclose(a, b)\nassert all(x.allclose(y) for x, y in pairs)", []),
        ("np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)", []),
    ],
)
def test_unasserted_comparisons_are_noticed(source: str, lines: list[int]) -> None:
    assert unasserted_comparisons(ast.parse(source)) == lines


def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))
