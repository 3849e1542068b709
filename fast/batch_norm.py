"""`reference/batch_norm.py` on PyTorch. In training the running statistics are updated in place, as PyTorch does."""

import warnings
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.batch_norm import EPS, BatchNorm

MOMENTUM = 0.0003  # the authors' decay of 0.9997


def batch_norm(x: Tensor, norm: BatchNorm[Tensor], *, training: bool, momentum: float = MOMENTUM, eps: float = EPS) -> Tensor:
    """Normalise x: (N, C, H, W) -> (N, C, H, W)."""
    training = uses_batch_statistics(x, training)
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.scale, norm.offset, training, momentum, eps)


def uses_batch_statistics(x: Tensor, training: bool) -> bool:
    """Whether a map (N, any C, H, W) is normalised by its own statistics: in training, unless it has one value a channel."""
    if training and x.numel() == x.shape[1]:
        warnings.warn(
            "one value per channel has no batch statistics, the running ones are used: raise the batch size or the map",
            stacklevel=3,
        )
        return False
    return training


def batch_norm_relu(x: Tensor, norm: BatchNorm[Tensor], *, training: bool, momentum: float = MOMENTUM) -> Tensor:
    """max(batch_norm(x), 0): (N, C, H, W) -> (N, C, H, W)."""
    return F.relu(batch_norm(x, norm, training=training, momentum=momentum))


@torch.no_grad()
def recompute_statistics(module: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace all running statistics below `module` by their plain average over `batches` of its input.

    After a short training the slow averages still remember the initial weights; this makes its scores fair. Everything but the
    batch norms is in evaluation mode meanwhile (no dropout), and the whole module is left in evaluation mode.
    """
    norms = [child for child in module.modules() if isinstance(child, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    for i, batch in enumerate(batches):
        for norm in norms:
            norm.momentum = 1 / (i + 1)
        module(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    module.eval()
