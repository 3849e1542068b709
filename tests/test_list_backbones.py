"""The table of docs/backbones.md is what its script writes: ten rows of it are measured anew."""

import runpy
from pathlib import Path

import pytest
import timm

DOCS = Path(__file__).parents[1] / "docs"
LISTING = runpy.run_path(str(DOCS / "list_backbones.py"))
PAGE = (DOCS / "backbones.md").read_text(encoding="utf-8").splitlines(keepends=True)
ROWS = {line.split("|")[1].strip(): line for line in PAGE if "|" in line}
# One of each kind: accepted on either grid, at a stride of its own, refused for its sizes, for its strides.
SAMPLE = (
    *("convnext_atto", "efficientvit_b0", "eva02_tiny_patch14_224", "crossvit_tiny_240", "mixer_s32_224", "mobilenetv2_100"),
    *("pvt_v2_b0", "regnetx_002", "test_mambaout", "test_vit"),
)


def test_the_table_has_all_models() -> None:
    assert set(LISTING["MODELS"]) <= ROWS.keys()
    assert len(LISTING["MODELS"]) >= 60


@pytest.mark.parametrize("name", [name for name in SAMPLE if timm.is_model(name)])  # the oldest timm has not all of them
def test_rows_are_as_measured(name: str) -> None:
    assert LISTING["row"](name) == ROWS[name]
