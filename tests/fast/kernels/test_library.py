"""What PyTorch's operations do beyond the kernels': take maps of the kernels, and give gradients of gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fast.batch_norm import LiveNorm
from fast.kernels import LiveConv, NormedMap, Operations, backend_for, library, operations_for, using
from fast.kernels.cpp import build
from fast.kernels.differentiable import OnKernels
from reference.batch_norm import BatchNorm

without_compiler = pytest.mark.skipif(isinstance(build.library(), str), reason="no C++ compiler")
SIZE = (4, 5)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape))).requires_grad_()


def live_conv(*shape: int) -> LiveConv:
    channels = shape[0]
    norm = BatchNorm(draw(channels), draw(channels), torch.zeros(channels).double(), torch.ones(channels).double())
    return LiveConv(draw(*shape), LiveNorm(norm, training=True))


OPERATIONS: dict[str, Callable[[Operations, NormedMap], Any]] = {
    "depthwise": lambda on, x: on.depthwise_conv(x, *live_conv(3, 1, 3, 3), rate=(1, 2)),
    "depthwise without norm": lambda on, x: on.depthwise_conv(x, draw(3, 1, 3, 3), None, rate=(1, 2)),
    "pointwise": lambda on, x: on.pointwise_conv([x, x], *live_conv(4, 6, 1, 1)),
    "pointwise without norm": lambda on, x: on.pointwise_conv([x], draw(4, 3, 1, 1), None),
    "separable": lambda on, x: on.separable_conv(x, live_conv(3, 1, 3, 3), live_conv(4, 3, 1, 1), rate=(2, 1)),
    "sliding means": lambda on, x: on.pooling_means(x, (2, 3), "sliding_window", None),
    "means of cells": lambda on, x: on.pooling_means(x, (2, 3), "grid_cells", None),
    "resize": lambda on, x: on.resize(x, (7, 3)),
    "value": lambda on, x: on.value(x),
}
every_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)


def value_of(result: NormedMap | Tensor) -> Tensor:
    return library.value(result) if isinstance(result, NormedMap) else result


@without_compiler
@every_operation
def test_a_map_whose_norm_is_not_yet_applied_is_taken_as_by_kernels(operation: Callable[[Operations, NormedMap], Any]) -> None:
    x = NormedMap(draw(2, 3, *SIZE), draw(3), draw(3))
    backend = backend_for(x.raw)
    assert backend is not None
    expected = value_of(operation(OnKernels(backend), x))
    torch.testing.assert_close(value_of(operation(library, x)), expected)
    with using(None):  # a map that was made before
        torch.testing.assert_close(value_of(operation(operations_for(x.raw), x)), expected)


@every_operation
def test_gradients_of_gradients(operation: Callable[[Operations, NormedMap], Any]) -> None:
    """Those of a smooth function of the operation, against central differences; the draw keeps clear of the ReLU's edge."""
    assert torch.autograd.gradgradcheck(
        lambda raw: value_of(operation(library, NormedMap(raw))).square().sum(), draw(2, 3, *SIZE)
    )


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
@pytest.mark.parametrize("on", [pytest.param(lambda: library, id="PyTorch"), pytest.param(lambda: kernels(), id="kernels")])
def test_dropout_rates_that_leave_nothing_are_refused(on: Callable[[], Operations], rate: float) -> None:
    with pytest.raises(ValueError, match="a dropout rate must be at least 0 and below 1"):
        on().pointwise_conv([NormedMap(draw(2, 3, *SIZE))], draw(4, 3, 1, 1), None, dropout_rate=rate)


def kernels() -> Operations:
    backend = backend_for(torch.ones(1))
    return pytest.skip("no C++ compiler") if backend is None else OnKernels(backend)
