"""A line for each node of an iteration: what it is, what was counted, what the model makes of it."""

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, get_type_hints

from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.cases import DType
from bench.counted import model, sass
from bench.counted.iteration import Node, TorchOperation, TritonLaunch, described, iteration
from bench.counted.model import Code
from bench.counted.operations import operations
from bench.counted.trips import trips_of
from bench.plans import PAPER
from bench.profiles import PREDICTIONS
from fast.kernels.triton import compilation
from search.cells.space import load_cell

# The cells and dtypes whose iterations are counted; `float32` is TF32, as PyTorch sets it for convolutions.
ITERATIONS: dict[str, tuple[str, DType]] = {
    "dpc-bfloat16": ("dpc", "bfloat16"),
    "dpc-float32": ("dpc", "float32"),
    "aspp-bfloat16": ("aspp", "bfloat16"),
    "psp-bfloat16": ("psp", "bfloat16"),
}
OPERATIONS_TABLE = "operations"
TABLES = (*ITERATIONS, OPERATIONS_TABLE)
TOLERANCE = 0.05  # change of a kernel's instructions that is no difference
TOLERANCE_OF_VERSIONS = 0.25  # the same, if another version of Triton compiled the table; less than 1 % of all is none either
PART_THAT_MATTERS = 0.01
TOLERANCE_OF_TIME = 0.02  # change of the whole predicted time, by the model or by how launches are made


class Row(NamedTuple):
    """A node of the captured graph; what PyTorch launches has no count of instructions."""

    kernel: str
    of: str  # the map, the product or the sum that it works on
    programs: int
    warps: int  # of a program
    registers: int  # of a thread
    blocks_per_multiprocessor: int
    million_warp_instructions: float
    requested_mb: float  # by loads: at most so much moves from the L2 cache to the multiprocessors
    moved_mb: float  # that must move between memory and the GPU
    bound: str
    predicted_us: float
    busy_us: float  # the part of it in which nothing else could use the GPU
    triton: str = version("triton")


class Counter:
    """Counts launches for one architecture; equal launches are compiled and read once."""

    def __init__(self, architecture: int = 90) -> None:
        compilation.choose_absent_gpu(architecture)
        self._read = dict[str, tuple[list[sass.Instruction], dict[str, int]]]()

    def row(self, node: Node) -> Row:
        if isinstance(node, TorchOperation):
            us, busy_us = model.us_of_torch(node.name, node.moved_bytes)
            moved_mb = round(1e-6 * node.moved_bytes, 1)
            return Row(f"PyTorch {node.name}", node.out, 0, 0, 0, 0, 0.0, 0.0, moved_mb, "", round(us, 1), round(busy_us, 1))
        code = self.code(node)
        cost = model.cost_of(code, node.programs, bytes_of_arguments(node))
        return Row(
            node.name,
            what_it_works_on(node),
            programs=node.programs,
            warps=code.warps,
            registers=code.registers,
            blocks_per_multiprocessor=cost.blocks_per_multiprocessor,
            million_warp_instructions=round(cost.million_warp_instructions, 3),
            requested_mb=round(cost.requested_mb, 1),
            moved_mb=round(cost.moved_mb, 1),
            bound=cost.bound,
            predicted_us=round(cost.us, 1),
            busy_us=round(cost.busy_us, 1),
        )

    def code(self, node: TritonLaunch) -> Code:
        """What a warp of this launch executes. Raises ValueError if trips.py does not know the kernel's loops."""
        binary = compilation.compiled(node.kernel, node.programs, node.launch, node.arguments, **node.constants)
        if binary.hash not in self._read:
            instructions = sass.instructions(sass.disassembled(binary.asm["cubin"]))
            self._read[binary.hash] = instructions, compilation.usage(binary)
        instructions, usage = self._read[binary.hash]
        try:
            executed = sass.executed(instructions, trips_of(node.name, node.named_arguments()))
        except ValueError as error:
            raise ValueError(f"{node.name}: {error}: bench/counted/trips.py must say how often its loops run") from error
        return Code(executed, usage["registers"], usage["shared"], usage["warps"])


def bytes_of_arguments(node: TritonLaunch) -> float:
    """Each tensor once."""
    tensors = {x.data_ptr(): x for x in tree_leaves(node.arguments) if isinstance(x, Tensor)}
    return sum(x.numel() * x.element_size() for x in tensors.values())


def what_it_works_on(node: TritonLaunch) -> str:
    """A product's channels, a convolution's rate, otherwise the first tensor.

    Read by people, and compared with nothing.
    """
    a = node.named_arguments()
    if "rate_h" in a:
        return f"rate {a['rate_h']}×{a['rate_w']}, {a['C']} channels"
    if {"C", "C_OUT"} <= a.keys():
        return f"{a['C']} -> {a['C_OUT']} channels"
    return described(next(x for x in tree_leaves(node.arguments) if isinstance(x, Tensor)))


def counted(table: str, counter: Counter) -> list[Row]:
    """Every node of the iteration of this table, in order; or every launch of the operations."""
    if table == OPERATIONS_TABLE:
        return [counter.row(launch)._replace(of=name) for name, launch in operations()]
    cell, dtype = ITERATIONS[table]
    return [counter.row(node) for node in iteration(replace(PAPER.proxy, cell=load_cell(cell)), dtype)]


def path_of(table: str) -> Path:
    """Where `python -m bench.counted` writes it."""
    return PREDICTIONS / f"{table}.csv"


def read_rows(path: Path) -> list[Row]:
    """A table as `python -m bench.counted` writes it."""
    types = get_type_hints(Row)
    with path.open(newline="", encoding="utf-8") as file:
        return [Row(**{name: types[name](value) for name, value in line.items()}) for line in csv.DictReader(file)]


class Sum(NamedTuple):
    """A whole iteration."""

    nodes: int
    of_triton: int
    million_warp_instructions: float
    instructions_us: float  # that these take at least, however well a GPU is used
    predicted_us: float
    busy_us: float

    def __str__(self) -> str:
        instructions = f"{self.nodes} nodes, {self.million_warp_instructions:.0f} M warp instructions"
        return f"{instructions}, {self.predicted_us:.0f} us, busy {self.busy_us:.0f} us"


def sum_of(rows: list[Row]) -> Sum:
    """All nodes of an iteration together."""
    instructions = sum(row.million_warp_instructions for row in rows)
    rate = model.MULTIPROCESSORS * model.SCHEDULERS * model.CLOCK_HZ  # a second
    return Sum(
        len(rows),
        sum(row.programs > 0 for row in rows),
        instructions,
        1e12 * instructions / rate,
        sum(row.predicted_us for row in rows),
        sum(row.busy_us for row in rows),
    )


class Total(NamedTuple):
    """All launches of a kernel in an iteration."""

    launches: int
    million_warp_instructions: float
    registers: int  # at most
    blocks_per_multiprocessor: int  # at least
    predicted_us: float


def totals(rows: Iterable[Row]) -> dict[str, Total]:
    """By kernel, the longest first; all operations of PyTorch are one."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault("PyTorch" if row.kernel.startswith("PyTorch ") else row.kernel, []).append(row)
    found = {
        kernel: Total(
            len(group),
            sum(row.million_warp_instructions for row in group),
            max(row.registers for row in group),
            min(row.blocks_per_multiprocessor for row in group),
            sum(row.predicted_us for row in group),
        )
        for kernel, group in groups.items()
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].predicted_us))


def differences(table: list[Row], now: list[Row]) -> Iterator[str]:
    """What the code of today does otherwise than the table says, in words."""
    same_version = table[0].triton == now[0].triton
    tolerance = TOLERANCE if same_version else TOLERANCE_OF_VERSIONS
    before, after = totals(table), totals(now)
    for kernel in sorted({*before, *after}):
        if kernel not in before or kernel not in after or before[kernel].launches != after[kernel].launches:
            launches = [found[kernel].launches if kernel in found else 0 for found in (before, after)]
            yield f"{kernel}: {launches[1]} launches, the table has {launches[0]}"
            continue
        old, new = before[kernel].million_warp_instructions, after[kernel].million_warp_instructions
        matters = same_version or abs(new - old) > PART_THAT_MATTERS * sum_of(table).million_warp_instructions
        if abs(new - old) > tolerance * old and matters:
            yield f"{kernel}: {new:.3g} M warp instructions, the table has {old:.3g} (more than {tolerance:.0%} apart)"
    us, us_now = sum_of(table).predicted_us, sum_of(now).predicted_us
    if same_version and abs(us_now - us) > TOLERANCE_OF_TIME * us:
        yield f"the model makes {us_now:.0f} us of it, the table has {us:.0f}"


def summary(tables: Mapping[str, list[Row]]) -> str:
    """What people read first: a line for each iteration, the kernels of each, and the operations."""
    iterations = {name: rows for name, rows in tables.items() if name in ITERATIONS}
    lines = ["# Counted iterations, Triton " + next(iter(tables.values()))[0].triton, ""]
    lines += ["Instructions are counted, times are a model: [how](README.md). *Blocks*: programs a multiprocessor holds.", ""]
    columns: tuple[str, ...] = ("nodes", "of Triton", "M warp instructions", "of these alone, us", "busy, us", "predicted, us")
    lines += header("iteration", *columns)
    for name, rows in iterations.items():
        s = sum_of(rows)
        times = f"{s.instructions_us:.0f} | {s.busy_us:.0f} | {s.predicted_us:.0f}"
        lines.append(f"| {name} | {s.nodes} | {s.of_triton} | {s.million_warp_instructions:.0f} | {times} |")
    lines += ["", "*Of these alone*: if every scheduler issued an instruction in every cycle, without waiting.", ""]
    lines += ["*Busy*: without gaps between launches and what small ones leave idle, which other cells in flight may fill."]
    columns = ("launches", "M warp instructions", "registers", "blocks", "predicted, us")
    for name, rows in iterations.items():
        lines += ["", f"## {name}", "", *header("kernel", *columns)]
        for kernel, t in totals(rows).items():
            counts = f"{t.million_warp_instructions:.2f} | {t.registers} | {t.blocks_per_multiprocessor}"
            lines.append(f"| {kernel} | {t.launches} | {counts if t.registers else '| |'} | {t.predicted_us:.0f} |")
    return "\n".join([*lines, *of_operations(tables.get(OPERATIONS_TABLE, [])), ""])


def of_operations(rows: list[Row]) -> Iterator[str]:
    """A line for each operation, beside the time of a copy of the maps that it reads and writes."""
    yield from ["", "## Operations", "", *header("operation", "launches", "M warp instructions", "predicted, us", "copy, us")]
    for operation in dict.fromkeys(row.of for row in rows):
        own = [row for row in rows if row.of == operation]
        s = sum_of(own)
        copy_us = 1e12 * max(row.moved_mb for row in own) / model.HBM_BYTES_PER_S  # of several launches each moves two maps
        yield f"| {operation} | {s.nodes} | {s.million_warp_instructions:.2f} | {s.predicted_us:.1f} | {copy_us:.1f} |"


def header(*columns: str) -> list[str]:
    """The first two lines of a table in Markdown, with numbers in all columns but the first."""
    return [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
