"""Every launch table beside the counted one can be launched, and is taken on the GPU whose name it has."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fast.kernels.triton import launches
from fast.kernels.triton.launches import DEFAULT, Launch, file_stem, measured, table_for

FILES = sorted(path.stem for path in Path(launches.__file__).parent.glob("*.py") if path.stem != "__init__")
MADE_UP = """
from fast.kernels.triton.launches import Launch

LAUNCHES = {("fold", 4, "small"): Launch(256, 8, 0, 2, 1)}
"""


@pytest.fixture
def made_up_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device named "Example GPU-1 (48 GB)", with a table of its own."""
    (tmp_path / "example_gpu_1_48_gb.py").write_text(MADE_UP, encoding="utf-8")
    monkeypatch.setattr(launches, "__path__", [*launches.__path__, str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Example GPU-1 (48 GB)")
    table_for.cache_clear()
    yield torch.device("cuda", 0)
    table_for.cache_clear()


@pytest.mark.parametrize("table", [DEFAULT, *(measured(stem) for stem in FILES)], ids=["counted", *FILES])
def test_every_launch_is_one(table: launches.Table) -> None:
    assert table.keys() <= DEFAULT.keys()
    for key, launch in table.items():
        powers = (launch.block_p, launch.block_n, launch.block_k, launch.warps)
        assert all(value & (value - 1) == 0 for value in powers), (key, launch)  # Triton's ranges are powers of two
        assert all((value > 0) == (default > 0) for value, default in zip(launch, DEFAULT[key], strict=True)), (key, launch)
        assert 1 <= launch.warps <= 32
        assert launch.stages >= 1


def test_files_are_named_by_the_rule() -> None:
    assert [file_stem(stem) for stem in FILES] == FILES
    assert file_stem("NVIDIA H200") == "nvidia_h200"
    assert file_stem("NVIDIA GeForce RTX 4090") == "nvidia_geforce_rtx_4090"


def test_a_measured_table_lies_over_the_counted_one(made_up_gpu: torch.device) -> None:
    assert table_for(made_up_gpu) == DEFAULT | {("fold", 4, "small"): Launch(256, 8, 0, 2, 1)}
    assert table_for(made_up_gpu) is table_for(made_up_gpu)  # looked up once
    assert table_for(torch.device("cpu")) is DEFAULT


def test_a_gpu_without_a_file_has_the_counted_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Example GPU-2")
    assert table_for.__wrapped__(torch.device("cuda", 0)) == DEFAULT
