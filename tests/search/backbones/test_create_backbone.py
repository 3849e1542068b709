import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from fast.checkpoint import save_network
from fast.dense_prediction_cell import DensePredictionCell
from fast.segmentation import SegmentationHead, SegmentationNetwork
from reference.grid import Grid
from search.backbones import completed_backbone, create_backbone, grid_of
from search.cells.space import load_cell
from search.errors import InputError
from search.folder import differences
from search.settings import BackboneSettings, declared, scored

NAME = "test_efficientnet"


def saved(path: Path, content: Any) -> BackboneSettings:
    torch.save(content, path)
    return BackboneSettings(backbone=NAME, weights=path)


@pytest.mark.parametrize("low_level", [False, True])
def test_weights_are_read_as_trainings_write_them(tmp_path: Path, low_level: bool) -> None:
    state = timm.create_model(NAME).state_dict()
    content = {"state_dict": {f"module.backbone.{key}": value for key, value in state.items()}, "args": argparse.Namespace()}
    settings = saved(tmp_path / "w.pth", content)
    backbone = create_backbone(settings, "camvid", tmp_path, low_level=low_level)
    assert all(torch.equal(value, state[key]) for key, value in backbone.body.state_dict().items())


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), r"has NaN in 1 of \d+ tensors, first 'bn1\.bias'; correct `weights`$"),
        (None, r"it lacks 1 keys, first 'bn1\.bias'; correct `backbone`, `weights` or `output_stride`$"),
    ],
)
def test_wrong_weights_are_an_error_about_the_field(tmp_path: Path, value: float | None, words: str) -> None:
    state = dict(timm.create_model(NAME).state_dict())
    bias = state.pop("bn1.bias")
    settings = saved(tmp_path / "w.pth", state if value is None else state | {"bn1.bias": bias * value})
    with pytest.raises(InputError, match=words):
        create_backbone(settings, "camvid", tmp_path)


GRIDS: dict[str, tuple[dict[str, Any], str, Grid]] = {
    "generated scenes": ({}, "shapes", Grid(16)),
    "generated scenes at 8": ({"output_stride": 8}, "shapes", Grid(8)),
    "other data": ({}, "camvid", Grid(16)),
    "a vision transformer": ({"backbone": "test_vit"}, "camvid", Grid(16, False)),
    "other patches": ({"backbone": "test_vit", "patch_size": 14}, "camvid", Grid(14, False)),
    "a stage": ({"backbone": "test_convnext", "output_stride": 8}, "camvid", Grid(8, False)),
}


@pytest.mark.parametrize(("settings", "dataset", "grid"), GRIDS.values(), ids=GRIDS.keys())
def test_the_grid_is_known_without_weights(settings: dict[str, Any], dataset: str, grid: Grid) -> None:
    backbone = BackboneSettings(**settings)
    assert grid_of(backbone, dataset) == grid
    assert completed_backbone(backbone).stride == grid.stride


def test_layers_of_a_vision_transformer_are_read(tmp_path: Path) -> None:
    model = timm.create_model("test_vit")
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    settings = BackboneSettings(backbone="test_vit", weights=tmp_path / "vit.pth", layers=(-1, -2), patch_size=8)
    backbone = create_backbone(settings, "camvid", tmp_path)
    assert (backbone.layers, backbone.layer_channels, backbone.grid) == ((-1, -2), (64, 64), Grid(8, False))
    other = create_backbone(BackboneSettings(backbone="test_vit", weights=tmp_path / "vit.pth"), "camvid", tmp_path)
    assert torch.equal(backbone.body.state_dict()["model.pos_embed"], other.body.state_dict()["model.pos_embed"])


def test_a_networks_file_says_its_layers_and_grid(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    given = BackboneSettings(backbone="test_vit", weights=tmp_path / "vit.pth", layers=(-1, -3), patch_size=14)
    backbone = create_backbone(given, "camvid", tmp_path)
    cell = DensePredictionCell(
        load_cell("aspp"), backbone.layer_channels, branch_channels=4, cell_channels=4, output_stride=14
    )
    path = tmp_path / "network.safetensors"
    save_network(path, SegmentationNetwork(backbone, SegmentationHead(cell, 3)), task={})
    settings = completed_backbone(BackboneSettings(weights=path))
    assert (settings.backbone, settings.output_stride) == ("test_vit", 14)
    assert (settings.layers, settings.patch_size) == ((-1, -3), 14)
    assert grid_of(BackboneSettings(weights=path), "camvid") == Grid(14, False)
    loaded = create_backbone(BackboneSettings(weights=path), "camvid", tmp_path)
    assert (loaded.cut, loaded.weights_hash()) == (backbone.cut, backbone.weights_hash())
    with pytest.raises(InputError, match="is a network with other `layers`: leave that out"):
        completed_backbone(BackboneSettings(weights=path, layers=(-1, -2)))


def test_runs_of_before_there_were_layers_go_on() -> None:
    now, fields = scored(BackboneSettings()), ("layers", "patch_size")
    before = {name: value for name, value in now.items() if name not in fields}
    assert differences(before, now, declared(BackboneSettings)) == ""
    other = scored(BackboneSettings(layers=(-1, -4)))
    assert differences(before, other, declared(BackboneSettings)) == "`layers` [-1], now it is [-1, -4]"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"layers": (-4, -1)}, "`layers` must be numbers below 0, each once, the deepest first, such as -1 -4, got -4 -1"),
        ({"patch_size": 2}, "`patch_size` must be 4 to 32, got 2"),
        ({"backbone": "shapes_cnn", "output_stride": 12}, "`output_stride` 12 of shapes_cnn must be 4, 8, 16 or 32"),
        ({"backbone": "shapes_cnn", "layers": (-1, -2)}, "`layers` is for a timm model as `backbone`, and shapes_cnn is none"),
        ({"backbone": "test_vit", "layers": (-1, -9)}, "there is no -9; correct `backbone`, `output_stride` or `layers`"),
        ({"backbone": "test_vit", "output_stride": 8}, "stride 8, only at 16; correct `backbone` or `output_stride`"),
        ({"backbone": "no_such_thing"}, "is not a timm model; .*; correct `backbone` or `output_stride`"),
    ],
)
def test_what_a_backbone_has_not_is_refused_before_anything_is_read(settings: dict[str, Any], sentence: str) -> None:
    for refuse in (completed_backbone, lambda backbone: grid_of(backbone, "camvid")):
        with pytest.raises(InputError, match=sentence):
            refuse(BackboneSettings(**settings))


def test_the_default_backbone_is_checked_too() -> None:
    with pytest.raises(InputError, match="`layers` is for a timm model as `backbone`, and shapes_cnn is none"):
        grid_of(BackboneSettings(layers=(-1, -2)), "shapes")
