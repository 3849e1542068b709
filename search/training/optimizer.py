"""Learning rates, weight decay and gradient multipliers as the authors have them (research/deeplab/train.py), or AdamW."""

from typing import Any, assert_never

import torch
from torch import nn

from fast.dense_prediction_cell import decays
from fast.learning_rate import LearningRate
from fast.segmentation import SegmentationNetwork
from search.settings import RecipeSettings, known


def create_optimizer(network: SegmentationNetwork, recipe: RecipeSettings) -> torch.optim.Optimizer:
    """The optimiser of a completed recipe for all parameters of the network that learn; `set_learning_rate` comes next."""
    groups = parameter_groups(
        network, weight_decay=known(recipe.weight_decay), last_layer_multiplier=recipe.last_layer_multiplier
    )
    match recipe.optimizer:
        case "sgd":
            return torch.optim.SGD(groups, lr=0.0, momentum=known(recipe.momentum))
        case "adamw":
            return torch.optim.AdamW(groups, lr=0.0, fused=True)
        case _:
            assert_never(recipe.optimizer)


def learning_rate(recipe: RecipeSettings, iteration: int) -> float:
    """The learning rate of an iteration, counted from 0, of a completed recipe."""
    rates = LearningRate(
        initial=known(recipe.learning_rate),
        iterations=known(recipe.iterations),
        schedule=recipe.schedule,
        warmup_iterations=recipe.warmup_iterations,
        slow_start_iterations=recipe.slow_start_iterations,
        slow_start_rate=recipe.slow_start_learning_rate,
    )
    return float(rates.after(torch.tensor(iteration, dtype=torch.float64)))


def parameter_groups(
    network: SegmentationNetwork, *, weight_decay: float, last_layer_multiplier: float = 1.0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser, with the `weight_decay` of each and the `multiplier` of its learning rate.

    Weights decay as `decays` says. Biases, but those of norms, learn twice as fast as weights. All parts but the backbone are
    "last layer". With SGD, a multiple of the learning rate equals the same multiple of the gradient with its L2 part, as the
    authors have it, because the update is linear in the gradient. With AdamW, whose step does not depend on the gradient's
    scale, it is a multiple of the step and of the decay. Parameters that do not learn are left out.
    """
    decay = decays(network)
    owners = dict(network.named_modules())
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        owner, _, kind = name.rpartition(".")
        multiplier = 1.0 if name.startswith("backbone.") else last_layer_multiplier
        of_norm = getattr(getattr(owners[owner], "weight", None), "ndim", 1) == 1
        multiplier *= 2.0 if kind == "bias" and not of_norm else 1.0
        groups.setdefault((weight_decay if decay[name] else 0.0, multiplier), []).append(parameter)
    return [{"params": params, "weight_decay": wd, "multiplier": multiplier} for (wd, multiplier), params in groups.items()]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group: the rate times its multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["multiplier"]
