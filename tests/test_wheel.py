"""What is in the wheel: one package, whose imports lead into itself, and which leaves the names of a user's project alone."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from hatch_build import FOLDERS, PACKAGE, moved, refuse_names_of_modules, write_package

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked as pip does."""
    hatchling = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is in the extra `test`")
    folder = tmp_path_factory.mktemp("wheel")
    (wheel,) = hatchling.WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from fast import kernels", "from dense_prediction_cell.fast import kernels"),
        ("def f():\n    from search.cells.space import (\n        load_cell)", None),
        ("if x: import fast.kernels as k", "if x: import dense_prediction_cell.fast.kernels as k"),
        ("import reference", "from dense_prediction_cell import reference"),
        ("import fast.kernels  # ρ", "import dense_prediction_cell.fast.kernels; from dense_prediction_cell import fast  # ρ"),
        ("import fastapi, searching\nfrom fastapi import fast\nfrom . import fast\nfrom .fast import y", "the same"),
        ('def f():\n    """Ré.\n\n    >>> from fast.x import y\n    """', None),
        ('"""By `python -m search.train`."""', '"""By `python -m dense_prediction_cell.search.train`."""'),
        ('x = "from fast import y"', "the same"),
    ],
)
def test_imports_lead_into_the_package(source: str, expected: str | None) -> None:
    if expected is None:
        expected = source.replace("from ", "from dense_prediction_cell.")
    assert moved(source, "x.py") == (source if expected == "the same" else expected)


@pytest.mark.parametrize(
    "source",
    [
        "x = 1\nimport json, fast",
        "x = 1\nfrom  fast import y",
        'x = 1\n"""\n>>> import json, search.cli\n"""',
        "1\nimport fast . kernels",
    ],
)
def test_an_import_that_cannot_be_moved_ends_the_build(source: str) -> None:
    with pytest.raises(ValueError, match=r"x\.py, line [23]: "):
        moved(source, "x.py")


@pytest.mark.parametrize("source", ['import_module("search.datasets.camvid")', 'f"python -m search.train {x}"'])
def test_a_name_of_a_module_in_a_string_ends_the_build(source: str) -> None:
    with pytest.raises(ValueError, match=r"x\.py, line 1: the string 'search\.\w+' names a module"):
        refuse_names_of_modules(source, "x.py")


def test_strings_that_name_no_module_are_let_through() -> None:
    refuse_names_of_modules('"""By `search.train`."""\nx = "a fast. And a fast search, in research.txt"', "x.py")


def test_a_file_of_an_unknown_kind_ends_the_build(tmp_path: Path) -> None:
    (tmp_path / f"{PACKAGE}.py").touch()
    (tmp_path / "fast").mkdir()
    (tmp_path / "fast" / "kernels.cu").touch()
    with pytest.raises(ValueError, match=r"fast.kernels\.cu: say in hatch_build\.py"):
        write_package(tmp_path, tmp_path / "package")


def test_the_wheel_holds_one_package_with_all_that_it_reads(site: Path) -> None:
    assert {path.name.partition("-")[0] for path in site.iterdir()} == {PACKAGE}
    package = site / PACKAGE
    assert (package / "py.typed").is_file()
    expected = {
        path.relative_to(ROOT)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".json", ".h", ".cpp", ".jinja", ".js"}
    }
    held = {path.relative_to(package) for path in package.rglob("*") if path.is_file()}
    assert held == expected | {Path("__init__.py"), Path("py.typed")}
    for path in package.rglob("*.py"):
        ast.parse(path.read_text(encoding="utf-8"))


def test_every_command_has_a_script() -> None:
    """`random` is `dpc-search`; the others have their own names."""
    files = (path for path in (ROOT / "search").glob("*.py") if "\n    run_command(" in path.read_text(encoding="utf-8"))
    commands = {path.stem for path in files} | {"datasets"}
    assert set(PROJECT["scripts"]) == {f"dpc-{name}" for name in commands - {"random"} | {"search"}}


def test_a_project_may_have_the_same_names(site: Path, tmp_path: Path) -> None:
    """It neither loses its own modules to the package nor gives the package its own, and PyTorch and NumPy are enough."""
    for name in ("fast", "bench", "reference"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("OWN = True")
    (tmp_path / "search.py").write_text("OWN = True")
    needless = [
        "filelock",
        "huggingface_hub",
        "jinja2",
        "optuna",
        "PIL",
        "safetensors",
        "scipy",
        "timm",
        "torchvision",
        "tyro",
    ]
    code = f"""
import sys
sys.path[:0] = [{str(tmp_path)!r}, {str(site)!r}]
sys.modules.update(dict.fromkeys({needless}))
import dense_prediction_cell as dpc
assert not {{"fast", "bench", "reference", "search"}} & sys.modules.keys()
import bench, fast, reference, search, torch
assert bench.OWN and fast.OWN and reference.OWN and search.OWN
context = dpc.DensePredictionCell(dpc.load_cell("dpc"), 4, branch_channels=4, cell_channels=6)
assert context(torch.zeros(1, 4, 5, 5)).shape == (1, 6, 5, 5)
print(dpc.__version__, dpc.__file__)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    version, file = done.stdout.split()
    assert (version, Path(file)) == (PROJECT["version"], site / PACKAGE / "__init__.py")


def test_installed_commands_name_themselves_by_their_scripts(site: Path, tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(site)!r})
sys.argv = ["/usr/bin/dpc-datasets", "check", "nowhere"]
from dense_prediction_cell import _run_script
_run_script()
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: dataset nowhere is unknown"), done.stderr
    help_text = subprocess.run(
        [sys.executable, "-P", "-c", code.replace('"check", "nowhere"', '"--help"')],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert help_text.startswith("usage: dpc-datasets ")
