"""What is free and what is needed, against numbers by hand, and that what a refusal proposes does fit."""

import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

import search.training.memory
from fast.backbone import plain_backbone
from fast.segmentation import SegmentationNetwork
from search.errors import InputError
from search.training.memory import PredictionMemory, features_in_memory, free_memory
from search.training.tiles import Tiles
from tests.search.test_train import small_network

GIGABYTE = 10**9


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system with 8 GB free, whose files lie in the folder."""
    places = {"_MEMORY": "meminfo", "_OWN_MEMORY": "statm", "_OWN_GROUPS": "cgroup", "_GROUPS": "groups"}
    for name, place in places.items():
        monkeypatch.setattr(search.training.memory, name, tmp_path / place)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    (tmp_path / "meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:  {8 * 10**9 // 1024} kB\nSwapFree: 0 kB\n")
    return tmp_path


def write_group(folder: Path, **content: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in content.items():
        (folder / name.replace("_in_bytes", "%").replace("_", ".", 1).replace("%", "_in_bytes")).write_text(f"{text}\n")


def test_free_is_what_the_system_has(system: Path) -> None:
    assert free_memory() == 8 * 10**9 // 1024 * 1024
    (system / "meminfo").unlink()
    assert free_memory() is None


def test_a_limit_of_addresses_counts(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (6 * GIGABYTE, 7 * GIGABYTE))
    (system / "statm").write_text("1000 900 800 1 0 700 0\n")
    assert free_memory() == 6 * GIGABYTE - 1000 * resource.getpagesize()
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1000, 1000))
    assert free_memory() == 0


@pytest.mark.parametrize(("limited", "expected"), [("a/b", 2.5), ("a", 2.5), ("", 2.5), ("elsewhere", 8)])
def test_a_container_of_version_2_counts(system: Path, limited: str, expected: float) -> None:
    (system / "cgroup").write_text("0::/a/b\n")
    write_group(system / "groups" / "a" / "b", memory_max="max", memory_current=5)
    inactive = f"anon 7\ninactive_file {GIGABYTE // 2}"
    write_group(system / "groups" / limited, memory_max=3 * GIGABYTE, memory_current=GIGABYTE, memory_stat=inactive)
    assert free_memory() == pytest.approx(expected * GIGABYTE, abs=1024)


def test_a_container_of_version_1_counts(system: Path) -> None:
    (system / "cgroup").write_text("4:cpu,memory:/not/shown/inside\n1:cpuset:/\n0::/\n")
    limits: dict[str, Any] = {"memory_limit_in_bytes": 3 * GIGABYTE, "memory_usage_in_bytes": GIGABYTE}
    write_group(system / "groups" / "memory", **limits, memory_stat="total_inactive_file 1000")
    assert free_memory() == 2 * GIGABYTE + 1000


def give(system: Path, free: float) -> None:
    (system / "meminfo").write_text(f"MemAvailable: {int(free // 1024)} kB\n")


def refusal(network: SegmentationNetwork, size: tuple[int, int], **options: Any) -> str:
    picture = size[0] - 1, size[1] - 1  # which is padded to the size
    with (
        pytest.raises(InputError) as caught,
        PredictionMemory(network, 19, **options).of_picture(picture, size, "a"),
    ):
        pytest.fail("it was begun")
    return str(caught.value)


@pytest.mark.parametrize("free", [0.9e9, 1.5e9, 4e9])
def test_the_tiles_that_are_proposed_fit(system: Path, free: float) -> None:
    give(system, free)
    network, size = small_network(19), (4001, 6001)
    text = refusal(network, size)
    assert re.match(rf"picture a of 4000 × 6000 pixels needs about 4\.2 GB of memory, {free / 1e9:.1f} are free: give ", text)
    side = int(re.findall(r"`tile_size` (\d+) \1$", text)[0])
    give(system, free / 2 + 1024)
    with PredictionMemory(network, 19, tiles=Tiles((side, side))).of_picture(size, size, "a"):
        pass
    assert side >= 129
    network.head.context.pin_pooling((3, side // 16 + 2))  # larger windows than that
    assert refusal(network, size).endswith("free memory, or give a smaller one")


def test_where_no_tile_helps_another_remedy_is_given(system: Path) -> None:
    give(system, 1e6)
    assert refusal(small_network(19), (4001, 6001)).endswith("0.0 are free: free memory, or give a smaller one")
    assert refusal(small_network(19), (65, 65), scales=(2.0,)).endswith("or fewer or smaller `scales`")


def test_what_one_picture_had_the_next_one_can_have_again(system: Path) -> None:
    """Where freed memory does not count as free, as under a limit of addresses."""
    memory = PredictionMemory(small_network(19), 19)
    with memory.of_picture((300, 400), (305, 401), "a"):
        give(system, 1000)
    with memory.of_picture((300, 400), (305, 401), "b"):
        pass
    with (
        pytest.raises(InputError, match="picture c of 400 × 400 pixels needs"),
        memory.of_picture((400, 400), (401, 401), "c"),
    ):
        pytest.fail("it was begun")


def test_a_memory_that_turns_out_full_is_said_with_smaller_tiles() -> None:
    memory = PredictionMemory(small_network(19), 19, tiles=Tiles((513, 513)))
    with (
        pytest.raises(InputError, match=r"picture a of 3 × 5 pixels needs more memory than .*: give `tile_size` 257 257$"),
        memory.of_picture((3, 5), (2001, 2001), "a"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(RuntimeError, match="anything else"), memory.of_picture((3, 5), (2001, 2001), "a"):
        raise RuntimeError("anything else")


def test_features_are_computed_of_as_many_pictures_as_fit(system: Path) -> None:
    # 6 numbers a pixel, and twice the widest layer: 3 before it and 4 after it, of 65 × 65 for 129 × 129.
    needed = 4 * 129 * 65 * (6 + 2 * (3 + 4 * (65 / 129) ** 2))
    backbone = plain_backbone("plain", (4, 6, 8, 8), output_stride=16)
    for pictures, expected in ((20.0, 8), (3.5, 3), (1.1, 1)):
        give(system, pictures * needed + 1024)
        with features_in_memory(backbone, (129, 65), 8) as at_once:
            assert at_once == expected
    give(system, 0.9 * needed)
    with (
        pytest.raises(InputError, match=r"of pictures of 129 × 65 pixels need about 0\.0 GB .* cut pictures and labels"),
        features_in_memory(backbone, (129, 65), 8),
    ):
        pytest.fail("it was begun")
    give(system, 20 * needed)
    with (
        pytest.raises(InputError, match="need more memory than the device has: cut pictures and labels"),
        features_in_memory(backbone, (129, 65), 8),
    ):
        raise MemoryError
