"""Count iterations in compiled code and write their tables to bench/predictions/: `python -m bench.counted`.

With --check nothing is written; the exit code is 1 if a kernel's instructions are no longer those of the tables.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

os.environ["TRITON_INTERPRET"] = "0"  # read when Triton is imported: here kernels are compiled

from bench.counted.table import TABLES, Counter, Row, counted, differences, path_of, read_rows, sum_of, summary
from bench.profiles import PREDICTIONS
from bench.results import write_table
from search.files import write_text


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser("python -m bench.counted", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the tables instead of writing them")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), metavar="TABLE", help=" ".join(TABLES))
    options = parser.parse_args(arguments)
    try:
        return count(options.tables, only_check=options.check)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        print(f"{error.filename or PREDICTIONS}: {error.strerror or error}; `git checkout bench/predictions` restores tables")
        return 1


def count(tables: Sequence[str], *, only_check: bool) -> int:
    """Count these tables; write them, or compare; returns the exit code. Raises OSError."""
    counter, found = Counter(architecture=90), dict[str, list[Row]]()
    for name in tables:
        found[name] = counted(name, counter)
        print(f"{name}: {sum_of(found[name])}", flush=True)
    if only_check:
        return check(found)
    for name, rows in found.items():
        write_table(path_of(name), Row._fields, rows)
    all_tables = {name: read_rows(path_of(name)) for name in TABLES}
    write_text(PREDICTIONS / "summary.md", summary(all_tables))
    print(f"wrote {PREDICTIONS}")
    return 0


def check(found: Mapping[str, list[Row]]) -> int:
    """Say where the tables are no longer true; returns the exit code."""
    lines = [f"{name}: {line}" for name, rows in found.items() for line in differences(read_rows(path_of(name)), rows)]
    for line in lines:
        print(line)
    if lines:
        print("If this is meant to be so, write the tables anew: python -m bench.counted")
    else:
        print("as the tables say")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
