"""All keepers of trials keep what they are told, a study that is filled is one that was searched, and many share one."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

import bench.study_case
from bench.accuracy import error_of
from bench.cases import OURS, Provider
from bench.optuna_rows import create_filled_study
from bench.plans import PAPER, make_plan
from bench.postgres import programs
from bench.study_case import ASK_TELL, AT_ONCE, LOAD, OPTUNA, OPTUNA_PAPER, REPORT, StudyCase, Together
from bench.study_stores import OptunaKeeper, OurKeeper, drawn_trials, score_of
from search.cells.sampler import distributions_of, params_of_cell
from search.cells.space import SearchSpace
from search.runs.mirror import optunas_storage
from search.runs.study import load_run
from tests.bench.tiny_runs import CPU

EVERYBODY = (OURS, OPTUNA, OPTUNA_PAPER)
every_provider = pytest.mark.parametrize("provider", EVERYBODY, ids=lambda provider: provider.name)


@every_provider
@pytest.mark.parametrize(("name", "trials"), [(ASK_TELL, 0), (ASK_TELL, 3), (LOAD, 3)])
def test_what_is_told_is_kept(provider: Provider, name: str, trials: int) -> None:
    case = StudyCase(name=name, trials=trials)
    with case.set_up([provider]) as ready:
        workload = ready.workload(provider, "float32", CPU)
        workload()
        assert error_of(workload.parts(), ready.truth("float32")).maximum == 0.0
        lost = [replace(ready, trials=trials + change).truth("float32") for change in (1, 2)]
        assert all(error_of(workload.parts(), truth).rms == float("inf") for truth in lost)


def test_scores_tell_trials_apart() -> None:
    assert len({score_of(number) for number in range(28_000)}) == 28_000


def told(url: str, name: str) -> list[tuple[Any, ...]]:
    trials = optuna.load_study(study_name=name, storage=url).get_trials()
    return [(t.number, t._trial_id, t.state, t.value, t.params, t.distributions, t.user_attrs) for t in trials]


def test_a_filled_study_is_one_that_optuna_writes(tmp_path: Path) -> None:
    space, trials, attributes = SearchSpace(), drawn_trials(4), {"curve": [[300, 1.5]], "cell": "a cell"}
    written, filled = (f"sqlite:///{tmp_path / name}.db" for name in ("written", "filled"))
    study = optuna.create_study(storage=written, study_name="it", direction="maximize")
    for cell, score in trials:
        params, of_space = params_of_cell(cell, space), distributions_of(space)
        trial = optuna.trial.create_trial(value=score, params=params, distributions=of_space, user_attrs=attributes)
        study.add_trial(trial)
    create_filled_study(filled, "it", space, trials, attributes)
    assert told(filled, "it") == told(written, "it")


def test_the_mirror_of_a_filled_run_has_its_trials(tmp_path: Path) -> None:
    """So that a run that goes on need not make it first."""
    keeper = OurKeeper(f"sqlite:///{tmp_path / 'study.db'}", tmp_path)
    keeper.fill(3)
    keeper.ask_and_tell()
    keeper.close()
    (name,) = (name for name in optuna.get_all_study_names(keeper.url) if name.endswith(" search"))
    mirrored = [(number, value, params) for number, _, _, value, params, *_ in told(keeper.url, name)]
    space, records = SearchSpace(), load_run(tmp_path).trials
    assert mirrored == [(record.number, record.score, params_of_cell(record.cell, space)) for record in records]
    assert len(mirrored) == 4


def test_all_keep_as_much_of_a_trial(tmp_path: Path) -> None:
    ours = OurKeeper(f"sqlite:///{tmp_path / 'ours.db'}", tmp_path)
    plain = OptunaKeeper(f"sqlite:///{tmp_path / 'plain.db'}", tmp_path)
    for keeper in (ours, plain):
        keeper.fill(1)
        keeper.ask_and_tell()
        keeper.close()
    run = load_run(tmp_path)
    for record, (*_, attributes) in zip(run.trials, told(plain.url, "search"), strict=True):
        assert record.result is not None
        assert attributes["result"].keys() | {"loss_curve"} == vars(record.result).keys()
        assert [tuple(point) for point in attributes["loss_curve"]] == list(run.curve(record))
        assert len(run.curve(record)) == 100


def test_the_page_is_written_and_its_size_told() -> None:
    case = StudyCase(name=REPORT, trials=3)
    with case.set_up([OURS]) as ready:
        workload = ready.workload(OURS, "float32", CPU)
        workload()
        page = ready.places[OURS.name].folder / "report.html"
        assert workload.written_bytes == page.stat().st_size > 1000


@every_provider
def test_many_processes_share_one_study(provider: Provider) -> None:
    if programs() is None:
        pytest.skip("PostgreSQL is not installed")
    case = StudyCase(name=AT_ONCE, trials=3, database="PostgreSQL", processes=3, at_once=10)
    with case.set_up([provider]) as ready:
        workload = ready.workload(provider, "float32", CPU)
        workload()
        assert error_of(workload.parts(), ready.truth("float32")).maximum == 0.0
        del workload  # which ends its processes, before the server goes


def test_what_breaks_in_one_of_many_processes_is_said(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'empty.db'}"
    with optunas_storage(url, "empty"):  # which makes the tables
        pass
    with pytest.raises(RuntimeError, match=r"KeyError: .*Record does not exist"):
        Together(OptunaKeeper(url, tmp_path), 2)


def left_out(device: torch.device = CPU) -> Sequence[str]:
    return make_plan(["study"], device, quick=False).omissions


def test_the_plan_says_what_it_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.study_case, "programs", lambda: Path("bin"))
    plan = make_plan(["study"], CPU, quick=False)
    assert {(job.case.name, job.dtype) for job in plan.jobs} == {
        (name, "float32") for name in (ASK_TELL, LOAD, REPORT, AT_ONCE)
    }
    assert list(PAPER.study.all_cases()) == [job.case for job in plan.jobs]
    assert any(omission.startswith("64 processes of plain Optuna: 8 do their trials") for omission in plan.omissions)
    assert any(omission.startswith("many processes of plain Optuna at 28,000 trials") for omission in plan.omissions)
    monkeypatch.setattr(bench.study_case, "programs", lambda: None)
    assert {job.case.shape for job in make_plan(["study"], CPU, quick=False).jobs} == {
        f"{trials} trials, SQLite" for trials in ("0", "1,000", "28,000")
    }
    assert "studies in PostgreSQL, and those of many processes: it is not installed" in left_out()
    monkeypatch.setattr(bench.study_case, "find_spec", lambda name: None)
    assert make_plan(["study"], CPU, quick=False).jobs == []
    assert "the suite study: it needs optuna and sqlalchemy" in left_out()


def test_no_gpu_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert make_plan(["study"], torch.device("cuda"), quick=False).jobs == []
    assert "the suite study: no GPU takes part, so --device cpu measures it" in left_out(torch.device("cuda"))
