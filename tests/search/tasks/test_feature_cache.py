"""Cached features: exact in content and place, whole or refused by name, and the same after any interruption."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import search.tasks.feature_cache
from fast.backbone import Backbone
from reference.grid import Grid
from search.datasets import IGNORE_INDEX, Fingerprint, Sample, open_dataset
from search.datasets.files import FileDataset
from search.dense_tasks import DenseTask
from search.dense_tasks.segmentation import Segmentation
from search.errors import InputError
from search.features import FeaturesSettings, main
from search.folder import Folder
from search.settings import BackboneSettings, DataSettings, FeatureSettings, MachineSettings
from search.tasks.feature_cache import (
    FeatureCache,
    HalfWrittenError,
    build_cache,
    caches_of,
    open_cache,
    open_for_features,
    prepare_caches,
)
from tests.search import dataset_folders as made
from tests.search.composed import composed
from tests.strategies import rng_seeds

STRIDE = 16
MEAN = (10.0, 20.0, 30.0)
COMMAND = "python -m search.features --dataset pictures"


class EveryNthPixel(nn.Module):
    """A body whose feature (i, j) is the pixel (s·i, s·j), so that every value in a cache is known."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.scale * images[:, :, ::STRIDE, ::STRIDE]]


def pixel_backbone(scale: float = 1.0, output_stride: int = STRIDE) -> Backbone:
    """Features are the pixels minus `MEAN`, times `scale`."""
    body, ones = EveryNthPixel(scale), torch.ones(3)
    return Backbone("pixels", body, channels=3, output_stride=output_stride, mean=torch.tensor(MEAN), std=ones)


@dataclass(frozen=True)
class Pictures:
    """Random pictures of given sizes; label (y, x) is a function of the red pixel there. Picture `broken` raises `error`.

    Where labels are `corrected`, the two classes are exchanged.
    """

    sizes: tuple[tuple[int, int], ...]
    seed: int = 0
    broken: int = -1
    error: type[BaseException] = KeyboardInterrupt
    corrected: bool = False

    name, split = "pictures", "train"
    task: DenseTask = Segmentation(("even", "odd"), np.zeros((2, 3), np.uint8))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Sample:
        if index == self.broken:
            raise self.error(f"picture {index}")
        rng = np.random.default_rng([self.seed, index])
        image = rng.integers(0, 256, (*self.sizes[index], 3), dtype=np.uint8)
        return Sample(image, (image[..., 0] + self.corrected) % 2, f"picture {index}")

    def fingerprint(self) -> Fingerprint:
        return Fingerprint(f"{self.seed} {self.sizes}", f"{self.seed} {self.sizes} {self.corrected}")

    def problems(self) -> list[str]:
        return []


def identity(dataset: Pictures, backbone: Backbone, size: tuple[int, int] = (33, 49), **changes: Any) -> dict[str, Any]:
    settings = FeatureSettings(image_size=size, **changes)
    return search.tasks.feature_cache._identity(settings, dataset, backbone, settings.mirrored)


def build(folder: Path, dataset: Pictures, backbone: Backbone | None = None, **changes: Any) -> FeatureCache:
    backbone = backbone or pixel_backbone()
    return build_cache(folder, dataset, backbone, identity(replace(dataset, broken=-1), backbone, **changes), "cpu", COMMAND)


def reopen(folder: Path) -> FeatureCache:
    """What `build(folder, TWENTY)` has built."""
    return open_cache(folder, identity(TWENTY, pixel_backbone()))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


TWENTY = Pictures(((33, 49),) * 20)


# What a cache holds


@given(
    seed=rng_seeds(),
    sizes=st.lists(st.tuples(st.integers(1, 33), st.integers(1, 49)), min_size=1, max_size=10),
    mirrored=st.booleans(),
    dtype=st.sampled_from(("float16", "bfloat16")),
)
def test_every_feature_and_label_is_where_it_belongs(
    tmp_path_factory: pytest.TempPathFactory, seed: int, sizes: list[tuple[int, int]], mirrored: bool, dtype: str
) -> None:
    dataset = Pictures(tuple(sizes), seed)
    cache = build(tmp_path_factory.mktemp("cache"), dataset, mirrored=mirrored, feature_dtype=dtype)
    count = len(sizes) * (2 if mirrored else 1)
    assert cache.features.shape == (count, 3, 3, 4)
    assert cache.labels.shape == (count, 33, 49)
    assert str(cache.features.dtype) == f"torch.{dtype}"
    assert (cache.task.outputs, cache.grid) == (("even", "odd"), Grid(STRIDE))

    for index in range(count):
        image, label, _ = dataset[index % len(sizes)]
        if index >= len(sizes):
            image, label = image[:, ::-1], label[:, ::-1]
        height, width = label.shape
        padded = np.tile(np.array(MEAN), (33, 49, 1))
        padded[:height, :width] = image
        expected = torch.from_numpy((padded - MEAN).transpose(2, 0, 1)[:, ::STRIDE, ::STRIDE].copy()).to(cache.features.dtype)
        torch.testing.assert_close(cache.features[index], expected, rtol=0, atol=0)

        assert torch.equal(cache.labels[index, :height, :width], torch.from_numpy(label.copy()))
        assert bool(
            (cache.labels[index, height:] == IGNORE_INDEX).all() and (cache.labels[index, :, width:] == IGNORE_INDEX).all()
        )
        red = (cache.features[index, 0].float() + MEAN[0]).to(torch.uint8)  # feature (i, j) and label pixel (s·i, s·j)
        at_features = cache.labels[index, ::STRIDE, ::STRIDE]
        labelled = at_features != IGNORE_INDEX
        if dtype == "float16":  # holds pixels exactly
            assert torch.equal((red % 2)[labelled], at_features[labelled])


def test_files_are_read_by_several_threads_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        made.write_image(tmp_path / "train" / f"{number:02}.png", number, (20, 40))
        made.write_label(tmp_path / "train" / f"{number:02}.bmp", np.full((20, 40), number % 2, np.uint8))
    description = 'classes = ["even", "odd"]\nimages = "{split}/{name}.png"\nlabels = "{split}/{name}.bmp"\n[splits.train]\n'
    (tmp_path / "set.toml").write_text(description)
    train, backbone = open_dataset(str(tmp_path / "set.toml"), "train", None), pixel_backbone()
    of_train = search.tasks.feature_cache._identity(FeatureSettings(), train, backbone, mirrored=False)
    original = FileDataset.__getitem__

    for readers in (1, 4):
        together = threading.Barrier(readers)

        def getitem(self: FileDataset, index: int, together: threading.Barrier = together) -> Sample:
            together.wait(60)  # for as many as are to read at a time
            return original(self, index)

        monkeypatch.setattr(FileDataset, "__getitem__", getitem)
        monkeypatch.setattr(search.tasks.feature_cache, "_READERS", readers)
        build_cache(tmp_path / str(readers), train, backbone, of_train, "cpu", COMMAND)
    assert contents(tmp_path / "1") == contents(tmp_path / "4")


def test_another_data_set_is_read_in_the_thread_that_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, threads = Pictures.__getitem__, set()

    def getitem(self: Pictures, index: int) -> Sample:
        threads.add(threading.current_thread())
        return original(self, index)

    monkeypatch.setattr(Pictures, "__getitem__", getitem)
    build(tmp_path, TWENTY)
    assert threads == {threading.current_thread()}


def test_a_cache_cannot_be_changed_by_who_reads_it(tmp_path: Path) -> None:
    cache = build(tmp_path, TWENTY)
    before = contents(tmp_path)
    cache.features.zero_()
    cache.labels.zero_()
    assert contents(tmp_path) == before


# Interruptions


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError])
@pytest.mark.parametrize("broken", [0, 7, 8, 12, 19])
def test_an_interrupted_cache_is_finished_to_the_same_bytes(
    tmp_path: Path, broken: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "whole", TWENTY)
    with pytest.raises(error):
        build(tmp_path / "cache", replace(TWENTY, broken=broken, error=error))
    with pytest.raises(HalfWrittenError, match=f"holds the features of {broken // 8 * 8} of 20 images: finish it by"):
        reopen(tmp_path / "cache")

    asked = []
    original = Pictures.__getitem__

    def getitem(self: Pictures, index: int) -> Sample:
        asked.append(index)
        return original(self, index)

    monkeypatch.setattr(Pictures, "__getitem__", getitem)
    build(tmp_path / "cache", TWENTY)
    assert asked == [0, *range(broken // 8 * 8, 20)]  # the first for its size; what was finished is not computed again
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


DEATHS: dict[str, tuple[object, str, int]] = {
    "before it is begun": (Folder, "begin", 1),
    "before the first images are computed": (search.tasks.feature_cache, "_batch", 1),
    "before the first images are counted": (Folder, "write_result", 1),
    "in the middle": (search.tasks.feature_cache, "_batch", 2),
    "before the last images are counted": (Folder, "write_result", 3),
}


def build_until_death(folder: Path, death: str, dataset: Pictures) -> None:
    owner, name, last = (DEATHS | RELABELLING)[death]
    original, calls = getattr(owner, name), 0

    def counting(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **named)

    setattr(owner, name, counting)
    build(folder, dataset)


def die(target: Callable[..., None], *args: object) -> None:
    """Call it in a process that it ends by SIGKILL."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    child = context.Process(target=target, args=args)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a server of children that have everything imported needs fork")
@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("left", ["nothing", "features of an earlier version"])
def test_a_killed_cache_is_finished_to_the_same_bytes(tmp_path: Path, death: str, left: str) -> None:
    build(tmp_path / "whole", TWENTY)
    if left != "nothing":
        build(tmp_path / "cache", replace(TWENTY, seed=1))
        (tmp_path / "cache" / "progress.json").unlink()
        (tmp_path / "cache" / "settings.json").rename(tmp_path / "cache" / "manifest.json")
    die(build_until_death, tmp_path / "cache", death, TWENTY)
    with pytest.raises(HalfWrittenError):
        reopen(tmp_path / "cache")
    build(tmp_path / "cache", TWENTY)
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_what_is_left_of_a_larger_cache_does_no_harm(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cache", replace(TWENTY, broken=3), size=(65, 65))
    build(tmp_path / "cache", TWENTY)
    build(tmp_path / "whole", TWENTY)
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


@pytest.mark.parametrize("file", ["features.bin", "labels.bin"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 100)], ids=["lost", "truncated"])
def test_an_interrupted_cache_whose_arrays_were_damaged_starts_again(
    tmp_path: Path, file: str, damage: Callable[[Path], object]
) -> None:
    build(tmp_path / "whole", TWENTY)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cache", replace(TWENTY, broken=12))
    damage(tmp_path / "cache" / file)
    build(tmp_path / "cache", TWENTY)
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


# Files that hold something else by now


OTHERS: dict[str, tuple[Pictures, str, bool]] = {  # the pictures now, what is said, and whether the features stay
    "images": (
        replace(TWENTY, seed=1),
        "was made of images that have changed since: its features are computed once more",
        False,
    ),
    "one image more": (
        Pictures(((33, 49),) * 21),
        "was made of images that have changed since: its features are computed once more",
        False,
    ),
    "labels": (
        replace(TWENTY, corrected=True),
        "was made of labels that have changed since: its labels are copied once more, its features remain",
        True,
    ),
    "meaning of labels": (
        replace(TWENTY, task=Segmentation(("odd", "even", "none"), np.zeros((3, 3), np.uint8))),
        "was made of labels that have changed since: its labels are copied once more, its features remain",
        True,
    ),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("done", [20, 16])
def test_a_cache_is_brought_up_to_date(
    tmp_path: Path, other: str, done: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, said, keeps_features = OTHERS[other]
    build(tmp_path / "whole", now)
    if done == 20:
        build(tmp_path / "cache", TWENTY)
    else:
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "cache", replace(TWENTY, broken=done))
    with pytest.raises(HalfWrittenError, match="have changed since: finish it by running"):
        open_cache(tmp_path / "cache", identity(now, pixel_backbone()))
    reading = np.memmap(tmp_path / "cache" / "labels.bin", np.uint8, "r")
    before, inode = bytes(reading), (tmp_path / "cache" / "features.bin").stat().st_ino
    capsys.readouterr()
    cache = build(tmp_path / "cache", now)
    assert f"{tmp_path / 'cache'} {said}\n" in capsys.readouterr().err
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
    assert torch.equal(cache.labels[3], torch.from_numpy(now[3].label))
    assert bytes(reading) == before  # a search that had it open goes on with what it began with
    if keeps_features:
        assert (tmp_path / "cache" / "features.bin").stat().st_ino == inode

    build(tmp_path / "cache", now)
    assert not re.search("once more", capsys.readouterr().err)


RELABELLING: dict[str, tuple[object, str, int]] = {  # as `DEATHS`
    "before the cache counts as unfinished": (Folder, "write_result", 1),
    "before labels are read": (search.tasks.feature_cache, "_batch", 1),
    "in the middle of the labels": (search.tasks.feature_cache, "_batch", 2),
    "before the cache says what its labels are": (Folder, "begin", 1),
    "before the cache is finished": (Folder, "write_result", 2),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a server of children that have everything imported needs fork")
@pytest.mark.parametrize("death", RELABELLING)
@pytest.mark.parametrize("corrected", [True, False])
def test_labels_that_are_copied_once_more_are_whole_after_any_death(tmp_path: Path, death: str, corrected: bool) -> None:
    now = replace(TWENTY, corrected=corrected)
    build(tmp_path / "whole", now)
    build(tmp_path / "cache", TWENTY)
    die(build_until_death, tmp_path / "cache", death, replace(TWENTY, corrected=True))
    with pytest.raises(HalfWrittenError):
        open_cache(tmp_path / "cache", identity(replace(TWENTY, corrected=True), pixel_backbone()))
    build(tmp_path / "cache", now)  # also where the correction is taken back
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_a_cache_of_an_earlier_version_is_computed_once_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path / "whole", TWENTY)
    build(tmp_path / "cache", replace(TWENTY, seed=1))
    path = tmp_path / "cache" / "settings.json"
    settings = json.loads(path.read_text())
    del settings["identity"]["content of the images"], settings["identity"]["content of the labels"]
    settings["identity"]["`data_dir` (pictures)"] = "ab" * 32
    path.write_text(json.dumps(settings))
    with pytest.raises(HalfWrittenError, match="is of an earlier version: finish it"):
        reopen(tmp_path / "cache")
    capsys.readouterr()
    build(tmp_path / "cache", TWENTY)
    assert "cache is of an earlier version: its features are computed once more" in capsys.readouterr().err
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_a_second_process_waits_for_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.joinpath("cache").mkdir()
    holding = "lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); time.sleep(3)"
    program = f"import sys, time, filelock; {holding}"
    with subprocess.Popen([sys.executable, "-c", program, tmp_path / "cache" / "lock"], stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        first.stdout.readline()  # it has the lock
        build(tmp_path / "cache", TWENTY)
    assert "cache is in use by another process, which is waited for" in capsys.readouterr().err


# Refusals


STALE: dict[str, tuple[Pictures, Backbone, dict[str, Any]]] = {
    "weights_hash": (TWENTY, pixel_backbone(2.0), {}),
    "output_stride": (TWENTY, pixel_backbone(output_stride=8), {}),
    "image_size": (TWENTY, pixel_backbone(), {"size": (49, 49)}),
    "mirrored": (TWENTY, pixel_backbone(), {"mirrored": True}),
    "feature_dtype": (TWENTY, pixel_backbone(), {"feature_dtype": "bfloat16"}),
}


@pytest.mark.parametrize("field", STALE)
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_cache_of_something_else_is_refused_by_name(tmp_path: Path, field: str, interrupted: bool) -> None:
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, replace(TWENTY, broken=12))
    else:
        build(tmp_path, TWENTY)
    before = contents(tmp_path)
    dataset, backbone, changes = STALE[field]
    said = {"weights_hash": "`weights` (content)"}.get(field, f"`{field}`")
    with pytest.raises(
        InputError,
        match=rf"feature cache {tmp_path} was started with .*{re.escape(said)} .*: use the same values \({COMMAND}\), "
        "give another `cache_dir`, or delete that folder",
    ) as caught:
        open_cache(tmp_path, identity(dataset, backbone, **changes))
    assert not isinstance(caught.value, HalfWrittenError)  # which would be finished, with features of two kinds
    assert contents(tmp_path) == before


@pytest.mark.parametrize("file", ["features.bin", "labels.bin"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 100)], ids=["lost", "truncated"])
def test_damaged_arrays_are_refused_by_name(tmp_path: Path, file: str, damage: Callable[[Path], object]) -> None:
    build(tmp_path, TWENTY)
    damage(tmp_path / file)
    with pytest.raises(InputError, match=rf"{tmp_path}/{file} is damaged \(\d+ bytes instead of \d+\): delete the folder"):
        reopen(tmp_path)


DAMAGED = (b"", b"{", b"{}", b"[]", b"3", b"\0\0\0", b'"text"', b"null", b"\xff\xfe")


@pytest.mark.parametrize("content", [*DAMAGED, b'{"done": "all"}', b'{"done": 20, "labels": 21}'])
def test_damaged_progress_is_refused_by_name_and_can_be_deleted(tmp_path: Path, content: bytes) -> None:
    build(tmp_path, TWENTY)
    before = contents(tmp_path)
    (tmp_path / "progress.json").write_bytes(content)
    words = rf"{tmp_path}/progress\.json is damaged \(.*\): delete it and run the same command again"
    for use in (reopen, lambda folder: build(folder, TWENTY)):
        with pytest.raises(InputError, match=words) as caught:
            use(tmp_path)
        assert not isinstance(caught.value, HalfWrittenError)
    (tmp_path / "progress.json").unlink()
    build(tmp_path, TWENTY)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_settings_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    build(tmp_path, TWENTY)
    (tmp_path / "settings.json").write_bytes(content)
    before = contents(tmp_path)
    words = rf"{tmp_path}/settings\.json is damaged \(.*\): delete the feature cache {tmp_path} and start it again"
    for use in (reopen, lambda folder: build(folder, TWENTY)):
        with pytest.raises(InputError, match=words):
            use(tmp_path)
    assert contents(tmp_path) == before


def test_progress_does_not_count_without_the_settings(tmp_path: Path) -> None:
    build(tmp_path, replace(TWENTY, seed=1))
    (tmp_path / "settings.json").unlink()
    with pytest.raises(HalfWrittenError, match="0 of 20 images"):
        reopen(tmp_path)
    build(tmp_path, TWENTY)
    assert torch.equal(reopen(tmp_path).features, build(tmp_path / "whole", TWENTY).features)


def test_a_folder_of_another_kind_is_refused_and_left_alone(tmp_path: Path) -> None:
    Folder(tmp_path).begin({"seed": 1}, "python -m search.random")
    before = contents(tmp_path)
    for use in (reopen, lambda folder: build(folder, TWENTY)):
        with pytest.raises(InputError, match=f"{tmp_path} holds a run, not a feature cache: give another `cache_dir`"):
            use(tmp_path)
    assert contents(tmp_path) == before


def test_features_beyond_float16_are_refused_and_fit_bfloat16(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"features of pictures leave the range of float16: .*bfloat16"):
        build(tmp_path / "half", TWENTY, pixel_backbone(scale=1e4))
    cache = build(tmp_path / "brain", TWENTY, pixel_backbone(scale=1e4), feature_dtype="bfloat16")
    assert bool(cache.features.isfinite().all())


@pytest.mark.parametrize("first", [0, 8, 16, 19])
def test_no_batch_counts_from_the_first_that_is_refused(tmp_path: Path, first: int) -> None:
    class Overflowing(Pictures):
        def __getitem__(self, index: int) -> Sample:
            sample = super().__getitem__(index)
            return sample if index == first else sample._replace(image=np.full_like(sample.image, MEAN[0]))

    backbone = pixel_backbone(scale=2e3)
    with pytest.raises(InputError, match=r"leave the range of float16"):
        build(tmp_path, Overflowing(TWENTY.sizes), backbone)
    with pytest.raises(HalfWrittenError, match=f"holds the features of {first // 8 * 8} of 20"):
        open_cache(tmp_path, identity(TWENTY, backbone))


def test_a_picture_larger_than_the_canvas_is_refused(tmp_path: Path) -> None:
    dataset = Pictures(((33, 49), (33, 50)))
    with pytest.raises(InputError, match=r"image picture 1 is 33×50, larger than 33×49: give a larger `image_size`"):
        build(tmp_path, dataset)


@pytest.mark.parametrize("size", [(32, 49), (33, 48), (0, 49), (33, -15)])
def test_a_canvas_off_the_grid_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=rf"`image_size` {size[0]} {size[1]} must be 16·k \+ 1"):
        build(tmp_path, TWENTY, size=size)
    assert contents(tmp_path) == {}


def test_a_backbone_without_the_corners_is_refused(tmp_path: Path) -> None:
    class Patches(nn.Module):
        def forward(self, images: Tensor) -> list[Tensor]:
            return [nn.functional.avg_pool2d(images, STRIDE)]

    backbone = Backbone("patches", Patches(), channels=3, output_stride=STRIDE, mean=torch.zeros(3), std=torch.ones(3))
    with pytest.raises(InputError, match="`backbone` patches has no feature on every 16th pixel"):
        build(tmp_path, TWENTY, backbone)


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match=r"cannot write .*needs .* GiB of free disk.*`cache_dir`"):
        build(tmp_path, TWENTY)
    assert contents(tmp_path) == {}


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot write .*file/cache .*give another `cache_dir`"):
        build(tmp_path / "file" / "cache", TWENTY)


# Both splits


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits that are opened, of three made pictures each, whose features are pixels."""
    splits = []

    def open_split(split: str) -> Pictures:
        dataset = Pictures(((20, 40),) * 3, seed=len(split))
        object.__setattr__(dataset, "split", split)
        splits.append(split)
        return dataset

    def open_splits(data: DataSettings) -> tuple[Pictures, Pictures]:
        return open_split(data.train_split), open_split(data.val_split)

    monkeypatch.setattr(search.tasks.feature_cache, "open_splits", open_splits)
    monkeypatch.setattr(search.tasks.feature_cache, "create_backbone", lambda *_: pixel_backbone())
    return splits


def test_the_command_says_what_the_caches_hold(tmp_path: Path, asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(composed(FeaturesSettings, dataset="pictures", train_split="all", cache_dir=tmp_path, device="cpu"))
    assert asked == ["all", "val"]
    *lines, following = capsys.readouterr().out.splitlines()
    assert following.startswith("next: python -m search.random")
    assert [line.split(",")[0] for line in lines] == [
        f"{role}: {tmp_path / f'pictures-{split}-pixels-os16'}" for role, split in (("train", "all"), ("val", "val"))
    ]
    assert all("features (3, 3, 3, 4) torch.float16" in line for line in lines)
    settings = json.loads((tmp_path / "pictures-val-pixels-os16" / "settings.json").read_text())
    assert settings["kind"] == "feature cache"
    assert settings["command"].startswith("python -m search.features")


def test_caches_are_made_once_for_both_splits(tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    features, machine = FeatureSettings(mirrored=True), MachineSettings(cache_dir=tmp_path, device="cpu")
    groups = DataSettings(dataset="pictures"), BackboneSettings(), features, machine
    caches = prepare_caches(open_for_features(*groups), *groups, COMMAND)
    assert asked == ["train", "val"]
    assert {split: len(cache.features) for split, cache in caches.items()} == {"train": 6, "val": 3}  # val is never mirrored
    assert caches["val"].labels.shape[1:] == (33, 49)  # the first picture's size, rounded up to the grid

    monkeypatch.setattr(search.tasks.feature_cache, "build_cache", lambda *_: pytest.fail("the caches are there"))
    again = prepare_caches(open_for_features(*groups), *groups, COMMAND)
    for split in ("train", "val"):
        assert torch.equal(again[split].features, caches[split].features)
        settings = json.loads((again[split].directory / "settings.json").read_text())
        assert (settings["identity"], settings["command"]) == (again[split].identity, COMMAND)


@pytest.mark.parametrize(
    ("labels", "complaint"),
    [({1}, "all labelled pixels of pictures val have the same label"), (set(), "no pixel of pictures val has a label to")],
)
def test_labels_that_tell_nothing_apart_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str], labels: set[int], complaint: str
) -> None:
    whole = Pictures.__getitem__

    def spoilt(self: Pictures, index: int) -> Sample:
        sample = whole(self, index)
        return sample._replace(label=np.where(np.isin(sample.label, list(labels)), sample.label, 255).astype(np.uint8))

    monkeypatch.setattr(Pictures, "__getitem__", spoilt)
    machine = MachineSettings(cache_dir=tmp_path, device="cpu")
    with pytest.raises(InputError, match=rf"^{complaint}.*: give another `val_split`, or correct its labels"):
        open_for_features(DataSettings(dataset="pictures"), BackboneSettings(), FeatureSettings(), machine)


def of_sizes(split: str, *sizes: tuple[int, int]) -> Pictures:
    dataset = Pictures(sizes)
    object.__setattr__(dataset, "split", split)
    return dataset


def test_the_size_that_fits_all_pictures_is_said_before_anything_is_computed(tmp_path: Path) -> None:
    train, val = of_sizes("train", (20, 40), (30, 40), (50, 34)), of_sizes("val", (33, 49), (17, 60))
    machine = MachineSettings(cache_dir=tmp_path, device="cpu")

    def caches(**given: Any) -> dict[str, FeatureCache]:
        return caches_of(train, val, pixel_backbone(), FeatureSettings(**given), machine, COMMAND)

    fits = "give a larger `image_size`; 65 65 fits all pictures of train and val"
    with pytest.raises(InputError, match=rf"^image picture 2 is 50×34, larger than 33×49: {fits}$"):
        caches()
    with pytest.raises(InputError, match=rf"^image picture 1 is 17×60, larger than 65×49: {fits}$"):
        caches(image_size=(65, 49))
    assert list(tmp_path.iterdir()) == []
    assert all(cache.labels.shape[1:] == (65, 65) for cache in caches(image_size=(65, 65)).values())


def test_crops_that_cannot_be_cut_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    train, val = of_sizes("train", (20, 40)), of_sizes("val", (20, 40))
    settings = pixel_backbone(), FeatureSettings(), MachineSettings(cache_dir=tmp_path, device="cpu"), COMMAND
    for crop in ((33, 65), (32, 49), (-15, 33)):
        with pytest.raises(InputError, match=rf"^`crop_size` {crop[0]} {crop[1]} must be 16·k \+ 1 each, at most 33 49, the"):
            caches_of(train, val, *settings, crop)
    assert list(tmp_path.iterdir()) == []
    assert caches_of(train, val, *settings, (17, 1))["train"].labels.shape == (1, 33, 49)


# Which cache is whose


def write_set(folder: Path, *, seed: int = 0, value: int = 1) -> Path:
    """A folder of two pictures in each split and its description, called `set`; labels are 0 and `value`."""
    for split in ("train", "val"):
        for name in ("a", "b"):
            made.write_image(folder / split / f"{name}.png", seed, (20, 40))
            made.write_label(folder / split / f"{name}.bmp", np.repeat([0, value], 400).astype(np.uint8).reshape(20, 40))
    path = folder / "set.toml"
    path.write_text(
        'classes = ["no", "yes", "other"]\nimages = "{split}/{name}.png"\nlabels = "{split}/{name}.bmp"\n'
        "[splits.train]\n[splits.val]\n"
    )
    return path


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FeatureCache]:
    """Prepares the caches of a description in one folder, on features that are pixels, and returns that of val."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "memory"))

    def prepare(path: Path, *, scale: float = 1.0, size: tuple[int, int] | None = None) -> FeatureCache:
        monkeypatch.setattr(search.tasks.feature_cache, "create_backbone", lambda *_: pixel_backbone(scale))
        machine = MachineSettings(cache_dir=tmp_path / "cache", device="cpu")
        data, features = DataSettings(dataset=str(path)), FeatureSettings(image_size=size)
        groups = data, BackboneSettings(), features, machine
        return prepare_caches(open_for_features(*groups), *groups, COMMAND)["val"]

    return prepare


def test_a_label_corrected_in_place_reaches_the_cache(
    tmp_path: Path, prepare: Callable[..., FeatureCache], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_set(tmp_path / "set")
    before = prepare(path)
    assert np.unique(before.labels.numpy()).tolist() == [0, 1, 255]
    label = tmp_path / "set" / "val" / "b.bmp"
    size = label.stat().st_size
    made.write_label(label, np.full((20, 40), 2, np.uint8))
    assert label.stat().st_size == size
    capsys.readouterr()
    after = prepare(path)
    said = capsys.readouterr().err
    assert said.count("was made of labels that have changed since: its labels are copied once more") == 1  # not those of train
    assert after.directory == before.directory
    assert np.unique(after.labels[1, :20, :40].numpy()).tolist() == [2]
    assert torch.equal(after.labels[0], before.labels[0])
    assert torch.equal(after.features, before.features)


def test_data_sets_of_one_name_have_caches_of_their_own(
    tmp_path: Path, prepare: Callable[..., FeatureCache], capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [write_set(tmp_path / str(seed), seed=seed) for seed in range(3)]
    first, second, third = map(prepare, paths)
    assert first.directory.name == "set-val-pixels-os16"
    assert second.directory.name.startswith("set-val-pixels-os16-")
    assert not torch.equal(first.features, second.features)
    capsys.readouterr()
    for path, cache in zip(paths, (first, second, third), strict=True):
        again = prepare(path)
        assert again.directory == cache.directory
        assert torch.equal(again.features, cache.features)
    assert "features" not in capsys.readouterr().err  # nothing is computed
    shutil.move(tmp_path / "2", tmp_path / "moved")
    assert prepare(tmp_path / "moved" / "set.toml").directory == third.directory
    assert "features" not in capsys.readouterr().err


def test_other_features_have_caches_of_their_own(tmp_path: Path, prepare: Callable[..., FeatureCache]) -> None:
    path = write_set(tmp_path / "set")
    kinds: list[dict[str, Any]] = [{}, {"size": (49, 49)}, {"scale": 2.0}, {"scale": 2.0, "size": (49, 49)}]
    directories = [prepare(path, **kind).directory for kind in kinds]
    assert len(set(directories)) == len(kinds)
    assert [prepare(path, **kind).directory for kind in reversed(kinds)] == directories[::-1]


def test_a_file_in_place_of_the_caches_is_refused(tmp_path: Path, asked: list[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    machine = MachineSettings(cache_dir=tmp_path / "file", device="cpu")
    groups = DataSettings(dataset="pictures"), BackboneSettings(), FeatureSettings(), machine
    with pytest.raises(InputError, match=r"cannot write .*file/pictures-train-.*give another `cache_dir`"):
        prepare_caches(open_for_features(*groups), *groups, COMMAND)


def test_a_cache_does_not_depend_on_the_colours_of_classes(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cache", replace(TWENTY, broken=17))
    colours = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
    cache = build(tmp_path / "cache", replace(TWENTY, task=Segmentation(("even", "odd"), colours)))
    before = contents(tmp_path / "cache")
    assert cache.task.describe()["palette"] == [[1, 2, 3], [4, 5, 6]]
    again = reopen(tmp_path / "cache")
    assert again.task.describe()["palette"] == [[0, 0, 0]] * 2
    assert contents(tmp_path / "cache") == before
