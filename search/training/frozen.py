"""Which part of a backbone learns: all of it, its last blocks, or nothing.

What does not learn stays as it is: no gradients, evaluation mode, the norms' statistics of the given weights. Autograd then
keeps no maps of it.
"""

from torch import nn

from fast.backbone import Backbone
from search.errors import InputError


def require_blocks(backbone: Backbone, trainable_blocks: int | None) -> None:
    """Raises InputError for more blocks than the backbone has."""
    present = len(backbone.blocks())
    if trainable_blocks is not None and trainable_blocks > present:
        raise InputError(
            f"`trainable_blocks` {trainable_blocks} is more than the {present} that {backbone.name} has: give fewer, or leave "
            "it out to train the whole backbone"
        )


def freeze(backbone: Backbone, trainable_blocks: int | None) -> None:
    """Let only the last blocks learn, and what comes behind them; None: all."""
    for module in _before(backbone, trainable_blocks):
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)


def frozen_part(backbone: Backbone, trainable_blocks: int | None) -> list[nn.Module]:
    """The modules with nothing in them that learns, which are to stay in evaluation mode."""
    learning = set() if not trainable_blocks else {backbone.blocks()[-trainable_blocks]}
    return [module for module in _before(backbone, trainable_blocks) if learning.isdisjoint(module.modules())]


def _before(backbone: Backbone, trainable_blocks: int | None) -> list[nn.Module]:
    """The modules before the first block that learns, in the order of modules, those that the block lies in among them."""
    if trainable_blocks is None:
        return []
    modules = list(backbone.modules())
    return modules[: modules.index(backbone.blocks()[-trainable_blocks])] if trainable_blocks else modules
