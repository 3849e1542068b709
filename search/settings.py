"""All settings, in groups, each declared once. A command composes the groups it needs; `search.cli` turns them into flags.

A group checks itself: `check` raises InputError about its own fields. A field declared by `changes_no_score` says where
files are or who does the work. All other fields affect the scores, and so belong to the identity of a run (`scored`).
"""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar, get_args, get_type_hints

from fast.backbone import WeightsOrigin
from fast.learning_rate import Schedule
from fast.train_step import OptimizerName, Precision
from reference.grid import Grid
from reference.pyramid_pooling import PoolingVariant
from search.errors import InputError

FeatureDtype = Literal["float16", "bfloat16"]
TaskName = Literal["segmentation", "depth"]
ClassWeights = tuple[float, ...] | Literal["balanced"]
Value = TypeVar("Value")
Group = TypeVar("Group")

SHAPES = "shapes"  # the generated scenes
TILE_OVERLAP = 0.25
MAX_MEGAPIXELS = 179.0  # which Pillow allows, too

# The authors' crops and numbers of steps in whole trainings, for the data sets that they trained on.
_AUTHORS = {
    "cityscapes": ((769, 769), 90_000),
    "pascal_voc": ((513, 513), 30_000),
    "pascal_person_part": ((513, 513), 30_000),
}
_CITYSCAPES_PICTURES = 2975


def changes_no_score(default: Value) -> Value:
    """Declare a field with this default whose value may change when a run continues."""
    free: Value = field(default=default, metadata={"changes_no_score": True})
    return free


def scored(*groups: Any) -> dict[str, Any]:
    """What a score depends on, by field, as JSON has it; of a command's settings its own fields, without its groups.

    >>> scored(DataSettings(), HeadSettings(branch_channels=64))
    {'dataset': 'shapes', 'branch_channels': 64, 'pooling': 'sliding_window', 'dropout': 0.1}
    """
    found: dict[str, Any] = {}
    for group in groups:
        values = {f.name: getattr(group, f.name) for f in fields(group) if not f.metadata.get("changes_no_score")}
        own = {name: value for name, value in values.items() if not is_dataclass(value)}
        assert not found.keys() & own.keys(), "two settings of one name: one of them would go unnoticed"
        found |= own
    return dict(plain(found))


def declared(*groups: Any) -> dict[str, Any]:
    """The defaults of all fields of these groups, as JSON has them: what `scored` gives where nothing was given.

    >>> declared(HeadSettings)
    {'branch_channels': None, 'pooling': 'sliding_window', 'dropout': 0.1}
    """
    found = {f.name: f.default for group in groups for f in fields(group) if f.default is not MISSING}
    return dict(plain({name: default for name, default in found.items() if not is_dataclass(default)}))


def plain(content: Any) -> Any:
    """Convert a group, or anything that contains groups, to what JSON has: lists for tuples, text for paths."""
    return json.loads(json.dumps(content, default=lambda value: str(value) if isinstance(value, Path) else asdict(value)))


def restored(group: type[Group], content: Mapping[str, Any]) -> Group:
    """Rebuild a group from what `plain` made of it; unknown fields are left out, missing ones get their defaults.

    >>> restored(FeatureSettings, plain(FeatureSettings(image_size=(33, 49))))
    FeatureSettings(image_size=(33, 49), mirrored=False, feature_dtype='float16')
    """
    types = get_type_hints(group)

    def value(name: str) -> Any:
        written, declared = content[name], types[name]
        if isinstance(written, str) and (declared is Path or Path in get_args(declared)):
            return Path(written)
        return tuple(written) if isinstance(written, list) else written

    return group(**{name: value(name) for name in types if name in content})


def field_names(group: type) -> frozenset[str]:
    """Names of the fields of a group, for `search.errors.fields_in`."""
    return frozenset(get_type_hints(group))


def require(field_name: str, value: Any, holds: bool, words: str) -> None:
    """Raise InputError about the field unless `holds`. Comparisons with NaN are False, so they refuse it too."""
    if not holds:
        raise InputError(f"`{field_name}` must be {words}, got {value}")


def known(value: Value | None) -> Value:
    """The value of a setting that `completed` has filled in."""
    assert value is not None
    return value


def given(value: Value | None, default: Value) -> Value:
    """The value, or the default where it is None: 0 and "" were given."""
    return default if value is None else value


def _require_size(field_name: str, value: Any, or_else: str = "") -> None:
    """Raise InputError about the field unless it is a height and a width in pixels."""
    is_size = isinstance(value, tuple | list) and len(value) == 2 and all(type(extent) is int for extent in value)
    require(field_name, repr(value), is_size, f"a height and a width in pixels, such as (513, 513){or_else}")


def check_on_grid(field_name: str, size: tuple[int, int], grid: Grid, *, least: int = 1) -> None:
    """Raises InputError about the field for pictures of a size on which features do not reach from border to border."""
    _require_size(field_name, size)
    if not grid.has(size) or min(size) < least:
        near = " ".join(map(str, grid.nearest(size)))
        raise InputError(f"`{field_name}` {size[0]} {size[1]} must be {grid} each, such as {near}")


def check_tile_size(size: tuple[int, int] | None, grid: Grid) -> None:
    """Raises InputError for tiles off the grid of features, and for those of a single pixel, which would leave gaps."""
    if size is not None:
        check_on_grid("tile_size", size, grid, least=2)


class TrainingPictures(NamedTuple):
    """What defaults follow from: the data set as it was given, and how many pictures of which size are to be trained on."""

    dataset: str
    number: int
    size: tuple[int, int]  # height and width in pixels of the first one

    def __str__(self) -> str:
        return f"{self.dataset}, {self.number} pictures of {self.size[0]}×{self.size[1]}"

    def steps(self, paper: int, paper_batch: int, batch: int, least: int) -> int:
        """As many passes over the pictures as the paper's number of steps makes over Cityscapes, with two digits.

        >>> TrainingPictures("mine.toml", 40, (224, 300)).steps(90_000, 16, batch=16, least=1000)
        1200
        """
        passes = paper * paper_batch / _CITYSCAPES_PICTURES
        steps = float(f"{passes * self.number / batch:.2g}")
        return int(min(max(steps, least), paper))

    def crop(self, grid: Grid) -> tuple[int, int]:
        """The size of the pictures, rounded up to the grid of features, at most the paper's 769.

        >>> pictures = TrainingPictures("mine.toml", 40, (224, 900))
        >>> pictures.crop(Grid(16)), pictures.crop(Grid(16, align_corners=False))
        ((225, 769), (224, 768))
        """
        height, width = grid.rounded_up(self.size)
        return grid.rounded_down((min(height, 769), min(width, 769)))


@dataclass(frozen=True, kw_only=True)
class FileSettings:
    """How picture files are read."""

    max_megapixels: float = changes_no_score(MAX_MEGAPIXELS)
    """Pictures with more megapixels are refused, because a damaged file may claim any size."""

    def check(self) -> None:
        """Raises InputError for a limit that admits nothing."""
        require("max_megapixels", self.max_megapixels, self.max_megapixels > 0, "above 0")


@dataclass(frozen=True, kw_only=True)
class PictureSettings(FileSettings):
    """The data set."""

    dataset: str = SHAPES
    """Data set: shapes (generated), camvid, cityscapes, pascal_voc, pascal_person_part, or a TOML file (docs/datasets.md)."""
    data_dir: Path | None = changes_no_score(None)  # its content is checked by the splits' fingerprints
    """Folder of the data set. Default for a TOML file: the folder that the file is in."""


@dataclass(frozen=True, kw_only=True)
class DataSettings(PictureSettings):
    """The data set, and its splits to train and to score on."""

    task: TaskName | None = changes_no_score(None)  # part of the data set's name and fingerprint
    """What to predict: segmentation or depth. None: what the data set has labels for; segmentation for shapes."""
    train_split: str = changes_no_score("train")  # part of the fingerprint
    """Split to train on, such as cityscapes' trainval or pascal_voc's train_aug."""
    val_split: str = changes_no_score("val")
    """Split to score on; where whole networks are trained, its score chooses the best."""


@dataclass(frozen=True, kw_only=True)
class BackboneSettings:
    """The backbone, which turns pictures into features."""

    backbone: str | None = None
    """Any timm model with feature maps (docs/backbones.md). None: a small one trained on the spot for shapes, mobilenetv2_100
    for other data."""
    weights: Path | None = changes_no_score(None)  # its content is checked by the hash of the weights
    """Local file of the backbone's weights (safetensors or PyTorch, as trainings write it, in timm's key names), or a network
    of this project, whose backbone is then used."""
    weights_origin: WeightsOrigin = "timm"
    """Where the weights were trained; weights from tensorflow expect its padding, epsilon 1e-3 and inputs in -1..1."""
    pretrained: bool = changes_no_score(False)
    """Let timm download its pretrained weights."""
    output_stride: int | None = None
    """Pixels per feature, 4 to 32; at 8 the cells' rates double. None: 16, or a vision transformer's patch."""
    layers: tuple[int, ...] = (-1,)
    """Layers of the backbone that cells read, counted from the end, the deepest first, such as -1 -4: blocks of a vision
    transformer, stages of others. -1 is the deepest that has the output stride."""
    patch_size: int | None = None
    """Pixels per side of a vision transformer's patches, to which its weights are resampled. None: its own."""

    @property
    def stride(self) -> int:
        """The output stride, after `search.backbones.completed_backbone`."""
        return given(self.output_stride, 16)

    def check(self) -> None:
        """Raise InputError for numbers that no backbone has."""
        require("output_stride", self.output_stride, 4 <= self.stride <= 32, "4 to 32")
        require("patch_size", self.patch_size, 4 <= given(self.patch_size, 4) <= 32, "4 to 32")
        is_row = bool(self.layers) and list(self.layers) == sorted(set(self.layers), reverse=True)
        layers = " ".join(map(str, self.layers)) or "none"
        require(
            "layers", layers, is_row and max(self.layers) < 0, "numbers below 0, each once, the deepest first, such as -1 -4"
        )


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """The cache of features."""

    image_size: tuple[int, int] | None = None
    """Height and width in pixels that images are padded to. None: size of the first image, rounded up to stride·k + 1, or for
    backbones that cut pictures into patches to stride·k."""
    mirrored: bool = False
    """Cache each training image's mirror image too."""
    feature_dtype: FeatureDtype = "float16"
    """Number format of the cached features: float16 or bfloat16."""

    def check(self, grid: Grid) -> None:
        """Raises InputError for a size on which features of this grid do not reach from border to border."""
        if self.image_size is not None:
            check_on_grid("image_size", self.image_size, grid)


@dataclass(frozen=True, kw_only=True)
class CellSettings:
    """How a cell is built: what its JSON leaves open."""

    branch_channels: int | None = None
    """Filters of each branch and of the cell's output. None: the paper's 256, or 64 for shapes."""
    pooling: PoolingVariant = "sliding_window"
    """Pyramid pooling as in the authors' code (sliding_window) or as the paper describes it (grid_cells)."""

    @property
    def channels(self) -> int:
        """Filters of each branch, after `completed`."""
        return known(self.branch_channels)

    def completed(self, dataset: str) -> Self:
        """With the defaults for a data set where nothing was given."""
        return replace(self, branch_channels=given(self.branch_channels, 64 if dataset == SHAPES else 256))

    def check(self) -> None:
        """Raises InputError for numbers that cannot work."""
        require("branch_channels", self.branch_channels, given(self.branch_channels, 1) >= 1, "at least 1")


@dataclass(frozen=True, kw_only=True)
class HeadSettings(CellSettings):
    """The head: a cell and its classifier."""

    dropout: float = 0.1
    """Share of the concatenated branch outputs that is dropped."""

    def check(self) -> None:
        """Raises InputError for numbers that cannot work."""
        super().check()
        require("dropout", self.dropout, 0 <= self.dropout < 1, "at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """The loss."""

    class_weights: ClassWeights | None = None
    """Factors for the losses of each class's pixels: a number for each class, in the order of the classes, or balanced, by
    which the pixels of every class weigh the same in all (docs/training.md). None: every pixel weighs the same."""

    def __post_init__(self) -> None:
        if self.class_weights is None or isinstance(self.class_weights, str):
            return
        with suppress(TypeError, ValueError):  # what is no row of numbers, `check` refuses
            object.__setattr__(self, "class_weights", tuple(map(float, self.class_weights)))  # arrays and tensors, too

    @property
    def numbers(self) -> tuple[float, ...] | None:
        """The weights, after `search.datasets.weights.completed_loss`."""
        assert self.class_weights != "balanced"
        return self.class_weights

    def check(self) -> None:
        """Raises InputError for numbers that cannot work."""
        if self.class_weights is not None and not isinstance(self.class_weights, tuple):
            words = "a number for each class, in the order of the classes, or balanced"
            require("class_weights", repr(self.class_weights), self.class_weights == "balanced", words)
        if isinstance(self.class_weights, tuple):
            work = all(0 <= weight < math.inf for weight in self.class_weights) and any(self.class_weights)
            shown = " ".join(f"{weight:g}" for weight in self.class_weights) or "none"
            require("class_weights", shown, work, "finite numbers of at least 0, not all of them 0")


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """The optimiser and its learning rate, in the trainings of a search and of whole networks alike."""

    optimizer: OptimizerName = "sgd"
    """The optimiser: sgd, with momentum, as in the paper, or adamw."""
    learning_rate: float | None = None
    """The learning rate from which it falls to 0."""
    schedule: Schedule = "poly"
    """How the learning rate falls to 0: poly, by the power 0.9 of the remaining share of steps, or cosine, as half a wave."""
    warmup_iterations: int = 0
    """First steps, in which the learning rate rises evenly from 0."""
    momentum: float | None = None
    """Momentum of sgd. None: 0.9."""
    weight_decay: float | None = None
    """Decay of all weights but depthwise ones, norms and biases: an L2 penalty with sgd; with adamw, times the learning rate,
    a share of the weight. None: 4e-5 with sgd, 0.05 with adamw."""

    def with_defaults(self, sgd: float, adamw: float) -> Self:
        """With the defaults of the optimiser where nothing was given; the learning rates are those of the training."""
        is_sgd = self.optimizer == "sgd"
        return replace(
            self,
            learning_rate=given(self.learning_rate, sgd if is_sgd else adamw),
            momentum=given(self.momentum, 0.9) if is_sgd else self.momentum,
            weight_decay=given(self.weight_decay, 4e-5 if is_sgd else 0.05),
        )

    def check_optimizer(self, iterations: int | None) -> None:
        """Raises InputError for numbers that cannot work, in so many iterations if that is known."""
        for name, choices in (("optimizer", OptimizerName), ("schedule", Schedule)):
            value = getattr(self, name)
            require(name, value, value in get_args(choices), " or ".join(get_args(choices)))
        require("learning_rate", self.learning_rate, 0 < given(self.learning_rate, 1.0) < math.inf, "above 0")
        require("momentum", self.momentum, 0 <= given(self.momentum, 0.0) < math.inf, "at least 0")
        require("weight_decay", self.weight_decay, 0 <= given(self.weight_decay, 0.0) < math.inf, "at least 0")
        require("warmup_iterations", self.warmup_iterations, self.warmup_iterations >= 0, "at least 0")
        if self.optimizer == "adamw" and self.momentum is not None:
            raise InputError(f"`momentum` {self.momentum} is of sgd, and `optimizer` is adamw: leave one of them out")
        if iterations is not None and self.warmup_iterations >= iterations >= 1:
            raise InputError(f"`warmup_iterations` {self.warmup_iterations} leaves none of `iterations` {iterations}")


@dataclass(frozen=True, kw_only=True)
class ProxySettings(OptimizerSettings):
    """The short training on cached features. The paper: 30,000 iterations, learning rate 0.01, batch 8."""

    iterations: int | None = None
    """Training steps per cell. None: by the number of pictures (docs/training.md); the paper's 30,000 for its data, 80 for
    shapes."""
    batch_size: int = 8
    """Crops per step."""
    learning_rate: float | None = None
    """The learning rate from which it falls to 0. None: 0.1; the paper's 0.01 for its data; 0.2 for shapes; 0.001 with
    adamw."""
    crop_size: tuple[int, int] | None = None
    """Height and width in pixels of the training crops, of the form stride·k + 1, or stride·k for backbones that cut pictures
    into patches. None: whole images."""
    precision: Precision = "auto"
    """Number format of the products in training: float32, bfloat16, or auto (bfloat16 where the device is faster at it)."""
    statistics_batches: int = 16
    """Training batches from which the batch norm statistics are recomputed before scoring."""

    @property
    def steps(self) -> int:
        """Training steps per cell, after `completed`."""
        return known(self.iterations)

    def completed(self, pictures: TrainingPictures) -> Self:
        """With defaults where nothing was given: the paper's for its data, small ones for shapes, else by the pictures."""
        if pictures.dataset == SHAPES:
            iterations, rate = 80, 0.2
        elif pictures.dataset in _AUTHORS:
            iterations, rate = 30_000, 0.01
        else:
            iterations, rate = pictures.steps(30_000, 8, batch=self.batch_size, least=200), 0.1
        return replace(self.with_defaults(sgd=rate, adamw=1e-3), iterations=given(self.iterations, iterations))

    def check(self) -> None:
        """Raises InputError for numbers that cannot work."""
        require("iterations", self.iterations, given(self.iterations, 1) >= 1, "at least 1")
        require("batch_size", self.batch_size, self.batch_size >= 1, "at least 1")
        require("statistics_batches", self.statistics_batches, self.statistics_batches >= 1, "at least 1")
        self.check_optimizer(self.iterations)


@dataclass(frozen=True, kw_only=True)
class RecipeSettings(OptimizerSettings):
    """The training of a whole network, apart from its backbone, cell and data."""

    decoder: bool = False
    """Add DeepLabv3+'s decoder, which also reads a feature map at stride 4."""
    crop_size: tuple[int, int] | None = None
    """Height and width in pixels of the training crops, stride·k + 1 each, or stride·k for backbones that cut pictures into
    patches. None: the picture's, at most 769 769; 769 769 for cityscapes, 513 513 for pascal_voc and pascal_person_part,
    257 257 for shapes; with patches, the next smaller stride·k."""
    min_scale: float | None = None
    """Smallest random scale of a training picture. None: 0.5."""
    max_scale: float | None = None
    """Largest random scale. None: 2."""
    scale_step: float = 0.25
    """Step between the scales that may be drawn; 0 allows any scale in the range."""
    batch_size: int | None = None
    """Crops per iteration, of all devices together. None: 16, or fewer where there are fewer pictures; 8 for shapes."""
    accumulate: int = 1
    """Passes per iteration, among which its crops are divided; more passes take less memory."""
    iterations: int | None = None
    """Steps of the optimiser. None: by the number of pictures (docs/training.md); 90,000 for cityscapes, 30,000 for pascal_voc
    and pascal_person_part, 150 for shapes."""
    learning_rate: float | None = None
    """The learning rate from which it falls to 0. None: 0.01; 0.05 for shapes; 0.0001 with adamw."""
    slow_start_iterations: int = 0
    """First iterations at a fixed rate, before the fall begins."""
    slow_start_learning_rate: float = 1e-4
    """The learning rate of these iterations."""
    last_layer_multiplier: float = 1.0
    """Learning rate of all parts but the backbone, as a multiple of the backbone's."""
    trainable_blocks: int | None = None
    """Learn only the backbone's last blocks, so many, and what comes behind them; 0: none of it, so that its features are
    frozen. What does not learn keeps its norms' statistics too. None: the whole backbone."""
    frozen_batch_norm: bool = False
    """Keep the statistics of the given weights in all batch norms; for batches too small to have their own."""
    hard_example_mining: float = 1.0
    """Share of the pixels that count in the loss: those with the largest loss."""
    hard_example_iterations: int = 0
    """Iterations over which that share falls from 1 to its value."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number format of the products in the network; the loss is always float32."""
    ema: float = 0.0
    """Decay of a moving average of the weights, such as 0.999; if above 0, the average is validated and kept."""
    statistics_batches: int = 16
    """Batches from which batch norm statistics are computed before validation; 0 takes the moving averages."""
    validate_every: int | None = None
    """Iterations between validations. None: a tenth of all; in re-ranking and fidelity, only after the last."""
    tile_size: tuple[int, int] | None = None
    """Height and width in pixels of the tiles in which validation pictures are predicted, of the crops' form; for pictures
    that do not fit in memory. None: whole pictures."""
    tile_overlap: float = TILE_OVERLAP
    """Least share of a tile's height and width by which it overlaps its neighbours."""
    checkpoint_every: int = changes_no_score(200)
    """Iterations between checkpoints, besides those at validations."""
    loading_processes: int = changes_no_score(2)
    """Processes that load pictures, for each network in training; with 0, pictures are loaded between iterations."""

    def completed(self, pictures: TrainingPictures, grid: Grid) -> Self:
        """With defaults where nothing was given: the authors' for their data, small ones for shapes, else by the pictures.

        The crops lie on the grid of the backbone's features.
        """
        if pictures.dataset == SHAPES:
            crop_size, batch_size, iterations, rate = grid.rounded_down((257, 257)), 8, 150, 0.05
        elif pictures.dataset in _AUTHORS:
            (largest, iterations), batch_size, rate = _AUTHORS[pictures.dataset], 16, 0.01
            crop_size = grid.rounded_down(largest)
        else:
            crop_size, batch_size, rate = pictures.crop(grid), min(16, max(4, pictures.number)), 0.01
            iterations = pictures.steps(90_000, 16, batch=max(1, given(self.batch_size, batch_size)), least=1000)
        return replace(
            self.with_defaults(sgd=rate, adamw=1e-4),
            crop_size=given(self.crop_size, crop_size),
            min_scale=given(self.min_scale, 0.5),
            max_scale=given(self.max_scale, 2.0),
            batch_size=given(self.batch_size, batch_size),
            iterations=given(self.iterations, iterations),
        )

    def check(self, grid: Grid) -> None:
        """Check a completed recipe for networks whose features lie on this grid. Raises InputError for what cannot work."""
        iterations = known(self.iterations)
        require("iterations", iterations, iterations >= 1, "at least 1")
        require("batch_size", self.batch_size, known(self.batch_size) >= 1, "at least 1")
        require("accumulate", self.accumulate, self.accumulate >= 1, "at least 1")
        require("checkpoint_every", self.checkpoint_every, self.checkpoint_every >= 1, "at least 1")
        require("validate_every", self.validate_every, given(self.validate_every, 1) >= 1, "at least 1")
        require("loading_processes", self.loading_processes, self.loading_processes >= 0, "at least 0")
        require("statistics_batches", self.statistics_batches, self.statistics_batches >= 0, "at least 0")
        require("slow_start_iterations", self.slow_start_iterations, self.slow_start_iterations >= 0, "at least 0")
        require("hard_example_iterations", self.hard_example_iterations, self.hard_example_iterations >= 0, "at least 0")
        require("scale_step", self.scale_step, self.scale_step >= 0, "at least 0")
        self.check_optimizer(iterations)
        rate = self.slow_start_learning_rate
        require("slow_start_learning_rate", rate, 0 <= rate < math.inf, "at least 0")
        blocks = self.trainable_blocks
        require("trainable_blocks", blocks, given(blocks, 0) >= 0, "at least 0")
        min_scale, max_scale = known(self.min_scale), known(self.max_scale)
        require("min_scale", min_scale, 0 < min_scale < math.inf, "above 0")
        multiplier = self.last_layer_multiplier
        require("last_layer_multiplier", multiplier, 0 < multiplier < math.inf, "above 0")
        share = self.hard_example_mining
        require("hard_example_mining", share, 0 < share <= 1, "above 0 and at most 1")
        require("ema", self.ema, 0 <= self.ema < 1, "at least 0 and below 1")
        require("max_scale", max_scale, min_scale <= max_scale < math.inf, f"at least `min_scale`, which is {min_scale}")
        check_on_grid("crop_size", known(self.crop_size), grid)
        require("tile_overlap", self.tile_overlap, 0 <= self.tile_overlap < 1, "at least 0 and below 1")
        check_tile_size(self.tile_size, grid)
        if self.slow_start_iterations >= iterations:
            raise InputError(f"`slow_start_iterations` {self.slow_start_iterations} leaves none of `iterations` {iterations}")
        if self.slow_start_iterations and self.warmup_iterations:
            raise InputError("`slow_start_iterations` and `warmup_iterations` are two ways to begin: leave one out")


@dataclass(frozen=True, kw_only=True)
class PredictionSettings(FileSettings):
    """How whole pictures are predicted."""

    scales: tuple[float, ...] = (1.0,)
    """Scales of the picture over which predictions are averaged, such as 0.75 1.0 1.25."""
    flip: bool = False
    """Average over the mirror images too."""
    pad_to: tuple[int, int] | Literal["own"] | None = None
    """Height and width that every picture is padded to, such as 513 513; own: its own, rounded up to stride·k + 1, or stride·k
    where the backbone cuts pictures into patches. None: what the network's file or the data set says (513 513 for
    pascal_voc), else own."""
    tile_size: tuple[int, int] | Literal["whole"] | None = None
    """Height and width in pixels of the tiles in which pictures are predicted, stride·k + 1 each, such as 1025 1025, or with
    patches stride·k, or whole.
    None: what the network's file says, if it was validated in tiles, else whole."""
    tile_overlap: float | None = None
    """Least share of a tile's height and width by which it overlaps its neighbours. None: what the network's file says of its
    own tiles, else 0.25."""
    output_stride: int | None = None
    """Pixels per feature; a network that was trained at 16 is finer at 8, and four times as slow, if its backbone has such
    features. None: as trained."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number format of the products in the network: float32 or bfloat16."""

    def check(self) -> None:
        """Raises InputError for numbers that cannot work."""
        super().check()
        has_scales = bool(self.scales) and all(0 < scale < math.inf for scale in self.scales)
        require("scales", self.scales, has_scales, "numbers above 0, at least one")
        if self.pad_to is not None and self.pad_to != "own":
            _require_size("pad_to", self.pad_to, ", or own")
            require("pad_to", self.pad_to, min(self.pad_to) >= 1, "at least 1 each, or own")
        if self.tile_size is not None and self.tile_size != "whole":
            _require_size("tile_size", self.tile_size, ", or whole")
        if self.tile_overlap is not None:
            require("tile_overlap", self.tile_overlap, 0 <= self.tile_overlap < 1, "at least 0 and below 1")
        require("output_stride", self.output_stride, 4 <= given(self.output_stride, 16) <= 32, "4 to 32")


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """The device."""

    device: str = changes_no_score("auto")
    """cpu, cuda, cuda:1, ...; auto takes the GPU if there is one."""


@dataclass(frozen=True, kw_only=True)
class MachineSettings(DeviceSettings):
    """Where it is computed, and where what is computed once is kept."""

    cache_dir: Path = changes_no_score(Path("cache"))
    """Folder for feature caches, and for the small backbones that are trained on the spot."""


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Who evaluates cells."""

    workers: int | Literal["auto"] = changes_no_score(1)
    """Cells evaluated at a time; above 1 by Ray (install the extra `workers`). auto: as many as the cluster, or this machine,
    has GPUs for, or CPUs; they follow the cluster as it grows and shrinks."""
    gpus_per_worker: float = changes_no_score(1.0)
    """GPUs of each worker on CUDA, where there are several: 0.25 puts four on a GPU."""

    def check(self) -> None:
        """Raise InputError for what cannot work."""
        require("workers", self.workers, self.workers == "auto" or self.workers >= 1, "auto or at least 1")
        require("gpus_per_worker", self.gpus_per_worker, 0 < self.gpus_per_worker <= 1, "more than 0, and at most 1")
        if self.workers == 1 and self.gpus_per_worker < 1:
            raise InputError(f"`gpus_per_worker` {self.gpus_per_worker} needs several `workers`, or auto")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """All settings of a whole network's training, but the cell."""

    data: DataSettings = DataSettings()
    backbone: BackboneSettings = BackboneSettings()
    head: HeadSettings = HeadSettings()
    loss: LossSettings = LossSettings()
    recipe: RecipeSettings = RecipeSettings()
    machine: MachineSettings = MachineSettings()
    seed: int = 0

    def completed(self, pictures: TrainingPictures, grid: Grid) -> Self:
        """With the defaults for the pictures, and for the grid of the backbone's features, where nothing was given."""
        recipe = self.recipe.completed(pictures, grid)
        return replace(self, head=self.head.completed(pictures.dataset), recipe=recipe)

    def validated_last(self) -> Self:
        """The completed settings with one validation, after the last iteration, unless told otherwise."""
        every = given(self.recipe.validate_every, known(self.recipe.iterations))
        return replace(self, recipe=replace(self.recipe, validate_every=every))

    def check(self, grid: Grid) -> None:
        """Check completed settings for this grid of features. Raises InputError for what cannot work."""
        self.backbone.check()
        self.head.check()
        self.loss.check()
        self.recipe.check(grid)
        require("seed", self.seed, self.seed >= 0, "at least 0")


# What a training or a folder of predictions that was begun before one of these fields existed was made with.
TRAINING_DEFAULTS = declared(DataSettings, BackboneSettings, HeadSettings, LossSettings, RecipeSettings)
PREDICTION_DEFAULTS = declared(PredictionSettings)
