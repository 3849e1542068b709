"""Jobs in a database: claimed in order, finished once, and the same whoever does them, dies or comes late."""

import json
import signal
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from reference.cell import Cell
from search.cells.samplers.paper import PaperSampler
from search.cells.space import SearchSpace, load_cell
from search.errors import InputError
from search.interrupts import ctrl_c_waits
from search.runs.reader import Reader
from search.runs.store import Claim, SearchPlan, Store, Told
from search.runs.tables import COMPLETE, FAILED, RUNNING, SEARCH, Begun, Key, Row
from search.settings import known
from tests.postgres import Server

SPACE = SearchSpace(3)
SAMPLER = PaperSampler(SPACE, seed=0, lag=6)
PLAN = SearchPlan(30, {"aspp": load_cell("aspp"), "dpc": load_cell("dpc")}, 2, 0)
IDENTITY = '{"iterations": 10}'


def told(cell: Cell, *, head: bool = True) -> Told:
    score = zlib.crc32(cell.to_json().encode()) / 2**32
    return Told(score, 10, json.dumps({"seconds": 1.0}), json.dumps([[1, 2.0]]), str(cell).encode() if head else None)


def fails(cell: Cell) -> bool:
    return zlib.crc32(cell.to_json().encode()) % 11 == 0


def finish(store: Store, claim: Claim) -> bool:
    if fails(claim.cell):
        return store.tell_failure(claim.key, "bad luck")
    return store.tell(claim.key, told(claim.cell))


def claim(store: Store, plan: SearchPlan = PLAN) -> Claim | None:
    return store.claim(plan, SPACE, SAMPLER)


def work(store: Store, plan: SearchPlan = PLAN) -> None:
    while claimed := claim(store, plan):
        finish(store, claimed)


def content(url: str) -> list[Row]:
    """All jobs, without when they were finished."""
    with closing(Reader(url, "run")) as reader:
        assert reader.running() == []
        rows = [*reader.finished(search=True), *sorted(reader.finished(search=False), key=lambda row: row.key)]
        assert all((reader.curve(row.key) is None) == (row.state == FAILED) for row in rows)
    return [replace(row, finished=None) for row in rows]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/study.db"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with closing(Store(url, "run", IDENTITY)) as store:
        yield store


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    url = f"sqlite:///{tmp_path_factory.mktemp('alone')}/study.db"
    with closing(Store(url, "run", IDENTITY)) as store:
        work(store)
    return content(url)


def test_all_jobs_of_the_plan_are_done_in_order(alone: list[Row]) -> None:
    assert [row.key for row in alone[:30]] == [Key(SEARCH, number) for number in range(30)]
    assert 0 < sum(row.state == FAILED for row in alone) < 10
    best = max((row for row in alone[:30] if row.score is not None), key=lambda row: row.score or 0.0)
    again = [Key(f"trial {best.key.number}", seed) for seed in range(2)]
    assert [row.key for row in alone[30:]] == [Key(name, seed) for name in ("aspp", "dpc") for seed in range(2)] + again
    assert alone[-1].cell == best.cell


def test_a_claim_is_a_known_cell_first_and_then_a_trial_while_its_sampler_may_look_back(store: Store) -> None:
    claims = [claim(store) for _ in range(12)]
    keys = [None if each is None else each.key for each in claims]
    compared = [Key(name, seed) for name in ("aspp", "dpc") for seed in range(2)]
    assert keys == [*compared, *(Key(SEARCH, number) for number in range(7)), None]  # trial 7 looks at trial 0
    assert claims[4] is not None
    finish(store, claims[4])
    following = known(claim(store))
    assert following.key == Key(SEARCH, 7)


def test_a_job_is_finished_once(store: Store, url: str) -> None:
    first = known(claim(store))
    assert store.tell(first.key, told(first.cell))
    better = replace(told(first.cell), score=2.0, head=b"other")
    assert not store.tell(first.key, better)
    assert not store.tell_failure(first.key, "late")
    (row,) = content(url)
    assert (row.state, row.score) == (COMPLETE, told(first.cell).score)
    assert store.new_heads(0)[0][1] == str(first.cell).encode()


def test_a_job_that_nobody_claimed_cannot_be_told(store: Store, url: str) -> None:
    assert not store.tell(Key(SEARCH, 3), told(load_cell("dpc")))
    assert content(url) == []


def test_what_was_begun_before_is_claimed_again(url: str, alone: list[Row]) -> None:
    """A process on a file is the only one, so what it does not know to run does not run."""
    with closing(Store(url, "run", IDENTITY)) as store:
        begun = [claim(store) for _ in range(8)]
        assert begun[5] is not None
        finish(store, begun[5])
    with closing(Store(url, "run", IDENTITY)) as store:
        again = [claim(store) for _ in range(7)]
        assert {each and each.key for each in again} == {each and each.key for each in begun} - {Key(SEARCH, 1)}
        for each in again:
            assert each is not None
            finish(store, each)
        work(store)
        assert store.is_finished(PLAN)
    assert content(url) == alone


def test_a_search_is_finished_when_nothing_runs_and_nothing_is_left(store: Store) -> None:
    plan = SearchPlan(1, {}, 1, 0)
    assert not store.is_finished(plan)
    only = known(claim(store, plan))
    assert claim(store, plan) is None
    assert not store.is_finished(plan)
    store.tell(only.key, told(only.cell))
    assert not store.is_finished(plan)  # its best cell is to be scored again
    work(store, plan)
    assert store.is_finished(plan)
    assert not store.is_finished(replace(plan, trials=2))


@pytest.mark.parametrize("seed", range(2))
def test_any_processes_that_come_die_sleep_and_leave_come_to_the_same(database: str, alone: list[Row], seed: int) -> None:
    """Some leave in good order, some die, and some only sleep until their jobs are taken over, and tell them then."""
    rng = np.random.default_rng(seed)
    claims: dict[Store, list[Claim]] = {}

    def new() -> Store:
        store = Store(database, "run", IDENTITY, lease=1.0, beat=0.1)
        claims[store] = []
        return store

    def die(store: Store) -> None:
        store._beat = 1e9  # its heart stops, and its row stays

    new()
    sleepers: list[tuple[Store, list[Claim]]] = []
    while True:
        store = list(claims)[rng.integers(len(claims))]
        act = rng.random()
        if act < 0.03 and len(claims) > 1:
            claims.pop(store)
            store.close()
        elif act < 0.06 and len(claims) > 1 and len(sleepers) < 8:  # a server has a hundred connections
            sleepers.append((store, claims.pop(store)))
            die(store)
        elif act < 0.1 and len(claims) < 4:
            new()
        elif act < 0.6:
            if claimed := claim(store):
                claims[store].append(claimed)
            elif store.is_finished(PLAN):
                break
            else:
                time.sleep(0.1)  # or no process would be there for long enough to take another one for dead
        elif claims[store]:
            finish(store, claims[store].pop(rng.integers(len(claims[store]))))
    for sleeper, late in sleepers:
        assert not any(finish(sleeper, each) for each in late)
        sleeper._beat = 0.0
        sleeper.close()
    for store in claims:
        store.close()
    assert content(database) == alone


def test_a_process_is_dead_when_its_counter_stands_still_and_not_before(database: str) -> None:
    with closing(Store(database, "run", IDENTITY, lease=1.0, beat=0.05)) as other:
        first = known(claim(other))
        with closing(Store(database, "run", IDENTITY, lease=1.0, beat=0.05)) as store:
            for _ in range(25):  # a second and a half, and more
                claimed = claim(store)
                assert claimed is None or claimed.key != first.key
                store._closing.wait(0.06)
            other._beat = 1e9
            keys = set()
            while first.key not in keys:
                if claimed := claim(store):
                    keys.add(claimed.key)
                store._closing.wait(0.05)
            with closing(Reader(database, "run")) as reader:
                assert [process.id for process in reader.processes()] == [store.id]


def test_while_no_heart_beats_nobody_is_dead(database: str) -> None:
    """As while the server is away, or all processes are suspended: whoever is back first takes nothing from the others."""
    with (
        closing(Store(database, "run", IDENTITY, lease=0.4, beat=0.2)) as other,
        closing(Store(database, "run", IDENTITY, lease=0.4, beat=0.2)) as store,
    ):
        other._beat = store._beat = 1e9
        store._closing.wait(0.5)  # each has beaten for the last time
        first = known(claim(other))
        assert known(claim(store)).key != first.key  # and has seen the other one's heart
        store._closing.wait(0.5)
        assert known(claim(store)).key != first.key


def test_heads_are_of_the_best_trial_and_of_seed_0(store: Store, alone: list[Row]) -> None:
    work(store)
    names = [name for name, _, _ in store.new_heads(0)]
    scored = [row for row in alone if row.score is not None]
    best = max((row for row in scored if row.key.name == SEARCH), key=lambda row: row.score or 0.0)
    seed_0 = [f"{row.key.name.replace(' ', '_')}_seed0" for row in scored if row.key.name != SEARCH and row.key.number == 0]
    assert sorted(names) == sorted(["best", *seed_0])
    assert {name: text for name, text, _ in store.new_heads(0)}["best"] == str(Cell.from_json(best.cell)).encode()
    newest = max(revision for _, _, revision in store.new_heads(0))
    assert store.new_heads(newest) == []


def test_a_run_may_begin_with_jobs_that_were_done_elsewhere(url: str, alone: list[Row]) -> None:
    rows = [*alone[:9], replace(alone[9], state=RUNNING, score=None, result=None, failure=None), *alone[30:34]]
    curves = {row.key: "[[1, 2.0]]" for row in rows if row.state == COMPLETE}
    with closing(Store(url, "run", IDENTITY, Begun(rows, curves))) as store:
        first = known(claim(store))
        assert (first.key, first.cell.to_json()) == (Key(SEARCH, 9), alone[9].cell)
        finish(store, first)
        work(store)
    assert content(url) == alone


def test_a_number_that_was_left_out_elsewhere_is_tried(url: str, alone: list[Row]) -> None:
    """An earlier version may have been killed before a trial had a cell, when later ones had begun."""
    with closing(Store(url, "run", IDENTITY, Begun([*alone[:4], *alone[5:9]]))) as store:
        assert known(claim(store, replace(PLAN, compare={}))).key == Key(SEARCH, 4)
        assert known(claim(store, replace(PLAN, compare={}))).key == Key(SEARCH, 9)


@pytest.mark.parametrize("position", [0, -1], ids=["oldest first", "newest first"])
def test_cells_that_do_the_same_have_the_score_of_the_first_whichever_ends_first(tmp_path: Path, position: int) -> None:
    space = SearchSpace(1, (1,), ())  # of two cells
    sampler, plan = PaperSampler(space, seed=0), SearchPlan(12, {}, 1, 0)

    def outcomes(name: str, at_once: int) -> list[Row]:
        url, running = f"sqlite:///{tmp_path / name}", list[Claim]()
        with closing(Store(url, "run", IDENTITY)) as store:
            while True:
                claimed = store.claim(plan, space, sampler) if len(running) < at_once else None
                if claimed is not None:
                    running.append(claimed)
                elif running:
                    key = running.pop(position).key  # a training's score depends on its number, by its seed
                    store.tell(key, Told(key.number * 7 % 5 / 5, 10, "{}", "[]"))
                elif store.is_finished(plan):
                    break
        with closing(Reader(url, "run")) as reader:
            return [replace(row, finished=None) for row in reader.finished(search=True)]

    assert outcomes("several", at_once=5) == outcomes("one", at_once=1)


@pytest.mark.parametrize(
    ("storage", "reason"),
    [("mysql+pymysql://host/name", "is of mysql: give the URL of PostgreSQL"), ("sqlite://", "is in memory: give an SQLite")],
)
def test_other_databases_are_refused(storage: str, reason: str) -> None:
    for open_it in (lambda: Store(storage, "run", IDENTITY), lambda: Reader(storage, "run")):
        with pytest.raises(InputError, match=f"`storage` .*{reason}"):
            open_it()


def test_runs_in_one_database_do_not_meet(url: str, alone: list[Row]) -> None:
    with closing(Store(url, "other", "{}")) as other:
        assert claim(other) is not None
    with closing(Store(url, "run", IDENTITY)) as store:
        work(store)
    assert content(url) == alone
    with closing(Reader(url, "other")) as reader:
        assert reader.num_finished(search=True) == 0
        assert [key for key, _, _ in reader.running()] == [Key("aspp", 0)]


def test_trials_beyond_the_plan_are_left_to_those_who_planned_them(url: str) -> None:
    fewer = replace(PLAN, trials=2, compare={})
    with closing(Store(url, "run", IDENTITY)) as store:
        while known(claim(store, replace(PLAN, compare={}))).key.number < 4:
            pass
    with closing(Store(url, "run", IDENTITY)) as store:
        work(store, fewer)
        assert store.is_finished(fewer)
    with closing(Reader(url, "run")) as reader:
        assert [row.key.number for row in reader.finished(search=True)] == [0, 1]


def test_a_job_of_another_process_is_taken_over(database: str) -> None:
    with closing(Store(database, "run", IDENTITY)) as store:
        begun = known(claim(store))
        assert not begun.is_taken_over
    with closing(Store(database, "run", IDENTITY)) as store:
        assert known(claim(store))[:3] == (begun.key, begun.cell, True)


def test_a_compared_cell_cannot_become_another(store: Store) -> None:
    work(store, replace(PLAN, trials=1))
    other = replace(PLAN, compare={**PLAN.compare, "aspp": load_cell("psp")})
    with pytest.raises(InputError, match="`compare` aspp was another cell when this run compared it: rename the file"):
        claim(store, other)


def test_ctrl_c_ends_the_wait_for_a_server(postgres: Server, database: str, interruptible: None) -> None:
    with closing(Store(database, "run", IDENTITY)) as store:
        postgres.stop()
        try:
            threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
            with pytest.raises(KeyboardInterrupt), ctrl_c_waits():
                claim(store)
        finally:
            postgres.start()


def test_the_identity_is_that_of_the_first(url: str) -> None:
    for identity in (IDENTITY, '{"iterations": 20}'):
        with closing(Store(url, "run", identity)) as store:
            assert store.identity == IDENTITY


def test_a_run_of_another_version_is_refused(url: str) -> None:
    Store(url, "run", IDENTITY).close()
    with sa.create_engine(url).begin() as connection:
        connection.execute(sa.text("UPDATE dpc_runs SET schema = 2"))
    for open_it in (lambda: Store(url, "run", IDENTITY), lambda: Reader(url, "run")):
        with pytest.raises(InputError, match="run run is of another version of this project: give another `out`"):
            open_it()


def test_a_run_that_is_not_there_is_no_run(url: str) -> None:
    with pytest.raises(KeyError):
        Reader(url, "run")
    Store(url, "run", IDENTITY).close()
    with pytest.raises(KeyError):
        Reader(url, "other")
