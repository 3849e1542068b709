import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fast.backbone import timm_backbone
from fast.weights import PREFERRED, load_weights
from fast.weights_file import WeightsFileError

NAME = "test_efficientnet"
State = Mapping[str, Tensor]


def model_state(seed: int = 1, name: str = NAME) -> dict[str, Tensor]:
    """Of the whole timm model, with statistics and counters that are not the initial ones."""
    torch.manual_seed(seed)
    model = timm.create_model(name)
    for key, value in model.state_dict().items():
        if "running" in key:
            value.uniform_(0.5, 2.0)
        elif key.endswith("num_batches_tracked"):
            value.fill_(100)
    return dict(model.state_dict())


def behind(prefix: str, state: State) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def without_counters(state: State) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def loaded(path: Path, content: Any) -> dict[str, Tensor]:
    return timm_backbone(NAME, weights=saved(path, content)).body.state_dict()


def compiled(state: State) -> dict[str, Tensor]:
    """Of a network whose blocks were compiled one by one."""
    return {key.replace("blocks.0.", "blocks.0._orig_mod."): value for key, value in state.items()}


AS_PEOPLE_HAVE_THEM: dict[str, Callable[[State], Any]] = {
    "itself": lambda state: state,
    **{f"in {place}": lambda state, place=place: {place: state, "epoch": 3} for place in PREFERRED},  # type: ignore[misc]
    **{
        f"behind {prefix}": lambda state, prefix=prefix: behind(prefix, state)  # type: ignore[misc]
        for prefix in (
            *("module.", "backbone.", "_orig_mod.", "model.", "encoder.", "net.encoder."),
            *("module.backbone.", "_orig_mod.module.", "module._orig_mod.", "backbone._orig_mod.model."),
        )
    },
    "in a name of their own": lambda state: {"weights_of_the_year": {"generator": state}},
    "in parts": lambda state: {"backbone": state, "head": {"weight": torch.ones(1)}, "epoch": torch.tensor(3)},
    "compiled in parts": lambda state: {"model": behind("module.", compiled(state))},
    "counted by thop": lambda state: {**state, "total_ops": torch.zeros(1), "blocks.0.0.total_params": torch.zeros(1)},
    "averaged by PyTorch": lambda state: {"n_averaged": torch.tensor(9), **behind("module.", state)},
    "by timm's train.py": lambda state: {"state_dict": state, "args": argparse.Namespace(lr=0.1), "epoch": 3, "metric": 0.5},
    "by Lightning": lambda state: {
        "state_dict": {**behind("model.", state), "criterion.weight": torch.ones(19)},
        "pytorch-lightning_version": "2.5",
        "hyper_parameters": {"args": argparse.Namespace(lr=0.1)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
    },
    "with another classifier": lambda state: {
        **{key: value for key, value in state.items() if not key.startswith("classifier")},
        "classifier.1.weight": torch.ones(7, 3),
        "head.fc.bias": torch.ones(7),
    },
    "of a segmentation network": lambda state: {
        "state_dict": {
            **behind("backbone.", state),
            "decode_head.conv_seg.weight": torch.ones(19, 4, 1, 1),
            "neck.fpn.0.weight": torch.ones(3),
            "auxiliary_head.conv_seg.bias": torch.ones(19),
        },
        "meta": {"mmseg_version": "1.2"},
    },
    "of a segmentation network without prefix": lambda state: {**state, "aux_classifier.0.weight": torch.ones(3)},
}


@pytest.mark.parametrize("kind", AS_PEOPLE_HAVE_THEM)
def test_weights_are_loaded_as_people_have_them(tmp_path: Path, kind: str) -> None:
    state = model_state()
    body = loaded(tmp_path / "w.pth", AS_PEOPLE_HAVE_THEM[kind](state))
    for key, value in body.items():
        assert torch.equal(value, state[key]), key


def test_safetensors_with_a_prefix(tmp_path: Path) -> None:
    state = model_state()
    save_file(behind("backbone.", state), tmp_path / "w.safetensors")
    body = timm_backbone(NAME, weights=tmp_path / "w.safetensors").body.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in body.items())


def test_counters_that_a_file_lacks_stay_the_modules(tmp_path: Path) -> None:
    state = model_state()
    body = loaded(tmp_path / "w.pth", {"state_dict": behind("module.", without_counters(state))})
    assert all(torch.equal(value, state[key]) for key, value in without_counters(body).items())
    assert {int(value) for key, value in body.items() if key.endswith("num_batches_tracked")} == {0}


def test_averaged_weights_are_taken_where_there_are_both(tmp_path: Path) -> None:
    plain, averaged = model_state(1), model_state(2)
    for content in (
        {"state_dict": plain, "state_dict_ema": averaged},
        {"model": plain, "model_ema": averaged},
        {"model": plain, "ema": {"module": averaged}},
    ):
        body = loaded(tmp_path / "w.pth", content)
        assert torch.equal(body["conv_stem.weight"], averaged["conv_stem.weight"])


def test_of_a_part_that_fits_and_one_that_does_not_the_first_is_taken(tmp_path: Path) -> None:
    state, other = model_state(), model_state(name="test_resnet")
    body = loaded(
        tmp_path / "w.pth", {"state_dict_ema": other, "model": state, "teacher": {**state, "surprise": torch.ones(1)}}
    )
    assert torch.equal(body["conv_stem.weight"], state["conv_stem.weight"])


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (lambda a, b: {"student": a, "teacher": b}, "'student' and 'teacher'"),
        (lambda a, b: behind("student.", a) | behind("teacher.", b), "names behind 'student.' and names behind 'teacher.'"),
        (
            lambda a, b: {"state_dict": behind("encoder_q.", a) | behind("encoder_k.", b)},
            "'state_dict' with names behind 'encoder_q.' and 'state_dict' with names behind 'encoder_k.'",
        ),
    ],
)
def test_two_parts_that_fit_equally_are_refused(tmp_path: Path, content: Any, parts: str) -> None:
    with pytest.raises(ValueError, match=rf"w\.pth has several parts that fit {NAME}, {parts}: save the one to use"):
        loaded(tmp_path / "w.pth", content(model_state(1), model_state(2)))


def test_two_names_for_one_module_are_one_part(tmp_path: Path) -> None:
    state = model_state()
    body = loaded(tmp_path / "w.pth", {"state_dict": behind("net.", state) | behind("teacher.", dict(state))})
    assert torch.equal(body["conv_stem.weight"], state["conv_stem.weight"])


def changed(change: str) -> dict[str, Tensor]:
    state = model_state()
    stem = state["conv_stem.weight"]
    match change:
        case "lacks":
            del state["conv_stem.weight"]
        case "has unknown":
            state["blocks.0.0.attention.weight"] = torch.ones(1)
        case "has other shapes for":
            state["conv_stem.weight"] = stem[:, :1]
        case "has no plain numbers for":
            state["conv_stem.weight"] = stem.to(torch.int8)
    return state


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("lacks", "conv_stem.weight"),
        ("has unknown", "blocks.0.0.attention.weight"),
        ("has other shapes for", "conv_stem.weight"),
        ("has no plain numbers for", "conv_stem.weight"),
    ],
)
def test_a_part_that_fits_almost_is_refused_with_its_prefix(tmp_path: Path, change: str, key: str) -> None:
    content = {"state_dict": behind("module.backbone.", changed(change)) | {"module.head.weight": torch.ones(1)}, "epoch": 1}
    words = rf"in 'state_dict' with names behind 'module\.backbone\.', it {change} 1 keys, first '{key}'$"
    with pytest.raises(ValueError, match=rf"w\.pth is not of {NAME}: {words}"):
        loaded(tmp_path / "w.pth", content)


def test_everything_that_does_not_fit_is_counted(tmp_path: Path) -> None:
    state = changed("lacks") | {"bn1.weight": torch.ones(1), "stem.weight": torch.ones(1)}
    words = "it lacks 1 keys, first 'conv_stem.weight', has unknown 1 keys, first 'stem.weight', has other shapes for 1 keys"
    with pytest.raises(ValueError, match=words):
        loaded(tmp_path / "w.pth", state)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tmp_path: Path, kind: torch.dtype) -> None:
    state = {key: value.to(kind) if value.is_floating_point() else value for key, value in model_state().items()}
    body = loaded(tmp_path / "w.pth", state)
    for key, value in body.items():
        assert value.dtype == (torch.float32 if value.is_floating_point() else torch.int64)
        assert torch.equal(value, state[key].to(value.dtype)), key


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        (float("nan"), torch.float32, "NaN"),
        (float("inf"), torch.float16, "infinite numbers"),
        (1e300, torch.float64, "infinite"),
    ],
)
def test_weights_that_are_not_finite_are_called_that(tmp_path: Path, value: float, kind: torch.dtype, words: str) -> None:
    state = model_state()
    state["bn1.bias"] = torch.full_like(state["bn1.bias"], value, dtype=kind)
    with pytest.raises(WeightsFileError, match=rf"w\.pth has {words}.* in 1 of \d+ tensors, first 'bn1\.bias'$"):
        loaded(tmp_path / "w.pth", {"model": behind("module.", state)})


def test_numbers_that_are_not_used_need_not_be_finite(tmp_path: Path) -> None:
    state = model_state()
    expected = state["conv_stem.weight"].clone()
    state["classifier.weight"].fill_(float("nan"))
    assert torch.equal(loaded(tmp_path / "w.pth", state)["conv_stem.weight"], expected)


def test_a_module_of_ones_own_reads_the_same_files(tmp_path: Path) -> None:
    """Names such as `weight`, which end most others, are no reason to take a part of it."""
    torch.manual_seed(0)
    mine, theirs = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 3, 1))) for _ in range(2))
    path = saved(tmp_path / "w.pth", {"net": behind("module.", without_counters(theirs.state_dict()))})
    load_weights(mine, str(path))
    assert all(torch.equal(mine.state_dict()[key], value) for key, value in theirs.state_dict().items())
    conv = nn.Conv2d(4, 3, 1)
    load_weights(conv, saved(tmp_path / "conv.pth", theirs.get_submodule("2.0").state_dict()))
    assert torch.equal(conv.weight, theirs.get_parameter("2.0.weight"))


def test_a_module_keeps_its_weights_if_the_file_does_not_fit(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 1))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    path = saved(tmp_path / "w.pth", behind("x.", {key: value for key, value in before.items() if key != "1.bias"}))
    with pytest.raises(ValueError, match=r"is not of Sequential: in names behind 'x\.', it lacks 1 keys, first '1\.bias'"):
        load_weights(module, path)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
