"""Either grid of features, from pictures to scores: edges stay on their pixels, and sizes off the grid are refused."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import search.evaluate
import search.join
import search.predict
import search.random
from fast.backbone import Backbone, timm_backbone
from fast.checkpoint import load_network
from fast.decoder import Decoder
from fast.dense_prediction_cell import DensePredictionCell
from fast.hard_example_mining import hardest_pixels
from fast.segmentation import SegmentationHead, SegmentationNetwork, predict_scales
from fast.upsampled_cross_entropy import upsampled_cross_entropy
from reference.grid import Grid
from search.cells.reach import FeatureMaps
from search.datasets import Fingerprint, Sample, evaluation_size
from search.dense_tasks.segmentation import Segmentation
from search.devices import Devices
from search.errors import InputError
from search.evaluate import EvaluateSettings
from search.pipeline import SearchSettings, load_found, search_cells, train_network
from search.predict import PredictSettings
from search.random import RandomSettings
from search.runs.study import load_run
from search.settings import (
    FeatureSettings,
    HeadSettings,
    MachineSettings,
    PredictionSettings,
    ProxySettings,
    RecipeSettings,
    TrainingPictures,
    TrainingSettings,
    check_on_grid,
    check_tile_size,
    known,
)
from search.tasks.feature_cache import FeatureCache, caches_of, facts_of
from search.tasks.proxy import ProxyTask
from search.training.augmentation import Crop
from search.training.loop import Training
from search.training.memory import PredictionMemory
from search.training.predictor import Predictor
from search.training.scoring import count_split, input_size, predict_picture
from search.training.tiles import Tiles
from tests.read_pixels import CONV1X1, brightness_network, sampling_backbone, step_edge
from tests.search.composed import changed, composed
from tests.search.test_random import write_camvid

TASK = Segmentation(("dark", "bright"), np.zeros((2, 3), np.uint8))
CORNERS, CENTRES = Grid(16), Grid(16, align_corners=False)
GRIDS = [Grid(stride, align_corners) for stride in (4, 14, 16, 32) for align_corners in (True, False)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.stride}-{grid.name}")


def edge_behind(feature: int, grid: Grid) -> int:
    """The first pixel that is nearer to the next feature; with centres the first one of the next patch."""
    return grid.stride * feature + grid.stride // 2 + 1 if grid.align_corners else grid.stride * (feature + 1)


def first_bright(edge: int, grid: Grid, scale: float) -> int:
    """The first pixel past the middle between the last dark feature and the first bright one, of the scaled picture."""
    if not grid.align_corners:
        return edge  # if it is the first pixel of a patch of the scaled picture
    step = grid.stride / scale
    return math.floor(step * math.ceil(edge / step) - step / 2) + 1


# Predictions


@every_grid
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_an_edge_is_predicted_on_its_pixel(grid: Grid, axis: int, flip: bool, scale: float) -> None:
    """Far from the middle of the picture, where the wrong resize is off by most of half a feature."""
    size, network = grid.pixels((9, 11) if grid.align_corners else (8, 10)), brightness_network(grid)
    for edge in (edge_behind(1, grid), edge_behind(5, grid)):
        picture = step_edge(size, edge, axis)
        expected = step_edge(size, first_bright(edge, grid, scale), axis)[0, 0] > 0
        probabilities = predict_scales(network, picture, scales=(scale,), flip=flip)
        assert torch.equal(probabilities.argmax(dim=1)[0].bool(), expected)
        if (scale, flip) == (1.0, False):
            assert torch.equal(network.predict(picture)[0].bool(), expected)


@every_grid
def test_a_picture_off_the_grid_is_padded_behind_its_last_pixel(grid: Grid) -> None:
    whole, network = grid.pixels((5, 7)), brightness_network(grid)
    size, edge = (whole[0] - 1, whole[1] - 2), edge_behind(1, grid)
    assert input_size(network, size) == whole
    predicted = predict_picture(network, step_edge(size, edge, axis=1)[0].permute(1, 2, 0).byte().numpy(), TASK)
    assert tuple(predicted.shape) == size
    rows, columns = size[0] - grid.stride, size[1] - grid.stride  # behind them features see the padding, which is dark
    assert torch.equal(predicted[:rows, :columns].bool(), (step_edge(size, edge, axis=1)[0, 0] > 0)[:rows, :columns])


def test_pictures_that_lie_on_the_grid_are_not_padded() -> None:
    """A vision transformer sees 512 × 512 pixels where a CNN sees 513 × 513, and 1024 × 2048 where it sees 1025 × 2049."""
    patches, corners = brightness_network(CENTRES), brightness_network(CORNERS)
    for size in ((512, 512), (1024, 2048)):
        assert input_size(patches, size) == size
        assert input_size(corners, size) == (size[0] + 1, size[1] + 1)
    assert CENTRES.features((512, 512)) < CORNERS.features((513, 513))


# Sizes


def test_crops_by_default_are_the_largest_on_the_grid_within_the_authors() -> None:
    def crop(dataset: str, grid: Grid, size: tuple[int, int] = (1024, 2048)) -> tuple[int, int] | None:
        return RecipeSettings().completed(TrainingPictures(dataset, 100, size), grid).crop_size

    assert [crop("cityscapes", grid) for grid in (CORNERS, CENTRES, Grid(14, False))] == [(769, 769), (768, 768), (756, 756)]
    assert [crop("pascal_voc", grid) for grid in (CORNERS, CENTRES, Grid(32))] == [(513, 513), (512, 512), (513, 513)]
    assert [crop("shapes", grid) for grid in (CORNERS, CENTRES)] == [(257, 257), (256, 256)]
    assert [crop("mine.toml", grid, (224, 900)) for grid in (CORNERS, CENTRES)] == [(225, 769), (224, 768)]
    for grid in GRIDS:
        for dataset in ("cityscapes", "pascal_voc", "shapes", "mine.toml"):
            RecipeSettings().completed(TrainingPictures(dataset, 100, (30, 50)), grid).check(grid)


def test_pictures_are_evaluated_at_the_largest_size_on_the_grid_within_the_authors() -> None:
    sizes = [evaluation_size("pascal_voc", grid) for grid in (CORNERS, CENTRES, Grid(14, False))]
    assert sizes == [(513, 513), (512, 512), (504, 504)]  # no picture is larger than 500 × 500
    assert evaluation_size("camvid", CENTRES) is None


@pytest.mark.parametrize("field", ["image_size", "crop_size", "tile_size"])
@pytest.mark.parametrize(
    ("grid", "size", "words"),
    [
        (CORNERS, (512, 1024), r"512 1024 must be 16·k \+ 1 each, such as 513 1025$"),
        (CENTRES, (513, 1024), r"513 1024 must be 16·k each, such as 512 1024$"),
        (Grid(14, False), (512, 518), r"512 518 must be 14·k each, such as 518 518$"),
        (CENTRES, (0, 16), r"0 16 must be 16·k each, such as 16 16$"),
    ],
)
def test_a_size_off_the_grid_is_refused_with_the_nearest_one_that_works(
    field: str, grid: Grid, size: tuple[int, int], words: str
) -> None:
    def check() -> None:
        if field == "image_size":
            FeatureSettings(image_size=size).check(grid)
            return
        recipe = RecipeSettings(crop_size=size) if field == "crop_size" else RecipeSettings(tile_size=size)
        recipe.completed(TrainingPictures("mine.toml", 40, (224, 300)), grid).check(grid)

    with pytest.raises(InputError, match=f"`{field}` {words}"):
        check()


@pytest.mark.parametrize("size", [(512,), (512.0, 512.0), 512, "512 512"])
def test_what_is_no_size_is_refused(size: object) -> None:
    with pytest.raises(InputError, match="`crop_size` must be a height and a width in pixels"):
        check_on_grid("crop_size", size, CENTRES)  # type: ignore[arg-type]  # as from Python


def test_the_proposed_tiles_lie_on_the_grid() -> None:
    for grid in GRIDS:
        network = brightness_network(grid)
        sides = PredictionMemory(network, 2)._sides
        assert max(sides) > 2000
        assert sides == sorted(set(sides), reverse=True)
        for side in sides:
            check_tile_size((side, side), grid)


# Caches and the proxy task


@dataclass(frozen=True)
class Bright:
    """Random pictures of black and white columns, as wide as a patch, and labels that say which."""

    sizes: tuple[tuple[int, int], ...] = ((64, 96),) * 6
    split: str = "train"
    width: int = 16

    name, task = "bright", TASK

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng([index, len(self.split)])
        height, width = self.sizes[index]
        columns = rng.integers(0, 2, -(-width // self.width), dtype=np.uint8).repeat(self.width)
        label = np.tile(columns[:width], (height, 1))
        return Sample(np.repeat(255 * label[..., None], 3, axis=2), label, f"picture {index}")

    def fingerprint(self) -> Fingerprint:
        return Fingerprint(f"{self.sizes} {self.split}", "bright")

    def problems(self) -> list[str]:
        return []


def caches(folder: Path, backbone: Backbone, **features: Any) -> dict[str, FeatureCache]:
    settings, machine = FeatureSettings(**features), MachineSettings(cache_dir=folder, device="cpu")
    return caches_of(Bright(), Bright(split="val"), backbone, settings, machine, "made by a test")


def test_features_of_patches_are_cached_without_padding(tmp_path: Path) -> None:
    train = caches(tmp_path, sampling_backbone(CENTRES))["train"]
    assert (train.features.shape, train.labels.shape, train.grid) == ((6, 3, 4, 6), (6, 64, 96), CENTRES)
    for index in range(6):
        assert torch.equal(train.features[index, 0], train.labels[index, ::16, ::16].half())
    corners = caches(tmp_path, sampling_backbone(CORNERS))["train"]
    assert (corners.features.shape, corners.labels.shape, corners.grid) == ((6, 3, 5, 7), (6, 65, 97), CORNERS)


def test_caches_and_heads_say_that_features_are_in_the_middle_of_patches(tmp_path: Path) -> None:
    """And say nothing of corners, as those that were written when there were no others."""
    for grid, said in ((CORNERS, {}), (CENTRES, {"align_corners": False})):
        both = caches(tmp_path, sampling_backbone(grid))
        for described in (both["train"].identity, facts_of(both)):
            assert {key: value for key, value in described.items() if "corners" in key} == said


def test_the_size_that_is_said_to_hold_all_pictures_lies_on_the_grid(tmp_path: Path) -> None:
    pictures, machine = Bright(((64, 96), (66, 90))), MachineSettings(cache_dir=tmp_path, device="cpu")
    for grid, words in ((CORNERS, "larger than 65×97: .*; 81 97 fits"), (CENTRES, "larger than 64×96: .*; 80 96 fits")):
        with pytest.raises(InputError, match=words):
            caches_of(pictures, pictures, sampling_backbone(grid), FeatureSettings(), machine, "made by a test")


@pytest.mark.parametrize(
    ("crop", "words"),
    [((65, 64), "65 64 must be 16·k each, at most 64 96, .*, such as 64 64$"), ((64, 112), "64 112 must .*, such as 64 96$")],
)
def test_crops_of_the_cached_images_lie_on_their_grid(tmp_path: Path, crop: tuple[int, int], words: str) -> None:
    settings, machine = FeatureSettings(), MachineSettings(cache_dir=tmp_path, device="cpu")
    with pytest.raises(InputError, match=f"`crop_size` {words}"):
        caches_of(Bright(), Bright(split="val"), sampling_backbone(CENTRES), settings, machine, "made by a test", crop)
    assert not list(tmp_path.iterdir())  # before anything is computed


def test_the_proxy_task_trains_and_scores_on_patches(tmp_path: Path) -> None:
    both = caches(tmp_path, sampling_backbone(CENTRES))
    settings = ProxySettings(iterations=60, batch_size=4, learning_rate=0.2, crop_size=(32, 48), statistics_batches=4)
    task = ProxyTask(both["train"], both["val"], settings, HeadSettings(branch_channels=4, dropout=0.0))
    confusion = task._totals(brightness_network(CENTRES).head)
    assert confusion.sum() == both["val"].labels.numel()
    assert confusion.trace() == confusion.sum()  # every column is predicted from its first pixel to its last
    features, labels = task._create_step(task._create_head(CONV1X1)).draw()
    assert (features.shape, labels.shape) == ((4, 3, 2, 3), (4, 32, 48))
    assert torch.equal(labels, features[:, 0].repeat_interleave(16, dim=1).repeat_interleave(16, dim=2).to(labels.dtype))
    result, _ = task.evaluate(CONV1X1, (0,))
    assert result.score > 0.95  # columns that are wider than 15 or 17 pixels would cost as much


# Whole trainings


@pytest.mark.parametrize("grid", [CORNERS, CENTRES], ids=lambda grid: grid.name)
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_the_loss_of_a_training_is_that_of_the_backbones_grid(grid: Grid, share: float, tmp_path: Path) -> None:
    recipe = RecipeSettings(batch_size=2, iterations=1, loading_processes=0)
    settings = TrainingSettings(recipe=recipe).completed(TrainingPictures("mine.toml", 4, (64, 96)), grid)
    network = brightness_network(grid)
    training = Training(settings, network, Bright(), Bright(split="val"), tmp_path, Devices("cpu"))
    samples = [Bright((known(settings.recipe.crop_size),) * 2)[index] for index in range(2)]
    labels = torch.from_numpy(np.stack([sample.label for sample in samples]))
    crop = Crop(torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2).float(), labels)
    logits = network(crop.image)

    def expected(align_corners: bool) -> float:
        kept = labels if share == 1 else hardest_pixels(logits, labels, share, align_corners=align_corners)
        return upsampled_cross_entropy(logits, kept, align_corners=align_corners).item()

    assert training._loss(crop, share).item() == pytest.approx(expected(grid.align_corners))
    assert expected(True) != pytest.approx(expected(False), rel=1e-4)


@pytest.mark.parametrize("decoder", [False, True])
def test_a_network_on_patches_is_trained_kept_and_used(decoder: bool, tmp_path: Path) -> None:
    """ConvNeXt, with random weights; pictures of several sizes, of which some are padded, in tiles where they are larger."""
    torch.manual_seed(0)
    backbone = timm_backbone("test_convnext", output_stride=16, low_level=decoder)
    context = DensePredictionCell(CONV1X1, backbone.channels, branch_channels=8, cell_channels=8)
    part = Decoder(backbone.low_level.channels, channels=8) if backbone.low_level else None
    network = SegmentationNetwork(backbone, SegmentationHead(context, 2), part)
    assert network.logits_grid == Grid(4 if decoder else 16, align_corners=False)
    train, val = (Bright(((64, 96), (70, 90), (33, 50), (64, 96)), split) for split in ("train", "val"))
    recipe = RecipeSettings(batch_size=2, iterations=4, statistics_batches=2, tile_size=(64, 64), loading_processes=0)
    trained = train_network(network, train, val, tmp_path / "run", recipe=recipe, machine=MachineSettings(device="cpu"))

    file = tmp_path / "run" / "best.safetensors"
    predictor = Predictor.load(file, device="cpu")
    assert (predictor.network.backbone.grid, predictor.network.logits_grid) == (CENTRES, network.logits_grid)
    assert predictor.tiles == Tiles((64, 64), 0.25)
    assert [predictor.predict(val[index].image).shape for index in range(4)] == list(val.sizes)
    confusion = count_split(predictor.network, val, indices=range(4), tiles=predictor.tiles)
    assert TASK.scores(confusion.numpy()).score == trained.score
    for settings, words in (
        (PredictionSettings(pad_to=(65, 96)), "`pad_to` 65 96 must be 16·k each, such as 64 96$"),
        (PredictionSettings(tile_size=(65, 65)), "`tile_size` 65 65 must be 16·k each, such as 64 64$"),
        (PredictionSettings(output_stride=8), "at 16 alone; leave out `output_stride`, or give"),
        (PredictionSettings(output_stride=2), "^`output_stride` must be 4 to 32, got 2$"),
    ):
        with pytest.raises(InputError, match=words):
            Predictor.load(file, settings, device="cpu")


# A whole search


@pytest.mark.parametrize("stride", [4, 14, 16, 32])
def test_a_search_on_patches_of_any_size(stride: int, tmp_path: Path) -> None:
    """From pictures to a network, whose score is that of the search."""
    grid = Grid(stride, align_corners=False)
    size = grid.pixels((4, 6))
    train, val = (Bright((size,) * 4, split, stride) for split in ("train", "val"))
    backbone = sampling_backbone(grid)
    found = search_cells(
        train,
        val,
        backbone,
        tmp_path / "run",
        search=SearchSettings(trials=1, branches=2, compare=("aspp",)),
        proxy=ProxySettings(
            iterations=20, batch_size=4, learning_rate=0.2, crop_size=grid.pixels((2, 3)), statistics_batches=2
        ),
        head=HeadSettings(branch_channels=4),
        features=FeatureSettings(feature_dtype="bfloat16"),
        machine=MachineSettings(cache_dir=tmp_path / "cache", device="cpu"),
    )
    assert found.backbone["align_corners"] is False
    assert load_run(tmp_path / "run").space.maps == FeatureMaps((4, 6), (2, 3), 1, "sliding_window")
    network = load_found(tmp_path / "run").network(backbone)
    confusion = count_split(network, val, indices=range(4))
    assert TASK.scores(confusion.numpy()).score == pytest.approx(found.score, abs=0.02)  # features were rounded to 16 bits
    examples = np.load(tmp_path / "run" / "examples.npz")
    for name in (f"prediction_{row}/best" for row in range(4)):
        assert examples[name].shape == size


@pytest.mark.parametrize(
    ("backbone", "options", "stride"),
    [("test_convnext", {"output_stride": 32}, 32), ("test_vit", {}, 16), ("test_vit", {"patch_size": 14}, 14)],
    ids=["convnext", "vit", "vit of patches of 14"],
)
def test_commands_on_patches(
    backbone: str, options: dict[str, int], stride: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Search, join, evaluate, predict; nothing pads pictures that lie on the grid."""
    monkeypatch.setattr("search.reports.run_files.write_report", lambda run, device=None: run.directory / "report.html")
    torch.manual_seed(0)
    torch.save(timm.create_model(backbone).state_dict(), tmp_path / "weights.pth")
    size = Grid(stride, align_corners=False).pixels((2, 3))
    settings = composed(
        RandomSettings,
        dataset="camvid",
        data_dir=write_camvid(tmp_path / "camvid", size),
        weights=tmp_path / "weights.pth",
        backbone=backbone,
        **options,
        cache_dir=tmp_path / "cache",
        out=tmp_path / "run",
        device="cpu",
        trials=1,
        compare=(),
        iterations=4,
        batch_size=4,
        branch_channels=8,
        branches=2,
        statistics_batches=2,
    )
    with pytest.raises(InputError, match=rf"`image_size` {size[0] + 1} {size[1] + 1} must be {stride}·k each, such as "):
        search.random.main(changed(settings, image_size=(size[0] + 1, size[1] + 1)))
    assert not (tmp_path / "cache").exists()
    search.random.main(settings)
    run = load_run(tmp_path / "run")
    assert run.identity["image_size"] == list(size)
    network = tmp_path / "network.safetensors"
    search.join.main(search.join.JoinSettings(run=tmp_path / "run", out=network))
    joined = load_network(network)[1]["source"]["mean_iou"]
    assert joined == pytest.approx(known(run.trials[0].result).score, abs=0.02)  # features were rounded to 16 bits
    scores = tmp_path / "scores.json"
    search.evaluate.main(composed(EvaluateSettings, network=network, data_dir=tmp_path / "camvid", out=scores, device="cpu"))
    assert json.loads(scores.read_text())["mean_iou"] == joined
    pictures = tmp_path / "camvid" / "val"
    search.predict.main(
        composed(PredictSettings, network=network, pictures=(pictures,), out=tmp_path / "predicted", device="cpu")
    )
    with Image.open(tmp_path / "predicted" / "masks" / "0.png") as mask:
        assert (mask.height, mask.width) == size
