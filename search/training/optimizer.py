"""Learning rates, weight decay and gradient multipliers as the authors have them (research/deeplab/train.py)."""

from typing import Any

import torch
from torch import nn

from fast.dense_prediction_cell import decays
from fast.segmentation import SegmentationNetwork

POWER = 0.9


def poly_learning_rate(
    iteration: int, *, initial: float, iterations: int, slow_start_iterations: int = 0, slow_start_rate: float = 1e-4
) -> float:
    """Learning rate of `iteration` (from 0): initial · (1 − t)^0.9, t from 0 to 1 after the slow start at a fixed rate.

    >>> [poly_learning_rate(i, initial=0.01, iterations=4) for i in (0, 2, 4)]
    [0.01, 0.005358867312681466, 0.0]
    """
    if iteration < slow_start_iterations:
        return slow_start_rate
    progress = (iteration - slow_start_iterations) / (iterations - slow_start_iterations)
    return float(initial * (1 - min(progress, 1.0)) ** POWER)


def parameter_groups(
    network: SegmentationNetwork, *, weight_decay: float, last_layer_multiplier: float = 1.0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser, with the `weight_decay` of each and the `multiplier` of its learning rate.

    Weights decay unless they are depthwise; batch norms and biases do not decay. The classifier's bias learns twice as fast
    as its weights. All parts but the backbone are "last layer". A multiple of the learning rate equals the same multiple of
    the gradient with its L2 part, because the update of momentum SGD is linear in the gradient.
    """
    decay = decays(network)
    norms = {name for name, child in network.named_modules() if isinstance(child, nn.BatchNorm2d)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        owner, _, kind = name.rpartition(".")
        multiplier = 1.0 if name.startswith("backbone.") else last_layer_multiplier
        multiplier *= 2.0 if kind == "bias" and owner not in norms else 1.0
        groups.setdefault((weight_decay if decay[name] else 0.0, multiplier), []).append(parameter)
    return [{"params": params, "weight_decay": wd, "multiplier": multiplier} for (wd, multiplier), params in groups.items()]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group: the rate times its multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["multiplier"]
