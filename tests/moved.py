"""Writes the tests as tests of the installed package, with the imports that the wheel's own sources have.

    python -m tests.moved FOLDER && cd FOLDER && pytest tests/reference tests/fast

The folder also holds `bench/`, whose plain PyTorch is the tests' yardstick, and which is not in the wheel.
"""

import shutil
import sys
from pathlib import Path

from hatch_build import moved

ROOT = Path(__file__).parents[1]


def write_tests(folder: Path) -> None:
    """Write `tests/`, `bench/` and pytest's settings into the folder."""
    for name in ("tests", "bench"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"), copy_function=_copy
        )
    shutil.copyfile(ROOT / "pyproject.toml", folder / "pyproject.toml")


def _copy(source: str, target: str) -> None:
    if source.endswith(".py"):
        Path(target).write_text(moved(Path(source).read_text(encoding="utf-8"), source), encoding="utf-8")
    else:
        shutil.copyfile(source, target)


if __name__ == "__main__":
    write_tests(Path(sys.argv[1]))
