"""The counted iterations: counting is right, and what the compiler makes of the kernels is what the committed tables say."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.plans import EVERY_KIND, PAPER, QUICK
from bench.profiles import predictions
from tests.cuda_driver import sees_a_gpu

pytest.importorskip("triton", reason="Triton has no build for this system")
from bench.counted import sass
from bench.counted.iteration import TorchOperation, TritonLaunch, iteration
from bench.counted.model import Code, blocks_per_multiprocessor, bytes_per_thread, cost_of, share_of
from bench.counted.table import ITERATIONS, TABLES, Row, Total, differences, path_of, read_rows, sum_of, summary, totals
from bench.counted.trips import TRIPS, trips_of
from fast.kernels.triton.compilation import CUOBJDUMP

ROOT = Path(__file__).parents[2]
CODE = """
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                 /* 0x00000a00ff017b82 */
                                                                          /* 0x000fe20000000800 */
        /*0010*/                   FADD R2, R2, R3 ;                      /* the outer loop begins here */
        /*0020*/              @!PT LDS RZ, [RZ] ;                         /* 0x0 */
        /*0030*/               @P1 LDG.E.128 R4, desc[UR4][R2.64] ;       /* the inner one here */
        /*0040*/                   FFMA R2, R2, R3, R4 ;                  /* 0x0 */
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8], R24 ; /* 0x0 */
        /*0060*/              @!P0 BRA 0x30 ;                             /* 0x0 */
        /*0070*/               @P2 BRA 0x10 ;                             /* 0x0 */
        /*0080*/               @P3 BRA 0x70 ;                             /* it waits for a barrier */
        /*0090*/               @P0 EXIT ;                                 /* 0x0 */
        /*00a0*/                   STG.E.U16 desc[UR4][R2.64], R6 ;       /* 0x0 */
        /*00b0*/                   EXIT ;                                 /* 0x0 */
        /*00c0*/                   BRA 0xc0;                              /* 0x0 */
        /*00d0*/                   NOP;                                   /* 0x0 */
"""


def test_instructions_and_loops_are_found() -> None:
    code = sass.instructions(CODE)
    assert [i.opcode for i in code][:4] == ["LDC", "FADD", "LDS", "LDG.E.128"]
    assert (code[-1].opcode, code[-1].address) == ("EXIT", 0xB0)
    assert [(code[loop.first].address, code[loop.last].address) for loop in sass.loops(code)] == [(0x10, 0x70), (0x30, 0x60)]


def test_a_loop_counts_by_its_trips_and_the_inner_one_by_its_own() -> None:
    total, in_loops, waits = sass.executed(sass.instructions(CODE), [5, 20])
    assert (total["LDC"], total["FADD"], total["FFMA"], total["BRA"], total["EXIT"]) == (1, 5, 20, 20 + 5 + 1, 2)
    assert sum(total.values()) == 1 + 3 * 5 + 4 * 20 + 4
    assert (in_loops["FFMA"], "STG.E.U16" in in_loops) == (20, False)
    assert waits == 5 + 20  # both contain the load


def test_of_programs_that_do_one_thing_or_another_the_longer_counts() -> None:
    text = """
        /*0000*/                   S2R R1, SR_CTAID.X ;                   /* 0x0 */
        /*0010*/               @P0 BRA 0x40 ;                             /* 0x0 */
        /*0020*/                   FADD R2, R2, R3 ;                      /* one thing */
        /*0030*/                   EXIT ;                                 /* 0x0 */
        /*0040*/                   FMUL R2, R2, R3 ;                      /* the other */
        /*0050*/                   FMUL R2, R2, R3 ;                      /* 0x0 */
        /*0060*/                   EXIT ;                                 /* 0x0 */
    """
    total = sass.executed(sass.instructions(text), []).total
    assert total == {"S2R": 1, "BRA": 1, "FMUL": 2, "EXIT": 1}
    shorter = sass.executed(sass.instructions(text.replace("FADD R2, R2, R3 ;", "BRA 0x40 ;")), []).total
    assert shorter["FMUL"] == 2


@pytest.mark.parametrize("trips", [[], [5], [5, 20, 3]], ids=str)
def test_a_loop_that_nobody_counted_is_an_error(trips: list[float]) -> None:
    with pytest.raises(ValueError, match=r"for 2 loops \(0x10 to 0x70, 0x30 to 0x60\)"):
        sass.executed(sass.instructions(CODE), trips)


def test_a_disassembly_without_an_exit_is_an_error() -> None:
    with pytest.raises(ValueError, match="no exit"):
        sass.instructions("cuobjdump info: no kernel here")


def code_of(opcodes: dict[str, float], *, registers: int = 64, shared: int = 0, warps: int = 8) -> Code:
    return Code(sass.Executed(opcodes, {}, 0.0), registers, shared, warps)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks"),  # as the CUDA occupancy calculator has it for compute capability 9.0
    [
        (147, 0, 8, 1),
        (128, 0, 8, 2),
        (140, 0, 4, 3),
        (32, 0, 4, 16),
        (74, 45 << 10, 8, 3),
        (32, 105 << 10, 4, 2),
    ],
)
def test_occupancy(registers: int, shared: int, warps: int, blocks: int) -> None:
    assert blocks_per_multiprocessor(code_of({}, registers=registers, shared=shared, warps=warps)) == blocks


def test_cost_is_counted_per_warp_and_program() -> None:
    cost = cost_of(code_of({"FFMA": 1000.0, "LDG.E.128": 10.0}, warps=4), 1320, 1e9)
    assert cost.million_warp_instructions == pytest.approx(1010 * 4 * 1320 / 1e6)
    assert cost.requested_mb == pytest.approx(10 * 16 * 32 * 4 * 1320 / 1e6)
    assert cost.bound == "issue"
    once, twice = (cost_of(code_of({"FFMA": 1000.0 * n}, warps=4), 1320, 0.0).us for n in (1, 2))
    assert once < twice < 2 * once  # a part of it is the gap to the next launch


def test_one_program_more_than_multiprocessors_takes_twice_as_long() -> None:
    code = code_of({"FFMA": 1e5}, registers=255)
    times = [cost_of(code, programs, 0.0).us for programs in (1, 132, 133, 264, 265)]
    assert times[0] == times[1] < times[2] == times[3] < times[4]
    assert times[4] - times[3] == pytest.approx(times[2] - times[1])


@pytest.mark.parametrize(
    ("opcodes", "bound"),
    [
        ({"IMAD": 900.0, "FFMA": 900.0}, "fma"),
        ({"MUFU.EX2": 100.0, "FFMA": 100.0}, "xu"),
        ({"LDS.128": 100.0, "FFMA": 100.0}, "lsu"),
        ({"HGMMA.64x256x16.F32.BF16": 100.0, "LDGSTS.E.BYPASS.128": 1.0}, "tensor"),
        ({"LDGSTS.E.BYPASS.128": 100.0, "FFMA": 10.0}, "L2"),
        ({"LDG.E": 1.0}, "latency"),
    ],
    ids=str,
)
def test_the_busiest_unit_decides(opcodes: dict[str, float], bound: str) -> None:
    assert cost_of(code_of(opcodes), 132 if bound == "latency" else 13200, 0.0).bound == bound


def test_a_small_launch_leaves_most_of_the_gpu_to_others() -> None:
    code = code_of({"FFMA": 1e5}, registers=32)
    small, full = (cost_of(code, programs, 0.0) for programs in (1, 132))
    assert small.us == full.us
    assert full.busy_us == pytest.approx(132 * small.busy_us)
    assert full.busy_us < full.us


def test_more_warps_hide_more_and_barriers_less() -> None:
    loads = code_of({"LDG.E": 1.0, "FFMA": 9.0})
    shares = [share_of(loads, warps) for warps in (1, 2, 4, 8, 16)]
    assert sorted(shares) == shares
    assert shares[0] < shares[-1]
    assert share_of(code_of({"LDG.E": 1.0, "FFMA": 8.0, "BAR.SYNC": 1.0}), 4) < share_of(loads, 4)
    assert bytes_per_thread("STG.E.U16") == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_iteration_is_traced_as_a_graph_captures_it(dtype: str) -> None:
    """All launches of forward and backward, and nothing that waits for the GPU."""
    case = replace(QUICK.proxy.small(), cell=EVERY_KIND)
    nodes = iteration(case, dtype)  # type: ignore[arg-type]
    names = [node.name for node in nodes if isinstance(node, TritonLaunch)]
    convolutions = len(EVERY_KIND.branches) + 2  # each branch ends in a 1×1, then projection and classifier
    assert names.count("pointwise_forward_kernel") == names.count("pointwise_weight_gradient_kernel") == convolutions
    assert names.count("depthwise_forward_kernel") == names.count("depthwise_backward_kernel") > 0
    assert names.count("cell_gradients_kernel") == 1
    assert all(trips_of(node.name, node.named_arguments()) is not None for node in nodes if isinstance(node, TritonLaunch))
    waiting = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "bincount", "item"}
    assert not waiting & {node.name for node in nodes if isinstance(node, TorchOperation)}


def test_every_kernel_with_trips_exists() -> None:
    kernels = "".join(path.read_text() for path in (ROOT / "fast" / "kernels" / "triton").glob("*.py"))
    assert [name for name in TRIPS if f"def {name}(" not in kernels] == []


def rows(instructions: float, launches: int = 2, triton: str = "3.8.0") -> list[Row]:
    row = Row("fold_kernel", "sums", 80, 4, 96, 5, instructions / launches, 4.5, 1.2, "issue", 3.0, 1.5, triton)
    return [*[row] * launches, Row("PyTorch add", "float32 8", 0, 0, 0, 0, 0.0, 0.0, 0.0, "", 2.4, 0.1, triton)]


def test_differences() -> None:
    assert list(differences(rows(1.0), rows(1.04))) == []
    (more,) = differences(rows(1.0), rows(1.06))
    assert more.startswith("fold_kernel: 1.06 M warp instructions, the table has 1 (")
    assert len(list(differences(rows(1.0), rows(0.94)))) == 1  # a table that is no longer true misleads, too
    assert list(differences(rows(1.0), rows(1.06, triton="3.9.0"))) == []
    assert len(list(differences(rows(1.0), rows(1.3, triton="3.9.0")))) == 1
    much = rows(100.0)[0]._replace(kernel="loss_kernel")
    other = much._replace(triton="3.9.0")
    assert list(differences([much, *rows(1.0)], [other, *rows(1.3, triton="3.9.0")])) == []  # below 1 % of all
    slower = [row._replace(predicted_us=row.predicted_us * 1.1) for row in rows(1.0)]
    (time,) = differences(rows(1.0), slower)
    assert time == "the model makes 9 us of it, the table has 8"
    (another, *_) = differences(rows(1.0), rows(1.0, launches=3))
    assert another == "fold_kernel: 3 launches, the table has 2"
    (gone, *_) = differences(rows(1.0), rows(1.0)[:2])
    assert gone == "PyTorch: 0 launches, the table has 1"


def test_totals_and_summary() -> None:
    assert totals(rows(1.0)) == {"fold_kernel": Total(2, 1.0, 96, 5, 6.0), "PyTorch": Total(1, 0.0, 0, 0, 2.4)}
    assert sum_of(rows(1003.2)).instructions_us == pytest.approx(1000)  # 132 · 4 schedulers at 1.9 GHz
    lines = summary({"dpc-bfloat16": rows(1003.2)}).splitlines()
    assert "| dpc-bfloat16 | 3 | 2 | 1003 | 1000 | 3 | 8 |" in lines
    assert "| PyTorch | 1 | | | | 2 |" in lines


@pytest.mark.parametrize("table", TABLES)
def test_committed_tables_are_whole(table: str) -> None:
    table_rows = read_rows(path_of(table))
    assert summary({name: read_rows(path_of(name)) for name in TABLES}) == (path_of(table).parent / "summary.md").read_text()
    assert len({row.triton for row in table_rows}) == 1
    cell, dtype = ITERATIONS.get(table, ("", ""))
    if cell == "dpc":  # the iteration that the benchmark profiles
        launches = sum(map(len, predictions(dtype).values()))
        assert (PAPER.proxy.name, launches) == ("iteration", len(table_rows))


@pytest.mark.skipif(sees_a_gpu(), reason="compiling takes a GPU's time; CUDA_VISIBLE_DEVICES= hides it")
@pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this build of Triton comes without cuobjdump")
def test_kernels_cost_what_the_tables_say() -> None:
    """Five per cent more instructions, or a launch more, must be meant: `python -m bench.counted` writes the tables anew."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.counted", "--check"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
