"""Gradients held to central differences along one random direction v:

    <cotangent, f(x + h·v) − f(x − h·v)> / 2h  =  <gradient, v>

with h = 1e-6 in float64. Its error has two parts, both relative to the norms below. Rounding, divided by the deviation of a
batch norm of at least √1e-5 = 3e-3, gives 2e-16 / (h · 3e-3) = 7e-8. Truncation is the square of the step relative to the
length on which f bends. Batch norm bends over its batch's deviation: a point is drawn again if any value would move by more
than MAX_MOVE deviations (as two pixels that are almost equal do). ReLU has no derivative at 0, a point is drawn again if any
batch norm's output would change its sign. Both are conditions on the forward pass, never on the outcome of the comparison.
A wrong factor or a missing term is off by orders more than TOLERANCE.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from hypothesis import assume

import reference.batch_norm
import reference.dense_prediction_cell
from reference.batch_norm import EPS, Array, BatchNorm

STEP = 1e-6
MAX_MOVE = 5e-4  # its square leaves 1/4 of TOLERANCE
TOLERANCE = 1e-6


def assert_gradient(
    function: Callable[..., Array],
    inputs: tuple[Any, ...],
    gradients: tuple[Any, ...],
    cotangent: Array,
    rng: np.random.Generator,
) -> None:
    """`gradients` are those of <cotangent, function(*inputs)>; inputs and gradients: arrays or (named) tuples of them."""
    direction = random_direction(inputs, rng)
    plus, norms_plus = with_batch_norms(function, shifted(inputs, direction, STEP))
    here, norms_here = with_batch_norms(function, inputs)
    minus, norms_minus = with_batch_norms(function, shifted(inputs, direction, -STEP))
    for after, point, before in zip(norms_plus, norms_here, norms_minus, strict=True):
        assume(np.array_equal(after.output > 0.0, point.output > 0.0))
        assume(np.array_equal(before.output > 0.0, point.output > 0.0))
        assume(np.all(np.abs(after.x - before.x) / 2 <= MAX_MOVE * point.deviation()))

    numeric = np.sum(cotangent * (plus - minus)) / (2 * STEP)
    analytic = sum(np.sum(gradient * v) for gradient, v in zip(leaves(gradients), leaves(direction), strict=True))
    scale = norm(gradients) * norm(direction) + norm(cotangent) * norm(here)
    assert abs(numeric - analytic) <= TOLERANCE * scale, f"numeric {numeric}, analytic {analytic}, scale {scale}"


class BatchNormCall(NamedTuple):
    """One call of the reference's `batch_norm`."""

    x: Array
    norm: BatchNorm[Array]
    training: bool
    output: Array

    def deviation(self) -> Array:
        """By which x is divided: (C, 1, 1)."""
        from_batch = self.training and self.x[:, 0].size > 1
        variance = self.x.var(axis=(0, 2, 3)) if from_batch else self.norm.running_var
        return np.sqrt(variance + EPS)[:, None, None]


def with_batch_norms(function: Callable[..., Array], inputs: tuple[Any, ...]) -> tuple[Array, list[BatchNormCall]]:
    """function(*inputs), and the batch norms on the way, in the order of the forward pass."""
    calls = []
    batch_norm = reference.batch_norm.batch_norm

    def recording(x: Array, norm: BatchNorm[Array], *, training: bool) -> Array:
        output = batch_norm(x, norm, training=training)
        calls.append(BatchNormCall(x, norm, training, output))
        return output

    with (
        mock.patch.object(reference.batch_norm, "batch_norm", recording),
        mock.patch.object(reference.dense_prediction_cell, "batch_norm", recording),  # of a cell without branches
    ):
        return np.asarray(function(*inputs)), calls


def random_direction(tree: Any, rng: np.random.Generator) -> Any:
    """Standard normal for every array but the running statistics, which are constants: 0."""
    if isinstance(tree, np.ndarray):
        return rng.standard_normal(tree.shape)
    direction = rebuilt(tree, [random_direction(child, rng) for child in tree])
    if isinstance(direction, BatchNorm):
        constant = np.zeros_like(direction.running_mean)
        return direction._replace(running_mean=constant, running_var=constant)
    return direction


def shifted(tree: Any, direction: Any, step: float) -> Any:
    if isinstance(tree, np.ndarray):
        return tree + step * direction
    return rebuilt(tree, [shifted(child, v, step) for child, v in zip(tree, direction, strict=True)])


def rebuilt(tree: Any, children: list[Any]) -> Any:
    return type(tree)(*children) if hasattr(tree, "_fields") else tuple(children)


def leaves(tree: Any) -> Iterator[Array]:
    if isinstance(tree, np.ndarray):
        yield tree
    else:
        for child in tree:
            yield from leaves(child)


def norm(tree: Any) -> float:
    return float(np.sqrt(sum(np.sum(array**2) for array in leaves((tree,)))))
