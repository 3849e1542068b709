"""Rates, decay and multipliers against tables that the authors' code wrote, where they are at hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

from fast.backbone import timm_backbone
from fast.decoder import Decoder
from fast.dense_prediction_cell import DensePredictionCell, decays
from fast.segmentation import SegmentationHead, SegmentationNetwork
from fast.train_step import OptimizerName
from reference.grid import Grid
from reference.l2_penalty import l2_penalty_backward
from search.cells.space import load_cell
from search.settings import RecipeSettings, TrainingPictures
from search.training.optimizer import create_optimizer, learning_rate, parameter_groups, set_learning_rate
from tests.reference.directional_derivative import leaves

FACTS = Path(__file__).parents[4] / "shared" / "golden" / "train_facts" / "facts.json"


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    if not FACTS.exists():
        pytest.skip("the authors' tables are not on this machine")
    tables: dict[str, Any] = json.loads(FACTS.read_text(encoding="utf-8"))
    return tables


@pytest.fixture(scope="module")
def network() -> SegmentationNetwork:
    backbone = timm_backbone("mobilenetv2_100")
    return SegmentationNetwork(backbone, SegmentationHead(DensePredictionCell(load_cell("dpc"), 320), 19))


@pytest.mark.parametrize("table", [0, 1], ids=["from_the_start", "after_a_slow_start"])
def test_rates_are_the_authors(facts: dict[str, Any], table: int) -> None:
    wanted = facts["learning_rate"][table]
    recipe = RecipeSettings(
        learning_rate=wanted["base_learning_rate"],
        iterations=wanted["training_number_of_steps"],
        slow_start_iterations=wanted["slow_start_step"],
        slow_start_learning_rate=wanted["slow_start_learning_rate"],
    )
    for step, expected in zip(wanted["steps"], wanted["lr"], strict=True):
        actual = learning_rate(recipe, step)
        # TensorFlow's 1 − t is a float32: off by 6e-8 of the initial rate, times up to 2.5 where (1 − t)^0.9 is steep
        assert actual == pytest.approx(expected, rel=1e-6, abs=2e-7 * wanted["base_learning_rate"])


def test_as_many_weights_decay_as_the_authors_regularise(facts: dict[str, Any], network: SegmentationNetwork) -> None:
    decaying = [name for name, does in decays(network).items() if does]
    assert len(decaying) == len(facts["mobilenet_dpc_l2_regularised"]) == 41
    kinds = [name.split("/")[0] for name in facts["mobilenet_dpc_l2_regularised"]]
    assert sum(name.startswith("backbone.") for name in decaying) == kinds.count("MobilenetV2")
    assert sum(name.startswith("head.context.") for name in decaying) == kinds.count("meta_architecture")


def test_what_decays_is_no_depthwise_norm_or_bias(network: SegmentationNetwork) -> None:
    decay = decays(network)
    for name, parameter in network.named_parameters():
        is_product = parameter.ndim == 4 and not (parameter.shape[1] == 1 and parameter.shape[2:] == (3, 3))
        assert decay[name] == is_product, name


def test_multipliers_are_the_authors(facts: dict[str, Any], network: SegmentationNetwork) -> None:
    groups = parameter_groups(network, weight_decay=4e-5, last_layer_multiplier=10)
    multiplier = {id(parameter): group["multiplier"] for group in groups for parameter in group["params"]}
    expected = facts["gradient_multipliers_x10_last_layers_contain_logits_only=False"]
    context = [p for name, p in network.named_parameters() if name.startswith("head.context.")]
    assert {multiplier[id(p)] for p in context} == {value for name, value in expected.items() if "meta" in name} == {10.0}
    classifier = network.head.classifier
    assert classifier.bias is not None
    assert multiplier[id(classifier.weight)] == expected["logits/semantic/weights"]
    assert multiplier[id(classifier.bias)] == expected["logits/semantic/biases"]
    assert {multiplier[id(p)] for p in network.backbone.parameters()} == {1.0}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_is_the_gradient_of_the_l2_penalty(optimizer: OptimizerName) -> None:
    """Of cell, decoder and classifier, by one step of either optimiser without any gradient of the loss."""
    backbone = timm_backbone("mobilenetv2_100", low_level=True)
    context = DensePredictionCell(load_cell("dpc"), 320, branch_channels=4, cell_channels=5)
    network = SegmentationNetwork(backbone, SegmentationHead(context, 3), Decoder(144, channels=5, projected_channels=2))

    def weights() -> Any:
        assert network.decoder is not None
        live = network.head.context.weights(), network.decoder.weights(), network.head.classifier.weight
        return tree_map(lambda tensor: tensor.detach().double().numpy(), live)

    recipe = RecipeSettings(optimizer=optimizer, weight_decay=0.5, momentum=None, learning_rate=0.25)
    created = create_optimizer(network, recipe.completed(TrainingPictures("mine.toml", 40, (65, 65)), Grid(16)))
    set_learning_rate(created, 0.25)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = weights()
    created.step()
    gradient = l2_penalty_backward(before, weight_decay=0.5)
    for new, old, slope in zip(leaves(weights()), leaves(before), leaves(gradient), strict=True):
        np.testing.assert_allclose(new, old - 0.25 * slope, rtol=1e-6, atol=0)  # float32


def test_groups_hold_every_parameter_once(network: SegmentationNetwork) -> None:
    groups = parameter_groups(network, weight_decay=4e-5)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in network.parameters())


def test_a_multiplied_rate_is_a_multiplied_gradient_of_loss_and_decay() -> None:
    """Two steps, with momentum, by hand: v ← 0.9 v + m·(g + λw), w ← w − r·v."""
    weight, rate, decay, multiplier = 2.0, 0.1, 0.5, 3.0
    parameter = torch.nn.Parameter(torch.tensor([weight], dtype=torch.float64))
    optimizer = torch.optim.SGD([{"params": [parameter], "weight_decay": decay, "multiplier": multiplier}], momentum=0.9)
    velocity = 0.0
    for gradient in (1.0, -0.25):
        set_learning_rate(optimizer, rate)
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        velocity = 0.9 * velocity + multiplier * (gradient + decay * weight)
        weight -= rate * velocity
    assert parameter.item() == pytest.approx(weight, rel=1e-14)  # rounding of float64


@pytest.mark.parametrize("multiplier", [1.0, 10.0])
def test_adamw_steps_as_torchs_does_at_multiples_of_the_rate(network: SegmentationNetwork, multiplier: float) -> None:
    """Its first step is by the gradient's sign, after a decay by the rate: w ← w · (1 − r·λ) − r · sign(g)."""
    recipe = RecipeSettings(optimizer="adamw", last_layer_multiplier=multiplier).completed(
        TrainingPictures("mine.toml", 40, (65, 65)), Grid(16)
    )
    optimizer = create_optimizer(network, recipe)
    assert (recipe.learning_rate, recipe.weight_decay) == (1e-4, 0.05)
    set_learning_rate(optimizer, 1e-2)
    classifier = network.head.classifier
    assert classifier.bias is not None
    before = [parameter.detach().clone() for parameter in (classifier.weight, classifier.bias)]
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    rate = 1e-2 * multiplier
    expected = [before[0] * (1 - rate * 0.05) - rate, before[1] - 2 * rate]  # biases do not decay, and learn twice as fast
    for actual, wanted in zip((classifier.weight, classifier.bias), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)  # float32, and Adam's eps
