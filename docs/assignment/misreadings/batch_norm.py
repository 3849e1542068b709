"""Misreadings of batch norm, ReLU and their gradient."""

from collections.abc import Callable
from typing import Any

import numpy as np

from docs.assignment.misreadings.misreading import Misreading
from docs.assignment.mutation import Changes, Function
from reference import batch_norm as bn
from reference.batch_norm import EPS, Array, BatchNorm


def _normalised_by(statistics: Callable[[Array], tuple[Array, Array]]) -> Callable[[Function], Function]:
    """Batch norm in training with another mean and variance, which broadcast against x."""

    def change(original: Function) -> Function:
        def normalise(x: Array, norm: Any, training: bool, eps: float) -> tuple[Array, Array]:
            if not training or x[:, 0].size == 1:
                return original(x, norm, training, eps)  # type: ignore[no-any-return]
            mean, var = statistics(x)
            deviation = np.sqrt(var + eps)
            return (x - mean) / deviation, deviation

        return normalise

    return change


def _over(axes: tuple[int, ...], ddof: int = 0) -> Callable[[Array], tuple[Array, Array]]:
    return lambda x: (x.mean(axis=axes, keepdims=True), x.var(axis=axes, keepdims=True, ddof=ddof))


def _divided_by(divisor: Callable[[Array, float], Array]) -> Callable[[Function], Function]:
    """Batch norm with another divisor: a function of the variance and ε."""

    def change(original: Function) -> Function:
        def normalise(x: Array, norm: Any, training: bool, eps: float) -> tuple[Array, Array]:
            normalised, deviation = original(x, norm, training, 0.0)
            divisors = divisor(np.square(deviation), eps)
            return normalised * deviation / divisors, divisors

        return normalise

    return change


def _by_its_own(original: Function) -> Function:
    """One value per channel is normalised by itself, which leaves the offset."""

    def normalise(x: Array, norm: Any, training: bool, eps: float) -> tuple[Array, Array]:
        if training and x[:, 0].size == 1:
            return np.zeros_like(x), np.full_like(x, np.sqrt(eps))
        return original(x, norm, training, eps)  # type: ignore[no-any-return]

    return normalise


def _running_variance_of(batch_var: Function) -> Callable[[Function], Function]:
    """Running statistics with another variance of the batch, at whatever share of the new."""

    def change(original: Function) -> Function:
        def update(x: Array, norm: Any, *, momentum: float) -> Any:
            after = original(x, norm, momentum=momentum)
            if x[:, 0].size == 1:
                return after
            share = (after.running_var - norm.running_var) / (x.var(axis=(0, 2, 3), ddof=1) - norm.running_var)
            return after._replace(running_var=norm.running_var + share * (batch_var(x) - norm.running_var))

        return update

    return change


def _one_value(x: Array) -> bool:
    return int(x[:, 0].size) == 1


def _mean_moved_by_one_value(original: Function) -> Function:
    def update(x: Array, norm: Any, *, momentum: float) -> Any:
        after = original(x, norm, momentum=momentum)
        if not _one_value(x):
            return after
        return after._replace(running_mean=(1 - momentum) * norm.running_mean + momentum * x[0, :, 0, 0])

    return update


def _unbiased_per_image(x: Array) -> Array:
    n = x[0, 0].size
    if n == 1:  # n / (n - 1) would be 1 / 0: whoever reads it so has to do something else here
        n = x[:, 0].size
    variance: Array = x.var(axis=(0, 2, 3)) * n / (n - 1)
    return variance


def _share(read: Callable[[float], float]) -> Changes:
    """Running statistics with another share of the new: a function of the momentum."""
    return {
        "batch_norm.updated_running_statistics": lambda f: lambda x, norm, *, momentum: f(x, norm, momentum=read(momentum))
    }


BATCH_NORM = (
    Misreading(
        "eps_1e_3",
        "batch_norm",
        "with ε = 1e-3",
        "the cell uses 1e-5",
        {"batch_norm._normalise": _divided_by(lambda var, eps: np.sqrt(var + 1e-3))},
    ),
    Misreading(
        "eps_1e_8",
        "batch_norm",
        "with ε = 1e-8",
        "the cell uses 1e-5",
        {"batch_norm._normalise": _divided_by(lambda var, eps: np.sqrt(var + 1e-8))},
    ),
    Misreading(
        "no_eps",
        "batch_norm",
        "without ε",
        "ε = 1e-5 is added to the variance",
        {"batch_norm._normalise": _divided_by(lambda var, eps: np.sqrt(var))},
    ),
    Misreading(
        "eps_outside_the_root",
        "batch_norm",
        "with ε added to the deviation, outside of the square root",
        "it is added to the variance, inside",
        {"batch_norm._normalise": _divided_by(lambda var, eps: np.sqrt(var) + eps)},
    ),
    Misreading(
        "divided_by_the_variance",
        "batch_norm",
        "by dividing by the variance",
        "the divisor is the square root of variance + ε",
        {"batch_norm._normalise": _divided_by(lambda var, eps: var + eps)},
    ),
    Misreading(
        "unbiased_variance_normalises",
        "batch_norm",
        "with the unbiased variance (divided by n - 1)",
        "a batch is normalised by the biased one (divided by n); only the running variance takes the unbiased",
        {"batch_norm._normalise": _normalised_by(_over((0, 2, 3), ddof=1))},
    ),
    Misreading(
        "statistics_per_image",
        "batch_norm",
        "with statistics of each image by itself (instance norm)",
        "they are taken over images, rows and columns",
        {"batch_norm._normalise": _normalised_by(_over((2, 3)))},
    ),
    Misreading(
        "statistics_over_channels",
        "batch_norm",
        "with statistics over the channels of an image too (layer norm)",
        "every channel has its own",
        {"batch_norm._normalise": _normalised_by(_over((1, 2, 3)))},
    ),
    Misreading(
        "statistics_of_everything",
        "batch_norm",
        "with one mean and variance for all channels",
        "every channel has its own",
        {"batch_norm._normalise": _normalised_by(_over((0, 1, 2, 3)))},
    ),
    Misreading(
        "statistics_per_position",
        "batch_norm",
        "with statistics over the images alone",
        "they are taken over images, rows and columns",
        {"batch_norm._normalise": _normalised_by(_over((0,)))},
    ),
    Misreading(
        "running_statistics_in_training",
        "batch_norm",
        "with the running statistics in training",
        "in training, mean and variance come from the batch",
        {
            "batch_norm._normalise": lambda f: lambda x, norm, training, eps: f(x, norm, False, eps),
            "batch_norm.batch_norm_backward": lambda f: lambda g, x, norm, **_: f(g, x, norm, training=False),
        },
    ),
    Misreading(
        "batch_statistics_in_inference",
        "batch_norm",
        "with the batch's statistics in inference",
        "there, mean and variance are the running ones",
        {
            "batch_norm._normalise": lambda f: lambda x, norm, training, eps: f(x, norm, True, eps),
            "batch_norm.batch_norm_backward": lambda f: lambda g, x, norm, **_: f(g, x, norm, training=True),
        },
    ),
    Misreading(
        "one_value_normalised_by_itself",
        "batch_norm",
        "where a single value per channel is normalised by its own mean",
        "its statistics mean nothing, so the running ones are used",
        {"batch_norm._normalise": _by_its_own},
    ),
    Misreading(
        "one_value_per_image",
        "batch_norm",
        "where a 1 x 1 map of several images has no statistics",
        "one value per channel means N = H = W = 1: two images give two values",
        {"batch_norm._uses_batch_statistics": lambda f: lambda x, training: f(x[:1], training)},
    ),
    Misreading(
        "scale_and_offset_swapped",
        "batch_norm",
        "with scale and offset swapped",
        "scale multiplies, offset is added",
        {
            "batch_norm.batch_norm": lambda f: (
                lambda x, norm, **o: f(x, norm._replace(scale=norm.offset, offset=norm.scale), **o)
            )
        },
    ),
    Misreading(
        "no_relu",
        "batch_norm",
        "without the ReLU at the end",
        "every convolution of the cell ends with batch norm and ReLU",
        {
            "batch_norm.batch_norm_relu": lambda f: lambda x, norm, **o: bn.batch_norm(x, norm, **o),
            "batch_norm.batch_norm_relu_backward": lambda f: lambda g, x, norm, **o: bn.batch_norm_backward(g, x, norm, **o),
        },
    ),
    Misreading(
        "relu_before_norm",
        "batch_norm",
        "with ReLU before batch norm",
        "batch norm comes first",
        {"batch_norm.batch_norm_relu": lambda f: lambda x, norm, **o: bn.batch_norm(np.maximum(x, 0.0), norm, **o)},
    ),
    Misreading(
        "biased_running_variance",
        "batch_norm",
        "with the biased variance in the running one",
        "the running variance takes the unbiased one (divided by n - 1)",
        {"batch_norm.updated_running_statistics": _running_variance_of(lambda x: x.var(axis=(0, 2, 3)))},
    ),
    Misreading(
        "running_variance_unbiased_per_image",
        "batch_norm",
        "with the running variance times n / (n - 1), n = H · W",
        "n counts the values of all images: N · H · W",
        {"batch_norm.updated_running_statistics": _running_variance_of(_unbiased_per_image)},
    ),
    Misreading(
        "eps_in_the_running_variance",
        "batch_norm",
        "with ε in the running variance",
        "ε is added only where the variance divides",
        {"batch_norm.updated_running_statistics": _running_variance_of(lambda x: x.var(axis=(0, 2, 3), ddof=1) + EPS)},
    ),
    Misreading(
        "running_mean_moves_with_one_value",
        "batch_norm",
        "where the running mean moves also with one value per channel",
        "there neither of the running statistics changes",
        {"batch_norm.updated_running_statistics": _mean_moved_by_one_value},
    ),
    Misreading(
        "momentum_is_decay",
        "batch_norm",
        "with momentum as the share of the old statistics (a decay)",
        "here it is the share of the new: decay 0.9997 is momentum 0.0003",
        _share(lambda momentum: 1.0 - momentum),
    ),
    Misreading(
        "running_deviation",
        "batch_norm",
        "with the standard deviation in the running variance",
        "it follows the variance",
        {"batch_norm.updated_running_statistics": _running_variance_of(lambda x: x.std(axis=(0, 2, 3), ddof=1))},
    ),
    Misreading(
        "statistics_replaced",
        "batch_norm",
        "with the batch's statistics in place of the running ones",
        "the running ones move towards them by the share `momentum`",
        _share(lambda momentum: 1.0),
    ),
)


def _norm_gradient(
    *, mean_term: float = 1.0, variance_term: float = 1.0, has_terms: Any = bn._uses_batch_statistics, ddof: int = 0
) -> Changes:
    """Batch norm's gradient with other terms of mean and variance, or with them where `has_terms` says: of x and training.

    `ddof` is taken from the number of values that the variance's term is divided by.
    """

    def backward(g: Array, x: Array, norm: BatchNorm[Array], *, training: bool) -> tuple[Array, BatchNorm[Array]]:
        normalised, deviation = bn._normalise(x, norm, training, EPS)
        zero = np.zeros_like(norm.scale)
        gradients = BatchNorm((g * normalised).sum(axis=(0, 2, 3)), g.sum(axis=(0, 2, 3)), zero, zero)
        grad = g * norm.scale.reshape(1, -1, 1, 1)
        removed = np.zeros_like(grad)
        if has_terms(x, training):
            removed += mean_term * grad.mean(axis=(0, 2, 3), keepdims=True)
            count = x[:, 0].size - ddof
            removed += variance_term * normalised * (grad * normalised).sum(axis=(0, 2, 3), keepdims=True) / count
        return (grad - removed) / deviation, gradients

    return {"batch_norm.batch_norm_backward": lambda f: backward}


def _unnormalised_scale(original: Function) -> Function:
    def backward(g: Array, x: Array, norm: BatchNorm[Array], **options: Any) -> tuple[Array, BatchNorm[Array]]:
        grad_x, grad_norm = original(g, x, norm, **options)
        return grad_x, grad_norm._replace(scale=(g * x).sum(axis=(0, 2, 3)))

    return backward


def _scale_forgotten(original: Function) -> Function:
    def backward(g: Array, x: Array, norm: BatchNorm[Array], **options: Any) -> tuple[Array, BatchNorm[Array]]:
        grad_x, _ = original(g, x, norm._replace(scale=np.ones_like(norm.scale)), **options)
        return grad_x, original(g, x, norm, **options)[1]

    return backward


def _masked_by(mask: Callable[[Array, Array], Any]) -> Changes:
    """The ReLU's gradient masked by a function of grad_output and x."""
    return {
        "batch_norm.batch_norm_relu_backward": lambda f: (
            lambda g, x, norm, **o: bn.batch_norm_backward(g * mask(g, x), x, norm, **o)
        )
    }


def _masked_late(original: Function) -> Function:
    def backward(g: Array, x: Array, norm: BatchNorm[Array], **options: Any) -> tuple[Array, BatchNorm[Array]]:
        grad_x, grad_norm = bn.batch_norm_backward(g, x, norm, **options)
        return grad_x * (bn.batch_norm(x, norm, **options) > 0.0), grad_norm

    return backward


BATCH_NORM_GRADIENT = (
    Misreading(
        "mean_and_variance_are_constants",
        "batch_norm_gradient",
        "with mean and variance taken as constants",
        "in training they depend on x, which adds two terms",
        _norm_gradient(mean_term=0.0, variance_term=0.0),
    ),
    Misreading(
        "no_variance_term",
        "batch_norm_gradient",
        "without the term of the variance",
        "the variance depends on x too",
        _norm_gradient(variance_term=0.0),
    ),
    Misreading(
        "no_mean_term",
        "batch_norm_gradient",
        "without the term of the mean",
        "the mean depends on x too",
        _norm_gradient(mean_term=0.0),
    ),
    Misreading(
        "batch_terms_in_inference",
        "batch_norm_gradient",
        "with the terms of mean and variance in inference too",
        "there, both are constants",
        _norm_gradient(has_terms=lambda x, training: True),
    ),
    Misreading(
        "one_value_has_batch_terms",
        "batch_norm_gradient",
        "with the terms of mean and variance also for one value per channel",
        "there, as in the forward pass, the running statistics are used, and they are constants",
        _norm_gradient(has_terms=lambda x, training: training),
    ),
    Misreading(
        "variance_term_unbiased",
        "batch_norm_gradient",
        "with n - 1 in the term of the variance",
        "a batch is normalised by the biased variance, so all means are over n",
        _norm_gradient(ddof=1),
    ),
    Misreading(
        "scale_gradient_of_x",
        "batch_norm_gradient",
        "with the sum of gradient times x for the scale",
        "it is the sum of gradient times normalised x",
        {"batch_norm.batch_norm_backward": _unnormalised_scale},
    ),
    Misreading(
        "scale_forgotten",
        "batch_norm_gradient",
        "without the scale in the gradient for x",
        "what comes in is multiplied by the scale first",
        {"batch_norm.batch_norm_backward": _scale_forgotten},
    ),
    Misreading(
        "no_mask",
        "batch_norm_gradient",
        "without the ReLU in the gradient",
        "it passes the gradient where its input is positive, and 0 elsewhere",
        _masked_by(lambda g, x: 1.0),
    ),
    Misreading(
        "relu_passes_at_0",
        "batch_norm_gradient",
        "where the ReLU passes the gradient also where its input is exactly 0",
        "it passes it where its input is positive: > 0, not >= 0",
        {
            "batch_norm.batch_norm_relu_backward": lambda f: (
                lambda g, x, norm, **o: bn.batch_norm_backward(g * (bn.batch_norm(x, norm, **o) >= 0.0), x, norm, **o)
            )
        },
    ),
    Misreading(
        "mask_of_the_norms_input",
        "batch_norm_gradient",
        "with the ReLU's mask taken of x, what came into batch norm",
        "the ReLU's input is what batch norm gives",
        _masked_by(lambda g, x: x > 0.0),
    ),
    Misreading(
        "mask_of_the_gradient",
        "batch_norm_gradient",
        "with negative gradients cut off",
        "the ReLU passes the gradient, of either sign, where its input is positive",
        _masked_by(lambda g, x: g > 0.0),
    ),
    Misreading(
        "masked_after_the_norm",
        "batch_norm_gradient",
        "with the ReLU's mask after batch norm's gradient",
        "backwards the ReLU comes first",
        {"batch_norm.batch_norm_relu_backward": _masked_late},
    ),
)
