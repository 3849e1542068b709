import re
from pathlib import Path

import pytest

from search.diagram import DiagramSettings, main
from search.errors import InputError
from tests.search.reports.test_diagram import random_cell, texts


@pytest.mark.parametrize(("suffix", "magic"), [(".svg", b"<?xml"), (".png", b"\x89PNG"), (".pdf", b"%PDF")])
def test_command_writes_the_picture(tmp_path: Path, suffix: str, magic: bytes) -> None:
    output = tmp_path / f"cell{suffix}"
    main(DiagramSettings("dpc", output))
    assert output.read_bytes().startswith(magic)
    if suffix == ".svg":
        assert texts(output.read_text(encoding="utf-8"))["rate 18×15"] == 1


@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf"])
def test_two_runs_write_the_same_bytes(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, date in (("first", "0"), ("second", "86400")):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", date)  # what Matplotlib takes for today
        main(DiagramSettings("aspp", tmp_path / f"{name}{suffix}"))
    assert (tmp_path / f"first{suffix}").read_bytes() == (tmp_path / f"second{suffix}").read_bytes()


def test_command_reads_a_cell_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(random_cell(3, 0).to_json(), encoding="utf-8")
    main(DiagramSettings(str(tmp_path / "mine.json"), tmp_path / "mine.png"))
    assert (tmp_path / "mine.png").exists()


@pytest.mark.parametrize(
    ("cell", "output", "message"),
    [
        ("dpc", "cell.bmp", "ends in .svg, .png or .pdf"),
        ("dpc", "no/such/cell.svg", "cannot be written"),
        ("x", "x.svg", "'x'"),
    ],
)
def test_command_refuses_bad_input(tmp_path: Path, cell: str, output: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        main(DiagramSettings(cell, tmp_path / output))
    assert list(tmp_path.iterdir()) == []
