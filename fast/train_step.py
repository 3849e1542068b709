"""One iteration of the proxy task's training (paper, section 3.3): crops, forward, loss, backward, a step.

On CUDA the whole iteration, with the drawing of crops and the learning rate, is one graph: captured once per cell, then
replayed without Python. It begins with four launches: the next learning rate out of a table, one draw of random numbers, one
kernel that cuts the crops, one that rounds weights. On a CPU the same calls run one by one, and the host draws and cuts.
"""

import ctypes
import functools
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, assert_never

import torch
from torch import Tensor

from fast.batch_norm import counted_at_once
from fast.dense_prediction_cell import decays
from fast.kernels import IterationKernels, iteration_kernels_for
from fast.learning_rate import LearningRate, Schedule
from fast.random_sequence import RandomSequence
from fast.segmentation import SegmentationHead
from fast.upsampled_cross_entropy import upsampled_cross_entropy
from reference.grid import Grid

Precision = Literal["auto", "float32", "bfloat16"]
OptimizerName = Literal["sgd", "adamw"]
_HEAD, _OPTIMIZER, _RANDOM, _DONE = "head.", "optimizer.", "random.", "iterations"  # names in a state
EAGER_ITERATIONS = 3  # before a graph is captured, so that libraries have done their work of a first call


class TrainStep:
    """Trains `head` on random crops of features (images, C, H, W), any float dtype, and labels (images, H', W'), as the loss
    takes them.

    A crop of h × w features at (i, j) belongs to the window of `grid.pixels((h, w))` labels at pixel (s·i, s·j), for stride s,
    and the loss resizes outputs to labels as the grid says. Each call is one iteration and returns its loss, (), on the head's
    device. All random numbers are those of `randomness`, which begins where PyTorch's default generators stand at
    construction, and leaves those alone. Weight decay is left out where `decays` says so; `momentum` is of SGD alone. On CUDA,
    features that are channels last and contiguous labels are cut quickest.
    """

    def __init__(
        self,
        head: SegmentationHead,
        features: Tensor,
        labels: Tensor,
        *,
        grid: Grid,
        crop: tuple[int, int],
        batch_size: int,
        iterations: int,
        optimizer: OptimizerName = "sgd",
        learning_rate: float = 0.01,
        schedule: Schedule = "poly",
        warmup_iterations: int = 0,
        momentum: float = 0.9,
        weight_decay: float = 4e-5,
        precision: Precision = "auto",
        loss: Callable[..., Tensor] = upsampled_cross_entropy,  # of outputs, labels and `align_corners`
    ) -> None:
        self.head = head
        self.randomness = RandomSequence(head.classifier.weight.device)
        self.device, self._dtype = head.classifier.weight.device, head.classifier.weight.dtype
        self._features, self._labels = features, labels
        self._loss_of = functools.partial(loss, align_corners=grid.align_corners)
        self._grid, self._crop, self._window, self._batch_size = grid, crop, grid.pixels(crop), batch_size
        self._bf16 = precision == "bfloat16" or (precision == "auto" and has_fast_bf16(self.device))
        decay = decays(head)
        groups = [
            {"params": [p for name, p in head.named_parameters() if decay[name]], "weight_decay": weight_decay},
            {"params": [p for name, p in head.named_parameters() if not decay[name]], "weight_decay": 0.0},
        ]
        self._learning_rate = LearningRate(
            initial=learning_rate, iterations=iterations, schedule=schedule, warmup_iterations=warmup_iterations
        )
        self._rate = torch.tensor(learning_rate, device=self.device)
        self._done = torch.zeros((), dtype=torch.int64, device=self.device)  # iterations so far, counted on the device
        self._optimizer = self._create_optimizer(optimizer, groups, momentum)
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None
        self._batch: tuple[Tensor, Tensor] | None = None  # crops from the host are copied here, in the features' own dtype
        self._loss = torch.zeros((), device=self.device)  # the last one; a graph writes it to the same place at each replay
        self._one = torch.ones((), device=self.device)  # the loss's gradient by itself
        head.train()
        if self.device.type == "cpu":
            _keep_freed_memory()

    def _create_optimizer(self, name: OptimizerName, groups: list[dict[str, Any]], momentum: float) -> torch.optim.Optimizer:
        """The optimiser, whose learning rate is a tensor, so that a graph can change it."""
        match name:
            case "sgd":
                return torch.optim.SGD(groups, lr=self._rate, momentum=momentum, fused=True)
            case "adamw":
                return torch.optim.AdamW(groups, lr=self._rate, fused=True, capturable=self.device.type == "cuda")
            case _:
                assert_never(name)

    def __call__(self) -> Tensor:
        self._calls += 1
        if self._graph is not None and self._features.device == self.device:
            self._graph.replay()  # which has its random numbers with it
        else:
            with self.randomness:
                self._call()
        return self._loss.clone()

    def _call(self) -> None:
        if self._features.device != self.device:
            self._receive()
        if self.device.type != "cuda":
            self._iterate()
        elif self._calls <= EAGER_ITERATIONS:
            self._iterate_on_side_stream()
        else:
            self._replay()

    def state(self) -> dict[str, Tensor]:
        """All that the next iterations depend on, by name, copied to the CPU: weights, optimiser's memory, random numbers."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.head.named_parameters()}
        kept = {f"{_HEAD}{name}": value for name, value in self.head.state_dict().items()}
        for parameter, memory in self._optimizer.state.items():
            kept |= {f"{_OPTIMIZER}{names[parameter]}.{key}": value for key, value in memory.items() if value is not None}
        kept |= {f"{_RANDOM}{name}": value for name, value in self.randomness.state().items()} | {_DONE: self._done}
        dense: Any = {"copy": True, "memory_format": torch.contiguous_format}
        return {name: value.detach().to("cpu", **dense) for name, value in kept.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on where another step of the same settings stood; only before the first call.

        Raises KeyError or RuntimeError for the state of another head.
        """
        self.head.load_state_dict({key.removeprefix(_HEAD): value for key, value in state.items() if key.startswith(_HEAD)})
        parameters = dict(self.head.named_parameters())
        for key, value in state.items():
            if key.startswith(_OPTIMIZER):
                name, memory = key.removeprefix(_OPTIMIZER).rsplit(".", 1)
                like = parameters[name].detach()
                place = torch.empty_like(like) if value.shape == like.shape else torch.empty_like(value, device=like.device)
                self._optimizer.state[parameters[name]][memory] = place.copy_(value)
        self.randomness.restore({key.removeprefix(_RANDOM): value for key, value in state.items() if key.startswith(_RANDOM)})
        self._done.copy_(state[_DONE])

    def draw(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Random crops: features (N, C, h, w) in the head's dtype or the given one, their labels (N, H, W), on its device."""
        with self.randomness:
            return self._draw(dtype or self._dtype)

    def _draw(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self._features.device != self.device:
            self._receive()
            assert self._batch is not None
            return self._batch[0].to(dtype), self._batch[1]
        kernels = self._crop_kernels()
        if kernels is None and self.device.type == "cpu":
            batch, targets = self._cut(*(torch.randint(limit, (self._batch_size,)).tolist() for limit in self._limits()))
            return batch.to(dtype), targets
        draws = torch.randint(2**31, (3, self._batch_size), dtype=torch.int32, device=self.device)
        if kernels is not None:
            return kernels.crops(self._features, self._labels, draws, self._crop, self._grid, dtype)
        batch, targets = self._gathered(draws)
        return batch.to(dtype), targets

    def _gathered(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        """What `IterationKernels.crops` gives for these draws, in the features' own dtype."""
        index, top, left = (draw.long() * limit >> 31 for draw, limit in zip(draws, self._limits(), strict=True))
        batch = _gather(self._features, index, top, left, self._crop).permute(0, 3, 1, 2)
        stride = self._grid.stride
        targets = _gather(self._labels[:, None], index, stride * top, stride * left, self._window)[..., 0]
        return batch, targets

    def _limits(self) -> list[int]:
        """How many images there are, and places of a crop's top and left in each."""
        count, _, height, width = self._features.shape
        return [count, height - self._crop[0] + 1, width - self._crop[1] + 1]

    def _crop_kernels(self) -> IterationKernels | None:
        """What cuts crops where the features lie, if it can: it copies rows, which must be contiguous."""
        rows = self._features.is_contiguous(memory_format=torch.channels_last) and self._labels.is_contiguous()
        return iteration_kernels_for(self._features) if rows else None

    def _iterate(self) -> None:
        self._set_rate()
        features, labels = self._batch or self.draw(self._input_dtype())
        features = features if self._batch is None else features.to(self._dtype)
        with self._prepared_products():
            with counted_at_once(), torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
                outputs = self.head(features)
            loss = self._loss_of(outputs, labels)
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward(self._one)  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._loss = loss.detach().float()

    def _prepared_products(self) -> AbstractContextManager[None]:
        weights = [weight for weight in self.head.parameters() if weight.shape[2:] == (1, 1)]
        kernels = iteration_kernels_for(weights[0])
        return kernels.prepared_products(weights, torch.bfloat16 if self._bf16 else self._dtype) if kernels else nullcontext()

    def _set_rate(self) -> None:
        kernels = iteration_kernels_for(self._rate)
        if kernels is None:
            self._rate.copy_(self._learning_rate.after(self._done))
            self._done += 1
        else:
            kernels.next_rate(self._rates, self._done, self._rate)

    @functools.cached_property
    def _rates(self) -> Tensor:
        """The rates of all iterations, (iterations + 1,); the last one is 0."""
        return self._learning_rate.after(torch.arange(self._learning_rate.iterations + 1, device=self.device))

    def _input_dtype(self) -> torch.dtype:
        """What the head trains on: under autocast kernels read the features as they are, mostly in half the bytes."""
        as_they_are = self._bf16 and self._dtype == torch.float32 and self._crop_kernels() is not None
        return self._features.dtype if as_they_are else self._dtype

    def _iterate_on_side_stream(self) -> None:
        stream = self._side_stream()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._iterate()
        torch.cuda.current_stream(self.device).wait_stream(stream)

    def _replay(self) -> None:
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            self._optimizer.zero_grad(set_to_none=True)
            # PyTorch's default stream for captures belongs to the device that used it first.
            with torch.cuda.device(self.device), torch.cuda.graph(graph, stream=self._side_stream()):
                self._iterate()
            self._graph = graph
        self._graph.replay()

    def _side_stream(self) -> torch.cuda.Stream:
        current = torch.cuda.current_stream(self.device)
        if current != torch.cuda.default_stream(self.device):
            return current  # this training's own already; PyTorch has 32 streams, and then hands them out again
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return self._stream

    def _receive(self) -> None:
        """Draw a batch, from features that do not fit on the GPU, into the buffer that the graph reads."""
        corners = (torch.randint(limit, (self._batch_size,)).tolist() for limit in self._limits())
        crops = self._cut(*corners, to_send=True)
        if self._batch is None:
            self._batch = torch.empty_like(crops[0], device=self.device), torch.empty_like(crops[1], device=self.device)
        for place, crop in zip(self._batch, crops, strict=True):
            place.copy_(crop, non_blocking=True)  # the host continues meanwhile; its memory is kept until the copy is done

    def _cut(self, indices: list[int], tops: list[int], lefts: list[int], *, to_send: bool = False) -> tuple[Tensor, Tensor]:
        """Cut crops, in the head's dtype; with `to_send` in the features' own, mostly half the bytes, in pinned memory."""
        (height, width), stride = self._crop, self._grid.stride
        shape = (self._batch_size, self._features.shape[1], height, width)
        batch = torch.empty(shape, dtype=self._features.dtype if to_send else self._dtype, pin_memory=to_send)
        targets = torch.empty(self._batch_size, *self._window, dtype=self._labels.dtype, pin_memory=to_send)
        for i, (index, top, left) in enumerate(zip(indices, tops, lefts, strict=True)):
            batch[i] = self._features[index, :, top : top + height, left : left + width]
            targets[i] = self._labels[index, stride * top :, stride * left :][: self._window[0], : self._window[1]]
        return batch, targets


@functools.cache
def _keep_freed_memory() -> None:
    """Tell glibc to keep freed memory. Maps are freed and allocated again in each iteration; otherwise glibc returns their
    pages to the system, and a tenth of the time goes into zeroing new ones. It applies to the whole process.
    """
    m_trim_threshold, m_mmap_threshold, one_gigabyte = -1, -3, 1 << 30  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # Older versions refuse more than 32 MB; with the other setting alone things would be worse.
    if mallopt is not None and (mallopt(m_mmap_threshold, one_gigabyte) or mallopt(m_mmap_threshold, 32 << 20)):
        mallopt(m_trim_threshold, one_gigabyte)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether products in bf16 are quicker than in float32: GPUs from Ampere on, CPUs with AMX or AVX-512 bf16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return False
    return "amx_bf16" in processor or "avx512_bf16" in processor


def _gather(maps: Tensor, index: Tensor, top: Tensor, left: Tensor, size: tuple[int, int]) -> Tensor:
    """Windows of maps (images, C, H, W) at (top, left), each (N,) -> (N, *size, C); no index is read back by the host."""
    rows = top[:, None] + torch.arange(size[0], device=maps.device)  # (N, h)
    columns = left[:, None] + torch.arange(size[1], device=maps.device)  # (N, w)
    windows: Tensor = maps[index[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return windows
