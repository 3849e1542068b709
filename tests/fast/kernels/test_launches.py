"""Every launch table beside the counted one can be launched, and is taken on the GPU whose name it has."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fast.kernels.triton import launches
from fast.kernels.triton.launches import (
    DEFAULT,
    FOLDER,
    Key,
    Launch,
    Measured,
    Table,
    is_possible,
    measured,
    path_of,
    table_for,
)

GPU = "Example GPU-1 (48 GB)"
FOLD: Key = ("fold", 4, "small")
LAUNCH = Launch(256, 8, 0, 2, 1)
ENTRY = {"kernel": "fold", "value_bytes": 4, "size": "small", "launch": LAUNCH._asdict(), "counted_us": 5.0, "us": 4.0}
CONTENT = {"gpu": GPU, "launches": [ENTRY]}
FILES = {path: json.loads(path.read_text(encoding="utf-8"))["gpu"] for path in FOLDER.glob("*.json")}


@pytest.fixture
def made_up_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device with a name, and a folder for its table."""
    monkeypatch.setattr(launches, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    table_for.cache_clear()
    yield torch.device("cuda", 0)
    table_for.cache_clear()


def launches_in(path: Path) -> Table:
    return {key: entry.launch for key, entry in measured(path, FILES[path]).items()}


@pytest.mark.parametrize("table", [DEFAULT, *map(launches_in, FILES)], ids=["counted", *(path.stem for path in FILES)])
def test_every_launch_is_one(table: Table) -> None:
    assert table.keys() <= DEFAULT.keys()
    for key, launch in table.items():
        powers = (launch.block_p, launch.block_n, launch.block_k, launch.warps)
        assert all(value & (value - 1) == 0 for value in powers), (key, launch)  # Triton's ranges are powers of two
        assert all((value > 0) == (default > 0) for value, default in zip(launch, DEFAULT[key], strict=True)), (key, launch)
        assert 1 <= launch.warps <= 32
        assert launch.stages >= 1
        assert is_possible(key, launch)


def test_files_are_named_by_the_rule() -> None:
    assert [path_of(gpu) for gpu in FILES.values()] == list(FILES)
    assert path_of("NVIDIA H200").name == "nvidia_h200.json"
    assert path_of("NVIDIA GeForce RTX 4090").name == "nvidia_geforce_rtx_4090.json"


def test_a_measured_table_lies_over_the_counted_one(made_up_gpu: torch.device, tmp_path: Path) -> None:
    (tmp_path / "example_gpu_1_48_gb.json").write_text(json.dumps(CONTENT), encoding="utf-8")
    assert table_for(made_up_gpu) == DEFAULT | {FOLD: LAUNCH}
    assert table_for(made_up_gpu) is table_for(made_up_gpu)  # looked up once
    assert table_for(torch.device("cpu")) is DEFAULT
    assert measured(path_of(GPU), GPU) == {FOLD: Measured(LAUNCH, 5.0, 4.0)}


def changed(**fields: Any) -> str:
    return json.dumps(CONTENT | {"launches": [ENTRY | fields]})


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(CONTENT)[:-9],
        "[]",
        "{}",
        json.dumps({"gpu": GPU}),
        json.dumps(CONTENT | {"gpu": "Example GPU-2"}),
        json.dumps(CONTENT | {"launches": [3]}),
        changed(kernel="folding"),
        changed(size=["small"]),
        changed(us=None),
        changed(launch=LAUNCH._asdict() | {"warp": 2}),
        changed(launch={"block_p": 256}),
        *(changed(launch=LAUNCH._asdict() | {"block_p": value}) for value in (0, -256, 100, 256.0, "256", None)),
        changed(launch=LAUNCH._asdict() | {"block_k": 16}),  # `fold` has no such tile
        changed(launch=LAUNCH._asdict() | {"warps": 64}),
        changed(launch=LAUNCH._asdict() | {"registers": 96}),  # the compiler chooses those of `fold`
    ],
)
def test_a_file_that_says_nothing_sure_is_ignored_and_named(text: str, made_up_gpu: torch.device, tmp_path: Path) -> None:
    """The counted launches are right on every GPU, and a search goes on."""
    (tmp_path / "example_gpu_1_48_gb.json").write_text(text, encoding="utf-8")
    with pytest.warns(UserWarning, match=r"example_gpu_1_48_gb\.json is ignored, the counted launches are used"):
        assert table_for(made_up_gpu) == DEFAULT


def test_a_gpu_without_a_file_has_the_counted_table(made_up_gpu: torch.device) -> None:
    assert table_for(made_up_gpu) == DEFAULT
