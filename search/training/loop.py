"""Train a whole network end to end, as the authors do, and continue after an interruption.

Crops and dropout of an iteration depend on the seed and its number alone, so the losses after an interruption are those of an
uninterrupted training. docs/training.md explains what follows the authors and where the defaults differ.
"""

import copy
import math
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from fast.batch_norm import recompute_statistics
from fast.checkpoint import save_network
from fast.segmentation import SegmentationNetwork
from reference.hard_example_mining import mined_share
from search.datasets import Dataset, evaluation_size
from search.datasets.weights import weights_in_words
from search.dense_tasks import DenseTask, Scores
from search.devices import Devices
from search.errors import InputError
from search.interrupts import first_stop_calls
from search.settings import RecipeSettings, TrainingSettings, known, plain
from search.training.augmentation import Augmentation, Crop
from search.training.batches import Batches
from search.training.frozen import freeze, frozen_part
from search.training.optimizer import create_optimizer, learning_rate, set_learning_rate
from search.training.scoring import count_split
from search.training.state import Curve, load_state, save_state
from search.training.tiles import Tiles

_LOG_EVERY = 10  # iterations between two readings of the losses, which wait for the GPU
_DROPOUT = 2  # numbers of random streams, beside those of augmentation.py


class NotFiniteTrainingError(InputError):
    """The loss or a weight became infinite or NaN."""


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training. `last` are the scores of the weights after the last iteration."""

    last: Scores
    best: float  # the best score of all validations
    seconds: float  # training and validation, in all processes that worked on it


@dataclass
class _Progress:
    """The progress of a training, which `state.pt` holds beside the weights."""

    iteration: int = 0
    validated: int = 0  # the iteration of the last validation
    best: float = -1.0  # score of the best one
    last: dict[str, Any] | None = None  # scores of the last validation
    seconds: float = 0.0


class Training:
    """Trains `network` in `directory` by completed settings, for the task of the data; all that must last is in `state.pt`.

    `source` is what the networks' files say of where they come from; by default the settings. With `validates_first` the
    network is scored as it is before the first iteration, so that the best one is never worse than what was given.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        network: SegmentationNetwork,
        train: Dataset,
        val: Dataset,
        directory: Path,
        devices: Devices,
        source: Any = None,
        *,
        validates_first: bool = False,
    ) -> None:
        self._validates_first = validates_first
        self.settings, self.recipe = settings, settings.recipe
        self.source = plain(settings if source is None else source)
        self.tiles = Tiles.of(self.recipe)
        self._evaluation = {
            "dataset": settings.data.dataset,
            "pad_to": evaluation_size(val.name, network.backbone.grid),
            **({} if self.tiles is None else {"tile_size": self.tiles.size, "tile_overlap": self.tiles.overlap}),
        }
        self.task = train.task.weighted(settings.loss.numbers)
        self._align_corners = network.backbone.grid.align_corners
        self.val, self.directory, self.devices = val, directory, devices
        self.iterations = known(self.recipe.iterations)
        augmentation = create_augmentation(self.recipe, network, self.task)
        self.batches = Batches(train, augmentation, self.recipe, devices, settings.seed)
        self.network = network.to(devices.device)
        freeze(self.network.backbone, self.recipe.trainable_blocks)
        self._learns = self.devices.prepare(self.network)
        self.optimizer = create_optimizer(self.network, self.recipe)
        self.average = averaged(self.network, self.recipe.ema) if self.recipe.ema else None
        self.progress = _Progress()
        self._losses: list[tuple[Tensor, float]] = []  # since the last reading, with their learning rates
        self._stop = False

    def run(self, on_step: Callable[[int], None] | None = None) -> TrainingResult:
        """Train to the end. If `on_step` is given, it is called with each iteration's number, and nothing is printed.

        Raises NotFiniteTrainingError, and InputError for unusable pictures.
        """
        self._restore()
        self._begun = time.perf_counter() - self.progress.seconds
        self._quiet = on_step is not None or self.devices.rank > 0
        first = self.progress.iteration
        if not self._quiet and (words := weights_in_words(self.task, self.settings.loss)):
            print(words, file=sys.stderr)
        self.curve = (
            Curve(self.directory, self.task.score.key, first, self.progress.validated) if self.devices.rank == 0 else None
        )
        bar = tqdm(total=self.iterations, initial=first, desc="training", unit="step", disable=self._quiet)
        try:
            with bar, first_stop_calls(self._end_soon):  # Ctrl-C ends it after the iteration
                self._validate_if_due()
                for batches in self.batches.of_iterations(first):
                    stop = self._step(batches)
                    bar.update()
                    if on_step is not None:
                        on_step(self.progress.iteration)
                    self._look(bar, stop, is_first=self.progress.iteration == first + 1)
                    self._validate_if_due()
                if self._stop:  # Ctrl-C in the last validation: the caller, who may train more networks, is to end too
                    raise KeyboardInterrupt
        finally:
            if self.curve is not None:
                self.curve.close()
        last = Scores.restored(known(self.progress.last))
        return TrainingResult(last, self.progress.best, self.progress.seconds)

    def _look(self, bar: Any, stop: bool, is_first: bool) -> None:
        """After an iteration: log, validate and save the state when it is time, and end if Ctrl-C asked for it."""
        iteration = self.progress.iteration
        if is_first:
            self._print_memory()
        if iteration % _LOG_EVERY == 0 or iteration == self.iterations:
            best = "-" if self.progress.best < 0 else self.task.score.text(self.progress.best)
            bar.set_postfix(loss=f"{self._log():.4f}", rate=f"{self._rate():.2g}", best=best)
        if stop or iteration % self.recipe.checkpoint_every == 0:
            self._save()
        if stop:
            raise KeyboardInterrupt

    def _step(self, batches: list[Crop]) -> bool:
        """One iteration; returns whether to stop after it."""
        recipe, devices, iteration = self.recipe, self.devices, self.progress.iteration
        torch.manual_seed(_seed(self.settings.seed, _DROPOUT, iteration, devices.rank))
        set_training(self.network, recipe)
        share = mined_share(recipe.hard_example_mining, iteration, recipe.hard_example_iterations)
        counts = [int(self.task.is_labelled(batch.label).sum()) for batch in batches]
        labelled, stop = devices.total(
            torch.tensor([sum(counts), self._stop], device=devices.device, dtype=torch.float64)
        ).tolist()
        rate = self._rate()
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=devices.device)
        for i, (batch, count) in enumerate(zip(batches, counts, strict=True)):
            # The loss is the mean over the labelled pixels of all passes and devices, however many there are. With hard
            # example mining, the hardest pixels are chosen within each pass, so it is the mean over the passes.
            weight = count / max(labelled, 1) if share == 1 else 1 / (len(batches) * devices.count)
            with devices.alone(self._learns) if i + 1 < len(batches) else nullcontext():
                loss = self._loss(batch, share) * weight
                (loss * devices.count).backward()  # type: ignore[no-untyped-call]  # gradients are averaged over devices
            total += loss.detach()
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
        self.progress.iteration += 1
        self._losses.append((total, rate))
        return bool(stop)

    def _loss(self, batch: Crop, share: float) -> Tensor:
        device = self.devices.device
        images, labels = batch.image.to(device, non_blocking=True), batch.label.to(device, non_blocking=True)
        with self._autocast():
            outputs = self._learns(images)
        if share < 1:
            labels = self.task.hardest(outputs.detach(), labels, share, align_corners=self._align_corners)
        return self.task.loss(outputs, labels, align_corners=self._align_corners)

    def _rate(self) -> float:
        return learning_rate(self.recipe, self.progress.iteration)

    def _log(self) -> float:
        """Read the losses since the last reading, write them to the curve, and return the latest."""
        if not self._losses:
            return math.nan
        losses = self.devices.total(torch.stack([loss for loss, _ in self._losses])).tolist()
        first = self.progress.iteration - len(losses) + 1
        for iteration, (loss, (_, rate)) in enumerate(zip(losses, self._losses, strict=True), start=first):
            if not math.isfinite(loss):
                raise NotFiniteTrainingError(f"the loss was {loss} at iteration {iteration}")
            if self.curve is not None:
                self.curve.add(iteration, loss=loss, rate=rate)
        self._losses.clear()
        if self.curve is not None:
            self.curve.flush()
        return float(losses[-1])

    def _validate_if_due(self) -> None:
        iteration = self.progress.iteration
        every = self.recipe.validate_every or max(1, self.iterations // 10)
        is_due = iteration > 0 and (iteration % every == 0 or iteration == self.iterations)
        is_first = self._validates_first and self.progress.last is None
        if is_first or (is_due and self.progress.validated < iteration):
            self._validate()

    def _validate(self) -> None:
        """Score a copy of the network; save it as the last, and as the best if it is. Once trained, its statistics are new."""
        if self._losses:
            self._log()
        network = copy.deepcopy(cast(SegmentationNetwork, self.average.module) if self.average is not None else self.network)
        self._require_finite(network)
        with self._autocast():
            is_trained = self.progress.iteration > 0
            if is_trained and self.recipe.statistics_batches and not self.recipe.frozen_batch_norm:
                kept = frozen_part(network.backbone, self.recipe.trainable_blocks)
                recompute_statistics(network, self.batches.for_statistics(), kept=kept)
                self._require_finite(network)  # statistics may overflow where no weight does
            indices = range(self.devices.rank, len(self.val), self.devices.count)
            network.eval()
            totals = count_split(network, self.val, indices=indices, tiles=self.tiles, on_picture=self._stop_validation)
        scores = self.task.scores(self.devices.total(totals.double()).cpu().numpy())
        if math.isnan(scores.score):
            raise InputError(f"no pixel of {self.val.name} {self.val.split} has a label to score by: give another `val_split`")
        is_best = scores.score > self.progress.best
        self.progress.validated, self.progress.last = self.progress.iteration, asdict(scores)
        self.progress.best = max(self.progress.best, scores.score)
        if self.devices.rank == 0:
            self._keep(network, scores, is_best)
        self._save()

    def _keep(self, network: SegmentationNetwork, scores: Scores, is_best: bool) -> None:
        iteration = self.progress.iteration
        if self.curve is not None:
            self.curve.add(iteration, score=scores.score)
        if not self._quiet:
            on = f"{self.val.name} {self.val.split}"
            name, value = self.task.score.name, self.task.score.text(scores.score)
            tqdm.write(f"iteration {iteration}: {name} {value} on {on}", file=sys.stderr)
        source = {
            "training": self.source,
            "iteration": iteration,
            "seconds": time.perf_counter() - self._begun,
            **self.task.named(scores),
        }
        for name in ("last", "best") if is_best else ("last",):
            path = self.directory / f"{name}.safetensors"
            save_network(path, network, task=self.task.describe(), source=source, evaluation=self._evaluation)

    def _restore(self) -> None:
        state = load_state(self.directory, self.devices.device)
        if state is None:
            return
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.progress = _Progress(**state["progress"])

    def _save(self) -> None:
        if self._losses:
            self._log()
        self._require_finite(self.network)
        if self.curve is not None:
            self.curve.flush()  # before the state says that this is done
        self.devices.wait()
        self.progress.seconds = time.perf_counter() - self._begun
        if self.devices.rank > 0:
            return
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "progress": asdict(self.progress),
        }
        save_state(self.directory, state)

    def _require_finite(self, network: nn.Module) -> None:
        """Refuse weights that are not finite: a finite loss does not show what the step after it did."""
        for name, tensor in network.state_dict().items():
            if not tensor.isfinite().all():
                raise NotFiniteTrainingError(f"after iteration {self.progress.iteration} the weights {name} are not finite")

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.devices.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16")

    def _end_soon(self, number: signal.Signals) -> None:
        self._stop = True

    def _stop_validation(self) -> None:
        if self._stop and self.devices.count == 1:  # otherwise the others would wait for this process's part of the sum
            self._save()
            raise KeyboardInterrupt

    def _print_memory(self) -> None:
        if self._quiet:
            return
        if self.devices.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.devices.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        passes = f"passes of {self.batches.size} crops; more passes take less"
        tqdm.write(f"memory: {peak / 2**30:.2f} GiB at most for {passes}", file=sys.stderr)


def averaged(network: nn.Module, decay: float) -> AveragedModel:
    """Moving average of the weights: decay · average + (1 − decay) · weights after each step, from the initial weights on."""
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]
    average.update_parameters(network)  # its first call copies
    return average


def set_training(network: SegmentationNetwork, recipe: RecipeSettings) -> None:
    """Set training mode, but of a frozen part. Frozen norms use and keep their statistics, but their scale and offset learn,
    as the authors' do.
    """
    network.train()
    for child in network.modules():
        if recipe.frozen_batch_norm and isinstance(child, nn.BatchNorm2d):
            child.eval()
    for child in frozen_part(network.backbone, recipe.trainable_blocks):
        child.eval()


def create_augmentation(recipe: RecipeSettings, network: SegmentationNetwork, task: DenseTask) -> Augmentation:
    """The augmentation of the recipe, which pads with the mean pixel of the network's backbone."""
    red, green, blue = network.backbone.mean.flatten().tolist()
    return Augmentation(
        task,
        known(recipe.crop_size),
        (red, green, blue),
        known(recipe.min_scale),
        known(recipe.max_scale),
        recipe.scale_step,
    )


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(list(parts)).generate_state(1)[0])
