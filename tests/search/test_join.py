"""From a search to a network: the joined network has the search's score, wrong weights are refused, commands lead on."""

import importlib
import re
import shlex
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from torch import Tensor, nn

import search.features
import search.join
import search.random
import search.train
from fast.checkpoint import load_backbone, load_head, load_network, save_network
from fast.segmentation import SegmentationNetwork
from search.cli import run_command, spelled
from search.datasets import open_dataset
from search.errors import InputError
from search.features import FeaturesSettings
from search.join import JoinSettings
from search.random import RandomSettings
from search.runs.study import Run, load_run, ranked
from search.settings import BackboneSettings, known
from search.train import TrainSettings
from search.training.network import join_head
from search.training.scoring import count_split
from search.training.state import read_curve
from tests.fast.test_backbone import IMAGENET
from tests.search.composed import changed, composed
from tests.search.datasets.test_readers import REAL_CAMVID
from tests.search.tasks.test_end_to_end import write_backbone
from tests.search.test_random import BACKBONE, write_camvid


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> RandomSettings:
    """A finished search of a second, on pictures of 33×49 that are padded to 49×65."""
    folder = tmp_path_factory.mktemp("searched")
    settings = composed(
        RandomSettings,
        dataset="camvid",
        data_dir=write_camvid(folder / "camvid"),
        weights=write_backbone(folder / "weights.pth"),
        backbone=BACKBONE,
        image_size=(49, 65),
        cache_dir=folder / "cache",
        out=folder / "run",
        device="cpu",
        trials=3,
        iterations=20,
        batch_size=4,
        branch_channels=8,
        branches=2,
        statistics_batches=2,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("search.reports.run_files.write_report", lambda run, device=None: run.directory / "report.html")
        search.random.main(settings)
    return settings


@pytest.fixture(scope="module")
def run(searched: RandomSettings) -> Run:
    return load_run(known(searched.out))


class Rounded(nn.Module):
    """A body whose last map is rounded as a cache rounds it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: Tensor) -> list[Tensor]:
        return [features.half().float() for features in self.body(images)]


def score(network: SegmentationNetwork, searched: RandomSettings) -> float:
    val = open_dataset("camvid", "val", searched.data.data_dir)
    totals = count_split(network, val, indices=range(len(val)), pad_to=(49, 65))
    return val.task.scores(totals.numpy()).score


def test_a_joined_network_has_the_searchs_score(
    searched: RandomSettings, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the last digit if features are rounded as in the cache, and without that all but so."""
    out = tmp_path / "network.safetensors"
    search.join.main(JoinSettings(run=run.directory, out=out))
    network, description = load_network(out)
    best = ranked(run.trials)[0]
    assert network.head.context.cell == best.cell
    expected = known(best.result).score
    assert expected > 0.02  # else nothing would be compared
    assert description["source"]["mean_iou"] == score(network, searched)
    assert description["source"]["loss"] == {"class_weights": None}
    assert description["source"]["mean_iou"] == pytest.approx(expected, abs=0.01)  # a few of 4·33·49 pixels change
    network.backbone.body = Rounded(network.backbone.body)
    assert score(network, searched) == expected
    said = capsys.readouterr().out
    assert f"mIOU on camvid val: {100 * description['source']['mean_iou']:.2f} %" in said
    assert f"in the search: {100 * expected:.2f} %" in said


@pytest.mark.parametrize("dataset", ["shapes", "camvid"])
def test_real_pictures_have_the_searchs_score_too(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The generated scenes; of CamVid a few pictures, with trained weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("search.reports.run_files.write_report", lambda run, device=None: run.directory / "report.html")
    settings = composed(RandomSettings, dataset=dataset, device="cpu", trials=1, iterations=10, branch_channels=16, compare=())
    if dataset == "camvid":
        if not (REAL_CAMVID.is_dir() and IMAGENET.is_file()):
            pytest.skip("CamVid and weights are not in ../shared/data beside the repository")
        settings = changed(settings, data_dir=first_pictures(REAL_CAMVID, tmp_path / "CamVid"), weights=IMAGENET)
    search.random.main(settings)
    searched = known(ranked(load_run(Path("runs") / dataset).trials)[0].result).score
    search.join.main(JoinSettings(run=Path("runs") / dataset))
    source = load_network(Path("runs") / dataset / "network.safetensors")[1]["source"]
    assert searched > 0.02
    assert source["mean_iou"] == pytest.approx(searched, abs=2e-4)  # 16 bits: few pixels are so near to two classes
    assert f"in the search: {100 * searched:.2f} %" in capsys.readouterr().out

    if dataset == "shapes":  # its backbone, trained anew with other threads, would be another one
        file = tmp_path / "runs" / "shapes" / "settings.json"
        file.write_text(re.sub(r'(content\)": ")\w{12}', r"\g<1>0123456789ab", file.read_text()))
        with pytest.raises(InputError, match=r"begun with another training of shapes_cnn.*: give the `cache_dir`"):
            search.random.main(settings)


def first_pictures(camvid: Path, folder: Path, number: int = 8) -> Path:
    """A CamVid of the first pictures of each split."""
    folder.mkdir()
    for entry in camvid.iterdir():
        if entry.suffix == ".txt":
            lines = entry.read_text().splitlines(keepends=True)
            (folder / entry.name).write_text("".join(lines[:number]))
        else:
            (folder / entry.name).symlink_to(entry)
    return folder


def test_any_head_of_the_run_can_be_joined_and_brings_its_run(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    head = run.directory / "heads" / "dpc_seed0.safetensors"
    search.join.main(JoinSettings(head=head))
    joined = load_network(run.directory / "dpc_seed0-network.safetensors")[0]
    assert all(torch.equal(value, joined.head.state_dict()[key]) for key, value in load_head(head)[0].state_dict().items())
    (baseline,) = (record for record in run.baselines if record.name == "dpc")
    assert f"in the search: {100 * baseline.result.score:.2f} %" in capsys.readouterr().out


def test_a_head_alone_needs_its_backbone(
    searched: RandomSettings, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = tmp_path / "found.safetensors"
    head.write_bytes((run.directory / "heads" / "best.safetensors").read_bytes())
    with pytest.raises(InputError, match="random weights: give `weights`, or `pretrained`"):
        search.join.main(JoinSettings(head=head))
    search.join.main(JoinSettings(head=head, backbone=BackboneSettings(weights=searched.backbone.weights)))
    assert "was not scored" in capsys.readouterr().out
    assert load_network(tmp_path / "found-network.safetensors")[0].backbone.name == BACKBONE


def test_what_cannot_be_joined_is_refused(searched: RandomSettings, run: Run, tmp_path: Path) -> None:
    state = torch.load(known(searched.backbone.weights), weights_only=True)
    state["conv_stem.weight"] *= 2
    torch.save(state, tmp_path / "other.pth")
    other = BackboneSettings(weights=tmp_path / "other.pth")
    absent = run.directory / "heads" / "psp_seed9.safetensors"
    stride = BackboneSettings(weights=searched.backbone.weights, output_stride=8)
    layers = BackboneSettings(weights=searched.backbone.weights, layers=(-1, -2))
    pictures = write_camvid(tmp_path / "camvid", (32, 49))
    for settings, sentence in (
        (JoinSettings(), "give the folder of a search as `run`, or a head"),
        (JoinSettings(run=tmp_path), "is not a run"),
        (JoinSettings(run=run.directory, head=absent), "there is no head .*psp_seed9"),
        (
            JoinSettings(run=run.directory, backbone=other),
            f"was trained on {BACKBONE} with the weights .*…, these are .*…",
        ),
        (JoinSettings(run=run.directory, backbone=stride), "at output stride 16: leave out `backbone` and `output_stride`"),
        (JoinSettings(run=run.directory, backbone=layers), "was trained on other `layers`: leave that out"),
        (JoinSettings(run=run.directory, data_dir=pictures), r"scored on other images of `val_split` and other labels"),
    ):
        with pytest.raises(InputError, match=sentence):
            search.join.main(changed(settings, out=tmp_path / "network.safetensors"))
    assert not list(tmp_path.glob("network*"))


# What follows: commands that were printed, the backbone of a network, training from a head


def printed(said: str) -> list[list[str]]:
    """The commands that were printed as the next ones, as a shell would read them."""
    return [shlex.split(line.partition(": ")[2]) for line in said.splitlines() if line.startswith(("next: ", "or: "))]


def type_in(command: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    """Run a `python -m search.x ...` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", command[2:])
    module = importlib.import_module(command[2])
    assert command[:3] == spelled(module.__name__.partition(".")[2]).split()
    try:
        run_command(get_type_hints(module.main)["settings"], module.main, prog="command")
    except SystemExit as end:
        return end.code
    return 0


def test_printed_commands_lead_from_a_search_to_an_exported_network(
    searched: RandomSettings, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--dataset", "camvid", "--data-dir", str(searched.data.data_dir), "--weights", str(searched.backbone.weights))
    features = [*spelled("features").split(), *flags, "--backbone", BACKBONE, "--cache-dir", str(searched.machine.cache_dir)]
    assert type_in([*features, "--image-size", "49", "65"], monkeypatch) == 0
    (search_again,) = printed(capsys.readouterr().out)
    assert search_again == [*spelled("random").split(), *features[3:], "--image-size", "49", "65"]
    assert type_in([*spelled("report").split(), "--run", str(run.directory)], monkeypatch) == 0
    join, fine_tune, train = printed(capsys.readouterr().out)
    assert type_in(join, monkeypatch) == 0
    score = f"{100 * load_network(run.directory / 'network.safetensors')[1]['source']['mean_iou']:.2f}"
    evaluate, predict, export = printed(capsys.readouterr().out)
    assert type_in(evaluate, monkeypatch) == 0
    said = capsys.readouterr().out
    assert score in said  # as padded as it was there
    assert Path(predict[predict.index("--pictures") + 1]).is_file()
    assert printed(said) == [predict, export]
    assert type_in(export, monkeypatch) == 0
    (load,) = printed(capsys.readouterr().out)
    monkeypatch.setattr(sys, "argv", ["-c"])
    assert load[:2] == ["python", "-c"]
    exec(load[2], {})
    assert capsys.readouterr().out == "torch.Size([1, 11, 33, 33])\n"
    assert train[:5] == [*spelled("train").split(), "--run", str(run.directory)]
    small = ["--iterations", "1", "--crop-size", "33", "33", "--batch-size", "2", "--loading-processes", "0"]
    small += ["--device", "cpu", "--out", str(run.directory / "train")]
    assert type_in([*train, *small], monkeypatch) == 0
    trained = load_network(run.directory / "train" / "last.safetensors")[0].head.context
    assert (trained.cell, trained.branch_channels) == (ranked(run.trials)[0].cell, 8)
    after = [command[2] for command in printed(capsys.readouterr().out)]
    assert after == ["search.evaluate", "search.predict", "search.export"]
    head = ["--head", str(run.directory / "heads" / "best.safetensors"), "--trainable-blocks", "0"]
    assert fine_tune[3:7] == head
    assert type_in([*fine_tune, *small[:-1], str(run.directory / "fine-tuned")], monkeypatch) == 0
    tuned = load_network(run.directory / "fine-tuned" / "last.safetensors")[0]
    joined = load_network(run.directory / "network.safetensors")[0]
    assert tuned.backbone.weights_hash() == joined.backbone.weights_hash()  # which was frozen


def test_a_networks_file_brings_its_backbone(searched: RandomSettings, tmp_path: Path) -> None:
    network, _ = join_head(known(searched.out) / "heads" / "best.safetensors", searched.backbone, tmp_path)
    file = tmp_path / "network.safetensors"
    save_network(file, network, task={"class_names": [str(i) for i in range(11)]})
    by_file = composed(FeaturesSettings, dataset="camvid", data_dir=searched.data.data_dir, weights=file, device="cpu")
    search.features.main(changed(by_file, cache_dir=tmp_path / "cache"))
    again = composed(
        FeaturesSettings,
        dataset="camvid",
        data_dir=searched.data.data_dir,
        backbone=BACKBONE,
        weights=searched.backbone.weights,
        device="cpu",
    )
    search.features.main(changed(again, cache_dir=tmp_path / "other"))
    names = [f"camvid-{split}-{BACKBONE}-os16" for split in ("train", "val")]
    for name in names:
        bits = [(tmp_path / cache / name / "features.bin").read_bytes() for cache in ("cache", "other")]
        assert bits[0] == bits[1]
    assert load_backbone(file, output_stride=8).output_stride == 8
    head = known(searched.out) / "heads" / "best.safetensors"
    for change, sentence in (
        ({"backbone": "resnet18"}, f"is a network on {BACKBONE}, and `backbone` is resnet18: leave it out"),
        ({"weights_origin": "tensorflow"}, "is a network with weights from timm: leave out `weights_origin`"),
        ({"weights": head}, "is a head without a backbone: give a network"),
        (
            {"weights": tmp_path / "nope.pth", "backbone": BACKBONE},
            r"nope\.pth does not exist; correct `weights`$",
        ),
    ):
        with pytest.raises(InputError, match=sentence):
            search.features.main(changed(by_file, cache_dir=tmp_path / "third", **change))
    assert not (tmp_path / "third").exists()


def test_fine_tuning_never_keeps_a_worse_network_than_it_began_with(searched: RandomSettings, tmp_path: Path) -> None:
    """It is scored before the first step, as it is, and a step that ruins it does not make it the best."""
    head, out = known(searched.out) / "heads" / "best.safetensors", tmp_path / "train"
    settings = composed(
        TrainSettings,
        dataset="camvid",
        data_dir=searched.data.data_dir,
        weights=searched.backbone.weights,
        head=head,
        trainable_blocks=0,
        out=out,
        crop_size=(33, 33),
        batch_size=2,
        iterations=2,
        learning_rate=10.0,
        loading_processes=0,
        device="cpu",
    )
    search.train.main(settings)
    first, *later = (row for row in read_curve(out) if row[3] is not None)
    assert (first[0], [row[0] for row in later]) == (0, [1, 2])
    best, source = load_network(out / "best.safetensors")[0], load_network(out / "best.safetensors")[1]["source"]
    assert source["mean_iou"] == max(known(row[3]) for row in (first, *later))
    if source["iteration"] == 0:
        for key, value in join_head(head, searched.backbone, tmp_path)[0].state_dict().items():
            assert torch.equal(best.state_dict()[key], value), key
    joined = join_head(head, searched.backbone, tmp_path)[0]
    val = open_dataset("camvid", "val", searched.data.data_dir)
    totals = count_split(joined, val, indices=range(len(val)))
    assert first[3] == pytest.approx(val.task.scores(totals.numpy()).score, abs=1e-6)


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_head_is_fine_tuned_on_a_frozen_backbone(searched: RandomSettings, tmp_path: Path, blocks: int) -> None:
    """What is frozen is the same to the last bit, norms included, and so in the average; the rest has learned."""
    head, out = known(searched.out) / "heads" / "best.safetensors", tmp_path / "train"
    settings = composed(
        TrainSettings,
        dataset="camvid",
        data_dir=searched.data.data_dir,
        weights=searched.backbone.weights,
        head=head,
        trainable_blocks=blocks,
        optimizer="adamw",
        out=out,
        crop_size=(33, 33),
        batch_size=2,
        iterations=3,
        ema=0.5,
        loading_processes=0,
        device="cpu",
    )
    search.train.main(settings)
    before, after = join_head(head, searched.backbone, tmp_path)[0], load_network(out / "last.safetensors")[0]
    block = before.backbone.blocks()[-1]
    learning = next(name for name, module in before.named_modules() if module is block)
    for name, value in before.state_dict().items():
        is_frozen = name.startswith("backbone.") and not (blocks and name.startswith(f"{learning}."))
        assert torch.equal(after.state_dict()[name], value) is is_frozen, name
    with pytest.raises(InputError, match=f"`trainable_blocks` {blocks}, now it is None"):
        search.train.main(changed(settings, trainable_blocks=None))
    with pytest.raises(InputError, match=r"`trainable_blocks` 99 is more than the \d+ that test_efficientnet has: give fewer"):
        search.train.main(changed(settings, trainable_blocks=99, out=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_a_training_begins_with_a_head_of_the_search(
    searched: RandomSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = known(searched.out) / "heads" / "best.safetensors"
    settings = composed(
        TrainSettings,
        dataset="camvid",
        data_dir=searched.data.data_dir,
        weights=searched.backbone.weights,
        head=head,
        out=tmp_path / "train",
        crop_size=(33, 33),
        batch_size=2,
        iterations=1,
        learning_rate=1e-9,
        frozen_batch_norm=True,
        loading_processes=0,
        device="cpu",
    )
    search.train.main(settings)
    assert "last layer begins anew" not in capsys.readouterr().err
    trained = load_network(tmp_path / "train" / "last.safetensors")[0]
    expected, _ = join_head(head, searched.backbone, tmp_path)
    for key, value in expected.state_dict().items():  # a step of 1e-9 changes next to nothing
        torch.testing.assert_close(trained.state_dict()[key], value, rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="`head` brings its own architecture and weights: leave out `cell`"):
        search.train.main(changed(settings, cell="dpc"))
    with pytest.raises(InputError, match=r"is a head, which has no backbone: give it as `head`$"):
        search.train.main(changed(settings, head=None, init=head))
    with pytest.raises(InputError, match=r"is a whole network: give it as `init`$"):
        search.train.main(changed(settings, head=tmp_path / "train" / "last.safetensors"))
    with pytest.raises(InputError, match="`init` and `head` both begin a training: leave one out"):
        search.train.main(changed(settings, init=tmp_path / "train" / "last.safetensors"))
    with pytest.raises(InputError, match="random weights: give `weights`"):
        search.train.main(changed(settings, weights=None))
    scenes = changed(settings, dataset="shapes", data_dir=None, out=tmp_path / "scenes")
    search.train.main(scenes)
    assert "has other outputs (sky, building, pole, ...): the last layer begins anew" in capsys.readouterr().err
    assert load_network(tmp_path / "scenes" / "last.safetensors")[0].head.classifier.out_channels == 8
