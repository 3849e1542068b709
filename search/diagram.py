"""A cell as a picture: `python -m search.diagram --cell dpc --out cell.svg` draws its graph beside its receptive field."""

from dataclasses import dataclass
from pathlib import Path

from search.cells.space import load_cell
from search.cli import print_next, run_command, spelled, to_type
from search.errors import InputError
from search.reports.diagram import cell_and_receptive_field_figure, save_figure
from search.settings import require


@dataclass(frozen=True)
class DiagramSettings:
    """Draw a cell beside its receptive field."""

    cell: str = "dpc"
    """dpc, aspp, psp, or the path of a cell's JSON file."""
    out: Path = Path("cell.svg")
    """Picture to write; the suffix says how: .svg, .png or .pdf."""
    feature_size: tuple[int, int] = (65, 65)
    """Height and width of the features whose paths to the centre are drawn: (pixels - 1) / output stride + 1, or
    with patches pixels / output stride."""


def main(settings: DiagramSettings) -> None:
    """Write the picture. Raises InputError for an unknown cell, suffix or folder."""
    cell = load_cell(settings.cell)
    if settings.out.suffix not in (".svg", ".png", ".pdf"):
        raise InputError(f"`out` {settings.out}: give a file that ends in .svg, .png or .pdf")
    require("feature_size", settings.feature_size, min(settings.feature_size) >= 1, "at least 1 each")
    figure = cell_and_receptive_field_figure(cell, settings.feature_size)
    try:
        save_figure(figure, settings.out, settings.out.suffix[1:])
    except OSError as error:
        raise InputError(f"`out` {settings.out}: cannot be written ({error.strerror}); choose another place") from error
    print(f"picture: {settings.out}")
    print_next(to_type("report", "--cells", settings.cell, "--feature-size", *settings.feature_size))


if __name__ == "__main__":
    run_command(DiagramSettings, main, prog=spelled("diagram"), renamed={"--output": "--out"})
