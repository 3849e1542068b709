"""A search that is cut short: its jobs and results are those of the rule, whoever does them and whatever happens meanwhile."""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from optuna.trial import FrozenTrial, TrialState

import search.runs.store
from reference.cell import Cell
from search.cells.history import History
from search.cells.samplers.paper import PaperSampler
from search.cells.space import SearchSpace
from search.runs.halving import Halving, Rule
from search.runs.mirror import optunas_storage
from search.runs.reader import Reader
from search.runs.search import Search
from search.runs.store import Claim, SearchPlan, Store, Told
from search.runs.study import Study
from search.runs.tables import FAILED, SEARCH, Key
from search.runs.workers import Outcome
from search.settings import known
from search.tasks.proxy import ProxyResult
from tests.search.runs.free_search import (
    HALVING,
    NAME,
    SPACE,
    TASK,
    Finished,
    FreeWorkers,
    expected_of_halving,
    plan,
    sampler,
)

TRIALS = 40
FEW = SearchPlan(8, {}, 1, 0)
TWO = Halving("asha", (10, 40), 2)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/study.db"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with closing(Store(url, NAME, "{}", halving=TWO)) as store:
        yield store


def run(url: str, directory: Path, *, capacity: int = 1, halving: Halving = HALVING, trials: int = TRIALS) -> None:
    with (
        closing(Store(url, NAME, "{}", halving=halving)) as store,
        closing(Study(directory, url, store, TASK, SPACE, sampler(), lambda head: b"")) as study,
    ):
        Search(study, FreeWorkers(capacity), plan(trials), TASK.score).run()


def found(url: str) -> tuple[Finished, list[tuple[int, int]]]:
    with closing(Reader(url, NAME)) as reader:
        rows = reader.finished(search=True) + reader.finished(search=False)
        jobs = [(number, rung) for number, rung, _ in reader.logged(0, 10_000)]
        assert reader.running() == []
    return {row.key: (Cell.from_json(row.cell), row.score) for row in rows}, jobs


def told(score: float, state: str = "") -> Told:
    return Told(score, 10, json.dumps({"seconds": 1.0}), "[]", f"head {score}".encode(), state.encode())


def claim(store: Store, search: SearchPlan = FEW, space: SearchSpace = SPACE) -> Claim:
    return known(store.claim(search, space, PaperSampler(space, seed=0, lag=0)))


def work(store: Store, scores: dict[tuple[int, int], float | None], search: SearchPlan = FEW) -> list[Claim]:
    """Do the search with scores by (trial, rung), 0 where none are given; None fails."""
    claims = []
    while claimed := store.claim(search, SPACE, PaperSampler(SPACE, seed=0, lag=0)):
        score = scores.get((claimed.key.number, claimed.key.rung), 0.0)
        if score is None:
            store.tell_failure(claimed.key, "bad luck")
        else:
            store.tell(claimed.key, told(score, f"trial {claimed.key.number} on {claimed.key.rung}"))
        claims.append(claimed)
    return claims


@pytest.mark.parametrize("rule", ["asha", "pasha", "halving"])
def test_any_number_of_workers_does_the_same_jobs(tmp_path: Path, rule: Rule) -> None:
    halving = replace(HALVING, rule=rule)
    for capacity in (1, 9):
        url = f"sqlite:///{tmp_path}/{capacity}.db"
        run(url, tmp_path, capacity=capacity, halving=halving)
        assert found(url) == expected_of_halving(TRIALS, halving)
    jobs = found(url)[1]
    assert sum(rung == 0 for _, rung in jobs) == TRIALS
    assert max(rung for _, rung in jobs) == 2
    assert 3 < sum(rung > 0 for _, rung in jobs) < 30


def test_an_interrupted_search_goes_on_as_if_nothing_had_happened(tmp_path: Path, url: str) -> None:
    class Interrupted(FreeWorkers):
        left = 7

        def wait(self, timeout: float | None = None) -> Outcome[ProxyResult] | None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return super().wait(timeout)

    interruptions = 0
    while True:
        with (
            closing(Store(url, NAME, "{}", halving=HALVING)) as store,
            closing(Study(tmp_path, url, store, TASK, SPACE, sampler(), lambda head: b"")) as study,
        ):
            try:
                Search(study, Interrupted(2), plan(TRIALS), TASK.score).run()
            except KeyboardInterrupt:
                interruptions += 1
                continue
            break
    assert interruptions > 5
    assert found(url) == expected_of_halving(TRIALS, HALVING)


def test_samplers_learn_how_far_a_cell_got() -> None:
    history = History()
    for number, cell in enumerate(PaperSampler(SPACE, seed=0).propose(number, History()) for number in range(4)):
        history.propose(number, cell.to_json(), SPACE.canonical_form(cell).to_json())
        history.finish(number, score=number / 10)
    assert [trial.number for trial in history.best(4)] == [3, 2, 1, 0]
    history.finish(1, score=0.05, rung=1)
    assert [trial.number for trial in history.best(4)] == [1, 3, 2, 0]
    assert history.scores(history.complete(4)) == [0.0, 3.0, 1.0, 2.0]
    history.withdraw(1)
    assert [trial.number for trial in history.best(4)] == [3, 2, 0]
    assert history.scores(history.complete(4)) == [0.0, 0.2, 0.3]


def test_copies_follow_their_original_in_the_history() -> None:
    history = History()
    cell = next(iter(PaperSampler(SPACE, seed=0)._uniform(PaperSampler(SPACE, seed=0)._rng(0))))
    for number in range(4):
        history.propose(number, cell.to_json(), SPACE.canonical_form(cell).to_json())
    history.finish(0, score=0.5)
    history.copy(1, original=0)
    assert [trial.number for trial in history.complete(4)] == [0, 1]
    history.finish(0, score=0.4, rung=1)
    history.copy(2, original=0)
    assert history.scores(history.complete(4)) == [0.4] * 3
    history.withdraw(0)
    history.copy(3, original=0)
    assert history.complete(4) == []
    assert list(history.best(4)) == []


def test_a_search_that_goes_on_with_fewer_trials_takes_over_those_beyond(tmp_path: Path, url: str) -> None:
    """The next job follows from all of them."""
    with closing(Store(url, NAME, "{}", halving=TWO)) as store:
        while (claimed := claim(store, replace(FEW, trials=20))).key.rung == 0 or claimed.key.number < 5:
            store.tell(claimed.key, told(claimed.key.number / 100))
    with closing(Store(url, NAME, "{}", halving=TWO)) as store:
        finished = [each.key for each in work(store, {}, replace(FEW, trials=5))]
        assert claimed.key in finished
        assert store.is_finished(replace(FEW, trials=5))


def test_the_state_of_a_failed_trial_is_not_kept(store: Store) -> None:
    work(store, {(7, 0): 0.9, (7, 1): None, **{(number, 0): number / 10 for number in range(7)}})
    with store.engine.connect() as connection:
        kept = set(connection.execute(sa.text("SELECT number FROM dpc_states")).scalars())
    assert kept
    assert not kept & store.state.failures


def test_a_trial_goes_on_from_its_state(store: Store) -> None:
    claims = work(store, {(number, 0): number / 10 for number in range(8)})
    went_on = [each for each in claims if each.key.rung == 1]
    assert [each.until for each in claims if each.key.name == SEARCH and each.key.rung == 0] == [10] * 8
    assert [(each.key.number, each.until, each.state) for each in went_on] == [
        (number, 40, f"trial {number} on 0".encode()) for number in sorted(each.key.number for each in went_on)
    ]
    assert len(went_on) >= 4
    assert {(each.until, each.state) for each in claims if each.key.name != SEARCH} == {(None, None)}


def test_only_states_of_the_best_are_kept_and_a_trial_without_one_begins_anew(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.runs.store, "KEPT_STATES", 2)
    rising = SearchPlan(8, {}, 1, 0)
    late = Store(str(store.engine.url), "late", "{}", halving=Halving("halving", (10, 40), 2))
    with closing(late):
        claims = work(late, {(number, 0): (5 * number % 8) / 10 for number in range(8)}, rising)
        went_on = {each.key.number: each.state for each in claims if each.key.rung == 1}
        assert went_on == {3: b"trial 3 on 0", 6: b"trial 6 on 0", 1: None, 4: None}
        with late.engine.connect() as connection:
            assert connection.execute(sa.text("SELECT count(*) FROM dpc_states WHERE content IS NOT NULL")).scalar_one() <= 4
        assert not late.keeps_state(Key(SEARCH, 0, 1), 0.9)  # nothing goes on from there


def test_without_early_stopping_there_are_no_rungs(url: str) -> None:
    with closing(Store(url, "all", "{}")) as store:
        claims = work(store, {})
        assert not store.keeps_state(Key(SEARCH, 0), 1.0)
        with store.engine.connect() as connection:
            for table in ("dpc_rungs", "dpc_states"):
                assert connection.execute(sa.text(f"SELECT count(*) FROM {table}")).scalar_one() == 0
    assert {each.until for each in claims} == {None}


def test_who_was_slow_does_not_tell_the_result_of_another_rung(url: str) -> None:
    with closing(Store(url, NAME, "{}", halving=TWO)) as slow:
        first = claim(slow)
        slow._delete_processes(slow.id)  # others take it for dead
        with closing(Store(url, NAME, "{}", halving=TWO)) as other:
            assert claim(other)[:3] == (first.key, first.cell, True)
            assert other.tell(first.key, told(0.5))
            second = claim(other)
            assert other.tell(second.key, told(0.4))
            gone_on = claim(other)
            assert gone_on.key == Key(SEARCH, 0, 1)
            assert not slow.tell(first.key, told(0.5))
            assert not slow.tell_failure(first.key, "bad luck")
            assert other.tell(gone_on.key, told(0.6))


def test_a_trial_that_fails_later_on_has_no_score_and_the_next_best_goes_on(store: Store) -> None:
    scores: dict[tuple[int, int], float | None] = {(number, 0): number / 10 for number in range(8)}
    claims = work(store, scores | {(7, 1): None, (6, 1): None}, SearchPlan(8, {}, 1, 0))
    assert store.state.failures == {6, 7}
    best = known(store.state.best)
    assert (best.rung, best.number not in (6, 7)) == (1, True)
    with closing(Reader(str(store.engine.url), NAME)) as reader:
        failed = [row for row in reader.finished(search=True) if row.state == FAILED]
        assert [(row.key.number, row.score, row.result, row.failure) for row in failed] == [
            (number, None, None, "bad luck") for number in (6, 7)
        ]
        counts = reader.counts(0)
    assert (counts.complete, counts.failed, counts.best) == (6, 2, (best.number, best.score))
    assert counts.rungs == (8, sum(each.key.rung for each in claims) - 2)
    assert claims[-1].key.name == f"trial {best.number}"


@pytest.mark.parametrize("later", [0.7, None])
def test_a_copy_has_what_its_original_comes_to(tmp_path: Path, url: str, later: float | None) -> None:
    space = SearchSpace(1, (), (1,))  # of two cells
    search = SearchPlan(6, {}, 1, 0)
    with (
        closing(Store(url, NAME, "{}", halving=Halving("asha", (10, 40), 2))) as store,
        closing(Study(tmp_path, url, store, TASK, space, PaperSampler(space, seed=0, lag=0), lambda head: b"")) as study,
    ):
        for _ in range(100):
            claimed = study.claim(search)
            if store.is_finished(search):
                break
            if claimed is None:  # after a second of copies, each of which takes a thousand draws
                continue
            if claimed.key.name == SEARCH and claimed.key.rung == 1 and later is None:
                store.tell_failure(claimed.key, "bad luck")
            else:
                score = known(later) if claimed.key.rung else 0.3 + claimed.key.number / 10
                store.tell(claimed.key, replace(told(score), result=RESULT))
            study.show()
        assert store.is_finished(search)
    with closing(Reader(url, NAME)) as reader:
        rows = {row.key.number: row for row in reader.finished(search=True)}
        went_on = {number for number, rung, _ in reader.logged(0, 100) if rung == 1}
    assert len(rows) == 6
    copies = [row for row in rows.values() if row.duplicate_of is not None]
    assert len(copies) == 4
    assert any(row.duplicate_of in went_on for row in copies)
    for row in copies:
        original = rows[known(row.duplicate_of)]
        assert (row.score, row.state, row.result, row.failure) == (
            original.score,
            original.state,
            original.result,
            original.failure,
        )
    assert {trial.number: trial.value for trial in mirrored(url)} == {number: row.score for number, row in rows.items()}


RESULT = json.dumps({"scores": {"score": 0.5, "details": [0.5, None]}, "parameters": 1, "multiply_adds": 2, "seconds": 3.0})


def mirrored(url: str) -> list[FrozenTrial]:
    with optunas_storage(url, NAME) as storage:
        return storage.get_all_trials(storage.get_study_id_from_name(f"{NAME} search"))


def test_the_mirror_has_the_last_scores_and_all_as_intermediate_values(tmp_path: Path, url: str) -> None:
    run(url, tmp_path, capacity=5)
    with closing(Reader(url, NAME)) as reader:
        rows, scores, jobs = reader.finished(search=True), reader.rung_scores(), reader.logged(0, 1000)
    trials = mirrored(url)
    assert [(trial.number, trial.value) for trial in trials] == [(row.key.number, row.score) for row in rows]
    assert any(trial.state == TrialState.FAIL and trial.intermediate_values for trial in trials)
    for trial in trials:
        assert trial.intermediate_values == dict(zip(HALVING.rungs, scores.get(trial.number, ()), strict=False))
        in_full = trial.number in scores and len(scores[trial.number]) == len(HALVING.rungs)
        expected = TrialState.FAIL if trial.value is None else TrialState.COMPLETE if in_full else TrialState.PRUNED
        assert trial.state == expected
    assert {trial.state for trial in trials} == {TrialState.FAIL, TrialState.COMPLETE, TrialState.PRUNED}
    assert max(rung for _, rung, _ in jobs) == 2
