"""The page of given cells, and what a run's page shows of its trained heads."""

import html
import re
from pathlib import Path

import pytest
import torch

import search.reports.run
from fast import DensePredictionCell, SegmentationHead
from fast.checkpoint import save_head
from reference.cell import Cell
from search.cells.space import load_cell
from search.errors import InputError
from search.report import ReportSettings, main
from search.reports.diagram import operation_colours
from search.reports.run import write_report
from tests.search.composed import changed, composed
from tests.search.test_report import BASELINES, make_run, visible_text

SETTINGS = composed(ReportSettings, cells=("dpc",), in_channels=(320,), feature_size=(5, 5), device="cpu")


def save_trained(path: Path, cell: Cell) -> DensePredictionCell:
    torch.manual_seed(0)
    context = DensePredictionCell(cell, 6, branch_channels=4, cell_channels=5, output_stride=8)
    with torch.no_grad():
        by_branch = context.weights().projection.weight.view(5, len(cell.branches), 4)
        by_branch.copy_(torch.arange(1.0, len(cell.branches) + 1)[:, None].expand_as(by_branch))
    save_head(path, SegmentationHead(context, 3), task={"class_names": ("a", "b", "c")}, backbone={})
    return context


def page_of(settings: ReportSettings) -> str:
    assert settings.out is not None
    main(settings)
    return settings.out.read_text(encoding="utf-8")


@pytest.mark.parametrize(("in_channels", "parameters"), [(320, "356,160"), (2048, "814,080")])
def test_parameters_are_those_of_table_1(tmp_path: Path, in_channels: int, parameters: str) -> None:
    text = visible_text(
        page_of(changed(SETTINGS, in_channels=(in_channels,), feature_size=(65, 65), out=tmp_path / "cells.html"))
    )
    assert f"{in_channels} → 256 {parameters}" in text
    assert "327,680" in text  # the projection
    assert "3×3 sep, rate 18×15" in text
    assert "513 positions read" in text
    assert re.search(r"on .+, 1 thread\. The cells took turns", text)
    assert "mean |weight|" not in text  # nothing was trained


def test_names_files_and_heads_stand_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(load_cell("psp").to_json(), encoding="utf-8")
    save_trained(tmp_path / "best.safetensors", load_cell("dpc"))
    cells = ("aspp", str(tmp_path / "mine.json"), str(tmp_path / "best.safetensors"))
    settings = changed(SETTINGS, cells=cells, in_channels=(8,), branch_channels=4, out=tmp_path / "new" / "cells.html")
    page = page_of(settings)
    text = visible_text(page)
    operations = [branch.operation for name in ("aspp", "psp", "dpc") for branch in load_cell(name).branches]
    chips = re.findall(r'class="chip" style="background: (#\w{6})"', page)
    assert chips == [operation_colours(operation)[0] for operation in operations]
    assert text.count("aspp, mine, best") == 1
    assert "output stride 8, trained weights" in text
    assert text.count("trained weights") == 1
    assert "6 → 4" in text
    assert page.count("Effective receptive field of the trained cell") == 1
    assert [f"{weight}.0000" in text for weight in range(1, 6)] == [True] * 5  # of the branches, by figure 5b
    assert not re.search(r'(href|src)="(?!data:|#)', page)


def test_a_page_of_cells_that_read_several_layers_or_have_no_branches(tmp_path: Path) -> None:
    head = tmp_path / "linear.safetensors"
    context = DensePredictionCell(Cell(()), (6, 3), branch_channels=4)
    save_head(head, SegmentationHead(context, 3), task={"class_names": ("a", "b", "c")}, backbone={})
    out, cells = tmp_path / "cells.html", ("mlp", "dpc", str(head))
    page = page_of(changed(SETTINGS, cells=cells, in_channels=(8, 2), branch_channels=4, out=out))
    text = visible_text(page)
    assert "8 + 2 → 4" in text  # of mlp
    assert "6 + 3 → 9" in text  # of the linear probe
    assert "F2 → 1" in text
    assert "batch norm alone" in text
    assert page.count("Effective receptive field of the trained cell") == 1


def test_a_cell_that_reads_a_layer_too_many_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "two.json"
    path.write_text(load_cell("mlp", 2).to_json())
    message = r"^`cells` .*two.json: the cell reads input -2, and the backbone gives 1 layer; give as many `in_channels`"
    with pytest.raises(InputError, match=message):
        main(changed(SETTINGS, cells=(str(path),), in_channels=(8,), out=tmp_path / "cells.html"))


def test_the_page_is_of_cells_on_the_given_map(tmp_path: Path) -> None:
    settings = changed(SETTINGS, in_channels=(4,), branch_channels=4, out=tmp_path / "cells.html")
    text = visible_text(page_of(changed(settings, feature_size=(17, 33))))
    assert "out of reach on the 17×33 map: rate 18×15 of branch 1 (height)" in text
    assert "positions read of 17 × 33" in text
    page = page_of(changed(settings, feature_size=(65, 129)))
    assert "on the 65×129 map" not in visible_text(page)
    assert "513 positions read of 65 × 129" in visible_text(page)


def test_equal_names_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "<cell>.json").write_text(load_cell("psp").to_json(), encoding="utf-8")
    names = tuple(str(tmp_path / folder / "<cell>.json") for folder in ("one", "two"))
    page = page_of(changed(SETTINGS, cells=names, in_channels=(4,), branch_channels=4, out=tmp_path / "cells.html"))
    assert all(html.escape(name) in page for name in names)
    assert "<cell>" not in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cells": ()}, "give either `run` with a folder, or `cells`"),
        ({"run": Path("runs")}, "give either `run` with a folder, or `cells`"),
        ({"cells": ("nobody",)}, "there is no cell 'nobody'"),
        ({"cells": ("nobody.safetensors",)}, "nobody.safetensors cannot be read as safetensors"),
        ({"output_stride": 3}, "`output_stride` must be 4 to 32, got 3"),
        ({"in_channels": (8, 0)}, "`in_channels` must be at least 1 each, got (8, 0)"),
        ({"in_channels": ()}, "`in_channels` must be at least 1 each, got ()"),
        ({"branch_channels": 0}, "`branch_channels` must be at least 1, got 0"),
        ({"feature_size": (0, 5)}, "`feature_size` must be at least 1 each, got (0, 5)"),
        ({"device": "abacus"}, "`device` abacus cannot be used"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=re.escape(message)):
        main(changed(SETTINGS, **change))
    assert list(tmp_path.iterdir()) == []


def test_windows_pinned_larger_than_the_map_are_refused(tmp_path: Path) -> None:
    context = DensePredictionCell(load_cell("aspp"), 3, branch_channels=4, cell_channels=4, pooling_size=(9, 9))
    path = tmp_path / "head.safetensors"
    save_head(path, SegmentationHead(context, 1), task={"class_names": ("a",)}, backbone={})
    with pytest.raises(InputError, match=r"head\.safetensors does not fit `feature_size` 5 5: pooling window of 9"):
        main(changed(SETTINGS, cells=(str(path),), out=tmp_path / "cells.html"))


def test_a_runs_page_shows_what_its_heads_have_learned(tmp_path: Path) -> None:
    run = make_run(tmp_path, [0.30, 0.45, None, 0.25], BASELINES | {"trial 1": [0.44]})
    for file, cell in {"best": run.trials[1].cell, "aspp_seed0": load_cell("aspp"), "dpc_seed0": load_cell("psp")}.items():
        save_trained(tmp_path / "heads" / f"{file}.safetensors", cell)
    page = write_report(run, "cpu").read_text(encoding="utf-8")
    assert page.count("Effective receptive field of the trained cell") == 2  # dpc's head is not of that cell
    text = visible_text(page)
    assert "ASPP, seed 0" in text
    assert "one image's features of 17 × 33, float32" in text
    # trials 1, 0 and 3, ASPP, DPC, and trial 1 again: a median and its spread in each row
    assert len(re.findall(r"\d+ (?:K|M) [\d.]+ [\d.]+–[\d.]+ 12\.3", text)) == 6


def test_without_heads_or_device_no_latency_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, [0.30], BASELINES)
    monkeypatch.setattr(search.reports.run, "measure_latencies", lambda *_, **__: pytest.fail("must not run"))
    assert "latency" not in visible_text(write_report(run, "cpu").read_text(encoding="utf-8")).lower()
    save_trained(tmp_path / "heads" / "best.safetensors", run.trials[0].cell)
    assert "latency" not in visible_text(write_report(run).read_text(encoding="utf-8")).lower()


def test_a_damaged_head_is_refused_by_name(tmp_path: Path) -> None:
    run = make_run(tmp_path, [0.4])
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "best.safetensors").write_bytes(b"not a head")
    with pytest.raises(InputError, match=r"best\.safetensors cannot be read .*delete it"):
        write_report(run)
