"""Misreadings of the concatenation, its dropout, the projection and their gradient."""

from collections.abc import Callable
from typing import Any

import numpy as np

from docs.assignment.misreadings.misreading import Misreading, changed_results
from docs.assignment.mutation import Changes, Function
from reference import concat_project as project
from reference import pointwise_conv as pointwise
from reference.batch_norm import Array


def _concatenated(stack: Callable[[list[Array]], Array]) -> Changes:
    """The branches concatenated in another way. Dropout is as it was."""

    def change(original: Function) -> Function:
        def concat(branches: list[Array], keep: Any, rate: float) -> Array:
            stacked = stack(branches)
            return stacked if keep is None else project.dropout(stacked, keep, rate=rate)

        return concat

    return {"concat_project._concat": change}


def _interleaved(branches: list[Array]) -> Array:
    stacked = np.stack(branches, axis=2)  # (N, C, B, H, W)
    return stacked.reshape(stacked.shape[0], -1, *stacked.shape[3:])


def _dropout(factor: Callable[[float], float]) -> Changes:
    return {"concat_project.dropout": lambda f: lambda x, keep, *, rate: np.where(keep, x * factor(rate), 0.0)}


def _dropped_after(original: Function) -> Function:
    def changed(branches: Any, weights: Any, *, training: bool, dropout_keep: Any = None, dropout_rate: float = 0.1) -> Array:
        value: Array = original(branches, weights, training=training)
        if dropout_keep is None:
            return value
        return project.dropout(value, dropout_keep[:, : value.shape[1]], rate=dropout_rate)

    return changed


def _scaled_in_inference(original: Function) -> Function:
    def changed(branches: Any, weights: Any, *, training: bool, dropout_rate: float = 0.1, **options: Any) -> Array:
        scaled = branches if training else [(1.0 - dropout_rate) * branch for branch in branches]
        value: Array = original(scaled, weights, training=training, dropout_rate=dropout_rate, **options)
        return value

    return changed


PROJECT = (
    Misreading(
        "branches_reversed",
        "project",
        "with the branches in reverse order",
        "they are concatenated in the order of the cell",
        _concatenated(lambda branches: np.concatenate(branches[::-1], axis=1)),
    ),
    Misreading(
        "channels_interleaved",
        "project",
        "with the branches' channels interleaved",
        "first come all channels of branch 0, then all of branch 1",
        _concatenated(_interleaved),
    ),
    Misreading(
        "dropout_not_rescaled",
        "project",
        "with dropout that does not rescale what it keeps",
        "it is multiplied by 1 / (1 - rate)",
        _dropout(lambda rate: 1.0),
    ),
    Misreading(
        "dropout_scaled_down",
        "project",
        "with what dropout keeps multiplied by 1 - rate",
        "it is divided by that",
        _dropout(lambda rate: 1.0 - rate),
    ),
    Misreading(
        "dropout_divided_by_the_rate",
        "project",
        "with what dropout keeps divided by the rate",
        "it is divided by 1 - rate",
        _dropout(lambda rate: 1.0 / rate),
    ),
    Misreading(
        "dropout_divided_by_the_kept_share",
        "project",
        "with what dropout keeps divided by the share that this mask happens to keep",
        "it is divided by 1 - rate, whatever the mask",
        {"concat_project.dropout": lambda f: lambda x, keep, *, rate: np.where(keep, x / keep.mean(), 0.0)},
    ),
    Misreading(
        "dropout_in_inference",
        "project",
        "with dropout in inference where a mask is given",
        "there is dropout in training only",
        {"expected.mask": lambda f: lambda keep, training: keep},
    ),
    Misreading(
        "dropout_mask_inverted",
        "project",
        "with the mask inverted",
        "`dropout_keep` is True where an element is kept",
        {"concat_project.dropout": lambda f: lambda x, keep, *, rate: f(x, ~keep, rate=rate)},
    ),
    Misreading(
        "dropout_ignored",
        "project",
        "without dropout",
        "where there is a mask, it applies",
        {"concat_project.dropout": lambda f: lambda x, keep, *, rate: x},
    ),
    Misreading(
        "dropout_after_projection",
        "project",
        "with dropout after the projection",
        "the concatenation is dropped out, before the projection",
        {"concat_project.concat_project": _dropped_after},
    ),
    Misreading(
        "scaled_in_inference",
        "project",
        "with the concatenation multiplied by 1 - rate in inference",
        "as dropout rescales in training, nothing changes in inference",
        {"concat_project.concat_project": _scaled_in_inference},
    ),
)


def _dropout_backward(change: Callable[[Array, Any], Array]) -> Changes:
    """Another gradient of dropout: a function of the gradient for what came out of it, and of the mask."""

    def changed(original: Function) -> Function:
        def backward(g: Array, branches: Any, weights: Any, *, dropout_keep: Any = None, **options: Any) -> Any:
            grads, grad_weights = original(g, branches, weights, dropout_keep=dropout_keep, **options)
            if dropout_keep is None:
                return grads, grad_weights
            rate = options.get("dropout_rate", project.DROPOUT_RATE)
            stacked = project._concat(branches, dropout_keep, rate)
            undropped, _ = pointwise.conv1x1_backward(g, stacked, weights, training=options["training"])
            splits = np.cumsum([branch.shape[1] for branch in branches])[:-1]
            return list(np.split(change(undropped, dropout_keep), splits, axis=1)), grad_weights

        return backward

    return {"concat_project.concat_project_backward": changed}


PROJECT_GRADIENT = (
    Misreading(
        "no_dropout_in_the_gradient",
        "project_gradient",
        "without dropout in the gradient for the branches",
        "it passes the same mask and factor as the values did",
        _dropout_backward(lambda grad, keep: grad),
    ),
    Misreading(
        "dropout_gradient_not_rescaled",
        "project_gradient",
        "without dropout's factor in the gradient for the branches",
        "it passes the same mask and factor as the values did",
        _dropout_backward(lambda grad, keep: grad * keep),
    ),
    Misreading(
        "branch_gradients_reversed",
        "project_gradient",
        "with the branches' gradients in reverse order",
        "the first slice of the concatenation is branch 0",
        {"concat_project.concat_project_backward": changed_results(lambda grads, *_: list(reversed(grads)), None)},
    ),
)
