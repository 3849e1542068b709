"""Every launch of a training iteration, in order, as a GPU would get it: traced on CPU tensors, with nothing computed."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.cases import OURS, DType
from bench.launch_trial import launched_by, precision_of_a_gpu
from bench.training_cases import ProxyCase
from fast import kernels
from fast.kernels import triton as triton_backend
from fast.kernels.triton.launches import Launch
from fast.segmentation import SegmentationHead
from fast.train_step import TrainStep
from reference.grid import Grid


class TritonLaunch(NamedTuple):
    """A launch of a Triton kernel, as the backend makes it."""

    kernel: Any
    programs: int
    launch: Launch
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]

    @property
    def name(self) -> str:
        name: str = self.kernel.fn.__name__
        return name

    def named_arguments(self) -> dict[str, Any]:
        """All arguments by the kernel's names, constants included."""
        return dict(zip(self.kernel.arg_names, self.arguments, strict=False)) | dict(self.constants)


class TorchOperation(NamedTuple):
    """An operation of PyTorch that launches a kernel."""

    name: str
    out: str  # dtype and shape
    moved_bytes: int  # of its arguments and results


Node = TritonLaunch | TorchOperation

# Operations that launch nothing.
_VIEWS = re.compile(
    r"view|permute|select|slice|unsqueeze|expand|transpose|t|unbind|_unsafe_view|as_strided|alias|detach|squeeze|split"
    r"|split_with_sizes|(new_)?empty(_like|_strided)?|_?reshape(_alias)?|lift_fresh|is_same_size"
)


def iteration(case: ProxyCase, dtype: DType) -> list[Node]:
    """The launches of a second iteration, when momentum is there. Needs a process in which Triton compiles, not interprets."""
    nodes: list[Node] = []
    with kernels.using(triton_backend), recorded(nodes):
        step = _step_of(case, dtype)
        step._iterate()
        nodes.clear()
        with _Recorded(nodes):
            step._iterate()
    return nodes


@contextlib.contextmanager
def recorded(nodes: list[Any]) -> Iterator[None]:
    """Inside, the backend's launches are added to the list instead of being made, with float32 products as on a GPU."""

    def launched(kernel: Any, programs: int, launch: Launch, arguments: tuple[Any, ...], **constants: Any) -> None:
        if programs > 0:
            nodes.append(TritonLaunch(kernel, programs, launch, arguments, constants))

    with precision_of_a_gpu(), launched_by(launched):
        yield


def _step_of(case: ProxyCase, dtype: DType) -> TrainStep:
    shape = (case.images, case.in_channels, *(extent + case.margin for extent in case.crop))
    features = torch.zeros(shape, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(case.images, *replace(case, crop=(shape[2], shape[3])).label_size, dtype=torch.uint8)
    return TrainStep(
        cast(SegmentationHead, case.head(OURS)),
        features,
        labels,
        grid=Grid(16),
        crop=case.crop,
        batch_size=case.batch,
        iterations=1000,
        precision="bfloat16" if dtype == "bfloat16" else "float32",
    )


class _Recorded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what PyTorch launches."""

    def __init__(self, nodes: list[Node]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes = nodes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        if tensors and not _VIEWS.fullmatch(name):
            moved = sum({x.data_ptr(): x.numel() * x.element_size() for x in tensors}.values())
            first = next((x for x in tree_leaves(out) if isinstance(x, Tensor)), tensors[0])
            self.nodes.append(TorchOperation(name, described(first), moved))
        return out


def described(x: Tensor) -> str:
    """dtype and shape."""
    return f"{str(x.dtype).removeprefix('torch.')} {'×'.join(map(str, x.shape)) or 'scalar'}"
