"""A build of the C++ kernels with sanitizers, on drawn shapes: they stay inside of their tensors, and no integer overflows."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fast.kernels.sanitized import MissingSanitizers, environment

ROOT = Path(__file__).parents[3]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, whose memory is the sanitizers'."""
    try:
        environment()
    except MissingSanitizers as missing:
        pytest.skip(str(missing))
    command = [sys.executable, "-m", "tests.fast.kernels.sanitized", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_no_error_on_drawn_shapes() -> None:
    result = run("--rounds", "50")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(" kernels, 50 rounds: no error\n")


def test_one_value_beyond_a_tensor_is_noticed() -> None:
    result = run("--read-beyond-a-tensor")
    assert result.returncode != 0
    assert "ERROR: AddressSanitizer: heap-buffer-overflow" in result.stderr
    assert "READ of size 4" in result.stderr
