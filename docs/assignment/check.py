"""Checks an assignment: `python docs/assignment/check.py [--only STEP] [FILE]`, in a clone, with Python 3.11 and NumPy alone.

Exit status: 0 if every step that was checked passed, 1 if not, 2 if the command was not understood.
"""

from __future__ import annotations  # so that older Pythons get as far as to say that they are too old

import argparse
import contextlib
import importlib.util
import io
import json
import math
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from docs.assignment.grading import Result
    from docs.assignment.steps import Step

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WIDTH = 79
MARKS = {"passed": "passed", "failed": "FAILED", "not yet written": "not yet written"}


def main(arguments: list[str] | None = None) -> int:
    """Check a file, print, and return the exit status."""
    missing = _missing(sys.version_info[:2])
    if missing:
        print(f"error: {missing}", file=sys.stderr)
        return 2
    _import_from_this_clone()
    from docs.assignment.grading import grade
    from docs.assignment.steps import STEPS
    from docs.assignment.student import Fault, NotWrittenError, Student

    options = _options(arguments, STEPS)
    chosen = [step for i, step in enumerate(STEPS, 1) if not options.only or {step.name, str(i)} & set(options.only)]
    report = _Json() if options.json else _Text([step.name for step in STEPS])
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        try:
            student = Student(options.file)
        except (Fault, NotWrittenError) as error:
            said = (
                f"{options.file.name} raises NotImplementedError while it is loaded."
                if type(error) is NotWrittenError
                else error
            )
            print(f"error: {said}", file=sys.stderr)
            report.refuse(options.file, str(said), sum(step.points for step in chosen))
            return 1
        report.begin(options.file, student.uses())
        known: list[Any] = []
        results: list[Result] = []
        for step in chosen:
            failed = [result.step.name for result in results if result.status == "failed"]
            results.append(grade(student, step, known, failed))
            report.step(results[-1])
    report.end(results)
    return 0 if all(result.status == "passed" for result in results) else 1


class _Text:
    """The report for people, 79 columns wide."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def begin(self, file: Path, uses: list[str]) -> None:
        print(f"Dense Prediction Cell, {file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file}")
        for name in uses:
            print(f"Note: this file uses {name}. The assignment is to be written in NumPy alone.")
        print()

    def refuse(self, file: Path, said: str, of: int) -> None:
        """It stands on the standard error already."""

    def step(self, result: Result) -> None:
        number = self.names.index(result.step.name) + 1
        points = f"{result.points}/{result.step.points}"
        line = f"{number:2} {result.step.name:20} {MARKS[result.status]:16} {points:>5}"
        if result.status == "passed":
            line += f"   {_errors(result.errors)}"
        print(line.rstrip(), flush=True)
        if result.status == "not yet written":
            names = [name for name in result.sentences if name not in result.step.functions]
            self._indented(f"Needs {'; '.join(names)}." if names else "")
        else:
            for sentence in result.sentences:
                self._indented(sentence)
        for remark in result.remarks:
            self._indented(f"Remark: {remark}")

    def end(self, results: list[Result]) -> None:
        total, possible = sum(result.points for result in results), sum(result.step.points for result in results)
        print(f"\n{total} of {possible} points.", end="")
        left = [result for result in results if result.status != "passed"]
        if left:
            step = left[0].step
            print(f" Next: {step.name}, docs/definitions.md#{step.anchor}")
        elif len(results) == len(self.names):
            print(" This computes what the authors' code does.")
        else:
            print()

    def _indented(self, text: str) -> None:
        if text:
            print(
                textwrap.fill(
                    text,
                    WIDTH,
                    initial_indent=" " * 5,
                    subsequent_indent=" " * 7,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            )


class _Json:
    """The report for programs: one object."""

    def __init__(self) -> None:
        self.head: dict[str, Any] = {}
        self.output = sys.stdout  # as it is now: what students print goes elsewhere

    def begin(self, file: Path, uses: list[str]) -> None:
        self.head = {"file": str(file), "uses": uses}

    def refuse(self, file: Path, said: str, of: int) -> None:
        self.output.write(json.dumps({"file": str(file), "error": said, "points": 0, "of": of, "steps": []}, indent=1) + "\n")

    def step(self, result: Result) -> None:
        """All at the end."""

    def end(self, results: list[Result]) -> None:
        steps = [
            {
                "step": result.step.name,
                "status": result.status,
                "points": result.points,
                "of": result.step.points,
                "errors": {source: error if math.isfinite(error) else None for source, error in result.errors.items()},
                "sentences": result.sentences,
                "misreadings": [[part.name for part in each] for each in result.misreadings],
                "remarks": result.remarks,
            }
            for result in results
        ]
        total = {"points": sum(result.points for result in results), "of": sum(result.step.points for result in results)}
        print(json.dumps(self.head | total | {"steps": steps}, indent=1))


def _errors(errors: dict[str, float]) -> str:
    """The largest relative error, by whose values were expected."""
    return ", ".join(f"{source} {errors[source]:.0e}" for source in ("authors", "reference") if source in errors)


def _options(arguments: list[str] | None, steps: tuple[Step, ...]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="check.py", description="Check the assignment on the Dense Prediction Cell.")
    parser.add_argument(
        "file", type=Path, nargs="?", default=HERE / "dpc.py", metavar="FILE", help="default: dpc.py, beside this"
    )
    parser.add_argument(
        "--only", action="append", metavar="STEP", help="check this step alone: name or number; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    options = parser.parse_args(arguments)
    known = {name for i, step in enumerate(steps, 1) for name in (step.name, str(i))}
    for name in options.only or []:
        if name not in known:
            parser.error(f"no step {name!r}; the steps are {', '.join(step.name for step in steps)}, or 1 to {len(steps)}")
    if not options.file.is_file():
        parser.error(f"there is no file {options.file}")
    return options


def _missing(version: tuple[int, int]) -> str:
    """What has to be there first."""
    if version < (3, 11):
        return "Python 3.11 or newer is needed, this is {}.{}".format(*version)
    return "" if importlib.util.find_spec("numpy") else "NumPy is missing: pip install numpy"


def _import_from_this_clone() -> None:
    """Find the clone's folders. `docs` and `tests` are no packages, so installed packages of these names would hide them."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    for name in ("docs", "tests"):
        if name not in sys.modules:
            folder = ModuleType(name)
            folder.__path__ = [str(ROOT / name)]
            sys.modules[name] = folder


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no ε
    try:
        status = main()
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        sys.stdout = None
        status = 1
    sys.exit(status)
