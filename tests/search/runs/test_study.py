"""A run on disk: what is told is kept, what is interrupted is done again, and what cannot go on is refused by name."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

import search.runs.study
from reference.cell import OPERATIONS, Branch, Cell, Conv1x1
from search.cells.sampler import suggest_cell
from search.cells.samplers import create_sampler
from search.cells.space import SearchSpace, load_cell
from search.dense_tasks import DenseTask, Scores
from search.dense_tasks.depth import Depth
from search.dense_tasks.segmentation import Segmentation
from search.errors import InputError
from search.runs.study import RunSettings, Study, TrialRecord, load_run, open_run, ranked
from search.settings import BackboneSettings, DataSettings, FeatureSettings, HeadSettings, MachineSettings
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
    sampler = create_sampler("paper", SPACE, 0)
    names = ("sky", "road", "tree")
    return open_run(
        directory,
        IDENTITY | (changes or {}),
        sampler,
        storage=storage,
        command=command,
        task=task or Segmentation(names, palette),
        settings=SETTINGS,
        space=SPACE,
        defaults={},
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("original") / "run"
    with begin(directory) as study:
        for number in range(4):
            trial = study.search.ask()
            assert trial.number == number
            cell = suggest_cell(trial, SPACE)
            if number == 0:
                study.tell(study.search, 0, cell, make_result(0.25))
            elif number == 1:
                study.tell_failure(1, cell, "the loss was nan")
            elif number == 2:
                study.tell(study.search, 2, cell, make_result(0.25), duplicate_of=0)
        study.tell(study.comparison, study.comparison.ask().number, CELL, make_result(0.75), name="dpc", seed=3)
        study.comparison.ask()
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
    outcomes = [(record.number, record.result, record.failure, record.duplicate_of) for record in run.trials]
    assert outcomes == [
        (0, make_result(0.25), None, None),
        (1, None, "the loss was nan", None),
        (2, make_result(0.25), None, 0),
    ]
    assert [(b.name, b.seed, b.cell, b.result) for b in run.baselines] == [("dpc", 3, CELL, make_result(0.75))]


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
    assert trials == [
        {"cell": proposed[0]} | cost,
        {"cell": proposed[1], "failure": "the loss was nan"},
        {"cell": proposed[2], "duplicate_of": 0} | cost,
        {},
    ]
    _, metrics, trials = found["comparison"]
    assert metrics == ["mIOU"]
    assert trials == [{"name": "dpc", "seed": 3, "cell": str(CELL)} | cost, {}]


def test_a_dashboard_shows_the_errors_of_depth(tmp_path: Path) -> None:
    with begin(tmp_path / "run", task=Depth(1.0)) as study:
        scores = Scores(0.5, (1.5, 0.25, 0.75, None))
        result = replace(make_result(), scores=scores)
        study.tell(study.comparison, study.comparison.ask().number, CELL, result, name="dpc", seed=0)
        assert study.baselines()[0].result == result
    _, metrics, trials = stored(tmp_path / "run")["comparison"]
    assert metrics == ["δ<1.25"]
    assert trials[0]["RMSE m"] == 1.5


def test_a_run_whose_results_are_user_attributes_goes_on(tmp_path: Path) -> None:
    """Those of earlier versions, whose studies had no metric names."""
    content = {"cell": json.loads(CELL.to_json()), "result": asdict(make_result(0.75))}
    with begin(tmp_path / "run") as study:
        for kind, names in ((study.search, {}), (study.comparison, {"name": "dpc", "seed": 3})):
            number = kind.ask().number
            study._set_attributes(kind, number, names | content)
            kind.tell(number, 0.75)
            study._storage.set_study_system_attr(kind._study_id, "study:metric_names", None)
    before = load_run(tmp_path / "run")
    assert [(record.cell, record.result) for record in before.trials] == [(CELL, make_result(0.75))]
    assert [(b.name, b.seed, b.cell, b.result) for b in before.baselines] == [("dpc", 3, CELL, make_result(0.75))]
    with begin(tmp_path / "run") as study:
        assert study.records() == before.trials
        assert study.compared("dpc") == {3}
    assert stored(tmp_path / "run")["search"][1] == ["mIOU"]


def test_a_run_can_be_read_while_it_is_written(directory: Path) -> None:
    with begin(directory) as study:
        assert len(load_run(directory).trials) == 3
        (trial,) = study.unfinished()
        study.tell(study.search, trial.number, suggest_cell(trial, SPACE), make_result())
        assert len(load_run(directory).trials) == 4


def test_an_interrupted_trial_comes_back_as_itself(directory: Path) -> None:
    def unfinished() -> list[Any]:
        with begin(directory) as study:
            return [(trial.number, suggest_cell(trial, SPACE)) for trial in study.unfinished()]

    before = unfinished()
    assert [number for number, _ in before] == [3]
    assert unfinished() == before
    with begin(directory) as study:
        assert study.search.ask().number == 4


def test_an_unfinished_comparison_is_closed(directory: Path) -> None:
    with begin(directory) as study:
        study.discard_unfinished_comparisons()
        states = [trial.state.name for trial in study.comparison.get_trials()]
        assert states == ["COMPLETE", "FAIL"]
        assert len(study.baselines()) == 1


@pytest.mark.parametrize("is_failure", [False, True])
def test_a_failed_comparison_is_final_and_an_interrupted_one_is_not(directory: Path, is_failure: bool) -> None:
    with begin(directory) as study:
        number = study.comparison.ask().number
        if is_failure:
            study.tell_comparison_failure(number, "aspp", 0, "the loss was nan")
        else:  # killed between writing and telling
            study._set_attributes(study.comparison, number, {"name": "aspp", "seed": 0, "result": {}})
    with begin(directory) as study:
        study.discard_unfinished_comparisons()
        assert study.compared("aspp") == ({0} if is_failure else set())
        assert study.compared("dpc") == {3}
        assert [record.name for record in study.baselines()] == ["dpc"]


def test_ranked_is_best_first_without_duplicates_and_failures() -> None:
    scores = [0.2, None, 0.9, 0.5, 0.9]
    cells = [Cell((Branch(-1, operation), Branch(-1, Conv1x1()))) for operation in OPERATIONS[1:6]]
    records = [
        TrialRecord(i, cell, None if score is None else make_result(score), None, None)
        for i, (cell, score) in enumerate(zip(cells, scores, strict=True))
    ]
    records.append(TrialRecord(5, cells[2], make_result(0.9), None, duplicate_of=2))
    same = Cell(cells[0].branches[::-1])  # as two workers may score it at the same time
    records.append(TrialRecord(6, same, make_result(0.95), None, None))
    assert [record.number for record in ranked(records)] == [2, 4, 3, 0]


def test_a_moved_run_goes_on(directory: Path, tmp_path: Path) -> None:
    before = load_run(directory)
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "run"
    os.rename(directory, moved)
    assert load_run(moved).trials == before.trials
    with begin(moved) as study:
        assert study.records() == before.trials
    assert not directory.exists()


def test_another_storage_is_kept_in_the_settings(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'other.db'}"
    with begin(tmp_path / "run", storage=url) as study:
        study.tell(study.comparison, study.comparison.ask().number, CELL, make_result(), name="dpc", seed=0)
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
        Study.unfinished,
        Study.discard_unfinished_comparisons,
        Study.records,
        Study.baselines,
        lambda study: study.compared("dpc"),
        lambda study: study.tell(study.search, 3, CELL, make_result()),
        lambda study: study.tell_failure(3, CELL, "no reason"),
        lambda study: study.tell_comparison_failure(1, "dpc", 0, "no reason"),
    ],
    ids=["unfinished", "discard", "records", "baselines", "compared", "tell", "tell failure", "tell comparison failure"],
)
def test_the_database_comes_to_its_end_before_ctrl_c(
    use: Callable[[Study], object], original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLAlchemy prints tracebacks of its own where it is interrupted between its lines."""
    shutil.copytree(original, tmp_path / "run")
    survived: list[str] = []

    def pressing(function: Callable[..., Any]) -> Callable[..., Any]:
        def press(*arguments: Any) -> Any:
            if not survived:
                signal.raise_signal(signal.SIGINT)
            survived.append(function.__name__)
            return function(*arguments)

        return press

    with begin(tmp_path / "run") as study:
        monkeypatch.setattr(search.runs.study, "_with_state", pressing(search.runs.study._with_state))
        monkeypatch.setattr(Study, "_set_attributes", pressing(Study._set_attributes))
        with pytest.raises(KeyboardInterrupt):
            use(study)
    assert survived
