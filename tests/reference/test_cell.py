import dataclasses
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import find, given

from reference.cell import GRID_SIZES, OPERATIONS, RATES, AtrousSeparableConv, Branch, Cell, Conv1x1, Operation, PyramidPooling
from tests.strategies import cells, operations

CONV = {"op": "conv", "kernel": 1, "input": -1}
ATROUS = {"op": "conv", "kernel": 3, "rate": [6, 21], "input": -1}
POOL = {"op": "pyramid_pooling", "grid_size": [2, 4], "input": 0}


def without(item: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in item.items() if k != key}


def test_reads_the_authors_format() -> None:
    cell = Cell.from_json(json.dumps([CONV, ATROUS, POOL]))
    assert cell.branches == (
        Branch(-1, Conv1x1()),
        Branch(-1, AtrousSeparableConv(rate=(6, 21))),
        Branch(0, PyramidPooling(grid_size=(2, 4))),
    )
    assert str(cell) == "conv1x1(F), sep3x3 6x21(F), pool 2x4(0)"


def test_kernel_may_be_a_pair_as_in_the_authors_files() -> None:
    as_pairs = [CONV | {"kernel": [1, 1]}, ATROUS | {"kernel": [3, 3]}]
    assert Cell.from_json(json.dumps(as_pairs)) == Cell.from_json(json.dumps([CONV, ATROUS]))


def test_neutral_rate_of_a_1x1_kernel_is_dropped() -> None:
    assert Cell.from_json(json.dumps([CONV | {"rate": [1, 1]}])) == Cell((Branch(-1, Conv1x1()),))


def test_a_cell_may_read_several_layers_of_a_backbone() -> None:
    cell = Cell.from_json(json.dumps([CONV | {"input": -3}, ATROUS, POOL]))
    assert str(cell) == "conv1x1(F3), sep3x3 6x21(F), pool 2x4(0)"
    assert cell.num_inputs == 3
    assert cell.channels_read((8, 16, 32), branch_channels=4) == [32, 8, 4]
    with pytest.raises(ValueError, match=r"^the cell reads input -3, and the backbone gives 2 layers$"):
        cell.channels_read((8, 16), branch_channels=4)


def test_a_cell_without_branches() -> None:
    cell = Cell.from_json("[]")
    assert (cell, str(cell), cell.num_inputs, cell.to_json()) == (Cell(()), "norm", 1, "[]\n")


@given(cells(num_inputs=3))
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
    assert {op.rate for op in OPERATIONS if isinstance(op, AtrousSeparableConv)} == {(h, w) for h in RATES for w in RATES}
    grid_sizes = {op.grid_size for op in OPERATIONS if isinstance(op, PyramidPooling)}
    assert grid_sizes == {(h, w) for h in GRID_SIZES for w in GRID_SIZES}
    assert OPERATIONS.count(Conv1x1()) == 1


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
        ([CONV, CONV | {"input": "F2"}], 1, "input"),
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


def test_an_operation_has_its_own_fields_alone() -> None:
    with pytest.raises(TypeError, match="rate"):
        Conv1x1(rate=(1, 1))  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="grid_size"):
        AtrousSeparableConv(rate=(1, 1), grid_size=(1, 1))  # type: ignore[call-arg]


@pytest.mark.parametrize("value", [None, 6, (6,), (6, 6, 6), (0, 1), (1, -1), (1.0, 1), (True, 1), "66"])
def test_an_operation_checks_its_field(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^rate must be two integers of at least 1, as \[height, width\], got "):
        AtrousSeparableConv(rate=value)
    with pytest.raises(ValueError, match=r"^grid_size must be two integers of at least 1, as \[height, width\], got "):
        PyramidPooling(grid_size=value)


def test_operations_are_immutable_data() -> None:
    from_list = AtrousSeparableConv(rate=[6, 21])  # type: ignore[arg-type]
    assert from_list.rate == (6, 21)
    same: set[Operation] = {from_list, AtrousSeparableConv(rate=(6, 21)), Conv1x1(), Conv1x1()}
    assert len(same) == 2
    assert len({AtrousSeparableConv(rate=(1, 2)), PyramidPooling(grid_size=(1, 2)), PyramidPooling(grid_size=(2, 1))}) == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        from_list.rate = (1, 1)  # type: ignore[misc]


@pytest.mark.parametrize("kind", get_args(Operation))
def test_every_operation_has_a_name_and_is_drawn(kind: type) -> None:
    """`str` is the operation's name in the databases of searches; property tests reach every operation."""
    assert "__str__" in vars(kind)
    assert isinstance(find(operations(), lambda operation: isinstance(operation, kind)), kind)


def test_cells_are_immutable_data() -> None:
    cell = Cell.from_json(json.dumps([CONV, ATROUS]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        cell.branches = ()  # type: ignore[misc]
    from_list = Cell(list(cell.branches))  # type: ignore[arg-type]
    assert {from_list, cell} == {cell}
