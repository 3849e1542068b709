"""A search from Python, with a data set and a backbone as objects: what it finds, and how it goes on."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import search
import search.pipeline
from fast.backbone import Backbone, timm_backbone
from fast.bilinear_resize import bilinear_resize
from fast.checkpoint import load_head
from fast.dense_prediction_cell import DensePredictionCell
from fast.segmentation import SegmentationHead, SegmentationNetwork
from search import (
    Found,
    HeadSettings,
    InputError,
    LossSettings,
    MachineSettings,
    ProxySettings,
    RecipeSettings,
    SearchSettings,
    TorchDataset,
    Trained,
    backbone_from_module,
    join,
    load_cell,
    load_found,
    report,
    search_cells,
    train_network,
)
from search.datasets import Dataset
from search.runs.study import load_run
from search.settings import DeviceSettings
from search.tasks.proxy import ProxyTask
from search.training.loop import Training
from tests.search.python_parts import CLASS_NAMES, Strided, Strips

SETTINGS: dict[str, Any] = {
    "search": SearchSettings(trials=2, branches=2, compare=("aspp",)),
    "proxy": ProxySettings(iterations=8, learning_rate=0.5, batch_size=4, statistics_batches=2),
    "head": HeadSettings(branch_channels=8),
}


def strips(split: str, seed: int = 0, class_names: tuple[str, ...] = CLASS_NAMES) -> TorchDataset:
    count = 6 if split == "train" else 3
    return TorchDataset(Strips(count, seed), class_names, name="strips", split=split, ignore_index=-1)


def backbone_of(module: nn.Module) -> Any:
    return backbone_from_module(module, name="strided", mean=(0.5,) * 3, std=(0.25,) * 3)


def find(folder: Path, train: Dataset | None = None, module: nn.Module | None = None, **changes: Any) -> Found:
    """A search in `folder`/run, or its continuation."""
    machine = MachineSettings(device="cpu", cache_dir=folder / "cache")
    backbone = backbone_of(module or Strided(4))
    options = SETTINGS | {"machine": machine} | changes
    return search_cells(train or strips("train"), strips("val", seed=1), backbone, folder / "run", **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished search."""
    folder = tmp_path_factory.mktemp("python")
    find(folder)
    return folder


class TwoMaps(nn.Module):
    """The map of `Strided(4)`, and before it one of six channels at half its stride."""

    def __init__(self) -> None:
        super().__init__()
        self.deepest, self.finer = Strided(4), nn.Conv2d(3, 6, kernel_size=9, stride=8, padding=4)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [self.finer(images), self.deepest(images)]


def of_two_layers() -> Backbone:
    torch.manual_seed(0)
    half = torch.full((3,), 127.5)
    return Backbone("two maps", TwoMaps(), channels=(8, 6), output_stride=16, mean=half, std=half).eval()


def test_cells_of_several_layers_are_found_kept_and_joined(tmp_path: Path) -> None:
    path = tmp_path / "second.json"
    path.write_text('[{"op": "conv", "kernel": 1, "input": -2}]')
    backbone, machine = of_two_layers(), MachineSettings(device="cpu", cache_dir=tmp_path / "cache")
    wanted = SearchSettings(trials=3, branches=2, compare=("linear", "mlp", "dpc", str(path)))
    options = SETTINGS | {"machine": machine, "search": wanted}
    found = search_cells(strips("train"), strips("val", seed=1), backbone, tmp_path / "run", **options)
    run = load_run(tmp_path / "run")
    assert run.space.num_inputs == 2
    assert run.identity["layers"] == [-1, -2]
    compared = {record.name: record.cell for record in run.baselines if not record.name.startswith("trial")}
    assert [str(compared[name]) for name in ("linear", "mlp", "second")] == ["norm", "conv1x1(F), conv1x1(F2)", "conv1x1(F2)"]
    assert "F2: layer −2" in found.report.read_text(encoding="utf-8")
    for name in ("best", "linear_seed0", "mlp_seed0", "second_seed0"):
        head, description = load_head(tmp_path / "run" / "heads" / f"{name}.safetensors")
        assert description["in_channels"] == [8, 6]
        assert description["backbone"]["layers"] == [-1, -2]
        assert SegmentationNetwork(backbone, head)(torch.zeros(1, 3, 33, 49)).shape == (1, 3, 3, 4)
    assert found.network(backbone).head.context.input_channels == (8, 6)


def test_a_search_that_was_compared_with_fewer_cells_goes_on_with_more(tmp_path: Path) -> None:
    """As runs of before there were five: scores of the others are what they were, in whatever order cells are compared."""
    compared = []
    for compare in (("aspp", "dpc"), SearchSettings().compare):
        find(tmp_path, search=SearchSettings(trials=1, branches=2, compare=compare))
        compared.append({record.name: record.result.scores for record in load_run(tmp_path / "run").baselines})
    assert list(compared[1]) == ["aspp", "dpc", "trial 0", "linear", "mlp", "psp"]
    assert {name: compared[1][name] for name in compared[0]} == compared[0]
    find(tmp_path / "new", search=SearchSettings(trials=1, branches=2))
    anew = {record.name: record.result.scores for record in load_run(tmp_path / "new" / "run").baselines}
    assert list(anew) == ["linear", "mlp", "aspp", "psp", "dpc", "trial 0"]
    assert anew == compared[1]


def test_a_compared_cell_of_a_layer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "third.json"
    path.write_text('[{"op": "conv", "kernel": 1, "input": -3}]')
    options = SETTINGS | {
        "search": SearchSettings(compare=(str(path),)),
        "machine": MachineSettings(cache_dir=tmp_path / "cache"),
    }
    message = r"^`compare` .*third.json: the cell reads input -3, and the backbone gives 2 layers; give as many `layers`"
    with pytest.raises(InputError, match=message):
        search_cells(strips("train"), strips("val", seed=1), of_two_layers(), tmp_path / "run", **options)
    assert not (tmp_path / "cache").exists()


def test_a_search_ends_in_a_network(folder: Path) -> None:
    found, module = load_found(folder / "run"), Strided(4)
    run = load_run(folder / "run")
    assert found.score == max(record.result.score for record in run.trials if record.result)
    assert found.head.context.cell == found.cell
    assert {record.name for record in run.baselines} >= {"aspp"}
    assert found.report.read_text().startswith("<!DOCTYPE html>")

    network = found.network(backbone_of(module))
    sample = strips("val")[0]
    images = torch.from_numpy(sample.image).permute(2, 0, 1)[None].float()
    assert network(images).shape == (1, 3, 3, 4)
    assert network.predict(images).shape == (1, 33, 49)


def test_the_network_learns_in_a_plain_loop(folder: Path) -> None:
    train = strips("train")
    network = load_found(folder / "run").network(backbone_of(Strided(4))).train()
    images = torch.stack([torch.from_numpy(train[i].image).permute(2, 0, 1) for i in range(len(train))]).float()
    labels = torch.stack([torch.from_numpy(train[i].label) for i in range(len(train))])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(40):
        logits = bilinear_resize(network(images), (33, 49))
        loss = nn.functional.cross_entropy(logits, labels.long(), ignore_index=255)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_the_same_call_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_run(folder / "run")

    def evaluate(*_: object) -> None:
        raise AssertionError("nothing is left to evaluate")

    with monkeypatch.context() as patch:
        patch.setattr(ProxyTask, "evaluate", evaluate)
        find(folder)
    find(folder, search=replace(SETTINGS["search"], trials=3))
    assert load_run(folder / "run").trials[:2] == before.trials


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"module": Strided(4, seed=1)}, r"was started with `weights` \(content\) "),
        (
            {"train": strips("train", seed=5)},
            r"run .* was started with other images of `train_split` and other labels of `train_split` than now",
        ),
        ({"proxy": replace(SETTINGS["proxy"], iterations=9)}, r"was started with `iterations` 8, now it is 9.*in Python"),
        ({"search": replace(SETTINGS["search"], branches=3)}, r"was started with `branches` 2, now it is 3"),
    ],
    ids=["weights", "pictures", "iterations", "branches"],
)
def test_other_parts_are_refused_in_the_same_folder(folder: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        find(folder, **changes)


RECIPE = RecipeSettings(crop_size=(33, 33), batch_size=2, iterations=4, statistics_batches=1, loading_processes=0)


def train(
    folder: Path, network: SegmentationNetwork, recipe: RecipeSettings = RECIPE, loss: LossSettings | None = None
) -> Trained:
    machine = MachineSettings(device="cpu", cache_dir=folder / "cache")
    parts = strips("train"), strips("val", seed=1), folder / "run"
    return train_network(network, *parts, recipe=recipe, loss=loss, machine=machine)


def timm_network(seed: int = 0, outputs: int = len(CLASS_NAMES), **options: Any) -> SegmentationNetwork:
    """A network that has its backbone from timm, with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = timm_backbone("test_efficientnet")
        options |= {"branch_channels": 4, "cell_channels": 4, "output_stride": 16}
        cell = DensePredictionCell(load_cell("aspp"), backbone.channels, **options)
        return SegmentationNetwork(backbone, SegmentationHead(cell, outputs))


def test_our_loop_trains_a_network_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = timm_network()
    before = copy.deepcopy(network.state_dict())
    whole = train(tmp_path / "whole", network)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)  # a copy is trained
    assert 0 <= whole.score <= 1
    assert whole.network.predict(torch.zeros(1, 3, 33, 49)).shape == (1, 33, 49)
    assert not torch.equal(whole.network.head.classifier.weight, network.head.classifier.weight)

    step = Training._step
    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", lambda self, batches: step(self, batches) or self.progress.iteration == 2)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "stopped", network)
    again = train(tmp_path / "stopped", network)
    assert again.score == whole.score
    torch.testing.assert_close(again.network.state_dict(), whole.network.state_dict(), rtol=0, atol=0)

    for other, recipe, sentence in (
        (timm_network(seed=1), RECIPE, "was started with .*`network` \\(content\\)"),
        (network, replace(RECIPE, momentum=0.5), "was started with `momentum` 0.9, now it is 0.5: use .* in Python"),
    ):
        with pytest.raises(InputError, match=sentence):
            train(tmp_path / "whole", other, recipe)


def test_our_loop_takes_class_weights_and_goes_on_where_there_were_none(tmp_path: Path) -> None:
    network, balanced = timm_network(), LossSettings(class_weights="balanced")
    weighted = train(tmp_path / "weighted", network, loss=balanced)
    assert train(tmp_path / "weighted", network, loss=balanced).score == weighted.score
    with pytest.raises(InputError, match=r"was started with `class_weights` \[.*\], now it is None"):
        train(tmp_path / "weighted", network)
    earlier = train(tmp_path / "earlier", network)
    path = earlier.directory / "settings.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["identity"]["class_weights"]
    path.write_text(json.dumps(content))
    assert train(tmp_path / "earlier", network).score == earlier.score


def test_our_loop_refuses_what_it_could_not_save(folder: Path, tmp_path: Path) -> None:
    network = load_found(folder / "run").network(backbone_of(Strided(4)))
    with pytest.raises(InputError, match=r"^backbone strided is not from timm, .*; train it in a loop of your own"):
        train(tmp_path, network)
    with pytest.raises(InputError, match=r"`crop_size` 32 33 must be 16·k \+ 1 each"):
        train(tmp_path, network, replace(RECIPE, crop_size=(32, 33)))
    with pytest.raises(InputError, match=r"a file cannot describe .*norm.*; train it in a loop of your own"):
        train(tmp_path, timm_network(norm_layer=lambda channels: nn.GroupNorm(2, channels)))
    with pytest.raises(InputError, match=r"the network has 5 outputs, strips needs 3 \(left, middle, right\): give another"):
        train(tmp_path, timm_network(outputs=5))
    assert not list(tmp_path.iterdir())


def test_a_network_may_have_lost_its_dropout(tmp_path: Path) -> None:
    network = timm_network()
    network.head.context.dropout = nn.Identity()  # type: ignore[assignment]
    assert 0 <= train(tmp_path, network, replace(RECIPE, iterations=1)).score <= 1


def test_parts_that_are_not_wrapped_are_refused(tmp_path: Path) -> None:
    raw: Any = Strips(6, 0)
    with pytest.raises(InputError, match=r"^`train` is a Strips: give TorchDataset\(train, \.\.\.\) of it"):
        find(tmp_path, train=raw)
    module: Any = Strided(4)
    with pytest.raises(InputError, match=r"^`backbone` is a Strided: give backbone_from_module"):
        search_cells(strips("train"), strips("val", seed=1), module, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_two_splits_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"different pictures, and both are called strips val: give another `split`"):
        find(tmp_path, train=strips("val"))
    assert not list(tmp_path.iterdir())


def test_classes_in_another_order_are_refused(tmp_path: Path) -> None:
    other = strips("train", class_names=CLASS_NAMES[::-1])
    sentence = r"`train` is for segmentation \(right, middle, left\) and `val` for segmentation \(left, middle, right\): give"
    with pytest.raises(InputError, match=sentence):
        find(tmp_path, other)
    assert not list(tmp_path.iterdir())


def test_parts_come_to_one_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, backbone = load_found(folder / "run"), backbone_of(Strided(4))
    monkeypatch.setattr(backbone, "weights_hash", lambda: found.backbone["weights_hash"])  # meta has no weights to hash
    network = found.network(backbone.to("meta"))  # a device that every machine has
    assert {each.device.type for each in (*network.parameters(), *network.buffers())} == {"meta"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"search": SearchSettings(trials=0)}, "`trials` must be at least 1, got 0"),
        ({"search": SearchSettings(sampler="best")}, "`sampler` .*best"),
        ({"search": SearchSettings(compare=("nothing",))}, "there is no cell 'nothing'"),
        ({"proxy": ProxySettings(batch_size=0)}, "`batch_size` must be at least 1, got 0"),
        ({"head": HeadSettings(dropout=1.0)}, "`dropout` must be at least 0 and below 1, got 1"),
        ({"loss": LossSettings(class_weights=(1.0, -1.0))}, "`class_weights` must be finite numbers of at least 0"),
        ({"loss": LossSettings(class_weights=(1.0,))}, "`class_weights` must be 3 numbers, one for each class"),
    ],
)
def test_settings_are_checked_before_anything_is_written(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        find(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_score_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="is not a run"):
        load_found(tmp_path)
    with pytest.raises(InputError, match=r"no cell of .*run has a score \(2 failed: the loss was"):
        find(tmp_path, proxy=replace(SETTINGS["proxy"], learning_rate=1e30))


def test_commands_do_not_go_on_from_objects(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.main(report.ReportSettings(run=folder / "run", device=DeviceSettings(device="cpu")))
    output = capsys.readouterr().out
    assert "report.html" in output
    assert "next:" not in output
    with pytest.raises(
        InputError, match=r"run was searched from Python, on objects that no command can open: join them there"
    ):
        join.main(join.JoinSettings(run=folder / "run"))


def test_a_head_that_is_not_the_best_cells_is_refused(folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "run", tmp_path / "run")
    head = run / "heads" / "best.safetensors"
    shutil.copy(run / "heads" / "aspp_seed0.safetensors", head)
    with pytest.raises(InputError, match=r"best\.safetensors is of another cell than the best by now: let the search go"):
        load_found(run)
    head.unlink()
    with pytest.raises(InputError, match=r"best\.safetensors cannot be read .*; copy that file too, or search in another"):
        load_found(run)


def test_all_names_are_there_and_no_others() -> None:
    assert {name for name in search.__all__ if getattr(search, name).__name__ == name} == set(search.__all__)
    assert set(search.__all__) <= set(dir(search))
    with pytest.raises(AttributeError, match="module 'search' has no attribute 'nothing'"):
        _ = getattr(search, "nothing")  # noqa: B009  # what mypy would not let through
