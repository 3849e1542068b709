"""Compiles every kernel for a GPU that need not be here, with the arguments and block sizes of real calls; prints JSON rows.

    python -m tests.fast.kernels.compile_report 90 bfloat16 float32 --variants

The backend's own functions run on CPU tensors, with a launch that compiles (for architecture sm_90 above) instead of running.
To be run apart from other tests: it replaces Triton's driver, and needs TRITON_INTERPRET unset.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.kernel_calls import CHANNELS, CLASSES, MAP_SIZES, RATE, Call, KernelCalls
from bench.launch_trial import launched_by, precision_of_a_gpu
from fast.kernels import NormedMap, Unfolded
from fast.kernels import triton as triton_backend
from fast.kernels.triton import compilation
from fast.kernels.triton.launches import DEFAULT
from reference.grid import Grid
from reference.upsampled_cross_entropy import IGNORE_INDEX

KERNELS = dict.fromkeys(kernel for kernel, _, _ in DEFAULT if kernel != "sum_partials")  # that one is launched by others


def calls(dtype: torch.dtype, sizes: tuple[int, int, int], variants: bool) -> Iterator[Call]:
    """Every function of the backend at the paper's channels; with the variants of a real network."""
    made = KernelCalls(dtype, sizes, "cpu", drawn=False)
    for kernel in KERNELS:
        of_kernel = (call for _, call in getattr(made, kernel)())
        yield from of_kernel if variants else itertools.islice(of_kernel, 1)  # of products: the projection
    maps, weight, _ = made.product(1, CHANNELS)
    yield lambda: triton_backend.pointwise_inference(maps, weight, made.vectors(2))
    yield lambda: triton_backend.next_rate(made.tensor(9), made.integers(torch.int64), made.tensor())
    if dtype == torch.bfloat16:
        for features in (torch.float16, torch.float32):  # of a cache, of others
            yield partial(autocast_convolutions, replace(made, dtype=features), need_input=features == torch.float32)
    if variants:
        plain, depthwise = NormedMap(made.raw(320)), made.tensor(320, 1, 3, 3)
        yield lambda: triton_backend.depthwise_forward(plain, depthwise, RATE, statistics=True)
        # Channels that are no multiple of 16, with a norm that uses running statistics.
        odd, odd_weight = NormedMap(made.raw(250), made.tensor(250), made.tensor(250)), made.tensor(250, 1, 3, 3)
        yield lambda: triton_backend.depthwise_forward(odd, odd_weight, RATE, statistics=False)
        yield lambda: triton_backend.depthwise_backward(odd.raw, odd.raw, None, odd, odd_weight, RATE, need_input=True)
        yield from (partial(converting_crops, made, *kinds) for kinds in CROPS)
        for loss in (KernelCalls.mean_loss, KernelCalls.confusion_matrix):
            yield from (call for _, call in loss(replace(made, classes=150)))
        logits, labels = made.logits_and_labels()
        for weights in (made.tensor(CLASSES), None):
            for align_corners in (True, False):
                arguments = (logits, labels, IGNORE_INDEX, weights, align_corners)
                yield partial(triton_backend.upsampled_cross_entropy, *arguments)
        yield partial(triton_backend.upsampled_confusion_matrix, logits, labels, IGNORE_INDEX, align_corners=False)


def autocast_convolutions(made: KernelCalls, *, need_input: bool) -> None:
    x, weight, unfolded = NormedMap(made.raw(320)), made.tensor(CHANNELS, 320, 1, 1), Unfolded(*made.vectors(4))
    depthwise, of_features = made.tensor(320, 1, 3, 3), Unfolded(*(made.tensor(320) for _ in range(4)))
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = triton_backend.depthwise_forward(x, depthwise, RATE, statistics=True)
        triton_backend.depthwise_backward(out, out, of_features, x, depthwise, RATE, need_input=False)
        out, _ = triton_backend.pointwise_forward([x], weight, None, statistics=True)
        triton_backend.pointwise_backward(out, out, unfolded, [x], weight, None, need_input=[need_input])


CROPS = ((320, torch.uint8), (20, torch.int64), (19, torch.float32))  # channels, of vectors or not, and the labels' dtype


def converting_crops(made: KernelCalls, channels: int, label_dtype: torch.dtype) -> None:
    """Of a cache of 16 bits, in the dtype of the network."""
    n, height, width = made.sizes
    features = made.tensor(2, channels, height, width, dtype=torch.float16, memory_format=torch.channels_last)
    labels = torch.empty(2, 2 * height, 2 * width, dtype=label_dtype)
    draws = made.integers(torch.int32, 3, n)
    triton_backend.crops(features, labels, draws, (height // 2, width), Grid(2, align_corners=False), made.dtype)


def report(architecture: int, dtypes: list[torch.dtype], variants: bool) -> list[dict[str, Any]]:
    """One row for each compilation."""
    compilation.choose_absent_gpu(architecture)
    compiled: dict[str, tuple[dict[str, str], Any]] = {}

    def compile_only(kernel: Any, programs: int, launch: Any, arguments: tuple[Any, ...], **constants: Any) -> None:
        binary = compilation.compiled(kernel, programs, launch, arguments, **constants)
        dtype = next(str(x.dtype) for x in tree_leaves(arguments) if isinstance(x, Tensor))
        name = {"file": kernel.fn.__module__.rpartition(".")[2], "kernel": f"{kernel.fn.__name__} {dtype} {constants}"}
        compiled[binary.hash] = (name, binary)

    with launched_by(compile_only):
        for dtype in dtypes:
            for sizes in MAP_SIZES.values() if variants else (MAP_SIZES["small"],):
                for call in calls(dtype, sizes, variants):
                    call()
        if torch.float32 in dtypes:  # as on a GPU whose user left PyTorch's convolutions as they are
            with precision_of_a_gpu():
                for call in calls(torch.float32, MAP_SIZES["small"], variants=False):
                    call()
    return [{**name, **compilation.usage(binary)} for name, binary in compiled.values()]


if __name__ == "__main__":
    names = [name for name in sys.argv[2:] if name != "--variants"]
    print(json.dumps(report(int(sys.argv[1]), [getattr(torch, name) for name in names], "--variants" in sys.argv)))
