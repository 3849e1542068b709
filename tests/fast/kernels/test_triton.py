"""The Triton kernels against the reference: compiled on a GPU, elsewhere run by Triton's interpreter on tiny maps.

Every tensor that the backend allocates is full of NaN at first, so an element that no kernel writes fails. Maps come in every
layout, one of them a window in a map of NaN. Values lie on a coarse grid, where float32 takes scale · raw + offset exactly:
the sign before a ReLU is then the same in the reference's float64, at 0 too.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton has no build for this system")

import triton
import triton.language as tl

from fast import kernels
from fast.atrous_separable_conv import atrous_separable_conv
from fast.dense_prediction_cell import DensePredictionCell
from fast.kernels import Dropout, Folded, NormedMap, Unfolded
from fast.kernels import triton as triton_backend
from fast.kernels.differentiable import OnKernels
from fast.kernels.triton import Moments, depthwise_conv, launches, pointwise_conv
from fast.kernels.triton.launches import Launch
from fast.pyramid_pooling import pyramid_pooling
from fast.segmentation import SegmentationHead
from fast.train_step import Precision, TrainStep
from fast.upsampled_cross_entropy import upsampled_cross_entropy as fast_cross_entropy
from fast.upsampled_l1 import upsampled_l1
from reference import atrous_separable_conv as separable
from reference import pyramid_pooling as pooling
from reference import upsampled_l1 as l1
from reference.batch_norm import EPS, Array, BatchNorm, batch_norm_relu, batch_norm_relu_backward, updated_running_statistics
from reference.bilinear_resize import bilinear_resize
from reference.cell import Cell
from reference.grid import Grid
from reference.mean_iou import confusion_matrix
from reference.pointwise_conv import pointwise_conv as reference_pointwise_conv
from reference.pointwise_conv import pointwise_conv_backward
from reference.pyramid_pooling import PoolingVariant
from reference.upsampled_cross_entropy import upsampled_cross_entropy, upsampled_cross_entropy_backward
from tests.fast import test_train_step as steps
from tests.fast.against_reference import (
    LAYOUTS,
    Layout,
    assert_equal_steps,
    reference_step,
    rounded,
    to_tensors,
    torch_step,
)
from tests.fast.kernels.expected import Expected, effective_gradient, of, relative_error, to_array
from tests.strategies import map_sizes, random_pointwise, random_separable, rng_seeds

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not type(depthwise_conv.depthwise_forward_kernel).__name__.startswith("Interpreted"):
    pytest.skip("Triton was imported before TRITON_INTERPRET was set, and there is no CUDA device", allow_module_level=True)
if (
    DEVICE == "cpu"
    and np.lib.NumpyVersion(triton.__version__) < "3.7.0"
    and np.lib.NumpyVersion(np.__version__) >= "2.4.0.dev0"
):
    pytest.skip("Triton 3.6's interpreter needs NumPy below 2.4", allow_module_level=True)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # Triton 3.6's too
    # What a steep series of the loss overflows to is thrown away; the interpreter says so, a GPU does not.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),
]

# Relative to the largest |expected|. Float32 rounding is 6e-8; sums here have up to 200 terms of both signs, whose errors add
# up like a random walk, to 15 times that, and cancellation leaves a sum some ten times smaller than its terms.
CLOSE = 1e-5

# The interpreter takes 5 to 50 ms for a program: fewer examples than the profile, but never fewer than dev's ten.
few_examples = settings(max_examples=max(10, settings.get_profile(settings.get_current_profile_name()).max_examples // 5))
tilings = st.sampled_from(("table", "large", "small"))
layouts = st.sampled_from(LAYOUTS)
channel_counts = st.integers(1, 20)
rates = st.tuples(st.integers(1, 8), st.integers(1, 8))


@pytest.fixture(autouse=True, scope="module")
def poisoned_allocations() -> Iterator[None]:
    def poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_poisoned(*arguments: Any, **keywords: Any) -> Tensor:
            tensor = allocate(*arguments, **keywords)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

        return allocate_poisoned

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patch.setattr(owner, name, poisoning(getattr(owner, name)))
        yield


def in_small_tiles(kernel: str, launch: Launch) -> Launch:
    if kernel in ("fold", "sum_partials"):
        return launch._replace(block_p=2)
    if kernel == "sum_gradients":
        return launch._replace(block_p=16)
    if kernel == "crops":
        return launch._replace(block_p=8, block_n=16)
    has_maps = kernel.startswith(("depthwise", "pointwise", "separable", "normalise"))
    return Launch(32, 16, 16, 4, 1, programs=3) if has_maps else launch


@contextlib.contextmanager
def tiled(tiling: str) -> Iterator[None]:
    """The launch table's own tiles, of either column, which hold a tiny map whole, or ones so small that it needs several."""
    small = {key: in_small_tiles(key[0], launch) for key, launch in launches.DEFAULT.items()}
    with contextlib.ExitStack() as stack:
        if tiling == "large":
            stack.enter_context(mock.patch.object(triton_backend, "LARGE", 0))
        if tiling == "small":
            stack.enter_context(mock.patch.object(triton_backend, "table_for", return_value=small))
        yield


def draw(rng: np.random.Generator, *shape: int) -> Array:
    """Near standard normal, multiples of 1/64 up to 4: products of two and a sum are exact in float32."""
    return np.clip(np.round(rng.standard_normal(shape) * 64), -256, 256) / 64


def draw_tensor(rng: np.random.Generator, *shape: int, layout: Layout = "contiguous") -> Tensor:
    tensor: Tensor = to_tensors(draw(rng, *shape), DEVICE, layout, torch.float32)
    return tensor.detach()


def draw_map(
    rng: np.random.Generator, channels: int, size: tuple[int, int], *, batch: int = 2, layout: Layout, normed: bool
) -> NormedMap:
    raw = draw_tensor(rng, batch, channels, *size, layout=layout)
    return NormedMap(raw, draw_tensor(rng, channels), draw_tensor(rng, channels)) if normed else NormedMap(raw)


def draw_norm(rng: np.random.Generator, channels: int) -> BatchNorm[Tensor]:
    scale, offset, mean = (draw_tensor(rng, channels) for _ in range(3))
    return BatchNorm(scale, offset, mean, draw_tensor(rng, channels).abs() + 0.5)


def draw_unfolded(rng: np.random.Generator, channels: int) -> Unfolded:
    return Unfolded(*(draw_tensor(rng, channels) for _ in range(4)))


def assert_close(actual: NormedMap | Tensor | None, expected: Any, bound: float = CLOSE) -> None:
    if isinstance(actual, NormedMap):
        for part, expected_part in zip(actual, expected, strict=True):
            assert relative_error(part, expected_part) <= bound
    else:
        assert relative_error(actual, expected) <= bound


@few_examples
@given(tilings, map_sizes(7), channel_counts, rates, layouts, st.booleans(), rng_seeds())
def test_depthwise_forward_and_fold(
    tiling: str, size: tuple[int, int], channels: int, rate: tuple[int, int], layout: Layout, normed: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x, weight = draw_map(rng, channels, size, layout=layout, normed=normed), draw_tensor(rng, channels, 1, 3, 3)
    with tiled(tiling):
        raw, moments = triton_backend.depthwise_forward(x, weight, rate, statistics=True)
        assert_close(raw, separable.depthwise_conv(of(x).value(), to_array(weight), rate=rate))
        check_fold(moments, raw, draw_norm(rng, channels))
    assert triton_backend.depthwise_forward(x, weight, rate, statistics=False)[1] is None


def check_fold(moments: Moments | None, raw: Tensor, norm: BatchNorm[Tensor]) -> None:
    """The norm of a convolution's output, as two numbers per channel, and the running statistics after it."""
    assert moments is not None
    before = BatchNorm(*map(to_array, norm))
    mean, var = to_array(raw).mean(axis=(0, 2, 3)), to_array(raw).var(axis=(0, 2, 3))
    folded = triton_backend.fold(moments, norm, count=raw[:, 0].numel(), momentum=0.25, eps=EPS)
    inv_std = (var + EPS) ** -0.5
    # Relative to all channels' largest: a channel without variance has a scale of up to 1 / √eps = 316.
    assert_close(folded.mean, mean)
    assert_close(folded.inv_std, inv_std)
    assert_close(folded.scale, before.scale * inv_std)
    assert_close(folded.offset, before.offset - mean * before.scale * inv_std)
    after = updated_running_statistics(to_array(raw), before, momentum=0.25)
    assert_close(norm.running_mean, after.running_mean)
    assert_close(norm.running_var, after.running_var)


@few_examples
@given(tilings, map_sizes(7), channel_counts, rates, layouts, st.booleans(), st.booleans(), st.booleans(), rng_seeds())
def test_depthwise_backward(
    tiling: str,
    size: tuple[int, int],
    channels: int,
    rate: tuple[int, int],
    layout: Layout,
    normed: bool,
    through_statistics: bool,
    need_input: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    x, weight = draw_map(rng, channels, size, layout=layout, normed=normed), draw_tensor(rng, channels, 1, 3, 3)
    raw, grad = (draw_tensor(rng, 2, channels, *size, layout=layout) for _ in range(2))
    unfolded = draw_unfolded(rng, channels) if through_statistics else None
    with tiled(tiling):
        grad_x, grad_weight = triton_backend.depthwise_backward(grad, raw, unfolded, x, weight, rate, need_input=need_input)
    grad_raw = effective_gradient(to_array(grad), to_array(raw), unfolded)
    grad_value, expected_weight = separable.depthwise_conv_backward(grad_raw, of(x).value(), to_array(weight), rate=rate)
    assert_close(grad_weight, expected_weight)
    assert_close(grad_x, of(x).backward(grad_value) if need_input else None)


def rows_of_groups(height: int, rate_h: int, plan: tuple[int, int, int, int]) -> list[list[int]]:
    """The rows that each group of programs computes, as the kernels walk."""
    segment_rows, program_phases, phase_groups, groups = plan
    walked: list[list[int]] = [[] for _ in range(groups)]
    for group, rows in enumerate(walked):
        first, phase = group // phase_groups * segment_rows, group % phase_groups * program_phases
        for p in range(phase, min(phase + program_phases, rate_h, height)):
            rows.extend(range(height)[p::rate_h][first : first + segment_rows])
    return walked


@given(st.integers(1, 200), st.integers(1, 30), st.integers(1, 3000), st.integers(1, 3000))
def test_every_row_is_computed_by_one_group(height: int, rate_h: int, tiles: int, programs: int) -> None:
    plan = triton_backend._quickest_row_plan(height, min(rate_h, height), tiles, programs)
    walked = rows_of_groups(height, rate_h, plan)
    assert sorted(row for rows in walked for row in rows) == list(range(height))
    # Every phase of a group has a row in its segment: the kernels load it without asking.
    longest, shortest = len(range(0, height, rate_h)), len(range(height)[min(rate_h, height) - 1 :: rate_h])
    assert -(-shortest // plan.segment_rows) == -(-longest // plan.segment_rows)


def test_rows_are_shared_out_by_what_runs_at_once() -> None:
    """By hand: 100 programs at once and ten tiles leave ten groups of rows, 100 tiles one, 1000 tiles one."""
    plan = triton_backend._quickest_row_plan
    assert plan(100, 1, 10, 100) == (10, 1, 1, 10)  # segments of ten rows
    assert plan(100, 20, 10, 100) == (5, 2, 10, 10)  # two phases of five rows
    assert plan(100, 1, 100, 100) == plan(100, 1, 1000, 100) == (100, 1, 1, 1)
    assert plan(100, 20, 100, 100) == (5, 20, 1, 1)


row_plans = st.sampled_from((1, 2, 5, 20, 1000))  # programs that run at once: from whole columns to single rows


@few_examples
@example(1000, 2, 7, 9, 1, 2, True, 0)  # segments of one row
@example(5, 1, 13, 5, 2, 1, True, 0)  # two segments of each phase
@example(1, 1, 9, 7, 4, 3, False, 0)  # all phases by one program
@given(
    row_plans,
    st.integers(1, 2),
    st.integers(1, 13),
    st.integers(1, 9),
    st.integers(1, 7),
    st.integers(1, 20),
    st.booleans(),
    rng_seeds(),
)
def test_depthwise_in_segments_and_phases(
    programs: int, batch: int, height: int, width: int, rate_h: int, rate_w: int, normed: bool, seed: int
) -> None:
    """Both ways: one image, one row or column, rates beyond the map, columns and channels that are no multiple of a tile."""
    rng, channels, rate = np.random.default_rng(seed), 17, (rate_h, rate_w)
    x = draw_map(rng, channels, (height, width), batch=batch, layout="contiguous", normed=normed)
    raw, grad = (draw_tensor(rng, batch, channels, height, width) for _ in range(2))
    weight, unfolded = draw_tensor(rng, channels, 1, 3, 3), draw_unfolded(rng, channels)
    table = {key: launch._replace(block_p=8, block_n=16, programs=programs) for key, launch in launches.DEFAULT.items()}
    with mock.patch.object(triton_backend, "table_for", return_value=table):
        out, moments = triton_backend.depthwise_forward(x, weight, rate, statistics=True)
        grad_x, grad_weight = triton_backend.depthwise_backward(grad, raw, unfolded, x, weight, rate, need_input=True)
    assert_close(out, separable.depthwise_conv(of(x).value(), to_array(weight), rate=rate))
    check_fold(moments, out, draw_norm(rng, channels))
    grad_raw = effective_gradient(to_array(grad), to_array(raw), unfolded)
    grad_value, expected_weight = separable.depthwise_conv_backward(grad_raw, of(x).value(), to_array(weight), rate=rate)
    assert_close(grad_weight, expected_weight)
    assert_close(grad_x, of(x).backward(grad_value))


@pytest.mark.parametrize("programs", [1, 1000])
@pytest.mark.parametrize("rate", [(1, 1), (3, 2), (20, 1)], ids=str)
@pytest.mark.parametrize("taps", ["centre", "column", "all"])
def test_depthwise_moments_at_a_large_mean(programs: int, rate: tuple[int, int], taps: str) -> None:
    """At mean 10⁴ and deviation 1, as in `test_large_mean_leaves_the_variance`; other taps add the steps at the borders.

    At a rate beyond the map the column's other taps add nothing, and every phase has one row.
    """
    rng = np.random.default_rng(0)
    x = NormedMap(torch.from_numpy(rng.normal(1e4, 1.0, (2, 5, 9, 9))).to(DEVICE, torch.float32))
    weight, norm = torch.zeros(5, 1, 3, 3, device=DEVICE), draw_norm(rng, 5)
    weight[:, :, 1, 1] = 1.0
    if taps != "centre":
        weight[..., 1] += 1.0
    if taps == "all":
        weight += draw_tensor(rng, 5, 1, 3, 3)
    table = {key: launch._replace(programs=programs) for key, launch in launches.DEFAULT.items()}
    with mock.patch.object(triton_backend, "table_for", return_value=table):
        raw, moments = triton_backend.depthwise_forward(x, weight, rate, statistics=True)
    assert moments is not None
    triton_backend.fold(moments, norm, count=162, momentum=1.0, eps=EPS)
    assert_close(norm.running_var, to_array(raw).var(axis=(0, 2, 3), ddof=1), 1e-3)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_depthwise_keeps_what_is_not_finite_where_it_belongs(bad: float, normed: bool) -> None:
    """One value that is not finite reaches the outputs, sums and gradients that read it, and no others."""
    rng, rate = np.random.default_rng(0), (2, 1)
    x = draw_map(rng, 3, (7, 5), layout="contiguous", normed=normed)
    weight, grad = draw_tensor(rng, 3, 1, 3, 3), draw_tensor(rng, 2, 3, 7, 5)
    unfolded, norm = draw_unfolded(rng, 3), draw_norm(rng, 3)
    ones = NormedMap(x.raw, *(torch.ones(3, device=DEVICE) for _ in range(2))) if normed else x
    spoilt = ones._replace(raw=x.raw.clone())
    spoilt.raw[1, 2, 0, 0] = bad
    out, moments = triton_backend.depthwise_forward(spoilt, weight, rate, statistics=True)
    expected = np.zeros(out.shape, bool)
    expected[1, 2, :3:2, :2] = True
    assert np.array_equal(~np.isfinite(to_array(out)), expected)
    assert moments is not None
    folded = triton_backend.fold(moments, norm, count=70, momentum=0.5, eps=EPS)
    assert torch.isfinite(folded.scale).tolist() == [True, True, False]

    grad[0, 1, 6, 4] = bad
    grad_x, grad_weight = triton_backend.depthwise_backward(grad, x.raw, unfolded, ones, weight, rate, need_input=True)
    assert grad_x is not None
    expected[:] = False
    expected[0, 1, 4::2, 3:] = True
    if normed:
        expected &= of(ones).value() > 0.0
    assert np.array_equal(~np.isfinite(to_array(grad_x.raw)), expected)
    assert torch.isfinite(grad_weight[[0, 2]]).all()
    assert not torch.isfinite(grad_weight[1, 0, 1, 1])


maps_of_channels = st.lists(st.tuples(channel_counts, st.booleans(), layouts), min_size=1, max_size=3)


@few_examples
@given(tilings, map_sizes(6), maps_of_channels, st.integers(1, 20), rng_seeds())
def test_pointwise_forward_fold_and_inference(
    tiling: str, size: tuple[int, int], maps_drawn: list[tuple[int, bool, Layout]], out_channels: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    maps = [draw_map(rng, channels, size, layout=layout, normed=normed) for channels, normed, layout in maps_drawn]
    weight = draw_tensor(rng, out_channels, sum(channels for channels, _, _ in maps_drawn), 1, 1)
    expected, norm = reference_pointwise_conv(concatenated(maps), to_array(weight)), draw_norm(rng, out_channels)
    with tiled(tiling):
        raw, moments = triton_backend.pointwise_forward(maps, weight, None, statistics=True)
        assert_close(raw, expected)
        check_fold(moments, raw, draw_norm(rng, out_channels))
        inference = triton_backend.pointwise_inference(maps, weight, (norm.scale, norm.offset))
    assert_close(inference, Expected(expected, to_array(norm.scale), to_array(norm.offset)).value())


@few_examples
@given(tilings, map_sizes(6), maps_of_channels, st.integers(1, 20), st.booleans(), st.sampled_from((0.0, 0.4)), rng_seeds())
def test_pointwise_backward(
    tiling: str,
    size: tuple[int, int],
    maps_drawn: list[tuple[int, bool, Layout]],
    out_channels: int,
    through_statistics: bool,
    dropout_rate: float,
    seed: int,
) -> None:
    """With dropout by the mask that the forward drew, which a product with the identity shows."""
    rng = np.random.default_rng(seed)
    maps = [draw_map(rng, channels, size, layout=layout, normed=normed) for channels, normed, layout in maps_drawn]
    widths = [channels for channels, _, _ in maps_drawn]
    weight = draw_tensor(rng, out_channels, sum(widths), 1, 1)
    raw, grad = (draw_tensor(rng, 2, out_channels, *size) for _ in range(2))
    unfolded, need_input = draw_unfolded(rng, out_channels) if through_statistics else None, rng.random(len(maps)) < 0.7
    dropout = Dropout(dropout_rate, torch.tensor([seed], device=DEVICE)) if dropout_rate else None
    keep = 1.0 if dropout is None else kept(dropout, 2, widths, size) / (1.0 - dropout_rate)
    with tiled(tiling):
        grad_maps, grad_weight = triton_backend.pointwise_backward(
            grad, raw, unfolded, maps, weight, dropout, need_input=[bool(need) for need in need_input]
        )
    grad_raw = effective_gradient(to_array(grad), to_array(raw), unfolded)
    grad_concat, expected_weight = pointwise_conv_backward(grad_raw, concatenated(maps) * keep, to_array(weight))
    assert_close(grad_weight, expected_weight)
    grad_values = np.split(grad_concat * keep, np.cumsum(widths)[:-1], axis=1)
    for x, grad_map, grad_value, need in zip(maps, grad_maps, grad_values, need_input, strict=True):
        assert_close(grad_map, of(x).backward(grad_value) if need else None)


def concatenated(maps: list[NormedMap]) -> Array:
    return np.concatenate([of(x).value() for x in maps], axis=1)


def kept(dropout: Dropout, batch: int, widths: list[int], size: tuple[int, int]) -> Array:
    """Which elements of a concatenation of maps the forward keeps, as 0 and 1: (N, C, H, W)."""
    ones = [NormedMap(torch.ones(batch, channels, *size, device=DEVICE)) for channels in widths]
    identity = torch.eye(sum(widths), device=DEVICE)[:, :, None, None]
    out, _ = triton_backend.pointwise_forward(ones, identity, dropout, statistics=False)
    return (to_array(out) > 0.0).astype(np.float64)


def test_dropout_follows_its_rate_and_seed() -> None:
    """Of 6272 elements 10 % ± 2.3 % are dropped: six standard deviations, √(0.1 · 0.9 / 6272) each."""
    widths, size = [40, 24], (7, 7)
    first, again, other = (
        kept(Dropout(0.1, torch.tensor([seed], device=DEVICE)), 2, widths, size) for seed in (3, 3, 2**62 + 3)
    )
    assert abs(first.mean() - 0.9) <= 0.023
    assert np.array_equal(first, again)
    assert 0.1 <= np.mean(first != other) <= 0.26  # independent masks differ in 18 % of the elements; ± 16 deviations
    assert abs(np.corrcoef(first[:, :24].ravel(), first[:, 40:].ravel())[0, 1]) <= 0.13  # six deviations of 1 / √2352
    x = NormedMap(torch.ones(1, 3, 2, 2, device=DEVICE))
    out, _ = triton_backend.pointwise_forward(
        [x], torch.eye(3, device=DEVICE)[:, :, None, None], Dropout(0.5, torch.tensor([1], device=DEVICE)), statistics=False
    )
    assert set(out.ravel().tolist()) <= {0.0, 2.0}


def test_dropout_of_nearly_all() -> None:
    """A rate that rounds to 1 in 16 bits still drops, all but one in 65536."""
    dropout = Dropout(1.0 - 2.0**-20, torch.tensor([5], device=DEVICE))
    assert kept(dropout, 2, [40], (7, 7)).mean() <= 0.01


@triton.jit
def philox_kernel(seed_ptr, counters_ptr, words_ptr, column):  # type: ignore[no-untyped-def]  # Triton knows no annotations
    i = tl.arange(0, 16)
    c0, c1 = tl.load(counters_ptr + i).to(tl.uint32), tl.load(counters_ptr + 16 + i).to(tl.uint32)
    words = pointwise_conv.philox(tl.load(seed_ptr).to(tl.uint64), c0, c1, column)
    for j in tl.static_range(4):
        tl.store(words_ptr + j * 16 + i, words[j].to(tl.int64))


def test_random_words_are_those_of_philox() -> None:
    """Salmon et al. 2011, with 10 rounds; its known answer for zeros."""
    rng, mask = np.random.default_rng(0), 2**32 - 1
    counters = rng.integers(2**31, size=(2, 16))
    counters[:, 0] = 0
    for seed, column in ((0, 0), (int(rng.integers(2**62)), 1280)):
        words = torch.empty(4, 16, dtype=torch.int64, device=DEVICE)
        philox_kernel[(1,)](torch.tensor([seed], device=DEVICE), torch.from_numpy(counters).to(DEVICE), words, column)
        c0, c1, c2, c3 = (part.astype(object) for part in (*counters, np.full(16, column), np.zeros(16, np.int64)))
        k0, k1 = seed & mask, seed >> 32
        for _ in range(10):
            first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
            c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & mask, (first >> 32) ^ c3 ^ k1, first & mask
            k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
        assert (words.cpu() & mask).tolist() == [part.tolist() for part in (c0, c1, c2, c3)]
        if seed == 0:
            assert [part[0] for part in (c0, c1, c2, c3)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize(
    ("size", "dropout_rate"), [((1, 1), 0.4), ((1, 37), 0.0), ((33, 1), 0.4), ((5, 7), 0.0), ((5, 7), 0.4)]
)
def test_pointwise_of_whole_tiles(size: tuple[int, int], dropout_rate: float) -> None:
    """Channels that fill their tiles need no masks, but the last tile of positions is not full."""
    rng, widths, out_channels = np.random.default_rng(0), [16, 48, 32], 32
    maps = [draw_map(rng, width, size, batch=1, layout="contiguous", normed=width != 48) for width in widths]
    weight, norm = draw_tensor(rng, out_channels, sum(widths), 1, 1), draw_norm(rng, out_channels)
    grad, unfolded = draw_tensor(rng, 1, out_channels, *size), draw_unfolded(rng, out_channels)
    dropout = Dropout(dropout_rate, torch.tensor([3], device=DEVICE)) if dropout_rate else None
    keep = 1.0 if dropout is None else kept(dropout, 1, widths, size) / (1.0 - dropout_rate)
    with tiled("small"):
        raw, moments = triton_backend.pointwise_forward(maps, weight, dropout, statistics=True)
        check_fold(moments, raw, norm)
        grad_maps, grad_weight = triton_backend.pointwise_backward(
            grad, raw, unfolded, maps, weight, dropout, need_input=[True] * 3
        )
    value = concatenated(maps) * keep
    assert_close(raw, reference_pointwise_conv(value, to_array(weight)))
    grad_raw = effective_gradient(to_array(grad), to_array(raw), unfolded)
    grad_concat, expected_weight = pointwise_conv_backward(grad_raw, value, to_array(weight))
    assert_close(grad_weight, expected_weight)
    for x, grad_map, grad_value in zip(
        maps, grad_maps, np.split(grad_concat * keep, np.cumsum(widths)[:-1], axis=1), strict=True
    ):
        assert_close(grad_map, of(x).backward(grad_value))


def test_gradient_of_the_output_is_the_same_computed_once_or_in_every_tile() -> None:
    rng = np.random.default_rng(0)
    maps = [draw_map(rng, channels, (5, 7), layout="contiguous", normed=True) for channels in (20, 33)]
    weight, (raw, grad) = draw_tensor(rng, 19, 53, 1, 1), (draw_tensor(rng, 2, 19, 5, 7) for _ in range(2))
    results, launched = [], []
    for many in (1, 99):
        launch = mock.Mock(wraps=triton_backend._launch)
        with tiled("small"), mock.patch.multiple(triton_backend, _MANY_TILES=many, _launch=launch):
            grad_maps, grad_weight = triton_backend.pointwise_backward(
                grad, raw, draw_unfolded(np.random.default_rng(1), 19), maps, weight, None, need_input=[True, True]
            )
        results.append([grad_weight, *(tensor for grad_map in grad_maps for tensor in grad_map or ())])
        launched.append([call.args[0] for call in launch.call_args_list])
    assert [pointwise_conv.pointwise_gradient_kernel in kernels for kernels in launched] == [True, False]
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("tiling", ["table", "small"])
@pytest.mark.parametrize("where", [(0, 0), (4, 6)])
def test_a_value_that_is_not_a_number_stays_one_and_where_it_is(tiling: str, where: tuple[int, int]) -> None:
    """Also in the last position, which is read in place of those beyond it."""
    rng = np.random.default_rng(0)
    x, weight = draw_map(rng, 5, (5, 7), batch=1, layout="contiguous", normed=True), draw_tensor(rng, 3, 5, 1, 1)
    x.raw[0, 2, where[0], where[1]] = torch.nan
    with tiled(tiling):
        raw, _ = triton_backend.pointwise_forward([x], weight, None, statistics=False)
        grad = torch.ones_like(raw)
        (grad_map,), grad_weight = triton_backend.pointwise_backward(grad, raw, None, [x], weight, None, need_input=[True])
    expected = torch.zeros(5, 7, dtype=torch.bool)
    expected[where] = True
    assert all(torch.equal(channel.isnan().cpu(), expected) for channel in raw[0])
    assert grad_weight[:, 2].isnan().all()
    assert not grad_weight[:, [0, 1, 3, 4]].isnan().any()
    assert grad_map is not None
    assert not grad_map.raw.isnan().any()  # a comparison with no number is false, as in PyTorch's relu


@few_examples
@given(tilings, map_sizes(7), channel_counts, layouts, rng_seeds())
def test_norm_and_its_way_back(tiling: str, size: tuple[int, int], channels: int, layout: Layout, seed: int) -> None:
    """A batch norm with ReLU in training by fold, normalise and unfold, as after a convolution with the identity."""
    rng = np.random.default_rng(seed)
    x, norm = draw_map(rng, channels, size, layout=layout, normed=False).raw, draw_norm(rng, channels)
    count, grad = x[:, 0].numel(), draw_tensor(rng, 2, channels, *size, layout=layout)
    expected_norm = BatchNorm(*map(to_array, norm))
    expected = batch_norm_relu(to_array(x), expected_norm, training=True)
    assume(np.all((expected == 0.0) | (expected > 1e-3)))  # a sign before the ReLU that rounding could turn
    identity = torch.zeros(channels, 1, 3, 3, device=DEVICE)
    identity[:, 0, 1, 1] = 1.0
    with tiled(tiling):
        raw, moments = triton_backend.depthwise_forward(NormedMap(x), identity, (1, 1), statistics=True)
        assert moments is not None
        folded = triton_backend.fold(moments, norm, count=count, momentum=0.25, eps=EPS)
        normed = NormedMap(raw, folded.scale, folded.offset)
        actual, grad_map = triton_backend.normalise(normed), triton_backend.normalise_backward(grad, normed)
        assert grad_map.scale is not None
        assert grad_map.offset is not None
        unfolded = triton_backend.unfold(grad_map.scale, grad_map.offset, folded, norm.scale, count=count)
    expected_grad, expected_grad_norm = batch_norm_relu_backward(to_array(grad), to_array(x), expected_norm, training=True)
    grad_x = effective_gradient(to_array(grad_map.raw), to_array(raw), unfolded)
    # Two values of a channel may lie 1/64 apart: a deviation of 1/128 magnifies rounding of the values, 2e-7, by 128.
    bound = 128 * CLOSE
    assert_close(actual, expected, bound)
    assert_close(unfolded.gamma, expected_grad_norm.scale, bound)
    assert_close(unfolded.beta, expected_grad_norm.offset, bound)
    scale = np.abs(to_array(grad_map.raw)).max() or 1.0  # of the terms, which cancel
    assert np.abs(grad_x - expected_grad).max() <= bound * scale


def test_large_mean_leaves_the_variance() -> None:
    """At mean 10⁴ and deviation 1, E[x²] - E[x]² in float32 would be off by 10⁸ · 6e-8 = 6."""
    rng = np.random.default_rng(0)
    x = NormedMap(torch.from_numpy(rng.normal(1e4, 1.0, (2, 5, 9, 9))).to(DEVICE, torch.float32))
    norm = draw_norm(rng, 5)
    with tiled("small"):
        raw, moments = triton_backend.pointwise_forward(
            [x], torch.eye(5, device=DEVICE)[:, :, None, None], None, statistics=True
        )
        assert moments is not None
        folded = triton_backend.fold(moments, norm, count=162, momentum=1.0, eps=EPS)
    bound = 1e-3  # means of tiles and of all are rounded by 10⁴ · 6e-8 = 6e-4, beside values with a deviation of 1
    assert_close(folded.inv_std, (to_array(raw).var(axis=(0, 2, 3)) + EPS) ** -0.5, bound)
    assert_close(norm.running_var, to_array(raw).var(axis=(0, 2, 3), ddof=1), bound)


@few_examples
@given(tilings, map_sizes(6), channel_counts, st.integers(1, 20), rates, layouts, st.booleans(), rng_seeds())
def test_separable_inference(
    tiling: str,
    size: tuple[int, int],
    channels: int,
    out_channels: int,
    rate: tuple[int, int],
    layout: Layout,
    normed: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    x, weights = draw_map(rng, channels, size, layout=layout, normed=normed), random_separable(channels, out_channels, rng)
    depthwise, pointwise = ((conv.weight, frozen(conv.norm)) for conv in weights)
    with tiled(tiling):
        raw, _ = triton_backend.depthwise_forward(x, as_tensor(depthwise[0]), rate, statistics=False)
        middle = NormedMap(raw, *depthwise[1])
        actual = triton_backend.pointwise_inference([middle], as_tensor(pointwise[0]), pointwise[1])
    assert_close(actual, separable.atrous_separable_conv(of(x).value(), weights, rate=rate, training=False))


def frozen(norm: BatchNorm[Array]) -> tuple[Tensor, Tensor]:
    scale = norm.scale / np.sqrt(norm.running_var + EPS)
    return as_tensor(scale), as_tensor(norm.offset - norm.running_mean * scale)


def as_tensor(array: Array) -> Tensor:
    return torch.from_numpy(array).to(DEVICE, torch.float32)


label_dtypes = st.sampled_from((torch.uint8, torch.int64))
ignore_indices = st.sampled_from((255, 2))


@few_examples
@given(
    map_sizes(4),
    map_sizes(9),
    st.integers(1, 20),
    st.sampled_from((0.0, 0.3, 1.0)),
    ignore_indices,
    label_dtypes,
    layouts,
    st.booleans(),
    st.booleans(),
    rng_seeds(),
)
def test_upsampled_cross_entropy(
    size: tuple[int, int],
    label_size: tuple[int, int],
    classes: int,
    ignored: float,
    ignore_index: int,
    label_dtype: torch.dtype,
    layout: Layout,
    weighted: bool,
    align_corners: bool,
    seed: int,
) -> None:
    """Labels larger and smaller than the logits, maps of one row or column, one class, all pixels ignored."""
    rng = np.random.default_rng(seed)
    logits, labels = (
        draw_tensor(rng, 2, classes, *size, layout=layout),
        draw_labels(rng, label_size, classes, ignored, ignore_index),
    )
    weights = draw_weights(rng, classes) if weighted else None
    options: dict[str, Any] = {"ignore_index": ignore_index, "class_weights": weights, "align_corners": align_corners}
    expected = upsampled_cross_entropy(to_array(logits), labels, **options)
    expected_grad = upsampled_cross_entropy_backward(to_array(logits), labels, **options)
    on_device = torch.from_numpy(labels).to(DEVICE, label_dtype)
    loss, grad = triton_backend.upsampled_cross_entropy(logits, on_device, ignore_index, on_kernels(weights), align_corners)
    assert_close(loss, np.asarray(expected))
    # Where softmax and label almost cancel, what is left is the rounding of a probability, 6e-8, times a pixel's share.
    assert bool(torch.isfinite(grad).all())
    assert np.abs(to_array(grad) - expected_grad).max() <= CLOSE * max(np.abs(expected_grad).max(), 0.01)


ALL_THREE = "plain", "weighted", "weighted, centres"


@pytest.mark.parametrize(
    ("size", "label_size", "classes", "mode"),
    [  # on a GPU in all modes; where the interpreter takes long, in one or two
        (size, label_size, classes, mode)
        for size, label_size, classes, modes in [
            ((2, 3), (17, 33), 19, ("plain", "weighted")),  # output stride 16
            ((2, 3), (32, 48), 19, ("weighted, centres",)),  # output stride 16 without aligned corners
            ((3, 3), (17, 9), 5, ALL_THREE),  # 8 and 4: shorter series
            ((2, 3), (12, 14), 33, ("plain", "weighted, centres")),  # classes 0 and 32 share a bit
            ((2, 2), (19, 35), 3, ("weighted", "weighted, centres")),  # several chunks of a cell, along both axes
            ((1, 1), (19, 21), 3, ALL_THREE),
            ((1, 5), (3, 37), 4, ALL_THREE),
            ((5, 1), (41, 2), 4, ALL_THREE),
            ((4, 3), (3, 2), 20, ("plain", "weighted, centres")),  # cells without a pixel
            ((1, 2), (2, 3), 260, ("weighted",)),  # labels that are no bytes
            ((2, 3), (18, 19), 1, ALL_THREE),
        ]
        for mode in (modes if DEVICE == "cpu" else ALL_THREE)
    ],
    ids=str,
)
def test_upsampled_cross_entropy_of_cells_of_any_size(
    size: tuple[int, int], label_size: tuple[int, int], classes: int, mode: str
) -> None:
    rng = np.random.default_rng(0)
    logits, labels = draw_tensor(rng, 2, classes, *size, layout="window"), draw_labels(rng, label_size, classes, 0.2, 255)
    weights = draw_weights(rng, classes) if "weighted" in mode else None
    assert_loss_and_gradient(logits, labels, 3e-6, weights, align_corners="centres" not in mode)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_upsampled_cross_entropy_reads_any_dtype(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter makes no bfloat16 of float64")
    rng = np.random.default_rng(0)
    logits, labels = draw_tensor(rng, 2, 19, 3, 4, layout="channels_last").to(dtype), draw_labels(rng, (33, 40), 19, 0.2, 255)
    expected = upsampled_cross_entropy(to_array(logits), labels)
    loss, grad = triton_backend.upsampled_cross_entropy(logits, torch.from_numpy(labels).to(DEVICE), 255)
    assert (loss.dtype, grad.dtype, grad.stride()) == (dtype, dtype, logits.stride())
    assert loss.item() == pytest.approx(expected, rel=2**-8)
    assert relative_error(grad, upsampled_cross_entropy_backward(to_array(logits), labels)) <= 2**-8


@pytest.mark.parametrize(
    ("size", "label_size", "scale"),
    [((2, 3), (17, 33), 20.0), ((2, 3), (17, 33), 300.0), ((3, 4), (9, 10), 60.0), ((4, 4), (3, 4), 20.0)],
    ids=str,
)
@pytest.mark.parametrize(
    ("weighted", "align_corners"), [(False, True), (True, True), (False, False)], ids=["", "weighted", "centres"]
)
def test_one_class_leads_by_far_at_each_logit(
    size: tuple[int, int], label_size: tuple[int, int], scale: float, weighted: bool, align_corners: bool
) -> None:
    """In between, all classes lie far below the interpolated largest logits, or a power's series leaves float32's range."""
    rng = np.random.default_rng(0)
    leading = rng.integers(3, size=(1, 1, *size))
    logits = draw(rng, 1, 3, *size) + scale * (leading == np.arange(3)[:, None, None])
    labels = draw_labels(rng, label_size, 3, 0.2, 255)[:1]
    weights = draw_weights(rng, 3) if weighted else None
    bound = 3e-6 + 1e-7 * scale  # the logits' own rounding
    assert_loss_and_gradient(as_tensor(logits), labels, bound, weights, align_corners=align_corners)


def test_only_one_cell_needs_the_exact_way() -> None:
    """Its neighbours in the same program are computed with it, those of other programs are not; both ways agree."""
    rng = np.random.default_rng(0)
    logits = draw(rng, 1, 3, 3, 6)
    logits[0, 2, 1, 3] += 300.0
    assert_loss_and_gradient(as_tensor(logits), draw_labels(rng, (9, 21), 3, 0.2, 255)[:1], 1e-5)


def test_a_class_that_rises_from_underflow_counts() -> None:
    """By hand: two classes, 400 apart above and 400 the other way below; at the middle row both have probability 1/2."""
    logits = as_tensor(np.array([[400.0, -400.0], [0.0, 0.0]]).reshape(1, 2, 2, 1))
    labels = np.full((1, 17, 1), 255)
    labels[0, 8, 0] = 1
    loss, grad = triton_backend.upsampled_cross_entropy(logits, torch.from_numpy(labels).to(DEVICE), 255)
    assert loss.item() == pytest.approx(np.log(2), rel=1e-6)
    assert grad.ravel().tolist() == pytest.approx([0.25, 0.25, -0.25, -0.25], rel=1e-6)


def assert_loss_and_gradient(
    logits: Tensor,
    labels: np.ndarray[Any, np.dtype[np.int64]],
    bound: float,
    weights: Array | None = None,
    *,
    align_corners: bool = True,
) -> None:
    """Labels as int64 and uint8 give the same bits, which are the reference's results."""
    options: dict[str, Any] = {"class_weights": weights, "align_corners": align_corners}
    expected = upsampled_cross_entropy(to_array(logits), labels, **options)
    expected_grad = upsampled_cross_entropy_backward(to_array(logits), labels, **options)
    given, of_classes = torch.from_numpy(labels).to(DEVICE), on_kernels(weights)
    loss, grad = triton_backend.upsampled_cross_entropy(logits, given, 255, of_classes, align_corners)
    assert loss.item() == pytest.approx(expected, rel=bound, abs=bound)
    assert np.abs(to_array(grad) - expected_grad).max() <= bound * max(np.abs(expected_grad).max(), 0.01)
    if logits.shape[1] <= 255:
        others = triton_backend.upsampled_cross_entropy(logits, given.to(torch.uint8), 255, of_classes, align_corners)
        assert torch.equal(others[0], loss)
        assert torch.equal(others[1], grad)


def draw_weights(rng: np.random.Generator, classes: int) -> Array:
    """One of them is 0, if there are several; float32 holds them exactly."""
    return rng.permutation(np.arange(classes) % 7 / 4.0) if classes > 1 else np.array([1.75])


def on_kernels(weights: Array | None) -> Tensor | None:
    return None if weights is None else as_tensor(weights)


def draw_labels(
    rng: np.random.Generator, size: tuple[int, int], classes: int, ignored: float, ignore_index: int
) -> np.ndarray[Any, np.dtype[np.int64]]:
    labels = rng.integers(classes, size=(2, *size))
    return np.where(rng.random(labels.shape) < ignored, ignore_index, labels)


@few_examples
@given(map_sizes(4), map_sizes(9), st.integers(1, 9), ignore_indices, label_dtypes, layouts, st.booleans(), rng_seeds())
def test_upsampled_confusion_matrix(
    size: tuple[int, int],
    label_size: tuple[int, int],
    classes: int,
    ignore_index: int,
    label_dtype: torch.dtype,
    layout: Layout,
    align_corners: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    logits, labels = (
        draw_tensor(rng, 2, classes, *size, layout=layout),
        draw_labels(rng, label_size, classes, 0.3, ignore_index),
    )
    upsampled = bilinear_resize(to_array(logits), label_size, align_corners=align_corners)
    ordered = np.sort(upsampled, axis=1)
    assume(classes == 1 or np.all(ordered[:, -1] - ordered[:, -2] > CLOSE))  # ties have their own test
    expected = confusion_matrix(upsampled.argmax(axis=1), labels, num_classes=classes, ignore_index=ignore_index)
    on_device = torch.from_numpy(labels).to(DEVICE, label_dtype)
    actual = triton_backend.upsampled_confusion_matrix(logits, on_device, ignore_index, align_corners)
    assert actual.dtype == torch.int64
    assert actual.tolist() == expected.tolist()


def test_first_of_equal_classes_is_the_prediction() -> None:
    logits = torch.zeros(1, 5, 2, 2, device=DEVICE)
    logits[:, 2:4] = 1.0
    confusion = triton_backend.upsampled_confusion_matrix(logits, torch.ones(1, 3, 40, dtype=torch.uint8, device=DEVICE), 255)
    assert confusion[1].tolist() == [0, 0, 120, 0, 0]
    assert confusion.sum() == 120


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([1e4, -1e4, 9.99e3], device=DEVICE).view(1, 3, 1, 1)
    loss, grad = triton_backend.upsampled_cross_entropy(logits, torch.tensor([[[1]]], device=DEVICE), 255)
    assert loss.item() == pytest.approx(2e4)
    assert grad.ravel().tolist() == pytest.approx([1.0, -1.0, 0.0], abs=1e-4)  # e⁻¹⁰ = 4.5e-5


@pytest.mark.parametrize("largest", [0.0, 1e3])
@pytest.mark.parametrize("label", [5, 200, -1, 2**32])
def test_wrong_label_makes_the_loss_nan(label: int, largest: float) -> None:
    """What the reference raises an error for, with class weights or without; in the confusion matrix it counts nowhere."""
    logits, labels = torch.zeros(1, 5, 2, 2, device=DEVICE), torch.zeros(1, 3, 3, dtype=torch.int64, device=DEVICE)
    logits[0, 3, 0, 0] = largest
    labels[0, 1, 1] = label
    assert triton_backend.upsampled_cross_entropy(logits, labels, 255)[0].isnan()
    assert triton_backend.upsampled_cross_entropy(logits, labels, 255, torch.ones(5, device=DEVICE))[0].isnan()
    assert triton_backend.upsampled_confusion_matrix(logits, labels, 255).sum() == 8


def test_nan_under_ignored_labels_stays_in_the_gradient() -> None:
    """As in PyTorch: the loss is that of the labelled pixels, but the gradient must not look sound."""
    logits, labels = torch.zeros(1, 3, 3, 3, device=DEVICE), torch.zeros(1, 5, 5, dtype=torch.uint8, device=DEVICE)
    logits[0, 1, 0, 0] = torch.nan
    labels[0, :2, :2] = 255  # every pixel that reads the NaN
    loss, grad = triton_backend.upsampled_cross_entropy(logits, labels, 255)
    assert loss.item() == pytest.approx(np.log(3))
    assert grad[0, 1, 0, 0].isnan()
    assert torch.isfinite(grad[0, :, 2, 2]).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_the_cells_around_it(value: float) -> None:
    rng = np.random.default_rng(0)
    logits, labels = draw_tensor(rng, 1, 3, 3, 5), torch.from_numpy(draw_labels(rng, (17, 33), 3, 0.2, 255)[:1]).to(DEVICE)
    sound = triton_backend.upsampled_cross_entropy(logits, labels, 255)[1]
    logits[0, 1, 0, 0] = value
    loss, grad = triton_backend.upsampled_cross_entropy(logits, labels, 255)
    assert loss.isnan()
    assert grad[0, :, :2, :2].isnan().all()
    grad[0, :, :2, :2] = sound[0, :, :2, :2]
    assert torch.equal(grad, sound)


def test_ignored_pixels_of_small_totals_are_no_nan() -> None:
    """Where the largest logits of the corners are far above all logits, an ignored pixel's total is 0."""
    logits = as_tensor(np.array([[500.0, -500.0], [-500.0, 500.0]]).reshape(1, 2, 2, 1))
    labels = torch.full((1, 17, 1), 255, dtype=torch.uint8, device=DEVICE)
    labels[0, 0], labels[0, 16] = 0, 1
    loss, grad = triton_backend.upsampled_cross_entropy(logits, labels, 255)
    assert loss == 0.0
    assert torch.equal(grad, torch.zeros_like(logits))


@pytest.mark.parametrize("batch", [0, 1])
def test_empty_maps(batch: int) -> None:
    """No image, or images without rows: empty maps, and gradients of weights that are 0."""
    size = (3, 4) if batch == 0 else (0, 4)
    rng = np.random.default_rng(0)
    x = draw_map(rng, 5, size, batch=batch, layout="contiguous", normed=True)
    depthwise, pointwise = draw_tensor(rng, 5, 1, 3, 3), draw_tensor(rng, 7, 5, 1, 1)
    raw, _ = triton_backend.depthwise_forward(x, depthwise, (1, 2), statistics=True)
    grad_x, grad_weight = triton_backend.depthwise_backward(raw, raw, None, x, depthwise, (1, 2), need_input=True)
    assert raw.shape == x.raw.shape
    assert_zero_gradients(grad_x, grad_weight)
    out, moments = triton_backend.pointwise_forward([x], pointwise, None, statistics=True)
    (grad_x,), grad_weight = triton_backend.pointwise_backward(out, out, None, [x], pointwise, None, need_input=[True])
    assert out.shape == (batch, 7, *size)
    assert_zero_gradients(grad_x, grad_weight)
    assert triton_backend.normalise(x).shape == x.raw.shape
    assert_zero_gradients(triton_backend.normalise_backward(x.raw, x), torch.zeros(1))
    norm = draw_norm(rng, 7)
    before = norm.running_mean.clone(), norm.running_var.clone()
    assert moments is not None
    triton_backend.fold(moments, norm, count=0, momentum=0.5, eps=EPS)
    assert torch.equal(norm.running_mean, before[0])
    assert torch.equal(norm.running_var, before[1])


def assert_zero_gradients(grad_map: NormedMap | None, grad_weight: Tensor) -> None:
    assert grad_map is not None
    assert grad_map.raw.numel() == 0
    for gradient in (grad_weight, grad_map.scale, grad_map.offset):
        assert gradient is not None
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("size", [(2, 2), (1, 2), (2, 1), (1, 1)], ids=str)
@pytest.mark.parametrize(("batch", "label_size"), [(0, (3, 4)), (2, (0, 4)), (2, (4, 0)), (2, (0, 0))])
@pytest.mark.parametrize("align_corners", [True, False], ids=["corners", "centres"])
def test_no_labels(batch: int, label_size: tuple[int, int], size: tuple[int, int], align_corners: bool) -> None:
    logits, labels = (
        torch.ones(batch, 3, *size, device=DEVICE),
        torch.zeros(batch, *label_size, dtype=torch.uint8, device=DEVICE),
    )
    loss, grad = triton_backend.upsampled_cross_entropy(logits, labels, 255, None, align_corners)
    assert loss == 0.0
    assert torch.equal(grad, torch.zeros_like(logits))
    confusion = triton_backend.upsampled_confusion_matrix(logits, labels, 255, align_corners)
    assert torch.equal(confusion, torch.zeros(3, 3, device=DEVICE).long())


@few_examples
@given(
    readers=st.integers(2, 5),
    size=map_sizes(7),
    channels=channel_counts,
    normed=st.booleans(),
    layout=layouts,
    seed=rng_seeds(),
)
def test_sum_of_gradients(readers: int, size: tuple[int, int], channels: int, normed: bool, layout: Layout, seed: int) -> None:
    rng = np.random.default_rng(seed)
    grads = [draw_map(rng, channels, size, layout=layout, normed=normed) for _ in range(readers)]
    with tiled("small"):
        total = triton_backend.sum_gradients(grads)
    expected = [None if parts[0] is None else sum(map(to_array, parts)) for parts in zip(*grads, strict=True)]
    assert_close(total, expected, bound=0.0)  # multiples of 1/64 are added exactly


def test_a_sum_of_gradients_is_rounded_once() -> None:
    """256 + 1 is 256 in bfloat16, if it is rounded after each addition."""
    grads = [NormedMap(torch.full((1, 1, 1, 1), value, dtype=torch.bfloat16, device=DEVICE)) for value in (256.0, 1.0, 1.0)]
    assert triton_backend.sum_gradients(grads).raw.item() == 258.0


def test_readers_of_one_map_add_their_gradients_in_one_launch() -> None:
    """Three convolutions and a reader that came to nothing: what autograd adds up itself, in one call."""
    rng = np.random.default_rng(0)
    raw, scale, offset = draw_tensor(rng, 2, 3, 4, 5), draw_tensor(rng, 3), draw_tensor(rng, 3)
    weights = [draw_tensor(rng, 4, 3, 1, 1) for _ in range(3)]
    operations = OnKernels(triton_backend)

    def gradients(*, at_once: bool) -> list[Tensor | None]:
        leaves = [tensor.clone().requires_grad_() for tensor in (raw, scale, offset)]
        x = NormedMap(*leaves)
        readers = operations.fan_out(x, 4) if at_once else [x] * 4
        outputs = [operations.pointwise_conv([readers[i]], weight, None).raw for i, weight in enumerate(weights)]
        torch.stack(outputs).square().sum().backward()  # type: ignore[no-untyped-call]
        return [leaf.grad for leaf in leaves]

    with mock.patch.object(triton_backend, "sum_gradients", wraps=triton_backend.sum_gradients) as summed:
        expected = gradients(at_once=False)
        assert summed.call_count == 0
        actual = gradients(at_once=True)
        assert summed.call_count == 1
    for gradient, wanted in zip(actual, expected, strict=True):
        assert wanted is not None
        assert relative_error(gradient, to_array(wanted)) < CLOSE


@pytest.mark.parametrize("readers", [1, 3])
def test_a_map_without_gradient_or_with_one_reader_is_handed_on(readers: int) -> None:
    x = NormedMap(draw_tensor(np.random.default_rng(0), 1, 2, 3, 4).requires_grad_(readers == 1))
    assert all(copy.raw is x.raw for copy in OnKernels(triton_backend).fan_out(x, readers))


def test_weights_that_were_rounded_in_advance_give_the_same_bits() -> None:
    """Both products of two layers, forward and backward; inside, nothing is rounded any more, and nothing is left behind."""
    rng = np.random.default_rng(0)
    layers = [
        (draw_map(rng, channels, (4, 5), layout="channels_last", normed=True), draw_tensor(rng, outputs, channels, 1, 1))
        for channels, outputs in ((20, 33), (70, 3))
    ]

    def results() -> list[Any]:
        found: list[Any] = []
        for x, weight in layers:
            with torch.autocast(DEVICE, torch.float16):
                out, _ = triton_backend.pointwise_forward([x], weight, None, statistics=False)
                grads, grad_weight = triton_backend.pointwise_backward(out, out, None, [x], weight, None, need_input=[True])
            found += [out, grad_weight, *(grads[0] or ())]
        return found

    launched: list[str] = []
    launch = triton_backend._launch

    def noting(kernel: Any, *arguments: Any, **constants: Any) -> None:
        launched.append(kernel.fn.__name__)
        launch(kernel, *arguments, **constants)

    with mock.patch.object(triton_backend, "_launch", noting):
        expected = results()
        assert launched.count("pointwise_operands_kernel") == 4
        launched.clear()
        with triton_backend.prepared_products([weight for _, weight in layers], torch.float16):
            actual = results()
        assert launched.count("pointwise_operands_kernel") == 1
    assert triton_backend._prepared == {}
    for found, wanted in zip(actual, expected, strict=True):
        assert torch.equal(found, wanted)


def test_second_call_gives_the_same_bits() -> None:
    rng = np.random.default_rng(0)
    x, plain = (draw_map(rng, 19, (5, 4), layout="contiguous", normed=normed) for normed in (True, False))
    depthwise, pointwise = draw_tensor(rng, 19, 1, 3, 3), draw_tensor(rng, 21, 38, 1, 1)
    grad, dropout = draw_tensor(rng, 2, 21, 5, 4), Dropout(0.1, torch.tensor([5], device=DEVICE))
    unfolded = draw_unfolded(rng, 19)
    logits, labels = draw_tensor(rng, 2, 19, 3, 2), torch.from_numpy(draw_labels(rng, (8, 9), 19, 0.1, 255)).to(DEVICE)
    calls: list[Callable[[], Any]] = [
        lambda: triton_backend.depthwise_forward(x, depthwise, (2, 3), statistics=True),
        lambda: triton_backend.depthwise_backward(x.raw, plain.raw, unfolded, x, depthwise, (2, 3), need_input=True),
        lambda: triton_backend.pointwise_forward([x, plain], pointwise, dropout, statistics=True),
        lambda: triton_backend.pointwise_backward(grad, grad, None, [x, plain], pointwise, dropout, need_input=[True, True]),
        lambda: triton_backend.normalise_backward(plain.raw, x),
        lambda: triton_backend.upsampled_cross_entropy(logits, labels, 255),
    ]
    with tiled("small"):
        for call in calls:
            first, second = list(tensors(call())), list(tensors(call()))
            assert first
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for child in tree:
            yield from tensors(child)


@pytest.mark.parametrize("rate", [(1, 1), (3, 2)], ids=str)
def test_separable_conv_of_the_fast_path_runs_on_these_kernels(rate: tuple[int, int]) -> None:
    """A training step through autograd: output, gradients and running statistics."""
    rng = np.random.default_rng(0)
    inputs = rounded((rng.standard_normal((2, 5, 6, 7)), random_separable(5, 4, rng)), torch.float32)
    cotangent = rng.standard_normal((2, 4, 6, 7))
    functions = separable.atrous_separable_conv, separable.atrous_separable_conv_backward
    expected = reference_step(*functions, inputs, cotangent, rate=rate, training=True)
    calls = mock.Mock(wraps=triton_backend.pointwise_backward)
    with kernels.using(triton_backend), mock.patch.object(triton_backend, "pointwise_backward", calls):
        actual = torch_step(
            lambda x, weights: atrous_separable_conv(x, weights, rate=rate, training=True),
            to_tensors(inputs, DEVICE, dtype=torch.float32),
            cotangent,
        )
    assert calls.called
    assert_equal_steps(actual, expected, CLOSE)


@few_examples
@given(map_sizes(7), channel_counts, map_sizes(9), layouts, st.booleans(), rng_seeds())
def test_plane_product(
    size: tuple[int, int], channels: int, out_size: tuple[int, int], layout: Layout, normed: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = draw_map(rng, channels, size, layout=layout, normed=normed)
    rows, columns = (draw_tensor(rng, out, extent) for out, extent in zip(out_size, size, strict=True))
    actual = triton_backend.plane_product(x, rows, columns)
    assert actual.is_contiguous(memory_format=triton_backend.memory_format)
    assert_close(actual, to_array(rows) @ of(x).value() @ to_array(columns).T)


@pytest.mark.parametrize("variant", ["sliding_window", "grid_cells"])
def test_pyramid_pooling_of_the_fast_path_runs_on_these_kernels(variant: PoolingVariant) -> None:
    """Also under autocast, in which PyTorch's resize would give float32 maps."""
    rng = np.random.default_rng(0)
    inputs = rounded((rng.standard_normal((2, 5, 6, 7)), random_pointwise(5, 4, rng)), torch.float32)
    cotangent = rng.standard_normal((2, 4, 6, 7))
    options: dict[str, Any] = {"grid_size": (2, 4), "training": True, "variant": variant}
    expected = reference_step(pooling.pyramid_pooling, pooling.pyramid_pooling_backward, inputs, cotangent, **options)
    calls = mock.Mock(wraps=triton_backend.plane_product)
    tensors = to_tensors(inputs, DEVICE, dtype=torch.float32)
    with kernels.using(triton_backend), mock.patch.object(triton_backend, "plane_product", calls):
        actual = torch_step(lambda x, weights: pyramid_pooling(x, weights, **options), tensors, cotangent)
        with torch.autocast(DEVICE, torch.float16), torch.no_grad():
            half = pyramid_pooling(*tensors, **options)
    assert calls.call_count == 6
    assert_equal_steps(actual, expected, CLOSE)
    assert half.dtype == torch.float16
    assert relative_error(half, expected.output) <= 3 * 2.0**-11


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("autocast", [None, torch.float16], ids=str)
def test_upsampled_l1_of_the_fast_path_runs_on_these_kernels(layout: Layout, autocast: torch.dtype | None) -> None:
    """Resize and its gradient, in float32 also under autocast; half of the targets are not measured."""
    rng = np.random.default_rng(0)
    outputs, targets = rounded((rng.standard_normal((2, 1, 6, 7)), rng.standard_normal((2, 21, 25))), torch.float32)
    targets[rng.random(targets.shape) < 0.5] = np.nan
    expected = reference_step(
        lambda x: np.asarray(l1.upsampled_l1(x, targets)),
        lambda _, x: (l1.upsampled_l1_backward(x, targets),),
        (outputs,),
        np.ones(()),
    )
    calls = mock.Mock(wraps=triton_backend.plane_product)
    on_device = torch.from_numpy(targets).to(DEVICE)
    tensors = to_tensors((outputs,), DEVICE, layout, torch.float32)
    with kernels.using(triton_backend), mock.patch.object(triton_backend, "plane_product", calls):
        actual = torch_step(lambda x: upsampled_l1(x, on_device), tensors, np.ones(()), autocast)
    assert calls.call_count == 2
    assert_equal_steps(actual, expected, CLOSE)


def test_autocast_computes_in_lower_precision() -> None:
    """float16 has 11 bits: rounding of both operands and of the result, 2⁻¹¹ each. (The interpreter has no bfloat16.)"""
    rng, bound = np.random.default_rng(0), 3 * 2.0**-11
    full, half = (draw_map(rng, channels, (5, 4), layout="contiguous", normed=True) for channels in (20, 3))
    maps, weight, grad = (
        [full, half._replace(raw=half.raw.half())],
        draw_tensor(rng, 17, 23, 1, 1),
        draw_tensor(rng, 2, 17, 5, 4),
    )
    with torch.autocast(DEVICE, torch.float16):
        depthwise = draw_tensor(rng, 20, 1, 3, 3)
        middle, _ = triton_backend.depthwise_forward(full, depthwise, (1, 1), statistics=False)
        grad_middle = draw_tensor(rng, 2, 20, 5, 4).half()
        grad_full, grad_depthwise = triton_backend.depthwise_backward(
            grad_middle, middle, None, full, depthwise, (1, 1), need_input=True
        )
        raw, _ = triton_backend.pointwise_forward([full], weight[:, :20], None, statistics=False)
        both, _ = triton_backend.pointwise_forward(maps, weight, None, statistics=False)
        grad_maps, grad_weight = triton_backend.pointwise_backward(
            grad.half(), both, None, maps, weight, None, need_input=[True, True]
        )
    assert middle.dtype == raw.dtype == both.dtype == torch.float16
    assert grad_weight.dtype == torch.float32
    assert_close(middle, separable.depthwise_conv(of(full).value(), to_array(depthwise), rate=(1, 1)), bound)
    grad_value, expected_depthwise = separable.depthwise_conv_backward(
        to_array(grad_middle), of(full).value(), to_array(depthwise), rate=(1, 1)
    )
    assert_close(grad_depthwise, expected_depthwise, bound)
    assert_close(grad_full, of(full).backward(grad_value), bound)
    assert_close(raw, reference_pointwise_conv(of(full).value(), to_array(weight[:, :20])), bound)
    assert_close(both, reference_pointwise_conv(concatenated(maps), to_array(weight)), bound)
    grad_concat, expected_weight = pointwise_conv_backward(to_array(grad), concatenated(maps), to_array(weight))
    assert_close(grad_weight, expected_weight, bound)
    assert grad_maps[0] is not None
    assert_close(grad_maps[0].raw, of(full).backward(grad_concat[:, :20]).raw, bound)


@few_examples
@given(
    tilings,
    st.integers(0, 3),
    map_sizes(5),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    channel_counts,
    st.builds(Grid, st.integers(1, 5), st.booleans()),
    st.sampled_from(((torch.float16, torch.float16), (torch.float16, torch.float64), (torch.float32, torch.float32))),
    st.sampled_from((torch.uint8, torch.int16, torch.int64, torch.float32)),
    rng_seeds(),
)
def test_crops_equal_windows(
    tiling: str,
    batch: int,
    size: tuple[int, int],
    crop_part: tuple[float, float],
    channels: int,
    grid: Grid,
    dtypes: tuple[torch.dtype, torch.dtype],
    label_dtype: torch.dtype,
    seed: int,
) -> None:
    """Values of every dtype as they are, NaN and infinity too; labels may be larger than what features cover."""
    rng = np.random.default_rng(seed)
    features, labels = draw_images(rng, 3, channels, size, grid, dtypes[0], label_dtype)
    crop = tuple(1 + int(part * (extent - 1)) for part, extent in zip(crop_part, size, strict=True))
    draws = rng.integers(0, 2**31, (3, batch))
    draws[rng.random(draws.shape) < 0.3] = rng.choice([0, 2**31 - 1])  # the first place, or the last
    with tiled(tiling):
        actual = triton_backend.crops(features, labels, on_device(draws), (crop[0], crop[1]), grid, dtypes[1])
    expected = windows(features, labels, draws, (crop[0], crop[1]), grid)
    assert actual[0].is_contiguous(memory_format=triton_backend.memory_format)
    assert (actual[0].dtype, actual[1].dtype) == (dtypes[1], label_dtype)
    assert_equal_values(actual[0], expected[0].to(dtypes[1]))
    assert_equal_values(actual[1], expected[1])


def draw_images(
    rng: np.random.Generator,
    images: int,
    channels: int,
    size: tuple[int, int],
    grid: Grid,
    dtype: torch.dtype = torch.float32,
    label_dtype: torch.dtype = torch.uint8,
) -> tuple[Tensor, Tensor]:
    """Features of all images as a cache holds them on a GPU, some of them not finite, and labels."""
    values = rng.standard_normal((images, channels, *size))
    values[rng.random(values.shape) < 0.1] = rng.choice([np.nan, np.inf, -np.inf])
    features = torch.from_numpy(values).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
    label_size = [extent + rng.integers(3) for extent in grid.pixels(size)]
    labels = torch.from_numpy(rng.integers(0, 256, (images, *label_size))).to(DEVICE, label_dtype)
    if label_dtype.is_floating_point:
        labels[labels > 200] = torch.nan
    return features, labels


def on_device(draws: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(draws).to(DEVICE, torch.int32)


def windows(
    features: Tensor, labels: Tensor, draws: np.ndarray[Any, Any], crop: tuple[int, int], grid: Grid
) -> tuple[Tensor, Tensor]:
    """The same by slices, one crop after the other."""
    limits = [len(features), *(extent - part + 1 for extent, part in zip(features.shape[2:], crop, strict=True))]
    window, stride = grid.pixels(crop), grid.stride
    batch, targets = features.new_zeros(0, features.shape[1], *crop), labels.new_zeros(0, *window)
    for places in draws.T:
        image, top, left = (int(draw) * limit // 2**31 for draw, limit in zip(places, limits, strict=True))
        batch = torch.cat([batch, features[image, None, :, top : top + crop[0], left : left + crop[1]]])
        rows = labels[image, None, stride * top : stride * top + window[0]]
        targets = torch.cat([targets, rows[:, :, stride * left : stride * left + window[1]]])
    return batch, targets


def assert_equal_values(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_crops_reach_every_picture_and_place_equally_often() -> None:
    count = 300
    features = torch.arange(2 * 4 * 5.0, device=DEVICE).view(2, 1, 4, 5)
    labels, draws = (
        torch.zeros(2, 4, 5, device=DEVICE),
        torch.randint(2**31, (3, count), dtype=torch.int32, generator=torch.Generator().manual_seed(0)),
    )
    batch, _ = triton_backend.crops(features, labels, draws.to(DEVICE), (2, 3), Grid(1), torch.float32)
    places, counts = batch[:, 0, 0, 0].unique(return_counts=True)  # type: ignore[no-untyped-call]
    assert len(places) == 2 * 3 * 3
    expected = count / len(places)
    assert ((counts - expected) ** 2 / expected).sum() < chi2.isf(1e-4, 17)  # false alarm: one seed in 10,000


def test_rates_are_those_of_the_iterations_and_then_the_last() -> None:
    rates, done, rate = (
        torch.rand(4, device=DEVICE),
        torch.zeros((), dtype=torch.int64, device=DEVICE),
        torch.ones((), device=DEVICE),
    )
    for expected in [*rates, rates[3], rates[3]]:
        triton_backend.next_rate(rates, done, rate)
        assert rate == expected
    assert done == 6


def cached(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Features and labels of three images as a search has them: float16, uint8."""
    features, _ = draw_images(rng, 3, 3, (4, 5), steps.GRID, torch.float16)
    labels = rng.choice([0, 1, 2, 3, 255], (3, *steps.GRID.pixels((4, 5)))).astype(np.uint8)
    return features.nan_to_num(0.5, 0.5, 0.5), torch.from_numpy(labels).to(DEVICE)


def make_step(head: SegmentationHead, rng: np.random.Generator, **settings: Any) -> TrainStep:
    return steps.make_step(head, *cached(rng), crop=(2, 3), batch_size=2, **settings)


def test_training_on_these_kernels_follows_plain_training() -> None:
    """Two iterations with crops that a kernel cuts, and rates out of a table, in float32."""
    drawn: list[tuple[Tensor, Tensor]] = []
    head, other = (steps.make_head(DEVICE).float() for _ in range(2))
    step = make_step(head, np.random.default_rng(0), iterations=3)
    crops, rate = mock.Mock(wraps=triton_backend.crops), mock.Mock(wraps=triton_backend.next_rate)

    def recording(dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        drawn.append(TrainStep.draw(step, dtype))
        return drawn[-1]

    with (
        kernels.using(triton_backend),
        mock.patch.multiple(triton_backend, crops=crops, next_rate=rate),
        mock.patch.object(step, "draw", recording),
    ):
        losses = [step().item() for _ in range(2)]
    assert (crops.call_count, rate.call_count) == (2, 2)
    assert {features.dtype for features, _ in drawn} == {torch.float32}
    np.testing.assert_allclose(losses, steps.PlainStep(other, 3).run(iter(drawn)), rtol=1e-5)
    assert step._rate.item() == pytest.approx(0.01 * (2 / 3) ** 0.9)
    for (name, tensor), expected in zip(head.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.allclose(tensor, expected, rtol=1e-4, atol=1e-6), name


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes PyTorch's operations that launch something, and our kernels."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("empty", "fill_"):  # allocations, which are poisoned here
            self.seen.append(name)
        return func(*args, **(kwargs or {}))

    def launch(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        self.seen.append(kernel.fn.__name__)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_an_iteration_begins_with_four_launches(precision: Precision) -> None:
    step = make_step(steps.make_head(DEVICE).float(), np.random.default_rng(0), precision=precision)
    stopped = mock.Mock(side_effect=InterruptedError, parameters=step.head.parameters)
    with kernels.using(triton_backend), mock.patch.object(step, "head", stopped):
        assert len(step._rates) == 7  # once, before a graph is captured
        operations = Operations()
        launched = mock.patch.object(triton_backend, "_launch", operations.launch)
        with operations, launched, pytest.raises(InterruptedError):
            step._iterate()
    assert operations.seen == ["schedule_kernel", "randint", "crops_kernel", "pointwise_operands_kernel"]


def test_gathered_crops_are_those_of_the_kernel() -> None:
    """A GPU without Triton draws the same crops from the same seed."""
    step, rng = make_step(steps.make_head(DEVICE), np.random.default_rng(0)), np.random.default_rng(1)
    draws = on_device(rng.integers(0, 2**31, (3, 2)))
    expected = triton_backend.crops(step._features, step._labels, draws, (2, 3), steps.GRID, torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(step._gathered(draws), expected, strict=True))


def test_crops_keep_the_dtype_of_the_cache_under_autocast_alone() -> None:
    """In the head's own for who draws them otherwise; features in another layout are not cut by rows."""
    rng = np.random.default_rng(0)
    with kernels.using(triton_backend):
        for precision, dtype in (("bfloat16", torch.float16), ("float32", torch.float32)):
            step = make_step(steps.make_head(DEVICE).float(), rng, precision=precision)
            assert step._input_dtype() == dtype
            assert step.draw(dtype)[0].dtype == dtype
            assert step.draw()[0].dtype == torch.float32
        step._features = step._features.contiguous()
        with mock.patch.object(triton_backend, "crops") as crops:
            step.draw()
        assert not crops.called
    with kernels.using(None):
        step = make_step(steps.make_head(DEVICE).float(), rng, precision="bfloat16")
        assert step._input_dtype() == torch.float32


CELL_OF_FEATURES = Cell.from_json(
    '[{"op": "conv", "kernel": 3, "rate": [1, 3], "input": -1}, {"op": "conv", "kernel": 1, "input": -1},'
    ' {"op": "pyramid_pooling", "grid_size": [2, 1], "input": -1}]'
)


def test_features_of_half_the_bytes_give_the_same_results() -> None:
    """Of a separable, a 1×1 and a pooled branch, all of the same features: the loss, gradients and running statistics."""
    results = []
    rng = np.random.default_rng(0)
    features, labels = draw_tensor(rng, 2, 3, 3, 4), torch.from_numpy(draw_labels(rng, (9, 10), 4, 0.1, 255)).to(DEVICE)
    for dtype in (torch.float16, torch.float32):
        torch.manual_seed(0)
        context = DensePredictionCell(CELL_OF_FEATURES, 3, branch_channels=5, cell_channels=5, dropout_rate=0.0)
        head = SegmentationHead(context, 4).to(DEVICE).train()
        with kernels.using(triton_backend), torch.autocast(DEVICE, torch.bfloat16):
            logits = head(features.to(dtype))
            loss = fast_cross_entropy(logits.float(), labels)
        with kernels.using(triton_backend):
            loss.backward()  # type: ignore[no-untyped-call]
        gradients = [parameter.grad for parameter in head.parameters()]
        results.append([logits, *gradients, *head.buffers()])
    with torch.autocast(DEVICE, torch.bfloat16):
        means = triton_backend.plane_product(
            NormedMap(features.half()), *(torch.ones(1, size, device=DEVICE) for size in (3, 4))
        )
    assert means.dtype == torch.float32  # to be rounded by the convolution alone
    assert results[0][0].std() > 0
    for half, full in zip(*results, strict=True):
        assert half is not None
        assert relative_error(half, to_array(full)) < CLOSE  # tiles, and so the order of sums, depend on the dtype


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: triton_backend.depthwise_forward(x, torch.ones(4, 1, 3, 3), (1, 1), statistics=False), "rate >= 1"),
        (lambda x: triton_backend.depthwise_forward(x, torch.ones(3, 1, 3, 3), (0, 1), statistics=False), "rate >= 1"),
        (lambda x: triton_backend.pointwise_forward([x, x], torch.ones(4, 3, 1, 1), None, statistics=False), "channels"),
        (lambda x: triton_backend.upsampled_cross_entropy(x.raw, torch.zeros(2, 3, 3).long(), 255), "logits"),
        (
            lambda x: triton_backend.upsampled_cross_entropy(
                torch.empty(1, 4, 2**15, 2**14, device="meta"), torch.zeros(1, 3, 3).long(), 255
            ),
            "32 bits",
        ),
        (lambda x: triton_backend.upsampled_confusion_matrix(x.raw[..., :0], torch.zeros(1, 3, 3).long(), 255), "no logits"),
        (lambda x: crops_of(x.raw, labels=torch.zeros(1, 6, 7)), "labels"),
        (lambda x: crops_of(x.raw, labels=torch.zeros(2, 7, 7)), "labels"),
        (lambda x: crops_of(x.raw, crop=(5, 1)), "fits"),
        (lambda x: crops_of(x.raw[:0], labels=torch.zeros(0, 7, 7)), "fits"),
        (lambda x: crops_of(x.raw, draws=torch.zeros(3, 2, dtype=torch.int64)), "draws"),
        (lambda x: crops_of(x.raw, labels=torch.zeros(1, 7, 14)[..., ::2]), "contiguous"),
    ],
)
def test_wrong_shapes_are_refused(call: Callable[[NormedMap], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(NormedMap(torch.ones(1, 3, 4, 4)))


def crops_of(features: Tensor, **others: Any) -> Any:
    given: dict[str, Any] = {
        "labels": torch.zeros(1, 7, 7),
        "draws": torch.zeros(3, 2, dtype=torch.int32),
        "crop": (2, 2),
    } | others
    features = features.contiguous(memory_format=torch.channels_last)
    return triton_backend.crops(features, **given, grid=Grid(2), dtype=torch.float32)


@pytest.mark.parametrize(
    ("sizes", "moments", "values"),
    [
        (2, [[1.0, 2.0], [2.0, 0.0], [5.0, 0.0]], [0.0, 2.0, 2.0, 2.0, 5.0]),
        ([1.0, 3.0, 1.0], [[1.0, 0.0], [2.0, 2.0], [5.0, 0.0]], [1.0, 1.0, 2.0, 3.0, 5.0]),
    ],
)
def test_fold_needs_no_more_than_its_moments(
    sizes: int | list[float], moments: list[list[float]], values: list[float]
) -> None:
    """Tiles of two with a rest of one, and tiles of sizes of their own; mean and M2 of each by hand."""
    partials = torch.tensor(moments, device=DEVICE).view(3, 2, 1)
    one = torch.ones(1, device=DEVICE)
    norm = BatchNorm(one * 2.0, one * 3.0, one * 0.0, one * 1.0)
    of_tiles = Moments(partials, sizes if isinstance(sizes, int) else torch.tensor(sizes, device=DEVICE))
    folded: Folded = triton_backend.fold(of_tiles, norm, count=5, momentum=0.5, eps=EPS)
    assert folded.mean.item() == pytest.approx(np.mean(values))
    assert folded.scale.item() == pytest.approx(2.0 / np.sqrt(np.var(values) + EPS))
    assert norm.running_var.item() == pytest.approx(0.5 + 0.5 * np.var(values, ddof=1))
