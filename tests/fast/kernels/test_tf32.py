"""TF32 follows the switch of the convolutions that the kernels replace, whichever of PyTorch's interfaces moved it."""

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from fast.kernels import triton as triton_backend

# In a process of its own: after both interfaces were used, PyTorch refuses to read what it would have to restore.
SWITCHES = """
import torch
from types import SimpleNamespace
from fast.kernels import triton as triton_backend

def show():
    print(triton_backend._input_precision(SimpleNamespace(is_cuda=True, dtype=torch.float32, device="cuda")))

torch.cuda.get_device_capability = lambda device: (9, 0)
show()
torch.set_float32_matmul_precision("high")
torch.backends.cudnn.allow_tf32 = False
show()
torch.backends.cuda.matmul.fp32_precision = "tf32"
show()
torch.backends.cudnn.conv.fp32_precision = "tf32"
show()
torch.backends.cudnn.conv.fp32_precision = "ieee"
show()
torch.backends.cudnn.allow_tf32 = True
show()
"""


def test_switch_of_convolutions_decides() -> None:
    command = [sys.executable, "-W", "ignore", "-c", SWITCHES]
    result = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["tf32", "ieee", "ieee", "tf32", "ieee", "tf32"]


@pytest.mark.parametrize(
    ("is_cuda", "dtype", "capability", "expected"),
    [
        (True, torch.float32, (8, 0), "tf32"),
        (True, torch.float32, (7, 5), "ieee"),  # PyTorch's switch is on there too, but the GPU has no such unit
        (True, torch.bfloat16, (8, 0), "ieee"),
        (False, torch.float32, (8, 0), "ieee"),
    ],
)
def test_tf32_is_for_float32_where_the_gpu_has_it(
    is_cuda: bool, dtype: torch.dtype, capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    x = mock.Mock(is_cuda=is_cuda, dtype=dtype)
    assert triton_backend._input_precision(x) == expected
