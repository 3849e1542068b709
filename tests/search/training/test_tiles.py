"""Pictures in tiles against whole pictures: where both must agree, what is blended between, and what is never held."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

import search.training.scoring
from fast.backbone import Backbone, plain_backbone
from fast.batch_norm import recompute_statistics
from fast.checkpoint import save_network
from fast.decoder import Decoder
from fast.dense_prediction_cell import DensePredictionCell
from fast.segmentation import SegmentationHead, SegmentationNetwork
from reference.cell import Cell
from reference.grid import Grid
from search.datasets import Sample
from search.dense_tasks import DenseTask
from search.dense_tasks.depth import Depth
from search.errors import InputError
from search.settings import PredictionSettings
from search.training.predictor import Predictor
from search.training.scoring import count_split, predict_picture, predict_split
from search.training.tiles import Tiles, blended_rows, tile_starts
from tests.search.training.test_predictor import pixels, varied_network
from tests.search.training.test_scoring import Made, Reader

# Rates that stay near, and no pooling, so that an output depends on a bounded part of the picture.
NEAR = Cell.from_json(
    '[{"op": "conv", "kernel": 3, "rate": [1, 1], "input": -1}, {"op": "conv", "kernel": 1, "input": -1},'
    ' {"op": "conv", "kernel": 3, "rate": [1, 3], "input": 0}]'
)
# In pixels of the picture, rows and columns: four plain layers of 3 × 3 at strides 1, 2, 4 and 8, two branches one after the
# other, with rates 1 and 1, 1 and 3, in features of 16 pixels, and the feature below, from which logits are interpolated.
SEES = (1 + 2 + 4 + 8 + 16 * (1 + 1) + 16, 1 + 2 + 4 + 8 + 16 * (1 + 3) + 16)


CORNERS = Grid(16)
DECODER_SEES = 4 * (1 + 1 + 1)  # two layers of 3 × 3 at stride 4, and the interpolation of their logits


def near_network(outputs: int, *, decoder: bool = False) -> SegmentationNetwork:
    torch.manual_seed(0)
    backbone = plain_backbone("plain", (4, 6, 8, 8), output_stride=16, low_level=decoder)
    context = DensePredictionCell(NEAR, 8, branch_channels=4, cell_channels=4)
    network = SegmentationNetwork(backbone, SegmentationHead(context, outputs), Decoder(6, channels=4) if decoder else None)
    recompute_statistics(network, [torch.rand(4, 3, 129, 129) * 255])
    torch.nn.init.normal_(network.head.classifier.weight, std=3.0)
    return network.eval()


class Raw(Depth):
    """Predicts the first output as it is, so that what is blended can be seen."""

    def predict(self, outputs: Tensor) -> Tensor:
        return outputs[:, 0]


def inside(size: tuple[int, int], tiles: Tiles, more: int, grid: Grid = CORNERS) -> NDArray[np.bool_]:
    """Which pixels see nothing beyond any of the tiles that they are in, but what lies beyond the picture."""
    sees_all = []
    for extent, tile, reach in zip(size, tiles.size, SEES, strict=True):
        place, good = np.arange(extent), np.ones(extent, bool)
        for start in tile_starts(extent, tile, tiles.overlap, grid):
            first = 0 if start == 0 else start + reach + more
            last = extent - 1 if start + tile == extent else start + tile - 1 - reach - more
            good &= (place < start) | (place >= start + tile) | ((first <= place) & (place <= last))
        sees_all.append(good)
    return np.logical_and.outer(*sees_all)


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
def test_what_sees_no_border_of_a_tile_is_as_in_the_whole_picture(decoder: bool, flip: bool, overlap: float) -> None:
    network, size, tiles = near_network(1, decoder=decoder), (353, 481), Tiles((257, 289), overlap)
    image = pixels(size=size)
    whole = predict_picture(network, image, Raw(), flip=flip)
    tiled = predict_picture(network, image, Raw(), flip=flip, tiles=tiles)
    exact = inside(size, tiles, more=DECODER_SEES * decoder)
    assert 0.1 < exact.mean() < 1
    deviation = (whole - tiled).abs().numpy()
    assert deviation[exact].max() < 1e-5 * whole.abs().max()
    assert deviation[~exact].max() > 1e-3 * whole.abs().max()


class OwnPatches(nn.Module):
    """Features that each see their own 16 × 16 pixels alone."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, 8, kernel_size=16, stride=16)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.project(images)]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("overlap", [0.25, 0.6])
def test_tiles_of_patches_are_as_the_whole_picture_is(flip: bool, overlap: float) -> None:
    torch.manual_seed(0)
    mean, std = torch.full((3,), 127.5), torch.full((3,), 127.5)
    backbone = Backbone("own", OwnPatches(), channels=8, output_stride=16, mean=mean, std=std, align_corners=False)
    network = SegmentationNetwork(backbone, near_network(1).head).eval()
    size, tiles = (352, 480), Tiles((256, 288), overlap)
    image = pixels(size=size)
    whole = predict_picture(network, image, Raw(), flip=flip)
    tiled = predict_picture(network, image, Raw(), flip=flip, tiles=tiles)
    exact = inside(size, tiles, more=0, grid=backbone.grid)
    assert 0.1 < exact.mean() < 1
    deviation = (whole - tiled).abs().numpy()
    assert deviation[exact].max() < 1e-5 * whole.abs().max()
    assert deviation[~exact].max() > 1e-3 * whole.abs().max()


@pytest.mark.parametrize("options", [{}, {"scales": (0.5, 1.25), "flip": True}, {"pad_to": (65, 129)}])
def test_a_picture_of_one_tile_is_predicted_as_a_whole(options: dict[str, Any]) -> None:
    network, image = varied_network(3), pixels(size=(50, 100))
    whole = predict_picture(network, image, Made.task, **options)
    assert torch.equal(predict_picture(network, image, Made.task, tiles=Tiles((257, 129)), **options), whole)


def test_scales_and_precision_are_those_of_each_tile() -> None:
    network, image, tiles = varied_network(3), pixels(size=(33, 65)), Tiles((33, 33), 0.0)  # their borders coincide
    options: dict[str, Any] = {"scales": (0.5, 1.5), "flip": True}
    with torch.autocast("cpu", torch.bfloat16):
        tiled = predict_picture(network, image, Made.task, tiles=tiles, **options)
        halves = [predict_picture(network, image[:, place], Made.task, **options) for place in (slice(33), slice(32, 65))]
    assert (tiled.dtype, int(tiled.max())) == (torch.uint8, 2)
    assert torch.equal(tiled[:, :32].long(), halves[0][:, :32])
    assert torch.equal(tiled[:, 33:].long(), halves[1][:, 1:])


@given(
    extents=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    tile=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.9]),
    grid=st.builds(Grid, st.sampled_from([1, 8, 14]), st.booleans()),
)
def test_tiles_cover_the_picture_and_their_weights_sum_to_one(
    extents: tuple[int, int], tile: tuple[int, int], overlap: float, grid: Grid
) -> None:
    height, width = grid.pixels((extents[0] + 1, extents[1] + 1))
    tile_height, tile_width = map(min, grid.pixels((tile[0] + 1, tile[1] + 1)), (height, width))
    whole = torch.arange(2.0 * height * width).reshape(2, height, width)
    seen: list[tuple[int, int]] = []

    def outputs(top: int, left: int) -> Tensor:
        assert top % grid.stride == left % grid.stride == 0
        part = whole[:, top : top + tile_height, left : left + tile_width]
        assert part.shape == (2, tile_height, tile_width)
        seen.append((top, left))
        return part

    bands = [band.clone() for band in blended_rows(outputs, (height, width), (tile_height, tile_width), overlap, grid)]
    torch.testing.assert_close(torch.cat(bands, dim=1), whole, rtol=1e-6, atol=0)
    assert max(band.shape[1] for band in bands) <= tile_height
    assert len(set(seen)) == len(seen)


def test_neighbours_blend_into_each_other() -> None:
    """Two tiles of 17 pixels share 9, of which each counts by tenths."""
    band = next(blended_rows(lambda top, left: torch.full((1, 1, 17), float(left > 0)), (1, 25), (1, 17), 0.5, Grid(8)))
    expected = [0.0] * 8 + [step / 10 for step in range(1, 10)] + [1.0] * 8
    torch.testing.assert_close(band[0, 0], torch.tensor(expected))


def test_a_split_in_tiles_counts_what_its_tiled_predictions_are() -> None:
    dataset, network = Made(((33, 49), (20, 90), (17, 17))), Reader()
    whole = count_split(network, dataset, indices=range(3))
    network.seen.clear()
    tiled = count_split(network, dataset, indices=range(3), tiles=Tiles((33, 33), 0.5))
    assert torch.equal(tiled, whole)  # each pixel alone says what it is
    assert network.seen == [(1, 3, 33, 33)] * (2 + 5) + [(1, 3, 17, 17)]
    network.seen.clear()
    assert torch.equal(count_split(network, dataset, indices=range(3), pad_to=(33, 65), tiles=Tiles((17, 65))), whole)
    assert network.seen == [(1, 3, 17, 65)] * (2 + 4 + 2)  # the second is larger than what is padded to


@pytest.mark.parametrize("task", [Made.task, Depth()])
def test_large_pictures_are_counted_in_parts(task: DenseTask, monkeypatch: pytest.MonkeyPatch) -> None:
    class Alike(Made):
        def __getitem__(self, index: int) -> Sample:
            return Sample(np.zeros((20, 30, 3), np.uint8), labels.numpy().astype(task.label_dtype), "a")

    Alike.task = task
    labels = torch.from_numpy(np.random.default_rng(0).integers(1, 3, (20, 30)))
    prediction = torch.from_numpy(np.random.default_rng(1).integers(1, 3, (20, 30)))
    at_once = [counted for _, _, counted in predict_split(lambda sample: prediction, Alike(), [0])]
    monkeypatch.setattr(search.training.scoring, "_COUNTED_PIXELS", 95)
    in_parts = [counted for _, _, counted in predict_split(lambda sample: prediction, Alike(), [0])]
    torch.testing.assert_close(in_parts, at_once)
    assert at_once[0].sum() > 0


def test_the_network_sees_tiles_where_settings_or_its_file_say_so(tmp_path: Path) -> None:
    def seen(settings: PredictionSettings, evaluation: dict[str, Any]) -> list[tuple[int, ...]]:
        path = tmp_path / "n.safetensors"
        save_network(path, varied_network(3), task=Made.task.describe(), evaluation=evaluation)
        loaded, network = Predictor.load(path, settings, device="cpu"), Reader()
        replace(loaded, network=network).predict(pixels(size=(33, 65)))
        return [shape[2:] for shape in network.seen]

    tiled = {"tile_size": (33, 33), "tile_overlap": 0.5}
    assert seen(PredictionSettings(), {}) == [(33, 65)]
    assert seen(PredictionSettings(), tiled) == [(33, 33)] * 3
    assert seen(PredictionSettings(tile_overlap=0.0), tiled) == [(33, 33)] * 2
    assert seen(PredictionSettings(tile_size="whole"), tiled) == [(33, 65)]
    assert seen(PredictionSettings(tile_size=(17, 65), tile_overlap=0.0), tiled) == [(17, 65)] * 2


def test_tiles_that_cannot_be_are_refused(tmp_path: Path) -> None:
    path, network = tmp_path / "n.safetensors", varied_network(3)
    network.head.context.pin_pooling((3, 5))
    save_network(path, network, task=Made.task.describe())
    for settings, message in (
        (PredictionSettings(tile_size=(512, 33)), r"`tile_size` 512 33 must be 16·k \+ 1 each, such as 513 33$"),
        (PredictionSettings(tile_size=(1, 33)), r"`tile_size` 1 33 must be 16·k \+ 1 each, such as 17 33$"),
        (PredictionSettings(tile_overlap=1.0), "`tile_overlap` must be at least 0 and below 1, got 1.0"),
        (PredictionSettings(tile_size=(33, 49)), "`tile_size` 33 49 is smaller than the windows .*: give at least 33 65$"),
    ):
        with pytest.raises(InputError, match=message):
            Predictor.load(path, settings, device="cpu")
    save_network(path, network, task=Made.task.describe(), evaluation={"tile_size": (41, 65), "tile_overlap": 0.25})
    with pytest.raises(InputError, match="`tile_size` 41 65 must be 16·k"):
        Predictor.load(path, device="cpu")
    assert Predictor.load(path, PredictionSettings(tile_size=(33, 65)), device="cpu").predict(pixels()).shape == (20, 30)
