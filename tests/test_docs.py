import ast
import re
import runpy
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from bench.costs import MapSize, operation_cost
from bench.costs import cell_cost as least_cost
from reference.cell import BACKBONE_FEATURE, AtrousSeparableConv, Branch, Cell, Conv1x1, Operation, PyramidPooling
from reference.grid import Grid
from search.cells.cost import cell_cost
from search.cells.space import load_cell

ROOT = Path(__file__).parents[1]
DEFINITIONS = ROOT / "docs" / "definitions.md"
DRAWING = runpy.run_path(str(ROOT / "docs" / "draw_definitions.py"))
HIDDEN_OR_INSTALLED = re.compile(r"(^|/)(\.|site-packages/|node_modules/|runs/)")

MARKDOWN_FILES = sorted(
    path for path in ROOT.rglob("*.md") if not HIDDEN_OR_INSTALLED.search(path.relative_to(ROOT).as_posix())
)
# A fenced block of Python is an excerpt of the file whose link stands on the line above it.
EXCERPT = re.compile(r"\[`(?P<named>[^`\n]+)`\]\((?P<link>[^)\n]+)\)\n\n```python\n(?P<code>.*?)```", re.DOTALL)
CELL = re.compile(r"\[`(?P<named>[^`\n]+)`\]\([^)\n]+\)\n\n```json\n(?P<text>.*?)```", re.DOTALL)  # likewise a cell's file
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)|<(?:a|img|source)\s[^>]*?(?:src|href)=\"(?P<html>[^\"]+)\"")


def without_docstrings(source: str) -> list[str]:
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            for i in range(docstring.lineno - 1, docstring.end_lineno or docstring.lineno):
                lines[i] = "\0"
    return [line for line in lines if line != "\0"]


def occurs(excerpt: str, source: str) -> bool:
    """Whether the excerpt is a run of whole lines of the source, up to common indentation and docstrings."""
    wanted = textwrap.dedent(excerpt).splitlines()
    lines = without_docstrings(source)
    windows = (lines[i : i + len(wanted)] for i in range(len(lines) - len(wanted) + 1))
    return any(textwrap.dedent("\n".join(window)).splitlines() == wanted for window in windows)


def prose(path: Path) -> str:
    """The file without its code, which may contain brackets that are not links."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<!\[)`[^`\n]*`(?!\])", "", text)


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to a file's headings."""
    headings = re.findall(r"^#+ +(.*?)\s*$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_occurs_ignores_docstrings_and_indentation_but_no_change() -> None:
    source = 'def double(x):\n    """Twice x."""\n    y = 2 * x\n    return y\n'
    assert occurs("def double(x):\n    y = 2 * x\n", source)
    assert occurs("y = 2 * x\nreturn y\n", source)
    assert not occurs("y = 3 * x\n", source)
    assert not occurs("y = 2 * x\n    return y\n", source)


def test_every_python_block_is_an_excerpt_of_the_file_it_names() -> None:
    text = DEFINITIONS.read_text(encoding="utf-8")
    excerpts = list(EXCERPT.finditer(text))
    assert len(excerpts) == len(re.findall(r"^```python", text, flags=re.MULTILINE)) > 0
    for excerpt in excerpts:
        source = (DEFINITIONS.parent / excerpt["link"]).resolve()
        assert source == ROOT / excerpt["named"]
        assert occurs(excerpt["code"], source.read_text(encoding="utf-8")), f"not in {excerpt['named']}:\n{excerpt['code']}"


def test_every_reference_file_is_explained() -> None:
    text = DEFINITIONS.read_text(encoding="utf-8")
    missing = [path.name for path in (ROOT / "reference").glob("[a-z]*.py") if f"](../reference/{path.name})" not in text]
    assert not missing


def test_every_section_is_in_the_contents() -> None:
    text = DEFINITIONS.read_text(encoding="utf-8")
    contents = text[: text.index("\n## ")]
    headings = re.findall(r"^## +(.*?)\s*$", text, flags=re.MULTILINE)
    assert [heading for heading in headings if f"[{heading}](#" not in contents] == []


def test_every_json_block_is_the_file_that_it_names() -> None:
    text = DEFINITIONS.read_text(encoding="utf-8")
    blocks = list(CELL.finditer(text))
    assert len(blocks) == len(re.findall(r"^```json", text, flags=re.MULTILINE)) > 0
    assert [block["text"] for block in blocks] == [(ROOT / block["named"]).read_text(encoding="utf-8") for block in blocks]


def section(heading: str) -> str:
    """What stands below a heading of the definitions, up to the next one."""
    text = DEFINITIONS.read_text(encoding="utf-8")
    start = text.index(f"\n{heading}\n")
    return re.split(r"\n#+ ", text[start + 1 + len(heading) :])[0]


def table_rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    (table, *_) = re.findall(r"(?:^\|.*\|\n)+", section(heading), flags=re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


# The sizes of the table of costs, and the map of 33 × 33 in float32 that its numbers are of.
SIZES = {"C_in": 320, "C_out": 256, "H": 33, "W": 33, "h": 17, "w": 25, "B": 5, "K": 19}
MAP = MapSize(batch=1, height=33, width=33, element_bytes=4)


def costs_by_name() -> dict[str, tuple[int, int, int]]:
    """Parameters, multiply-adds and bytes as search/ and bench/ count them, by the name of the table's row."""

    def of(operation: Operation) -> tuple[int, int, int]:
        (cost,) = cell_cost(Cell((Branch(BACKBONE_FEATURE, operation),)), 320, (33, 33)).branches
        return cost.parameters, cost.multiply_adds, operation_cost(operation, MAP, 320, 256, "inference").bytes

    published = load_cell("dpc")
    counted = cell_cost(published, 320, (33, 33))
    projection, whole = counted.projection, counted.total + counted.projection
    projected = 4 * (5 * 256 * 33 * 33 + projection.parameters + 256 * 33 * 33)
    classifier = torch.nn.Conv2d(256, 19, kernel_size=1)
    parameters = sum(parameter.numel() for parameter in classifier.parameters())
    classified = (256 + 19) * 33 * 33 + parameters
    return {
        "1×1 convolution": of(Conv1x1()),
        "atrous separable convolution": of(AtrousSeparableConv((6, 21))),
        "pyramid pooling": of(PyramidPooling((2, 4))),
        "projection": (projection.parameters, projection.multiply_adds, projected),
        "classifier": (parameters, classifier.weight.numel() * 33 * 33, 4 * classified),
        "[the published cell](#the-whole-cell) and its projection": (
            whole.parameters,
            whole.multiply_adds,
            least_cost(published, MAP, 320, 256, "inference").bytes,
        ),
    }


def test_table_of_costs_has_the_formulas_and_the_numbers_that_are_counted() -> None:
    expected = costs_by_name()
    rows = table_rows("### Shapes and costs")
    assert [row[0] for row in rows] == list(expected)
    for name, _, _, _, *stated in rows:
        formulas = [re.fullmatch(r"`(.+)` = (.+)|([\d,]+)", text) for text in stated]
        numbers = [int((match[2] or match[3]).replace(",", "")) for match in formulas if match]
        assert tuple(numbers) == expected[name], name
        evaluated = [eval(match[1].replace("·", "*"), {}, SIZES) for match in formulas if match and match[1]]
        assert evaluated in (numbers, []), name


def test_shapes_in_the_table_of_costs_are_those_of_the_weights() -> None:
    for name, _, weights, _, parameters, *_ in table_rows("### Shapes and costs")[:-1]:
        shapes = re.findall(r"(?:weight|bias) \(([^)]+)\)", weights)
        count = sum(np.prod([eval(side.replace("·", "*"), {}, SIZES) for side in shape.split(",")]) for shape in shapes)
        assert count == int(parameters.split(" = ")[1].replace(",", "")), name


def test_shares_of_the_cost_are_those_that_are_counted() -> None:
    text = " ".join(section("### Shapes and costs").split())
    (separable,) = cell_cost(Cell((Branch(BACKBONE_FEATURE, AtrousSeparableConv((1, 1))),)), 320, (33, 33)).branches
    (pointwise,) = cell_cost(Cell((Branch(BACKBONE_FEATURE, Conv1x1()),)), 320, (33, 33)).branches
    share = 1 - pointwise.multiply_adds / separable.multiply_adds
    assert f"it is 9 / (9 + 256) = {share:.1%}" in text
    small, large = (cell_cost(load_cell("dpc"), channels, (65, 129)) for channels in (320, 2048))
    shares = [each.projection.multiply_adds / (each.total + each.projection).multiply_adds for each in (small, large)]
    assert f"branches and projection, this is {shares[0]:.1%}; on Xception's 2048 channels it is {shares[1]:.1%}." in text
    assert f"{small.total.parameters / 1e6:.2f}M and {large.total.parameters / 1e6:.2f}M parameters" in text
    first = large.branches[0].multiply_adds / large.total.multiply_adds
    aspp = cell_cost(load_cell("aspp"), 2048, (65, 129)).total.multiply_adds / large.total.multiply_adds
    assert f"this one has {first:.1%} of the branches' multiply-adds" in text
    assert f"has {aspp:.1f} times as many as the published cell" in text


def extent(field: NDArray[np.float64]) -> list[str]:
    """How far the positions above 0 lie from the middle of a 65 × 65 map, in features and pixels, and their number."""
    reach = np.abs(np.argwhere(field > 0.5) - 32).max(axis=0)
    height, width = (int(side) for side in 2 * reach + 1)
    sides = reach, 16 * reach, Grid(16).pixels((height, width))
    return [*("{} × {}".format(*side) for side in sides), str(np.count_nonzero(field > 0.5))]


def test_table_of_receptive_fields_is_that_of_the_published_cell() -> None:
    cell = load_cell("dpc")
    fields = DRAWING["impulse_responses"](cell)
    ways = {BACKBONE_FEATURE: ""}  # the rates between F and each branch's output
    for i, branch in enumerate(cell.branches):
        rate = str(branch.operation).removeprefix("sep3x3 ").replace("x", "×")
        ways[i] = f"{ways[branch.input_index]}, {rate}".removeprefix(", ")
    expected = []
    for name, way, field in zip("01234", list(ways.values())[1:], fields, strict=True):
        expected.append([name, way, *extent(field)])
    expected.append(["all", "", *extent(sum(fields))])
    assert table_rows("### Receptive fields in pixels") == expected


def test_every_number_of_the_tiny_cells_picture_is_computed_on_the_page() -> None:
    text = section("## A tiny cell by hand")
    branches = DRAWING["tiny_branches"]()
    head = DRAWING["tiny_head"]([steps[-1][1] for steps in branches.values()])
    maps = [values for steps in branches.values() for _, values in steps[1:]] + [values for _, values in head[:-1]]
    losses = np.nan_to_num(head[-1][1][0, 1])
    for values in [*maps, losses]:
        assert str((np.round(np.squeeze(values), 4) + 0.0).tolist()) in text


@pytest.mark.parametrize("path", MARKDOWN_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_and_images_resolve(path: Path) -> None:
    broken = []
    for match in LINK.finditer(prose(path)):
        target = match["target"] or match["html"]
        if re.match(r"[a-z]+:", target):  # https:, mailto:
            continue
        file_name, _, anchor = target.partition("#")
        file = path.parent / file_name if file_name else path
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_pictures_on_disk_are_those_drawn_and_shown() -> None:
    on_disk = {path.name for path in (ROOT / "docs" / "images").glob("*.png")}
    drawn = {f"{name}.png" for name in DRAWING["PICTURES"]}
    shown = set(re.findall(r"\]\(images/([^)]+)\)", DEFINITIONS.read_text(encoding="utf-8")))
    assert drawn <= on_disk
    assert drawn == shown


@pytest.mark.parametrize("name", DRAWING["PICTURES"])
def test_picture_is_drawn_as_large_as_the_committed_one(name: str, tmp_path: Path) -> None:
    DRAWING["draw_all"](tmp_path, [name])
    drawn = tmp_path / f"{name}.png"
    assert drawn.stat().st_size < 150_000
    committed = ROOT / "docs" / "images" / f"{name}.png"
    with Image.open(drawn) as new, Image.open(committed) as old:
        assert np.abs(np.subtract(new.size, old.size)).max() <= 1  # versions of Matplotlib crop to another pixel


def test_two_runs_draw_the_same_bytes(tmp_path: Path) -> None:
    name = "batch_norm"  # has random numbers in it
    DRAWING["draw_all"](tmp_path / "first", [name])
    DRAWING["draw_all"](tmp_path / "second", [name])
    assert (tmp_path / "first" / f"{name}.png").read_bytes() == (tmp_path / "second" / f"{name}.png").read_bytes()


def test_lines_of_the_readme_are_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 100] == []


def example_of_export(package: str) -> dict[str, Any]:
    """The names that the example with this package in docs/export.md leaves behind."""
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    (example,) = (block for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if package in block)
    names: dict[str, Any] = {}
    exec(example, names)
    return names


def test_cell_serves_as_a_decoder_of_segmentation_models_pytorch() -> None:
    pytest.importorskip("segmentation_models_pytorch")
    names = example_of_export("segmentation_models_pytorch")
    with torch.no_grad():
        assert names["network"].eval()(torch.zeros(1, 3, 64, 96)).shape == (1, 19, 64, 96)


@pytest.mark.filterwarnings("ignore")  # of torchao
def test_an_exported_cell_is_quantised() -> None:
    pytest.importorskip("torchao")
    names = example_of_export("torchao")
    operations = {str(node.target) for node in names["quantized"].graph.nodes}
    assert "quantized_decomposed.dequantize_per_channel.default" in operations  # the weights of convolutions
    with torch.no_grad():
        expected, actual = (names[name](names["features"]) for name in ("context", "quantized"))
    assert (actual - expected).abs().max() < 0.1 * expected.abs().max()  # 8 bits through nine convolutions
