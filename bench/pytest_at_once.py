"""A pytest plugin (`-p bench.pytest_at_once`) that prints the reason of each failure at once, in case the run is ended.

A kernel that breaks the GPU's context makes all later tests of its process fail too. If pytest-xdist can start a new process,
the broken one exits.
"""

import os
import sys
from collections.abc import Generator

import pytest

from bench.worker import has_lost_its_device


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Wraps pytest's hook that makes the report of each phase of a test."""
    report = yield
    if report.failed:
        print(f"\n{report.nodeid}\n{report.longreprtext}", file=sys.__stderr__, flush=True)
        if "PYTEST_XDIST_WORKER" in os.environ and has_lost_its_device():
            os._exit(1)
    return report
