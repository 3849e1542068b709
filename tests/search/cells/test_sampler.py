import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.study import StudyDirection
from optuna.trial import FixedTrial, TrialState

from reference.cell import OPERATIONS, AtrousSeparableConv, Cell
from search.cells.history import History, Proposed
from search.cells.reach import FeatureMaps
from search.cells.sampler import CellSampler, StudyHistory, cell_from_params, params_of_cell, suggest_cell
from search.cells.samplers import SAMPLER_NAMES, create_sampler
from search.cells.samplers.paper import PaperSampler
from search.cells.space import SearchSpace, canonical_form
from search.errors import InputError
from tests.strategies import cells, rng_seeds

SPACE = SearchSpace()


def score(cell: Cell) -> float:
    """A synthetic objective: minus the mean distance, on a logarithmic scale, of the rates' product from 36; 0 is the best."""
    rates = [b.operation.rate if isinstance(b.operation, AtrousSeparableConv) else (100, 100) for b in cell.branches]
    return -float(np.mean([abs(np.log(np.prod(rate) / 36)) for rate in rates]))


def is_failure(cell: Cell) -> bool:
    return not isinstance(cell.branches[0].operation, AtrousSeparableConv)  # a fifth of all cells


def proposals(study: optuna.Study, space: SearchSpace = SPACE) -> list[Cell]:
    return [cell_from_params(trial.params, space) for trial in study.get_trials(deepcopy=False)]


def drive(study: optuna.Study, until: int, *, workers: int = 1, order_seed: int = 0, space: SearchSpace = SPACE) -> list[Cell]:
    """Keep up to `workers` trials in flight, finishing in random order, until the study has `until` trials."""
    assert isinstance(study.sampler, CellSampler)
    order = np.random.default_rng(order_seed)
    in_flight: dict[int, Cell] = {}
    number = sum(trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False))
    while in_flight or number < until:
        oldest = min(in_flight, default=number)
        if number < until and len(in_flight) < workers and study.sampler.visible_before(number) <= oldest:
            in_flight[number] = suggest_cell(study.ask(), space)
            number += 1
        else:
            done = int(order.choice(list(in_flight)))
            tell(study, done, in_flight.pop(done))
    return proposals(study, space)


def tell(study: optuna.Study, number: int, cell: Cell) -> None:
    if is_failure(cell):
        study.tell(number, state=TrialState.FAIL)
    else:
        study.tell(number, score(cell))


def create_study(
    sampler: optuna.samplers.BaseSampler, direction: Literal["maximize", "minimize"] = "maximize"
) -> optuna.Study:
    return optuna.create_study(direction=direction, sampler=sampler)


@pytest.fixture(autouse=True)
def _quiet_optuna() -> Iterator[None]:
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(verbosity)


@pytest.fixture
def open_storage(tmp_path: Path) -> Iterator[Callable[[], optuna.storages.RDBStorage]]:
    storages: list[optuna.storages.RDBStorage] = []

    def open_again() -> optuna.storages.RDBStorage:
        storages.append(optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'study.db'}"))
        return storages[-1]

    yield open_again
    for storage in storages:
        storage.engine.dispose()


@given(cell=cells(searchable=True, num_inputs=3))
def test_a_cell_survives_its_parameters(cell: Cell) -> None:
    space = SearchSpace(len(cell.branches), num_inputs=cell.num_inputs)
    params = params_of_cell(cell, space)
    assert ("branch0_input" in params) == (space.num_inputs > 1)
    assert suggest_cell(FixedTrial(params), space) == cell
    assert cell_from_params(params | {"learning_rate": 0.1}, space) == cell


def test_parameters_of_another_space_are_refused() -> None:
    params = params_of_cell(SearchSpace(2).sample(np.random.default_rng(0)), SearchSpace(2))
    with pytest.raises(ValueError, match="of 3 branches: 'branch2_input' missing or unknown"):
        cell_from_params(params, SearchSpace(3))
    with pytest.raises(ValueError, match="of 2 branches: 'branch0_input' missing or unknown"):
        cell_from_params(params, SearchSpace(2, num_inputs=2))


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_cells_do_not_depend_on_the_workers(name: str) -> None:
    expected = drive(create_study(create_sampler(name, SPACE, 0)), 40)
    for workers, order_seed in [(3, 1), (5, 2), (5, 3)]:
        study = create_study(create_sampler(name, SPACE, 0))
        assert drive(study, 40, workers=workers, order_seed=order_seed) == expected
    assert sum(map(is_failure, expected)) > 0  # the failures that this test is also about did happen


def test_results_out_of_sight_do_not_count() -> None:
    def last_cell(first_hidden: int, value: float) -> Cell:
        study = create_study(PaperSampler(SPACE, seed=0, near_best_probability=1, lag=3))
        for number in range(20):
            suggest_cell(study.ask(), SPACE)
            study.tell(number, value if number >= first_hidden else 0.0)
        suggest_cell(study.ask(), SPACE)
        return proposals(study)[-1]

    assert last_cell(17, 1.0) == last_cell(17, -1.0)
    assert last_cell(16, 1.0) != last_cell(16, -1.0)


def test_seeds_give_different_cells() -> None:
    cells = [cell for seed in range(3) for cell in drive(create_study(PaperSampler(SPACE, seed=seed)), 10)]
    assert len(set(cells)) == 30


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_proposals_near_the_best_are_neighbours_of_the_best(direction: Literal["maximize", "minimize"]) -> None:
    space, best_k, lag = SearchSpace(2), 3, 2
    study = create_study(PaperSampler(space, seed=0, near_best_probability=1, best_k=best_k, lag=lag), direction)
    cells = drive(study, 60, workers=3, space=space)
    sign = -1 if direction == "maximize" else 1
    parents = set()
    for number in range(lag, 60):
        visible = {canonical_form(cell): cell for cell in cells[: number - lag] if not is_failure(cell)}
        best = sorted(visible.values(), key=lambda cell: sign * score(cell))
        if best:
            worst_of_best = sign * score(best[:best_k][-1])  # ties included
            near = [c for c in best if sign * score(c) <= worst_of_best and cells[number] in space.neighbours(c)]
            assert near
            parents.add(near[0])
    assert len(parents) > best_k  # the best did change, and not only the first was used


@pytest.mark.parametrize("name", ["paper", "random"])
def test_no_graph_is_proposed_twice_until_all_were(name: str) -> None:
    space = SearchSpace(1)
    study = create_study(create_sampler(name, space, 0))
    assert len(set(drive(study, 81, workers=5, space=space))) == 81
    assert space.contains(drive(study, 82, space=space)[-1])  # and then the search still goes on


def test_cells_that_do_the_same_on_the_map_are_proposed_once() -> None:
    """On 17×17, rates 18 and 21 are one: 15 of the 81 operations (those with a rate of 21) have a twin."""
    space = SearchSpace(1, maps=FeatureMaps((17, 17), (17, 17)))
    cells = drive(create_study(create_sampler("paper", space, 0)), space.canonical_size(), workers=5, space=space)
    assert len(set(map(space.canonical_form, cells))) == space.canonical_size() == 66
    assert any(space.canonical_form(cell) != cell for cell in cells)  # they stay as they were drawn


def test_a_map_on_which_all_cells_differ_changes_no_proposal() -> None:
    for name in ("paper", "random"):
        on_a_map = SearchSpace(maps=FeatureMaps((22, 22), (22, 22)))
        expected = drive(create_study(create_sampler(name, SPACE, 0)), 20)
        assert drive(create_study(create_sampler(name, on_a_map, 0)), 20, space=on_a_map) == expected


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_samplers_keep_to_a_restricted_space(name: str) -> None:
    space = SearchSpace(2, rates=(1, 2, 5), grid_sizes=(3,), maps=FeatureMaps((5, 5), (5, 5)))
    study = create_study(create_sampler(name, space, 0))
    study.optimize(lambda trial: score(suggest_cell(trial, space)), n_trials=25)
    cells = proposals(study, space)
    assert all(map(space.contains, cells))
    assert all(suggest_cell(FixedTrial(params_of_cell(cell, space)), space) == cell for cell in cells)
    assert not all(map(SPACE.contains, cells))


def test_a_graph_is_not_proposed_again_in_another_branch_order() -> None:
    space = SearchSpace(2)

    def second_cell(seed: int) -> Cell:
        return drive(create_study(PaperSampler(space, seed=seed)), 2, space=space)[1]

    seed = next(seed for seed in range(100) if second_cell(seed) != canonical_form(second_cell(seed)))
    form = canonical_form(second_cell(seed))
    study = create_study(PaperSampler(space, seed=seed))
    study.enqueue_trial(params_of_cell(form, space))
    first, other = drive(study, 2, space=space)
    assert first == form
    assert canonical_form(other) != form


@pytest.mark.parametrize("name", SAMPLER_NAMES)
@pytest.mark.parametrize("state", [TrialState.PRUNED, TrialState.FAIL])
def test_pruned_failed_and_running_trials_are_no_parents(name: str, state: TrialState) -> None:
    expected, study = (create_study(create_sampler(name, SPACE, 0, lag=0)) for _ in range(2))
    for _ in range(25):
        suggest_cell(expected.ask(), SPACE)  # and is still running
    for value in range(24):
        trial = study.ask()
        suggest_cell(trial, SPACE)
        trial.report(value, step=0)
        study.tell(trial, state=state)
    suggest_cell(study.ask(), SPACE)
    assert proposals(study) == proposals(expected)


def test_enqueued_cells_come_first() -> None:
    study = create_study(PaperSampler(SPACE, seed=0))
    cell = SPACE.sample(np.random.default_rng(5))
    study.enqueue_trial(params_of_cell(cell, SPACE))
    assert drive(study, 3)[0] == cell


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_resumed_study_continues_as_if_never_stopped(
    name: str, open_storage: Callable[[], optuna.storages.RDBStorage]
) -> None:
    expected = drive(create_study(create_sampler(name, SPACE, 0)), 24)
    study = optuna.create_study(
        study_name="cells", storage=open_storage(), direction="maximize", sampler=create_sampler(name, SPACE, 0)
    )
    drive(study, 18)
    study.ask().suggest_categorical("branch0_operation", [str(operation) for operation in OPERATIONS])  # and the process dies

    resumed = optuna.load_study(study_name="cells", storage=open_storage(), sampler=create_sampler(name, SPACE, 0))
    (unfinished,) = resumed.get_trials(states=[TrialState.RUNNING])
    cell = suggest_cell(optuna.Trial(resumed, unfinished._trial_id), SPACE)
    assert cell == expected[18]
    tell(resumed, unfinished.number, cell)
    assert drive(resumed, 24) == expected


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_minimising_is_maximising_the_negative(name: str) -> None:
    def objective(trial: optuna.Trial, sign: int) -> float:
        return sign * score(suggest_cell(trial, SPACE))

    studies = [create_study(create_sampler(name, SPACE, 0, lag=0), direction) for direction in ("maximize", "minimize")]
    for study, sign in zip(studies, (1, -1), strict=True):
        study.optimize(partial(objective, sign=sign), n_trials=25)
    assert proposals(studies[0]) == proposals(studies[1])


# What a sampler knows of a study


def known(history: History) -> tuple[int, list[Proposed], list[float], list[Proposed]]:
    complete = history.complete(1000)
    return len(history), complete, history.scores(complete), list(history.best(1000))


@given(steps=st.lists(st.sampled_from(["ask", "suggest", "enqueue", "score", "fail", "prune"]), max_size=30), seed=rng_seeds())
def test_a_study_is_read_on_as_if_it_were_read_anew(steps: list[str], seed: int) -> None:
    space, rng = SearchSpace(2), np.random.default_rng(seed)
    study = create_study(optuna.samplers.RandomSampler(seed), "minimize")
    read, running = StudyHistory(space), list[optuna.Trial]()
    for step in steps:
        trial = running[int(rng.integers(len(running)))] if running else None
        if step == "ask":
            running.append(study.ask())
        elif step == "enqueue":
            study.enqueue_trial(params_of_cell(space.sample(rng), space))
        elif step == "suggest" and trial:
            suggest_cell(trial, space)
        elif trial:
            running.remove(trial)
            if step == "score":
                study.tell(trial, rng.random())
            else:
                trial.report(0.0, 0)
                study.tell(trial, state=TrialState.FAIL if step == "fail" else TrialState.PRUNED)
        assert known(read.read(study)) == known(StudyHistory(space).read(study))
        suggested = [t for t in study.get_trials(deepcopy=False) if "branch1_operation" in t.params]
        assert len(read.read(study)) == len(suggested)


def test_a_finished_trial_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So an ask costs no more in a long study than in a short one, but for the list of trials that the storage makes."""
    study = create_study(PaperSampler(SPACE, seed=0))
    drive(study, 20)
    read: list[int] = []
    monkeypatch.setattr(StudyHistory, "_read", lambda self, trial, direction: read.append(trial.number))
    for number in range(20, 24):
        suggest_cell(study.ask(), SPACE)
        study.tell(number, 0.0)
    assert read == [19, 20, 20, 21, 21, 22, 22, 23]  # while it ran, and once more


def test_a_sampler_of_several_studies_keeps_them_apart() -> None:
    sampler = PaperSampler(SPACE, seed=0)
    studies = [create_study(sampler) for _ in range(2)]
    for until in range(1, 20):
        for study in studies:
            drive(study, until)
    assert proposals(studies[0]) == proposals(studies[1]) == drive(create_study(PaperSampler(SPACE, seed=0)), 19)


@pytest.mark.parametrize("num_trials", [5, 30])
def test_a_study_that_was_replaced_is_read_anew(num_trials: int) -> None:
    """Whether by a shorter or a longer one."""
    study, other = create_study(PaperSampler(SPACE, seed=0)), create_study(PaperSampler(SPACE, seed=1))
    drive(study, 20)
    drive(other, num_trials)
    study._storage, study._study_id = other._storage, other._study_id
    read = study.sampler
    expected = create_study(PaperSampler(SPACE, seed=0))
    expected.add_trials(other.trials)
    assert drive(study, num_trials + 3) == drive(expected, num_trials + 3)
    assert study.sampler is read


def test_a_parameter_of_the_cell_may_be_fixed() -> None:
    fixed = {"branch1_operation": "pool 1x1", "branch2_input": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = create_study(optuna.samplers.PartialFixedSampler(fixed, PaperSampler(SPACE, seed=0)))
    study.optimize(lambda trial: score(suggest_cell(trial, SPACE)), n_trials=8)
    assert all(trial.params.items() >= fixed.items() for trial in study.trials)
    assert len(set(proposals(study))) > 4  # two cells may differ in what is fixed


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_samplers_run_in_any_study(name: str) -> None:
    def objective(trial: optuna.Trial) -> float:
        assert 0.01 <= trial.suggest_float("learning_rate", 0.01, 0.1, log=True) <= 0.1
        return score(suggest_cell(trial, SPACE))

    runs = []
    for _ in range(2):
        study = create_study(create_sampler(name, SPACE, 1))
        study.optimize(objective, n_trials=25)
        assert all(map(SPACE.contains, proposals(study)))
        assert (
            len({branch.operation for branch in proposals(study)[0].branches}) > 1
        )  # one random stream, not one per parameter
        assert len({trial.params["learning_rate"] for trial in study.trials}) == 25
        runs.append([trial.params for trial in study.get_trials(deepcopy=False)])
    assert runs[0] == runs[1]


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_a_new_sampler_goes_on_with_new_cells(name: str) -> None:
    study = create_study(create_sampler(name, SPACE, 0))
    for _ in range(3):
        study.optimize(lambda trial: score(suggest_cell(trial, SPACE)), n_trials=4)
        study.sampler = create_sampler(name, SPACE, 0)
    assert len(set(map(canonical_form, proposals(study)))) == 12


@pytest.mark.parametrize("name", SAMPLER_NAMES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))])
def test_a_copied_sampler_proposes_the_same(
    name: str, duplicate: Callable[[optuna.samplers.BaseSampler], optuna.samplers.BaseSampler]
) -> None:
    sampler = create_sampler(name, SPACE, 0)
    cells = []
    for copied in (duplicate(sampler), sampler):
        study = create_study(copied)
        study.optimize(lambda trial: score(suggest_cell(trial, SPACE)), n_trials=8)
        cells.append(proposals(study))
    assert cells[0] == cells[1]


@pytest.mark.parametrize("name", ["paper", "local", "predictor"])
def test_one_objective_only(name: str) -> None:
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=create_sampler(name, SPACE, 0))
    with pytest.raises(ValueError, match=r"\w+Sampler is for studies of one objective, got 2"):
        suggest_cell(study.ask(), SPACE)


@pytest.mark.parametrize("name", ["random", "evolution", "tpe"])
def test_of_several_objectives_each_has_its_direction(name: str) -> None:
    """Whichever way a study puts them: to have much of both, or little of the negative."""

    def objective(trial: optuna.Trial, signs: tuple[int, int]) -> tuple[float, ...]:
        cell = suggest_cell(trial, SPACE)
        values = score(cell), -float(sum(not isinstance(b.operation, AtrousSeparableConv) for b in cell.branches))
        return tuple(sign * value for sign, value in zip(signs, values, strict=True))

    found = []
    for signs in ((1, 1), (1, -1), (-1, 1)):
        directions = [StudyDirection.MAXIMIZE if sign == 1 else StudyDirection.MINIMIZE for sign in signs]
        study = optuna.create_study(directions=directions, sampler=create_sampler(name, SPACE, 0, lag=0))
        study.optimize(partial(objective, signs=signs), n_trials=30)
        found.append(proposals(study))
    assert found[0] == found[1] == found[2]
    assert (proposals(drawn_at_random(30)) == found[0]) == (name == "random")


def drawn_at_random(trials: int) -> optuna.Study:
    study = create_study(create_sampler("random", SPACE, 0))
    study.optimize(lambda trial: score(suggest_cell(trial, SPACE)), n_trials=trials)
    return study


@pytest.mark.parametrize("settings", [{"near_best_probability": 1.5}, {"best_k": 0}, {"lag": -1}, {"seed": -1}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        PaperSampler(SPACE, **({"seed": 0} | settings))  # type: ignore[arg-type]


def test_create_sampler_says_what_is_wrong() -> None:
    with pytest.raises(InputError, match="`sampler` grid is unknown; choose one of paper, random, evolution, local, pred"):
        create_sampler("grid", SPACE, 0)
    with pytest.raises(InputError, match="`seed` must be 0 or more, got -1"):
        create_sampler("tpe", SPACE, -1)


def test_a_cell_of_another_space_is_refused() -> None:
    """Otherwise no trial would count, and all cells would be drawn at random, without a word."""
    study = create_study(create_sampler("local", SearchSpace(3), 0))
    trial = study.ask()
    assert SearchSpace(2).contains(suggest_cell(trial, SearchSpace(2)))
    study.tell(trial, 0.5)
    with pytest.raises(ValueError, match="trial 0 has a cell of another search space than the sampler's: give both the same"):
        suggest_cell(study.ask(), SearchSpace(2))
    larger = create_study(create_sampler("local", SearchSpace(2), 0)).ask()
    with pytest.raises(ValueError, match="branch2_input is of a cell in another search space than the sampler's"):
        suggest_cell(larger, SearchSpace(3))
