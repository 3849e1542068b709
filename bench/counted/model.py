"""Microseconds of a launch on an H200, from what its warps execute: counts of compiled code, guessed rates and shares.

    t = max(busiest unit / share, bytes loaded / L2 rate, bytes that must move / HBM rate, latency) + gap

*Busiest unit*: the cycles that the multiprocessor with the most programs needs at least, as if its busiest unit never waited.

`share` is the part of a unit's peak that a kernel reaches. It is guessed from the warps that can take turns, as if every
kernel waited for memory alike; no GPU has confirmed any of it.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from bench.counted.sass import Executed

MULTIPROCESSORS, SCHEDULERS, CLOCK_HZ = 132, 4, 1.9e9
REGISTERS, SHARED_BYTES, WARPS, BLOCKS = 65536, 227 * 1024, 64, 32  # of a multiprocessor
L2_BYTES_PER_S, HBM_BYTES_PER_S = 6.0e12, 4.3e12
L2_BYTES = 35e6  # of which a launch finds again what the last one wrote
GAP_US = 1.4  # between dependent nodes of a graph
FIRST_LOAD_US, NEXT_LOAD_US = 1.0, 0.35  # a program's start and its first wait for memory; every further wait
SHARE_OF_WARPS = (0.25, 0.30, 0.45, 0.55, 0.62, 0.66, 0.70, 0.72)  # by warps that a scheduler can choose from
SHARE_OF_PIPELINE = 0.75  # where loads arrive while the matrix unit works, or arithmetic waits for no load
BARRIER_SHARE = 0.8
SLOW_OPERATIONS_US = {"sum": 6.0, "_fused_sgd_": 10.0}  # few blocks: SGD gives 65,536 numbers to each
INSTRUCTIONS_PER_LOAD = 50  # from so many on, loads are no reason to wait

# Cycles of a scheduler's unit for one instruction of a warp: by opcode, without modifiers.
_CYCLES = [
    (
        "alu",
        2.0,
        r"[FI]MNMX|VIMNMX|VIADDMNMX|[FI]SETP|FSET|F?SEL|P?LOP3?|SHF|LEA|IADD3?|VIADD|PRMT|F2FP|I2FP|IABS|R2P|P2R|VOTE",
    ),
    ("fma", 1.0, r"FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2"),
    ("fma", 2.0, r"IMAD|IDP"),
    ("xu", 8.0, r"MUFU|F2F|F2I|I2F|POPC|FRND"),
    # A multiprocessor moves 128 bytes in a cycle, for all four schedulers; wider accesses take longer, see below.
    ("lsu", 4.0, r"LDG|STG|LDGSTS|LDS|STS|LDSM|STSM|SHFL|ATOMG?|RED"),
]
UNITS = ("alu", "fma", "xu", "lsu")
_FLOPS_PER_CYCLE = {"BF16": 1024, "F16": 1024, "TF32": 512}  # of a scheduler's matrix unit
_GLOBAL_LOADS, _GLOBAL_STORES = ("LDG", "LDGSTS"), ("STG", "RED", "ATOMG")


class Code(NamedTuple):
    """A compiled kernel's share of a multiprocessor, and what one of its warps executes."""

    executed: Executed  # by a warp
    registers: int  # a thread
    shared: int  # bytes a program
    warps: int


class Cost(NamedTuple):
    """What a launch costs, counted, and the microseconds that the model makes of it."""

    blocks_per_multiprocessor: int
    million_warp_instructions: float
    requested_mb: float  # by loads from global memory: at most so much moves from the L2 cache to the multiprocessors
    moved_mb: float  # that must move between memory and the GPU
    bound: str  # what its time is made of: a unit, "L2", "HBM", or "latency"
    us: float
    busy_us: float  # the part in which nothing else could use the GPU: without gap and latency, all multiprocessors filled


def cost_of(code: Code, programs: int, argument_bytes: float) -> Cost:
    """`argument_bytes`: of all tensors of a launch, each once. Of one that is read in part, only what is loaded counts."""
    blocks, warps = blocks_per_multiprocessor(code), programs * code.warps
    on_busiest = math.ceil(programs / MULTIPROCESSORS)
    resident = min(blocks, on_busiest) * code.warps  # warps on the busiest multiprocessor at a time
    cycles = cycles_of(code.executed.total)
    schedulers = min(SCHEDULERS, resident)
    units = {unit: 1e6 * c * on_busiest * code.warps / schedulers / CLOCK_HZ for unit, c in cycles.items()}
    unit = max(units, key=lambda name: units[name])
    requested = 32.0 * warps * bytes_of(code.executed.total, _GLOBAL_LOADS)
    scalars = {opcode: n for opcode, n in code.executed.total.items() if bytes_per_thread(opcode) < 8}
    from_l2 = requested - 32.0 * warps * bytes_of(scalars, ("LDG",))  # these read the same lines again, in the L1 cache
    stored = 32.0 * warps * bytes_of(code.executed.total, _GLOBAL_STORES)
    moved = min(argument_bytes, requested + stored)
    times = {
        unit: units[unit] / share_of(code, resident // schedulers),
        "L2": 1e6 * from_l2 / L2_BYTES_PER_S,
        "HBM": 1e6 * moved / HBM_BYTES_PER_S,
        "latency": FIRST_LOAD_US + NEXT_LOAD_US * code.executed.waits,
    }
    bound = max(times, key=lambda name: times[name])
    evenly = 1e6 * cycles[unit] * warps / (MULTIPROCESSORS * SCHEDULERS) / CLOCK_HZ
    busy = max(evenly / share_of(code, WARPS // SCHEDULERS), times["L2"], times["HBM"])
    millions = 1e-6 * warps * cycles["issue"]
    return Cost(blocks, millions, 1e-6 * requested, 1e-6 * moved, bound, times[bound] + GAP_US, busy)


def us_of_torch(operation: str, moved_bytes: float) -> tuple[float, float]:
    """An operation of PyTorch, by the bytes that it moves, from the L2 cache if they fit there; and how long it is busy."""
    rate = L2_BYTES_PER_S if moved_bytes < L2_BYTES else HBM_BYTES_PER_S
    busy = 1.2e6 * moved_bytes / rate
    return max(SLOW_OPERATIONS_US.get(operation, 1.0), busy) + GAP_US, busy


def blocks_per_multiprocessor(code: Code) -> int:
    """How many programs a multiprocessor can hold at a time: by registers, shared memory and warps."""
    of_warp = 256 * math.ceil(code.registers * 32 / 256)
    by_registers = REGISTERS // (max(of_warp, 256) * code.warps)
    return max(1, min(by_registers, SHARED_BYTES // (code.shared + 1024), WARPS // code.warps, BLOCKS))


def share_of(code: Code, warps: int) -> float:
    """The guessed part of its peak that the busiest unit reaches, if a scheduler can choose from so many warps."""
    body = code.executed.in_loops or code.executed.total
    loads = sum(times for opcode, times in body.items() if base(opcode) == "LDG")
    if "LDGSTS" in map(base, body) or sum(body.values()) > INSTRUCTIONS_PER_LOAD * max(loads, 1.0):
        share = SHARE_OF_PIPELINE
    else:
        share = SHARE_OF_WARPS[min(warps, len(SHARE_OF_WARPS) - 1)]
    waits_for_others = any(base(opcode) == "BAR" for opcode in body) and "LDGSTS" not in map(base, body)
    return share * (BARRIER_SHARE if waits_for_others else 1.0)


def cycles_of(executed: Mapping[str, float]) -> dict[str, float]:
    """Cycles that one warp occupies each unit of its scheduler; `issue` is one for each instruction."""
    cycles = dict.fromkeys(["issue", *UNITS, "tensor"], 0.0)
    for opcode, times in executed.items():
        cycles["issue"] += times
        cycles["tensor"] += times * tensor_cycles(opcode)
        for unit, of_one, known in _CYCLES:
            if re.fullmatch(known, base(opcode)):
                cycles[unit] += times * of_one * (max(1, bytes_per_thread(opcode) // 4) if unit == "lsu" else 1)
    return cycles


def tensor_cycles(opcode: str) -> float:
    """Cycles of one warp's part in a matrix product: four warps share the 64 rows of an HGMMA.

    >>> tensor_cycles("HGMMA.64x128x16.F32.BF16"), tensor_cycles("HMMA.16816.F32.BF16"), tensor_cycles("FFMA")
    (64.0, 4.0, 0.0)
    """
    if base(opcode) not in ("HGMMA", "HMMA"):
        return 0.0
    rate = next((rate for name, rate in _FLOPS_PER_CYCLE.items() if name in opcode.split(".")), 1024)
    sizes = re.search(r"(\d+)x(\d+)x(\d+)", opcode)
    if sizes:
        rows, columns, depth = map(int, sizes.groups())
        return 2 * rows * columns * depth / 4 / rate
    return 2 * 16 * 8 * (16 if ".16816" in opcode else 8) / rate


def bytes_of(executed: Mapping[str, float], kinds: tuple[str, ...]) -> float:
    """Bytes that one thread asks for by these instructions."""
    return sum(times * bytes_per_thread(opcode) for opcode, times in executed.items() if base(opcode) in kinds)


def bytes_per_thread(opcode: str) -> int:
    """
    >>> bytes_per_thread("LDG.E.128"), bytes_per_thread("LDG.E.U8"), bytes_per_thread("LDS"), bytes_per_thread("LDSM.16.M88.4")
    (16, 1, 4, 16)
    """
    modifiers = opcode.split(".")[1:]
    if base(opcode) in ("LDSM", "STSM"):
        return 4 * int(modifiers[-1]) if modifiers[-1].isdigit() else 4
    known = {"128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1, "8": 1}
    return next((size for name, size in known.items() if name in modifiers), 4)


def base(opcode: str) -> str:
    """Without modifiers."""
    return opcode.split(".", 1)[0]
