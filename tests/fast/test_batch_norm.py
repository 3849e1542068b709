from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fast.batch_norm import batch_norm, batch_norm_relu, recompute_statistics
from fast.dense_prediction_cell import DensePredictionCell
from reference import batch_norm as reference
from reference.batch_norm import Array, BatchNorm
from reference.cell import BACKBONE_FEATURE, Branch, Cell, Conv1x1
from tests.fast.against_reference import (
    LAYOUTS,
    Layout,
    check,
    every_device,
    single_values_allowed,
    to_arrays,
    to_tensors,
)
from tests.strategies import map_sizes, random_batch_norm, rng_seeds


def reference_batch_norm(x: Array, norm: BatchNorm[Array], *, training: bool) -> Array:
    return reference.batch_norm(x, norm, training=training)  # looked up at each call, so that the call is seen and recorded


@single_values_allowed
@every_device
@pytest.mark.parametrize("training", [False, True])
@given(map_sizes(), st.integers(1, 6), st.integers(1, 3), st.sampled_from(LAYOUTS), rng_seeds())
def test_equals_reference(
    device: str, training: bool, size: tuple[int, int], channels: int, batch: int, layout: Layout, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((batch, channels, *size)), random_batch_norm(channels, rng)
    check(batch_norm, (reference_batch_norm, reference.batch_norm_backward), inputs, rng, device, layout, training=training)
    check(
        batch_norm_relu,
        (reference.batch_norm_relu, reference.batch_norm_relu_backward),
        inputs,
        rng,
        device,
        layout,
        training=training,
    )


@given(st.floats(0.01, 1.0), rng_seeds())
def test_momentum_of_running_statistics(momentum: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, norm = rng.standard_normal((2, 3, 4, 5)), random_batch_norm(3, rng)
    tensors = to_tensors(norm)
    batch_norm(torch.from_numpy(x), tensors, training=True, momentum=momentum)
    expected = reference.updated_running_statistics(x, norm, momentum=momentum)
    for actual_array, expected_array in zip(to_arrays(tensors), expected, strict=True):
        np.testing.assert_allclose(actual_array, expected_array, rtol=0, atol=1e-14)


@every_device
def test_one_value_per_channel_warns_and_uses_the_running_statistics(device: str) -> None:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((1, 4, 1, 1)), random_batch_norm(4, rng)
    with pytest.warns(UserWarning, match="one value per channel has no batch statistics"):
        check(batch_norm, (reference_batch_norm, reference.batch_norm_backward), inputs, rng, device, training=True)
    check(batch_norm, (reference_batch_norm, reference.batch_norm_backward), inputs, rng, device, training=False)


def test_whole_cell_trains_on_one_pixel() -> None:
    """As in inference, and the running statistics stay."""
    cell = DensePredictionCell(Cell((Branch(BACKBONE_FEATURE, Conv1x1()),)), 3, branch_channels=4, dropout_rate=0.0)
    features = torch.randn(1, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    before = {key: value.clone() for key, value in cell.state_dict().items()}
    with pytest.warns(UserWarning, match="raise the batch size or the map"):
        output = cell.train()(features)
    assert torch.equal(output, cell.eval()(features))
    for key, value in cell.state_dict().items():
        assert torch.equal(value, before[key]), key


class TestRecomputeStatistics:
    def build(self) -> nn.Sequential:
        """The second norm's input depends on the first, and on the dropout, were it on."""
        torch.manual_seed(0)
        layers = nn.Sequential(
            nn.BatchNorm2d(2, momentum=0.1), nn.Dropout(0.5), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, momentum=0.0003)
        ).double()
        for key in ("0.running_mean", "3.running_mean"):
            layers.get_buffer(key).fill_(5.0)  # what must be forgotten
        return layers.train()

    def batches(self, count: int = 3) -> list[Tensor]:
        rng = np.random.default_rng(0)
        return [torch.from_numpy(rng.normal(i, i + 1, (2 + i, 2, 3, 4))) for i in range(count)]

    def test_equals_average_by_hand(self) -> None:
        layers, batches = self.build(), self.batches()
        first, middle, last = (cast(Any, layers[i]) for i in (0, 2, 3))
        with torch.no_grad():
            seconds = [middle(nn.functional.batch_norm(x, None, None, first.weight, first.bias, True)) for x in batches]
        recompute_statistics(layers, batches)
        for norm, inputs in ((first, batches), (last, seconds)):
            mean = torch.stack([x.mean(dim=(0, 2, 3)) for x in inputs]).mean(dim=0)
            var = torch.stack([x.var(dim=(0, 2, 3), unbiased=True) for x in inputs]).mean(dim=0)
            np.testing.assert_allclose(norm.running_mean.numpy(), mean.numpy(), rtol=0, atol=1e-12)
            np.testing.assert_allclose(norm.running_var.numpy(), var.numpy(), rtol=0, atol=1e-12)

    def test_takes_an_iterator_once(self) -> None:
        from_list, from_iterator = self.build(), self.build()

        def iterate() -> Iterator[Tensor]:
            yield from self.batches()

        recompute_statistics(from_list, self.batches())
        recompute_statistics(from_iterator, iterate())
        for key, value in from_list.state_dict().items():
            assert torch.equal(value, from_iterator.state_dict()[key]), key

    def test_leaves_evaluation_mode_momentum_and_weights(self) -> None:
        layers = self.build()
        weights = {name: parameter.detach().clone() for name, parameter in layers.named_parameters()}
        recompute_statistics(layers, self.batches())
        assert not any(module.training for module in layers.modules())
        assert [layers[0].momentum, layers[3].momentum] == [0.1, 0.0003]
        for name, parameter in layers.named_parameters():
            assert torch.equal(parameter, weights[name])
            assert parameter.grad is None
