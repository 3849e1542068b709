"""Hypothesis profiles and threads for all tests; choose a profile by `HYPOTHESIS_PROFILE=ci pytest`."""

import os
import sys

from hypothesis import settings

from tests.cuda_driver import sees_a_gpu
from tests.postgres import database as database
from tests.postgres import postgres as postgres

if not sees_a_gpu():  # then Triton's interpreter runs the kernels; it asks at its first import
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Else the first `ray.init` of a process asks all later clusters there for a token, and nodes of other processes not.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

settings.register_profile("dev", max_examples=10, deadline=None)
settings.register_profile("ci", max_examples=100, deadline=None, derandomize=True)
settings.register_profile("deep", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_collection_finish() -> None:
    """One thread: the tests' tensors are too small to share, and sums keep one order. The reference's tests need no torch.

    On a GPU float32 is float32: beside TF32, PyTorch's choice in convolutions, errors a thousand times as large would pass.
    """
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.set_num_threads(1)
        torch.backends.cudnn.allow_tf32 = False
