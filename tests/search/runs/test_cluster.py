"""Which node gets how many workers, whatever nodes there are."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import search.runs.cluster
from search.errors import InputError
from search.runs.cluster import THREADS, Demand, Node, count_workers, demand_of, is_in_process, require_room
from search.runs.workers import open_workers
from search.settings import WorkerSettings

AUTO = WorkerSettings(workers="auto")


@st.composite
def clusters(draw: st.DrawFn) -> list[Node]:
    sizes = draw(st.lists(st.tuples(st.integers(0, 64), st.integers(0, 8)), max_size=6))
    return [Node(str(i), f"10.0.0.{i}", cpus, gpus) for i, (cpus, gpus) in enumerate(sizes)]


shares = st.sampled_from([1.0, 0.5, 0.3, 0.25, 0.1])


@given(clusters(), shares)
def test_auto_fills_every_gpu_with_as_many_shares_as_fit(nodes: list[Node], share: float) -> None:
    fit = {1.0: 1, 0.5: 2, 0.3: 3, 0.25: 4, 0.1: 10}[share]
    placed = Demand(None, gpus_each=share).placed(nodes)
    assert placed == {node.id: node.gpus * fit for node in nodes if node.gpus}


@given(clusters())
def test_auto_gives_workers_on_cpus_enough_threads_and_every_node_with_a_cpu_a_worker(nodes: list[Node]) -> None:
    placed = Demand(None).placed(nodes)
    for node in nodes:
        assert placed[node.id] == (max(1, node.cpus // THREADS) if node.cpus else 0)


@given(clusters(), st.integers(1, 40), st.none() | shares, st.none() | st.integers(1, 20))
def test_a_number_of_workers_is_kept_if_there_is_room_and_never_exceeded(
    nodes: list[Node], count: int, share: float | None, most: int | None
) -> None:
    demand = Demand(count, gpus_each=share, most=most)
    room = count if share is None and nodes else sum(map(demand.room, nodes)) if share else 0
    placed = demand.placed(nodes)
    assert placed.total() == min(count, room, count if most is None else most)
    if share is not None:
        assert all(placed[node.id] <= demand.room(node) for node in nodes)


@given(clusters(), st.integers(1, 40))
def test_no_node_could_take_a_worker_of_another_and_have_more_cpus_for_it(nodes: list[Node], count: int) -> None:
    placed = Demand(count).placed(nodes)
    for node in nodes:
        for other in nodes:
            if placed[other.id]:
                assert node.cpus / (placed[node.id] + 1) <= other.cpus / placed[other.id]


@pytest.mark.parametrize(("threads", "expected"), [(None, 4), ("2", 8), ("1", 16), ("64", 4)])
def test_who_sets_fewer_threads_gets_more_workers(monkeypatch: pytest.MonkeyPatch, threads: str | None, expected: int) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert demand_of(AUTO, "cpu").room(Node("a", "10.0.0.1", 16, 0)) == expected


# Here or on a cluster


class RayError(Exception):
    """Ray's own."""


class Ray(SimpleNamespace):
    """A cluster of these nodes, or none."""

    def __init__(self, *resources: dict[str, float]) -> None:
        super().__init__(resources=resources, is_joined=False, exceptions=SimpleNamespace(RayError=RayError))

    def is_initialized(self) -> bool:
        return bool(self.is_joined)

    def init(self, **_: Any) -> None:
        self.is_joined = True

    def nodes(self) -> list[dict[str, Any]]:
        alive = [
            {"NodeID": str(i), "NodeManagerAddress": "10.0.0.1", "Alive": True, "Resources": each}
            for i, each in enumerate(self.resources)
        ]
        return [*alive, {"NodeID": "dead", "Alive": False}]

    def shutdown(self) -> None:
        self.is_joined = False


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This one has 8 CPUs, and no cluster."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(search.runs.cluster, "_this_machine", lambda: Node("", "this machine", 8, torch.cuda.device_count()))


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("ray", [None, Ray()], ids=["without Ray", "without a cluster"])
def test_auto_counts_this_machine_where_there_is_no_cluster(monkeypatch: pytest.MonkeyPatch, ray: Ray | None) -> None:
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert count_workers(AUTO, "cpu") == 2
    assert not is_in_process(AUTO, "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setattr(search.runs.cluster, "_this_machine", lambda: Node("", "this machine", 6, 0))
    assert count_workers(AUTO, "cpu") == 1
    assert is_in_process(AUTO, "cpu")


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("is_named", [True, False])
def test_auto_counts_the_cluster_and_leaves_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_named: bool) -> None:
    if is_named:
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    else:  # what `ray start` leaves
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379")
    ray = Ray({"CPU": 16.0, "GPU": 2.0}, {"CPU": 1.0}, {"memory": 1e9})
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert count_workers(AUTO, "cpu") == 5
    assert count_workers(WorkerSettings(workers="auto", gpus_per_worker=0.25), "cuda") == 8
    assert not is_in_process(AUTO, "cpu")
    assert not ray.is_joined


@pytest.mark.usefixtures("machine")
def test_a_cluster_of_one_cpu_may_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setitem(sys.modules, "ray", Ray({"CPU": 1.0}))
    assert not is_in_process(AUTO, "cpu")


def test_a_cluster_that_the_caller_has_joined_is_not_left(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray({"CPU": 8.0})
    ray.is_joined = True
    monkeypatch.setitem(sys.modules, "ray", ray)
    count_workers(AUTO, "cpu")
    assert ray.is_joined


def test_a_cluster_without_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setitem(sys.modules, "ray", Ray({"CPU": 8.0}))
    with pytest.raises(InputError, match="`workers` auto found a cluster without room for a worker: give the nodes GPUs"):
        count_workers(AUTO, "cuda")


@pytest.mark.parametrize(("share", "needs"), [(1.0, "3"), (0.4, "1.2")])
def test_more_workers_than_gpus_are_refused(share: float, needs: str) -> None:
    with pytest.raises(InputError, match=rf"`workers` 3 on CUDA needs {needs} GPUs, Ray has 1: give fewer workers"):
        require_room(Demand(3, gpus_each=share), [Node("a", "10.0.0.1", 4, 1)])


def test_workers_that_the_sampler_would_not_use_need_no_gpu() -> None:
    assert require_room(Demand(8, gpus_each=1.0, most=2), [Node("a", "10.0.0.1", 4, 2)]) == 2


@pytest.mark.parametrize(
    ("device", "resolved", "gpus_each"),
    [("cuda", "cuda:0", 0.5), ("auto", "cuda:0", 0.5), ("auto", "cpu", None), ("cpu", "cpu", None)],
)
def test_a_device_without_a_number_is_shared_out(
    monkeypatch: pytest.MonkeyPatch, device: str, resolved: str, gpus_each: float | None
) -> None:
    monkeypatch.setattr(search.runs.cluster, "resolve_device", lambda _: resolved)
    assert demand_of(WorkerSettings(workers=2, gpus_per_worker=0.5), device).gpus_each == gpus_each


def test_one_gpu_by_name_is_no_device_for_workers() -> None:
    with pytest.raises(InputError, match="`device` cuda:1 is one GPU, `workers` 2 have one each: give cuda"):
        demand_of(WorkerSettings(workers=2), "cuda:1")
    assert is_in_process(AUTO, "cuda:1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workers": 0}, "`workers` must be auto or at least 1, got 0"),
        ({"workers": 2, "gpus_per_worker": 0.0}, "`gpus_per_worker` must be more than 0, and at most 1, got 0.0"),
        ({"workers": 2, "gpus_per_worker": 2.0}, "`gpus_per_worker` must be more than 0, and at most 1, got 2.0"),
        ({"gpus_per_worker": 0.5}, "`gpus_per_worker` 0.5 needs several `workers`, or auto"),
    ],
)
def test_settings_that_cannot_work_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        WorkerSettings(**change).check()


@pytest.mark.parametrize("workers", ["auto", 2])
@pytest.mark.parametrize("error", [ConnectionError, RayError])
def test_a_cluster_that_lets_nobody_in_is_named(monkeypatch: pytest.MonkeyPatch, workers: Any, error: type[Exception]) -> None:
    def init(**_: Any) -> None:
        raise error("no token\nand much more")

    ray = Ray({"CPU": 8.0})
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    settings = WorkerSettings(workers=workers)
    words = r"^Ray cannot join the cluster 10\.0\.0\.1:6379, which `ray stop` forgets: no token; if it asks for a token"
    with (
        pytest.raises(InputError, match=words),
        open_workers(pytest.fail, settings, "cpu", 1),
    ):
        pass
