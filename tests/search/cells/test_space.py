import json
import math
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from reference.cell import (
    GRID_SIZES,
    OPERATIONS,
    RATES,
    AtrousSeparableConv,
    Branch,
    Cell,
    Conv1x1,
    Operation,
    PyramidPooling,
)
from search.cells.reach import FeatureMaps
from search.cells.space import SearchSpace, canonical_form, cell_hash, known_cells, load_cell, load_cells
from search.errors import InputError
from tests.strategies import cells, rng_seeds

FALSE_ALARM_RATE = 1e-6  # of a whole test, shared by its chi-square tests (Bonferroni)
POOL = PyramidPooling(grid_size=(1, 1))


def all_cells(num_branches: int, operations: tuple[Operation, ...] = OPERATIONS, num_inputs: int = 1) -> list[Cell]:
    branches = [[Branch(j, op) for j in range(-num_inputs, i) for op in operations] for i in range(num_branches)]
    return [Cell(chosen) for chosen in product(*branches)]


def renumbered(cell: Cell, order: tuple[int, ...]) -> Cell:
    """The same graph with branch `order[k]` in place k; ValueError where a branch would come before its input."""
    place = {-k: -k for k in range(1, cell.num_inputs + 1)} | {old: new for new, old in enumerate(order)}
    return Cell(tuple(Branch(place[cell.branches[old].input_index], cell.branches[old].operation) for old in order))


def isomorphic_cells(cell: Cell) -> set[Cell]:
    cells = set()
    for order in permutations(range(len(cell.branches))):
        try:
            cells.add(renumbered(cell, order))
        except ValueError:
            continue
    return cells


def random_order(cell: Cell, rng: np.random.Generator) -> tuple[int, ...]:
    order: list[int] = []
    while len(order) < len(cell.branches):
        ready = [
            i
            for i, branch in enumerate(cell.branches)
            if i not in order and (branch.input_index < 0 or branch.input_index in order)
        ]
        order.append(int(rng.choice(ready)))
    return tuple(order)


def of_two_operations(num_branches: int, num_inputs: int = 1) -> SearchSpace:
    """Cells of 1×1 convolutions and global poolings."""
    return SearchSpace(num_branches, rates=(), grid_sizes=(1,), num_inputs=num_inputs)


@pytest.mark.parametrize(
    ("num_branches", "size"), [(1, 81), (2, 13_122), (3, 3_188_646), (4, 1_033_121_304), (5, 418_414_128_120)]
)
def test_size_is_exact(num_branches: int, size: int) -> None:
    assert SearchSpace(num_branches).size() == size


@pytest.mark.parametrize("num_branches", [1, 2])
def test_sizes_count_every_cell(num_branches: int) -> None:
    space, cells = SearchSpace(num_branches), all_cells(num_branches)
    assert len(set(cells)) == space.size()
    assert len(set(map(canonical_form, cells))) == space.canonical_size()
    assert all(map(space.contains, cells))


@pytest.mark.parametrize(
    ("num_branches", "num_inputs"), [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (1, 4), (2, 3), (3, 3), (4, 2)]
)
def test_canonical_forms_are_equal_exactly_for_isomorphic_cells(num_branches: int, num_inputs: int) -> None:
    space = of_two_operations(num_branches, num_inputs)
    cells_of_form: dict[Cell, set[Cell]] = {}
    for cell in all_cells(num_branches, space.operations, num_inputs):
        cells_of_form.setdefault(canonical_form(cell), set()).add(cell)
    for form, same in cells_of_form.items():
        assert same == isomorphic_cells(form)
    assert len(cells_of_form) == space.canonical_size()
    assert sum(map(len, cells_of_form.values())) == space.size()


SMALL_MAPS = [
    FeatureMaps((17, 17), (17, 17)),
    FeatureMaps((3, 4), (3, 4), rate_multiplier=2),
    FeatureMaps((2, 17), (13, 9)),
    FeatureMaps((8, 8), (8, 8), pooling="grid_cells"),
]


@pytest.mark.parametrize("maps", SMALL_MAPS, ids=str)
@pytest.mark.parametrize(
    ("num_branches", "rates", "grid_sizes"), [(1, RATES, GRID_SIZES), (3, (2, 18, 21), ()), (2, (1,), (1, 8))]
)
def test_sizes_on_a_map_count_every_cell(
    maps: FeatureMaps, num_branches: int, rates: tuple[int, ...], grid_sizes: tuple[int, ...]
) -> None:
    space = SearchSpace(num_branches, rates, grid_sizes, maps)
    cells = all_cells(num_branches, space.operations)
    assert len(set(cells)) == space.size()
    assert len(set(map(space.canonical_form, cells))) == space.canonical_size()
    assert all(map(space.contains, cells))


@pytest.mark.parametrize(("extent", "different"), [(1, 2), (2, 8), (17, 66), (22, 81)])
def test_operations_that_differ_on_a_square_map(extent: int, different: int) -> None:
    """Extent 1: 1×1 and a rate. 2: rates of 1 or more (4), and windows of 1 or 2 (4, of which one is 1×1). 17: 1 + 7² + 4²."""
    assert SearchSpace(1, maps=FeatureMaps((extent, extent), (extent, extent))).canonical_size() == different


@given(cell=cells(max_branches=6), maps=st.sampled_from(SMALL_MAPS), seed=rng_seeds())
def test_cells_that_do_the_same_have_one_canonical_form(cell: Cell, maps: FeatureMaps, seed: int) -> None:
    space = SearchSpace(maps=maps)
    form = space.canonical_form(cell)
    assert space.canonical_form(form) == form == canonical_form(form)
    rng = np.random.default_rng(seed)
    larger = [Branch(b.input_index, as_good(b.operation, maps, rng)) for b in cell.branches]
    assert space.canonical_form(renumbered(Cell(tuple(larger)), random_order(cell, rng))) == form
    assert sorted(map(str, (maps.smallest(b.operation) for b in cell.branches))) == sorted(
        str(b.operation) for b in form.branches
    )


def as_good(operation: Operation, maps: FeatureMaps, rng: np.random.Generator) -> Operation:
    """One of the paper's operations that does the same, or itself."""
    same = [other for other in OPERATIONS if maps.smallest(other) == maps.smallest(operation)] or [operation]
    return same[rng.integers(len(same))]


@given(cell=cells(max_branches=6))
def test_without_a_map_only_the_order_of_branches_does_not_count(cell: Cell) -> None:
    assert SearchSpace().canonical_form(cell) == canonical_form(cell)


@pytest.mark.parametrize(
    ("restriction", "message"),
    [
        ({"rates": (3, 1)}, r"rates must be different integers of at least 1, in ascending order, got \(3, 1\)"),
        ({"rates": (0, 1)}, r"rates must be .*, got \(0, 1\)"),
        ({"grid_sizes": (2, 2)}, r"grid_sizes must be .*, got \(2, 2\)"),
    ],
)
def test_a_restriction_names_the_field(restriction: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchSpace(2, **restriction)  # type: ignore[arg-type]  # the fields are tuples


def test_a_restricted_space_proposes_nothing_else() -> None:
    space, rng = SearchSpace(4, rates=(1, 2), grid_sizes=()), np.random.default_rng(4)
    assert space.size() == math.factorial(4) * 5**4
    drawn = [space.sample(rng) for _ in range(50)]
    drawn += [space.mutate(cell, rng) for cell in drawn]
    assert {branch.operation for cell in drawn for branch in cell.branches} == set(space.operations)
    assert all(map(space.contains, drawn))
    assert not space.contains(Cell((Branch(-1, POOL),) * 4))


@pytest.mark.parametrize(("num_branches", "num_inputs"), [(1, 3), (2, 2), (3, 2)])
def test_sizes_of_several_inputs_on_a_map_count_every_cell(num_branches: int, num_inputs: int) -> None:
    space = SearchSpace(num_branches, (2, 18), (8,), FeatureMaps((3, 4), (3, 4)), num_inputs)
    cells = all_cells(num_branches, space.operations, num_inputs)
    assert len(set(cells)) == space.size()
    assert len(set(map(space.canonical_form, cells))) == space.canonical_size()
    assert all(map(space.contains, cells))
    assert not all(map(replace(space, num_inputs=num_inputs - 1).contains, cells))


def test_sizes_of_the_papers_cells_on_four_layers() -> None:
    """4·5·6·7·8·81⁵."""
    space = SearchSpace(num_inputs=4)
    assert space.size() == 6720 * 81**5
    assert space.describe() == ["2.3e+13 cells that read 4 layers, 7.7e+11 of them different"]


def test_a_space_says_how_many_cells_differ_and_what_is_out_of_reach() -> None:
    assert SearchSpace(2).describe() == ["13,122 cells, 9,882 of them different"]
    assert SearchSpace(maps=FeatureMaps((17, 17), (13, 17))).describe() == [
        "4.2e+11 cells, 1.4e+10 of them different on a 17×17 map",
        "out of reach on the 17×17 map: rate 18, rate 21 (height and width)",
        "out of reach in the 13×17 training crops: rate 15 (height)",
    ]


@given(cell=cells(min_branches=0, num_inputs=3), seed=rng_seeds())
def test_branch_order_does_not_change_the_canonical_form(cell: Cell, seed: int) -> None:
    other = renumbered(cell, random_order(cell, np.random.default_rng(seed)))
    form = canonical_form(cell)
    assert canonical_form(other) == form
    assert cell_hash(other) == cell_hash(cell) == cell_hash(form)
    assert canonical_form(form) == form
    assert sorted(str(b.operation) for b in form.branches) == sorted(str(b.operation) for b in cell.branches)


def test_cell_hash_stays_the_same_between_releases() -> None:
    assert cell_hash(load_cell("dpc")) == "e4b16ca80db4"  # stored in the results of past runs
    others = [Cell(()), load_cell("mlp"), Cell((Branch(-2, Conv1x1()),))]
    assert len({cell_hash(cell) for cell in others}) == 3


def test_samples_are_uniform_in_each_choice() -> None:
    space, rng = SearchSpace(5), np.random.default_rng(0)
    cells = [space.sample(rng) for _ in range(12_000)]
    inputs = np.array([[branch.input_index + 1 for branch in cell.branches] for cell in cells])
    operations = np.array([[OPERATIONS.index(branch.operation) for branch in cell.branches] for cell in cells])
    counts = [np.bincount(operations[:, i], minlength=81) for i in range(5)]
    counts += [np.bincount(inputs[:, i], minlength=i + 1) for i in range(1, 5)]
    counts += [np.bincount(np.ravel_multi_index(tuple(inputs.T), (1, 2, 3, 4, 5)), minlength=120)]
    assert [len(count) for count in counts] == [81] * 5 + [2, 3, 4, 5, 120]
    assert min(stats.chisquare(count).pvalue for count in counts) > FALSE_ALARM_RATE / len(counts)


def test_samples_are_uniform_over_whole_cells() -> None:
    space, rng = of_two_operations(3), np.random.default_rng(1)
    cells = all_cells(3, space.operations)
    counts = dict.fromkeys(cells, 0)
    for _ in range(100 * len(cells)):
        counts[space.sample(rng)] += 1
    assert stats.chisquare(list(counts.values())).pvalue > FALSE_ALARM_RATE


def test_samples_of_several_inputs_are_uniform_over_whole_cells() -> None:
    space, rng = of_two_operations(2, num_inputs=3), np.random.default_rng(1)
    counts = dict.fromkeys(all_cells(2, space.operations, 3), 0)
    for _ in range(100 * len(counts)):
        counts[space.sample(rng)] += 1
    assert stats.chisquare(list(counts.values())).pvalue > FALSE_ALARM_RATE


@pytest.mark.parametrize("num_inputs", [1, 3])
def test_mutations_are_uniform_over_the_neighbours(num_inputs: int) -> None:
    space, rng = SearchSpace(2, num_inputs=num_inputs), np.random.default_rng(2)
    cell = space.sample(rng)
    counts = dict.fromkeys(space.neighbours(cell), 0)
    for _ in range(50 * len(counts)):
        counts[space.mutate(cell, rng)] += 1
    assert stats.chisquare(list(counts.values())).pvalue > FALSE_ALARM_RATE


@given(cell=cells(max_branches=6, searchable=True, num_inputs=3))
def test_neighbours_differ_in_one_choice(cell: Cell) -> None:
    num_branches, num_inputs = len(cell.branches), cell.num_inputs
    space = SearchSpace(num_branches, num_inputs=num_inputs)
    neighbours = list(space.neighbours(cell))
    other_inputs = num_branches * (num_branches - 1) // 2 + (num_inputs - 1) * num_branches
    assert len(set(neighbours)) == len(neighbours) == other_inputs + 80 * num_branches
    for neighbour in neighbours:
        assert space.contains(neighbour)
        pairs = zip(cell.branches, neighbour.branches, strict=True)
        assert sum((a.input_index != b.input_index) + (a.operation != b.operation) for a, b in pairs) == 1


@given(cell=cells(max_branches=6, searchable=True), seed=rng_seeds())
def test_neighbours_are_mutual(cell: Cell, seed: int) -> None:
    space = SearchSpace(len(cell.branches))
    assert cell in space.neighbours(space.mutate(cell, np.random.default_rng(seed)))


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (AtrousSeparableConv(rate=(2, 1)), r"branch 1: rate must be two of 1, 3, .* 21, got \(2, 1\)"),
        (PyramidPooling(grid_size=(1, 3)), r"branch 1: grid_size must be two of 1, 2, 4, 8, got \(1, 3\)"),
    ],
)
def test_check_names_the_branch_and_the_field(operation: Operation, message: str) -> None:
    space, cell = SearchSpace(2), Cell((Branch(-1, POOL), Branch(0, operation)))
    assert not space.contains(cell)
    with pytest.raises(ValueError, match=message):
        space.check(cell)
    with pytest.raises(ValueError, match=message):
        space.neighbours(cell)


def test_check_counts_branches() -> None:
    cell = Cell((Branch(-1, POOL),))
    SearchSpace(1).check(cell)
    assert not SearchSpace(2).contains(cell)
    with pytest.raises(ValueError, match="has 2 branches, got 1"):
        SearchSpace(2).check(cell)


def test_a_space_needs_a_branch_and_an_input() -> None:
    with pytest.raises(ValueError, match="num_branches must be at least 1, got 0"):
        SearchSpace(0)
    with pytest.raises(ValueError, match="num_inputs must be at least 1, got 0"):
        SearchSpace(num_inputs=0)


def test_a_layer_that_is_not_there_is_outside_the_space() -> None:
    cell = Cell((Branch(-2, Conv1x1()),))
    SearchSpace(1, num_inputs=2).check(cell)
    assert not SearchSpace(1).contains(cell)
    with pytest.raises(ValueError, match="the cell reads input -2, and the backbone gives 1 layer"):
        SearchSpace(1).check(cell)


def test_known_cells_read_all_layers_or_the_deepest() -> None:
    known = known_cells(3)
    assert tuple(known) == ("linear", "mlp", "aspp", "dpc", "psp")
    assert known["linear"] == Cell(())
    assert str(known["mlp"]) == "conv1x1(F), conv1x1(F2), conv1x1(F3)"
    assert {known[name].num_inputs for name in ("aspp", "dpc", "psp")} == {1}
    assert not any(map(SearchSpace().contains, (known["linear"], known["mlp"])))  # no search proposes them
    assert str(load_cell("mlp")) == "conv1x1(F)"


def test_a_compared_cell_that_reads_a_layer_too_many_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text(Cell((Branch(-3, Conv1x1()),)).to_json())
    assert load_cells([str(path), "mlp"], 3)["mlp"].num_inputs == 3
    message = "^`compare` .*deep.json: the cell reads input -3, and the backbone gives 2 layers; give as many `layers`"
    with pytest.raises(InputError, match=message):
        load_cells([str(path)], 2)


@pytest.mark.parametrize("name", ["dpc", "aspp", "psp"])
def test_published_cells_are_in_the_space(name: str) -> None:
    SearchSpace().check(load_cell(name))


def test_load_cell_reads_a_path(tmp_path: Path) -> None:
    cell = SearchSpace().sample(np.random.default_rng(3))
    (tmp_path / "cell.json").write_text(cell.to_json())
    assert load_cell(str(tmp_path / "cell.json")) == cell


def test_load_cell_says_what_is_wrong(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps([{"op": "conv", "kernel": 1, "inputs": -1}]))
    with pytest.raises(InputError, match=r"broken\.json: branch 0: unknown key 'inputs'"):
        load_cell(str(broken))
    with pytest.raises(InputError, match="no cell 'dcp': give one of linear, mlp, aspp, dpc, psp, or the path"):
        load_cell("dcp")
    with pytest.raises(InputError, match="cannot read the cell"):
        load_cell(str(tmp_path))


def test_cells_to_compare_have_names_of_their_own(tmp_path: Path) -> None:
    for name in ("mine.json", "best.json", "trial 3.json"):
        (tmp_path / name).write_text(load_cell("psp").to_json())
    assert load_cells(("dpc", str(tmp_path / "mine.json"))) == {"dpc": load_cell("dpc"), "mine": load_cell("psp")}
    for name in ("best.json", "trial 3.json"):
        with pytest.raises(InputError, match=r"`compare` .*: the search has cells called .* itself, rename the file"):
            load_cells((str(tmp_path / name),))
    with pytest.raises(InputError, match="`compare` has two cells of the name 'dpc'"):
        load_cells(("dpc", "dpc"))
    files = [str(tmp_path / name) for name in ("a b.json", "a_b.json")]
    for file in files:
        Path(file).write_text(load_cell("psp").to_json())
    with pytest.raises(InputError, match="`compare` has two cells of the names 'a b' and 'a_b', which are one file's: rename"):
        load_cells(files)
