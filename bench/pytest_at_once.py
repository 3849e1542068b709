"""A plugin of pytest (`-p bench.pytest_at_once`): whatever ends a run, the reasons of its failures are told before.

A kernel that breaks the GPU's context makes every later test of its process fail as well. Where pytest-xdist can start a new
process, the broken one ends itself.
"""

import os
import sys
from collections.abc import Generator

import pytest

from bench.worker import has_lost_its_device


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Around pytest's own, which makes the report of each phase of a test."""
    report = yield
    if report.failed:
        print(f"\n{report.nodeid}\n{report.longreprtext}", file=sys.__stderr__, flush=True)
        if "PYTEST_XDIST_WORKER" in os.environ and has_lost_its_device():
            os._exit(1)
    return report
