"""Who computes a map: the kernels of its device if they support it, else PyTorch, unless `using` says otherwise."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fast.kernels import library
from fast.kernels.differentiable import OnKernels
from fast.kernels.interface import Backend, IterationKernels, NormedMap, Operations

_AUTOMATIC = "by device"
_chosen: ContextVar[Backend | str | None] = ContextVar("chosen_backend", default=_AUTOMATIC)


@contextlib.contextmanager
def using(backend: Backend | None) -> Iterator[None]:
    """These kernels whatever the device, or with None PyTorch's operations: to compare, or to differentiate twice.

    Holds in this context alone: a thread that is started inside chooses by device again. torch.compile always traces PyTorch's
    operations.
    """
    token = _chosen.set(backend)
    try:
        yield
    finally:
        _chosen.reset(token)


def operations_for(x: Tensor) -> Operations:
    """What computes maps such as x."""
    chosen = _choose(x)
    return library if isinstance(chosen, str) else OnKernels(chosen)


def value(x: NormedMap) -> Tensor:
    """relu(scale · raw + offset), differentiable: (N, C, H, W)."""
    return x.raw if x.scale is None else operations_for(x.raw).value(x)


def backend_for(x: Tensor) -> Backend | None:
    """The kernels for maps such as x; None where PyTorch's operations compute, for a reason that `explain` gives."""
    chosen = _choose(x)
    return None if isinstance(chosen, str) else chosen


def iteration_kernels_for(x: Tensor) -> IterationKernels | None:
    """The kernels that begin a training's iterations on the device of x; None where PyTorch does, as always on a CPU."""
    backend = backend_for(x)
    return backend if isinstance(backend, IterationKernels) else None


def explain(x: Tensor) -> str:
    """Who computes maps such as x here, and if not kernels, why not.

    >>> explain(torch.ones(1, 3, 5, 5, dtype=torch.float16))
    'PyTorch: the C++ kernels compute float32 and float64, this map is float16'
    >>> explain(torch.ones(0, 3, 5, 5))
    'PyTorch: the map is empty'
    """
    chosen = _choose(x)
    return f"PyTorch: {chosen}" if isinstance(chosen, str) else chosen.name


def observer(x: Tensor) -> str | None:
    """Who has to see each of PyTorch's operations on maps like x, and would see none of ours; None if nobody has.

    What `using` names computes whoever looks on.
    """
    if torch.compiler.is_compiling():  # asked first: torch.compile of torch 2.11 cannot trace a ContextVar
        return "torch.compile or torch.export is tracing"
    if not isinstance(_chosen.get(), str):
        return None
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace or torch.onnx is tracing"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func or vmap is transforming"
    if torch.autograd.forward_ad._current_level >= 0:
        return "derivatives are taken in forward mode"
    if torch._C._len_torch_dispatch_stack():
        return f"{type(_get_current_dispatch_mode()).__name__} watches PyTorch's operations"
    if type(x) not in (Tensor, torch.nn.Parameter):
        return f"kernels read plain tensors, this one is a {type(x).__name__}"
    return None


def _choose(x: Tensor) -> Backend | str:
    """The kernels, or the reason why there are none for maps like x."""
    observed = observer(x)
    if observed is not None:
        return observed
    chosen = _chosen.get()
    if chosen is None:
        return "`using(None)` says so"
    if not isinstance(chosen, str):
        return chosen
    if x.numel() == 0:
        return "the map is empty"
    backend = _of_device(x.device.type)
    if backend is None:
        return f"there are no kernels for a device of type {x.device.type}"
    return backend.supports(x) or backend


def _of_device(device_type: str) -> Backend | None:
    """Imported at their first use: Triton takes long, and is not there on every system."""
    if device_type == "cpu":
        from fast.kernels import cpp

        return cpp
    if device_type == "cuda":
        from fast.kernels import triton

        return triton
    return None
