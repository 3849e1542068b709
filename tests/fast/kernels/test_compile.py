"""Every kernel compiles for four kinds of GPU without one, keeps its values in registers, and fits their shared memory."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cuda_driver import sees_a_gpu

pytest.importorskip("triton", reason="Triton has no build for this system")
if sees_a_gpu():
    pytest.skip("the other tests compile for the GPU that is here; CUDA_VISIBLE_DEVICES= hides it", allow_module_level=True)

ROOT = Path(__file__).parents[3]
KERNELS = {path.stem for path in (ROOT / "fast" / "kernels" / "triton").glob("*.py")} - {"__init__", "compilation"}


@pytest.mark.parametrize(
    ("architecture", "arguments"),  # variants once: for the time it takes
    [
        (80, ["bfloat16", "float32"]),
        (86, ["bfloat16"]),
        (90, ["bfloat16", "float32", "--variants"]),
        (100, ["bfloat16", "float32"]),
    ],
    ids=str,
)
def test_nothing_is_spilled(architecture: int, arguments: list[str], record_property: Callable[[str, object], None]) -> None:
    from bench.launch_trial import SHARED_BYTES
    from fast.kernels.triton.compilation import CUOBJDUMP  # imports Triton

    if not CUOBJDUMP.exists():
        pytest.skip("this build of Triton comes without cuobjdump")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.fast.kernels.compile_report", str(architecture), *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    record_property("resources", rows)
    assert {row["file"] for row in rows} == KERNELS
    assert [row for row in rows if row["stack"] or row["local"]] == []
    assert [row for row in rows if row["shared"] > SHARED_BYTES[architecture]] == []
