"""Make a tabular benchmark of cells, or write one in the forms of other libraries: `python -m search.tabulate`.

A search that tries every cell of a small space, with `--early-stopping asha --reduction-factor 1`, has the learning curve of
each of them. Searches with different seeds make a table, on which `search.compare` compares samplers in minutes.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from search.cli import print_next, run_command, spelled, to_type
from search.errors import InputError
from search.runs.study import load_run
from search.tabular.forms import SYNE_TUNE, write_forms
from search.tabular.table import CELLS_FILE, load_table, table_name, table_of_runs, write_table


@dataclass(frozen=True, kw_only=True)
class TabulateSettings:
    """Make a table of all cells of a space from searches, and write it for OptunaHub, mfpbench and Syne Tune."""

    runs: tuple[Path, ...] = ()
    """Folders of searches that tried all cells of one space, each with another seed."""
    table: str | None = None
    """In place of searches, a table to write for others: camvid, which comes with the project, or a file of this command."""
    out: Path = Path("runs/table")
    """Folder to write into."""


def main(settings: TabulateSettings) -> None:
    """Make or read the table, and write it in all forms."""
    if bool(settings.runs) == (settings.table is not None):
        raise InputError("give either `runs`, folders of searches, or `table`")
    path = settings.out / CELLS_FILE
    if settings.table is None:
        table = table_of_runs([load_run(directory) for directory in settings.runs])
        write_table(path, table)
        name = table_name(str(path))
    else:
        table, name = load_table(settings.table), table_name(settings.table)
    scores = f"{table.num_seeds} seeds, scored after {', '.join(f'{each:,}' for each in table.iterations)} iterations"
    print(f"{len(table.cells):,} cells, {scores}")
    if settings.table is None:
        print(f"table: {path}")
    written = write_forms(settings.out, table, name)
    print("\n".join(f"form: {folder}" for folder in written))
    if not any(folder.name == SYNE_TUNE for folder in written):
        needs = "two branches" if table.space.num_branches == 1 else "Syne Tune: pip install syne-tune fastparquet"
        print(f"{settings.out / SYNE_TUNE} is left out, which needs {needs}", file=sys.stderr)
    print_next(to_type("compare", *(["--table", path] if settings.table is None else ["--table", settings.table])))


if __name__ == "__main__":
    run_command(TabulateSettings, main, prog=spelled("tabulate"))
