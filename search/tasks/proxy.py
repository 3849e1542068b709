"""The proxy task (paper, sections 3.3 and 4.1): train a cell and its classifier briefly on cached features, and score it.

It needs no images and no backbone. The training, with its crops, is in `fast/train_step.py`.
"""

import math
import re
import resource
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fast.batch_norm import authors_norm, recompute_statistics
from fast.dense_prediction_cell import DensePredictionCell
from fast.segmentation import SegmentationHead
from fast.train_step import TrainStep
from reference.cell import Cell
from reference.dense_prediction_cell import rate_multiplier_for
from search.cells.cost import module_cost
from search.cells.latency import relative_latency
from search.cells.reach import FeatureMaps
from search.dense_tasks import Scores, totals_of_nothing
from search.settings import HeadSettings, LossSettings, ProxySettings, given, known
from search.tasks.feature_cache import FeatureCache, require_crop

CostKind = Literal["multiply_adds", "latency"]  # what a result has of it is in its field of this name
COST_NAMES = {"multiply_adds": "multiply-adds", "latency": "latency"}  # by kind
Value = TypeVar("Value")
_CURVE_POINTS = 100
_OF_TRAINING = "training.curve", "training.seconds", "training.done"  # names in a state, beside the step's


@dataclass(frozen=True)
class ProxyResult:
    """Score, cost and training of a cell."""

    scores: Scores  # on the whole validation cache
    loss_curve: tuple[tuple[int, float], ...]  # (iteration, training loss)
    parameters: int  # as in the paper's Table 1
    multiply_adds: int  # as in the paper's Table 1, for one validation image
    seconds: float
    peak_memory_bytes: int  # the device's; on a CPU that of the whole process
    latency: float | None = None  # for one validation image, as a multiple of the published cell's; None if not measured

    @property
    def score(self) -> float:
        return self.scores.score

    def cost(self, kind: CostKind) -> float:
        """Its multiply-adds or latency. Raises ValueError for a latency that was not measured."""
        value: float | None = getattr(self, kind)
        if value is None:
            raise ValueError(f"a result has no {kind}")
        return value


@dataclass(frozen=True)
class Stretch:
    """A part of a cell's training: up to an iteration, from the beginning or from the state at the end of another part.

    However a training is divided, it ends with the same bits.
    """

    until: int  # iterations in all
    state: bytes | None = None  # a safetensors file, as `ProxyTask.evaluation` gives it


class NotFiniteError(ArithmeticError):
    """A loss or weight in the training of a cell became infinite or NaN; the message says where."""


class ProxyTask:
    """Scores cells on the features of one data set, and measures their latency if it is to. Raises InputError for a crop that
    does not fit."""

    def __init__(
        self,
        train: FeatureCache,
        val: FeatureCache,
        settings: ProxySettings,
        head: HeadSettings,
        device: str = "cpu",
        loss: LossSettings | None = None,
        *,
        with_latency: bool = False,
    ) -> None:
        self.settings = settings.completed(train.pictures)
        self.head = head.completed(train.identity["dataset"])
        self.device, self.with_latency = torch.device(device), with_latency
        self.dense_task = train.task.weighted(given(loss, LossSettings()).numbers)
        self.grid, self.layer_channels = train.grid, train.layer_channels
        self.crop = crop_in_features(settings, train)
        self._train, self._val = (self._resident(cache) for cache in (train, val))

    def evaluate(
        self, cell: Cell, seed: Sequence[int], on_step: Callable[[int], None] = lambda iteration: None
    ) -> tuple[ProxyResult, SegmentationHead]:
        """Train and score a cell; the scores depend on the cell, the settings and `seed` alone.

        Returns the result and the trained head, on the CPU in evaluation mode. Raises NotFiniteError.
        """
        result, head, _ = followed(self.evaluation(cell, seed), on_step)
        return result, head

    def evaluation(
        self, cell: Cell, seed: Sequence[int], stretch: Stretch | None = None
    ) -> Generator[int, None, tuple[ProxyResult, SegmentationHead, bytes | None]]:
        """`evaluate`, iteration by iteration: yields the number of each after it, and several can run in turns.

        Each has its own random numbers. Seconds and peak memory of the results are then those of several at a time. Given a
        `stretch`, the training goes so far, and is scored there; it then also returns the state from which it goes on, unless
        it is at its end. A state that is of another training, or of another kind of device, costs time alone: the training
        begins anew, with the same result.
        """
        stretch = stretch or Stretch(self.settings.steps)
        start = time.perf_counter()
        _reset_peak_memory(self.device)
        number = int(np.random.SeedSequence(list(seed)).generate_state(1)[0])
        training = self._begin_training(cell, number)
        if stretch.state is not None:
            try:
                training.restore(stretch.state, stretch.until)
            except ValueError as error:
                print(f"a training begins anew: {error}", file=sys.stderr)
                training = self._begin_training(cell, number)  # a part of the state may be in it
        step, head = training.step, training.step.head
        yield from self._train_head(training, stretch.until)
        seconds = training.seconds + time.perf_counter() - start
        state = training.state(seconds) if stretch.until < self.settings.steps else None  # before scoring draws more crops
        with step.randomness:
            recompute_statistics(head, (step.draw()[0] for _ in range(self.settings.statistics_batches)))
        scores = self.dense_task.scores(self._totals(head))
        size = self._val[0].shape[2], self._val[0].shape[3]
        cost = module_cost(head.context, size).total
        result = ProxyResult(
            scores=scores,
            loss_curve=tuple(training.curve),
            parameters=cost.parameters,
            multiply_adds=cost.multiply_adds,
            seconds=training.seconds + time.perf_counter() - start,
            peak_memory_bytes=_peak_memory_bytes(self.device),
        )
        if self.with_latency:  # which is no part of these seconds, nor of this memory
            result = replace(result, latency=relative_latency(head.context, size, self.device))
        return result, head.cpu(), state

    def _begin_training(self, cell: Cell, seed: int) -> "_Training":
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)  # initial weights, crops and dropout
            return _Training(self._create_step(self._create_head(cell).to(self.device)))

    def _create_head(self, cell: Cell) -> SegmentationHead:
        settings = self.head
        context = DensePredictionCell(
            cell,
            self.layer_channels,
            branch_channels=settings.channels,
            cell_channels=settings.channels,
            output_stride=self.grid.stride,
            dropout_rate=settings.dropout,
            pooling=settings.pooling,
            norm_layer=authors_norm,
        )
        return SegmentationHead(context, len(self.dense_task.outputs))

    def _create_step(self, head: SegmentationHead) -> TrainStep:
        settings = self.settings
        return TrainStep(
            head,
            *self._train,
            loss=self.dense_task.loss,
            grid=self.grid,
            crop=self.crop,
            batch_size=settings.batch_size,
            iterations=settings.steps,
            optimizer=settings.optimizer,
            learning_rate=known(settings.learning_rate),
            schedule=settings.schedule,
            warmup_iterations=settings.warmup_iterations,
            momentum=given(settings.momentum, 0.0),  # None with adamw, which has none
            weight_decay=known(settings.weight_decay),
            precision=settings.precision,
        )

    def _train_head(self, training: "_Training", until: int) -> Generator[int, None, None]:
        iterations = self.settings.steps
        every = max(1, iterations // _CURVE_POINTS)
        for iteration in range(training.done + 1, until + 1):
            loss = training.step()
            yield iteration  # before the loss is read, which waits for the device: others launch meanwhile
            is_on_curve = iteration % every == 0 or iteration == iterations
            if is_on_curve or iteration == until:
                value = loss.item()
                if not math.isfinite(value):
                    raise NotFiniteError(f"the loss was {value} at iteration {iteration}; try a lower learning rate")
                if is_on_curve:
                    training.curve.append((iteration, value))
        training.done = until

    @torch.inference_mode()
    def _totals(self, head: SegmentationHead) -> NDArray[Any]:
        features, labels = self._val
        total = totals_of_nothing(self.dense_task)
        for start in range(0, features.shape[0], self.settings.batch_size):
            batch = slice(start, start + self.settings.batch_size)
            outputs = head(features[batch].to(self.device, torch.float32))
            if not outputs.isfinite().all():
                raise NotFiniteError("the trained cell gives scores that are not finite; try a lower learning rate")
            counted = self.dense_task.count_upsampled(
                outputs, labels[batch].to(self.device), align_corners=self.grid.align_corners
            )
            total += counted.cpu()
        return total.numpy()

    def _resident(self, cache: FeatureCache) -> tuple[Tensor, Tensor]:
        """Features and labels: on the GPU if they take less than half of its free memory, or else left in the file."""
        if self.device.type == "cuda":
            size = cache.features.nbytes + cache.labels.nbytes
            if size < torch.cuda.mem_get_info(self.device)[0] // 2:
                features = cache.features.to(self.device, memory_format=torch.channels_last)  # crops are then contiguous rows
                return features, cache.labels.to(self.device)
        return cache.features, cache.labels


@dataclass
class _Training:
    """A training of a cell, between two stretches of it."""

    step: TrainStep
    done: int = 0  # iterations
    curve: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0  # that earlier stretches took

    def restore(self, content: bytes, until: int) -> None:
        """Go on from what `state` gave, up to an iteration. Raises ValueError for the state of another training."""
        try:
            kept = load(content)
            curve, seconds, done = (kept.pop(name) for name in _OF_TRAINING)
            if int(done) > until:
                raise ValueError(f"its state is of iteration {int(done)}, and it is to go to {until}")
            self.step.restore(kept)
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise ValueError(f"its state cannot be used ({error})") from error
        self.done, self.seconds = int(done), float(seconds)
        self.curve = [(int(iteration), loss) for iteration, loss in curve.tolist()]

    def state(self, seconds: float) -> bytes:
        """All that the rest of the training depends on, as a safetensors file, with the seconds that it took so far."""
        curve = torch.tensor(self.curve, dtype=torch.float64).reshape(-1, 2)
        parts = curve, torch.tensor(seconds, dtype=torch.float64), torch.tensor(self.done)
        return save(self.step.state() | dict(zip(_OF_TRAINING, parts, strict=True)))


def followed(steps: Generator[int, None, Value], on_step: Callable[[int], None]) -> Value:
    """Go through an evaluation to its end, and return what it returns; `on_step` follows its iterations."""
    while True:
        try:
            on_step(next(steps))
        except StopIteration as end:
            value: Value = end.value
            return value


def crop_in_features(settings: ProxySettings, cache: FeatureCache) -> tuple[int, int]:
    """Height and width of the training crops, in features. Raises InputError for a crop that does not fit."""
    whole = cache.features.shape[2], cache.features.shape[3]
    if settings.crop_size is None:
        return whole
    require_crop(settings.crop_size, cache.grid.pixels(whole), cache.grid)
    return cache.grid.features(settings.crop_size)


def feature_maps(settings: ProxySettings, head: HeadSettings, train: FeatureCache, val: FeatureCache) -> FeatureMaps:
    """The maps that cells see in this task. Raises InputError for a crop that does not fit."""
    return FeatureMaps(
        validation=(val.features.shape[2], val.features.shape[3]),
        training=crop_in_features(settings, train),
        rate_multiplier=rate_multiplier_for(train.grid.stride),
        pooling=head.pooling,
    )


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # not Linux, or not allowed: then it is the peak of the whole process so far
            return


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        match = None
    return int(match[1]) * 1024 if match else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
