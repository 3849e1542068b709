"""The proxy task (paper, sections 3.3 and 4.1): train a cell and its classifier briefly on cached features, and score it.

It needs no images and no backbone. The training, with its crops, is in `fast/train_step.py`.
"""

import math
import re
import resource
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fast.batch_norm import authors_norm, recompute_statistics
from fast.dense_prediction_cell import DensePredictionCell
from fast.segmentation import SegmentationHead
from fast.train_step import TrainStep
from reference.cell import Cell
from reference.dense_prediction_cell import rate_multiplier_for
from search.cells.cost import module_cost
from search.cells.reach import FeatureMaps
from search.dense_tasks import Scores, totals_of_nothing
from search.settings import HeadSettings, LossSettings, ProxySettings, given, known
from search.tasks.feature_cache import FeatureCache, require_crop

_CURVE_POINTS = 100


@dataclass(frozen=True)
class ProxyResult:
    """Score, cost and training of a cell."""

    scores: Scores  # on the whole validation cache
    loss_curve: tuple[tuple[int, float], ...]  # (iteration, training loss)
    parameters: int  # as in the paper's Table 1
    multiply_adds: int  # as in the paper's Table 1, for one validation image
    seconds: float
    peak_memory_bytes: int  # the device's; on a CPU that of the whole process

    @property
    def score(self) -> float:
        return self.scores.score


class NotFiniteError(ArithmeticError):
    """A loss or weight in the training of a cell became infinite or NaN; the message says where."""


class ProxyTask:
    """Scores cells on the features of one data set. Raises InputError for a crop that does not fit."""

    def __init__(
        self,
        train: FeatureCache,
        val: FeatureCache,
        settings: ProxySettings,
        head: HeadSettings,
        device: str = "cpu",
        loss: LossSettings | None = None,
    ) -> None:
        self.settings = settings.completed(train.pictures)
        self.head = head.completed(train.identity["dataset"])
        self.device = torch.device(device)
        self.dense_task = train.task.weighted(given(loss, LossSettings()).numbers)
        self.grid = train.grid
        self.crop = crop_in_features(settings, train)
        self._train, self._val = (self._resident(cache) for cache in (train, val))

    def evaluate(
        self, cell: Cell, seed: Sequence[int], on_step: Callable[[int], None] = lambda iteration: None
    ) -> tuple[ProxyResult, SegmentationHead]:
        """Train and score a cell; the result depends on the cell, the settings and `seed` alone.

        Returns the result and the trained head, on the CPU in evaluation mode. Raises NotFiniteError.
        """
        steps = self.evaluation(cell, seed)
        while True:
            try:
                on_step(next(steps))
            except StopIteration as end:
                result: tuple[ProxyResult, SegmentationHead] = end.value
                return result

    def evaluation(self, cell: Cell, seed: Sequence[int]) -> Generator[int, None, tuple[ProxyResult, SegmentationHead]]:
        """`evaluate`, iteration by iteration: yields the number of each after it, and several can run in turns.

        Each has its own random numbers. Seconds and peak memory of the results are then those of several at a time.
        """
        start = time.perf_counter()
        _reset_peak_memory(self.device)
        number = int(np.random.SeedSequence(list(seed)).generate_state(1)[0])
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(number)  # initial weights, crops and dropout
            head = self._create_head(cell).to(self.device)
            step = self._create_step(head)
        curve = yield from self._train_head(step)
        with step.randomness:
            recompute_statistics(head, (step.draw()[0] for _ in range(self.settings.statistics_batches)))
        scores = self.dense_task.scores(self._totals(head))
        size = self._val[0].shape[2:]
        cost = module_cost(head.context, (size[0], size[1])).total
        result = ProxyResult(
            scores=scores,
            loss_curve=curve,
            parameters=cost.parameters,
            multiply_adds=cost.multiply_adds,
            seconds=time.perf_counter() - start,
            peak_memory_bytes=_peak_memory_bytes(self.device),
        )
        return result, head.cpu()

    def _create_head(self, cell: Cell) -> SegmentationHead:
        settings = self.head
        context = DensePredictionCell(
            cell,
            self._train[0].shape[1],
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
            learning_rate=known(settings.learning_rate),
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            precision=settings.precision,
        )

    def _train_head(self, step: TrainStep) -> Generator[int, None, tuple[tuple[int, float], ...]]:
        iterations = self.settings.steps
        curve = []
        every = max(1, iterations // _CURVE_POINTS)
        for iteration in range(1, iterations + 1):
            loss = step()
            yield iteration  # before the loss is read, which waits for the device: others launch meanwhile
            if iteration % every == 0 or iteration == iterations:
                curve.append((iteration, loss.item()))
                if not math.isfinite(curve[-1][1]):
                    raise NotFiniteError(f"the loss was {curve[-1][1]} at iteration {iteration}; try a lower learning rate")
        return tuple(curve)

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
