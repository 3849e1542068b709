"""Whole training steps and whole searches as cases: the proxy iteration, the start of a new cell, cells per hour."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor, nn

from bench.cases import (
    CPU,
    OURS_WITHOUT_KERNELS,
    SEED,
    Case,
    Parts,
    Provider,
    Suite,
    Workload,
    draw_labels,
    environment_of,
    normal,
    our_cell,
)
from bench.costs import Cost, MapSize, Mode, cell_cost, loss_cost, pointwise_cost, sgd_cost
from bench.plain_torch import PlainCell, PlainHead, PlainTrainStep, randomise
from fast.segmentation import SegmentationHead
from fast.train_step import Precision, TrainStep
from reference.cell import Cell
from reference.concat_project import DROPOUT_RATE
from reference.grid import Grid
from search.cells.space import SearchSpace
from search.datasets import SPLITS, open_dataset
from search.settings import HeadSettings, ProxySettings
from search.tasks.feature_cache import FeatureCache
from search.tasks.proxy import ProxyTask

_STRIDE = 16
_MOMENTUM, WEIGHT_DECAY = 0.9, 4e-5  # as in `search.settings.ProxySettings`
_PATCH_CHANNELS = 320  # channels of the last feature map of MobileNet-v2, the paper's proxy backbone


@dataclass(frozen=True, kw_only=True)
class ProxyCase(Case):
    """One iteration of the proxy task: draw crops, forward, loss, backward, a step of SGD."""

    suite: Suite = "proxy"
    name: str = "iteration"
    mode: Mode = "training"
    cell: Cell
    batch: int
    in_channels: int
    channels: int
    num_classes: int
    crop: tuple[int, int]  # in features
    images: int = 16
    margin: int = 8  # an image is larger than the crop by this many features, along each axis
    learning_rate: float = 0.01
    dropout_rate: float = DROPOUT_RATE
    repeats: bool = True

    @property
    def shape(self) -> str:
        sizes = (self.batch, self.in_channels, *self.crop, *self.label_size)
        return "{}×{}×{}×{}, labels {}×{}".format(*sizes)

    @property
    def label_size(self) -> tuple[int, int]:
        """Pixels under a crop, (height, width)."""
        return self._pixels(0)

    def cost(self, element_bytes: int) -> Cost | None:
        size = MapSize(self.batch, *self.crop, element_bytes)
        parameters = sum(parameter.numel() for parameter in self.plain().parameters())
        return (
            cell_cost(self.cell, size, self.in_channels, self.channels, "training")
            + pointwise_cost(size, self.channels, self.num_classes, "training")
            + loss_cost(size, self.num_classes, self.label_size, "training")
            + sgd_cost(parameters)
        )

    def without_chance(self) -> Self:
        """The case with one image of the crop's size, so that all crops are the same, and a rate that shows in the update."""
        return replace(self, images=1, margin=0, learning_rate=1.0, dropout_rate=0.0)

    def small(self) -> Self:
        return replace(self.without_chance(), batch=2, in_channels=20, channels=16, num_classes=5, crop=(7, 8))

    def workload(self, provider: Provider, dtype: str, device: torch.device) -> Workload:
        return _ProxyWorkload(self, provider, dtype, device)

    def data(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Features (images, C, H, W), float16 as caches hold them, and labels (images, H_px, W_px), uint8."""
        height, width = (extent + self.margin for extent in self.crop)
        features = normal((self.images, self.in_channels, height, width), SEED, device).half()
        return features, draw_labels((self.images, *self._pixels(self.margin)), self.num_classes, device)

    def resident_data(self, provider: Provider, device: torch.device) -> tuple[Tensor, Tensor]:
        """`data` in the provider's layout, on the device as a search holds it for all cells."""
        features, labels = self.data(device)
        return features.contiguous(memory_format=provider.memory_format(device)), labels

    def _pixels(self, margin: int) -> tuple[int, int]:
        height, width = (_STRIDE * (extent + margin - 1) + 1 for extent in self.crop)
        return height, width

    def plain(self) -> PlainHead:
        cell = PlainCell(self.cell, self.in_channels, self.channels, self.channels, self.dropout_rate)
        return randomise(PlainHead(cell, self.channels, self.num_classes), SEED)

    def head(self, provider: Provider) -> PlainHead | SegmentationHead:
        """A provider's head; all have the same weights."""
        plain = self.plain()
        if not provider.is_ours:
            return plain
        context = our_cell(self.cell, self.in_channels, self.channels, self.dropout_rate, plain.context)
        head = SegmentationHead(context, self.num_classes)
        head.load_state_dict(plain.state_dict())
        return head

    def step(
        self, provider: Provider, dtype: str, head: PlainHead | SegmentationHead, data: tuple[Tensor, Tensor]
    ) -> TrainStep | PlainTrainStep:
        """The training step, ready for its first call."""
        arguments: dict[str, Any] = {
            "crop": self.crop,
            "batch_size": self.batch,
            "iterations": 30_000,
            "learning_rate": self.learning_rate,
            "momentum": _MOMENTUM,
            "weight_decay": WEIGHT_DECAY,
        }
        if provider.is_ours:
            precision: Precision = "bfloat16" if dtype == "bfloat16" else "float32"
            return TrainStep(cast(SegmentationHead, head), *data, **arguments, grid=Grid(_STRIDE), precision=precision)
        layout = provider.memory_format(data[0].device)
        plain = cast(PlainHead, head.double() if provider.in_float64 else head)
        plain = plain.to(memory_format=layout) if layout == torch.channels_last else plain
        return PlainTrainStep(
            plain,
            *data,
            **arguments,
            output_stride=_STRIDE,
            compile_mode=provider.compile_mode,
            memory_format=layout,
        )


class _ProxyWorkload(Workload):
    """Builds the step in its first call, so that the preparation belongs to the first iteration."""

    def __init__(
        self, case: ProxyCase, provider: Provider, dtype: str, device: torch.device, data: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self._case, self._provider, self._dtype, self._device = case, provider, dtype, device
        self._head = case.head(provider).to(device).train()
        self._data = data or case.resident_data(provider, device)
        self._before = [parameter.detach().clone() for parameter in self._head.parameters()]
        self._step: TrainStep | PlainTrainStep | None = None
        self._loss: Tensor | None = None

    def __call__(self) -> None:
        with environment_of(self._provider, self._dtype, self._device):
            if self._step is None:
                self._step = self._case.step(self._provider, self._dtype, self._head, self._data)
            self._loss = self._step()

    def parts(self) -> Parts:
        assert self._loss is not None, "called first"
        updates = [p.detach() - before for p, before in zip(self._head.parameters(), self._before, strict=True)]
        return {"output": [self._loss.detach()], "gradients": updates}


@dataclass(frozen=True, kw_only=True)
class NewCellCase(ProxyCase):
    """The start of a cell that was never seen, to the end of its first iteration, in a process that has trained others."""

    repeats: bool = False

    def cost(self, element_bytes: int) -> None:
        return None

    def workload(self, provider: Provider, dtype: str, device: torch.device) -> Workload:
        return _NewCellWorkload(self, provider, dtype, device)


class _NewCellWorkload(Workload):
    def __init__(self, case: NewCellCase, provider: Provider, dtype: str, device: torch.device) -> None:
        self._case, self._provider, self._dtype, self._device = case, provider, dtype, device
        self._cells = _random_cells(SEED)
        self._next = case.cell  # only the first one has a truth; the others are random
        self._data = case.resident_data(provider, device)
        self._last: _ProxyWorkload | None = None

    def __call__(self) -> None:
        case = replace(self._case, cell=self._next)
        self._last = None
        workload = _ProxyWorkload(case, self._provider, self._dtype, self._device, self._data)
        workload()
        self._last, self._next = workload, next(self._cells)

    def parts(self) -> Parts:
        assert self._last is not None, "called first"
        return self._last.parts()


def _random_cells(seed: int) -> Iterator[Cell]:
    rng, space = np.random.default_rng(seed), SearchSpace()
    while True:
        yield space.sample(rng)


def random_cells(count: int) -> list[Cell]:
    """The first `count` cells of the space for the benchmark's seed."""
    cells = _random_cells(SEED)
    return [next(cells) for _ in range(count)]


@dataclass(frozen=True, kw_only=True)
class SearchCase(Case):
    """Train and score `cells` random cells on the generated scenes, as a search does, by `ProxyTask.evaluate`.

    A fixed random projection of patches replaces the backbone: the quality of features has no effect on the time.
    """

    suite: Suite = "search"
    name: str = "cells"
    mode: Mode = "training"
    cells: int
    settings: ProxySettings
    head: HeadSettings
    train_images: int
    val_images: int

    @property
    def shape(self) -> str:
        settings = self.settings
        count = "1 cell" if self.cells == 1 else f"{self.cells} cells"
        return f"{count}, {settings.iterations} iterations of {settings.batch_size}×{_PATCH_CHANNELS}×17×17"

    def cost(self, element_bytes: int) -> None:
        return None

    def without_chance(self) -> None:
        return None  # at full size the losses of long trainings diverge by rounding alone

    def small(self) -> Self:
        # A learning rate so large that four losses show a wrong gradient, and no randomness.
        settings = replace(self.settings, iterations=4, batch_size=2, statistics_batches=1)
        head = replace(self.head, branch_channels=16, dropout=0.0)
        return replace(self, cells=1, settings=settings, head=head, train_images=4, val_images=2)

    def workload(self, provider: Provider, dtype: str, device: torch.device) -> Workload:
        return _SearchWorkload(self, provider, device)

    def truth(self, dtype: str) -> Parts:
        """The losses of the same search by the library's operations in float32: a search has no float64."""
        case = replace(self, settings=replace(self.settings, precision="float32"))
        workload = _SearchWorkload(case, OURS_WITHOUT_KERNELS, CPU)
        workload()
        return workload.parts()


class _SearchWorkload(Workload):
    def __init__(self, case: SearchCase, provider: Provider, device: torch.device) -> None:
        train, val = (_patch_cache(*wanted) for wanted in zip(SPLITS, (case.train_images, case.val_images), strict=True))
        self._task = ProxyTask(train, val, case.settings, case.head, str(device))
        self._cells = random_cells(case.cells)
        self._provider, self._device = provider, device
        self._losses: list[float] = []

    def __call__(self) -> None:
        self._losses = []
        # No autocast around it all: the search chooses for itself, and an outer one would keep its casts of old weights.
        with environment_of(self._provider, "float32", self._device):
            for i, cell in enumerate(self._cells):
                result, _ = self._task.evaluate(cell, (0, 0, i))
                self._losses += [loss for _, loss in result.loss_curve]

    def parts(self) -> Parts:
        return {"output": [torch.tensor(self._losses)]}


@functools.lru_cache(maxsize=4)
def _patch_cache(split: str, count: int) -> FeatureCache:
    """`count` generated scenes of `split`, and their features in memory."""
    dataset = open_dataset("shapes", split, None)
    samples = [dataset[i] for i in range(count)]
    images = torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2)  # (N, 3, H, W), uint8
    labels = torch.from_numpy(np.stack([sample.label for sample in samples]))
    patches = nn.Conv2d(3, _PATCH_CHANNELS, kernel_size=_STRIDE, stride=_STRIDE, padding=_STRIDE // 2, bias=False)
    patches = randomise(patches, SEED)
    with torch.no_grad():
        features = patches(images / 127.5 - 1.0).relu()
    identity = {"dataset": dataset.name, **dataset.task.describe(), "output_stride": _STRIDE}
    return FeatureCache(Path("in memory"), features.half(), labels, identity)
