"""Tasks for tests of workers. Ray's processes import this file, so it imports little."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reference.cell import Cell
from search.settings import HeadSettings, ProxySettings
from search.tasks.feature_cache import FeatureCache
from search.tasks.proxy import ProxyTask


def make_cache(seed: int, count: int) -> FeatureCache:
    rng = np.random.default_rng(seed)
    features = torch.from_numpy(rng.normal(size=(count, 4, 3, 3))).half()
    labels = torch.from_numpy(rng.integers(0, 3, (count, 33, 33))).to(torch.uint8)
    identity = {"dataset": "noise", "class_names": ["a", "b", "c"], "output_stride": 16}
    return FeatureCache(Path("in memory"), features, labels, identity)


PROXY = ProxySettings(iterations=3, batch_size=2, learning_rate=0.1, statistics_batches=1)
HEAD = HeadSettings(branch_channels=4)


def create_task(settings: ProxySettings = PROXY, device: str = "cpu") -> ProxyTask:
    return ProxyTask(make_cache(0, 3), make_cache(1, 2), settings, HEAD, device)


class Suicidal(ProxyTask):
    """Dies with its process at its first evaluation on this machine."""

    def evaluate(self, *arguments: Any) -> Any:
        mark = Path(os.environ["SUICIDE_MARK"])
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().evaluate(*arguments)


def create_suicidal_task() -> ProxyTask:
    return Suicidal(make_cache(0, 3), make_cache(1, 2), PROXY, HEAD)


class Waiting:
    """Waits for as many milliseconds as the seed says; the result says where, in which process, with how many threads."""

    def evaluate(self, cell: Cell, seed: Sequence[int], on_step: Any = None) -> tuple[tuple[str, int, int], None]:
        import ray

        time.sleep(seed[-1] / 1000)
        return (ray.get_runtime_context().get_node_id(), os.getpid(), torch.get_num_threads()), None


def create_cached_task(train: FeatureCache) -> ProxyTask:
    return ProxyTask(train, train, PROXY, HEAD)


class Instant:
    """A task without work."""

    def evaluate(self, cell: Cell, seed: Sequence[int], on_step: Any = None) -> tuple[str, None]:
        return "done", None
