"""Files are known by what they hold: a change is noticed, however little else tells it, and unchanged files are not read."""

import hashlib
import json
import os
import stat
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import search.datasets.digests
from search.datasets import Fingerprint, open_dataset
from search.datasets.digests import digests
from search.datasets.files import FileDataset, Pair
from search.datasets.labels import LabelReader
from search.dense_tasks.segmentation import Segmentation
from search.errors import InputError
from tests.search import dataset_folders as made

BAR = "content of the test"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where hashes are remembered; files count as settled at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(search.datasets.digests, "_RECENT_NS", -(10**9))
    return tmp_path / "cache" / "dense-prediction-cell" / "digests"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read."""
    names: list[str] = []
    original = search.datasets.digests._hash

    def counting(place: str) -> object:
        names.append(Path(place).name)
        return original(place)

    monkeypatch.setattr(search.datasets.digests, "_hash", counting)
    return names


def write(folder: Path, **texts: str) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [folder / name for name in texts]


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_they_are_the_hashes_of_the_files_in_their_order(tmp_path: Path) -> None:
    a, b = write(tmp_path / "data", a="one", b="two")
    assert digests([b, a, b], BAR) == [sha("two"), sha("one"), sha("two")]
    assert digests([], BAR) == []


def test_a_file_is_read_once(tmp_path: Path, read: list[str], cache: Path) -> None:
    paths = write(tmp_path / "data", a="one", b="two")
    first = digests(paths, BAR)
    assert sorted(read) == ["a", "b"]
    assert digests(paths, BAR) == first
    assert len(read) == 2
    write(tmp_path / "data", b="ten")  # of the same size
    assert digests(paths, BAR) == [sha("one"), sha("ten")]
    assert read[2:] == ["b"]
    assert len(list(cache.iterdir())) == 1


def test_a_change_that_sets_the_time_back_is_noticed(tmp_path: Path) -> None:
    (path,) = write(tmp_path / "data", a="one")
    before = path.stat()
    digests([path], BAR)
    time.sleep(0.02)  # past the clock's tick
    path.write_text("two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert digests([path], BAR) == [sha("two")]


def test_another_file_behind_a_link_is_noticed(tmp_path: Path) -> None:
    a, b = write(tmp_path / "data", a="one", b="two")
    link = tmp_path / "data" / "link"
    link.symlink_to(a)
    assert digests([link], BAR) == [sha("one")]
    link.unlink()
    link.symlink_to(b)
    assert digests([link], BAR) == [sha("two")]


def test_a_file_just_written_is_not_remembered(tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search.datasets.digests, "_RECENT_NS", 3 * 10**9)
    (path,) = write(tmp_path / "data", a="one")
    for _ in range(2):
        digests([path], BAR)
    assert read == ["a", "a"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'{"/a": 3}', b'{"/a": ["x"]}', b"\xff\xfe"])
def test_a_damaged_table_is_written_anew(tmp_path: Path, content: bytes, cache: Path, read: list[str]) -> None:
    paths = write(tmp_path / "data", a="one")
    digests(paths, BAR)
    (table,) = cache.iterdir()
    table.write_bytes(content)
    assert digests(paths, BAR) == digests(paths, BAR) == [sha("one")]
    assert len(read) == 2


@pytest.mark.parametrize("obstacle", ["a file", "no home"])
def test_hashes_are_the_same_where_none_can_be_remembered(
    tmp_path: Path, obstacle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write(tmp_path / "data", a="one")
    if obstacle == "a file":
        (tmp_path / "cache").write_text("in the way")
    else:

        def homeless() -> Path:
            raise RuntimeError("could not determine home directory")

        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", homeless)
    assert digests(paths, BAR) == digests(paths, BAR) == [sha("one")]


def test_the_table_forgets_files_that_are_gone_and_old_tables_go(tmp_path: Path, cache: Path) -> None:
    a, b = write(tmp_path / "data", a="one", b="two")
    digests([a, b], BAR)
    (table,) = cache.iterdir()
    (cache / "old.json").write_text("{}")
    os.utime(cache / "old.json", (1, 1))
    a.unlink()
    (c,) = write(tmp_path / "data", c="three")
    digests([b, c], BAR)
    assert {Path(place).name for place in json.loads(table.read_text())} == {"b", "c"}
    assert list(cache.iterdir()) == [table]


def test_another_process_loses_nothing(tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = write(tmp_path / "data", a="one", b="two")
    original = search.datasets.digests._hash_all

    def while_another_writes(places: list[str], description: str) -> object:
        monkeypatch.setattr(search.datasets.digests, "_hash_all", original)
        digests([b], BAR)
        return original(places, description)

    monkeypatch.setattr(search.datasets.digests, "_hash_all", while_another_writes)
    digests([a], BAR)
    digests([a, b], BAR)
    assert sorted(read) == ["a", "b"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="who is root may read everything")
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (path,) = write(tmp_path / "data", a="one")
    path.chmod(stat.S_IWUSR)
    with pytest.raises(InputError, match=rf"cannot read {path} \(Permission denied\): restore it, or allow reading it"):
        digests([path], BAR)


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"cannot read {tmp_path}/a \(No such file or directory\): restore it"):
        digests([tmp_path / "a"], BAR)


# Fingerprints of data sets

FOLDER = (
    'classes = ["no", "yes"]\nimages = "{split}/{name}.jpg"\nlabels = "{split}/{name}.bmp"\n[splits.train]\n[splits.val]\n'
)
contents = st.dictionaries(st.sampled_from("abcd"), st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1)


def fingerprint_of(folder: Path, pictures: dict[str, tuple[int, int]]) -> Fingerprint:
    """Of pictures that hold these numbers, by name, in this order."""
    folder.mkdir()
    for name, numbers in pictures.items():
        for suffix, number in zip(("jpg", "png"), numbers, strict=True):
            (folder / f"{name}.{suffix}").write_bytes(bytes([number]))
    pairs = tuple(Pair(name, folder / f"{name}.jpg", folder / f"{name}.png") for name in pictures)
    dataset = FileDataset(
        name="made",
        split="train",
        task=Segmentation(("no", "yes")),
        pairs=pairs,
        read_label=LabelReader({0: 0}, remedy=""),
        listing=folder,
    )
    return dataset.fingerprint()


@given(first=contents, second=contents)
def test_it_changes_with_content_names_and_order_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, first: dict[str, tuple[int, int]], second: dict[str, tuple[int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("data")
    of_first, of_second = (fingerprint_of(folder / str(i), pictures) for i, pictures in enumerate((first, second)))

    def column(pictures: dict[str, tuple[int, int]], index: int) -> list[int]:
        return [numbers[index] for numbers in pictures.values()]

    same_images = list(first) == list(second) and column(first, 0) == column(second, 0)
    assert (of_first.images == of_second.images) == same_images
    assert (of_first.labels == of_second.labels) == (column(first, 1) == column(second, 1))


def test_a_label_corrected_in_place_changes_the_labels_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        for name in ("a", "b"):
            made.write_image(tmp_path / "data" / split / f"{name}.jpg")
            made.write_label(tmp_path / "data" / split / f"{name}.bmp", np.zeros(made.SIZE, np.uint8))
    path = tmp_path / "data" / "set.toml"
    path.write_text(FOLDER)
    before = open_dataset(str(path), "train", None).fingerprint()
    label = tmp_path / "data" / "train" / "b.bmp"
    size, times = label.stat().st_size, label.stat()
    time.sleep(0.02)
    made.write_label(label, np.ones(made.SIZE, np.uint8))
    os.utime(label, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert label.stat().st_size == size
    after = open_dataset(str(path), "train", None).fingerprint()
    assert after.images == before.images
    assert after.labels != before.labels
    path.write_text(FOLDER + '[label_ids]\n0 = "yes"\n1 = "no"\n')
    assert open_dataset(str(path), "train", None).fingerprint().labels not in (before.labels, after.labels)
