"""What a backend's functions should compute, from `reference/`: float64 NumPy, whatever the backend computes in."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fast.kernels import NormedMap, Unfolded
from reference.batch_norm import Array


class Expected(NamedTuple):
    """A lazily normalised map, or gradients of one, in float64."""

    raw: Array  # (N, C, H, W)
    scale: Array | None
    offset: Array | None

    def value(self) -> Array:
        if self.scale is None or self.offset is None:
            return self.raw
        return np.maximum(per_channel(self.scale) * self.raw + per_channel(self.offset), 0.0)

    def backward(self, grad_value: Array) -> "Expected":
        """Gradients of raw, scale and offset, given that of the value."""
        if self.scale is None or self.offset is None:
            return Expected(grad_value, None, None)
        grad = grad_value * (per_channel(self.scale) * self.raw + per_channel(self.offset) > 0.0)
        return Expected(grad * per_channel(self.scale), (grad * self.raw).sum(axis=(0, 2, 3)), grad.sum(axis=(0, 2, 3)))


def per_channel(numbers: Array) -> Array:
    return numbers[:, None, None]


def effective_gradient(grad: Array, raw: Array, unfolded: Unfolded | None) -> Array:
    """What reaches a convolution's output: directly, and through its own statistics."""
    if unfolded is None:
        return grad
    return grad + per_channel(to_array(unfolded.slope)) * raw + per_channel(to_array(unfolded.intercept))


def of(x: NormedMap) -> Expected:
    return Expected(*(None if tensor is None else to_array(tensor) for tensor in x))  # type: ignore[arg-type]


def to_array(tensor: Tensor) -> Array:
    return tensor.detach().cpu().double().numpy()


def relative_error(actual: Tensor | None, expected: NDArray[Any] | None) -> float:
    """The largest error, relative to the largest |expected|; raises where a shape differs or a value is not finite."""
    assert (actual is None) == (expected is None)
    if actual is None or expected is None:
        return 0.0
    assert actual.shape == expected.shape
    assert bool(torch.isfinite(actual).all()), "not finite everywhere"
    if expected.size == 0:
        return 0.0
    return float(np.abs(to_array(actual) - expected).max() / (np.abs(expected).max() or 1.0))
