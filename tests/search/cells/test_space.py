import json
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from scipy import stats

import search.cells.space
from reference.cell import BACKBONE_FEATURE, OPERATIONS, AtrousSeparableConv, Branch, Cell, Operation, PyramidPooling
from search.cells.space import SearchSpace, canonical_form, cell_hash, load_cell, load_cells
from search.errors import InputError
from tests.strategies import cells, rng_seeds

FALSE_ALARM_RATE = 1e-6  # of a whole test, shared by its chi-square tests (Bonferroni)
POOL = PyramidPooling(grid_size=(1, 1))


def all_cells(num_branches: int, operations: tuple[Operation, ...] = OPERATIONS) -> list[Cell]:
    branches = [[Branch(j, op) for j in range(BACKBONE_FEATURE, i) for op in operations] for i in range(num_branches)]
    return [Cell(chosen) for chosen in product(*branches)]


def renumbered(cell: Cell, order: tuple[int, ...]) -> Cell:
    """The same graph with branch `order[k]` in place k; ValueError where a branch would come before its input."""
    place = {BACKBONE_FEATURE: BACKBONE_FEATURE} | {old: new for new, old in enumerate(order)}
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
            i for i, branch in enumerate(cell.branches) if i not in order and branch.input_index in (BACKBONE_FEATURE, *order)
        ]
        order.append(int(rng.choice(ready)))
    return tuple(order)


@pytest.fixture
def two_operations(monkeypatch: pytest.MonkeyPatch) -> tuple[Operation, ...]:
    operations = (OPERATIONS[0], POOL)
    monkeypatch.setattr(search.cells.space, "OPERATIONS", operations)
    monkeypatch.setattr(search.cells.space, "OPERATION_SET", frozenset(operations))
    return operations


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


@pytest.mark.parametrize("num_branches", [1, 2, 3, 4, 5])
def test_canonical_forms_are_equal_exactly_for_isomorphic_cells(
    num_branches: int, two_operations: tuple[Operation, ...]
) -> None:
    cells_of_form: dict[Cell, set[Cell]] = {}
    for cell in all_cells(num_branches, two_operations):
        cells_of_form.setdefault(canonical_form(cell), set()).add(cell)
    for form, same in cells_of_form.items():
        assert same == isomorphic_cells(form)
    assert len(cells_of_form) == SearchSpace(num_branches).canonical_size()
    assert sum(map(len, cells_of_form.values())) == SearchSpace(num_branches).size()


@given(cell=cells(), seed=rng_seeds())
def test_branch_order_does_not_change_the_canonical_form(cell: Cell, seed: int) -> None:
    other = renumbered(cell, random_order(cell, np.random.default_rng(seed)))
    form = canonical_form(cell)
    assert canonical_form(other) == form
    assert cell_hash(other) == cell_hash(cell) == cell_hash(form)
    assert canonical_form(form) == form
    assert sorted(str(b.operation) for b in form.branches) == sorted(str(b.operation) for b in cell.branches)


def test_cell_hash_stays_the_same_between_releases() -> None:
    assert cell_hash(load_cell("dpc")) == "e4b16ca80db4"  # stored in the results of past runs


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


def test_samples_are_uniform_over_whole_cells(two_operations: tuple[Operation, ...]) -> None:
    space, rng = SearchSpace(3), np.random.default_rng(1)
    cells = all_cells(3, two_operations)
    counts = dict.fromkeys(cells, 0)
    for _ in range(100 * len(cells)):
        counts[space.sample(rng)] += 1
    assert stats.chisquare(list(counts.values())).pvalue > FALSE_ALARM_RATE


def test_mutations_are_uniform_over_the_neighbours() -> None:
    space, rng = SearchSpace(2), np.random.default_rng(2)
    cell = space.sample(rng)
    counts = dict.fromkeys(space.neighbours(cell), 0)
    for _ in range(50 * len(counts)):
        counts[space.mutate(cell, rng)] += 1
    assert stats.chisquare(list(counts.values())).pvalue > FALSE_ALARM_RATE


@given(cell=cells(max_branches=6, searchable=True))
def test_neighbours_differ_in_one_choice(cell: Cell) -> None:
    num_branches = len(cell.branches)
    space = SearchSpace(num_branches)
    neighbours = list(space.neighbours(cell))
    assert len(set(neighbours)) == len(neighbours) == num_branches * (num_branches - 1) // 2 + 80 * num_branches
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


def test_a_space_needs_a_branch() -> None:
    with pytest.raises(ValueError, match="num_branches must be at least 1, got 0"):
        SearchSpace(0)


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
    with pytest.raises(InputError, match="no cell 'dcp': give one of aspp, dpc, psp, or the path"):
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
