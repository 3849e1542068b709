"""Single operations at the sizes of the benchmark, as launches: their cost beside a copy of the maps they read and write."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.counted.iteration import TritonLaunch
from bench.kernel_calls import CHANNELS, MAP_SIZES, RATE, KernelCalls
from bench.launch_trial import launched_by, precision_of_a_gpu
from fast.kernels import NormedMap
from fast.kernels import triton as kernels


def depthwise(calls: KernelCalls) -> None:
    """Of a map without a norm, as eager PyTorch's convolution."""
    kernels.depthwise_forward(NormedMap(calls.raw()), calls.tensor(CHANNELS, 1, 3, 3), RATE, statistics=False)


def separable(calls: KernelCalls) -> None:
    """With frozen norms: the map between its two convolutions is written once."""
    raw, _ = kernels.depthwise_forward(calls.map(), calls.tensor(CHANNELS, 1, 3, 3), RATE, statistics=False)
    normed = NormedMap(raw, *calls.vectors(2))
    kernels.pointwise_inference([normed], calls.tensor(CHANNELS, CHANNELS, 1, 1), calls.vectors(2))


OPERATIONS: dict[str, Callable[[KernelCalls], None]] = {
    "depthwise, inference": depthwise,
    "separable, inference": separable,
}


def operations() -> Iterator[tuple[str, TritonLaunch]]:
    """Each launch of each operation in both dtypes and sizes, with the operation's name."""
    for operation, call in OPERATIONS.items():
        for dtype in (torch.bfloat16, torch.float32):
            for size in MAP_SIZES.values():
                name = f"{operation}, {str(dtype).removeprefix('torch.')}, {size[0]}×{CHANNELS}×{size[1]}×{size[2]}"
                for launch in launches_of(call, KernelCalls(dtype, size, "cpu", drawn=False)):
                    yield name, launch


def launches_of(call: Callable[[KernelCalls], None], calls: KernelCalls) -> list[TritonLaunch]:
    """What the backend launches in this call."""
    found: list[TritonLaunch] = []

    def launched(kernel: Any, programs: int, launch: Any, arguments: tuple[Any, ...], **constants: Any) -> None:
        found.append(TritonLaunch(kernel, programs, launch, arguments, constants))

    with launched_by(launched), precision_of_a_gpu():
        call(calls)
    return found
