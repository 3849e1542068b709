"""How the authors' optimiser moves a whole network (research/deeplab/train.py): rates, weight decay, gradient multipliers."""

from typing import Any

import torch
from torch import nn

from fast.dense_prediction_cell import decays
from fast.segmentation import SegmentationNetwork

POWER = 0.9


def poly_learning_rate(
    iteration: int, *, initial: float, iterations: int, slow_start_iterations: int = 0, slow_start_rate: float = 1e-4
) -> float:
    """The rate of `iteration` (from 0): initial · (1 − t)^0.9, where t goes from 0 to 1 after the slow start at a fixed rate.

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
    """Groups for an optimiser, with the `weight_decay` of each and the `multiplier` of its learning rate.

    Weights decay unless they are depthwise; batch norms and biases do not. The classifier's bias learns twice as fast as its
    weights; all but the backbone is "last layer". Multiplying a rate is multiplying the gradient, L2's part included, as long
    as the update is linear in it, which momentum SGD's is.
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
    """Give every group the rate times its multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["multiplier"]
