"""A whole network, from images to classes, trained end to end as the authors do: `python -m search.train`.

Without flags it trains a small network on generated scenes in about two minutes. The same command goes on with a training that
was interrupted, and gives the same losses as if it had not been: crops and dropout of an iteration depend on the seed and its
number alone. docs/training.md explains what is followed and where the defaults differ.
"""

import copy
import json
import math
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from fast.backbone import Backbone, WeightsOrigin
from fast.batch_norm import recompute_statistics
from fast.checkpoint import load_network, save_network
from fast.decoder import Decoder
from fast.dense_prediction_cell import DensePredictionCell
from fast.hard_example_mining import hardest_pixels, mined_share
from fast.segmentation import SegmentationHead, SegmentationNetwork
from fast.upsampled_cross_entropy import upsampled_cross_entropy
from reference.cell import Cell
from reference.mean_iou import class_iou, mean_iou
from reference.pyramid_pooling import PoolingVariant
from search.cells.space import load_cell
from search.cli import run_command
from search.datasets import IGNORE_INDEX, Dataset, open_dataset
from search.devices import Devices, join_devices
from search.errors import InputError
from search.evaluate import count_pixels
from search.features import FeatureSettings, create_backbone
from search.training.augmentation import Augmentation, Crop, TrainingCrops, stack
from search.training.optimizer import parameter_groups, poly_learning_rate, set_learning_rate
from search.training.state import Curve, load_state, open_training, save_state

Value = TypeVar("Value")

_LOG_EVERY = 10  # iterations between two looks at the losses, for which a GPU must be waited for
_DROPOUT = 2  # what a random stream is for, beside those of augmentation.py

# Where no flag is given: the paper's setting, or one that a small CPU can do while one watches.
_PAPER = {"crop_size": (769, 769), "batch_size": 16, "iterations": 90_000, "learning_rate": 0.01, "branch_channels": 256}
_SHAPES = {"crop_size": (257, 257), "batch_size": 8, "iterations": 150, "learning_rate": 0.05, "branch_channels": 64}

# Settings that may change when a training goes on: they move files or share work out, but change no loss.
_FREE = {"out", "data_dir", "weights", "init", "run", "cell", "cache_dir", "device", "workers", "checkpoint_every"}


@dataclass(frozen=True, kw_only=True)
class RecipeSettings:
    """How a whole network is trained, whatever its backbone, its cell and the data."""

    decoder: bool = False
    """Refine with DeepLabv3+'s decoder, which reads a map on every 4th pixel."""
    dropout: float = 0.1
    """Share of the concatenated branch outputs that is dropped."""
    branch_channels: int | None = None
    """Filters of each branch and of the cell's output. Default: 256; 64 for shapes."""
    crop_size: tuple[int, int] | None = None
    """Height and width in pixels of the training crops, stride·k + 1 each. Default: 769 769; 257 257 for shapes."""
    min_scale: float = 0.5
    """Smallest random scale of a training picture."""
    max_scale: float = 2.0
    """Largest random scale."""
    scale_step: float = 0.25
    """Distance of the scales that are drawn; 0 draws any between the two."""
    batch_size: int | None = None
    """Crops per iteration, those of all devices together. Default: 16; 8 for shapes."""
    accumulate: int = 1
    """Passes that an iteration's crops are divided into, each with its share of the memory."""
    iterations: int | None = None
    """Steps of the optimiser. Default: 90,000; 150 for shapes."""
    learning_rate: float | None = None
    """Initial learning rate; it falls to 0 by the power 0.9 of the remaining share. Default: 0.01; 0.05 for shapes."""
    slow_start_iterations: int = 0
    """First iterations at a fixed rate, before the fall begins."""
    slow_start_learning_rate: float = 1e-4
    """The rate of those."""
    momentum: float = 0.9
    """Momentum of stochastic gradient descent."""
    weight_decay: float = 4e-5
    """L2 penalty; none on depthwise weights, batch norms and biases."""
    last_layer_multiplier: float = 1.0
    """Learning rate of all but the backbone, as a multiple of the backbone's."""
    frozen_batch_norm: bool = False
    """Normalise by the statistics that the weights came with, for batches too small for their own."""
    hard_example_mining: float = 1.0
    """Share of the pixels that counts, those with the largest loss."""
    hard_example_iterations: int = 0
    """Iterations in which that share falls from 1 to its value."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the products in the network; the loss is always float32."""
    ema: float = 0.0
    """Share of the old in a moving average of the weights, such as 0.999, which is then what is validated and kept."""
    statistics_batches: int = 16
    """Batches from which a network's batch norm statistics are computed before validation; 0 takes the moving averages."""
    validate_every: int | None = None
    """Iterations between validations. Default: a tenth of all."""
    checkpoint_every: int = 200
    """Iterations between checkpoints, besides those at validations."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings(RecipeSettings):
    """Train a whole network: backbone, dense prediction cell, decoder if wanted, classifier."""

    dataset: str = "shapes"
    """Data set: shapes (generated), camvid, cityscapes, pascal_voc, pascal_person_part, or a TOML file (docs/datasets.md)."""
    data_dir: Path | None = None
    """Folder of the data set. A TOML file describes the folder it lies in unless told otherwise."""
    train_split: str = "train"
    """Split to train on, such as cityscapes' trainval or pascal_voc's train_aug."""
    val_split: str = "val"
    """Split whose mIOU chooses the best network."""
    cell: str | None = None
    """dpc, aspp, psp, or the path of a cell's JSON file. Default: dpc."""
    run: Path | None = None
    """Folder of a search (runs/x), to train its best cell."""
    backbone: str | None = None
    """Any timm model with feature maps. Default: a small one trained on the spot for shapes, mobilenetv2_100 for the rest."""
    weights: Path | None = None
    """Local file of the backbone's weights (safetensors or PyTorch state dict, in timm's key names)."""
    weights_origin: WeightsOrigin = "timm"
    """Where the weights were trained: tensorflow ones expect its padding, batch norm epsilon 1e-3 and inputs in -1..1."""
    pretrained: bool = False
    """Let timm download its pretrained weights."""
    init: Path | None = None
    """Whole network to begin with, architecture included; with other classes its classifier begins anew."""
    output_stride: int | None = None
    """Pixels per feature, 8 or 16; at 8 the cell's rates double. Default: 16."""
    pooling: PoolingVariant = "sliding_window"
    """Pyramid pooling as in the authors' code (sliding_window) or in the paper's words (grid_cells)."""
    workers: int = 2
    """Processes that load pictures, for each device; 0 loads between the iterations."""
    seed: int = 0
    """Seed of everything: initial weights, order of the pictures, crops, dropout."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the GPU if there is one. Several: start by torchrun or accelerate launch."""
    cache_dir: Path = Path("cache")
    """Where the small backbone for shapes is kept."""
    out: Path | None = None
    """Folder of the training. Default: runs/train/ and the data set's name."""


def main(settings: TrainSettings) -> None:
    """Train, or go on; print where the network is."""
    settings = complete(settings)
    check(settings)
    devices = join_devices(settings.device)
    try:
        train, val = (open_dataset(settings.dataset, s, settings.data_dir) for s in (settings.train_split, settings.val_split))
        directory = settings.out or Path("runs") / "train" / train.name
        best = train_network(settings, train, val, directory, devices, ["python", "-m", "search.train", *sys.argv[1:]])
        if devices.rank == 0:
            print(f"best mIOU on {val.name} {val.split}: {100 * best:.2f} %\nnetwork: {directory / 'best.safetensors'}")
    except NotFiniteTrainingError as error:
        raise InputError(
            f"{error}: begin again with a lower --learning-rate or more --slow-start-iterations, and another --out; "
            f"{directory} keeps what was good before"
        ) from error
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"the device's memory is full: give --accumulate {2 * settings.accumulate}, or a smaller --crop-size"
        ) from error
    finally:
        devices.close()


class NotFiniteTrainingError(InputError):
    """The loss or the weights left the finite numbers."""


def train_network(
    settings: TrainSettings,
    train: Dataset,
    val: Dataset,
    directory: Path,
    devices: Devices,
    command: list[str],
    on_step: Callable[[int], None] | None = None,
) -> float:
    """Train in `directory`, or go on there, by settings that are complete and checked; returns the best mIOU.

    `command` is kept beside the settings. Raises what `Training.run` and `open_training` raise.
    """
    torch.manual_seed(settings.seed)
    network = create_network(settings, train)
    if devices.rank > 0:  # the first process alone writes
        return Training(settings, network, train, val, directory, devices).run()
    with open_training(directory, identity(settings, network, train, val, devices), command):
        return Training(settings, network, train, val, directory, devices).run(on_step)


class Training:
    """The loop; all that must last is in `state.pt`."""

    def __init__(
        self,
        settings: TrainSettings,
        network: SegmentationNetwork,
        train: Dataset,
        val: Dataset,
        directory: Path,
        devices: Devices,
    ) -> None:
        self.settings, self.val, self.directory, self.devices = settings, val, directory, devices
        self.crops = TrainingCrops(train, _augmentation(settings, network.backbone), settings.seed)
        self.network = network.to(devices.device)
        self._learns = self.devices.prepare(self.network)
        groups = parameter_groups(
            self.network, weight_decay=settings.weight_decay, last_layer_multiplier=settings.last_layer_multiplier
        )
        self.optimizer = torch.optim.SGD(groups, lr=0.0, momentum=settings.momentum)
        self.average = averaged(self.network, settings.ema) if settings.ema else None
        self.iteration, self.validated, self.best, self.seconds = 0, 0, -1.0, 0.0
        self._losses: list[tuple[Tensor, float]] = []  # since the last look, with their learning rates
        self._stop = False

    def run(self, on_step: Callable[[int], None] | None = None) -> float:
        """To the end; returns the best mIOU. Who gives `on_step` is told each iteration there, and nothing is printed.

        Raises NotFiniteTrainingError, and InputError for unusable pictures.
        """
        self._restore()
        self._begun = time.perf_counter() - self.seconds
        self._quiet = on_step is not None or self.devices.rank > 0
        total = _known(self.settings.iterations)
        batches = self._batches()
        bar = tqdm(total=total, initial=self.iteration, desc="training", unit="step", disable=self._quiet)
        self.curve = Curve(self.directory, self.iteration, self.validated) if self.devices.rank == 0 else None
        begun_at = self.iteration
        with bar, self._stopped_by_ctrl_c():
            try:
                while True:
                    if self._is_due(total) and self.validated < self.iteration:
                        self._validate()
                    if self.iteration == total:
                        if self._stop:  # in the validation: whoever trains several networks is to end too
                            raise KeyboardInterrupt
                        return self.best
                    stop = self._step([self._next(batches) for _ in range(self.settings.accumulate)])
                    bar.update()
                    if on_step is not None:
                        on_step(self.iteration)
                    if self.iteration == begun_at + 1:
                        self._print_memory()
                    if self.iteration % _LOG_EVERY == 0 or self.iteration == total:
                        bar.set_postfix(loss=f"{self._log():.4f}", rate=f"{self._rate():.2g}", best=self._best())
                    if stop or self.iteration % self.settings.checkpoint_every == 0:
                        self._save()
                    if stop:
                        raise KeyboardInterrupt
            finally:
                if self.curve is not None:
                    self.curve.close()

    def _best(self) -> str:
        return "-" if self.best < 0 else f"{100 * self.best:.2f}%"

    def _step(self, batches: list[Crop]) -> bool:
        """One iteration; returns whether to stop after it."""
        settings, devices = self.settings, self.devices
        torch.manual_seed(_seed(settings.seed, _DROPOUT, self.iteration, devices.rank))
        set_training(self.network, frozen_batch_norm=settings.frozen_batch_norm)
        share = mined_share(settings.hard_example_mining, self.iteration, settings.hard_example_iterations)
        counts = [int((batch.label != IGNORE_INDEX).sum()) for batch in batches]
        labelled, stop = devices.total(
            torch.tensor([sum(counts), self._stop], device=devices.device, dtype=torch.float64)
        ).tolist()
        rate = self._rate()
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=devices.device)
        for i, (batch, count) in enumerate(zip(batches, counts, strict=True)):
            # So many passes and devices as there are, the loss is the mean over all labelled pixels; the hardest ones are
            # sought in each pass for itself.
            weight = count / max(labelled, 1) if share == 1 else 1 / (len(batches) * devices.count)
            with devices.alone(self._learns) if i + 1 < len(batches) else _nothing():
                loss = self._loss(batch, share) * weight
                (loss * devices.count).backward()  # type: ignore[no-untyped-call]  # gradients are averaged over devices
            total += loss.detach()
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
        self.iteration += 1
        self._losses.append((total, rate))
        return bool(stop)

    def _loss(self, batch: Crop, share: float) -> Tensor:
        device = self.devices.device
        images, labels = batch.image.to(device, non_blocking=True), batch.label.to(device, non_blocking=True)
        with self._autocast():
            logits = self._learns(images)
        if share < 1:
            labels = hardest_pixels(logits.detach(), labels, share)
        return upsampled_cross_entropy(logits, labels)

    def _rate(self) -> float:
        settings = self.settings
        return poly_learning_rate(
            self.iteration,
            initial=_known(settings.learning_rate),
            iterations=_known(settings.iterations),
            slow_start_iterations=settings.slow_start_iterations,
            slow_start_rate=settings.slow_start_learning_rate,
        )

    def _log(self) -> float:
        """Look at the losses since the last look, write them down, return the latest."""
        if not self._losses:
            return math.nan
        losses = self.devices.total(torch.stack([loss for loss, _ in self._losses])).tolist()
        first = self.iteration - len(losses) + 1
        for iteration, (loss, (_, rate)) in enumerate(zip(losses, self._losses, strict=True), start=first):
            if not math.isfinite(loss):
                raise NotFiniteTrainingError(f"the loss was {loss} at iteration {iteration}")
            if self.curve is not None:
                self.curve.add(iteration, loss=loss, rate=rate)
        self._losses.clear()
        if self.curve is not None:
            self.curve.flush()
        return float(losses[-1])

    def _is_due(self, total: int) -> bool:
        every = self.settings.validate_every or max(1, total // 10)
        return self.iteration > 0 and (self.iteration % every == 0 or self.iteration == total)

    def _validate(self) -> None:
        """Score a copy of the network with statistics of its own; keep it as the last, and as the best if it is."""
        settings = self.settings
        if self._losses:
            self._log()
        network = copy.deepcopy(cast(SegmentationNetwork, self.average.module) if self.average is not None else self.network)
        self._require_finite(network)
        with self._autocast():
            if settings.statistics_batches and not settings.frozen_batch_norm:
                recompute_statistics(network, self._statistics_batches())
                self._require_finite(network)  # statistics overflow where no weight does
            indices = range(self.devices.rank, len(self.val), self.devices.count)
            network.eval()
            confusion = count_pixels(network, self.val, indices=indices, on_picture=self._stop_validation)
        counts = self.devices.total(confusion.double()).long().cpu().numpy()
        score = mean_iou(counts)
        if math.isnan(score):
            raise InputError(f"no pixel of {self.val.name} {self.val.split} has a label to score by: give another --val-split")
        self.validated = self.iteration
        if self.devices.rank == 0:
            if self.curve is not None:
                self.curve.add(self.iteration, mean_iou=score)
            if not self._quiet:
                tqdm.write(
                    f"iteration {self.iteration}: mIOU {100 * score:.2f} % on {self.val.name} {self.val.split}",
                    file=sys.stderr,
                )
            scores = {"mean_iou": score, "class_iou": [None if math.isnan(iou) else float(iou) for iou in class_iou(counts)]}
            self._keep("last", network, scores)
            if score > self.best:
                self._keep("best", network, scores)
        self.best = max(self.best, score)
        self._save()

    def _keep(self, name: str, network: SegmentationNetwork, scores: dict[str, Any]) -> None:
        source = {
            "training": _plain(self.settings),
            "iteration": self.iteration,
            "seconds": time.perf_counter() - self._begun,
            **scores,
            "palette": self.val.palette.tolist(),
        }
        save_network(self.directory / f"{name}.safetensors", network, class_names=self.val.class_names, source=source)

    def _statistics_batches(self) -> Iterator[Tensor]:
        size = _known(self.settings.batch_size) // (self.settings.accumulate * self.devices.count)
        for start in range(0, self.settings.statistics_batches * size, size):
            batch = self._checked(stack([self.crops[position] for position in range(start, start + size)]))
            yield batch.image.to(self.devices.device)

    def _batches(self) -> Iterator[Crop]:
        """This process's crops from the present iteration on, `accumulate` batches for each."""
        size, parts = _known(self.settings.batch_size), self.settings.accumulate * self.devices.count
        positions = [
            range(iteration * size + part * (size // parts), iteration * size + (part + 1) * (size // parts))
            for iteration in range(self.iteration, _known(self.settings.iterations))
            for part in range(self.devices.rank, parts, self.devices.count)
        ]
        loader = DataLoader(
            cast(Any, self.crops),
            batch_sampler=cast(Any, positions),
            collate_fn=stack,
            num_workers=self.settings.workers,
            worker_init_fn=_ignore_ctrl_c,
            generator=torch.Generator(),  # else it would draw from the stream of the dropout
            pin_memory=self.devices.device.type == "cuda",
        )
        return iter(loader)

    def _next(self, batches: Iterator[Crop]) -> Crop:
        try:
            return self._checked(next(batches))
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            raise InputError(
                f"a process that loads pictures has ended ({reason}): free memory, shared memory (/dev/shm) above all, or "
                "load in the training process by --workers 0; the same command goes on"
            ) from error

    def _checked(self, batch: Crop) -> Crop:
        if batch.problem:
            self._losses.clear()
            raise InputError(batch.problem)
        return batch

    def _restore(self) -> None:
        state = load_state(self.directory, self.devices.device)
        if state is None:
            return
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.iteration, self.validated, self.best = state["iteration"], state["validated"], state["best"]
        self.seconds = state.get("seconds", 0.0)

    def _save(self) -> None:
        if self._losses:
            self._log()
        self._require_finite(self.network)
        if self.curve is not None:
            self.curve.flush()  # before the state says that this is behind it
        self.devices.wait()
        if self.devices.rank > 0:
            return
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "iteration": self.iteration,
            "validated": self.validated,
            "best": self.best,
            "seconds": time.perf_counter() - self._begun,
        }
        save_state(self.directory, state)

    def _require_finite(self, network: nn.Module) -> None:
        """A finite loss says nothing of the step after it."""
        for name, tensor in network.state_dict().items():
            if not tensor.isfinite().all():
                raise NotFiniteTrainingError(f"after iteration {self.iteration} the weights {name} are not finite")

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.devices.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16")

    @contextmanager
    def _stopped_by_ctrl_c(self) -> Iterator[None]:
        """Ctrl-C ends the iteration first; a second one ends at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            self._stop = True
            signal.signal(signal.SIGINT, previous)

        previous = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _stop_validation(self) -> None:
        if self._stop and self.devices.count == 1:  # else the others would wait for this process's part of the sum
            self._save()
            raise KeyboardInterrupt

    def _print_memory(self) -> None:
        if self._quiet:
            return
        settings, crop = self.settings, _known(self.settings.crop_size)
        crops = _known(settings.batch_size) // (settings.accumulate * self.devices.count)
        if self.devices.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.devices.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        upsampled = 4 * crops * len(self.val.class_names) * crop[0] * crop[1]
        tqdm.write(
            f"memory: {peak / 2**30:.2f} GiB at most for passes of {crops} crops; --accumulate makes passes smaller. The loss "
            f"never makes full-size logits ({upsampled / 2**30:.2f} GiB and as much for their gradient).",
            file=sys.stderr,
        )


def averaged(network: nn.Module, decay: float) -> AveragedModel:
    """Moving average of the weights: decay · average + (1 − decay) · weights after each step, from the initial ones."""
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]
    average.update_parameters(network)  # its first call copies
    return average


def set_training(network: nn.Module, *, frozen_batch_norm: bool) -> None:
    """Training mode; frozen norms keep their statistics and use them, but their scale and offset learn, as the authors' do."""
    network.train()
    for child in network.modules():
        if frozen_batch_norm and isinstance(child, nn.BatchNorm2d):
            child.eval()


def create_network(settings: TrainSettings, dataset: Dataset) -> SegmentationNetwork:
    """The network that the settings name, with its first weights. Raises InputError naming the flag."""
    if settings.init is not None:
        return _initial_network(settings, dataset)
    cell = _best_cell(settings.run) if settings.run else load_cell(settings.cell or "dpc")
    features = FeatureSettings(
        dataset=settings.dataset,
        backbone=settings.backbone,
        weights=settings.weights,
        weights_origin=settings.weights_origin,
        pretrained=settings.pretrained,
        output_stride=settings.output_stride or 16,
        cache_dir=settings.cache_dir,
    )
    backbone = create_backbone(features, low_level=settings.decoder)
    channels = _known(settings.branch_channels)
    context = DensePredictionCell(
        cell,
        backbone.channels,
        branch_channels=channels,
        cell_channels=channels,
        output_stride=backbone.output_stride,
        dropout_rate=settings.dropout,
        pooling=settings.pooling,
    )
    decoder = Decoder(backbone.low_level.channels, channels=channels) if backbone.low_level is not None else None
    return SegmentationNetwork(backbone, SegmentationHead(context, len(dataset.class_names)), decoder)


def _best_cell(run: Path) -> Cell:
    """Of a search. Raises InputError for a folder that is none, or has no cell with a score yet."""
    path = run / "best_cells" / "rank_01.json"
    if not path.is_file():
        raise InputError(f"--run {run} has no {path.relative_to(run)}: give the folder of a search that has scored a cell")
    return load_cell(str(path))


def _initial_network(settings: TrainSettings, dataset: Dataset) -> SegmentationNetwork:
    try:
        network, description = load_network(_known(settings.init))
    except ValueError as error:
        raise InputError(f"{error}; correct --init") from error
    if tuple(description["class_names"]) != dataset.class_names:
        known = len(description["class_names"])
        print(f"{settings.init} knows {known} other classes: the classifier begins anew", file=sys.stderr)
        network.head = SegmentationHead(network.head.context, len(dataset.class_names))
    network.head.context.dropout.p = settings.dropout
    return network


def complete(settings: TrainSettings) -> TrainSettings:
    """With the defaults of its data set where no flag was given."""
    defaults = _SHAPES if settings.dataset == "shapes" else _PAPER
    return replace(settings, **{field: value for field, value in defaults.items() if getattr(settings, field) is None})  # type: ignore[arg-type]


def check(settings: TrainSettings) -> None:
    """Refuse what cannot work, before anything is written. Raises InputError naming the flag."""
    at_least_one = ("iterations", "batch_size", "accumulate", "branch_channels", "checkpoint_every")
    for field in (*at_least_one, *(("validate_every",) if settings.validate_every is not None else ())):
        _require(settings, field, lambda value: value >= 1, "at least 1")
    for field in ("workers", "statistics_batches", "slow_start_iterations", "hard_example_iterations", "scale_step", "seed"):
        _require(settings, field, lambda value: value >= 0, "at least 0")
    for field in ("weight_decay", "momentum", "slow_start_learning_rate"):
        _require(settings, field, lambda value: 0 <= value < math.inf, "at least 0")
    for field in ("learning_rate", "min_scale", "last_layer_multiplier"):
        _require(settings, field, lambda value: 0 < value < math.inf, "above 0")
    _require(settings, "hard_example_mining", lambda value: 0 < value <= 1, "above 0 and at most 1")
    for field in ("dropout", "ema"):
        _require(settings, field, lambda value: 0 <= value < 1, "at least 0 and below 1")
    _require(settings, "max_scale", lambda value: settings.min_scale <= value < math.inf, "at least --min-scale")
    _require(settings, "output_stride", lambda value: value in (None, 8, 16), "8 or 16")
    stride = settings.output_stride or 16
    crop = _known(settings.crop_size)
    if any(extent < 1 or (extent - 1) % stride for extent in crop):
        raise InputError(f"--crop-size {crop[0]} {crop[1]} must be {stride}·k + 1 each, such as 769 769 or 513 513")
    if _known(settings.slow_start_iterations) >= _known(settings.iterations):
        raise InputError(
            f"--slow-start-iterations {settings.slow_start_iterations} leaves none of --iterations {settings.iterations}"
        )
    if settings.cell is not None and settings.run is not None:
        raise InputError("--cell and --run both name a cell: leave one out")
    if settings.init is not None:
        named = ("cell", "run", "backbone", "weights", "pretrained", "output_stride", "decoder")
        if given := [f"--{field.replace('_', '-')}" for field in named if getattr(settings, field)]:
            raise InputError(f"--init brings its own architecture and weights: leave out {', '.join(given)}")


def _require(settings: TrainSettings, field: str, holds: Callable[[Any], bool], words: str) -> None:
    value = getattr(settings, field)
    if not holds(value):
        raise InputError(f"--{field.replace('_', '-')} must be {words}, got {value}")


def _augmentation(settings: TrainSettings, backbone: Backbone) -> Augmentation:
    red, green, blue = backbone.mean.flatten().tolist()
    scales = (settings.min_scale, settings.max_scale, settings.scale_step)
    return Augmentation(_known(settings.crop_size), (red, green, blue), *scales)


def identity(
    settings: TrainSettings, network: SegmentationNetwork, train: Dataset, val: Dataset, devices: Devices
) -> dict[str, Any]:
    """What the losses depend on; the same command goes on, another one is refused."""
    parts = settings.batch_size, settings.accumulate * devices.count
    if _known(parts[0]) % parts[1]:
        raise InputError(
            f"--batch-size {parts[0]} cannot be divided into {parts[1]} equal parts (--accumulate {settings.accumulate}, "
            f"{devices.count} devices)"
        )
    fields = {field: value for field, value in _plain(settings).items() if field not in _FREE}
    context = network.head.context
    return fields | {
        "cell": json.loads(context.cell.to_json()),
        "backbone": network.backbone.name,
        "output_stride": network.backbone.output_stride,
        "initial_weights": network.backbone.weights_hash() if settings.init is None else str(_weights_sum(network)),
        "data_fingerprint": train.fingerprint(),
        "val_fingerprint": val.fingerprint(),
        "devices": devices.count,
    }


def _weights_sum(network: nn.Module) -> float:
    return sum(float(value.double().abs().sum()) for value in network.state_dict().values())


def _plain(settings: TrainSettings) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(asdict(settings), default=str))
    return plain


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(list(parts)).generate_state(1)[0])


def _known(value: Value | None) -> Value:
    """A setting that `complete` has filled in."""
    assert value is not None
    return value


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _ignore_ctrl_c(worker: int) -> None:
    """The terminal sends it to loading processes too, whose end the training would take for an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    run_command(TrainSettings, main, prog="python -m search.train", goes_on=True)
