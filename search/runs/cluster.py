"""What a Ray cluster has, and how many workers each of its nodes gets. A single machine is a cluster of one node."""

import logging
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from search.commands import to_install
from search.devices import resolve_device
from search.errors import InputError
from search.interrupts import sigterm_kept
from search.settings import WorkerSettings, given

THREADS = 4  # of a worker on CPUs, where their number is chosen for the user: the maps of one training are small


class Node(NamedTuple):
    """A machine of the cluster. Ray gives one that comes back another `id`."""

    id: str
    address: str
    cpus: int
    gpus: int


@dataclass(frozen=True)
class Demand:
    """How many workers are wanted: `count`, or all that the nodes have room for if it is None; at most `most` of them.

    `gpus_each` is the share of a GPU that each takes, None on CPUs; `threads` is how many each should have there.
    """

    count: int | None
    gpus_each: float | None = None
    most: int | None = None
    threads: int = THREADS

    def room(self, node: Node) -> int:
        """How many workers this node has room for. Shares of one worker lie on one GPU."""
        if self.gpus_each is not None:
            return node.gpus * int(1 / self.gpus_each + 1e-6)  # ten tenths are one
        return max(node.cpus // self.threads, min(node.cpus, 1))

    def placed(self, nodes: Sequence[Node]) -> Counter[str]:
        """How many workers each node gets, by its `id`; every next one goes where it has the largest part of a node.

        A number of workers that the user gave may exceed the CPUs, but never the GPUs.

        >>> nodes = [Node("a", "10.0.0.1", 16, 2), Node("b", "10.0.0.2", 8, 0)]
        >>> Demand(None).placed(nodes), Demand(3).placed(nodes), Demand(None, gpus_each=0.5).placed(nodes)
        (Counter({'a': 4, 'b': 2}), Counter({'a': 2, 'b': 1}), Counter({'a': 4}))
        """
        room = {node.id: self.room(node) for node in nodes}
        number = sum(room.values()) if self.count is None else self.count
        is_bounded = self.count is None or self.gpus_each is not None
        found: Counter[str] = Counter()
        for _ in range(number if self.most is None else min(number, self.most)):
            free = [node for node in nodes if found[node.id] < room[node.id] or not is_bounded]
            if free:
                found[max(free, key=lambda node: self._has(node) / (found[node.id] + 1)).id] += 1
        return found

    def _has(self, node: Node) -> int:
        return node.cpus if self.gpus_each is None else node.gpus


def demand_of(settings: WorkerSettings, device: str, most: int | None = None) -> Demand:
    """The demand of these settings. Raises InputError for a single GPU, by its number, that all would have to share."""
    if device.startswith("cuda:"):
        raise InputError(f"`device` {device} is one GPU, `workers` {settings.workers} have one each: give cuda")
    on_gpu = (resolve_device(device) if device == "auto" else device).startswith("cuda")
    return Demand(
        count=None if settings.workers == "auto" else settings.workers,
        gpus_each=settings.gpus_per_worker if on_gpu else None,
        most=most,
        threads=min(THREADS, threads_wanted() or THREADS),
    )


def threads_wanted() -> int | None:
    """The number of threads that the user set for PyTorch, None if they did not."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, int(wanted)) if wanted.isdecimal() else None


def count_workers(settings: WorkerSettings, device: str) -> int:
    """How many cells will be evaluated at a time; for auto, what the cluster, or else this machine, has room for now.

    Raises InputError if a cluster has room for none.
    """
    if settings.workers != "auto":
        return settings.workers
    demand, nodes = demand_of(settings, device), _nodes_of_cluster()
    return require_room(demand, [_this_machine()] if nodes is None else nodes)


def is_in_process(settings: WorkerSettings, device: str) -> bool:
    """Whether cells are evaluated by this process: one is wanted, or auto finds room for one and no cluster to grow."""
    if settings.workers != "auto":
        return settings.workers == 1
    if device.startswith("cuda:"):
        return True
    return _nodes_of_cluster() is None and demand_of(settings, device).room(_this_machine()) == 1


def require_room(demand: Demand, nodes: Sequence[Node]) -> int:
    """The number of workers that there is room for. Raises InputError for none, and for fewer than the user gave."""
    room = demand.placed(nodes).total()
    if demand.count is not None and room < min(demand.count, given(demand.most, demand.count)):
        gpus, share = sum(node.gpus for node in nodes), given(demand.gpus_each, 1.0)
        raise InputError(
            f"`workers` {demand.count} on CUDA needs {demand.count * share:g} GPUs, Ray has {gpus}: give fewer workers"
        )
    if room == 0:
        raise InputError("`workers` auto found a cluster without room for a worker: give the nodes GPUs, or `device` cpu")
    return room


def import_ray() -> Any:
    """Ray, which is untyped. Raises InputError if it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise InputError(f"`workers` above 1 needs Ray: {to_install('workers')}") from error
    return ray


def join() -> bool:
    """Join the cluster that is there, or else start Ray on this machine; False if this process had joined before.

    Raises InputError for a cluster that does not answer, or lets nobody in.
    """
    ray = import_ray()
    if ray.is_initialized():
        return False
    try:
        with sigterm_kept():
            ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
    except (ConnectionError, ray.exceptions.RayError) as error:  # such as a missing token
        reason = str(error).strip().splitlines()[0]
        where = f"the cluster {_cluster_address()}, which `ray stop` forgets"
        raise InputError(f"Ray cannot join {where}: {reason}; if it asks for a token, set RAY_AUTH_MODE=token") from error
    return True


def alive_nodes() -> list[Node]:
    """The nodes of the cluster that this process has joined."""
    found = []
    for node in import_ray().nodes():
        if node["Alive"]:
            has = node["Resources"]
            found.append(Node(node["NodeID"], node["NodeManagerAddress"], int(has.get("CPU", 0)), int(has.get("GPU", 0))))
    return found


def _nodes_of_cluster() -> list[Node] | None:
    """The nodes of a cluster that is there already; None if there is none, or no Ray."""
    if not _is_installed() or not (_cluster_address() or import_ray().is_initialized()):
        return None
    is_new = join()
    try:
        return alive_nodes()
    finally:
        if is_new:
            import_ray().shutdown()


def _cluster_address() -> str:
    """The cluster that Ray joins: that of RAY_ADDRESS, or the latest that was started on this machine by `ray start`.

    "" if there is none. Ray's own search by "auto" would also find what other programs have started for themselves.
    """
    if named := os.environ.get("RAY_ADDRESS"):
        return named
    latest = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray" / "ray_current_cluster"
    return latest.read_text().strip() if latest.is_file() else ""


def _is_installed() -> bool:
    """Whether there is Ray, which is an extra."""
    try:
        import_ray()
    except InputError:
        return False
    return True


def _this_machine() -> Node:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Node("", "this machine", cpus, torch.cuda.device_count())
