import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from search.backbones import create_backbone
from search.errors import InputError
from search.settings import BackboneSettings

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
