import contextlib
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from fast.kernels import using
from fast.upsampled_l1 import pixel_losses, upsampled_l1
from reference import upsampled_l1 as reference
from reference.batch_norm import Array
from reference.bilinear_resize import bilinear_resize
from tests.fast.against_reference import (
    LAYOUTS,
    Layout,
    Step,
    assert_equal_steps,
    assert_steps_within_budget,
    every_device,
    reference_step,
    rounded,
    to_tensors,
    torch_step,
)
from tests.strategies import map_sizes, rng_seeds

ONE = np.ones(())  # the loss is a scalar: its cotangent
ROUNDING = 1e-5  # float32 values of order 1


def expected_step(outputs: Array, targets: Array, *, align_corners: bool = True) -> Step:
    return reference_step(
        lambda x: np.asarray(reference.upsampled_l1(x, targets, align_corners=align_corners)),
        lambda _, x: (reference.upsampled_l1_backward(x, targets, align_corners=align_corners),),
        (outputs,),
        ONE,
    )


def draw_targets(shape: tuple[int, ...], unmeasured: float, rng: np.random.Generator) -> Array:
    return np.where(rng.random(shape) < unmeasured, np.nan, rng.normal(1.0, 1.0, shape))


def plain_l1(outputs: Tensor, targets: Tensor) -> Tensor:
    """The yardstick: PyTorch's resize and loss, in float32."""
    upsampled = F.interpolate(outputs.float(), targets.shape[1:], mode="bilinear", align_corners=True)[:, 0]
    measured = ~targets.isnan()
    return F.l1_loss(upsampled[measured], targets[measured].float())


def some_maps() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(2, 9, 11, generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.3] = torch.nan
    return torch.randn(2, 1, 4, 5, generator=generator), targets


@every_device
@pytest.mark.parametrize("kernels", [contextlib.nullcontext, lambda: using(None)], ids=["kernels", "pytorch"])
@example((2, 1), (6, 1), 1, 0.3, "contiguous", True, 0)
@given(
    map_sizes(6),
    map_sizes(),
    st.integers(1, 3),
    st.sampled_from((0.0, 0.3, 0.95, 1.0)),
    st.sampled_from(LAYOUTS),
    st.booleans(),
    rng_seeds(),
)
def test_equals_reference(
    device: str,
    kernels: Callable[[], contextlib.AbstractContextManager[None]],
    size: tuple[int, int],
    target_size: tuple[int, int],
    batch: int,
    unmeasured: float,
    layout: Layout,
    align_corners: bool,
    seed: int,
) -> None:
    """Targets larger and smaller than the outputs, down to 1×1; a few, most and all of them not measured."""
    rng = np.random.default_rng(seed)
    outputs, targets = rng.standard_normal((batch, 1, *size)), draw_targets((batch, *target_size), unmeasured, rng)
    on_device = torch.from_numpy(targets).to(device)
    with kernels():
        loss = partial(upsampled_l1, targets=on_device, align_corners=align_corners)
        actual = torch_step(loss, to_tensors((outputs,), device, layout), ONE)
        losses = pixel_losses(torch.from_numpy(outputs).to(device), on_device, align_corners=align_corners)
    # What the pixels around an output add to its gradient: terms of both signs, whose sum may be 0.
    terms = 1 / max(1, int((~np.isnan(targets)).sum()))
    assert_equal_steps(actual, expected_step(outputs, targets, align_corners=align_corners), terms=terms)
    resized = bilinear_resize(outputs, target_size, align_corners=align_corners)[:, 0]
    expected = np.nan_to_num(np.abs(resized - targets), nan=0.0)
    np.testing.assert_allclose(losses.cpu(), expected, rtol=0, atol=1e-12)  # float64 values of order 1


@every_device
@pytest.mark.parametrize("kernels", [contextlib.nullcontext, lambda: using(None)], ids=["kernels", "pytorch"])
@given(map_sizes(6), st.sampled_from(LAYOUTS), st.sampled_from((torch.float32, torch.float64)), rng_seeds())
def test_differences_of_exactly_0_have_no_gradient(
    device: str,
    kernels: Callable[[], contextlib.AbstractContextManager[None]],
    size: tuple[int, int],
    layout: Layout,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Multiples of 1/64, resized from n to 2 n − 1 by weights of 1 and 1/2, are exact: equal to half the targets, or all."""
    rng = np.random.default_rng(seed)
    outputs = rng.integers(-99, 99, (2, 1, *size)) / 64
    upsampled = bilinear_resize(outputs, (2 * size[0] - 1, 2 * size[1] - 1))[:, 0]
    targets = np.where(rng.random(upsampled.shape) < 0.5, upsampled, upsampled + rng.choice([-1.0, 1.0], upsampled.shape))
    half, all_equal = (torch.from_numpy(array).to(device) for array in (targets, upsampled))
    with kernels():
        actual = torch_step(lambda x: upsampled_l1(x, half), to_tensors((outputs,), device, layout, dtype), ONE)
        exact = torch_step(lambda x: upsampled_l1(x, all_equal), to_tensors((outputs,), device, layout, dtype), ONE)
    bound = ROUNDING if dtype == torch.float32 else 1e-12
    assert_equal_steps(actual, expected_step(outputs, targets), bound, terms=1 / targets.size)
    assert exact.output == 0.0
    assert not exact.gradients[0].any()


@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nothing_measured_gives_zero_and_no_gradient(device: str, dtype: torch.dtype) -> None:
    outputs = torch.randn(2, 1, 4, 5, device=device, dtype=dtype, requires_grad=True)
    loss = upsampled_l1(outputs, torch.full((2, 8, 9), torch.nan, device=device))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0.0
    assert outputs.grad is not None
    assert torch.equal(outputs.grad, torch.zeros_like(outputs))


def test_gradcheck() -> None:
    """By central differences of the fast path itself, in float64, with a gradient of the loss that is not 1."""
    outputs, targets = (x.double() for x in some_maps())
    outputs.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: 3.0 * upsampled_l1(x, targets), (outputs,))


@every_device
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_within_budget(device: str, dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    """Outputs in `dtype`; the loss is float32 for all, the gradient in the outputs' dtype. Autocast changes nothing."""
    actual, expected, yardstick = [], [], []
    for seed in range(9):
        rng = np.random.default_rng(seed)
        outputs = rounded(rng.normal(1.0, 1.0, (3, 1, 6, 7)), dtype)
        targets = rounded(draw_targets((3, 21, 25), 0.2, rng), torch.float32)
        on_device = torch.from_numpy(targets).to(device, torch.float32)
        inputs, plain_inputs = (to_tensors((outputs,), device, dtype=dtype) for _ in range(2))
        expected.append(expected_step(outputs, targets))
        actual.append(torch_step(lambda x, y=on_device: upsampled_l1(x, y), inputs, ONE, autocast))
        yardstick.append(torch_step(lambda x, y=on_device: plain_l1(x, y), plain_inputs, ONE))
    assert_steps_within_budget(actual, expected, yardstick, dtype)
    assert upsampled_l1(inputs[0], on_device).dtype == torch.float32


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_step_is_the_same(backend: str) -> None:
    """In one graph, so nothing in it waits for a value."""
    torch._dynamo.reset()
    outputs, targets = some_maps()
    steps = []
    for function in (upsampled_l1, torch.compile(upsampled_l1, backend=backend, fullgraph=True)):
        x = outputs.clone().requires_grad_()
        loss = function(x, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        steps.append((loss.detach(), x.grad))
    for expected, actual in zip(*steps, strict=True):
        assert torch.allclose(actual, expected, rtol=0, atol=ROUNDING)


def test_exported_program_is_the_same() -> None:
    class Loss(torch.nn.Module):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return upsampled_l1(outputs, targets)

    program = torch.export.export(Loss(), some_maps())
    assert torch.allclose(program.module()(*some_maps()), upsampled_l1(*some_maps()), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("outputs", "targets"), [((2, 1, 3, 3), (1, 9, 9)), ((1, 2, 3, 3), (1, 9, 9)), ((1, 1, 3, 3), (1, 1, 9, 9))]
)
def test_wrong_shapes_are_refused(outputs: tuple[int, ...], targets: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"outputs: \(N, 1, h, w\) and targets: \(N, H, W\) on one device are needed"):
        upsampled_l1(torch.zeros(outputs), torch.zeros(targets))


def test_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \(1, 1, 3, 3\) on cpu, \(1, 9, 9\) on meta"):
        upsampled_l1(torch.zeros(1, 1, 3, 3), torch.zeros(1, 9, 9, device="meta"))
