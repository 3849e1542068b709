"""Compile kernels for a GPU that need not be present, and read their use of registers and shared memory."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from fast.kernels.triton.launches import Launch

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class AbsentGpu:
    """Answers the questions that Triton asks a driver before it compiles."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def choose_absent_gpu(architecture: int) -> None:
    """Make this process compile for sm_<architecture> from now on; it can launch nothing."""
    triton.runtime.driver.set_active(AbsentGpu(architecture))


def compiled(kernel: Any, programs: int, launch: Launch, arguments: tuple[Any, ...], **constants: Any) -> Any:
    """Compile this launch; Triton keeps the binary in its cache on disk, where `_launch` finds it."""
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "maxnreg": launch.registers or None}
    return kernel.run(*arguments, **constants, **options, enable_fp_fusion=True, grid=(programs,), warmup=True)


def usage(binary: Any) -> dict[str, int]:
    """Registers per thread, bytes of stack and local memory per thread (spills), bytes of shared memory per program.

    The first three only where Triton comes with `cuobjdump`.
    """
    known = {"shared": binary.metadata.shared, "warps": binary.metadata.num_warps}
    if not CUOBJDUMP.exists():
        return known
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "stack": found["STACK"], "local": found["LOCAL"], **known}
