"""A GPU that computes nothing: tensors on it have a device, a dtype, a shape and a layout, and no values.

What PyTorch does in Python runs as on a GPU, its checks of devices included; the calls into the driver are replaced, Triton's
launches counted, and a backward pass does nothing. Tensors on the CPU are real; what comes back from the
GPU is 0.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fast import kernels
from fast.kernels import triton as triton_backend

H200 = SimpleNamespace(
    name="NVIDIA Fake", major=9, minor=0, multi_processor_count=132, L2_cache_size=60 << 20, total_memory=140 << 30
)


aten = torch.ops.aten
ANSWERS: dict[Any, Callable[..., Any]] = {  # of operations that would have to know values, or that no fake tensor knows
    aten._local_scalar_dense.default: lambda x: 0.0 if x.is_floating_point() else 0,
    aten.ge.Scalar: lambda x, least: torch.ones(x.shape, dtype=torch.bool),  # of a learning rate, which AdamW looks at
    aten.is_nonzero.default: lambda x: True,
    aten.equal.default: lambda a, b: True,
    aten.bincount.default: lambda x, weights=None, minlength=0: x.new_empty(minlength),
    aten._fused_sgd_.default: lambda *arguments: None,
    aten._fused_sgd_.tensor_lr: lambda *arguments: None,
    aten._fused_adamw_.tensor_lr: lambda *arguments: None,
}


class FakeGpu(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations that touch the GPU give tensors without values; those of the CPU are computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [*leaves_of(args), *leaves_of(kwargs.values())]
        kwargs.pop("pin_memory", None)  # which only a driver can do
        if not any(isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == "cuda") for x in leaves):
            return func(*args, **kwargs)
        if func in ANSWERS:
            return ANSWERS[func](*args)
        if func is aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:  # as if none were chosen
            return args[0].new_empty(0, *args[0].shape[args[1][0].dim() :])
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            return args[0].zero_()
        if any(isinstance(x, Tensor) and not isinstance(x, FakeTensor) for x in leaves):
            args, kwargs = tree_map(self.without_values, (args, kwargs))
        with self.mode:
            result = func(*args, **kwargs)
        return real_on_cpu(result) if isinstance(result, Tensor) else tree_map(real_on_cpu, result)  # where zeros are real

    def without_values(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, FakeTensor):
            return x
        with self.mode:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)

    def launch(self, kernel: Any, programs: int, launch: Any, arguments: tuple[Any, ...], **constants: Any) -> None:
        """In the place of `triton_backend._launch`: every tensor of a launch must be on the GPU."""
        self.launches += programs > 0
        devices = {argument.device.type for argument in tree_leaves(arguments) if isinstance(argument, Tensor)}
        assert devices == {"cuda"}


def leaves_of(arguments: Iterable[Any]) -> Iterator[Any]:
    """Those of an operation, some of which are lists; `tree_leaves` knows any tree, and takes longer for it."""
    for x in arguments:
        if isinstance(x, list | tuple):
            yield from leaves_of(x)
        else:
            yield x


def real_on_cpu(x: Any) -> Any:
    return torch.zeros(x.shape, dtype=x.dtype) if isinstance(x, FakeTensor) and x.device.type == "cpu" else x


def give_gradients(optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
    """Before a step: to every parameter what a backward pass would have given it."""
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        parameter.grad = torch.zeros_like(parameter, requires_grad=False)


def apply_to_tensors(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """In the place of `Module._apply`, which would swap what a fake tensor stands for."""
    for child in module.modules() if recurse else [module]:
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(function(parameter.detach()), parameter.requires_grad)
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = function(buffer)
    return module


class Stub:
    """Stands for a stream, an event or a graph: takes any call, is any context."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        for value in (*arguments, *keywords.values()):
            if isinstance(value, torch.device | str):  # as the real ones do
                torch.cuda._utils._get_device_index(value, optional=True)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **keywords: 1.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None: ...


class Generator(Stub):
    """Stands for a generator of the GPU: takes any call; its state is bytes on the CPU."""

    def clone_state(self) -> "Generator":
        return Generator()

    def get_state(self) -> Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_state(self, state: Tensor) -> None:
        assert type(state) is Tensor
        assert (state.device.type, state.dtype) == ("cpu", torch.uint8)


@contextlib.contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """As on a machine with one GPU, cuda:0."""
    torch._C._ensureCUDADeviceGuardSet()  # one that does nothing, as FakeTensorMode sets it where there is no GPU
    gpu = FakeGpu()
    driver: dict[str, Any] = {
        "_cuda_setDevice": lambda index: None,
        "_cuda_getDevice": lambda: 0,
        "_cuda_getDeviceCount": lambda: 1,
        "_cuda_exchangeDevice": lambda index: 0,
        "_cuda_maybeExchangeDevice": lambda index: 0,
        "_cuda_synchronize": lambda: None,
        "_cuda_resetPeakMemoryStats": lambda index: None,
    }
    library: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
        "get_device_properties": lambda device=None: H200,
        "get_device_capability": lambda device=None: (H200.major, H200.minor),
        "get_device_name": lambda device=None: H200.name,
        "mem_get_info": lambda device=None: (100 << 30, H200.total_memory),
        "memory_allocated": lambda device=None: 1 << 20,
        "max_memory_allocated": lambda device=None: 3 << 20,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "_sleep": lambda cycles: None,
        "default_generators": (Generator(),),
    }
    library |= dict.fromkeys(("Event", "Stream", "CUDAGraph", "graph", "stream", "current_stream", "default_stream"), Stub)
    empty = torch.empty

    def unpinned(*arguments: Any, pin_memory: bool = False, **keywords: Any) -> Tensor:
        """Also in threads, in which no mode sees what is called."""
        return empty(*arguments, **keywords)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "empty", unpinned))
        for name, value in driver.items():
            stack.enter_context(mock.patch.object(torch._C, name, value))
        for name, value in library.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        # Autograd asks the driver for a stream as soon as it records, which autocast makes it do for its cache of weights.
        stack.enter_context(torch.no_grad())
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        stack.enter_context(mock.patch.object(torch, "set_autocast_cache_enabled"))
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(1.0, device="cuda") is made here, and moved
        stack.enter_context(mock.patch.object(Tensor, "backward"))
        stack.callback(register_optimizer_step_pre_hook(give_gradients).remove)
        stack.enter_context(mock.patch.object(nn.Module, "_apply", apply_to_tensors))
        stack.enter_context(mock.patch.object(torch, "compile", lambda module, **flags: module))
        stack.enter_context(mock.patch.object(triton_backend, "_launch", gpu.launch))
        stack.enter_context(kernels.using(triton_backend))
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context"))  # of the real one, which the driver has not
        stack.enter_context(gpu)
        yield gpu
