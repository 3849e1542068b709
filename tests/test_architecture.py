"""Holds the arrows reference <- fast <- search <- bench, and a few rules that no linter knows, by reading the source."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from reference.cell import Operation

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {  # of the project's own folders
    "reference": {"reference"},
    "fast": {"reference", "fast"},
    "search": {"reference", "fast", "search"},
    "bench": {"reference", "fast", "search", "bench"},
    "docs": {"reference", "fast", "search", "docs"},
    "tests": {"reference", "fast", "search", "bench", "docs", "tests"},
}
OF_THE_ASSIGNMENT = {"reference", "docs", "tests"}  # with NumPy alone; `tests` for the authors' numbers in tests/golden/
# The rooms of search/, from the top: each may import those below it and itself, and whatever stands on the same floor.
# Files that lie directly in search/ are commands, which nobody imports, unless they are named as the ground floor.
FLOORS: list[set[str]] = [
    {"pipeline"},
    {"reports"},
    {"tabular"},
    {"runs"},
    {"tasks"},
    {"training", "tensorflow"},
    {"backbones"},
    {"datasets", "cells"},
    {"dense_tasks"},
    {"settings", "devices", "folder", "turns"},
    {"errors", "files", "interrupts", "commands"},
]
CLI_LIBRARY, CLI = "tyro", "search.cli"
KNOW_A_TASK = ("dense_tasks", "datasets", "tensorflow", "convert")  # the last two read networks for segmentation
OF_ONE_TASK = re.compile(
    r"class_names|palette|label_ids|IGNORE_INDEX|(?<![a-z])m?iou(?![a-z])|confusion|cross_entropy|dense_tasks\.(segmentation|depth)"
    r"|depth_scale|depth_metrics|upsampled_l1|rmse",
    re.IGNORECASE,
)
OPERATIONS = {kind.__name__ for kind in get_args(Operation)}
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
    is_assignment = path.parts[:2] == ("docs", "assignment")
    allowed = OF_THE_ASSIGNMENT if is_assignment else MAY_IMPORT[folder]
    found = []
    for name in imports(tree, path):
        top = name.split(".")[0]
        third_party = top not in MAY_IMPORT and top not in sys.stdlib_module_names
        if (
            (top in MAY_IMPORT and top not in allowed)
            or ((folder == "reference" or is_assignment) and third_party and top != "numpy")
            or (folder != "tests" and top == "triton" and path.parts[:2] != ("fast", "kernels"))
        ):
            found.append(name)
    return found


def floor_of(module: str) -> int | None:
    """Which floor of search/ a module stands on: 0 a command or the parser of flags, None outside search/."""
    parts = module.split(".")
    if parts[0] != "search" or len(parts) < 2:
        return None
    if parts[-1] == "__main__":
        return 0
    return next((floor for floor, rooms in enumerate(FLOORS, start=1) if parts[1] in rooms), 0)


def upward_imports(tree: ast.AST, path: Path) -> list[str]:
    """What a module of search/ imports from a floor above its own, from a command, or of the library of flags."""
    floor = floor_of(".".join(path.with_suffix("").parts))
    found = []
    for name in imports(tree, path):
        other = floor_of(name)
        is_cli = name == CLI or name.startswith(f"{CLI}.")
        is_command = other == 0 and not is_cli
        is_flags = name.split(".")[0] == CLI_LIBRARY or is_cli
        is_above = floor is not None and other is not None and 0 < other < floor
        if is_command or is_above or (floor != 0 and is_flags):
            found.append(name)
    return found


def flags_in_strings(tree: ast.AST) -> list[str]:
    """Flags in the words of a module, but for commands that are `spelled` with them; parts speak of fields, `crop_size`."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body and isinstance(node.body[0], ast.Expr)
    }
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    texts = [
        "".join(str(part.value) for part in getattr(node, "values", [node]) if isinstance(part, ast.Constant))
        for node in ast.walk(tree)
        if (isinstance(node, ast.JoinedStr) and "spelled" not in map(called_name, ast.walk(node)))
        or (isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings | parts)
    ]
    return [flag for text in texts for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)]


def words_of_one_task(tree: ast.AST) -> list[str]:
    """Imports, names and texts, apart from docstrings, that only one dense task has a use for."""
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)}
    words = list(imports(tree, Path("search")))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute | ast.arg | ast.keyword | ast.FunctionDef | ast.ClassDef):
            words.append(str(getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "arg", None)))
            words.append(str(getattr(node, "name", "")))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            words.append(node.value)
    return [word for word in dict.fromkeys(words) if OF_ONE_TASK.search(word)]


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


def open_decisions(tree: ast.AST) -> list[int]:
    """Lines that decide on an operation otherwise than by a `match` that ends in `case _: assert_never(...)`.

    Only such a match is named by mypy when an operation is added. `isinstance` with one of them decides otherwise; a pattern
    inside another one is no decision but asks a case for a field, as in `OperationCase(operation=AtrousSeparableConv(rate))`.
    """
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Match) and any(map(is_of_an_operation, node.cases)) and not is_closed(node):
            lines.append(node.lineno)
        if isinstance(node, ast.Call) and called_name(node) in {"isinstance", "issubclass"} and names_an_operation(node):
            lines.append(node.lineno)
    return lines


def is_of_an_operation(case: ast.match_case) -> bool:
    patterns = case.pattern.patterns if isinstance(case.pattern, ast.MatchOr) else [case.pattern]
    return any(isinstance(pattern, ast.MatchClass) and names_an_operation(pattern.cls) for pattern in patterns)


def is_closed(match: ast.Match) -> bool:
    last = match.cases[-1]
    is_rest = isinstance(last.pattern, ast.MatchAs) and last.pattern.pattern is None and last.guard is None
    return is_rest and isinstance(last.body[0], ast.Expr) and called_name(last.body[0].value) == "assert_never"


def names_an_operation(node: ast.AST) -> bool:
    names = {part.id if isinstance(part, ast.Name) else getattr(part, "attr", "") for part in ast.walk(node)}
    return not OPERATIONS.isdisjoint(names)


def test_sources_are_found() -> None:
    assert {path.parts[0] for path in SOURCES} >= {"reference", "fast", "search", "tests"}


@every_source
def test_imports_follow_the_arrows(path: Path) -> None:
    assert forbidden_imports(parse(path), path) == []


@every_source
def test_imports_in_search_lead_downwards(path: Path) -> None:
    assert path.parts[0] == "tests" or upward_imports(parse(path), path) == []


@every_source
def test_parts_speak_of_fields_not_of_flags(path: Path) -> None:
    if floor_of(".".join(path.with_suffix("").parts)):
        assert flags_in_strings(parse(path)) == []


@every_source
def test_the_rest_of_search_does_not_know_its_task(path: Path) -> None:
    if path.parts[0] == "search" and path.with_suffix("").parts[1] not in KNOW_A_TASK:
        assert words_of_one_task(parse(path)) == []


@every_source
def test_torch_loads_weights_only(path: Path) -> None:
    assert unsafe_loads(parse(path)) == []


@every_source
def test_comparisons_are_asserted(path: Path) -> None:
    assert path.parts[0] != "tests" or unasserted_comparisons(parse(path)) == []


@every_source
def test_decisions_on_an_operation_are_closed(path: Path) -> None:
    assert path.parts[0] == "tests" or open_decisions(parse(path)) == []


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
        ("docs/a.py", "import bench.run, tests.golden, search.cells", ["bench.run", "tests.golden"]),
        ("docs/assignment/a.py", "import torch, fast, numpy, tests.golden", ["torch", "fast"]),
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
    ("path", "source", "found"),
    [
        ("search/cells/a.py", "from search.settings import known", []),
        ("search/cells/a.py", "import search.datasets.camvid", []),
        ("search/cells/a.py", "import search.training.loop", ["search.training.loop"]),
        ("search/runs/a.py", "def f():\n    from search.random import main", ["search.random", "search.random.main"]),
        ("search/runs/a.py", "import tyro", ["tyro"]),
        ("search/runs/a.py", "from search.cli import Flat", ["search.cli", "search.cli.Flat"]),
        ("search/random.py", "from search.cli import Flat\nimport tyro\nfrom search.reports.run import write_report", []),
        ("search/random.py", "from search.train import main", ["search.train", "search.train.main"]),
        ("search/datasets/__main__.py", "from search.cli import run_command\nimport search.datasets.check", []),
        ("bench/a.py", "from search.tasks.proxy import ProxyTask", []),
        ("bench/a.py", "from search.random import main", ["search.random", "search.random.main"]),
        ("search/random.py", "import search.client", ["search.client"]),
    ],
)
def test_upward_imports_are_noticed(path: str, source: str, found: list[str]) -> None:
    assert upward_imports(ast.parse(source), Path(path)) == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('raise InputError(f"--crop-size {size} is too large")', ["--crop-size"]),
        ('raise InputError("`crop_size` is too large")', []),
        ('def f():\n    """Flags such as --crop-size."""', []),
        ("text = f'`{spelled(\"datasets check\")} --data-dir {folder}`'", []),
        ('text = "|---|---|"', []),
    ],
)
def test_flags_in_strings_are_noticed(source: str, found: list[str]) -> None:
    assert flags_in_strings(ast.parse(source)) == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from fast.mean_iou import confusion_matrix", ["fast.mean_iou", "fast.mean_iou.confusion_matrix"]),
        ("import search.dense_tasks.depth", ["search.dense_tasks.depth"]),
        ("from search.dense_tasks import Scores\nprint(task.score.name)", []),
        ("def f(class_names): return run.palette", ["palette", "class_names"]),
        ("x = {'mean_iou': 1}", ["mean_iou"]),
        ("x = 'best mIOU'", ["best mIOU"]),
        ('def f():\n    """The mIOU."""\n    previous = 0', []),
    ],
)
def test_words_of_one_task_are_noticed(source: str, found: list[str]) -> None:
    assert sorted(words_of_one_task(ast.parse(source))) == sorted(found)


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("search.cells.space", "tyro"),
        ("search, search.settings", "optuna"),
        ("search.pipeline", "tyro"),
        ("search.random", "matplotlib, scipy"),
        ("search", "torch"),
        ("search.tasks.proxy, search.training.loop", "tyro"),
        ("fast.dense_prediction_cell, fast", "timm, torchvision"),
        ("dense_prediction_cell", "timm, safetensors"),
    ],
)
def test_who_wants_a_part_does_not_load_the_rest(modules: str, absent: str) -> None:
    """In a process of its own, which has not loaded anything yet."""
    code = f"import sys, {modules}; print([name for name in {absent.split(', ')} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "[]\n"


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


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("if isinstance(operation, AtrousSeparableConv):\n    pass", [1]),
        ("x = 1\ny = isinstance(operation, cell.Conv1x1 | PyramidPooling)", [2]),
        ("match operation:\n    case Conv1x1():\n        pass", [1]),
        ("match operation:\n    case Conv1x1():\n        pass\n    case _:\n        pass", [1]),
        ("match operation:\n    case Conv1x1() | PyramidPooling():\n        pass\n    case other:\n        use(other)", [1]),
        ("match operation:\n    case cell.Conv1x1():\n        pass\n    case _:\n        assert_never(operation)", []),
        ("match case:\n    case OperationCase(operation=AtrousSeparableConv(rate)):\n        use(rate)", []),
        ("isinstance(case, OperationCase)\nmatch name:\n    case 'paper':\n        pass", []),
    ],
)
def test_open_decisions_are_noticed(source: str, lines: list[int]) -> None:
    assert open_decisions(ast.parse(source)) == lines


def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))
