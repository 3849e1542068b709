import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from reference.cell import CONV1X1, GRID_SIZES, OPERATIONS, RATES, Branch, Cell, Operation
from tests.strategies import cells

CONV = {"op": "conv", "kernel": 1, "input": -1}
ATROUS = {"op": "conv", "kernel": 3, "rate": [6, 21], "input": -1}
POOL = {"op": "pyramid_pooling", "grid_size": [2, 4], "input": 0}


def without(item: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in item.items() if k != key}


def test_reads_the_authors_format() -> None:
    cell = Cell.from_json(json.dumps([CONV, ATROUS, POOL]))
    assert cell.branches == (
        Branch(-1, Operation("conv1x1")),
        Branch(-1, Operation("atrous_separable_conv", rate=(6, 21))),
        Branch(0, Operation("pyramid_pooling", grid_size=(2, 4))),
    )
    assert str(cell) == "conv1x1(F), sep3x3 6x21(F), pool 2x4(0)"


def test_kernel_may_be_a_pair_as_in_the_authors_files() -> None:
    as_pairs = [CONV | {"kernel": [1, 1]}, ATROUS | {"kernel": [3, 3]}]
    assert Cell.from_json(json.dumps(as_pairs)) == Cell.from_json(json.dumps([CONV, ATROUS]))


def test_neutral_rate_of_a_1x1_kernel_is_dropped() -> None:
    assert Cell.from_json(json.dumps([CONV | {"rate": [1, 1]}])) == Cell((Branch(-1, CONV1X1),))


@given(cells())
def test_json_round_trip(cell: Cell) -> None:
    text = cell.to_json()
    again = Cell.from_json(text)
    assert again == cell
    assert hash(again) == hash(cell)
    assert again.to_json() == text
    keys = {frozenset(item) for item in json.loads(text)}
    assert keys <= {frozenset(CONV), frozenset(ATROUS), frozenset(POOL)}


def test_the_81_operations() -> None:
    assert len(set(OPERATIONS)) == 81
    assert {op.rate for op in OPERATIONS if op.rate} == {(h, w) for h in RATES for w in RATES}
    assert {op.grid_size for op in OPERATIONS if op.grid_size} == {(h, w) for h in GRID_SIZES for w in GRID_SIZES}
    assert [op.kind for op in OPERATIONS].count("conv1x1") == 1


@pytest.mark.parametrize(
    ("items", "branch", "field"),
    [
        ([CONV | {"op": "max_pool"}], 0, "op"),
        ([CONV, without(ATROUS, "op")], 1, "op"),
        ([CONV | {"op": ["conv"]}], 0, "op"),
        ([CONV, ATROUS, POOL | {"kernel": [2, 2]}], 2, "kernel"),
        ([CONV | {"dilation": 2}], 0, "dilation"),
        ([ATROUS | {"grid_size": [1, 1]}], 0, "grid_size"),
        ([CONV, POOL | {"rate": [1, 1]}], 1, "rate"),
        ([CONV, without(CONV, "input")], 1, "input"),
        ([CONV | {"input": 0}], 0, "input"),
        ([CONV, ATROUS | {"input": 1}], 1, "input"),
        ([CONV, ATROUS | {"input": 2}, CONV], 1, "input"),
        ([CONV, CONV | {"input": -2}], 1, "input"),
        ([CONV | {"input": "-1"}], 0, "input"),
        ([CONV, CONV | {"input": 0.0}], 1, "input"),
        ([CONV, CONV | {"input": False}], 1, "input"),
        ([CONV | {"input": None}], 0, "input"),
        ([CONV, ATROUS | {"rate": [0, 1]}], 1, "rate"),
        ([ATROUS | {"rate": [6, -1]}], 0, "rate"),
        ([ATROUS | {"rate": [6.0, 1]}], 0, "rate"),
        ([ATROUS | {"rate": [True, 1]}], 0, "rate"),
        ([ATROUS | {"rate": [6, 6, 6]}], 0, "rate"),
        ([ATROUS | {"rate": 6}], 0, "rate"),
        ([without(ATROUS, "rate")], 0, "rate"),
        ([CONV | {"rate": [2, 2]}], 0, "rate"),
        ([CONV, POOL | {"grid_size": [0, 1]}], 1, "grid_size"),
        ([CONV, POOL | {"grid_size": "2x4"}], 1, "grid_size"),
        ([CONV, without(POOL, "grid_size")], 1, "grid_size"),
        ([CONV | {"kernel": 5}], 0, "kernel"),
        ([ATROUS | {"kernel": [3, 1]}], 0, "kernel"),
        ([CONV | {"kernel": True}], 0, "kernel"),
        ([ATROUS | {"kernel": 3.0}], 0, "kernel"),
        ([without(CONV, "kernel")], 0, "kernel"),
        ([CONV, "conv1x1"], 1, "object"),
        ([CONV, None], 1, "object"),
    ],
)
def test_bad_branch_is_named_with_its_field(items: list[Any], branch: int, field: str) -> None:
    with pytest.raises(ValueError, match=rf"^branch {branch}: (must be a JSON |unknown key |key )?'?{field}\b") as error:
        Cell.from_json(json.dumps(items))
    assert len(re.findall(r"branch \d+:", str(error.value))) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "at least one branch"),
        ("{}", "JSON list .* got dict"),
        ("null", "JSON list .* got NoneType"),
        ("", "not valid JSON"),
        ('[{"op": "conv", "kernel": 1, "input": -1}', "not valid JSON"),
    ],
)
def test_what_is_not_a_list_of_branches_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cell.from_json(text)


def test_loading_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cell.json"
    path.write_text(json.dumps([CONV, POOL]))
    assert len(Cell.load(path).branches) == 2
    path.write_text(json.dumps([CONV | {"input": 3}]))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: branch 0: input"):
        Cell.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        Cell.load(path)


def test_operation_refuses_fields_of_another_kind() -> None:
    with pytest.raises(ValueError, match="kind must be"):
        Operation("conv3x3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rate belongs to atrous_separable_conv"):
        Operation("conv1x1", rate=(1, 1))
    with pytest.raises(ValueError, match="grid_size belongs to pyramid_pooling"):
        Operation("atrous_separable_conv", rate=(1, 1), grid_size=(1, 1))


def test_cells_are_immutable_data() -> None:
    cell = Cell.from_json(json.dumps([CONV, ATROUS]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        cell.branches = ()  # type: ignore[misc]
    from_list = Cell(list(cell.branches))  # type: ignore[arg-type]
    assert {from_list, cell} == {cell}
