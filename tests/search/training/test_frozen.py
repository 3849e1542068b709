"""What does not learn: no gradient, no graph, evaluation mode; whatever comes behind the first block that learns does."""

import pytest
import torch
from torch import nn

from fast.dense_prediction_cell import DensePredictionCell
from fast.segmentation import SegmentationHead, SegmentationNetwork
from search.cells.space import load_cell
from search.errors import InputError
from search.settings import RecipeSettings
from search.training.frozen import freeze, frozen_part, require_blocks
from search.training.loop import set_training
from tests.search.test_train import small_network


def modes(network: SegmentationNetwork) -> dict[str, bool]:
    return {name: module.training for name, module in network.named_modules() if not any(module.children())}


def learning(network: SegmentationNetwork) -> set[str]:
    return {name.rpartition(".")[0] for name, parameter in network.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("blocks", "first"), [(None, 0), (0, 12), (1, 9), (3, 3), (4, 0)])
def test_the_last_blocks_learn_with_their_norms(blocks: int | None, first: int) -> None:
    """Of four convolutions, each with norm and ReLU: layers `first` to 11 learn."""
    network = small_network(3)
    freeze(network.backbone, blocks)
    set_training(network, RecipeSettings(trainable_blocks=blocks))
    in_training = modes(network)
    for index in range(12):
        name = f"backbone.body.layers.{index}"
        assert in_training[name] is (index >= first), name
        if index % 3 < 2:  # a ReLU has no weights
            assert (name in learning(network)) is (index >= first), name
    assert in_training["head.context.projection.norm"]
    assert "head.classifier" in learning(network)


def test_frozen_features_need_no_graph() -> None:
    network = small_network(3)
    freeze(network.backbone, 0)
    set_training(network, RecipeSettings(trainable_blocks=0))
    features = network.backbone(torch.rand(2, 3, 33, 33))
    assert not features.requires_grad
    assert network.head(features).requires_grad


class Transformer(nn.Module):
    """A position embedding of its own, blocks in a list, a norm behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 8, 1, 1))
        self.patch_embed = nn.Conv2d(3, 8, 16, stride=16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.GroupNorm(1, 8)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        x = self.patch_embed(images) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return [self.norm(x)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.GroupNorm(1, 8), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        moved: torch.Tensor = self.mlp(self.norm(x))
        return x + moved


def test_what_comes_behind_the_blocks_learns_and_what_is_before_does_not() -> None:
    backbone = small_network(3).backbone
    backbone.body = Transformer()
    head = SegmentationHead(DensePredictionCell(load_cell("dpc"), 8, branch_channels=4, cell_channels=4), 3)
    network = SegmentationNetwork(backbone, head)
    freeze(backbone, 1)
    of_backbone = {name for name, parameter in backbone.body.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[0] for name in of_backbone} == {"blocks.1.norm", "blocks.1.mlp", "norm"}
    network(torch.rand(2, 3, 32, 32)).sum().backward()
    with_gradient = {name for name, parameter in backbone.body.named_parameters() if parameter.grad is not None}
    assert with_gradient == of_backbone
    assert backbone.body not in frozen_part(backbone, 1)


def test_more_blocks_than_there_are_is_refused() -> None:
    backbone = small_network(3).backbone
    require_blocks(backbone, None)
    require_blocks(backbone, 4)
    with pytest.raises(
        InputError, match="`trainable_blocks` 5 is more than the 4 that plain has: give fewer, or leave it out"
    ):
        require_blocks(backbone, 5)
