"""Tests in a process of its own: once PyTorch was told of a GPU, its autograd starts a thread, and no process may fork."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_benchmark_on_a_gpu_that_computes_nothing() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/bench/on_a_fake_gpu.py"]
    environment = os.environ | {"PYTEST_ADDOPTS": "-p no:xdist"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
