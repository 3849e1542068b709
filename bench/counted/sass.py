"""The machine code of a compiled kernel: its instructions, its loops, and how often each instruction is executed.

Code outside loops counts once, on both sides of a branch, except that of two sides that both end in an exit the longer one
counts: programs that do one thing or another. A loop's body counts by its trips, which the caller knows. What lies behind is
left out: subroutines for rare operands of divisions and roots, and padding.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fast.kernels.triton.compilation import CUOBJDUMP


class Instruction(NamedTuple):
    """One line of the disassembly."""

    address: int
    opcode: str  # with its modifiers, such as LDG.E.128
    is_predicated: bool
    target: int | None  # of a branch


class Loop(NamedTuple):
    """Indices of the first and the last instruction of a loop."""

    first: int
    last: int


_LINE = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<predicate>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>[^;]*);", re.MULTILINE
)


def disassembled(cubin: bytes) -> str:
    """The text of `cuobjdump -sass`, which Triton brings along."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([CUOBJDUMP, "-sass", file.name], check=True, capture_output=True, text=True).stdout


def instructions(text: str) -> list[Instruction]:
    """The instructions of one disassembled kernel. Raises ValueError if it has no exit.

    >>> code = '''
    ...         /*0000*/              @!P0 BRA 0x20 ;       /* 0x0000000c00fc8947 */
    ...         /*0010*/                   EXIT ;           /* 0x000000000000794d */
    ...         /*0020*/                   BRA 0x20;        /* 0xfffffffc00fc7947 */
    ...         /*0030*/                   NOP;             /* 0x0000000000007918 */
    ... '''
    >>> for instruction in instructions(code):
    ...     print(*instruction)
    0 BRA True 32
    16 EXIT False None
    """
    found = []
    for line in _LINE.finditer(text):
        target = re.search(r"0x([0-9a-f]+)\s*$", line["rest"]) if line["opcode"].startswith("BRA") else None
        where = int(target[1], 16) if target else None
        found.append(Instruction(int(line["address"], 16), line["opcode"], line["predicate"] is not None, where))
    exits = [i for i, instruction in enumerate(found) if instruction.opcode == "EXIT"]
    if not exits:
        raise ValueError(f"no exit in the disassembly: {text[:200]!r}")
    padding = next((i for i, instruction in enumerate(found) if instruction.target == instruction.address), len(found))
    has_subroutines = any(instruction.opcode.startswith("RET") for instruction in found)
    return _without_shorter_sides(found[: exits[-1] + 1 if has_subroutines else padding])


def _without_shorter_sides(code: list[Instruction]) -> list[Instruction]:
    """Of code that ends in an exit and the code behind it, which a branch leads to instead, the longer one."""
    for i, instruction in enumerate(code[:-1]):
        if instruction.opcode == "EXIT" and not instruction.is_predicated:
            behind = code[i + 1].address
            branch = next((j for j in range(i) if code[j].target == behind), None)
            if branch is not None:
                side, other = code[branch + 1 : i + 1], code[i + 1 :]
                return code[: branch + 1] + _without_shorter_sides(max(side, other, key=len))
    return code


def loops(code: Sequence[Instruction]) -> list[Loop]:
    """Backward branches, in the order of the addresses they lead to, so outer loops come first; busy waits are left out."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    last = dict[int, int]()
    for i, instruction in enumerate(code):
        first = index.get(instruction.target, i) if instruction.target is not None else i
        if i - first > 2:
            last[first] = i
    return [Loop(first, end) for first, end in sorted(last.items())]


class Executed(NamedTuple):
    """How often a warp executes each opcode, in all and in loops alone, and how often a loop waits for global memory."""

    total: Mapping[str, float]
    in_loops: Mapping[str, float]
    waits: float


def executed(code: Sequence[Instruction], trips: Sequence[float]) -> Executed:
    """What a warp executes if the body of each loop is executed `trips` times in all; inner loops have numbers of their own.

    Raises ValueError unless there is a number for each loop.
    """
    found = loops(code)
    if len(found) != len(trips):
        places = ", ".join(f"{code[loop.first].address:#x} to {code[loop.last].address:#x}" for loop in found)
        raise ValueError(f"{len(trips)} trip counts for {len(found)} loops ({places})")
    times: list[float | None] = [None] * len(code)  # None outside loops
    for loop, trip_count in zip(found, trips, strict=True):  # an inner loop comes later, and replaces
        times[loop.first : loop.last + 1] = [trip_count] * (loop.last + 1 - loop.first)
    total, in_loops = dict[str, float](), dict[str, float]()
    for instruction, count in zip(code, times, strict=True):
        total[instruction.opcode] = total.get(instruction.opcode, 0.0) + (1.0 if count is None else count)
        if count is not None:
            in_loops[instruction.opcode] = in_loops.get(instruction.opcode, 0.0) + count
    bodies = [{instruction.opcode.split(".")[0] for instruction in code[loop.first : loop.last + 1]} for loop in found]
    waits = sum(count for count, body in zip(trips, bodies, strict=True) if "LDG" in body)
    return Executed(total, in_loops, waits)
