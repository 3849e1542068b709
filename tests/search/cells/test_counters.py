"""What libraries count of a cell, as `docs/modules.md` states it. Each is tested where it is installed."""

import contextlib
import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fast import DensePredictionCell, kernels
from search.cells.cost import module_cost
from search.cells.space import load_cell
from tests.fast.test_fusion import MODULES

CHANNELS, SIZE = 320, (33, 33)  # the table's
COUNTED = 744_701_760  # multiply-adds of the published cell's convolutions, the projection included

as_computed = pytest.mark.parametrize("on_pytorch", [False, True], ids=["as it is", "on PyTorch"])


def computing(on_pytorch: bool) -> contextlib.AbstractContextManager[None]:
    return kernels.using(None) if on_pytorch else contextlib.nullcontext()


@pytest.fixture
def cell() -> DensePredictionCell:
    return DensePredictionCell(load_cell("dpc"), CHANNELS).eval()


@pytest.fixture
def features() -> torch.Tensor:
    return torch.zeros(1, CHANNELS, *SIZE)


def conv_multiply_adds(module: nn.Module, x: torch.Tensor) -> int:
    """Of every convolution that is called, from its own shapes."""
    counts, convolutions = [], [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    for conv in convolutions:
        conv.register_forward_hook(lambda conv, _, output: counts.append(conv.weight[0].numel() * output.numel()))
    with torch.no_grad():
        module(x)
    assert len(counts) == len(convolutions)
    return sum(counts)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", MODULES)
@as_computed
def test_pytorchs_counter(kind: str, training: bool, on_pytorch: bool) -> None:
    build, shape = MODULES[kind]
    module, x = build().train(training), torch.randn(shape)
    with computing(on_pytorch), FlopCounterMode(display=False) as counter:
        module(x)
    assert counter.get_total_flops() == 2 * conv_multiply_adds(module, x)


def test_the_cost_that_is_stated(cell: DensePredictionCell) -> None:
    cost = module_cost(cell, SIZE)
    assert (cost.total + cost.projection).multiply_adds == COUNTED


@as_computed
@pytest.mark.filterwarnings("ignore:distutils:DeprecationWarning")
def test_thop(cell: DensePredictionCell, features: torch.Tensor, on_pytorch: bool) -> None:
    thop: Any = pytest.importorskip("thop")
    with computing(on_pytorch):
        counted, _ = thop.profile(copy.deepcopy(cell), (features,), verbose=False)
    assert counted == COUNTED


@as_computed
def test_ptflops(cell: DensePredictionCell, on_pytorch: bool) -> None:
    ptflops: Any = pytest.importorskip("ptflops")

    def counted(backend: str) -> int:
        options = {"as_strings": False, "print_per_layer_stat": False, "backend": backend}
        with computing(on_pytorch):
            multiply_adds, _ = ptflops.get_model_complexity_info(copy.deepcopy(cell), (CHANNELS, *SIZE), **options)
        return int(multiply_adds)

    assert counted("aten") == COUNTED
    assert counted("pytorch") == 747_838_080  # norms and ReLU as well


@as_computed
def test_torchinfo(cell: DensePredictionCell, features: torch.Tensor, on_pytorch: bool) -> None:
    torchinfo: Any = pytest.importorskip("torchinfo")
    with computing(on_pytorch):
        layers = torchinfo.summary(cell, input_data=features, verbose=0).summary_list
    convolutions = [each for each in layers if isinstance(each.module, nn.Conv2d)]
    assert sum(each.module.weight[0].numel() * math.prod(each.output_size) for each in convolutions) == COUNTED


@as_computed
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_fvcore(cell: DensePredictionCell, features: torch.Tensor, on_pytorch: bool) -> None:
    fvcore: Any = pytest.importorskip("fvcore.nn")
    with computing(on_pytorch):
        counted = fvcore.FlopCountAnalysis(cell, features).unsupported_ops_warnings(False).by_operator()
    assert counted["conv"] == COUNTED


def test_the_profiler_counts_pytorchs_operations(cell: DensePredictionCell, features: torch.Tensor) -> None:
    with kernels.using(None), torch.no_grad(), torch.profiler.profile(with_flops=True) as profile:
        cell(features)
    assert sum(event.flops for event in profile.key_averages()) == 2 * COUNTED
