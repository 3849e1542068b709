"""Folders of the Hugging Face Hub, on this disk alone: what is saved is the project's own file, and comes back whole."""

import copy
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from torch import Tensor

import fast.hub
from fast import DensePredictionCell, SegmentationHead, SegmentationNetwork
from fast.backbone import plain_backbone
from fast.checkpoint import load_context, load_head, load_network, save_network
from fast.hub import FILE, HubModule
from fast.model_card import write_card
from reference.cell import Cell

CELL = Cell.from_json('[{"op": "conv", "kernel": 3, "rate": [1, 6], "input": -1}, {"op": "conv", "kernel": 1, "input": 0}]')
TASK = {"class_names": ["sky", "röad"]}


def build_network() -> SegmentationNetwork:
    """Small, with weights and statistics that are not the initial ones."""
    torch.manual_seed(0)
    backbone = plain_backbone("tiny", (3, 4, 4, 6), output_stride=16)
    context = DensePredictionCell(CELL, backbone.channels, branch_channels=4, cell_channels=5)
    network = SegmentationNetwork(backbone, SegmentationHead(context, 2)).train()
    network(255 * torch.rand(2, 3, 33, 33))
    return network.eval()


def part(network: SegmentationNetwork, kind: type[HubModule]) -> HubModule:
    return next(module for module in network.modules() if isinstance(module, kind))


def assert_same(loaded: HubModule, module: HubModule) -> None:
    assert type(loaded) is type(module)
    assert not any(each.training for each in loaded.modules())
    expected: dict[str, Tensor] = module.state_dict()
    actual = loaded.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_a_cell_of_several_layers_says_so_on_its_card(tmp_path: Path) -> None:
    cell = DensePredictionCell(Cell(()), (4, 2))
    cell.save_pretrained(tmp_path)
    assert_same(DensePredictionCell.from_pretrained(tmp_path), cell.eval())
    assert "| cell | norm |\n| channels | 6 (4 + 2) in, 6 out |" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", [SegmentationNetwork, SegmentationHead, DensePredictionCell])
def test_a_folder_comes_back_whole(tmp_path: Path, kind: type[HubModule]) -> None:
    module = part(build_network(), kind)
    module.description = TASK
    module.save_pretrained(tmp_path / "folder")
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {FILE, "config.json", "README.md"}
    loaded = kind.from_pretrained(tmp_path / "folder")
    assert_same(loaded, module)
    assert loaded.description.get("class_names") == (None if kind is DensePredictionCell else ["sky", "röad"])
    loaded.save_pretrained(tmp_path / "again")
    first, second = (tmp_path / folder for folder in ("folder", "again"))
    assert_same(kind.from_pretrained(second), module)
    assert json.loads((second / "config.json").read_text()) == json.loads((first / "config.json").read_text())
    assert (second / "README.md").read_text() == (first / "README.md").read_text()


def test_the_file_is_the_projects_own(tmp_path: Path) -> None:
    network = build_network()
    network.description = TASK | {"source": {"iteration": 7}}
    network.save_pretrained(tmp_path)
    loaded, description = load_network(tmp_path / FILE)
    assert_same(loaded, network)
    assert (description["class_names"], description["source"]) == (TASK["class_names"], {"iteration": 7})
    assert json.loads((tmp_path / "config.json").read_text())["description"] == description
    assert_same(load_context(tmp_path / FILE), network.head.context)
    network.head.save_pretrained(tmp_path / "head")
    assert_same(load_head(tmp_path / "head" / FILE)[0], network.head)
    assert_same(DensePredictionCell.from_pretrained(tmp_path / "head"), network.head.context)


def test_a_repository_is_asked_for_by_the_hubs_own_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = build_network()
    network.save_pretrained(tmp_path)
    asked: list[dict[str, Any]] = []

    def download(repo_id: str, filename: str, **options: Any) -> str:
        asked.append({"repo_id": repo_id, **options})
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", lambda **options: str(tmp_path / options["filename"]))
    loaded = SegmentationNetwork.from_pretrained("someone/network", revision="v1", cache_dir=tmp_path / "cache")
    assert_same(loaded, network)
    assert [(each["repo_id"], each["revision"], each["cache_dir"]) for each in asked] == [
        ("someone/network", "v1", tmp_path / "cache")
    ]


def test_what_is_uploaded_is_such_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    network = build_network()
    network.description = TASK

    class Hub:
        """Keeps what it is given in a folder."""

        def __init__(self, token: str | None) -> None:
            pass

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id: str, folder_path: Path, **options: Any) -> str:
            return str(shutil.copytree(folder_path, tmp_path / repo_id))

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Hub)
    loaded = SegmentationNetwork.from_pretrained(network.push_to_hub("someone/network"))
    assert_same(loaded, network)
    assert loaded.description["class_names"] == TASK["class_names"]


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    build_network().head.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"network .*model\.safetensors is not in the format"):
        SegmentationNetwork.from_pretrained(tmp_path)

    class Other(SegmentationHead):
        pass

    with pytest.raises(TypeError, match="holds a SegmentationHead, which is no Other"):
        Other.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="strict"):
        SegmentationHead.from_pretrained(tmp_path, strict=False)
    (tmp_path / FILE).unlink()
    with pytest.raises(ValueError, match=r"head .*model\.safetensors cannot be read"):
        SegmentationHead.from_pretrained(tmp_path)


def test_what_the_hub_passes_on_without_a_value_is_no_option(tmp_path: Path) -> None:
    """huggingface_hub below 1 does so with `proxies` and `resume_download`."""
    head = build_network().head
    head.save_pretrained(tmp_path)
    assert_same(SegmentationHead.from_pretrained(tmp_path, proxies=None, resume_download=None), head)


def test_class_names_of_another_number_are_refused(tmp_path: Path) -> None:
    network = build_network()
    network.description = {"class_names": ["sky"]}
    with pytest.raises(ValueError, match="the classifier has 2 classes, got 1 class names"):
        network.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_has_its_own_weights_and_the_description() -> None:
    network = build_network()
    network.description = TASK
    other = copy.deepcopy(network)
    assert other.description == TASK
    assert_same(other, network)
    assert next(other.parameters()) is not next(network.parameters())


def test_without_the_hubs_package_only_its_methods_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = Path(fast.hub.__file__).read_text(encoding="utf-8")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    names: dict[str, Any] = {"__name__": "hub"}
    exec(compile(source, "hub.py", "exec"), names)
    module = names["HubModule"]()
    assert module.state_dict() == {}
    for method in (module.save_pretrained, module.push_to_hub, names["HubModule"].from_pretrained):
        with pytest.raises(ModuleNotFoundError, match="pip install huggingface_hub"):
            method(tmp_path)


def test_names_that_would_break_a_card_stand_in_it_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    save_network(path, build_network(), task={"class_names": ["a | b", "<b> & c"]})
    assert r"| 2 classes | a \| b, &lt;b> &amp; c |" in ModelCard.load(write_card(path)).text


def test_a_card_says_what_the_file_holds_and_how_to_load_it(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    source = {"iteration": 90_000, "seconds": 3.0, "mean_iou": 0.41234, "training": {"data": {"dataset": "camvid"}}}
    save_network(path, build_network(), task=TASK, source=source)
    card_path = write_card(path)
    assert card_path == tmp_path / "best.safetensors.md"
    card = ModelCard.load(card_path)
    assert (card.data.library_name, card.data.pipeline_tag) == ("dense-prediction-cell", "image-segmentation")
    for row in ("| data set | camvid |", "| iterations | 90,000 |", "| mean_iou | 0.4123 |", "| 2 classes | sky, röad |"):
        assert row in card.text
    assert "| backbone | tiny |" in card.text
    assert "Apache-2.0" in card.text
    assert "@inproceedings" in card.text
    assert "seconds" not in card.text


@pytest.mark.parametrize(("loss", "row"), [({"class_weights": [0.5, 2.0]}, "0.5, 2"), (0.3, None), (None, None)], ids=str)
def test_a_card_says_the_class_weights_whatever_else_a_source_calls_loss(tmp_path: Path, loss: Any, row: str | None) -> None:
    save_network(tmp_path / "n.safetensors", build_network(), task=TASK, source={"loss": loss})
    card = ModelCard.load(write_card(tmp_path / "n.safetensors"))
    assert ("| class weights in the loss |" in card.text) == (row is not None)
    assert row is None or f"| class weights in the loss | {row} |" in card.text


@pytest.mark.parametrize("kind", [SegmentationNetwork, SegmentationHead, DensePredictionCell])
def test_what_a_card_says_of_loading_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[HubModule]) -> None:
    module = part(build_network(), kind)
    module.description = TASK
    module.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(FILE, "best.safetensors")
    x = torch.rand(1, 6, 5, 5)
    for card in (tmp_path / "README.md", write_card(tmp_path / "best.safetensors")):
        text = ModelCard.load(card).text
        code = text.split("```python\n")[1].split("```")[0].replace("this folder, or its name on the Hub", str(tmp_path))
        names: dict[str, Any] = {"x": x, "images": 255 * torch.rand(1, 3, 33, 49)}
        exec(code, names)
        if kind is SegmentationNetwork:
            assert names["classes"].shape == (1, 33, 49)
        else:
            assert torch.equal(names["y"], module(x))
