"""Training from end to end on a tiny CamVid: it learns, goes on after any end with the same losses, and says what is wrong."""

import gc
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import search.train
import search.training.augmentation
import search.training.loop
import search.training.memory
import search.training.state
from fast.backbone import plain_backbone
from fast.batch_norm import MOMENTUM, recompute_statistics
from fast.checkpoint import load_network, save_network
from fast.decoder import Decoder
from fast.dense_prediction_cell import DensePredictionCell
from fast.segmentation import SegmentationHead, SegmentationNetwork
from reference.mean_iou import mean_iou
from search.cells.space import load_cell
from search.datasets import open_dataset
from search.errors import InputError
from search.folder import Folder
from search.settings import TrainingPictures, known
from search.train import TrainSettings
from search.training.loop import Training
from search.training.network import initial_network
from search.training.scoring import count_split
from search.training.state import read_curve
from search.training.tiles import Tiles
from tests.search import dataset_folders as made
from tests.search.composed import changed, composed
from tests.search.test_random import write_camvid

ITERATIONS = 8
SCENES = TrainingPictures("shapes", 240, (257, 257))
CITYSCAPES = TrainingPictures("cityscapes", 2975, (1024, 2048))


def small_network(classes: int, *, decoder: bool = False) -> SegmentationNetwork:
    backbone = plain_backbone("plain", (4, 6, 8, 8), output_stride=16, low_level=decoder)
    context = DensePredictionCell(load_cell("dpc"), 8, branch_channels=4, cell_channels=4)
    part = Decoder(6, channels=4) if decoder else None
    return SegmentationNetwork(backbone, SegmentationHead(context, classes), part)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TrainSettings:
    """Settings of a whole training that takes a second."""
    folder = tmp_path_factory.mktemp("tiny")
    data_dir = write_camvid(folder / "camvid")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        names = open_dataset("camvid", "val", data_dir).task.outputs
        network = small_network(len(names))
        # Statistics and a classifier with which the scores depend on the picture, also with frozen norms.
        recompute_statistics(network, [torch.rand(4, 3, 33, 33) * 255])
        nn.init.normal_(network.head.classifier.weight, std=0.3)
        nn.init.constant_(network.head.classifier.get_parameter("bias")[:4], 2.0)  # the four classes that occur
        save_network(folder / "init.safetensors", network, task={"class_names": names})
    return composed(
        TrainSettings,
        dataset="camvid",
        data_dir=data_dir,
        val_split="train",  # the other four pictures hold mostly a class that is rare in these five
        init=folder / "init.safetensors",
        crop_size=(33, 33),
        batch_size=4,
        iterations=ITERATIONS,
        learning_rate=0.3,
        validate_every=4,
        checkpoint_every=3,
        statistics_batches=2,
        loading_processes=0,
        device="cpu",
    )


@pytest.fixture(scope="module")
def uninterrupted(tiny: TrainSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("uninterrupted")
    search.train.main(changed(tiny, out=directory))
    return directory


def losses(directory: Path) -> list[float]:
    return [loss for _, loss, _, _ in read_curve(directory) if loss is not None]


def same_outcome(directory: Path, expected: Path) -> bool:
    names = ("curve.csv", "last.safetensors", "best.safetensors")
    curves = [(folder / names[0]).read_bytes() for folder in (directory, expected)]
    states = [[load_network(folder / name)[0].state_dict() for name in names[1:]] for folder in (directory, expected)]
    return curves[0] == curves[1] and all(
        torch.equal(a[key], b[key]) for a, b in zip(*states, strict=True) for key in a.keys() | b.keys()
    )


def test_a_training_leaves_its_curve_and_whole_networks(tiny: TrainSettings, uninterrupted: Path) -> None:
    curve = read_curve(uninterrupted)
    assert [row[0] for row in curve if row[1] is not None] == list(range(1, ITERATIONS + 1))
    assert [row[0] for row in curve if row[3] is not None] == [4, 8]
    assert curve[0][2] == 0.3
    best = max(row[3] for row in curve if row[3] is not None)
    network, description = load_network(uninterrupted / "best.safetensors")
    val = open_dataset("camvid", tiny.data.val_split, tiny.data.data_dir)
    assert best > 0.02  # else nothing would be compared
    source = description["source"]["training"]
    assert (source["recipe"]["iterations"], source["cell"]) == (ITERATIONS, None)
    assert source["recipe"]["min_scale"] == 0.5  # as completed
    assert description["source"]["mean_iou"] == best == mean_iou(count_split(network, val, indices=range(len(val))).numpy())
    assert tuple(description["class_names"]) == val.task.outputs
    card = (uninterrupted / "best.safetensors.md").read_text(encoding="utf-8")
    assert f"| mean_iou | {best:.4f} |" in card
    assert "| data set | camvid |" in card
    assert not list(uninterrupted.glob("*.partial"))


def test_loss_falls(tiny: TrainSettings, tmp_path: Path) -> None:
    search.train.main(changed(tiny, out=tmp_path, iterations=60, validate_every=60))
    curve = losses(tmp_path)
    assert sum(curve[-10:]) < 0.8 * sum(curve[:10])  # four classes with a colour each: from ln 11 = 2.4 to below 1.9


def killed(settings: TrainSettings, arm: Callable[[], None]) -> None:
    killed_while(lambda: search.train.main(settings), arm)


def killed_while(act: Callable[[], object], arm: Callable[[], None]) -> None:
    """Act in a process that ends itself by SIGKILL where `arm` has it."""

    def run() -> None:
        torch.set_num_threads(1)
        arm()
        act()

    process = multiprocessing.get_context("fork").Process(target=run)
    gc.collect()  # what has threads, such as onnxruntime's sessions, would wait for them for ever if the child let it go
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def kill_at_call(owner: Any, name: str, call: int, *, after: bool = False) -> Callable[[], None]:
    def arm() -> None:
        original, calls = getattr(owner, name), iter(range(1, 1000))

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            is_last = next(calls) == call
            if is_last and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if is_last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, wrapper)  # in the forked process alone

    return arm


@pytest.mark.parametrize(
    "arm",
    [
        kill_at_call(Training, "_step", 1),
        kill_at_call(Training, "_step", 3, after=True),
        kill_at_call(Training, "_step", 6),
        kill_at_call(os, "fsync", 3),
        kill_at_call(search.training.loop, "save_network", 1, after=True),
        kill_at_call(search.training.loop, "save_network", 3, after=True),
        kill_at_call(search.training.loop, "save_state", 2, after=True),
    ],
    ids=["first", "before_a_save", "after_a_save", "while_saving", "while_keeping", "at_the_end", "after_validation"],
)
def test_a_killed_training_goes_on_to_the_same_losses(
    tiny: TrainSettings, uninterrupted: Path, tmp_path: Path, arm: Callable[[], None]
) -> None:
    settings = changed(tiny, out=tmp_path)
    killed(settings, arm)
    search.train.main(settings)
    assert same_outcome(tmp_path, uninterrupted)


def test_a_validation_that_the_state_does_not_know_is_cut_off_the_curve(
    tiny: TrainSettings, uninterrupted: Path, tmp_path: Path
) -> None:
    settings = changed(tiny, out=tmp_path, checkpoint_every=1)
    killed(settings, kill_at_call(search.training.loop, "save_state", 5))  # after 4 of the iterations: of the validation
    assert search.training.state.read_curve(tmp_path)[-1][3] is not None
    search.train.main(settings)
    assert same_outcome(tmp_path, uninterrupted)


def test_a_half_written_line_of_the_curve_is_cut_off(tiny: TrainSettings, uninterrupted: Path, tmp_path: Path) -> None:
    settings = changed(tiny, out=tmp_path)
    killed(settings, kill_at_call(Training, "_step", 6))
    with (tmp_path / "curve.csv").open("a") as file:
        file.write("5,2.0,0.01,\n6,1.")
    search.train.main(settings)
    assert same_outcome(tmp_path, uninterrupted)


def test_a_finished_training_is_left_as_it_is(
    tiny: TrainSettings, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: object) -> bool:
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(Training, "_step", step)
    before = (uninterrupted / "curve.csv").read_bytes()
    search.train.main(changed(tiny, out=uninterrupted))
    assert (uninterrupted / "curve.csv").read_bytes() == before


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("iteration", [2, 4])  # 4 is validated next
def test_ctrl_c_saves_and_goes_on(
    tiny: TrainSettings, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, iteration: int
) -> None:
    settings, step = changed(tiny, out=tmp_path), Training._step

    def interrupted_step(self: Training, batches: Any) -> bool:
        if self.progress.iteration == iteration - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batches)

    monkeypatch.setattr(Training, "_step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        search.train.main(settings)
    state = search.training.state.load_state(tmp_path, torch.device("cpu"))
    assert state is not None
    assert state["progress"]["iteration"] == iteration
    monkeypatch.undo()
    search.train.main(settings)
    assert same_outcome(tmp_path, uninterrupted)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_in_the_last_validation_ends_whoever_would_train_another(
    tiny: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, keep = changed(tiny, out=tmp_path), Training._keep

    def interrupted_keep(self: Training, *arguments: Any) -> None:
        if self.progress.iteration == ITERATIONS:
            os.kill(os.getpid(), signal.SIGINT)
        keep(self, *arguments)

    monkeypatch.setattr(Training, "_keep", interrupted_keep)
    with pytest.raises(KeyboardInterrupt):
        search.train.main(settings)
    state = search.training.state.load_state(tmp_path, torch.device("cpu"))
    assert state is not None
    assert state["progress"]["validated"] == ITERATIONS


def test_a_loading_process_that_dies_is_named_with_its_remedy(tiny: TrainSettings, tmp_path: Path) -> None:
    killed_by = changed(tiny, out=tmp_path, loading_processes=1)
    original = search.training.augmentation.TrainingCrops.__getitem__

    def dying(self: search.training.augmentation.TrainingCrops, position: int) -> Any:
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, position)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search.training.augmentation.TrainingCrops, "__getitem__", dying)
        with pytest.raises(InputError, match=r"a process that loads pictures has ended .*0 as `loading_processes`"):
            search.train.main(killed_by)


def test_loading_processes_change_nothing(tiny: TrainSettings, uninterrupted: Path, tmp_path: Path) -> None:
    search.train.main(changed(tiny, out=tmp_path, loading_processes=2))
    assert same_outcome(tmp_path, uninterrupted)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"learning_rate": 0.01}, "`learning_rate` 0.3, now it is 0.01"),
        ({"crop_size": (33, 49)}, "`crop_size`"),
        ({"seed": 1}, "`seed`"),
        ({"accumulate": 2}, "`accumulate`"),
        (
            {"train_split": "val"},
            "other images of `train_split` and other labels of `train_split` than now .*: restore them",
        ),
        ({"val_split": "val"}, "other images of `val_split` and other labels of `val_split` than now .*: restore them"),
    ],
)
def test_other_settings_are_refused(tiny: TrainSettings, uninterrupted: Path, change: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=field):
        search.train.main(changed(tiny, out=uninterrupted, **change))


def test_another_initial_network_is_refused(tiny: TrainSettings, uninterrupted: Path) -> None:
    with pytest.raises(InputError, match=r"with `init` \(content\) \w{12}…, now it is \w{12}…: .*another `out`"):
        search.train.main(changed(tiny, out=uninterrupted, init=uninterrupted / "last.safetensors"))


def test_what_changes_no_loss_may_change(tiny: TrainSettings, uninterrupted: Path, tmp_path: Path) -> None:
    before = (uninterrupted / "curve.csv").read_bytes()
    init = tmp_path / "copy.safetensors"
    init.write_bytes(known(tiny.init).read_bytes())
    data_dir = tmp_path / "copy"
    shutil.copytree(known(tiny.data.data_dir), data_dir)
    moved: dict[str, Any] = {"init": init, "data_dir": data_dir, "cache_dir": tmp_path}
    search.train.main(changed(tiny, out=uninterrupted, checkpoint_every=7, loading_processes=1, **moved))
    assert (uninterrupted / "curve.csv").read_bytes() == before


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(tiny: TrainSettings, tmp_path: Path) -> None:
    settings = changed(tiny, out=tmp_path, learning_rate=1e30, slow_start_iterations=4)
    with pytest.raises(InputError, match=r"(loss was nan at iteration|not finite).*`learning_rate`"):
        search.train.main(settings)
    state = search.training.state.load_state(tmp_path, torch.device("cpu"))
    assert state is not None
    assert state["progress"]["iteration"] == 4
    assert all(value.isfinite().all() for value in state["network"].values())


@pytest.mark.parametrize("loading_processes", [0, 2])
def test_a_broken_picture_is_named(tiny: TrainSettings, tmp_path: Path, loading_processes: int) -> None:
    folder = write_camvid(tmp_path / "camvid")
    broken = folder / "train" / "2.png"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(InputError, match=r"train/2\.png is truncated or unreadable") as raised:
        search.train.main(changed(tiny, data_dir=folder, out=tmp_path / "out", loading_processes=loading_processes))
    assert "Traceback" not in str(raised.value)


def test_frozen_norms_keep_their_statistics_and_learn_the_rest(tiny: TrainSettings, tmp_path: Path) -> None:
    search.train.main(changed(tiny, out=tmp_path, frozen_batch_norm=True, learning_rate=0.01))
    assert tiny.init is not None
    before, after = (load_network(path)[0].state_dict() for path in (tiny.init, tmp_path / "last.safetensors"))
    statistics = [key for key in before if "running_" in key or "num_batches" in key]
    assert statistics
    assert all(torch.equal(before[key], after[key]) for key in statistics)
    norm_scale = "head.context.projection.norm.weight"
    assert not torch.equal(before[norm_scale], after[norm_scale])


@pytest.mark.parametrize("weights", [None, "balanced"])
def test_accumulation_is_the_whole_batch(tiny: TrainSettings, tmp_path: Path, weights: Any) -> None:
    """With frozen norms and no dropout, nothing else joins the crops of a batch."""
    curves = []
    tiny = changed(tiny, class_weights=weights, cache_dir=tmp_path)
    for accumulate in (1, 2, 4):
        directory = tmp_path / str(accumulate)
        changes: dict[str, Any] = {"frozen_batch_norm": True, "learning_rate": 0.01, "dropout": 0.0, "accumulate": accumulate}
        search.train.main(changed(tiny, out=directory, **changes))
        curves.append(losses(directory))
    weight = "backbone.body.layers.0.weight"
    assert tiny.init is not None
    before, after = (load_network(path)[0].state_dict()[weight] for path in (tiny.init, tmp_path / "1" / "last.safetensors"))
    assert (after - before).abs().max() > 1e-3 * before.abs().max()  # gradients reach the first layer
    # the same sums in another order: float32, over 8 steps that carry the difference on
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[2] == pytest.approx(curves[0], rel=1e-5)


def test_a_training_with_class_weights_goes_on_and_says_which_it_had(
    tiny: TrainSettings, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Balanced weights are numbers in all that is written; those numbers are then the same setting."""
    settings = [
        changed(tiny, class_weights="balanced", out=tmp_path / name, cache_dir=tmp_path) for name in ("whole", "killed")
    ]
    search.train.main(settings[0])
    assert "class weights: sky " in capsys.readouterr().err
    killed(settings[1], kill_at_call(Training, "_step", 6))
    search.train.main(settings[1])
    assert same_outcome(tmp_path / "killed", tmp_path / "whole")
    assert losses(tmp_path / "whole") != losses(uninterrupted)
    _, description = load_network(tmp_path / "whole" / "best.safetensors")
    weights = description["source"]["training"]["loss"]["class_weights"]
    assert sum(weight > 0 for weight in weights) == 4  # of eleven classes four occur
    card = (tmp_path / "whole" / "best.safetensors.md").read_text(encoding="utf-8")
    assert f"| class weights in the loss | {weights[0]:g}, " in card
    search.train.main(changed(settings[0], class_weights=tuple(weights)))
    with pytest.raises(InputError, match=r"with `class_weights` \[.*\], now it is None"):
        search.train.main(changed(settings[0], class_weights=None))


def test_weights_of_one_are_no_weights(tiny: TrainSettings, uninterrupted: Path, tmp_path: Path) -> None:
    search.train.main(changed(tiny, class_weights=(1.0,) * 11, out=tmp_path))
    assert losses(tmp_path) == pytest.approx(losses(uninterrupted), rel=1e-4)  # logarithms by themselves or as a product


def test_a_training_from_before_there_were_class_weights_goes_on(
    tiny: TrainSettings, uninterrupted: Path, tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted, tmp_path / "earlier")
    path = tmp_path / "earlier" / "settings.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["identity"].pop("class_weights", "absent") is None
    path.write_text(json.dumps(content))
    search.train.main(changed(tiny, out=tmp_path / "earlier"))
    with pytest.raises(InputError, match=r"with `class_weights` None, now it is \["):
        search.train.main(changed(tiny, out=tmp_path / "earlier", class_weights=(2.0,) * 11))


def test_hard_example_mining_raises_the_loss(tiny: TrainSettings, tmp_path: Path, uninterrupted: Path) -> None:
    search.train.main(changed(tiny, out=tmp_path, hard_example_mining=0.25, hard_example_iterations=4))
    mined, plain = losses(tmp_path), losses(uninterrupted)
    assert mined[0] == plain[0]  # all pixels still count
    assert mined[1] > plain[1]


def test_an_averaged_training_goes_on_too(tiny: TrainSettings, tmp_path: Path) -> None:
    settings = [changed(tiny, out=tmp_path / name, ema=0.5) for name in ("whole", "killed")]
    search.train.main(settings[0])
    killed(settings[1], kill_at_call(Training, "_step", 6))
    search.train.main(settings[1])
    assert same_outcome(tmp_path / "killed", tmp_path / "whole")
    weight = "head.classifier.weight"
    state = search.training.state.load_state(tmp_path / "whole", torch.device("cpu"))
    kept = load_network(tmp_path / "whole" / "last.safetensors")[0].state_dict()[weight]
    assert state is not None
    assert torch.equal(kept, state["average"][f"module.{weight}"])
    assert not torch.equal(kept, state["network"][weight])


def test_a_training_by_adamw_goes_on_too(tiny: TrainSettings, tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"optimizer": "adamw", "schedule": "cosine", "warmup_iterations": 2, "learning_rate": 0.01}
    settings = [changed(tiny, out=tmp_path / name, **recipe) for name in ("whole", "killed")]
    search.train.main(settings[0])
    killed(settings[1], kill_at_call(Training, "_step", 6))
    search.train.main(settings[1])
    assert same_outcome(tmp_path / "killed", tmp_path / "whole")
    rates = [rate for _, _, rate, _ in read_curve(tmp_path / "whole") if rate is not None]
    cosine = [0.005 * (1 + np.cos(np.pi * t / 6)) for t in range(6)]
    assert rates == pytest.approx([0.0, 0.005, *cosine], rel=1e-12)  # float64
    identity = known(Folder(tmp_path / "whole", "training").description())["identity"]
    assert (identity["optimizer"], identity["weight_decay"], identity["momentum"]) == ("adamw", 0.05, None)
    with pytest.raises(InputError, match="`optimizer` adamw, now it is sgd"):
        search.train.main(changed(tiny, out=tmp_path / "whole"))


def test_steps_of_adamw_that_are_too_large_keep_the_last_good_state(tiny: TrainSettings, tmp_path: Path) -> None:
    settings = changed(tiny, out=tmp_path, optimizer="adamw", learning_rate=1e38, slow_start_iterations=4)
    with pytest.raises(InputError, match=r"(loss was nan at iteration|not finite).*`learning_rate`"):
        search.train.main(settings)
    state = search.training.state.load_state(tmp_path, torch.device("cpu"))
    assert state is not None
    assert state["progress"]["iteration"] == 4


def test_a_training_from_before_there_were_recipes_goes_on(tiny: TrainSettings, uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path / "earlier")
    path = tmp_path / "earlier" / "settings.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for field, default in (("optimizer", "sgd"), ("schedule", "poly"), ("warmup_iterations", 0), ("trainable_blocks", None)):
        assert content["identity"].pop(field, "absent") == default
    assert (content["identity"]["momentum"], content["identity"]["weight_decay"]) == (0.9, 4e-5)  # as it was then
    path.write_text(json.dumps(content))
    search.train.main(changed(tiny, out=tmp_path / "earlier"))


@pytest.mark.parametrize("decoder", [False, True])
def test_a_network_on_plain_convolutions_is_one_file(tmp_path: Path, decoder: bool) -> None:
    network = small_network(3, decoder=decoder).eval()
    save_network(tmp_path / "n.safetensors", network, task={"class_names": ("a", "b", "c")})
    images = torch.rand(1, 3, 33, 49) * 255
    with torch.no_grad():
        assert torch.equal(load_network(tmp_path / "n.safetensors")[0](images), network(images))


def test_other_classes_begin_with_a_new_classifier(tiny: TrainSettings, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = open_dataset("shapes", "val", None)
    assert tiny.init is not None
    training = changed(tiny, dataset="shapes", data_dir=None).training(SCENES)
    network = initial_network(training, tiny.init, dataset.task)
    assert network.head.classifier.out_channels == len(dataset.task.outputs)
    assert {norm.momentum for norm in network.head.modules() if isinstance(norm, nn.BatchNorm2d)} == {MOMENTUM}
    assert "other outputs (sky, building, pole, ...): the last layer begins anew" in capsys.readouterr().err
    expected = load_network(tiny.init)[0].backbone.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in network.backbone.state_dict().items())


def test_defaults_are_the_papers_but_for_shapes() -> None:
    paper = composed(TrainSettings, dataset="cityscapes").training(CITYSCAPES)
    recipe = paper.recipe
    assert (recipe.crop_size, recipe.batch_size, recipe.iterations, recipe.learning_rate) == ((769, 769), 16, 90_000, 0.01)
    assert (recipe.min_scale, recipe.max_scale, paper.head.branch_channels) == (0.5, 2.0, 256)
    assert composed(TrainSettings, dataset="cityscapes", batch_size=4).training(CITYSCAPES).recipe.batch_size == 4
    small = TrainSettings().training(SCENES)
    assert (small.recipe.iterations, small.head.branch_channels) == (150, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_size": (33, 32)}, r"`crop_size` 33 32 must be 16·k \+ 1"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be above 0, got nan"),
        ({"iterations": 0}, "`iterations` must be at least 1"),
        ({"hard_example_mining": 0.0}, "`hard_example_mining` must be above 0 and at most 1"),
        ({"class_weights": (1.0, -1.0)}, "`class_weights` must be finite numbers of at least 0"),
        ({"class_weights": (1.0, 2.0)}, "`class_weights` must be 11 numbers"),
        ({"ema": 1.0}, "`ema` must be at least 0 and below 1"),
        ({"max_scale": 0.25}, "`max_scale` must be at least `min_scale`"),
        ({"slow_start_iterations": 8}, "`slow_start_iterations` 8 leaves none"),
        ({"warmup_iterations": 8}, "`warmup_iterations` 8 leaves none of `iterations` 8"),
        ({"warmup_iterations": 2, "slow_start_iterations": 2}, "`slow_start_iterations` and `warmup_iterations` are two ways"),
        ({"optimizer": "adamw", "momentum": 0.9}, "`momentum` 0.9 is of sgd, and `optimizer` is adamw"),
        ({"init": None, "output_stride": 3}, "`output_stride` must be 4 to 32"),
        ({"cell": "dpc"}, "`init` brings its own .* leave out `cell`"),
        ({"init": None, "cell": "dpc", "run": Path("runs/x")}, "`cell` and `run` both"),
        ({"init": None}, "random weights: give `weights`, or `pretrained`"),
        ({"accumulate": 3}, "`batch_size` 4 cannot be divided into 3"),
        ({"tile_size": (33, 32)}, r"`tile_size` 33 32 must be 16·k \+ 1 each, such as 33 33"),
        ({"tile_size": (33, 33), "tile_overlap": 1.0}, "`tile_overlap` must be at least 0 and below 1, got 1.0"),
        ({"init": Path("absent.safetensors")}, r"absent\.safetensors.*; give another file$"),
        ({"train_split": "nonsense"}, "split 'nonsense'"),
        ({"init": None, "run": Path("runs/nope")}, r"`run` runs/nope has no best_cells/rank_01\.json: give the folder"),
    ],
)
def test_what_cannot_work_is_refused(tiny: TrainSettings, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        search.train.main(changed(tiny, out=tmp_path / "out", **change))
    assert not (tmp_path / "out").exists()


def test_a_validation_that_cannot_fit_is_refused_before_the_first_step(
    tiny: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest picture counts, wherever it is in the split."""
    folder, out = write_camvid(tmp_path / "camvid"), tmp_path / "out"
    for name in ("train", "trainannot"):
        Image.open(folder / name / "2.png").resize((300, 200), Image.Resampling.NEAREST).save(folder / name / "2.png")
    settings = changed(tiny, data_dir=folder, out=out, iterations=1)
    monkeypatch.setattr(search.training.memory, "free_memory", lambda: 7_000_000)
    message = r"picture 2 \(camvid train\) of 200 × 300 pixels needs about .*: give `tile_size` 65 65$"
    with pytest.raises(InputError, match=message):
        search.train.main(settings)
    assert not out.exists()
    search.train.main(changed(settings, tile_size=(65, 65)))
    network, description = load_network(out / "last.safetensors")
    assert description["evaluation"] == {
        "dataset": "camvid",
        "pad_to": None,
        "tile_size": [65, 65],
        "tile_overlap": 0.25,
    }
    train = open_dataset("camvid", "train", folder)
    totals = count_split(network, train, indices=range(5), tiles=Tiles((65, 65)))
    assert description["source"]["mean_iou"] == mean_iou(totals.numpy())


def test_tiles_are_part_of_what_a_training_is(tiny: TrainSettings, uninterrupted: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`tile_size` None, now it is \[33, 33\]"):
        search.train.main(changed(tiny, out=uninterrupted, tile_size=(33, 33)))
    shutil.copytree(uninterrupted, tmp_path / "earlier")
    settings = json.loads((tmp_path / "earlier" / "settings.json").read_text())
    for field in ("tile_size", "tile_overlap"):
        del settings["identity"][field]  # as before they were there
    (tmp_path / "earlier" / "settings.json").write_text(json.dumps(settings))
    search.train.main(changed(tiny, out=tmp_path / "earlier"))
    assert "tile_size" not in load_network(uninterrupted / "last.safetensors")[1]["evaluation"]


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (255, 0, "no pixel of set train has a label to learn from: give another `train_split`"),
        (0, 255, "no pixel of set val has a label to score by: give another `val_split`"),
        (0, 0, "all labelled pixels of set val have the same label: give another `val_split`"),
    ],
)
def test_labels_that_say_nothing_are_refused_before_a_step(tmp_path: Path, train: int, val: int, message: str) -> None:
    for split, value in (("train", train), ("val", val)):
        made.write_image(tmp_path / split / "a.jpg", size=(33, 33))
        made.write_label(tmp_path / split / "a.png", np.full((33, 33), value, np.uint8))
    path = tmp_path / "set.toml"
    path.write_text(
        'classes = ["soil", "crop"]\nignore = [255]\nimages = "{split}/{name}.jpg"\nlabels = "{split}/{name}.png"\n'
        "[splits.train]\n[splits.val]\n"
    )
    save_network(tmp_path / "init.safetensors", small_network(2), task={"class_names": ("soil", "crop")})
    settings = composed(
        TrainSettings, dataset=str(path), init=tmp_path / "init.safetensors", out=tmp_path / "out", device="cpu"
    )
    with pytest.raises(InputError, match=f"^{message}, or correct its labels; `python -m search.datasets check` counts them$"):
        search.train.main(settings)
    assert not (tmp_path / "out").exists()


def test_all_defaults_pass_the_check() -> None:
    for pictures in (SCENES, CITYSCAPES, TrainingPictures("mine.toml", 1, (1, 2000))):
        composed(TrainSettings, dataset=pictures.dataset).training(pictures)


def test_the_best_cell_of_a_search_on_other_data_is_trained_only_where_the_data_are_named(
    tiny: TrainSettings, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (run / "best_cells").mkdir(parents=True)
    (run / "best_cells" / "rank_01.json").write_text(load_cell("psp").to_json())
    Folder(run).begin({"dataset": "camvid"}, "python -m search.random --dataset camvid")
    with pytest.raises(InputError, match="searched on camvid, and this would train on shapes: give that `dataset` and `task`"):
        search.train.main(composed(TrainSettings, run=run, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert search.train._cell(changed(tiny, run=run), "camvid", 1) == load_cell("psp")  # whose data set is camvid too


@pytest.mark.parametrize(
    ("number", "size", "expected"),
    [
        (40, (224, 300), ((225, 305), 16, 1200)),
        (367, (360, 480), ((369, 481), 16, 11_000)),
        (2, (100, 1300), ((113, 769), 4, 1000)),
        (100_000, (2160, 3840), ((769, 769), 16, 90_000)),
    ],
)
def test_defaults_follow_the_pictures(number: int, size: tuple[int, int], expected: tuple[object, ...]) -> None:
    recipe = composed(TrainSettings, dataset="mine.toml").training(TrainingPictures("mine.toml", number, size)).recipe
    assert (recipe.crop_size, recipe.batch_size, recipe.iterations) == expected


def test_defaults_are_printed_kept_and_asked_for_again(
    tiny: TrainSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = changed(tiny, crop_size=None, batch_size=None, out=tmp_path)
    search.train.main(settings)
    said = capsys.readouterr().err
    assert "defaults for camvid, 5 pictures of 33×49: --momentum 0.9 --weight-decay 4e-05 --crop-size 33 49" in said
    assert "--min-scale 0.5 --max-scale 2.0 --batch-size 5 (docs/" in said
    identity = known(Folder(tmp_path, "training").description())["identity"]
    assert (identity["crop_size"], identity["batch_size"]) == ([33, 49], 5)
    search.train.main(changed(settings, crop_size=(33, 49)))  # it goes on
    with pytest.raises(InputError, match="`batch_size` 5, now it is 4"):
        search.train.main(changed(settings, batch_size=4))
