import ast
import re
import runpy
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
DEFINITIONS = ROOT / "docs" / "definitions.md"
DRAWING = runpy.run_path(str(ROOT / "docs" / "draw_definitions.py"))
HIDDEN_OR_INSTALLED = re.compile(r"(^|/)(\.|site-packages/|node_modules/|runs/)")

MARKDOWN_FILES = sorted(
    path for path in ROOT.rglob("*.md") if not HIDDEN_OR_INSTALLED.search(path.relative_to(ROOT).as_posix())
)
# A fenced block of Python is an excerpt of the file whose link stands on the line above it.
EXCERPT = re.compile(r"\[`(?P<named>[^`\n]+)`\]\((?P<link>[^)\n]+)\)\n\n```python\n(?P<code>.*?)```", re.DOTALL)
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
