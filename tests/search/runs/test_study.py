"""A run on disk: what is told is kept, what is interrupted is done again, and what cannot go on is refused by name."""

import json
import os
import shutil
import signal
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from reference.cell import OPERATIONS, Branch, Cell, Conv1x1
from search.cells.sampler import cell_from_params, distributions_of, params_of_cell, suggest_cell
from search.cells.samplers import create_sampler
from search.cells.space import SearchSpace, load_cell
from search.dense_tasks import DenseTask, Scores
from search.dense_tasks.depth import Depth
from search.dense_tasks.segmentation import Segmentation
from search.errors import InputError
from search.runs.reader import Reader
from search.runs.store import Claim, SearchPlan, Store
from search.runs.study import Run, RunSettings, Study, TrialRecord, best_head, load_run, open_run, ranked
from search.runs.tables import SEARCH, Key
from search.settings import BackboneSettings, DataSettings, FeatureSettings, HeadSettings, MachineSettings, known
from search.tasks.proxy import ProxyResult

SPACE = SearchSpace(2)
IDENTITY = {"iterations": 10, "learning_rate": 0.1, "crop_size": None, "backbone": "tiny"}
SETTINGS = RunSettings(
    DataSettings(dataset="camvid", data_dir=Path("my pictures")),
    BackboneSettings(output_stride=8),
    FeatureSettings(image_size=(33, 49)),
    HeadSettings(branch_channels=8, pooling="grid_cells"),
    MachineSettings(cache_dir=Path("elsewhere")),
)
CELL = load_cell("dpc")


def make_result(score: float = 0.5) -> ProxyResult:
    return ProxyResult(Scores(score, (0.25, None, 0.75)), ((1, 2.5), (2, 1 / 3)), 356_160, 3 * 10**9, 1.25, 2**33)


def begin(
    directory: Path,
    changes: dict[str, object] | None = None,
    *,
    storage: str | None = None,
    task: DenseTask | None = None,
) -> AbstractContextManager[Study]:
    command = "python -m search.random --data-dir 'my pictures'"
    palette = np.array([[1, 2, 3], [4, 5, 6], [255, 0, 9]], np.uint8)
    names = ("sky", "road", "tree")
    return open_run(
        directory,
        IDENTITY | (changes or {}),
        create_sampler("paper", SPACE, 0),
        lambda head: str(head).encode(),
        storage=storage,
        command=command,
        task=task or Segmentation(names, palette),
        settings=SETTINGS,
        space=SPACE,
        defaults={},
    )


PLAN = SearchPlan(5, {"dpc": CELL}, 2, 0)


def claim(study: Study) -> Claim:
    return known(study.claim(PLAN))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("original") / "run"
    with begin(directory) as study:
        study.tell(claim(study).key, make_result(0.75))
        study.tell_failure(claim(study).key, "the loss was inf")
        study.tell(claim(study).key, make_result(0.25))
        study.tell_failure(claim(study).key, "the loss was nan")
        study.tell(claim(study).key, make_result(0.5))
        assert claim(study).key == Key(SEARCH, 3)
        study.show()
    return directory


@pytest.fixture
def directory(original: Path, tmp_path: Path) -> Path:
    """A run with a scored cell, a failed one, a duplicate, one that was interrupted, and a comparison."""
    return shutil.copytree(original, tmp_path / "run")


def test_what_was_told_is_read_back(directory: Path) -> None:
    run = load_run(directory)
    assert run.directory == directory
    assert run.identity == IDENTITY
    assert run.settings == SETTINGS
    assert run.command == "python -m search.random --data-dir 'my pictures'"
    assert isinstance(run.task, Segmentation)
    assert run.task.class_names == ("sky", "road", "tree")
    assert run.task.palette.dtype == np.uint8
    assert run.task.palette.tolist() == [[1, 2, 3], [4, 5, 6], [255, 0, 9]]
    outcomes = [(record.number, record.score, record.result, run.curve(record), record.failure) for record in run.trials]
    without_curve, curve = replace(make_result(), loss_curve=()), make_result().loss_curve
    assert outcomes == [
        (0, 0.25, replace(without_curve, scores=make_result(0.25).scores), curve, None),
        (1, None, None, (), "the loss was nan"),
        (2, 0.5, without_curve, curve, None),
    ]
    assert [record.multiply_adds for record in run.trials] == [3 * 10**9, None, 3 * 10**9]
    assert [(b.name, b.seed, b.cell, b.result) for b in run.baselines] == [("dpc", 0, CELL, make_result(0.75))]


def test_the_cells_read_back_are_those_proposed(directory: Path) -> None:
    proposed = optuna.create_study(sampler=create_sampler("paper", SPACE, 0), direction="maximize")
    assert load_run(directory).trials[0].cell == suggest_cell(proposed.ask(), SPACE)


def stored(directory: Path) -> dict[str, Any]:
    """Metric names, and the user attributes of each trial, as any program that reads the database finds them."""
    storage = optuna.storages.RDBStorage(f"sqlite:///{directory / 'study.db'}")
    studies = [optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage)]
    kinds = {study.study_name.rsplit(" ", 1)[-1]: study for study in studies}
    return {
        kind: (study.study_name, study.metric_names, [trial.user_attrs for trial in study.get_trials()])
        for kind, study in kinds.items()
    }


def test_a_dashboard_shows_names_and_what_matters_of_each_trial(directory: Path) -> None:
    found = stored(directory)
    cost = {"parameters": 356_160, "multiply-adds": 3 * 10**9, "seconds": 1.2}
    proposed = [str(record.cell) for record in load_run(directory).trials]
    name, metrics, trials = found["search"]
    assert name.startswith("run ")
    assert metrics == ["mIOU"]
    failed = {"cell": proposed[1], "failure": "the loss was nan"}
    assert trials == [{"cell": proposed[0]} | cost, failed, {"cell": proposed[2]} | cost]
    _, metrics, trials = found["comparison"]
    assert metrics == ["mIOU"]
    compared = {"name": "dpc", "cell": str(CELL)}
    assert trials == [compared | {"seed": 0} | cost, compared | {"seed": 1, "failure": "the loss was inf"}]


def test_optuna_reads_the_cells_and_scores(directory: Path) -> None:
    """As `optuna.load_study` gives them to anyone."""
    storage = optuna.storages.RDBStorage(f"sqlite:///{directory / 'study.db'}")
    (name,) = (name for name in optuna.get_all_study_names(storage) if name.endswith("search"))
    study, run = optuna.load_study(study_name=name, storage=storage), load_run(directory)
    assert [trial.number for trial in study.trials] == [record.number for record in run.trials]
    assert [cell_from_params(trial.params, SPACE) for trial in study.trials] == [record.cell for record in run.trials]
    assert [trial.value for trial in study.trials] == [record.score for record in run.trials]
    assert study.best_trial.number == 2


def test_what_was_told_and_not_shown_is_shown_later(directory: Path) -> None:
    with begin(directory) as study:
        study.tell(claim(study).key, make_result())
    assert len(stored(directory)["search"][2]) == 3  # the process was killed before it showed the fourth
    with begin(directory):
        pass
    assert len(stored(directory)["search"][2]) == 4


def test_a_slow_trial_holds_back_those_after_it_so_numbers_are_the_same(directory: Path) -> None:
    with begin(directory) as study:
        slow, quick = claim(study).key, claim(study).key
        study.tell(quick, make_result())
        study.show()
        assert len(stored(directory)["search"][2]) == 3
        study.tell(slow, make_result(0.125))
        study.show()
        assert len(stored(directory)["search"][2]) == 5


@pytest.mark.parametrize("on", ["file", "server"])
def test_what_somebody_deletes_in_a_dashboard_is_written_again(
    tmp_path: Path, on: str, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("database") if on == "server" else f"sqlite:///{tmp_path / 'study.db'}"
    with begin(tmp_path / "run", storage=url) as study:
        study.tell(claim(study).key, make_result())
        study.show()
        storage, name = optuna.storages.RDBStorage(url), f"{study.store.name} comparison"
        optuna.delete_study(study_name=name, storage=storage)
        study.tell(claim(study).key, make_result())
        study.show()
        assert len(optuna.load_study(study_name=name, storage=storage).trials) == 2
        storage.engine.dispose()


def test_a_search_waits_for_another_program_that_writes_into_its_file(directory: Path) -> None:
    with begin(directory) as study, closing(sqlite3.connect(directory / "study.db", check_same_thread=False)) as other:
        study.tell(claim(study).key, make_result())
        other.execute("BEGIN IMMEDIATE")
        end = threading.Timer(0.3, other.commit)
        end.start()
        study.show()
        end.join()
    assert len(stored(directory)["search"][2]) == 4


def test_a_dashboard_shows_the_errors_of_depth(tmp_path: Path) -> None:
    with begin(tmp_path / "run", task=Depth(1.0)) as study:
        scores = Scores(0.5, (1.5, 0.25, 0.75, None))
        result = replace(make_result(), scores=scores)
        study.tell(claim(study).key, result)
        study.show()
        assert load_run(tmp_path / "run").baselines[0].result == result
    _, metrics, trials = stored(tmp_path / "run")["comparison"]
    assert metrics == ["δ<1.25"]
    assert trials[0]["RMSE m"] == 1.5


def earlier_run(directory: Path, original: Path, *, attributes: str) -> Run:
    """Turn a folder into one that an earlier version left: all of it in Optuna's studies, in user or system attributes."""
    shutil.copytree(original, directory)
    run, name = load_run(original), json.loads((original / "settings.json").read_text())["id"]
    (directory / "study.db").unlink()
    storage = optuna.storages.RDBStorage(f"sqlite:///{directory / 'study.db'}")
    search, comparison = (
        optuna.create_study(study_name=f"{name} {part}", storage=storage, direction="maximize")
        for part in ("search", "comparison")
    )

    def write(study: optuna.Study, number: int, shown: dict[str, Any], whole: dict[str, Any]) -> None:
        trial_id = storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
        for key, value in (shown | (whole if attributes == "user" else {})).items():
            storage.set_trial_user_attr(trial_id, key, value)
        for key, value in ({} if attributes == "user" else whole).items():
            storage.set_trial_system_attr(trial_id, key, value)

    for record in run.trials:
        trial = search.ask(distributions_of(SPACE)) if record.failure else search.ask()
        shown: dict[str, Any] = {"cell": str(record.cell)} | ({"failure": record.failure} if record.failure else {})
        whole: dict[str, Any] = {"cell": json.loads(record.cell.to_json())}
        if record.result:
            whole["result"] = asdict(replace(record.result, loss_curve=run.curve(record)))
        write(search, trial.number, shown, whole)
        search.tell(trial.number, record.score, state=TrialState.FAIL if record.failure else TrialState.COMPLETE)
    search.enqueue_trial(params_of_cell(SPACE.sample(np.random.default_rng(5)), SPACE))
    search.ask(distributions_of(SPACE))  # interrupted
    search.ask()  # killed before it had a cell
    for baseline in run.baselines:
        whole = {"cell": json.loads(baseline.cell.to_json()), "result": asdict(baseline.result)}
        number = comparison.ask().number
        write(comparison, number, {"name": baseline.name, "seed": baseline.seed}, whole)
        comparison.tell(number, baseline.result.score)
    comparison.ask()
    storage.engine.dispose()
    return run


@pytest.mark.parametrize("attributes", ["user", "system"])
def test_a_run_of_an_earlier_version_is_read_and_goes_on(original: Path, tmp_path: Path, attributes: str) -> None:
    run = earlier_run(tmp_path / "run", original, attributes=attributes)
    interrupted = SPACE.sample(np.random.default_rng(5))
    for _ in range(2):  # as it is, and once it is taken over
        read = load_run(tmp_path / "run")
        assert (read.trials, read.baselines) == (run.trials, run.baselines)
        assert [read.curve(record) for record in read.trials] == [run.curve(record) for record in run.trials]
        with begin(tmp_path / "run") as study:
            claimed = known(study.store.claim(replace(PLAN, compare={}), SPACE, create_sampler("paper", SPACE, 0)))
            assert claimed[:3] == (Key(SEARCH, 3), interrupted, True)
            assert study.store.state.next == 4
    assert len(stored(tmp_path / "run")["search"][2]) == 3


def test_a_run_of_an_earlier_version_whose_takeover_was_interrupted_is_shown_as_any_other(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier_run(tmp_path / "run", original, attributes="system")
    with monkeypatch.context() as patched:
        patched.setattr(Store, "_register", None)  # killed once the store had all, and Optuna's studies were there
        with pytest.raises(TypeError):
            begin(tmp_path / "run").__enter__()
    with begin(tmp_path / "run"):
        pass
    shown = stored(original)
    assert stored(tmp_path / "run")["search"] == shown["search"]
    assert stored(tmp_path / "run")["comparison"][2] == shown["comparison"][2][:1]  # the other one has failed, with no result


def test_processes_may_begin_at_the_same_moment(tmp_path: Path, database: str) -> None:
    """In folders of their own, as on machines that share none."""
    moment = threading.Barrier(3)

    def work(machine: int) -> tuple[str, Key]:
        moment.wait()
        with begin(tmp_path / f"{machine}" / "run", storage=database) as study:
            claimed = study.store.name, claim(study).key
            moment.wait()
            return claimed

    with ThreadPoolExecutor(3) as threads:
        claimed = list(threads.map(work, range(3)))
    assert len(set(claimed)) == 3
    assert {name for name, _ in claimed} == {"run"}


def test_a_run_can_be_read_while_it_is_written(directory: Path) -> None:
    with begin(directory) as study:
        assert len(load_run(directory).trials) == 3
        study.tell(claim(study).key, make_result())
        assert len(load_run(directory).trials) == 4


def test_an_interrupted_job_comes_back_as_itself(directory: Path) -> None:
    def interrupted() -> Claim:
        with begin(directory) as study:
            return claim(study)

    before = interrupted()
    assert before.key == Key(SEARCH, 3)
    assert interrupted() == before


def test_heads_are_of_the_best_trial_and_of_seed_0(tmp_path: Path) -> None:
    heads: dict[str, bytes] = {}
    with begin(tmp_path / "run") as study:
        for score, head in ((0.5, "dpc 0"), (0.5, "dpc 1"), (0.2, "first"), (0.6, "best"), (0.6, "as good"), (0.1, "bad")):
            study.tell(claim(study).key, make_result(score), head)  # type: ignore[arg-type]
            study.show()
            heads = {path.name: path.read_bytes() for path in (tmp_path / "run" / "heads").iterdir()}
    assert heads == {"dpc_seed0.safetensors": b"dpc 0", "best.safetensors": b"best"}


def test_a_head_whose_file_is_lost_is_written_again(directory: Path) -> None:
    with begin(directory) as study:
        study.tell(claim(study).key, make_result(0.9), "a head")  # type: ignore[arg-type]
    assert not (directory / "heads").exists()  # killed before it was written
    with begin(directory):
        assert best_head(directory).read_bytes() == b"a head"


def test_ranked_is_best_first_without_duplicates_and_failures() -> None:
    scores = [0.2, None, 0.9, 0.5, 0.9]
    cells = [Cell((Branch(-1, operation), Branch(-1, Conv1x1()))) for operation in OPERATIONS[1:6]]
    records = [
        TrialRecord.of(i, cell, None if score is None else make_result(score), None, None)
        for i, (cell, score) in enumerate(zip(cells, scores, strict=True))
    ]
    records.append(TrialRecord.of(5, cells[2], make_result(0.9), None, duplicate_of=2))
    same = Cell(cells[0].branches[::-1])  # as two workers may score it at the same time
    records.append(TrialRecord.of(6, same, make_result(0.95), None, None))
    assert [record.number for record in ranked(records)] == [2, 4, 3, 0]


def test_a_moved_run_goes_on(directory: Path, tmp_path: Path) -> None:
    before = load_run(directory)
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "run"
    os.rename(directory, moved)
    assert load_run(moved).trials == before.trials
    with begin(moved) as study:
        assert study.store.state.num_finished == len(before.trials)
    assert not directory.exists()


def test_another_storage_is_kept_in_the_settings(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'other.db'}"
    with begin(tmp_path / "run", storage=url) as study:
        study.tell(claim(study).key, make_result())
    assert not (tmp_path / "run" / "study.db").exists()
    assert len(load_run(tmp_path / "run").baselines) == 1


# Refusals


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("iterations", 20, "`iterations` 10"),
        ("learning_rate", 0.2, "`learning_rate` 0.1"),
        ("crop_size", [33, 33], "`crop_size` None"),
    ],
)
def test_other_settings_are_refused_by_flag(directory: Path, field: str, value: object, flag: str) -> None:
    settings = (directory / "settings.json").read_bytes()
    remedy = r"use the same values \(python -m search.random .*\), give another `out`, or delete"
    with pytest.raises(InputError, match=f"was started with {flag}, now it is .*: {remedy}"):
        begin(directory, {field: value}).__enter__()
    assert (directory / "settings.json").read_bytes() == settings


def test_all_other_settings_are_named_at_once(directory: Path) -> None:
    with pytest.raises(InputError, match=r"`iterations` 10, now it is 20, and `learning_rate` 0\.1, now it is 0\.2: "):
        begin(directory, {"iterations": 20, "learning_rate": 0.2}).__enter__()


def test_a_folder_is_not_begun_by_what_is_refused(tmp_path: Path, database: str) -> None:
    with begin(tmp_path / "here" / "run", storage=database):
        pass
    for storage, changes in ((f"{database}x", {}), (database, {"iterations": 20})):
        with pytest.raises(InputError, match=r"cannot be used|was started with `iterations` 10, now it is 20"):
            begin(tmp_path / "elsewhere" / "run", dict[str, object](changes), storage=storage).__enter__()
    with begin(tmp_path / "elsewhere" / "run", storage=database):
        pass


def test_no_password_is_said(tmp_path: Path) -> None:
    url = "postgresql+psycopg://me:secret@127.0.0.1:1/name"
    with pytest.raises(InputError, match=r"the study postgresql\+psycopg://me:\*\*\*@127") as caught:
        begin(tmp_path / "run", storage=url).__enter__()
    assert "secret" not in str(caught.value)


def test_a_second_process_is_refused(directory: Path) -> None:
    with (
        begin(directory),
        pytest.raises(InputError, match="is in use by another process: wait for it, or give another `out`"),
    ):
        begin(directory).__enter__()
    with begin(directory):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", "null", '"text"'])
@pytest.mark.parametrize("open_it", [load_run, lambda path: begin(path).__enter__()], ids=["load_run", "open_run"])
def test_damaged_settings_are_refused_by_name(directory: Path, text: str, open_it: Callable[[Path], object]) -> None:
    (directory / "settings.json").write_text(text)
    with pytest.raises(InputError, match=rf"{directory}/settings\.json is damaged \(.*\): delete the run"):
        open_it(directory)
    assert (directory / "settings.json").read_text() == text


@pytest.mark.parametrize("open_it", [load_run, lambda path: begin(path).__enter__()], ids=["load_run", "open_run"])
def test_a_damaged_study_is_refused_by_name(directory: Path, open_it: Callable[[Path], object]) -> None:
    (directory / "study.db").write_bytes(b"no database" * 1000)
    with pytest.raises(InputError, match=r"the study .*cannot be (used|read)") as caught:
        open_it(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["class_names", "command"])
def test_settings_without_a_field_are_refused_by_name(directory: Path, field: str) -> None:
    path = directory / "settings.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != field}))
    with pytest.raises(InputError, match=rf"settings\.json is damaged \('{field}'\)"):
        load_run(directory)


def test_a_run_without_its_id_is_refused_and_not_begun_anew(directory: Path) -> None:
    path = directory / "settings.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "id"}))
    with pytest.raises(InputError, match=r"settings\.json is damaged \('id'\): delete the run"):
        begin(directory).__enter__()


def test_a_run_without_its_study_is_refused_and_none_is_made(directory: Path) -> None:
    (directory / "study.db").unlink()
    with pytest.raises(InputError, match=r"the study of .* is not at .*study\.db: copy that file too"):
        load_run(directory)
    assert not (directory / "study.db").exists()


def test_the_study_of_another_run_is_refused(directory: Path) -> None:
    path = directory / "settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id": "another"}))
    with pytest.raises(InputError, match=r"the study of .* cannot be read"):
        load_run(directory)


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a run \(no settings\.json\)"):
        load_run(tmp_path)
    with pytest.raises(InputError, match="is not a run"):
        load_run(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot write .*give another `out`"):
        begin(tmp_path / "file").__enter__()


def test_settings_are_plain_json(directory: Path) -> None:
    assert json.loads((directory / "settings.json").read_text())["identity"] == IDENTITY


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    "use",
    [
        lambda study: study.claim(PLAN),
        lambda study: study.tell(Key(SEARCH, 3), make_result()),
        lambda study: study.tell_failure(Key(SEARCH, 3), "no reason"),
        Study.show,
    ],
    ids=["claim", "tell", "tell failure", "show"],
)
def test_the_database_comes_to_its_end_before_ctrl_c(
    use: Callable[[Study], object], original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLAlchemy prints tracebacks of its own where it is interrupted between its lines."""
    shutil.copytree(original, tmp_path / "run")
    survived: list[str] = []

    def pressing(function: Callable[..., Any]) -> Callable[..., Any]:
        def press(*arguments: Any, **named: Any) -> Any:
            if not survived:
                signal.raise_signal(signal.SIGINT)
            survived.append(function.__name__)
            return function(*arguments, **named)

        return press

    with begin(tmp_path / "run") as study:
        monkeypatch.setattr(Store, "_sync", pressing(Store._sync))
        monkeypatch.setattr(Reader, "finished", pressing(Reader.finished))
        with pytest.raises(KeyboardInterrupt):
            use(study)
    assert survived
