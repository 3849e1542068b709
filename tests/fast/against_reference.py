"""One training step by a function of `fast/` beside the same step by its namesake in `reference/`.

A step is the output, the gradients of <cotangent, output> for all inputs and weights, and the running statistics afterwards.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from fast.batch_norm import MOMENTUM
from fast.kernels import using
from reference.batch_norm import Array, BatchNorm, updated_running_statistics
from tests.fast.error_budget import assert_within_budget
from tests.reference.directional_derivative import leaves, rebuilt, with_batch_norms

# Relative to the largest value. Float64 rounding, 1e-16, times what batch norms of maps without variance amplify: each up to
# 1 / √eps = 316, and more than two of those in a row are rare.
EXACT = 1e-10

Layout = Literal["contiguous", "channels_last", "window"]
LAYOUTS: tuple[Layout, ...] = ("contiguous", "channels_last", "window")

every_device = pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))],
)
# Property tests draw such batches on purpose; test_batch_norm.py holds the warning itself.
single_values_allowed = pytest.mark.filterwarnings("ignore:one value per channel")


class Step(NamedTuple):
    output: Array
    gradients: Any  # the tree of inputs, with gradients in it
    statistics: list[Array]  # running mean and variance of each batch norm, in forward order


def reference_step(
    forward: Callable[..., Array],
    backward: Callable[..., Any],
    inputs: tuple[Any, ...],
    cotangent: Array,
    *,
    momentum: float = MOMENTUM,
    **arguments: Any,
) -> Step:
    output, calls = with_batch_norms(lambda *x: forward(*x, **arguments), inputs)
    gradients = backward(cotangent, *inputs, **arguments)
    norms = [
        updated_running_statistics(call.x, call.norm, momentum=momentum) if call.training else call.norm for call in calls
    ]
    return Step(output, gradients, [array for norm in norms for array in (norm.running_mean, norm.running_var)])


def torch_step(
    function: Callable[..., Tensor], inputs: tuple[Any, ...], cotangent: Array, autocast: torch.dtype | None = None
) -> Step:
    """`inputs` are trees of leaf tensors, as `to_tensors` or a module's `weights()` give them."""
    device = next(_tensor_leaves(inputs)).device
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        output = function(*inputs)
    output.backward(torch.from_numpy(cotangent).to(device, output.dtype))  # type: ignore[no-untyped-call]
    return Step(to_arrays(output), to_arrays(_gradients(inputs)), list(_running_statistics(to_arrays(inputs))))


def to_tensors(tree: Any, device: str = "cpu", layout: Layout = "contiguous", dtype: torch.dtype = torch.float64) -> Any:
    """Maps, (N, C, H, W) and no weights, in the given layout; all but running statistics require a gradient."""
    if isinstance(tree, np.ndarray):
        tensor = torch.from_numpy(tree).to(device, dtype, copy=True)
        return _laid_out(tensor, layout).requires_grad_() if tensor.ndim == 4 else tensor.requires_grad_()
    # Weights keep their own layout: only what arrives as a map has one that the caller chooses.
    children_layout: Layout = "contiguous" if hasattr(tree, "_fields") else layout
    tensors = rebuilt(tree, [to_tensors(child, device, children_layout, dtype) for child in tree])
    if isinstance(tensors, BatchNorm):
        return tensors._replace(running_mean=tensors.running_mean.detach(), running_var=tensors.running_var.detach())
    return tensors


def to_arrays(tree: Any) -> Any:
    """float64, also of what an accelerator or bfloat16 computed."""
    if isinstance(tree, Tensor):
        return tree.detach().cpu().double().numpy()
    return rebuilt(tree, [to_arrays(child) for child in tree])


def rounded(tree: Any, dtype: torch.dtype) -> Any:
    """Arrays that `dtype` holds exactly, so that the truth is computed from what the fast path gets."""
    if isinstance(tree, np.ndarray):
        return torch.from_numpy(tree).to(dtype).double().numpy()
    return rebuilt(tree, [rounded(child, dtype) for child in tree])


def assert_equal_steps(actual: Step, expected: Step, bound: float = EXACT, *, terms: float = 0.0) -> None:
    """Exact arithmetic would give the same; gradients are compared on one scale, the largest of them all.

    Where all of them can cancel to 0, `terms` is how large are the terms that do.
    """
    np.testing.assert_allclose(actual.output, expected.output, rtol=0, atol=bound * _largest(expected.output))
    scale = max(terms, _largest(*leaves(expected.gradients)))
    for actual_gradient, expected_gradient in zip(leaves(actual.gradients), leaves(expected.gradients), strict=True):
        np.testing.assert_allclose(actual_gradient, expected_gradient, rtol=0, atol=bound * scale)
    for actual_array, expected_array in zip(actual.statistics, expected.statistics, strict=True):
        np.testing.assert_allclose(actual_array, expected_array, rtol=0, atol=bound * _largest(expected_array))


def assert_steps_within_budget(
    actual: Sequence[Step], expected: Sequence[Step], yardstick: Sequence[Step], dtype: torch.dtype
) -> None:
    """One step per draw; the output, all gradients as one vector, and all statistics as one each have their budget."""
    for part in range(len(Step._fields)):
        fast, truth, baseline = ([_joined(step[part]) for step in steps] for steps in (actual, expected, yardstick))
        assert_within_budget(fast, truth, baseline, dtype)


def check(
    fast: Callable[..., Tensor],
    reference: tuple[Callable[..., Array], Callable[..., Any]],  # forward and backward
    inputs: tuple[Any, ...],
    rng: np.random.Generator,
    device: str,
    layout: Layout = "contiguous",
    **arguments: Any,
) -> None:
    """Same name, same arguments: `fast(*inputs, **arguments)` in float64 makes the reference's step, also without kernels."""
    forward, backward = reference
    cotangent = rng.standard_normal(forward(*inputs, **arguments).shape)
    expected = reference_step(forward, backward, inputs, cotangent, **arguments)
    for kernels in (nullcontext(), using(None)):
        with kernels:
            actual = torch_step(lambda *x: fast(*x, **arguments), to_tensors(inputs, device, layout), cotangent)
        assert_equal_steps(actual, expected)


def _laid_out(tensor: Tensor, layout: Layout) -> Tensor:
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "window":  # of a larger map, so not contiguous; what lies around it must not be read
        batch, channels, height, width = tensor.shape
        surroundings = tensor.new_full((batch, channels + 1, height + 2, width + 3), torch.nan)
        window = surroundings[:, 1:, 1:-1, 2:-1]
        return window.copy_(tensor)
    return tensor


def _gradients(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return torch.zeros_like(tree) if tree.grad is None else tree.grad
    return rebuilt(tree, [_gradients(child) for child in tree])


def _running_statistics(tree: Any) -> Any:
    if isinstance(tree, BatchNorm):
        yield from (tree.running_mean, tree.running_var)
    elif not isinstance(tree, np.ndarray):
        for child in tree:
            yield from _running_statistics(child)


def _tensor_leaves(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        yield tree
    else:
        for child in tree:
            yield from _tensor_leaves(child)


def _joined(tree: Any) -> Array:
    return np.concatenate([array.ravel() for array in leaves((tree,))] or [np.zeros(1)])


def _largest(*arrays: Array) -> float:
    return max(float(np.abs(array).max()) for array in arrays)
