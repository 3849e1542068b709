"""The pictures of docs/definitions.md as files for slides: `python docs/draw_definitions.py --format svg pdf --out slides`."""

import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest

DRAWING = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "draw_definitions.py"))
SVG = "{http://www.w3.org/2000/svg}"
POINTS = 72 * DRAWING["WIDTH"]


@pytest.mark.parametrize("name", DRAWING["PICTURES"])
def test_picture_is_one_page_as_wide_as_the_others(name: str, tmp_path: Path) -> None:
    DRAWING["main"](["--format", "svg", "pdf", "--out", str(tmp_path / "slides"), "--pictures", name])
    svg, pdf = (tmp_path / "slides" / f"{name}.{suffix}" for suffix in ("svg", "pdf"))
    assert sorted(path.name for path in svg.parent.iterdir()) == [pdf.name, svg.name]  # and nothing half-written
    assert svg.stat().st_size < 2_000_000
    assert pdf.stat().st_size < 1_500_000

    root = ElementTree.parse(svg).getroot()
    assert root.tag == f"{SVG}svg"
    assert float(root.attrib["width"].removesuffix("pt")) == pytest.approx(POINTS, abs=1)  # pixels at its edges may be cut
    assert root.find(f".//{SVG}text") is None  # which would take another font elsewhere
    assert root.find(f".//{SVG}path") is not None

    content = pdf.read_bytes()
    assert content.startswith(b"%PDF")
    assert len(re.findall(rb"/Type /Page\b", content)) == 1
    (box,) = re.findall(rb"/MediaBox \[ ?0 0 ([\d.]+) ", content)
    assert float(box) == pytest.approx(POINTS, abs=1)
    assert b"/FontFile2" in content  # fonts are in the file
    assert b"/Type3" not in content


@pytest.mark.parametrize("name", ["batch_norm", "depth"])  # random numbers, maps
def test_two_runs_draw_the_same_bytes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, date in (("first", "0"), ("second", "86400")):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", date)  # what Matplotlib takes for today
        DRAWING["draw_all"](tmp_path / folder, [name], ("svg", "pdf"))
    for file in (f"{name}.svg", f"{name}.pdf"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "svg"], "--out is missing"),
        (["--format", "bmp", "--out", "slides"], "invalid choice: 'bmp'"),
        (["--pictures", "no_such_picture"], "invalid choice: 'no_such_picture'"),
        (["--out", "a_file/slides", "--pictures", "context"], "cannot be written"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    with pytest.raises(SystemExit, match="2"):
        DRAWING["main"](arguments)
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]
