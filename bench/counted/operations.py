"""Single operations at the sizes of the benchmark, as launches: their cost beside a copy of the maps they read and write."""

from collections.abc import Callable, Iterator

import torch

from bench.counted.iteration import TritonLaunch, recorded
from bench.kernel_calls import CHANNELS, MAP_SIZES, RATE, KernelCalls
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
                launches: list[TritonLaunch] = []
                with recorded(launches):
                    call(KernelCalls(dtype, size, "cpu", drawn=False))
                yield from ((name, launch) for launch in launches)
