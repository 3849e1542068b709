"""Every backend keeps to its protocol, and says in a sentence which maps it does not compute."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from fast.kernels import (
    Backend,
    IterationKernels,
    Operations,
    backend_for,
    cpp,
    explain,
    iteration_kernels_for,
    library,
    operations_for,
    triton,
    using,
)
from fast.kernels.cpp import build
from fast.kernels.differentiable import OnKernels

# mypy holds each module, and the class, to its protocol here.
BACKENDS: dict[str, Backend] = {"cpp": cpp, "triton": triton}
ITERATIONS: IterationKernels = triton
OPERATIONS: list[Operations] = [library, *map(OnKernels, BACKENDS.values())]
without_compiler = pytest.mark.skipif(isinstance(build.library(), str), reason="no C++ compiler")
MAP = torch.ones(1, 3, 5, 5)


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "reason"),
    [
        ("cpp", "meta", torch.float32, "the C++ kernels compute on a CPU, this map is on meta"),
        ("cpp", "cpu", torch.bfloat16, "the C++ kernels compute float32 and float64, this map is bfloat16"),
        ("triton", "cpu", torch.float32, "the Triton kernels compute on an NVIDIA GPU, this map is on cpu"),
    ],
)
def test_reason_why_a_map_is_not_supported(backend: str, device: str, dtype: torch.dtype, reason: str) -> None:
    assert BACKENDS[backend].supports(MAP.to(device, dtype)) == reason


@pytest.mark.parametrize(
    ("dtype", "installed", "reason"),
    [
        (torch.float64, True, "the Triton kernels compute float32, float16 and bfloat16, this map is float64"),
        (torch.float16, False, "Triton is not installed"),
        (torch.float16, True, None),
    ],
)
def test_maps_on_a_gpu(dtype: torch.dtype, installed: bool, reason: str | None) -> None:
    on_gpu = mock.Mock(spec=Tensor, device=torch.device("cuda"), dtype=dtype)
    with mock.patch.object(triton, "_IS_INSTALLED", installed):
        assert triton.supports(on_gpu) == reason


@without_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_of_a_cpu_are_chosen(dtype: torch.dtype) -> None:
    for x in (MAP.to(dtype), nn.Parameter(MAP.to(dtype))):
        assert backend_for(x) is cpp
        assert explain(x) == "C++ kernels"
        assert isinstance(operations_for(x), OnKernels)


def test_iterations_begin_by_kernels_where_a_backend_has_them() -> None:
    assert iteration_kernels_for(MAP) is None  # whether or not there is a compiler
    for backend, expected in ((triton, ITERATIONS), (cpp, None), (None, None)):
        with using(backend):
            assert iteration_kernels_for(MAP) is expected


def test_a_machine_without_a_compiler() -> None:
    with mock.patch.object(build, "library", return_value="no C++ compiler found (install g++, or set CXX)"):
        assert backend_for(MAP) is None
        assert explain(MAP) == "PyTorch: no C++ compiler found (install g++, or set CXX)"


class Marked(Tensor):
    """A tensor whose operations mean something of their own."""


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (MAP[:0], "the map is empty"),
        (MAP.to("meta"), "there are no kernels for a device of type meta"),
        (MAP.as_subclass(Marked), "kernels read plain tensors, this one is a Marked"),
        (MAP.half(), "the C++ kernels compute float32 and float64, this map is float16"),
    ],
)
def test_explains_why_pytorch_computes(x: Tensor, reason: str) -> None:
    assert backend_for(x) is None
    assert explain(x) == f"PyTorch: {reason}"
    assert operations_for(x) is library


def test_explains_a_choice() -> None:
    with using(None):
        assert explain(MAP) == "PyTorch: `using(None)` says so"
    with using(triton):
        assert explain(MAP) == "Triton kernels"


class Noting(nn.Module):
    """Notes what is said about its input."""

    said = ""

    def forward(self, x: Tensor) -> Tensor:
        self.said = explain(x)
        return x + 1


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize(
    ("transform", "reason"),
    [
        (
            lambda module: torch.jit.trace(module, MAP, check_trace=False),  # type: ignore[no-untyped-call]
            "torch.jit.trace or torch.onnx is tracing",
        ),
        (lambda module: torch.func.vmap(module)(MAP), "torch.func or vmap is transforming"),
        (lambda module: torch.export.export(module, (MAP,)), "torch.compile or torch.export is tracing"),
    ],
)
def test_explains_that_a_map_is_traced(transform: Callable[[Noting], object], reason: str) -> None:
    module = Noting()
    transform(module)
    assert module.said == f"PyTorch: {reason}"
