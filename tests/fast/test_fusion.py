"""A module fuses its submodules only where nobody can tell: whatever is done to submodules works as in any module."""

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, cast
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import FrozenBatchNorm2d

from bench.plain_torch import PlainCell, randomise
from fast import Decoder, DensePredictionCell, SegmentationHead, SegmentationNetwork, explain
from fast.backbone import plain_backbone
from fast.batch_norm import authors_norm
from fast.dense_prediction_cell import decays
from fast.kernels import backend_for, using
from reference.cell import Cell

CELL = Cell.from_json(
    '[{"op": "conv", "kernel": 3, "rate": [1, 2], "input": -1}, {"op": "conv", "kernel": 1, "input": 0},'
    ' {"op": "pyramid_pooling", "grid_size": [2, 1], "input": -1}]'
)
EXACT = 1e-11  # the same float64 operations in two orders, on values of order 1 and gradients of order 10
needs_kernels = pytest.mark.skipif(backend_for(torch.zeros(1, 1, 1, 1)) is None, reason="no compiler for C++ kernels")


def cell(**options: Any) -> DensePredictionCell:
    torch.manual_seed(0)
    options = {"dropout_rate": 0.0, "norm_layer": authors_norm, **options}
    return randomise(DensePredictionCell(CELL, 3, branch_channels=4, cell_channels=6, **options), seed=0)


def head() -> SegmentationHead:
    return randomise(SegmentationHead(cell(), 5), seed=1)


def network() -> SegmentationNetwork:
    torch.manual_seed(0)
    backbone = plain_backbone("small", (4, 5, 3, 3), output_stride=16, low_level=True)
    return randomise(SegmentationNetwork(backbone, head(), Decoder(5, channels=6, projected_channels=2)), seed=2)


def features(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


class Doubled(nn.BatchNorm2d):
    """A norm with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def frozen(channels: int) -> nn.Module:
    norm = FrozenBatchNorm2d(channels)
    generator = torch.Generator().manual_seed(1)
    for buffer in norm.buffers():
        nn.init.uniform_(buffer, 0.5, 1.5, generator=generator)
    return cast(nn.Module, norm)


def replace(path: str, part: Callable[[], nn.Module]) -> Callable[[Any], None]:
    return lambda module: module.set_submodule(path, part())


def with_wider_rate(module: Any) -> None:
    conv = module.get_submodule("branches.0.depthwise")
    conv.dilation = conv.padding = (2, 2)


def with_bias(module: Any) -> None:
    module.projection.bias = nn.Parameter(torch.linspace(-1.0, 1.0, 6))


def with_another_forward(module: Any) -> None:
    module.dropout.forward = lambda x: 2 * x


def pruned(module: Any) -> None:
    prune.l1_unstructured(module.projection, "weight", 0.5)  # type: ignore[no-untyped-call]


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "GroupNorm": (replace("projection.norm", lambda: nn.GroupNorm(2, 6)), "projection.norm is a GroupNorm"),
    "InstanceNorm": (replace("branches.0.depthwise.norm", lambda: nn.InstanceNorm2d(3)), "norm is a InstanceNorm2d"),
    "no norm": (replace("branches.1.pointwise.norm", nn.Identity), "branches.1.pointwise.norm is a Identity"),
    "frozen norm": (replace("branches.2.pointwise.norm", lambda: frozen(4)), "norm is a FrozenBatchNorm2d"),
    "own norm": (replace("branches.0.pointwise.norm", lambda: Doubled(4)), "branches.0.pointwise.norm is a Doubled"),
    "no scale": (replace("projection.norm", lambda: nn.BatchNorm2d(6, affine=False)), "norm lacks scale and offset, or"),
    "no statistics": (replace("projection.norm", lambda: nn.BatchNorm2d(6, track_running_stats=False)), "norm lacks scale"),
    "no dropout": (replace("dropout", nn.Identity), "dropout is a Identity"),
    "Dropout2d": (replace("dropout", lambda: nn.Dropout2d(0.5)), "dropout is a Dropout2d"),
    "branch": (replace("branches.2", lambda: nn.Conv2d(3, 4, 1, bias=False)), "branches.2 is a Conv2d"),
    "bias": (with_bias, "projection has a bias"),
    "forward": (with_another_forward, "dropout has had its forward replaced"),
    "weight norm": (lambda module: weight_norm(module.projection), "projection is a ParametrizedConv2d"),
    "spectral norm": (lambda module: spectral_norm(module.get_submodule("branches.1.pointwise")), "is a Parametrized"),
    "pruned": (pruned, "projection has a hook"),
}


def step(module: nn.Module, training: bool) -> list[Tensor]:
    """Output, gradient of the input, gradients and state, in float64."""
    x = features().requires_grad_()
    torch.manual_seed(2)  # for Dropout2d
    output = module.train(training)(x)
    (output * torch.linspace(-1.0, 1.0, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    assert x.grad is not None
    gradients = [cast(Tensor, parameter.grad) for parameter in module.parameters()]
    return [output.detach(), x.grad, *gradients, *module.state_dict().values()]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_modules_compute_what_plain_ones_do(change: str, training: bool) -> None:
    apply, obstacle = CHANGES[change]
    ours, plain = cell().double(), PlainCell(CELL, 3, 4, 6).double()
    plain.load_state_dict(ours.state_dict())
    for module in (ours, plain):
        torch.manual_seed(1)  # spectral_norm draws
        apply(module)
        module.double()
    assert re.search(f"^each submodule by itself: .*({obstacle})", explain(ours, features()))
    assert list(ours.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(ours.state_dict())
    for actual, expected in zip(step(ours, training), step(plain, training), strict=True):
        assert torch.allclose(actual, expected, rtol=0, atol=EXACT)


def test_another_rate_is_used_and_stays_fused() -> None:
    """As code does that turns strides into rates, in whatever module it is given."""
    ours, plain = cell().double(), PlainCell(CELL, 3, 4, 6).double()
    plain.load_state_dict(ours.state_dict())
    before = ours(features())
    for module in (ours, plain):
        with_wider_rate(module)
    assert explain(ours, features()).startswith("fused")
    assert torch.allclose(ours(features()), plain(features()), rtol=0, atol=EXACT)
    assert not torch.allclose(ours(features()), before)


@pytest.mark.parametrize("kernels", [backend_for(torch.zeros(1, 1, 1, 1)), None], ids=["kernels", "library"])
def test_a_convolution_without_a_norm_is_refused(kernels: Any) -> None:
    bare, emptied = cell(), cell()
    bare.set_submodule("projection", nn.Conv2d(12, 6, 1, bias=False))
    emptied.projection.norm = None  # type: ignore[assignment]
    for module in (bare, emptied):
        with (
            using(kernels),
            pytest.raises(TypeError, match=r"must hold its norm as its child `norm`, nn\.Identity\(\) for none"),
        ):
            module(features(dtype=torch.float32))


class Wrapped(Tensor):
    """As sharded and quantised weights are: a tensor of another type."""


def test_weights_of_another_type_are_left_to_pytorch() -> None:
    module, x = cell(), features(dtype=torch.float32)
    expected = module(x)
    for conv in (module.projection, module.get_submodule("branches.1.pointwise.norm")):
        conv.weight = nn.Parameter(conv.get_parameter("weight").detach().as_subclass(Wrapped))
    assert explain(module, x) == "each submodule by itself: branches.1.pointwise.norm has a weight of type Wrapped"
    assert torch.allclose(module(x).as_subclass(Tensor), expected, rtol=0, atol=1e-5)


def parts(module: nn.Module) -> dict[str, nn.Module]:
    """All that a forward pass calls: everything but lists."""
    return {name: part for name, part in module.named_modules() if name and not isinstance(part, nn.ModuleList)}


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "cell": (cell, (2, 3, 5, 6)),
    "head": (head, (2, 3, 5, 6)),
    "network": (network, (2, 3, 65, 49)),
}
every_module = pytest.mark.parametrize("kind", MODULES)


@every_module
def test_hooks_of_every_submodule_run_once(kind: str) -> None:
    build, shape = MODULES[kind]
    module, x = build().train(), torch.randn(shape, requires_grad=True)
    seen: Counter[str] = Counter()

    def note(what: str, *_: Any) -> None:
        seen[what] += 1

    for name, part in parts(module).items():
        part.register_forward_pre_hook(partial(note, f"before {name}"))
        part.register_forward_hook(partial(note, name))
        if name != "backbone.body":  # which gives a list
            part.register_full_backward_hook(partial(note, f"back {name}"))
    module(x).square().sum().backward()
    expected = Counter(f"{when}{name}" for name in parts(module) for when in ("before ", "", "back "))
    expected.pop("back backbone.body", None)
    assert seen == expected


@pytest.mark.parametrize("name", parts(network()))
def test_a_hook_on_one_submodule_sees_and_replaces(name: str) -> None:
    """What it returns is what the rest computes from, alone among hooks, so that one hook is enough to be seen."""
    module, images = network().eval(), torch.randn(2, 3, 65, 49)
    expected = module(images)
    seen: list[Any] = []
    handle = module.get_submodule(name).register_forward_hook(lambda _, inputs, output: seen.append(output))
    assert torch.allclose(module(images), expected, rtol=0, atol=1e-4)  # float32 through 15 convolutions
    handle.remove()
    assert len(seen) == 1
    module.get_submodule(name).register_forward_hook(lambda _, inputs, output: tree_map(lambda x: 0.5 * x - 1.0, output))
    assert not torch.allclose(module(images), expected, rtol=0, atol=1e-3)


def test_a_hook_on_all_modules_sees_them() -> None:
    module, seen = cell(), []
    handle = register_module_forward_pre_hook(lambda part, inputs: seen.append(part))
    try:
        assert explain(module, features()) == "each submodule by itself: there is a hook on all modules"
        module(features(dtype=torch.float32))
    finally:
        handle.remove()
    assert set(seen) == {module, *parts(module).values()}
    assert explain(module, features()).startswith("fused")


@every_module
@pytest.mark.parametrize("training", [False, True])
def test_what_is_called_is_fused_where_nothing_stands_in_the_way(
    kind: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No submodule of cell, head and decoder is called then, but those that fuse by themselves."""
    build, shape = MODULES[kind]
    module, called = build().train(training), mock.Mock(side_effect=lambda norm, x: x)
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda norm, x: called(norm, x))
    module(torch.randn(shape))
    of_backbone = [part for name, part in module.named_modules() if name.startswith("backbone")]
    assert [call.args[0] for call in called.call_args_list if call.args[0] not in of_backbone] == []


def test_norm_layer_makes_every_norm() -> None:
    cell_of_groups = cell(norm_layer=lambda channels: nn.GroupNorm(1, channels)).double()
    decoder = Decoder(5, channels=6, projected_channels=2, norm_layer=lambda channels: nn.GroupNorm(1, channels)).double()
    for module in (cell_of_groups, decoder):
        convolutions = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
        assert all(cast(nn.GroupNorm, conv.norm).num_channels == conv.out_channels for conv in convolutions)
        assert [name for name, decay in decays(module).items() if decay and "norm" in name] == []
    single, batch = cell_of_groups(features()[:1]), cell_of_groups(features())
    assert torch.allclose(batch[:1], single, rtol=0, atol=EXACT)  # no norm looks at other pictures
    decoder(batch, torch.randn(4, 5, 9, 9, dtype=torch.float64)).sum().backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())


def test_default_norm_is_that_of_pytorch() -> None:
    for module in (DensePredictionCell(CELL, 3), Decoder(5)):
        norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
        assert {(norm.momentum, norm.eps) for norm in norms} == {(0.1, 1e-5)}


@needs_kernels
def test_operations_are_counted_while_a_counter_looks_on() -> None:
    module, x = cell().eval(), features(dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        assert "FlopCounterMode watches PyTorch's operations" in explain(module, x)
        module(x).sum().backward()
    seen = counter.get_total_flops()
    with using(None), FlopCounterMode(display=False) as counter:
        module(x).sum().backward()
    assert seen == counter.get_total_flops() > 0
    assert explain(module, x) == "fused, on C++ kernels"
