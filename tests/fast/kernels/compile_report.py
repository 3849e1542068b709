"""Compiles every kernel for a GPU that need not be here, with the arguments and block sizes of real calls; prints JSON rows.

    python -m tests.fast.kernels.compile_report 90 bfloat16 float32 --variants

The backend's own functions run on CPU tensors, with a launch that compiles (for architecture sm_90 above) instead of running.
To be run apart from other tests: it replaces Triton's driver, and needs TRITON_INTERPRET unset.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fast.kernels import Dropout, Folded, NormedMap, Unfolded
from fast.kernels import triton as triton_backend
from reference.batch_norm import BatchNorm

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SMALL, LARGE = (8, 49, 49), (16, 97, 97)  # N, H, W: below and above `fast.kernels.triton.LARGE`
PROXY_LABELS = (769, 769)


class AbsentGpu:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def empty_map(channels: int, sizes: tuple[int, int, int], dtype: torch.dtype, *, normed: bool = True) -> NormedMap:
    n, height, width = sizes
    raw = torch.empty(n, channels, height, width, dtype=dtype).to(memory_format=torch.channels_last)
    return NormedMap(raw, torch.empty(channels), torch.empty(channels)) if normed else NormedMap(raw)


def calls(dtype: torch.dtype, sizes: tuple[int, int, int], variants: bool) -> Iterator[Callable[[], Any]]:
    """Every function of the backend at the paper's channels; with the variants of a real network."""
    x, plain, rates = empty_map(256, sizes, dtype), empty_map(320, sizes, dtype, normed=False), (6, 21)
    depthwise, vector = torch.empty(256, 1, 3, 3), torch.empty(256)
    unfolded = Unfolded(vector, vector, vector, vector)
    yield lambda: triton_backend.depthwise_forward(x, depthwise, rates, statistics=True)
    yield lambda: triton_backend.depthwise_backward(x.raw, x.raw, unfolded, x, depthwise, rates, need_input=True)
    yield lambda: triton_backend.normalise(x)
    yield lambda: triton_backend.normalise_backward(x.raw, x)
    yield lambda: pointwise([x] * 5, 256, unfolded, Dropout(0.1, torch.empty(1, dtype=torch.int64)))
    yield lambda: triton_backend.separable_inference(
        x, depthwise, (vector, vector), rates, torch.empty(256, 256, 1, 1), (vector, vector)
    )
    yield lambda: triton_backend.pointwise_inference([x], torch.empty(256, 256, 1, 1), (vector, vector))
    if dtype == torch.bfloat16:
        yield lambda: autocast_pointwise(empty_map(320, sizes, torch.float32, normed=False), unfolded)  # of fixed features
    if variants:
        yield lambda: triton_backend.depthwise_forward(plain, torch.empty(320, 1, 3, 3), rates, statistics=True)
        yield lambda: pointwise([x], 256, unfolded, None)
        yield lambda: pointwise([x], 19, None, None)  # the classifier


def calls_without_maps(variants: bool) -> Iterator[Callable[[], Any]]:
    """Those that are float32 whatever the maps are."""
    vector, n = torch.empty(256), SMALL[0]
    moments, norm = triton_backend.Moments(torch.empty(601, 2, 256), 32), BatchNorm(vector, vector, vector, vector)
    yield lambda: triton_backend.fold(moments, norm, count=19208, momentum=0.0003, eps=1e-5)
    yield lambda: triton_backend.unfold(vector, vector, Folded(vector, vector, vector, vector), vector, count=19208)
    labels = torch.empty(n, *PROXY_LABELS, dtype=torch.uint8)
    for classes in (19, 150) if variants else (19,):
        logits = torch.empty(n, classes, *SMALL[1:])
        yield lambda y=logits: triton_backend.upsampled_cross_entropy(y, labels, 255)  # type: ignore[misc]
        yield lambda y=logits: triton_backend.upsampled_confusion_matrix(y, labels, 255)  # type: ignore[misc]


def pointwise(maps: list[NormedMap], out_channels: int, unfolded: Unfolded | None, dropout: Dropout | None) -> None:
    weight = torch.empty(out_channels, sum(x.raw.shape[1] for x in maps), 1, 1)
    out, _ = triton_backend.pointwise_forward(maps, weight, dropout, statistics=unfolded is not None)
    triton_backend.pointwise_backward(out, out, unfolded, maps, weight, dropout, need_input=[True] * len(maps))


def autocast_pointwise(x: NormedMap, unfolded: Unfolded) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        pointwise([x], 256, unfolded, None)


def report(architecture: int, dtypes: list[torch.dtype], variants: bool) -> list[dict[str, Any]]:
    """One row for each compilation."""
    triton.runtime.driver.set_active(AbsentGpu(architecture))
    compiled: dict[str, tuple[dict[str, str], Any]] = {}

    def compile_only(kernel: Any, programs: int, launch: Any, arguments: tuple[Any, ...], **constants: Any) -> None:
        options = {"num_warps": launch.warps, "num_stages": launch.stages}
        binary = kernel.run(*arguments, **constants, **options, enable_fp_fusion=True, grid=(programs,), warmup=True)
        dtype = next(str(x.dtype) for x in arguments if isinstance(x, Tensor))
        name = {"file": kernel.fn.__module__.rpartition(".")[2], "kernel": f"{kernel.fn.__name__} {dtype} {constants}"}
        compiled[binary.hash] = (name, binary)

    with mock.patch.object(triton_backend, "_launch", compile_only):
        for call in calls_without_maps(variants):
            call()
        for dtype in dtypes:
            for sizes in (SMALL, LARGE) if variants else (SMALL,):
                for call in calls(dtype, sizes, variants):
                    call()
        if torch.float32 in dtypes:  # as on a GPU whose user left PyTorch's convolutions as they are
            with mock.patch.object(triton_backend, "_input_precision", return_value="tf32"):
                for call in calls(torch.float32, SMALL, variants=False):
                    call()
    return [{**name, **usage(binary)} for name, binary in compiled.values()]


def usage(binary: Any) -> dict[str, int]:
    """Registers per thread, bytes of stack and local memory per thread (spills), bytes of shared memory per program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "registers": found["REG"],
        "stack": found["STACK"],
        "local": found["LOCAL"],
        "shared": binary.metadata.shared,
        "warps": binary.metadata.num_warps,
    }


if __name__ == "__main__":
    names = [name for name in sys.argv[2:] if name != "--variants"]
    print(json.dumps(report(int(sys.argv[1]), [getattr(torch, name) for name in names], "--variants" in sys.argv)))
