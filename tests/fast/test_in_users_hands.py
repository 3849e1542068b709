"""What users do with modules as a whole: own loops, tracers, transforms, copies, dtypes. It works, or says why not."""

import copy
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from bench.plain_torch import PlainCell, randomise
from fast import Decoder, DensePredictionCell, SegmentationHead, explain, kernels
from fast.batch_norm import MOMENTUM
from fast.kernels import backend_for, using
from fast.upsampled_cross_entropy import upsampled_cross_entropy
from tests.fast.test_fusion import CELL, EXACT, cell, features, head, needs_kernels, network


def separate_classes(seed: int) -> tuple[Tensor, Tensor]:
    """Features (N, 3, h, w), noisy, and the label of each position: which of two regions it is in, by the channels' signs."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(8, 5, 6, generator=generator) > 0.5).long()
    signal = (2.0 * labels - 1.0)[:, None] * torch.tensor([1.0, -1.0, 0.5])[:, None, None]
    return 5.0 + signal + 0.3 * torch.randn(8, 3, 5, 6, generator=generator), labels


def accuracy(model: nn.Module) -> float:
    x, labels = separate_classes(seed=1000)
    with torch.no_grad():
        return float((model(x).argmax(dim=1) == labels).double().mean())


def test_a_users_own_loop_ends_in_a_module_that_evaluates() -> None:
    """A hundred steps; with the authors' momentum the running statistics would still be the initial ones."""
    torch.manual_seed(0)
    model = SegmentationHead(DensePredictionCell(CELL, 3, branch_channels=16, cell_channels=16), 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    authors = copy.deepcopy(model)
    for norm in (part for part in authors.modules() if isinstance(part, nn.BatchNorm2d)):
        norm.momentum = MOMENTUM
    for i in range(100):
        x, labels = separate_classes(seed=i)
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            authors.load_state_dict(dict(model.named_parameters()), strict=False)
            authors(x)
    by_batch_statistics = accuracy(copy.deepcopy(model))
    assert by_batch_statistics > 0.95
    assert accuracy(model.eval()) > by_batch_statistics - 0.02
    assert accuracy(authors.eval()) < 0.8


# Tracers


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_scripting_is_refused_in_words() -> None:
    for module in (cell(), head(), network(), Decoder(5), nn.Sequential(cell())):
        with pytest.raises(TypeError, match=r"use torch\.export\.export, or torch\.jit\.trace"):
            torch.jit.script(module)


@pytest.mark.parametrize("build", [cell, head, network, lambda: nn.Sequential(nn.Conv2d(3, 3, 1), cell())])
def test_symbolic_tracing_is_refused_in_words(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(TypeError, match=r"use torch\.export\.export, or make the module a leaf of your tracer"):
        torch.fx.symbolic_trace(build())


def test_a_cell_may_be_a_leaf_of_a_symbolic_trace() -> None:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, DensePredictionCell) or super().is_leaf_module(module, name)

    model, x = nn.Sequential(nn.Conv2d(3, 3, 1), cell()).eval(), features(dtype=torch.float32)
    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    assert torch.equal(traced(x), model(x))


def test_a_trace_computes_the_same() -> None:
    model = network().eval().double()
    images = torch.rand(1, 3, 65, 49, dtype=torch.float64) * 255
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and sizes become constants
        traced = torch.jit.trace(model, images)  # type: ignore[no-untyped-call]
        assert torch.allclose(traced(images), model(images), rtol=0, atol=EXACT)


def test_an_exported_program_is_made_of_convolutions() -> None:
    """Which quantisers of programs look for."""
    program = torch.export.export(cell().eval(), (features(dtype=torch.float32),))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called.count("aten.conv2d.default") == sum(isinstance(part, nn.Conv2d) for part in cell().modules())


# Derivatives


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # within forward mode
def test_transforms_of_functions_are_those_of_plain_modules() -> None:
    ours, plain = cell().eval().double(), PlainCell(CELL, 3, 4, 6).eval().double()
    plain.load_state_dict(ours.state_dict())
    x = features()
    parameters = dict(ours.named_parameters())

    def losses(module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        loss: Tensor = functional_call(module, dict(parameters), (x[None],)).square().sum()
        return loss

    per_sample = [vmap(grad(losses, argnums=1), (None, None, 0))(module, parameters, x) for module in (ours, plain)]
    for name in parameters:
        assert per_sample[0][name].shape == (4, *parameters[name].shape)
        assert torch.allclose(per_sample[0][name], per_sample[1][name], rtol=0, atol=1e-9)  # sums of squares up to 1e3
    assert torch.allclose(jacrev(ours)(x[:1]), jacrev(plain)(x[:1]), rtol=0, atol=EXACT)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)  # type: ignore[no-untyped-call]
        tangents = [forward_ad.unpack_dual(module(dual)).tangent for module in (ours, plain)]  # type: ignore[no-untyped-call]
    assert torch.allclose(tangents[0], tangents[1], rtol=0, atol=EXACT)


def test_an_ensemble_is_one_call() -> None:
    members = [randomise(cell(), seed).eval().double() for seed in range(3)]
    parameters, buffers = stack_module_state(list[nn.Module](members))
    one = copy.deepcopy(members[0]).to("meta")
    outputs = vmap(lambda p, b, x: functional_call(one, (p, b), (x,)), (0, 0, None))(parameters, buffers, features())
    for output, member in zip(outputs, members, strict=True):
        assert torch.allclose(output, member(features()), rtol=0, atol=EXACT)


@needs_kernels
@pytest.mark.parametrize("training", [False, True])
def test_a_second_derivative_of_kernels_is_refused_with_the_remedy(training: bool) -> None:
    """Also where the incoming gradient is constant, at which PyTorch would leave out what it adds without a word."""
    module, x = cell().train(training), features(dtype=torch.float32).requires_grad_()
    remedy = f"run the forward pass within `{kernels.__name__}.using(None)`"
    jacobian: Any = torch.autograd.functional.jacobian
    with pytest.raises(RuntimeError, match=re.escape(remedy)):
        torch.autograd.grad(module(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=re.escape(remedy)):
        jacobian(lambda y: module(y).sum(dim=(0, 2, 3)), x.detach(), vectorize=True)


def test_a_second_derivative_of_the_loss_is_refused_with_the_remedy() -> None:
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = upsampled_cross_entropy(logits, torch.zeros(1, 17, 17, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"take F\.cross_entropy of logits that F\.interpolate has resized"):
        torch.autograd.grad(loss, logits, create_graph=True)


@pytest.mark.parametrize("training", [False, True])
def test_without_kernels_second_derivatives_are_right(training: bool) -> None:
    module = cell().train(training).double()
    x = features()[:2, :, :3, :4].requires_grad_()
    with using(None):
        assert torch.autograd.gradgradcheck(lambda y: module(y), x, atol=1e-4)


# Copies, dtypes, shapes, memory


def copied(module: nn.Module) -> nn.Module:
    copies: nn.Module = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    return copies


@pytest.mark.parametrize("build", [cell, head, network])
def test_copies_are_independent_and_compute_the_same(build: Callable[[], nn.Module]) -> None:
    module = build().eval()
    x = torch.randn(2, 3, 65, 49)
    with torch.no_grad():
        expected = module(x)
        other = copied(module)
        for parameter in module.parameters():
            parameter.zero_()
        assert torch.equal(other(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_a_module_in_half_precision_computes_in_it(dtype: torch.dtype, training: bool) -> None:
    module, x = head().train(training), features(dtype=torch.float32)
    expected = module(x)
    actual = copy.deepcopy(module).to(dtype)(x.to(dtype))
    assert actual.dtype == dtype
    assert torch.allclose(actual.float(), expected, rtol=0, atol=0.1)  # of logits up to 5, bf16 has 8 bits of them


@pytest.mark.parametrize("training", [False, True])
def test_channels_last_is_only_a_layout(training: bool) -> None:
    module, x = cell().train(training), features(dtype=torch.float32)
    expected = copy.deepcopy(module)(x)
    actual = copy.deepcopy(module).to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_an_empty_batch_is_an_empty_map_and_changes_nothing(training: bool) -> None:
    module = cell().train(training)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items() if "running" in key}
    assert module(torch.zeros(0, 3, 5, 6)).shape == (0, 6, 5, 6)
    assert all(torch.equal(module.state_dict()[key], tensor) for key, tensor in before.items())


def test_shapes_are_known_without_memory() -> None:
    with torch.device("meta"):
        module = SegmentationHead(DensePredictionCell(CELL, 3, norm_layer=lambda channels: nn.GroupNorm(1, channels)), 5)
        decoder = Decoder(7)
    assert {parameter.device.type for part in (module, decoder) for parameter in part.parameters()} == {"meta"}
    assert module(torch.zeros(2, 3, 9, 9, device="meta")).shape == (2, 5, 9, 9)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_gradients_are_the_same(use_reentrant: bool) -> None:
    module = cell(dropout_rate=0.5).train().double()
    gradients = []
    for call in (lambda m, x: m(x), lambda m, x: checkpoint(m, x, use_reentrant=use_reentrant)):
        x, copies = features().requires_grad_(), copy.deepcopy(module)
        torch.manual_seed(3)  # for the mask
        call(copies, x).square().sum().backward()  # type: ignore[no-untyped-call]
        gradients.append([x.grad, *(parameter.grad for parameter in copies.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_an_average_of_weights_is_a_module_of_its_own() -> None:
    module = cell().double()
    half = get_ema_multi_avg_fn(0.5)  # type: ignore[no-untyped-call]
    average = AveragedModel(module, multi_avg_fn=half, use_buffers=True)
    average.update_parameters(module)
    before = copy.deepcopy(module)
    with torch.no_grad():
        module.projection.weight.add_(1.0)
    average.update_parameters(module)
    weight = average.module.get_parameter("projection.weight")
    assert torch.allclose(weight, before.projection.weight + 0.5, rtol=0, atol=EXACT)
    assert explain(average.module, features()) == explain(module, features())


def test_a_compiled_module_runs_the_hooks_of_its_submodules() -> None:
    torch._dynamo.reset()
    module, x = cell().eval(), features(dtype=torch.float32)
    module.dropout.register_forward_hook(lambda _, inputs, output: output + 1.0)
    compiled = torch.compile(module, backend="aot_eager")
    assert torch.allclose(compiled(x), module(x), rtol=0, atol=1e-4)
    module.dropout._forward_hooks.clear()
    assert not torch.allclose(compiled(x), torch.zeros(1))


def test_dynamic_quantisation_finds_nothing_to_replace() -> None:
    quantize: Any = torch.ao.quantization.quantize_dynamic
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization moves to torchao
        quantized = quantize(cell())
    assert [type(part) for part in quantized.modules()] == [type(part) for part in cell().modules()]


@needs_kernels
def test_the_reason_is_explained() -> None:
    module, x = cell(), features(dtype=torch.float32)
    assert explain(module, x) == "fused, on C++ kernels"
    assert explain(module, x.half()) == "fused, on PyTorch: the C++ kernels compute float32 and float64, this map is float16"
    reasons: list[str] = []
    vmap(lambda y: reasons.append(explain(module, y)) or y)(x[None])  # type: ignore[func-returns-value]
    with forward_ad.dual_level():
        reasons.append(explain(module, x))
    assert reasons == [
        "each submodule by itself: torch.func or vmap is transforming",
        "each submodule by itself: derivatives are taken in forward mode",
    ]
    with using(backend_for(x)), forward_ad.dual_level():
        assert explain(module, x) == "fused, on C++ kernels"
