"""Gradients held to central differences along one random direction v:

    <cotangent, f(x + h·v) − f(x − h·v)> / 2h  =  <gradient, v>

The step h is 1e-6 in float64. The worst that the reference does to it is to divide by the deviation of a batch norm, never below
√1e-5 = 3e-3. So truncation is about (h / 3e-3)² = 1e-7 and rounding about 2e-16 / (h · 3e-3) = 7e-8, relative to the norms
below; TOLERANCE is ten times that. A wrong factor or a missing term is off by orders more.

ReLU has no derivative at 0, so points are drawn such that no batch norm's output changes sign within the step. That is a
condition on the forward pass alone, never on the outcome of the comparison.
"""

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import assume

import reference.batch_norm
from reference.batch_norm import Array, BatchNorm

STEP = 1e-6
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
    plus, signs_plus = value_and_signs(function, shifted(inputs, direction, STEP))
    here, signs_here = value_and_signs(function, inputs)
    minus, signs_minus = value_and_signs(function, shifted(inputs, direction, -STEP))
    for a, b, c in zip(signs_plus, signs_here, signs_minus, strict=True):
        assume(np.array_equal(a, b) and np.array_equal(b, c))

    numeric = np.sum(cotangent * (plus - minus)) / (2 * STEP)
    analytic = sum(np.sum(gradient * v) for gradient, v in zip(leaves(gradients), leaves(direction), strict=True))
    scale = norm(gradients) * norm(direction) + norm(cotangent) * norm(here)
    assert abs(numeric - analytic) <= TOLERANCE * scale, f"numeric {numeric}, analytic {analytic}, scale {scale}"


def value_and_signs(function: Callable[..., Array], inputs: tuple[Any, ...]) -> tuple[Array, list[Any]]:
    """function(*inputs), and for each batch norm on the way where its output is positive."""
    signs = []
    batch_norm = reference.batch_norm.batch_norm

    def recording(*args: Any, **options: Any) -> Array:
        output = batch_norm(*args, **options)
        signs.append(output > 0.0)
        return output

    with mock.patch.object(reference.batch_norm, "batch_norm", recording):
        return np.asarray(function(*inputs)), signs


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
