"""Write an HTML page of a run again: `python -m search.report --run runs/shapes`.

With `--cells dpc mine.json head.safetensors` the page is of these cells: pictures, cost and latency.
"""

from dataclasses import dataclass
from pathlib import Path

from search.cli import Flat, print_next, run_command, spelled, to_type, uses_of_run
from search.datasets import is_named
from search.devices import resolve_device
from search.errors import InputError
from search.reports.cells import write_cell_report
from search.reports.run import write_report
from search.runs.study import best_head, load_run, ranked
from search.settings import CellSettings, DeviceSettings, OptimizerSettings, require, restored


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Write the report of a run again, or one of given cells: pictures, cost and latency."""

    run: Path | None = None
    """Folder of a run, such as runs/shapes."""
    cells: tuple[str, ...] = ()
    """Cells instead: linear, mlp, aspp, psp, dpc, JSON files of cells, head or network files (.safetensors)."""
    out: Path | None = None
    """Page to write for --cells. None: cells.html; that of a run is in its folder."""
    in_channels: tuple[int, ...] = (320,)
    """Channels of the features that cells without weights read: 320 of MobileNet-v2, 2048 of Xception; of several layers those
    of each, the deepest one first."""
    output_stride: int = 16
    """Pixels per feature, 4 to 32, for cells without weights; at 8 the rates double."""
    feature_size: tuple[int, int] = (65, 129)
    """Height and width of the map of --cells, for cost, latency and pictures. Default: a Cityscapes image's at stride 16."""
    cell: Flat[CellSettings] = CellSettings(branch_channels=256)
    device: Flat[DeviceSettings] = DeviceSettings()


def main(settings: ReportSettings) -> None:
    """Write the report and print its path."""
    if (settings.run is None) == (not settings.cells):
        raise InputError("give either `run` with a folder, or `cells`")
    device = resolve_device(settings.device.device)
    if settings.run is not None:
        if settings.out is not None:
            raise InputError(f"`out` is for `cells`: the report of a run is {settings.run / 'report.html'}")
        run = load_run(settings.run)
        print(f"report: {write_report(run, device)}")
        had = run.settings
        if ranked(run.trials) and is_named(had.data.dataset):
            proxy = restored(OptimizerSettings, run.identity)
            groups = had.data, had.backbone, had.head, had.loss, had.machine, proxy
            print_next(*uses_of_run(best_head(run.directory), *groups, of_two=run.cost_kind is not None))
        return
    _check(settings)
    out = settings.out or Path("cells.html")
    write_cell_report(
        out,
        settings.cells,
        in_channels=settings.in_channels,
        branch_channels=settings.cell.channels,
        output_stride=settings.output_stride,
        pooling=settings.cell.pooling,
        feature_size=settings.feature_size,
        device=device,
    )
    print(f"report: {out}")
    if cells := [cell for cell in settings.cells if not cell.endswith(".safetensors")]:
        print_next(to_type("random", "--compare", *cells))


def _check(settings: ReportSettings) -> None:
    settings.cell.check()
    require("output_stride", settings.output_stride, 4 <= settings.output_stride <= 32, "4 to 32")
    require("in_channels", settings.in_channels, min(settings.in_channels, default=0) >= 1, "at least 1 each")
    require("feature_size", settings.feature_size, min(settings.feature_size) >= 1, "at least 1 each")


if __name__ == "__main__":
    run_command(ReportSettings, main, prog=spelled("report"))
