"""Workers under Ray: no cell is lost when a worker or a node dies, and their number follows the cluster."""

import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import search.runs.ray_workers
from search.cells.space import load_cell
from search.errors import InputError
from search.runs.cluster import Demand, alive_nodes
from search.runs.ray_workers import MAX_DEATHS, RayWorkers
from search.runs.workers import Job, Outcome, evaluate, open_workers, outcomes
from search.settings import WorkerSettings
from search.tasks.proxy import ProxyTask
from tests.search.runs.small_tasks import HEAD, PROXY, Instant, Waiting, create_cached_task, create_suicidal_task, create_task
from tests.search.runs.test_workers import JOBS, assert_same_end, measured, parts_of
from tests.search.tasks.test_feature_cache import TWENTY, build

ROOT = Path(__file__).parents[3]


def evaluate_all(workers: RayWorkers[Any], jobs: list[Job]) -> dict[Any, Outcome[Any]]:
    by_key = {outcome.job.key: outcome for outcome in outcomes(workers, jobs)}
    assert len(by_key) == len(jobs)
    return by_key


# Without processes


@dataclass
class Actor:
    number: int
    node: str
    instance: Any
    threads: int = 0  # of its latest evaluation


class FakeRay:
    """As much of Ray as the workers use, in this process; the actors numbered in `dying` die at their first evaluation.

    `cpus` of its nodes, by their names, may change; what runs on a node that is gone dies. On `sick` ones nothing starts.
    """

    def __init__(self, cpus: dict[str, int] | None = None, *, dying: Iterable[int] = ()) -> None:
        names = ("RayActorError", "ObjectLostError", "OutOfMemoryError")
        self.exceptions = SimpleNamespace(**{name: type(name, (Exception,), {}) for name in names})
        self.util = SimpleNamespace(scheduling_strategies=SimpleNamespace(NodeAffinitySchedulingStrategy=self._affinity))
        self.cpus = cpus or {"a": 2}
        self.sick: set[str] = set()
        self.dying = set(dying)
        self.is_up = False
        self.actors: list[Actor] = []
        self.killed: list[int] = []
        self.evaluated: Counter[int] = Counter()
        self._results: list[Callable[[], Any]] = []

    @staticmethod
    def _affinity(node: str, soft: bool) -> str:
        assert not soft
        return node

    def is_initialized(self) -> bool:
        return self.is_up

    def init(self, **_: Any) -> None:
        self.is_up = True

    def shutdown(self) -> None:
        self.is_up = False

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"NodeID": name, "NodeManagerAddress": name, "Alive": True, "Resources": {"CPU": float(cpus)}}
            for name, cpus in self.cpus.items()
        ]

    def remote(self, **_: Any) -> Callable[[type], Any]:
        def options(cls: type, scheduling_strategy: str) -> Any:
            return SimpleNamespace(remote=lambda *arguments: self._create(cls(*arguments), scheduling_strategy))

        return lambda cls: SimpleNamespace(options=lambda scheduling_strategy: options(cls, scheduling_strategy))

    def _create(self, instance: Any, node: str) -> Any:
        actor = Actor(len(self.actors), node, instance)
        self.actors.append(actor)

        def call(name: str, *arguments: Any) -> int:
            self._results.append(lambda: self._result(actor, name, arguments))
            return len(self._results) - 1

        methods = {
            name: SimpleNamespace(remote=lambda *a, name=name: call(name, *a)) for name in ("lacks", "load", "evaluate")
        }
        return SimpleNamespace(number=actor.number, **methods)

    def _result(self, actor: Actor, name: str, arguments: Any) -> Any:
        if actor.node not in self.cpus or actor.number in self.killed:
            raise self.exceptions.RayActorError(f"the node of {actor.number} has died")
        if actor.node in self.sick:
            raise InputError("bad driver")
        if name == "evaluate":
            self.evaluated[actor.number] += 1
            actor.threads = arguments[1]
            if actor.number in self.dying:
                raise [*vars(self.exceptions).values()][actor.number % 3]
            return evaluate(actor.instance._task, arguments[0])
        return getattr(actor.instance, name)(*arguments)

    def kill(self, actor: Any, no_restart: bool) -> None:
        assert no_restart
        self.killed.append(actor.number)

    def wait(self, references: list[int], num_returns: int, timeout: float) -> tuple[list[int], list[int]]:
        return references[-num_returns:], references[:-num_returns]  # the latest first

    def get(self, reference: int) -> Any:
        return self._results[reference]()

    def living(self) -> Counter[str]:
        """The number of actors on each node."""
        return Counter(actor.node for actor in self.actors if actor.number not in self.killed and actor.node in self.cpus)


@contextmanager
def installed(ray: FakeRay) -> Iterator[FakeRay]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ray", ray)
        patch.setattr(search.runs.ray_workers, "WAIT_SECONDS", 0.0)  # it looks after the nodes each time
        patch.delenv("OMP_NUM_THREADS", raising=False)
        yield ray


ALONE = {job.key: measured(evaluate(create_task(), job)) for job in JOBS}


@given(dying=st.sets(st.integers(0, 5), max_size=2))
def test_a_worker_that_dies_gives_its_cell_back(dying: set[int]) -> None:
    with installed(FakeRay(dying=dying)) as ray:
        with closing(RayWorkers(create_task, Demand(2))) as workers:
            by_key = evaluate_all(workers, JOBS)
        assert not ray.is_up
        assert set(ray.killed) == dying & set(ray.evaluated)
        assert len(ray.actors) == 2 + len(ray.killed)
        assert {key: measured(outcome) for key, outcome in by_key.items()} == ALONE


def test_a_cell_that_kills_its_workers_is_given_up() -> None:
    with installed(FakeRay(dying=range(MAX_DEATHS))), closing(RayWorkers(create_task, Demand(1))) as workers:
        by_key = evaluate_all(workers, JOBS[:2])
    assert by_key[0].failure == f"its worker died {MAX_DEATHS} times"
    assert by_key[0].is_passing
    assert by_key[1].result is not None


def settled(workers: RayWorkers[Any]) -> int:
    """The capacity once all that can start has started, while nothing is evaluated."""
    for _ in range(100):
        assert workers.wait(0.0) is None
    return workers.capacity


@st.composite
def histories(draw: st.DrawFn) -> list[dict[str, int]]:
    """The CPUs of a cluster's nodes, by their ids, several times; a node that comes back has another id, as in Ray."""
    found: list[dict[str, int]] = [{"0": draw(st.integers(1, 16))}]
    for time_ in range(1, draw(st.integers(2, 4))):
        stay = draw(st.sets(st.sampled_from(sorted(found[-1]))))
        come = draw(st.lists(st.integers(1, 16), min_size=0 if stay else 1, max_size=3))
        found.append({node: found[-1][node] for node in sorted(stay)} | {f"{time_}.{i}": n for i, n in enumerate(come)})
    return found


@given(histories(), st.none() | st.integers(1, 7), st.data())
def test_the_workers_follow_the_cluster_and_every_job_ends_once(
    history: list[dict[str, int]], count: int | None, data: st.DataObject
) -> None:
    """Nodes come, go, and change while jobs run; in the end the workers are where a new run had them."""
    numbers, ended = iter(range(10**6)), list[Outcome[str]]()
    with (
        installed(FakeRay(history[0])) as ray,
        closing(RayWorkers(Instant, Demand(count))) as workers,
    ):
        running: list[int] = []
        for nodes in history:
            ray.cpus = nodes
            while len(running) < workers.capacity and data.draw(st.booleans()):
                running.append(next(numbers))
                workers.submit(Job(running[-1], JOBS[0].cell, (0,)))
            for _ in range(data.draw(st.integers(0, 3))):
                if running and (outcome := workers.wait(0.0)) is not None:
                    ended.append(outcome)
                    running.remove(outcome.job.key)
        while running:
            if (outcome := workers.wait(0.0)) is not None:
                ended.append(outcome)
                running.remove(outcome.job.key)
        assert sorted(outcome.job.key for outcome in ended) == list(range(len(ended)))
        assert all(outcome.result == "done" or outcome.is_passing for outcome in ended)
        expected = Demand(count).placed(alive_nodes())
        assert settled(workers) == expected.total()
        assert ray.living() == expected


def test_a_worker_has_the_threads_of_its_own_node() -> None:
    with installed(FakeRay({"small": 2, "large": 16})) as ray, closing(RayWorkers(create_task, Demand(None))) as workers:
        assert settled(workers) == 1 + 4
        evaluate_all(workers, [Job(i, load_cell("linear"), (0, i)) for i in range(5)])
        assert {(actor.node, actor.threads) for actor in ray.actors} == {("small", 2), ("large", 4)}


def test_threads_that_the_user_sets_are_not_exceeded(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(FakeRay({"a": 16})) as ray, closing(RayWorkers(create_task, Demand(2))) as workers:
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        evaluate_all(workers, JOBS[:1])
        assert max(actor.threads for actor in ray.actors) == 3


def test_no_cell_goes_to_idle_workers_of_a_node_that_is_gone() -> None:
    """Ray takes seconds to notice a node's death; until then the first cell that fails there warns of the others."""
    with installed(FakeRay({"a": 4, "b": 16})) as ray, closing(RayWorkers(create_task, Demand(None))) as workers:
        assert settled(workers) == 1 + 4  # which is more than MAX_DEATHS
        seen = ray.nodes()
        del ray.cpus["b"]
        ray.nodes = lambda: seen  # type: ignore[method-assign]
        by_key = evaluate_all(workers, JOBS)
        assert all(outcome.result is not None for outcome in by_key.values())


def test_a_node_where_no_worker_can_start_is_left_out_with_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    with installed(FakeRay({"a": 8, "b": 8})) as ray:
        ray.sick = {"b"}
        with closing(RayWorkers(create_task, Demand(None))) as workers:
            assert settled(workers) == 2
            assert all(outcome.result for outcome in evaluate_all(workers, JOBS).values())
            ray.sick = set()
            workers._barred = {node: time_ - search.runs.ray_workers.RETRY_SECONDS for node, time_ in workers._barred.items()}
            assert settled(workers) == 4
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "node a: 2 workers",
        "node b: 2 workers",
        "node b is left out, its workers cannot start: bad driver",
    ]


def test_if_no_worker_can_start_anywhere_the_reason_is_said_and_ray_is_stopped() -> None:
    with installed(FakeRay({"a": 8, "b": 8})) as ray:
        ray.sick = {"a", "b"}
        with pytest.raises(InputError, match="the workers cannot start: bad driver"):
            RayWorkers(create_task, Demand(None))
        assert not ray.is_up


def test_a_cluster_that_the_caller_has_joined_is_not_left_but_its_workers_end() -> None:
    with installed(FakeRay({"a": 8})) as ray:
        ray.is_up = True
        with closing(RayWorkers(create_task, Demand(None))) as workers:
            assert settled(workers) == 2
        assert ray.is_up
        assert sorted(ray.killed) == [0, 1]


def test_workers_that_are_late_are_waited_for_with_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with installed(FakeRay({"a": 8})) as ray:
        monkeypatch.setattr(search.runs.ray_workers, "_PATIENCE", 0.0)
        late: Iterator[list[int]] = iter([[], []])
        monkeypatch.setattr(ray, "wait", lambda references, num_returns, timeout: (next(late, references[:1]), []))
        RayWorkers(create_task, Demand(None)).close()
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["2 workers are not ready yet: they load their data, or wait for a free GPU"] * 2


def test_without_ray_more_workers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(InputError, match=r"`workers` above 1 needs Ray: pip install .*\[workers\]"),
        open_workers(create_task, WorkerSettings(workers=2), "cpu", 1),
    ):
        pass


# With processes


def waits(milliseconds: int, *keys: Any) -> list[Job]:
    return [Job(key, JOBS[0].cell, (milliseconds,)) for key in keys]


@pytest.fixture
def real_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Ray, which neither joins a cluster that is not the test's nor lets others join."""
    ray = pytest.importorskip("ray", reason="Ray is an extra: pip install -e '.[workers]'")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("OMP_NUM_THREADS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # of a short path, because sockets lie in it
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield ray


@pytest.fixture
def cluster(real_ray: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster of one node with 2 CPUs, which notices within some seconds that a node has died."""
    from ray.cluster_utils import Cluster

    soon = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 10}
    cluster: Any = Cluster(True, head_node_args={"num_cpus": 2, "include_dashboard": False, "_system_config": soon})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    real_ray.shutdown()
    cluster.shutdown()


def test_real_ray_gives_the_same_results_and_survives_a_death(
    real_ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUICIDE_MARK", str(tmp_path / "mark"))
    with closing(RayWorkers(create_suicidal_task, Demand(2))) as workers:
        by_key = evaluate_all(workers, JOBS)
        halves = evaluate_all(workers, parts_of(JOBS, 2))
        ends = evaluate_all(workers, parts_of(JOBS[::-1], PROXY.steps, halves))  # mostly by another process
    assert (tmp_path / "mark").exists()
    assert {key: measured(outcome) for key, outcome in by_key.items()} == ALONE
    assert_same_end(ends, by_key)


def until(workers: RayWorkers[Any], capacity: int) -> None:
    """Wait for this capacity, while nothing is evaluated."""
    for _ in range(180):
        if workers.capacity == capacity:
            return
        assert workers.wait(1.0) is None
    pytest.fail(f"{workers.capacity} workers after three minutes, not {capacity}")


def test_real_nodes_join_and_die_and_no_cell_is_lost_or_evaluated_for_two(
    cluster: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    node = cluster.add_node(num_cpus=4)
    with closing(RayWorkers(Waiting, Demand(None, threads=2))) as workers:
        until(workers, 3)
        first = evaluate_all(workers, waits(300, *range(6)))
        places = {known_result(outcome)[:2]: known_result(outcome)[2] for outcome in first.values()}
        assert sorted(places.values()) == [2, 2, 2]
        assert len({place for place, _ in places}) == 2
        for job in waits(4000, "a", "b", "c"):
            workers.submit(job)
        assert workers.wait(1.0) is None
        cluster.remove_node(node, allow_graceful=False)  # by SIGKILL
        ended: list[Outcome[Any]] = []
        while len(ended) < 3:
            if (outcome := workers.wait(1.0)) is not None:
                ended.append(outcome)
        assert sorted(outcome.job.key for outcome in ended) == ["a", "b", "c"]
        assert {known_result(outcome)[0] for outcome in ended} == {workers_head(cluster)}
        until(workers, 1)
        cluster.add_node(num_cpus=4)
        until(workers, 3)
        evaluate_all(workers, waits(0, *range(9)))
    said = capsys.readouterr().err
    assert said.count(": 2 workers") == 2
    assert said.count("has left; its cells are evaluated on others") == 1


def known_result(outcome: Outcome[Any]) -> tuple[str, int, int]:
    assert outcome.result is not None, outcome.failure
    result: tuple[str, int, int] = outcome.result
    return result


def workers_head(cluster: Any) -> str:
    return str(cluster.head_node.node_id)


def test_a_node_without_the_features_is_sent_them_once(
    cluster: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second node is a process to which the folder looks empty: it is in a mount namespace of its own."""
    cache, home = build(tmp_path / "here" / "train", TWENTY), tmp_path / "home"
    hide = f'mount -t tmpfs none {tmp_path / "here"} && exec "$@"'
    start = ["unshare", "-rm", "sh", "-c", hide, "sh"]
    if subprocess.run([*start, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    join = ["-m", "ray.scripts.scripts", "start", f"--address={cluster.address}", "--num-cpus=4", "--block"]
    environment = os.environ | {"XDG_CACHE_HOME": str(home)}
    node = subprocess.Popen([*start, sys.executable, *join], env=environment, stdout=subprocess.DEVNULL)
    try:
        with closing(RayWorkers(create_cached_task, Demand(None), {"train": cache})) as workers:
            until(workers, 1 + 1)
            by_key = evaluate_all(workers, JOBS)
    finally:
        node.terminate()
        node.wait()
    alone = ProxyTask(cache, cache, PROXY, HEAD)
    assert {key: measured(outcome) for key, outcome in by_key.items()} == {
        job.key: measured(evaluate(alone, job)) for job in JOBS
    }
    assert len(list(home.rglob("features.bin"))) == 1
    said = capfd.readouterr().err
    assert said.count(f"does not have {cache.directory}: 0 MB are sent to it, once") == 1
