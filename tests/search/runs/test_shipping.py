"""A cache on another machine: opened where it is, or fetched whole, and never a damaged one."""

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import search.runs.shipping
from search.errors import InputError
from search.runs.shipping import ReadPiece, Source, StoredCache, lacking, open_or_fetch, stored
from search.tasks.feature_cache import FeatureCache
from tests.search.tasks.test_feature_cache import TWENTY, build, contents


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FeatureCache:
    """A cache of this machine, in pieces of 1,000 bytes; what is fetched lies in `home`."""
    monkeypatch.setattr(search.runs.shipping, "PIECE", 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return build(tmp_path / "here", TWENTY)


Elsewhere = Callable[[FeatureCache], tuple[StoredCache, ReadPiece]]


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    """A cache as another machine knows it, where its folder does not exist, and how that reads it."""
    with ExitStack() as stack:

        def known(cache: FeatureCache) -> tuple[StoredCache, ReadPiece]:
            here = stored("train", cache)
            return here._replace(directory=Path("/nowhere/here")), stack.enter_context(closing(Source([here]))).read

        yield known


def fetched(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "home" / "dense-prediction-cell" / "features").iterdir() if path.is_dir())


def test_a_cache_that_is_there_is_opened_and_not_fetched(cache: FeatureCache) -> None:
    def read(*_: object) -> tuple[bytes, str]:
        pytest.fail("it is there")

    here = stored("train", cache)
    assert lacking([here]) == []
    assert open_or_fetch(here, read).directory == cache.directory


def test_a_cache_that_is_not_there_is_fetched_once(cache: FeatureCache, elsewhere: Elsewhere, tmp_path: Path) -> None:
    there, read = elsewhere(cache)
    assert lacking([there]) == [there]
    found = open_or_fetch(there, read)
    torch.testing.assert_close(found.features, cache.features, rtol=0, atol=0)
    torch.testing.assert_close(found.labels, cache.labels, rtol=0, atol=0)
    assert [contents(folder) for folder in fetched(tmp_path)] == [contents(cache.directory)]
    assert lacking([there]) == []
    assert open_or_fetch(there, lambda *_: pytest.fail("it was fetched")).directory == found.directory


def test_several_workers_of_a_machine_fetch_it_once_together(cache: FeatureCache, elsewhere: Elsewhere) -> None:
    there, read = elsewhere(cache)
    pieces: list[tuple[str, str, int]] = []

    def counted(*piece: str | int) -> tuple[bytes, str]:
        pieces.append(piece)  # type: ignore[arg-type]
        return read(*piece)  # type: ignore[arg-type]

    threads = [threading.Thread(target=open_or_fetch, args=(there, counted)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(name == "features.bin" for _, name, _ in pieces) == -(-there.sizes["features.bin"] // 1000) > 1
    assert len(set(pieces)) == len(pieces)


@pytest.mark.parametrize(
    "spoil",
    [lambda piece: piece[:-1] + bytes([piece[-1] ^ 1]), lambda piece: piece[:-1], lambda piece: b""],
    ids=["another bit", "too short", "nothing"],
)
def test_pieces_that_do_not_arrive_as_they_were_are_refused(
    cache: FeatureCache, elsewhere: Elsewhere, tmp_path: Path, spoil: Callable[[bytes], bytes]
) -> None:
    there, read = elsewhere(cache)

    def spoilt(name: str, file: str, number: int) -> tuple[bytes, str]:
        piece, expected = read(name, file, number)
        return (spoil(piece) if (file, number) == ("features.bin", 1) else piece), expected

    with pytest.raises(InputError, match=r"features\.bin of train did not arrive as it was"):
        open_or_fetch(there, spoilt)
    assert lacking([there]) == [there]
    assert open_or_fetch(there, read).directory in fetched(tmp_path)


def test_a_transfer_that_was_cut_off_begins_anew(cache: FeatureCache, elsewhere: Elsewhere, tmp_path: Path) -> None:
    there, read = elsewhere(cache)

    def cut(name: str, file: str, number: int) -> tuple[bytes, str]:
        if number == 2:
            raise ConnectionError
        return read(name, file, number)

    with pytest.raises(ConnectionError):
        open_or_fetch(there, cut)
    assert lacking([there]) == [there]
    assert contents(open_or_fetch(there, read).directory) == contents(cache.directory)
    assert len(fetched(tmp_path)) == 1


def test_a_fetched_cache_that_is_damaged_is_fetched_again(cache: FeatureCache, elsewhere: Elsewhere) -> None:
    there, read = elsewhere(cache)
    place = open_or_fetch(there, read).directory
    with (place / "labels.bin").open("r+b") as file:
        file.truncate(10)
    assert contents(open_or_fetch(there, read).directory) == contents(cache.directory)


def test_caches_of_other_contents_do_not_meet(cache: FeatureCache, elsewhere: Elsewhere, tmp_path: Path) -> None:
    there, read = elsewhere(cache)
    open_or_fetch(there, read)
    other, read_other = elsewhere(build(tmp_path / "other", TWENTY, mirrored=True))
    found = open_or_fetch(other._replace(directory=there.directory), read_other)
    assert len(found.features) == 2 * len(cache.features)
    assert len(fetched(tmp_path)) == 2


def test_files_that_are_sent_are_those_that_were_there_at_the_start(cache: FeatureCache, elsewhere: Elsewhere) -> None:
    there, read = elsewhere(cache)
    before = contents(cache.directory)
    shutil.rmtree(cache.directory)
    assert contents(open_or_fetch(there, read).directory) == before


def test_a_machine_without_room_says_what_it_needs(
    cache: FeatureCache, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, read = elsewhere(cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3))
    with pytest.raises(InputError, match=r"has 0\.0 GB of free disk, train needs 0\.0: make room, or share /nowhere/here"):
        open_or_fetch(there, read)
