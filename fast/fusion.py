"""Whether a module of ours fuses its submodules, or calls each of them, as any `nn.Module` does; both compute the same.

Fused, a map travels between the operations of `kernels/` with its norm not yet applied, so no submodule is called. That is
right only where nobody could tell: where every submodule is the one that was built, nothing hooks it, and nobody watches the
single operations of PyTorch. Everything that decides so is in this file and in `kernels.choose.observer`.
"""

from collections.abc import Iterator, Mapping
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fast import kernels

Parts = Mapping[str, nn.Module | None]  # submodules by name, as in `nn.Module._modules`

_BUILT: dict[str, type[nn.Module]] = {  # what stands under each name; else it is a cell or a branch, which can be `lazy`
    "branches": nn.ModuleList,
    "refinement": nn.ModuleList,
    "depthwise": nn.Conv2d,
    "pointwise": nn.Conv2d,
    "projection": nn.Conv2d,
    "classifier": nn.Conv2d,
    "norm": nn.BatchNorm2d,
    "dropout": nn.Dropout,
}
_PLAIN_TENSORS = (Tensor, nn.Parameter)


def fuses(x: Tensor, parts: Parts) -> bool:
    """Whether what computes from a map like x may go past the calls of these submodules, and of all below them."""
    return _reason_against(x, parts) is None


def explain(module: nn.Module, x: Tensor) -> str:
    """How a cell, a head or a decoder computes from maps like x at present: fused, on what kernels, or not, and why not.

    >>> import torch
    >>> from fast import DensePredictionCell
    >>> from reference.cell import Cell
    >>> cell = DensePredictionCell(Cell.from_json('[{"op": "conv", "kernel": 1, "input": -1}]'), in_channels=8)
    >>> with kernels.using(None):
    ...     explain(cell, torch.zeros(1, 8, 5, 5))
    'fused, on PyTorch: `using(None)` says so'
    >>> cell.dropout = torch.nn.Dropout2d()
    >>> explain(cell, torch.zeros(1, 8, 5, 5))
    'each submodule by itself: dropout is a Dropout2d'
    """
    reason = _reason_against(x, module._modules)
    return f"fused, on {kernels.explain(x)}" if reason is None else f"each submodule by itself: {reason}"


def check_traceable(x: Tensor) -> None:
    """Raises TypeError for what is no tensor, such as `torch.fx.symbolic_trace` hands to a forward pass in its place."""
    if isinstance(x, torch.fx.Proxy):
        raise TypeError(
            "torch.fx.symbolic_trace cannot follow a cell, whose pooling depends on the map's size: use torch.export.export, "
            "or make the module a leaf of your tracer"
        )
    if not isinstance(x, Tensor):
        together = ": give several layers as one, torch.cat(maps, dim=1), all of one size" * isinstance(x, list | tuple)
        raise TypeError(f"a map must be a tensor, got {type(x).__name__}{together}")


def refuse_script(module: nn.Module) -> NoReturn:
    """For `torch.jit.script`, which asks every module it is given for `__prepare_scriptable__`."""
    raise TypeError(f"torch.jit.script cannot compile {type(module).__name__}: use torch.export.export, or torch.jit.trace")


def _reason_against(x: Tensor, parts: Parts) -> str | None:
    observer = kernels.observer(x)
    if observer is not None:
        return observer
    return "there is a hook on all modules" if _all_modules_are_hooked() else next(_obstacles(parts), None)


def _all_modules_are_hooked() -> bool:
    return bool(
        torch_module._global_forward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_backward_pre_hooks
        or torch_module._global_backward_hooks
    )


def _obstacles(parts: Parts, prefix: str = "") -> Iterator[str]:
    """What stands in the way below some submodules, named by their paths."""
    for name, part in parts.items():
        if part is not None:
            if (obstacle := _obstacle(name, part)) is not None:
                yield f"{prefix}{name} {obstacle}"
            if part._modules:
                yield from _obstacles(part._modules, f"{prefix}{name}.")


def _obstacle(name: str, part: nn.Module) -> str | None:
    """Why this submodule must be called itself; the end of a sentence."""
    if part._forward_pre_hooks or part._forward_hooks or part._backward_pre_hooks or part._backward_hooks:
        return "has a hook"
    if "forward" in vars(part):
        return "has had its forward replaced"
    kind = type(part)
    is_built = kind is _BUILT[name] if name in _BUILT else "lazy" in vars(kind)
    if not is_built:
        return f"is a {kind.__name__}"
    if kind is nn.Conv2d:
        return _obstacle_of_conv(name, part)  # type: ignore[arg-type]  # it is of this very type
    return _obstacle_of_norm(part) if kind is nn.BatchNorm2d else None  # type: ignore[arg-type]


def _obstacle_of_conv(name: str, conv: nn.Conv2d) -> str | None:
    if name == "depthwise":
        built = (3, 3), conv.dilation, conv.in_channels, conv.in_channels
    else:
        built = (1, 1), (0, 0), 1, conv.out_channels
    is_built = (conv.kernel_size, conv.padding, conv.groups, conv.out_channels) == built
    if not is_built or conv.stride != (1, 1) or conv.padding_mode != "zeros":
        return "is another convolution than the one built here"
    if conv.bias is not None and name != "classifier":
        return "has a bias"
    return _obstacle_of_weight(conv.weight)


def _obstacle_of_norm(norm: nn.BatchNorm2d) -> str | None:
    if norm.affine and norm.track_running_stats and norm.running_mean is not None:
        return _obstacle_of_weight(norm.weight)
    return "lacks scale and offset, or running statistics"


def _obstacle_of_weight(weight: Tensor) -> str | None:
    if type(weight) in _PLAIN_TENSORS or kernels.observer(weight) is None:
        return None
    return f"has a weight of type {type(weight).__name__}"
