"""Each norm runs in its own mode, as the same network of `nn.Conv2d`, `nn.BatchNorm2d` and `F.relu` would run it."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.swa_utils import update_bn

from bench.plain_torch import PlainCell
from fast import Decoder, DensePredictionCell, SegmentationHead, SegmentationNetwork
from fast.backbone import Backbone, LowLevel
from fast.batch_norm import authors_norm, recompute_statistics
from fast.dense_prediction_cell import reference_weights
from fast.kernels import using
from reference.batch_norm import Array
from reference.cell import Cell
from tests.fast.against_reference import EXACT, every_device
from tests.fast.error_budget import assert_within_budget
from tests.fast.plain_torch import PlainDecoder

CELL = Cell.from_json(
    '[{"op": "conv", "kernel": 3, "rate": [1, 2], "input": -1}, {"op": "conv", "kernel": 1, "input": 0},'
    ' {"op": "pyramid_pooling", "grid_size": [2, 1], "input": -1}]'
)
CLASSES = 4


class Bodies(nn.Module):
    """Every 4th pixel, then every 16th."""

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images[:, :2, ::4, ::4], images[:, :, ::16, ::16]]


class PlainHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.context, self.classifier = PlainCell(CELL, 3, 4, 6), nn.Conv2d(6, CLASSES, 1)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.context(features))
        return logits


class PlainNetwork(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head, self.decoder = backbone, PlainHead(), PlainDecoder(2, 6, 3)

    def forward(self, images: Tensor) -> Tensor:
        low_level, features = cast(Backbone, self.backbone).with_low_level(images)
        logits: Tensor = self.head.classifier(self.decoder(self.head.context(features), low_level))
        return logits


def our_cell() -> DensePredictionCell:
    return DensePredictionCell(CELL, 3, branch_channels=4, cell_channels=6, dropout_rate=0.0, norm_layer=authors_norm)


def backbone() -> Backbone:
    zeros, ones = torch.zeros(3), torch.ones(3)
    return Backbone("two", Bodies(), channels=3, output_stride=16, mean=zeros, std=ones, low_level=LowLevel(2))


def pair(kind: str, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """Ours and the plain one with the same weights, float64; the keys of both are the same."""
    torch.manual_seed(seed)
    ours: nn.Module
    plain: nn.Module
    if kind == "cell":
        ours, plain = our_cell(), PlainCell(CELL, 3, 4, 6)
    elif kind == "head":
        ours, plain = SegmentationHead(our_cell(), CLASSES), PlainHead()
    else:
        decoder = Decoder(2, channels=6, projected_channels=3, norm_layer=authors_norm)
        ours, plain = SegmentationNetwork(backbone(), SegmentationHead(our_cell(), CLASSES), decoder), PlainNetwork(backbone())
    for norm in norms_of(ours):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
    ours, plain = ours.double().train(), plain.double().train()
    plain.load_state_dict(ours.state_dict())
    ours.load_state_dict(plain.state_dict())
    return ours, plain


def norms_of(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [child for child in module.modules() if isinstance(child, nn.BatchNorm2d)]


def batches(kind: str, seed: int = 0) -> Iterator[Tensor]:
    """Three batches of float32 values, of other sizes each."""
    generator = torch.Generator().manual_seed(seed)
    for i in range(3):
        size = (65, 81) if kind == "network" else (5, 6)
        yield torch.randn(2 + i, 3, *size, generator=generator)


# How the norms are set, by name: the depthwise one of a separable pair against its pointwise one, first of all.


def own_momenta_and_epsilons(module: nn.Module) -> None:
    for i, norm in enumerate(norms_of(module)):
        norm.momentum, norm.eps = 0.5 / (i + 1), 1e-3 * (i + 1)


def depthwise_frozen(module: nn.Module) -> None:
    for name, child in module.named_modules():
        if name.endswith("depthwise.norm"):
            child.eval()


def pointwise_frozen(module: nn.Module) -> None:
    for name, child in module.named_modules():
        if name.endswith("pointwise.norm"):
            child.eval()


def all_frozen(module: nn.Module) -> None:
    for norm in norms_of(module):
        norm.eval()


def cumulative(module: nn.Module) -> None:
    for norm in norms_of(module):
        norm.momentum = None


def every_other_cumulative(module: nn.Module) -> None:
    for norm in norms_of(module)[::2]:
        norm.momentum = None


MODES = (own_momenta_and_epsilons, depthwise_frozen, pointwise_frozen, all_frozen, cumulative, every_other_cumulative)

DRAWS = 15  # a few steps of training amplify the luck of rounding, by five either way: see error_budget.py


@contextmanager
def all_modules_hooked() -> Iterator[None]:
    """Nothing is fused, so that the hook sees each submodule."""
    handle = register_module_forward_hook(lambda module, inputs, output: None)
    try:
        yield
    finally:
        handle.remove()


KERNELS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "kernels": nullcontext,
    "library": lambda: using(None),
    "submodules": all_modules_hooked,
}
every_kernel = pytest.mark.parametrize("kernels", KERNELS)
every_kind = pytest.mark.parametrize("kind", ["cell", "head", "network"])


def trained(module: nn.Module, inputs: Iterator[Tensor], dtype: torch.dtype, device: str) -> tuple[list[Array], list[int]]:
    """A step on each batch; last output, last gradients and all state as one array each, and all counts."""
    module = module.to(device, dtype)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    for x in inputs:
        optimizer.zero_grad()
        output = module(x.to(device, dtype))
        output.square().mean().backward()
        optimizer.step()
    state = {key: tensor for key, tensor in module.state_dict().items() if not key.startswith("backbone.")}
    counts = [int(tensor) for key, tensor in state.items() if key.endswith("num_batches_tracked")]
    groups = [
        [output],
        [cast(Tensor, parameter.grad) for parameter in module.parameters()],
        [tensor for key, tensor in state.items() if "running" in key],
    ]
    return [torch.cat([t.detach().flatten() for t in group]).cpu().double().numpy() for group in groups], counts


@every_device
@every_kind
@pytest.mark.parametrize("mode", MODES)
def test_training_is_that_of_plain_modules(device: str, kind: str, mode: Callable[[nn.Module], None]) -> None:
    """Exactly so in float64, where the kernels have it; in float32 within the error budget over the draws."""
    results: dict[str, list[list[Array]]] = {name: [] for name in ("truth", "yardstick", *KERNELS)}
    for seed in range(DRAWS):
        ours, plain = pair(kind, seed)
        mode(ours)
        mode(plain)
        truth, expected_counts = trained(copy.deepcopy(plain), batches(kind, seed), torch.float64, device)
        results["truth"].append(truth)
        results["yardstick"].append(trained(plain, batches(kind, seed), torch.float32, device)[0])
        for name, kernels in KERNELS.items():
            with kernels():
                exact, exact_counts = trained(copy.deepcopy(ours), batches(kind, seed), torch.float64, device)
                single, counts = trained(copy.deepcopy(ours), batches(kind, seed), torch.float32, device)
            assert counts == exact_counts == expected_counts, name
            assert len(counts) == len(norms_of(ours))
            for actual, expected in zip(exact, truth, strict=True):
                np.testing.assert_allclose(actual, expected, rtol=0, atol=EXACT * np.abs(expected).max(), err_msg=name)
            results[name].append(single)
    for name in KERNELS:
        for part in range(3):
            ours_part, truth_part, yardstick_part = (
                [draw[part] for draw in results[each]] for each in (name, "truth", "yardstick")
            )
            assert_within_budget(ours_part, truth_part, yardstick_part, torch.float32)


def test_the_two_norms_of_a_separable_branch_have_modes_of_their_own() -> None:
    """By hand: only what trains moves and counts, each with its own momentum."""
    ours, _ = pair("cell")
    depthwise, pointwise = (
        cast(nn.BatchNorm2d, ours.get_submodule(f"branches.0.{name}.norm")) for name in ("depthwise", "pointwise")
    )
    depthwise.momentum, pointwise.momentum = 1.0, 0.0
    raw = nn.functional.conv2d(
        x := next(batches("cell")).double(),
        ours.get_parameter("branches.0.depthwise.weight"),
        padding=(1, 2),
        dilation=(1, 2),
        groups=3,
    )
    ours(x)
    assert torch.allclose(cast(Tensor, depthwise.running_mean), raw.mean(dim=(0, 2, 3)), rtol=0, atol=1e-12)
    assert torch.equal(cast(Tensor, pointwise.running_mean), torch.zeros(4).double())
    depthwise.eval()
    ours(x + 1)
    assert torch.allclose(cast(Tensor, depthwise.running_mean), raw.mean(dim=(0, 2, 3)), rtol=0, atol=1e-12)
    assert [int(cast(Tensor, norm.num_batches_tracked)) for norm in (depthwise, pointwise)] == [1, 2]


@every_device
@every_kernel
@every_kind
def test_update_bn_works(device: str, kernels: str, kind: str) -> None:
    ours, plain = (module.to(device) for module in pair(kind))
    loader = [x.double().to(device) for x in batches(kind)]
    momenta = [norm.momentum for norm in norms_of(ours)]
    update_bn(loader, plain)
    with KERNELS[kernels]():
        ours(loader[0] + 5)  # what must be forgotten
        update_bn(loader, ours)
    assert [norm.momentum for norm in norms_of(ours)] == momenta
    for (name, actual), expected in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.allclose(actual, expected, rtol=0, atol=1e-12), name
    assert {int(cast(Tensor, norm.num_batches_tracked)) for norm in norms_of(ours)} == {3}


@every_kind
def test_recomputed_statistics_are_those_of_update_bn(kind: str) -> None:
    """Without dropout, and where one norm does not depend on the mode of another."""
    ours, plain = pair(kind)
    loader = [x.double() for x in batches(kind)]
    recompute_statistics(ours, loader)
    update_bn(loader, plain)
    for (name, actual), expected in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.allclose(actual, expected, rtol=0, atol=1e-12), name


@every_kernel
@pytest.mark.parametrize("training", [False, True])
def test_converted_to_sync_batch_norm_computes_the_same_in_one_process(kernels: str, training: bool) -> None:
    """Its statistics over several processes are tested in test_distributed.py."""
    ours, _ = pair("network")
    x = next(batches("network")).double()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(ours))  # type: ignore[no-untyped-call]
    assert any(isinstance(child, nn.SyncBatchNorm) for child in converted.modules())
    with KERNELS[kernels]():
        assert torch.allclose(converted.train(training)(x), ours.train(training)(x), rtol=0, atol=1e-12)
    for (name, actual), expected in zip(converted.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.allclose(actual, expected, rtol=0, atol=1e-12), name


@pytest.mark.parametrize(
    ("norm", "error", "message"),
    [
        (nn.GroupNorm(2, 6), TypeError, "must be nn.BatchNorm2d, got GroupNorm"),
        (nn.BatchNorm2d(6, affine=False), ValueError, "must have affine=True and track_running_stats=True"),
        (nn.BatchNorm2d(6, track_running_stats=False), ValueError, "must have affine=True and track_running_stats=True"),
    ],
)
def test_the_reference_is_not_given_weights_of_other_norms(norm: nn.Module, error: type[Exception], message: str) -> None:
    cell = our_cell()
    cell.projection.norm = norm
    with pytest.raises(error, match=message):
        reference_weights(cell)


def test_a_cumulative_average_without_a_count_is_refused() -> None:
    cell = our_cell()
    cumulative(cell)
    cast(Any, cell.projection.norm).num_batches_tracked = None
    with pytest.raises(ValueError, match="momentum=None averages by num_batches_tracked"):
        cell(next(batches("cell")))
