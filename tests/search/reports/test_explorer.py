"""The explorer in a real browser: its numbers are Python's, and it does what a visitor asks for."""

import json
import re
import runpy
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fast.checkpoint import save_head
from fast.dense_prediction_cell import DensePredictionCell
from fast.segmentation import SegmentationHead
from reference.atrous_separable_conv import depthwise_conv
from reference.cell import OPERATIONS, AtrousSeparableConv, Branch, Cell, Conv1x1, PyramidPooling, input_name
from reference.dense_prediction_cell import BranchOptions, rate_multiplier_for
from reference.grid import Grid
from reference.pyramid_pooling import PoolingVariant
from search.cells.cost import CellCost, Cost, cell_cost, module_cost
from search.cells.latency import Latencies
from search.cells.reach import FeatureMaps
from search.cells.receptive_field import structural_receptive_field
from search.cells.space import SearchSpace, known_cells, load_cell
from search.report import ReportSettings, main
from search.reports.diagram import MARGIN, layout_cell, operation_label
from search.reports.explorer import Opened, explorer
from search.reports.page import quantity, write_page
from tests.search.composed import composed
from tests.strategies import cells

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

DOCS = Path(__file__).parents[3] / "docs"
PAGE = DOCS / "explorer.html"
BUILDING = runpy.run_path(str(DOCS / "build_explorer.py"))
INPUT_CHANNELS = (320, 160, 24)
CHANNELS = {"inputs": INPUT_CHANNELS, "branches": 256, "cell": 128}
TWO = '[{"op": "conv", "kernel": 3, "rate": [6, 6], "input": -1}, {"op": "conv", "kernel": 3, "rate": [6, 6], "input": 0}]'

# All that the page computes of one case, by the functions that it draws from.
COMPUTE = """cases => JSON.stringify(cases.map(({text, size, at, options, channels}) => {
  const cell = parseCell(text), branches = branchPaths(cell, size, at, options), field = fieldOf(branches, size, at);
  const convs = cell.branches.filter(({kind}) => kind === "sep3x3");
  return {
    field: [...field], extent: extentOf(field, size), cost: costOf(cell, size, channels, options), json: cellToJson(cell),
    alone: cell.branches.map((_, i) => [...fieldOf([branches[i]], size, at)]),
    paths: pathsWithoutBorder(cell, cell.branches.map((_, i) => i)), remark: reachRemark(cell, size, options),
    taps: convs.map(each => [0, 1].map(axis => tapsInside(each, axis, at[axis], size[axis], options).filter(Boolean).length)),
    means: convs.map(each => meanTapsInside(each, size, options)), labels: cell.branches.map(operationLabel),
    inputs: cell.branches.map(({input}) => inputName(input)), layers: numInputs(cell),
    quantity: quantity(costOf(cell, size, channels, options).total.multiplyAdds),
    layout: {...layoutCell(cell, 3), bars: [...layoutCell(cell, 3).bars]},
  };
}))"""


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """Chromium of the system, as Debian has it; root needs it without its sandbox."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is in the extra `test`")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


class Visit:
    """A page that is open; nothing may be loaded, and nothing may be complained of."""

    def __init__(self, page: "Page") -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def go(self, address: str) -> None:
        self.page.goto(address)

    def part(self, name: str) -> Any:
        return self.page.locator(f'[data-part="{name}"]')

    def fact(self, name: str) -> str:
        text: str = self.page.locator(f'[data-fact="{name}"]').inner_text()
        return text

    def wait(self, expression: str) -> None:
        """Until the expression is true; Playwright's own way to wait may need `eval`, which the page's policy forbids."""
        deadline = time.monotonic() + 10
        while not self.page.evaluate(expression):
            assert time.monotonic() < deadline, f"never true: {expression}"
            self.page.wait_for_timeout(20)

    @property
    def cell(self) -> Cell:
        return Cell.from_json(self.page.evaluate("cellToJson(state.cell)"))

    @property
    def problem(self) -> str:
        text: str = self.part("problem").inner_text() if self.part("problem").is_visible() else ""
        return text


VisitOf = Callable[..., Visit]


@pytest.fixture
def visit(browser: "Browser") -> Iterator[Visit]:
    context = browser.new_context(viewport={"width": 1250, "height": 900})
    visit = Visit(context.new_page())
    visit.go(PAGE.as_uri())
    yield visit
    assert visit.complaints == []
    assert all(url.startswith(("file:", "blob:")) for url in visit.requests)
    assert len({url.split("#")[0] for url in visit.requests}) == 1  # the page itself
    context.close()


@pytest.fixture
def visit_of(browser: "Browser", tmp_path: Path) -> Iterator[VisitOf]:
    """A page like those of `search.report --cells`, with these cells."""
    context = browser.new_context(viewport={"width": 1250, "height": 900})
    visit = Visit(context.new_page())

    def visit_page(*opened: Opened) -> Visit:
        content = {"cells": [], "latencies": Latencies({}, "cpu", (1, 1)), "explorer": explorer(opened)}
        write_page(tmp_path / "cells.html", "cell_report.html.jinja", content)
        visit.go((tmp_path / "cells.html").as_uri())
        return visit

    yield visit_page
    assert visit.complaints == []
    context.close()


@pytest.fixture(scope="module")
def computing(browser: "Browser") -> "Iterator[Page]":
    """One page for all computations."""
    page = browser.new_page()
    page.goto(PAGE.as_uri())
    yield page
    page.close()


def computed(page: "Page", cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the page computes of each; as text, which is passed on faster than so many numbers."""
    found: list[dict[str, Any]] = json.loads(page.evaluate(COMPUTE, cases))
    return found


def case_of(rng: np.random.Generator, cell: Cell) -> dict[str, Any]:
    """The cell on a map, at an output, under options; tiny maps, borders and large maps in turn."""
    size = [int(rng.integers(1, most)) for most in rng.choice([2, 6, 20, 45, 70], 2)]
    stride = int(rng.choice([8, 16, 32]))
    pins = [None, [int(rng.integers(1, extent + 1)) for extent in size]]
    options = {
        "rateMultiplier": rate_multiplier_for(stride),
        "pooling": str(rng.choice(get_args(PoolingVariant))),
        "poolingSize": pins[int(rng.integers(2))],
    }
    at = [int(rng.integers(extent)) for extent in size]
    return {"text": cell.to_json(), "size": size, "at": at, "options": options, "channels": CHANNELS}


def drawn_cases() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    spaces = [
        SearchSpace(),
        SearchSpace(num_branches=8, num_inputs=3),
        SearchSpace(3, rates=(1, 2, 5, 40), grid_sizes=(3, 7, 100)),
    ]
    drawn = [space.sample(rng) for space in spaces for _ in range(40)]
    return [case_of(rng, cell) for cell in (*drawn, *known_cells(3).values(), Cell(()), load_cell("dpc"))]


def assert_computed(case: dict[str, Any], found: dict[str, Any]) -> None:
    cell, size, at = Cell.from_json(case["text"]), tuple(case["size"]), tuple(case["at"])
    chosen = case["options"]
    multiplier, pooling, pin = chosen["rateMultiplier"], chosen["pooling"], chosen["poolingSize"]
    pinned = None if pin is None else (pin[0], pin[1])
    options = BranchOptions(False, multiplier, pooling, pinned)
    expected = structural_receptive_field(cell, size, options, at=at)
    field = np.array(found["field"]).reshape(size)
    np.testing.assert_array_equal(field > 0, expected > 0)  # the same positions are read
    np.testing.assert_allclose(field, expected, rtol=1e-9)  # sums in another order
    for i, alone in enumerate(found["alone"]):  # what branch i adds to the cell without it and those behind it
        upto, before = (structural_receptive_field(Cell(cell.branches[:k]), size, options, at=at) for k in (i + 1, i))
        np.testing.assert_allclose(np.reshape(alone, size), upto - (before if i else 0), rtol=0, atol=1e-9 * upto.max())
    span = BUILDING["span_of"](expected)
    assert (found["extent"]["positions"], tuple(found["extent"]["box"])) == (span.positions, span.box)

    maps = FeatureMaps(size, size, multiplier, pooling, pinned)
    assert found["remark"] == "".join(maps.cell_remarks(cell))
    cost = cell_cost(cell, INPUT_CHANNELS, size, cell_channels=128, pooling=pooling, pooling_size=pinned)
    assert CellCost(tuple(map(cost_from, found["cost"]["branches"])), cost_from(found["cost"]["projection"])) == cost
    assert cost_from(found["cost"]["total"]) == cost.total
    assert found["quantity"] == quantity(cost.total.multiply_adds)
    assert (found["json"], found["layers"]) == (cell.to_json(), cell.num_inputs)
    assert found["labels"] == [operation_label(branch.operation) for branch in cell.branches]
    assert found["inputs"] == [input_name(branch.input_index) for branch in cell.branches]
    assert_taps(cell, case, found)
    assert_layout(cell, found["layout"])


def cost_from(found: dict[str, int]) -> Cost:
    return Cost(found["parameters"], found["multiplyAdds"])


def assert_taps(cell: Cell, case: dict[str, Any], found: dict[str, Any]) -> None:
    """How many taps lie inside the map is a convolution of ones with ones."""
    rates = [op.rate_times(case["options"]["rateMultiplier"]) for op in operations(cell) if type(op) is AtrousSeparableConv]
    ones = np.ones((1, 1, *case["size"]))
    for rate, taps, mean in zip(rates, found["taps"], found["means"], strict=True):
        inside = depthwise_conv(ones, np.ones((1, 1, 3, 3)), rate=rate)[0, 0]
        assert taps[0] * taps[1] == inside[tuple(case["at"])]
        assert mean == pytest.approx(inside.mean(), rel=1e-12)


def assert_layout(cell: Cell, found: dict[str, Any]) -> None:
    """The boxes stand where search/reports/diagram.py puts them, whose heights count upwards."""
    layout = layout_cell(cell, 3)
    assert (found["width"], found["height"]) == pytest.approx((layout.width, layout.height))
    boxes = [(box.x, layout.height - box.y, box.width, box.height) for box in (*layout.branches, layout.projection)]
    np.testing.assert_allclose([*found["branches"], found["projection"]], boxes, rtol=0, atol=1e-9)
    bars = {i: (box.x, layout.height - box.y, box.width, box.height) for i, box in layout.inputs.items()}
    assert [i for i, _ in found["bars"]] == list(bars)
    np.testing.assert_allclose([bar for _, bar in found["bars"]], list(bars.values()), rtol=0, atol=1e-9)
    assert found["projection"][0] == pytest.approx(MARGIN + found["projection"][2] / 2)


def operations(cell: Cell) -> list[Conv1x1 | AtrousSeparableConv | PyramidPooling]:
    return [branch.operation for branch in cell.branches]


def fits(case: dict[str, Any]) -> bool:
    """Whether all windows fit the map; both sides refuse the others."""
    pins = case["options"]["poolingSize"]
    return pins is None or all(pin <= extent for pin, extent in zip(pins, case["size"], strict=True))


def test_numbers_are_pythons_for_many_cells(computing: "Page") -> None:
    cases = drawn_cases()
    assert len(cases) > 100
    assert all(map(fits, cases))
    for case, found in zip(cases, computed(computing, cases), strict=True):
        assert_computed(case, found)


@given(cell=cells(min_branches=0, num_inputs=3), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=40)
def test_numbers_are_pythons_for_any_cell(computing: "Page", cell: Cell, seed: int) -> None:
    case = case_of(np.random.default_rng(seed), cell)
    assert_computed(case, *computed(computing, [case]))


@pytest.mark.parametrize("size", [(1, 1), (129, 257)])
def test_numbers_are_pythons_on_the_smallest_and_a_large_map(computing: "Page", size: tuple[int, int]) -> None:
    at = [size[0] - 1, size[1] // 3]
    options = {"rateMultiplier": 2, "pooling": "sliding_window", "poolingSize": None}
    texts = [load_cell(name).to_json() for name in ("dpc", "aspp", "psp")]
    cases = [{"text": text, "size": list(size), "at": at, "options": options, "channels": CHANNELS} for text in texts]
    for case, found in zip(cases, computed(computing, cases), strict=True):
        assert_computed(case, found)


def test_paths_without_borders_are_those_far_from_them(computing: "Page") -> None:
    cell = Cell.from_json(load_cell("dpc").to_json())
    size, at = [81, 81], [40, 40]
    options = {"rateMultiplier": 1, "pooling": "sliding_window", "poolingSize": None}
    case = {"text": cell.to_json(), "size": size, "at": at, "options": options, "channels": CHANNELS}
    (found,) = computed(computing, [case])
    assert found["paths"] == structural_receptive_field(cell, (81, 81)).sum() == sum(found["field"])


def test_large_counts_are_written_as_in_other_pages(computing: "Page") -> None:
    """Also those that lie in the middle between two roundings."""
    small = [0, 7, 999, 1000, 2345, 2355, 9995, 99_950, 999_499, 999_500]
    counts = [*small, 1_005_000, 12_345_678, 84_750_000, 10**9, 2_986_401_600]
    assert computing.evaluate("counts => counts.map(quantity)", counts) == [quantity(count) for count in counts]


NOT_CELLS = [
    *("{}", "3", "3.5", '"x"', "null", "true"),
    *("[3]", "[[]]", "[null]", "[1.0]", '["it\'s"]', "[{}]", '[{"op": 3}]', '[{"op": "pool"}]', '[{"op": ["conv"]}]'),
    '[{"op": "conv", "kernel": 1}]',
    '[{"op": "conv", "kernel": 1, "input": -1, "grid_size": [1, 1]}]',
    '[{"op": "pyramid_pooling", "grid_size": [1, 1], "input": -1, "it\'s": 0}]',
    *(
        f'[{{"op": "conv", "kernel": {kernel}, "rate": [1, 1], "input": -1}}]'
        for kernel in ("2", "3.0", "[3]", "[3, 1]", "true", "null", '"3"')
    ),
    *(f'[{{"op": "conv", "kernel": 1, "rate": {rate}, "input": -1}}]' for rate in ("2", "[1, 2]", "[1]", '"1"', "{}")),
    *(
        f'[{{"op": "conv", "kernel": 3, "rate": {rate}, "input": -1}}]'
        for rate in (
            "3",
            "[3]",
            "[0, 1]",
            "[1, -6]",
            "[1.0, 2]",
            "[1, 2.5]",
            "[true, 1]",
            "[1, 2, 3]",
            '["1", 2]',
            "null",
            '{"h": 1}',
        )
    ),
    '[{"op": "conv", "kernel": 3, "input": -1}]',
    '[{"op": "pyramid_pooling", "input": -1}]',
    '[{"op": "pyramid_pooling", "grid_size": [4, 0], "input": -1}]',
    *(f'[{{"op": "conv", "kernel": 1, "input": {index}}}]' for index in ("0", "1", "-1.0", "true", '"-1"', "null", "[-1]")),
    '[{"op": "conv", "kernel": 1, "input": -1}, {"op": "conv", "kernel": 1, "input": 1}]',
    '[{"op": "conv", "kernel": 1, "input": -1}, 7]',
    '[{"op": "conv", "kernel": 1, "input": 2}, {"op": "conv", "kernel": 3, "rate": 2, "input": 0}]',
]
SAID = "texts => texts.map(text => { try { parseCell(text); return null; } catch (error) { return error.message; } })"


def test_sentences_for_broken_json_are_pythons(computing: "Page") -> None:
    for text, said in zip(NOT_CELLS, computing.evaluate(SAID, NOT_CELLS), strict=True):
        with pytest.raises(ValueError, match=f"^{re.escape(str(said))}$"):
            Cell.from_json(text)


def test_what_python_reads_is_read(computing: "Page") -> None:
    neutral = [
        f'[{{"op": "conv", "kernel": [1, 1], "rate": {rate}, "input": -1}}]' for rate in ("1", "null", "[1, 1]", "1.0", "true")
    ]
    texts = [*neutral, '[{"op": "conv", "kernel": [3, 3], "rate": [2, 40], "input": -3}]', " [] "]
    read = computing.evaluate("texts => texts.map(text => cellToJson(parseCell(text)))", texts)
    assert read == [Cell.from_json(text).to_json() for text in texts]


def test_what_is_no_json_or_too_much_to_draw_is_refused(computing: "Page") -> None:
    one = '{"op": "conv", "kernel": 1, "input": -1}'
    large = '[{"op": "conv", "kernel": 3, "rate": [1, 100000000000000000000], "input": -1}]'
    layers = one.replace("-1", "-17")
    said = computing.evaluate(SAID, ["[{]", "", large, f"[{', '.join([one] * 51)}]", f"[{layers}]"])
    assert [sentence.split(":")[0] for sentence in said[:2]] == ["not valid JSON"] * 2
    assert said[2].startswith("branch 0: rate must be two integers")
    assert said[3:] == ["this page shows up to 50 branches, got 51", "this page shows up to 16 layers, got input -17"]


def test_the_committed_page_is_what_its_script_builds(tmp_path: Path) -> None:
    BUILDING["write_explorer"](tmp_path / "explorer.html")
    assert (tmp_path / "explorer.html").read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")
    assert PAGE.stat().st_size < 150_000


def test_links_lead_to_sections_of_the_definitions() -> None:
    links = re.findall(r'href="([^"]+)"', PAGE.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", (DOCS / "definitions.md").read_text(encoding="utf-8"), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    relative = [link for link in links if not link.startswith(("https://arxiv.org/", "#questions"))]
    assert len(relative) >= 4
    assert all(link.partition("#")[0] == "definitions.md" and link.partition("#")[2] in anchors for link in relative)


def test_answers_are_as_computed() -> None:
    """By hand: 5 × 5 of 25 × 25; three rates 1, 3 and 9 read 27 × 27; the corner keeps a quarter and the axes."""
    page = PAGE.read_text(encoding="utf-8")
    assert "25 of 25×25 positions are read, 4.0 %" in page
    assert "1, 3 and 9, in any order: 27 × 27 positions" in page
    assert "84,800 become 542,720" in page
    assert "The total goes from 356 K to 814 K" in page
    assert "Out of reach on the 17×17 map: rate 18×18 of branch 3 (height and width)" in page


def test_a_visitor_changes_the_cell_by_clicks_and_keys(visit: Visit) -> None:
    assert visit.cell == load_cell("dpc")
    assert "513" in visit.fact("positions")
    assert "356,160" in visit.fact("parameters")
    visit.page.locator('[data-branch="4"]').click()
    visit.page.get_by_role("radio", name="pyramid pooling, 2×4").click()
    assert visit.cell.branches[4] == Branch(0, PyramidPooling((2, 4)))
    assert f"{cell_cost(visit.cell, 320, (65, 129)).total.parameters:,}" in visit.fact("parameters")
    visit.page.keyboard.press("ArrowDown")
    assert operation_label(visit.cell.branches[4].operation) == "pyramid pooling, 4×4"
    for _ in range(4):
        visit.page.keyboard.press("ArrowLeft")  # beyond the grids come the rates
    assert operation_label(visit.cell.branches[4].operation) == "3×3 sep, rate 6×18"
    visit.part("size-h").fill("5")
    assert operation_label(visit.cell.branches[4].operation) == "3×3 sep, rate 5×18"
    visit.page.get_by_label("2", exact=True).check()  # what it reads
    assert visit.cell.branches[4].input_index == 2
    positions = np.count_nonzero(structural_receptive_field(visit.cell, (65, 129)))
    assert f"{positions:,}\n" in visit.fact("positions")


def test_branches_are_added_and_removed(visit: Visit) -> None:
    visit.part("add-branch").click()
    assert visit.cell.branches == (*load_cell("dpc").branches, load_cell("dpc").branches[0])
    visit.page.locator('[data-branch="1"]').press("Enter")
    visit.part("remove-branch").click()  # branch 2, which read it, reads what it read
    assert visit.cell == Cell.from_json(visit.cell.to_json())
    kept = [branch for i, branch in enumerate(load_cell("dpc").branches) if i != 1]
    assert visit.cell.branches[:4] == tuple(
        Branch(max(branch.input_index, -1) if i == 0 else 0, branch.operation) for i, branch in enumerate(kept)
    )
    for _ in range(5):
        visit.part("remove-branch").click()
    assert visit.cell == Cell(())
    assert visit.fact("positions").split("\n")[1:2] == ["1"]
    assert "linear probe" in visit.part("rows").inner_text()
    visit.part("add-branch").click()
    assert len(visit.cell.branches) == 1


def test_all_operations_are_tiles(visit: Visit) -> None:
    names = visit.page.evaluate('[...document.querySelectorAll(".tile-op")].map(each => each.getAttribute("aria-label"))')
    assert sorted(names) == sorted(map(operation_label, OPERATIONS))


def test_random_cells_are_of_the_space(visit: Visit) -> None:
    for layers in (1, 3):
        drawn = visit.page.evaluate("Array.from({length: 200}, () => cellToJson(randomCell()))")
        found = [Cell.from_json(text) for text in drawn]
        assert all(map(SearchSpace(num_inputs=layers).contains, found))
        assert len(set(found)) == 200
        assert {input_index for cell in found for input_index in (branch.input_index for branch in cell.branches)} == set(
            range(-layers, 4)
        )
        visit.part("add-layer").click()
        visit.part("add-layer").click()
    visit.part("random").click()
    assert SearchSpace(num_inputs=5).contains(visit.cell)


def test_the_output_is_moved_by_mouse_and_keys(visit: Visit) -> None:
    box = visit.part("marks").bounding_box()
    visit.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    visit.page.mouse.down()
    visit.page.mouse.move(box["x"] + 1, box["y"] + 1, steps=4)
    visit.page.mouse.up()
    visit.wait("String(position()) === '0,0'")
    corner = structural_receptive_field(load_cell("dpc"), (65, 129), at=(0, 0))
    lost = 1 - corner.sum() / structural_receptive_field(load_cell("dpc"), (65, 129)).sum()
    assert f"\n{np.count_nonzero(corner)}\n" in visit.fact("positions")
    assert f"{100 * lost:.0f} %" in visit.fact("lost")
    assert "4 of 9" in visit.part("rows").inner_text()
    visit.page.keyboard.press("ArrowDown")
    visit.page.keyboard.press("Shift+ArrowRight")
    assert visit.page.evaluate("position()") == [1, 8]
    visit.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    visit.wait("part('pointed').textContent.includes('never read')")
    assert visit.page.locator(".branch.faded").count() == 5
    visit.part("centre").click()
    assert visit.page.evaluate("position()") == [32, 64]


def test_the_stride_keeps_the_image(visit: Visit) -> None:
    visit.part("stride").select_option("8")
    size = Grid(8).features(Grid(16).pixels((65, 129)))
    assert tuple(visit.page.evaluate("state.size")) == size == (129, 257)
    assert "801 × 865 pixels" in visit.fact("box").replace("\N{NARROW NO-BREAK SPACE}", " ")
    assert "where all rates count 2 times" in visit.part("image").inner_text()
    field = structural_receptive_field(load_cell("dpc"), size, BranchOptions(False, 2))
    assert visit.page.evaluate("numbers.extent.positions") == np.count_nonzero(field)


def test_maps_and_channels_follow_their_fields_and_refuse_nonsense(visit: Visit) -> None:
    visit.part("height").fill("17")
    assert "out of reach on the 17×129 map: rate 18×15 of branch 1 (height)" in visit.part("remark").inner_text()
    visit.part("layer 0").fill("20")
    visit.part("layer 0").press_sequentially("48")  # one goes on typing where one was
    assert "814,080" in visit.fact("parameters")
    for wrong in ("0", "2.5", "", "99999"):
        visit.part("width").fill(wrong)
        assert visit.problem == "width of the map, in features: give an integer from 1 to 1025"
    visit.part("width").press("Tab")
    assert (visit.part("width").input_value(), visit.problem) == ("129", "")


def test_json_is_live(visit: Visit) -> None:
    visit.part("json").fill(TWO)
    assert visit.cell == Cell.from_json(TWO)
    assert "25\nof 8,385" in visit.fact("positions")
    visit.part("json").fill(TWO.replace("6, 6", "6"))
    assert visit.problem == "branch 0: rate must be two integers of at least 1, as [height, width], got [6]"
    assert visit.cell == Cell.from_json(TWO)  # as it was
    assert visit.part("json").get_attribute("aria-invalid") == "true"
    visit.page.get_by_role("button", name="PSP").click()
    assert visit.part("json").input_value() == load_cell("psp").to_json()
    assert visit.problem == ""


def test_files_are_opened_dropped_and_saved(visit: Visit, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(TWO, encoding="utf-8")
    (tmp_path / "broken.json").write_text('[{"op": "conv", "kernel": 5, "input": -1}]', encoding="utf-8")
    (tmp_path / "picture.json").write_bytes(b"\xff\xd8\xff\xe0")
    visit.part("file").set_input_files(tmp_path / "mine.json")
    visit.wait("state.cell.branches.length === 2")
    assert visit.cell == Cell.from_json(TWO)
    for name, sentence in {"broken": "branch 0: kernel must be 1 or 3, got 5", "picture": "not a text in UTF-8"}.items():
        visit.part("file").set_input_files(tmp_path / f"{name}.json")
        visit.wait(f"part('problem').textContent.startsWith('{name}.json')")
        assert visit.problem == f"{name}.json: {sentence}"
    drop = """text => { const files = new DataTransfer(); files.items.add(new File([text], "dropped.json"));
      dispatchEvent(new DragEvent("drop", {dataTransfer: files, cancelable: true})); }"""
    visit.page.evaluate(drop, load_cell("aspp").to_json())
    visit.wait("state.cell.branches.length === 5")
    with visit.page.expect_download() as download:
        visit.part("save").click()
    assert Cell.load(download.value.path()) == load_cell("aspp")


def test_an_address_opens_the_same_again(visit: Visit) -> None:
    visit.part("json").fill(
        '[{"op": "conv", "kernel": 3, "rate": [2, 7], "input": -2}, {"op": "conv", "kernel": 1, "input": 0}]'
    )
    visit.part("height").fill("20")
    visit.part("pooling").select_option("grid_cells")
    visit.part("corner").click()
    visit.part("show-branch").check()
    visit.wait("location.hash.includes('branch=0') && location.hash.includes('at=0')")
    before = visit.page.evaluate("JSON.stringify(state)")
    address = visit.page.url
    visit.go("about:blank")
    visit.go(address)
    assert visit.page.evaluate("JSON.stringify(state)") == before
    assert visit.part("show-branch").is_checked()


def test_an_address_opens_the_same_again_where_the_page_begins_with_another(visit_of: VisitOf) -> None:
    """The page's first cell fills no gap: it has other widths, other pooling, and windows pinned, which are released here."""
    first = Opened(
        label="first",
        cell=load_cell("aspp"),
        branch_channels=64,
        cell_channels=64,
        pooling="grid_cells",
        pooling_size=(9, 9),
        feature_size=(17, 33),
    )
    visit = visit_of(
        first, Opened(label="second", cell=Cell.from_json(TWO)), replace(first, label="third", cell=load_cell("psp"))
    )
    for k in range(3):
        visit.page.evaluate("openCell(data.cells[0])")
        visit.wait("location.hash === addressOf()")
        visit.page.locator('[data-part="cells"] button').nth(k).click()
        if k == 2:
            visit.part("release").click()
        visit.wait("location.hash === addressOf()")
        before = visit.page.evaluate("JSON.stringify({...state, label: ''})")
        address = visit.page.url
        visit.go("about:blank")
        visit.go(address)
        assert visit.page.evaluate("JSON.stringify(state)") == before


def test_an_address_has_the_map_that_its_page_begins_with(visit_of: VisitOf) -> None:
    """However large; no other page takes it."""
    visit = visit_of(Opened(label="long", cell=load_cell("dpc"), feature_size=(1, 1030)))
    visit.wait("location.hash.includes('map=1x1030')")
    visit.page.reload()
    assert (visit.problem, visit.page.evaluate("state.size")) == ("", [1, 1030])
    visit.part("width").fill("1031")
    assert visit.problem == "width of the map, in features: give an integer from 1 to 1030"


WRONG_ADDRESSES = {
    "cell=[3]": "branch 0: must be a JSON object, got 3",
    f"cell={TWO}&map=0x5": "the address has map=0x5: give height x width, 1 to 1025 each, as in 65x129",
    f"cell={TWO}&windows=0x1": "the address has windows=0x1: give height x width, 1 to 1025 each, as in 65x129, or none",
    f"cell={TWO}&stride=3": "the address has stride=3: give 4 to 32",
    f"cell={TWO}&channels=many": "the address has channels=many: give integers of at least 1",
    "pooling=max": "the address has pooling=max: give sliding_window or grid_cells",
    f"cell={load_cell('aspp').to_json()}&windows=9x9&map=5x5": "pooling window of 9 (pooling_size 9, grid 1) must be 1 to the "
    "map's 5",
}


def test_a_wrong_address_is_named_and_the_page_works(visit: Visit) -> None:
    for address, sentence in WRONG_ADDRESSES.items():
        visit.page.evaluate("address => { location.hash = address; }", quote(address, safe="=&"))
        visit.wait(f"part('problem').textContent === {json.dumps(sentence)}")
    visit.page.get_by_role("button", name="ASPP").click()
    assert (visit.cell, visit.problem) == (load_cell("aspp"), "")


@pytest.fixture
def pinned(visit_of: VisitOf) -> Visit:
    """33 × 33 features with windows of that size, so that no smaller map is taken."""
    return visit_of(Opened(label="pinned", cell=load_cell("aspp"), feature_size=(33, 33), pooling_size=(33, 33)))


def test_what_is_refused_is_not_shown_as_chosen(pinned: Visit) -> None:
    pinned.part("stride").select_option("32")
    assert pinned.problem == "pooling window of 33 (pooling_size 33, grid 1) must be 1 to the map's 17"
    assert (pinned.part("stride").input_value(), pinned.page.evaluate("state.stride")) == ("16", 16)
    pinned.part("height").fill("5")
    assert pinned.problem == "pooling window of 33 (pooling_size 33, grid 1) must be 1 to the map's 5"
    assert pinned.part("height").get_attribute("aria-invalid") == "true"
    pinned.part("height").press("Tab")
    assert (pinned.part("height").input_value(), pinned.problem) == ("33", "")
    assert pinned.part("height").get_attribute("aria-invalid") == "false"


def test_what_is_clicked_on_leaving_a_refused_field_is_done(pinned: Visit) -> None:
    """Nothing is drawn anew between the press of the button and its release."""
    pinned.part("height").fill("5")
    pinned.page.locator('[data-branch="2"]').click()
    assert (pinned.page.evaluate("state.selected"), pinned.part("height").input_value()) == (2, "33")
    pinned.part("size-h").fill("0")
    pinned.page.locator('[data-part="reads"]').get_by_text("1", exact=True).click()
    assert (pinned.cell.branches[2].input_index, pinned.part("size-h").input_value(), pinned.problem) == (1, "12", "")


def test_refused_poolings_and_grids_are_not_shown_as_chosen(pinned: Visit) -> None:
    pinned.part("pooling").select_option("grid_cells")
    pinned.part("height").fill("9")  # which grid cells may have
    pinned.part("pooling").select_option("sliding_window")
    assert pinned.problem == "pooling window of 33 (pooling_size 33, grid 1) must be 1 to the map's 9"
    assert (pinned.part("pooling").input_value(), pinned.page.evaluate("state.pooling")) == ("grid_cells", "grid_cells")
    pinned.page.locator('[data-branch="4"]').click()
    pinned.part("size-h").fill("4")
    pinned.part("size-w").fill("4")
    pinned.part("pooling").select_option("sliding_window")
    pinned.part("size-h").fill("2")
    assert pinned.problem == "pooling window of 17 (pooling_size 33, grid 2) must be 1 to the map's 9"
    pinned.part("size-h").press("Tab")
    assert (pinned.part("size-h").input_value(), pinned.problem) == ("4", "")


def test_cells_too_large_to_draw_are_named_and_the_page_works(visit_of: VisitOf) -> None:
    wide = Opened(label="wide", cell=Cell((Branch(-1, Conv1x1()),) * 60))
    deep = Opened(label="deep", cell=Cell((Branch(-17, Conv1x1()),)), in_channels=(8,) * 17)
    visit = visit_of(wide, deep, Opened(label="two", cell=Cell.from_json(TWO)))
    assert (visit.cell, visit.problem) == (Cell.from_json(TWO), "")
    for k, sentence in enumerate(("wide: this page shows up to 50 branches, got 60", "deep: this page shows up to 16 layers")):
        visit.part("cells").get_by_role("button").nth(k).click()
        assert visit.problem.startswith(sentence)
        visit.part("corner").click()
        assert visit.problem == ""
        visit.page.evaluate(f"openCell(data.cells[{k}])")
        assert visit.problem.startswith(sentence)
    assert visit.cell == Cell.from_json(TWO)


def test_a_page_of_nothing_that_can_be_drawn_says_so_and_works(visit_of: VisitOf) -> None:
    visit = visit_of(Opened(label="wide", cell=Cell((Branch(-1, Conv1x1()),) * 60)))
    assert visit.problem == "wide: this page shows up to 50 branches, got 60"
    visit.part("json").fill(TWO)
    assert (visit.cell, visit.problem) == (Cell.from_json(TWO), "")


STRANGE_FILES = {
    b"": "not valid JSON: Unexpected end of JSON input",
    bytes(100): "not valid JSON: ",
    bytes(range(256)): "not a text in UTF-8",
    b'[{"op": "<img src=x onerror=alert(1)>"}]': 'branch 0: op must be "conv" or "pyramid_pooling", got \'<img',
    b'[{"op": "conv", "kernel": 3, "rate": [NaN, 1], "input": -1}]': "not valid JSON: ",
    b'[{"op": "conv", "kernel": 3, "rate": [1e999, 1], "input": -1}]': "branch 0: rate must be two integers",
    b"[" * 400_000: "not valid JSON: ",
    b"[" * 2000 + b"]" * 2000: "branch 0: must be a JSON object, got [[[",
    b'["' + b"long " * 100_000 + b'"]': "branch 0: must be a JSON object, got 'long long",
    b"[" + b",".join([b'{"op": "conv", "kernel": 1, "input": -1}'] * 60) + b"]": "this page shows up to 50 branches, got 60",
    b" " * 1_000_001: "a cell's file has some hundred bytes, this one 1,000,001",
}


def test_strange_files_are_told_in_a_sentence_and_the_page_works(visit: Visit, tmp_path: Path) -> None:
    path = tmp_path / "<b>mine.json"
    for content, sentence in STRANGE_FILES.items():
        path.write_bytes(content)
        visit.page.evaluate("say('')")
        visit.part("file").set_input_files(path)
        visit.wait("part('problem').textContent !== ''")
        assert visit.problem.startswith(f"<b>mine.json: {sentence}")
        assert visit.part("problem").bounding_box()["height"] < 450  # of 900: the page can still be used
        assert visit.page.locator("#explorer img, .problem b").count() == 0
        assert visit.cell == load_cell("dpc")
    path.write_text(TWO, encoding="utf-8")
    visit.part("file").set_input_files(path)
    visit.wait("state.cell.branches.length === 2")
    assert visit.problem == ""


@pytest.mark.parametrize("pooling", get_args(PoolingVariant))
def test_rates_and_grids_far_beyond_the_map_are_shown(visit: Visit, pooling: str) -> None:
    visit.part("pooling").select_option(pooling)
    conv = '{"op": "conv", "kernel": 3, "rate": [1000000000, 1], "input": -1}'
    pool = '{"op": "pyramid_pooling", "grid_size": [1000000000, 1000000000], "input": 0}'
    visit.part("json").fill(f"[{conv}, {pool}]")
    assert (visit.problem, len(visit.cell.branches)) == ("", 2)
    assert "rate 1000000000×1 of branch 0 (height)" in visit.part("remark").inner_text()
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 1250
    visit.page.get_by_role("button", name="ASPP").click()
    assert (visit.cell, visit.problem) == (load_cell("aspp"), "")


def test_a_question_leaves_with_its_cell(visit: Visit) -> None:
    questions, asked = visit.page.locator("[data-question]"), visit.part("asked")
    questions.nth(0).click()
    visit.part("json").fill("[3]")
    assert asked.is_visible()  # as is its cell
    visit.part("json").fill("[]")
    assert not asked.is_visible()
    questions.nth(0).click()
    visit.page.evaluate("address => { location.hash = address; }", f"cell={quote(TWO)}")
    visit.wait("state.cell.branches.length === 2 && state.size[1] === 129")
    assert not asked.is_visible()
    questions.nth(0).click()
    visit.page.get_by_role("button", name="ASPP").click()
    assert not asked.is_visible()


def test_the_numbers_stand_below_the_map_too(visit: Visit) -> None:
    said = visit.part("summary").inner_text()
    assert said == "513 of 8,385 positions read, within 51 × 55: 18 % of it; 0.0 % of the paths lost."
    visit.part("corner").click()
    said = visit.part("summary").inner_text()
    assert said.startswith("112 of 8,385 positions read, within 26 × 28: ")
    assert visit.fact("lost").split("\n")[1] in said


def test_after_a_question_is_set_up_keys_go_on_at_its_cell(visit: Visit) -> None:
    visit.page.locator("[data-question]").nth(0).focus()
    visit.page.keyboard.press("Enter")
    assert visit.page.evaluate("document.activeElement.id") == "explorer"
    visit.page.keyboard.press("Tab")
    assert visit.page.evaluate("document.getElementById('explorer').contains(document.activeElement)")


def test_sizes_in_pixels_name_their_grid(visit: Visit) -> None:
    """An image of 512 × 512 has 32 × 32 features of a vision transformer, on the grid of centres."""
    visit.part("height").fill("32")
    visit.part("width").fill("32")
    assert visit.part("image").inner_text() == "An image of 497 × 497 pixels, on the grid of corners, at output stride 16."
    assert visit.fact("box").endswith("pixels of the image, on the grid of corners")


def test_questions_set_up_their_cells(visit: Visit) -> None:
    buttons = visit.page.locator("[data-question]")
    for k in range(buttons.count()):
        buttons.nth(k).click()
        asked = visit.page.evaluate(f"data.questions[{k}]")
        assert visit.cell == Cell.from_json(asked["cell"])
        assert visit.page.evaluate("state.size") == asked["featureSize"]
        assert visit.part("question").inner_text() == asked["question"]
    assert buttons.count() >= 6
    visit.part("random").click()
    assert not visit.part("asked").is_visible()


# How many features of the map are drawn in another colour than black.
BRIGHT = """() => {
  const {width, height} = part("field");
  const copy = new OffscreenCanvas(width, height).getContext("2d", {willReadFrequently: true});
  copy.drawImage(part("field"), 0, 0);
  const pixels = new Uint32Array(copy.getImageData(0, 0, width, height).data.buffer);
  return pixels.filter(pixel => pixel !== 0xff000000).length;
}"""


@pytest.mark.parametrize("size", ["1x1", "3x200", "129x257"])
def test_extreme_maps_and_cells_are_drawn(visit: Visit, size: str) -> None:
    for cell in ("[]", load_cell("psp").to_json(), load_cell("dpc").to_json(), load_cell("mlp", 4).to_json()):
        visit.page.evaluate("address => { location.hash = address; }", f"cell={quote(cell)}&map={size}")
        visit.wait(
            f"state.size.join('x') === '{size}' && cellToJson(state.cell) === {json.dumps(Cell.from_json(cell).to_json())}"
        )
        assert visit.problem == ""
        assert visit.page.evaluate(BRIGHT) == visit.page.evaluate("numbers.extent.positions") > 0


# Whatever is pressed, chosen and typed, the page shows the numbers of the cell that it has.
PRESS = """seed => {
  const below = limit => { seed = (seed * 1103515245 + 12345) % 2147483648; return Math.floor(seed / 2147483648 * limit); };
  const one = selector => {
    const found = [...root.querySelectorAll(selector)].filter(each => !each.disabled && !each.closest("[hidden]"));
    return found[below(found.length)];
  };
  const typed = ["1", "2", "7", "33", "100", "0", "", "-3", "2.5", "999999"];
  const acts = [
    () => one("button:not([data-opens], [data-part=save], [data-part=copy], [data-part=link])").click(),
    () => one("[data-branch], [data-key=output]").dispatchEvent(new MouseEvent("click", {bubbles: true})),
    () => one("input[type=radio]").click(),
    () => {
      const field = one("input[type=number]");
      field.value = typed[below(typed.length)];
      field.dispatchEvent(new Event("input"));
      field.dispatchEvent(new Event("blur"));
    },
    () => {
      const list = one("select");
      list.selectedIndex = below(list.options.length);
      list.dispatchEvent(new Event("change"));
    },
  ];
  const ends = [];
  for (let k = 0; k < 150; k++) {
    acts[below(acts.length)]();
    const again = computed(state);
    const shown = [["height", state.size[0]], ["width", state.size[1]], ["stride", state.stride], ["pooling", state.pooling],
      ["branch-channels", state.branchChannels], ["cell-channels", state.cellChannels]];
    ends.push(shown.every(([name, value]) => part(name).value === String(value)));
    ends.push(part("json").value === cellToJson(checkedCell(state.cell)) && String(again.field) === String(numbers.field)
      && again.cost.total.parameters === numbers.cost.total.parameters);
  }
  return ends.every(Boolean);
}"""


def test_whatever_is_pressed_the_page_stays_whole(visit: Visit) -> None:
    visit.part("height").fill("9")
    visit.part("width").fill("14")
    visit.part("width").blur()
    assert visit.page.evaluate(PRESS, 1)


def test_whatever_is_refused_the_page_stays_whole(visit_of: VisitOf) -> None:
    """No smaller map is taken than the windows are; the button that lets them follow the map is away."""
    visit = visit_of(Opened(label="pinned", cell=load_cell("aspp"), feature_size=(9, 14), pooling_size=(9, 14)))
    visit.page.evaluate("part('release').remove()")
    assert visit.page.evaluate(PRESS, 2)
    assert visit.page.evaluate("state.poolingSize") == [9, 14]


def test_the_page_fits_narrow_screens(visit: Visit) -> None:
    visit.page.set_viewport_size({"width": 360, "height": 800})
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 360
    visit.page.get_by_role("button", name="PSP").click()
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 360


def test_no_other_script_may_run(visit: Visit) -> None:
    visit.page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = true'}))"
    )
    assert visit.page.evaluate("window.ran") is None
    assert len(visit.complaints) == 1
    assert "Content Security Policy" in visit.complaints.pop()


def test_a_page_of_cells_opens_each_of_them(browser: "Browser", tmp_path: Path) -> None:
    path = tmp_path / "<mine>.json"
    path.write_text(TWO, encoding="utf-8")
    out = tmp_path / "cells.html"
    given = ("dpc", str(path))
    main(
        composed(ReportSettings, cells=given, in_channels=(64,), feature_size=(17, 33), output_stride=8, device="cpu", out=out)
    )
    context = browser.new_context()
    visit = Visit(context.new_page())
    visit.go(out.as_uri())
    assert visit.cell == load_cell("dpc")
    visit.page.locator("[data-open]").nth(1).click()
    assert visit.cell == Cell.from_json(TWO)
    assert visit.page.locator('[data-part="cells"] [aria-pressed="true"]').inner_text() == "<mine>"
    assert visit.page.evaluate("[state.size, state.inputs, state.stride]") == [[17, 33], [64], 8]
    field = structural_receptive_field(visit.cell, (17, 33), BranchOptions(False, 2))
    shown = f"{np.count_nonzero(field)}\nof 561 on the map"
    assert shown in visit.fact("positions")
    assert visit.complaints == []
    assert len(visit.requests) == 1
    context.close()


def test_windows_pinned_by_a_head_stay_until_they_are_released(browser: "Browser", tmp_path: Path) -> None:
    context = DensePredictionCell(load_cell("aspp"), 3, branch_channels=4, cell_channels=5, pooling_size=(9, 9))
    save_head(tmp_path / "head.safetensors", SegmentationHead(context, 1), task={"class_names": ("a",)}, backbone={})
    out, given = tmp_path / "cells.html", (str(tmp_path / "head.safetensors"),)
    main(composed(ReportSettings, cells=given, feature_size=(17, 33), device="cpu", out=out))
    visitor = browser.new_context()
    visit = Visit(visitor.new_page())
    visit.go(out.as_uri())
    assert visit.page.evaluate("[state.poolingSize, state.inputs, state.branchChannels, state.cellChannels]") == [
        [9, 9],
        [3],
        4,
        5,
    ]
    assert f"{module_cost(context, (17, 33)).total.parameters:,}" in visit.fact("parameters")
    assert "windows of 9 × 9 features" in visit.part("rows").inner_text()
    visit.part("height").fill("5")
    assert visit.problem == "pooling window of 9 (pooling_size 9, grid 1) must be 1 to the map's 5"
    assert visit.page.evaluate("state.size") == [17, 33]
    visit.page.locator('[data-branch="4"]').click()
    visit.page.get_by_role("radio", name="pyramid pooling, 2×2").click()
    visit.part("height").fill("5")  # fits, while other operations would not
    assert visit.problem == ""
    assert visit.page.get_by_role("radio", name="pyramid pooling, 1×1").is_disabled()
    visit.part("release").click()
    assert "windows of 3 × 17 features" in visit.part("rows").inner_text()
    assert visit.complaints == []
    visitor.close()


def test_shares_are_written_alike_and_the_policy_is_narrow() -> None:
    page = PAGE.read_text(encoding="utf-8")
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)
    assert {"default-src 'none'", "base-uri 'none'", "form-action 'none'"} <= set(policy.split("; "))
    text = re.sub(r"<style>.*?</style>|<script>.*?</script>", "", page, flags=re.DOTALL)
    text = re.sub(r'style="[^"]*"', "", text)
    assert len(re.findall(r"\d %", text)) > 5
    assert not re.findall(r"\d%", text)


def test_data_of_a_page_cannot_end_its_script(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    (text,) = re.findall(r'<script type="application/json" id="explorer-data">(.*?)</script>', page, re.DOTALL)
    assert "<" not in text
    assert json.loads(text)["rates"] == [1, 3, 6, 9, 12, 15, 18, 21]
