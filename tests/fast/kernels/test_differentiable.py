"""Every input of a convolution with its norm gets its own gradient, whichever of the others need one."""

import torch
from torch import Tensor

from fast.batch_norm import LiveNorm
from fast.kernels import NormedMap, backend_for
from fast.kernels.differentiable import OnKernels, _Inputs
from reference.batch_norm import BatchNorm
from tests.fast.against_reference import every_device

NAMES = ("weight", "gamma", "beta", "raw 0", "scale 0", "offset 0", "raw 1", "scale 1", "offset 1", "raw 2")
SIZE = (5, 7)


def draw(device: str, channels: int = 3) -> list[Tensor]:
    """Weight, gamma and beta of a convolution of three maps to 4 channels; two of the maps carry a norm, one is plain."""
    generator = torch.Generator().manual_seed(0)
    vectors = [(channels,), (channels,)]
    shapes = [(4, 3 * channels, 1, 1), (4,), (4,), *2 * [(2, channels, *SIZE), *vectors], (2, channels, *SIZE)]
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def gradients(tensors: list[Tensor], needed: set[str], *, training: bool) -> dict[str, Tensor | None]:
    """Of a loss that depends on the raw output, the scale and the offset."""
    leaves = [tensor.clone().requires_grad_(name in needed) for name, tensor in zip(NAMES, tensors, strict=True)]
    weight, gamma, beta, *rest = leaves
    maps = [NormedMap(*rest[:3]), NormedMap(*rest[3:6]), NormedMap(rest[6])]
    norm = BatchNorm(gamma, beta, torch.zeros_like(gamma), torch.ones_like(gamma))
    backend = backend_for(weight)
    assert backend is not None
    outputs = OnKernels(backend).pointwise_conv(maps, weight, LiveNorm(norm, training, 0.1))
    assert outputs.scale is not None
    assert outputs.offset is not None
    parts = [output for output in outputs if output is not None and output.requires_grad]  # a frozen norm's may not
    sum(part.square().sum() for part in parts).backward()  # type: ignore[union-attr]
    return {name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}


@every_device
def test_each_input_gets_its_own_gradient(device: str) -> None:
    tensors = draw(device)
    for training in (False, True):
        together = gradients(tensors, set(NAMES), training=training)
        for name in NAMES:
            alone = gradients(tensors, {name}, training=training)
            gradient, expected = alone.pop(name), together[name]
            assert gradient is not None, name
            assert expected is not None
            assert gradient.shape == expected.shape == tensors[NAMES.index(name)].shape
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4, msg=name)
            assert not any(other is not None for other in alone.values()), name


def test_inputs_lie_where_their_gradients_return() -> None:
    """What goes into the autograd function one after the other comes back by name."""
    maps = [NormedMap(*(f"{part} {i}" for part in NormedMap._fields)) for i in range(2)]  # type: ignore[arg-type]
    inputs = _Inputs("weight", "gamma", "beta", maps)
    assert inputs.flat() == ["weight", "gamma", "beta", "raw 0", "scale 0", "offset 0", "raw 1", "scale 1", "offset 1"]
    assert _Inputs.of(inputs.flat()) == inputs
    assert _Inputs("weight", None, None, [None]).flat() == ["weight", None, None, None, None, None]


@every_device
def test_gradients_of_a_plane_product(device: str) -> None:
    """P · X · Qᵀ of relu(scale · raw + offset), written out."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, *SIZE), (3,), (3,), (4, SIZE[0]), (6, SIZE[1]), (2, 3, 4, 6))
    raw, scale, offset, rows, columns, cotangent = (torch.randn(s, generator=generator).to(device) for s in shapes)
    results = []
    for kernels in (True, False):
        x = NormedMap(*(tensor.clone().requires_grad_() for tensor in (raw, scale, offset)))
        if kernels:
            backend = backend_for(raw)
            assert backend is not None
            y = OnKernels(backend)._plane_product(x, rows, columns)
        else:
            assert x.scale is not None
            assert x.offset is not None
            y = rows @ torch.relu(x.scale[:, None, None] * x.raw + x.offset[:, None, None]) @ columns.T
        y.backward(cotangent)  # type: ignore[no-untyped-call]
        results.append([y.detach(), *(tensor.grad for tensor in x if tensor is not None)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@every_device
def test_a_depthwise_map_without_gradient_is_left_alone(device: str) -> None:
    weight = torch.randn(3, 1, 3, 3, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    x = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1)).to(device)
    backend = backend_for(x)
    assert backend is not None
    y = OnKernels(backend).depthwise_conv(NormedMap(x), weight, None, rate=(1, 2)).raw
    y.square().sum().backward()  # type: ignore[no-untyped-call]
    expected = torch.nn.functional.conv2d(
        x, leaf := weight.detach().requires_grad_(), padding=(1, 2), dilation=(1, 2), groups=3
    )
    expected.square().sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert leaf.grad is not None
    torch.testing.assert_close(weight.grad, leaf.grad, rtol=1e-4, atol=1e-4)
    assert x.grad is None
