"""`reference/batch_norm.py` on PyTorch. In training the running statistics are updated in place, as PyTorch does."""

import contextlib
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextvars import ContextVar
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.batch_norm import EPS, BatchNorm

MOMENTUM = 0.0003  # the authors' decay of 0.9997


class LiveNorm(NamedTuple):
    """A batch norm of a network: its tensors, and its mode (training or not, momentum), which each norm has for itself."""

    tensors: BatchNorm[Tensor]
    training: bool
    momentum: float | None = MOMENTUM  # None: the running statistics are the plain average of all batches so far
    eps: float = EPS
    batches: Tensor | None = None  # (), int64: how many batches are in the running statistics


def authors_norm(channels: int) -> nn.BatchNorm2d:
    """A norm with the authors' momentum, for trainings that recompute the running statistics before using them."""
    return nn.BatchNorm2d(channels, eps=EPS, momentum=MOMENTUM)


def live(norm: nn.Module) -> LiveNorm:
    """The tensors and the present mode of an `nn.BatchNorm2d`.

    Raises TypeError for another kind of norm, ValueError for one without scale and offset, or without running statistics.
    """
    if not isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        raise TypeError(f"the norm of a convolution must be nn.BatchNorm2d, got {type(norm).__name__}")
    if not (norm.affine and norm.track_running_stats):
        raise ValueError(f"the norm of a convolution must have affine=True and track_running_stats=True, got {norm}")
    mean, var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    tensors = BatchNorm(norm.weight, norm.bias, mean, var)
    return LiveNorm(tensors, norm.training, norm.momentum, norm.eps, norm.num_batches_tracked)


def batch_norm(x: Tensor, norm: BatchNorm[Tensor], *, training: bool, momentum: float = MOMENTUM, eps: float = EPS) -> Tensor:
    """Normalise x: (N, C, H, W) -> (N, C, H, W)."""
    return live_batch_norm(x, LiveNorm(norm, training, momentum, eps))


def live_batch_norm(x: Tensor, norm: LiveNorm) -> Tensor:
    """`batch_norm` in the norm's own mode."""
    training, momentum = start(norm, x)
    scale, offset, mean, var = norm.tensors
    return F.batch_norm(x, mean, var, scale, offset, training, momentum, norm.eps)


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


def start(norm: LiveNorm, x: Tensor) -> tuple[bool, float]:
    """Return whether x (N, any C, H, W) is normalised by its own statistics, and their weight in the running statistics.

    It counts the batch if it is, so call it once in each forward pass. As in PyTorch, the count is only read from the device
    if momentum is None.
    """
    if not uses_batch_statistics(x, norm.training):
        return False, 0.0
    if norm.momentum is not None:
        if norm.batches is not None:
            _count(norm.batches)
        return True, norm.momentum
    if norm.batches is None or (norm.batches.is_cuda and torch.cuda.is_current_stream_capturing()):
        raise ValueError(
            "momentum=None averages by num_batches_tracked, which is missing or cannot be read in a CUDA graph: give a number"
        )
    norm.batches.add_(1)
    return True, 1 / float(norm.batches)


_uncounted: ContextVar[list[Tensor] | None] = ContextVar("uncounted_batches", default=None)


@contextlib.contextmanager
def counted_at_once() -> Iterator[None]:
    """Count the batch for all norms that run inside, each at most once, by one operation at the end: one launch on a GPU."""
    counters: list[Tensor] = []
    token = _uncounted.set(counters)
    try:
        yield
    finally:
        _uncounted.reset(token)
    if counters:
        torch._foreach_add_(counters, 1)


def _count(batches: Tensor) -> None:
    # Asked first: torch.compile of torch 2.11 cannot trace a ContextVar.
    if torch.compiler.is_compiling() or (counters := _uncounted.get()) is None:
        batches.add_(1)
    else:
        counters.append(batches)


@torch.no_grad()
def recompute_statistics(module: nn.Module, batches: Iterable[Tensor], *, kept: Collection[nn.Module] = ()) -> None:
    """Replace all running statistics below `module`, but those of the norms in `kept`, by their plain average over `batches`
    of its input.

    After a short training, the slow moving averages still depend on the initial weights; plain averages do not. Meanwhile,
    everything but the batch norms is in evaluation mode (no dropout). Afterwards the whole module is.
    """
    norms = [child for child in module.modules() if isinstance(child, nn.BatchNorm2d) and child not in kept]
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
