"""How a user starts the commands: `python -m search.train` in a checkout, `dpc-train` where the package is installed."""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

PACKAGE = __name__.rpartition(".")[0]  # of the commands; in the installed package it lies inside another one
IS_INSTALLED = "." in PACKAGE
DISTRIBUTION = "dense-prediction-cell"
_SCRIPTS = {"random": "search"}  # dpc-search; the script of every other command has the command's name


def spelled(command: str) -> str:
    """How a user types the command, which may have a word behind it: "train" or "datasets check"."""
    name, _, rest = command.partition(" ")
    start = f"dpc-{_SCRIPTS.get(name, name)}" if IS_INSTALLED else f"python -m {PACKAGE}.{name}"
    return f"{start} {rest}".rstrip()


def to_install(extra: str) -> str:
    """How a user installs the extra."""
    return f"pip install '{DISTRIBUTION}[{extra}]'" if IS_INSTALLED else f"pip install -e '.[{extra}]'"


def run_script() -> None:
    """Run the command of the script that was started, as `python -m` does: dpc-train runs `train`."""
    explain_missing_packages()
    script = Path(sys.argv[0]).stem.removeprefix("dpc-")
    command = next((command for command, name in _SCRIPTS.items() if name == script), script)
    runpy.run_module(f"{PACKAGE}.{command}", run_name="__main__", alter_sys=True)


def explain_missing_packages() -> None:
    """Let this process end in a sentence, and not in a traceback, where a package is missing."""
    sys.excepthook = _explain


def _explain(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if missing and find_spec(missing) is None:
        print(f"error: the Python package {missing} is missing: {to_install('search')}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)
