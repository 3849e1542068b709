"""All of the tuner but the measuring itself: without a GPU, and with times that are made up."""

import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this system")

from bench import kernel_calls, launch_trial, tune
from bench.kernel_calls import Inputs, calls_of
from bench.launch_trial import SHARED_BYTES, Comparison
from bench.tune import BETTER, CHOICES, FAILED, NO_FIT, NOT_BETTER, WRONG, Compilers, Entry, Examiner, Journal, Trial
from bench.worker import OutOfTime, Worker, WorkerLost
from fast.kernels import triton as triton_backend
from fast.kernels.triton import batch_norm
from fast.kernels.triton.launches import DEFAULT, Key, Launch, Table
from search.reports.turns import Summary

ROOT = Path(__file__).parents[2]
KEY: Key = ("depthwise_forward", 2, "small")
FOLD: Key = ("fold", 4, "small")
SPILLING = Launch(16384, 0, 0, 16, 1)  # of mean_loss: 32 float64 and as many int64 for each thread


class MadeUpTimes:
    """Examines as a GPU would whose time grows with the distance from `quickest`."""

    def __init__(self, quickest: Launch, wrong: tuple[Launch, ...] = ()) -> None:
        self.quickest, self.wrong, self.examined = quickest, wrong, list[Launch]()

    def microseconds(self, launch: Launch) -> float:
        return 10.0 + sum(abs(math.log2(a / b)) for a, b in zip(launch, self.quickest, strict=True) if a != b)

    def __call__(self, key: Key, best: Launch, left: list[Launch]) -> Trial:
        candidate = left[0]
        self.examined.append(candidate)
        if candidate in self.wrong:
            return Trial(key, candidate, WRONG)
        before, after = self.microseconds(best), self.microseconds(candidate)
        return Trial(key, candidate, BETTER if after < before else NOT_BETTER, before, after)


def search(journal: Journal, examine: Any, is_over: Callable[[], bool] = lambda: False, known: Table | None = None) -> bool:
    return tune.search(KEY, journal, examine, changes=1, is_over=is_over, known=known or {})


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "trials.jsonl", "a GPU")


def test_the_best_is_found_step_by_step(journal: Journal) -> None:
    times = MadeUpTimes(quickest=Launch(128, 16, 0, 8, 1))
    assert search(journal, times)
    assert journal.best(KEY) == times.quickest
    assert len(set(times.examined)) == len(times.examined)  # none twice
    first = times.examined[0]
    assert sum(a != b for a, b in zip(first, DEFAULT[KEY], strict=True)) == 1


def test_neither_wrong_nor_slower_launches_are_taken(journal: Journal) -> None:
    quickest = Launch(64, 64, 0, 4, 1)
    times = MadeUpTimes(quickest, wrong=(quickest,))
    assert search(journal, times)
    assert quickest in times.examined
    assert journal.best(KEY) == DEFAULT[KEY]
    assert all(trial.us is None for trial in journal.trials if trial.verdict == WRONG)


def test_an_earlier_file_is_tried_first(journal: Journal) -> None:
    times = MadeUpTimes(quickest=Launch(128, 16, 0, 8, 1))
    assert search(journal, times, known={KEY: Launch(128, 16, 0, 8, 1)})
    assert times.examined[0] == times.quickest == journal.best(KEY)


def test_search_stops_in_time_and_goes_on_where_it_was(tmp_path: Path) -> None:
    path, times = tmp_path / "trials.jsonl", MadeUpTimes(quickest=Launch(128, 16, 0, 8, 1))
    assert not search(Journal(path, "a GPU"), times, is_over=lambda: len(times.examined) == 5)
    assert len(times.examined) == 5
    with path.open("a") as file:
        file.write('["a GPU", ["depthwise_f')  # the machine died while it wrote
    for _ in range(2):
        search(Journal(path, "a GPU"), times)
    assert len(set(times.examined)) == len(times.examined)
    assert Journal(path, "a GPU").best(KEY) == times.quickest
    assert Journal(path, "a GPU with another driver").trials == []


def test_candidates_change_few_fields_first() -> None:
    for key, launch in DEFAULT.items():
        near = tune.candidates(key[0], launch, changes=2)
        changed = [sum(a != b for a, b in zip(launch, candidate, strict=True)) for candidate in near]
        assert changed == sorted(changed)
        assert set(changed) == {1, 2}
        assert set(CHOICES[key[0]]) <= {field for field, value in launch._asdict().items() if value}


def test_every_line_of_the_table_is_tuned_what_matters_first() -> None:
    keys = tune.keys_of(list(CHOICES))
    assert sorted(keys) == sorted(DEFAULT)
    assert keys[0] == ("depthwise_backward", 2, "small")


class Lookups(dict[Key, Launch]):
    """A launch table that knows what was taken from it."""

    def __init__(self) -> None:
        super().__init__(DEFAULT)
        self.keys_taken: set[Key] = set()

    def __getitem__(self, key: Key) -> Launch:
        self.keys_taken.add(key)
        return super().__getitem__(key)


@pytest.mark.parametrize("key", DEFAULT, ids=lambda key: "-".join(map(str, key)))
def test_calls_are_launched_by_the_line_that_they_decide(key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    with launch_trial.launched_by(mock.Mock()):
        for call in calls_of(key, Inputs(torch.device("cpu"), drawn=False)):
            monkeypatch.setattr(triton_backend, "table_for", mock.Mock(return_value=(table := Lookups())))
            call.prepare()()
            taken.append(key in table.keys_taken)
    assert taken
    assert all(taken) or key == ("sum_partials", 4, "large")  # the classifier's weight is a small sum


@pytest.mark.parametrize(
    ("error", "candidate", "verdict"),
    [
        (0.0, Summary(8.0, 7.9, 8.1), BETTER),
        (0.0, Summary(9.9, 9.5, 10.1), NOT_BETTER),  # within the spread
        (0.0, Summary(12.0, 11.9, 12.1), NOT_BETTER),
        (2e-2, Summary(1.0, 1.0, 1.0), WRONG),
        (math.inf, Summary(1.0, 1.0, 1.0), WRONG),
        (math.nan, Summary(1.0, 1.0, 1.0), WRONG),
    ],
)
def test_verdicts(error: float, candidate: Summary, verdict: str) -> None:
    comparison = Comparison(error, 1e-2, Summary(10.0, 9.9, 10.2), candidate)
    assert tune.judged(KEY, Launch(1, 1, 1, 1, 1), comparison).verdict == verdict


def test_what_spills_or_does_not_fit_never_reaches_the_gpu() -> None:
    for usage, note in (({"stack": 8, "local": 0, "shared": 0}, "spills"), ({"shared": 300_000}, "shared memory")):
        compilers = mock.Mock(**{"usage.return_value": usage})
        with mock.patch.object(tune, "Worker") as worker, Examiner(compilers, "cuda:0", SHARED_BYTES[90], math.inf) as examine:
            trial = examine(KEY, DEFAULT[KEY], [Launch(64, 64, 0, 4, 1)])
        assert trial.verdict == NO_FIT
        assert note in trial.note
        assert not worker.return_value.called


def test_a_candidate_that_breaks_the_gpu_costs_only_itself() -> None:
    compilers = mock.Mock(**{"usage.return_value": {"shared": 0}})
    right = Comparison(0.0, 1.0, Summary(2.0, 2.0, 2.0), Summary(1.0, 1.0, 1.0))
    worker = mock.Mock(side_effect=[WorkerLost("illegal address"), right])
    with mock.patch.object(tune, "Worker", return_value=worker):
        examine = Examiner(compilers, "cuda:0", SHARED_BYTES[90], math.inf)
        trial = examine(KEY, DEFAULT[KEY], [Launch(64, 64, 0, 4, 1)])
        assert (trial.verdict, trial.note) == (FAILED, "illegal address")
        assert examine(KEY, DEFAULT[KEY], [Launch(16, 64, 0, 4, 1)]).verdict == BETTER


@pytest.mark.parametrize("during", ["compilation", "comparison"])
def test_the_end_of_the_time_is_no_verdict(journal: Journal, during: str) -> None:
    """The candidate stays untried, so that the same command begins with it."""
    compilers = mock.Mock(**{"usage.return_value": {"shared": 0}})
    if during == "compilation":
        compilers.usage.side_effect = TimeoutError
    late = mock.Mock(side_effect=OutOfTime("stopped after 0 s"))
    with mock.patch.object(tune, "Worker", return_value=late):
        examine = Examiner(compilers, "cuda:0", SHARED_BYTES[90], end=0.0)
        assert not search(journal, examine)
    assert journal.trials == []


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment in which kernels are compiled, into the folder that is returned."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_launches_are_compiled_for_an_absent_gpu_and_spilling_ones_dropped(compiling: Path) -> None:
    with Compilers(90, processes=1) as compilers:
        fold = compilers.usage(FOLD, DEFAULT[FOLD])
        wider = compilers.usage(FOLD, Launch(512, 8, 0, 8, 1))
        spilling = compilers.usage(("mean_loss", 4, "small"), SPILLING)
    assert tune.why_not(fold, SHARED_BYTES[90]) == tune.why_not(wider, SHARED_BYTES[90]) == ""
    assert (fold["warps"], wider["warps"]) == (4, 8)
    if "stack" in spilling:  # else this build of Triton comes without cuobjdump
        assert "spills" in tune.why_not(spilling, SHARED_BYTES[90])


REAL_LAUNCH = """
import torch
from bench.kernel_calls import Inputs, calls_of
from fast.kernels.triton.compilation import choose_absent_gpu

choose_absent_gpu(90)
for call in calls_of(("depthwise_forward", 2, "small"), Inputs(torch.device("cpu"), drawn=False)):
    try:
        call.prepare()()
    except AttributeError:  # compiled or found, but an absent GPU can load nothing
        print("at the GPU")
"""


def test_a_real_launch_finds_what_was_compiled_ahead(compiling: Path) -> None:
    with Worker() as worker:
        worker(launch_trial.compiled, KEY, Launch(64, 32, 0, 4, 1), 90)
        other = set(compiling.iterdir())
        worker(launch_trial.compiled, KEY, DEFAULT[KEY], 90)
    before = set(compiling.iterdir())
    assert len(before) > len(other) > 0
    result = subprocess.run([sys.executable, "-c", REAL_LAUNCH], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.split("\n")[0] == "at the GPU", result.stderr
    assert set(compiling.iterdir()) == before


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tiny calls on the CPU, timed by a clock that stands still; the names of all kernels that run."""
    if not type(batch_norm.fold_kernel).__name__.startswith("Interpreted"):
        pytest.skip("Triton was imported without its interpreter")
    if np.lib.NumpyVersion(version("triton")) < "3.7.0" and np.lib.NumpyVersion(np.__version__) >= "2.5.0.dev0":
        pytest.skip("Triton 3.6's interpreter needs NumPy below 2.5")
    monkeypatch.setattr(kernel_calls, "MAP_SIZES", {"small": (1, 3, 2), "large": (1, 3, 2)})
    monkeypatch.setattr(kernel_calls, "LABEL_SIZE", (9, 7))
    monkeypatch.setattr(kernel_calls, "CHANNELS", 24)
    monkeypatch.setattr(kernel_calls, "PRODUCTS", ((1, 24, 5), (2, 24, 1), (1, 19, 1)))
    monkeypatch.setattr(launch_trial, "ROUNDS", 2)
    monkeypatch.setattr(launch_trial, "CacheFlush", mock.Mock())
    for name in ("set_device", "synchronize", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, mock.Mock())
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: mock.Mock(**{"elapsed_time.return_value": 0.5}))
    launch, ran = triton_backend._launch, list[str]()

    def noted(kernel: Any, *arguments: Any, **constants: Any) -> None:
        ran.append(kernel.fn.__name__)
        launch(kernel, *arguments, **constants)

    monkeypatch.setattr(triton_backend, "_launch", noted)
    launch_trial._prepared.cache_clear()
    return ran


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a kernel that is timed alone reads what no other has written
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # Triton 3.6's
@pytest.mark.parametrize("key", [key for key in DEFAULT if key[1] == 4 and key[2] == "small"], ids=lambda key: key[0])
def test_comparison_accepts_another_tiling_and_finds_what_is_missing(
    key: Key, interpreted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counted launch's results are finite in every call, or nothing would be accepted."""
    candidate = tune.candidates(key[0], DEFAULT[key], changes=1)[0]
    comparison = launch_trial.compared(key, DEFAULT[key], candidate, "cpu")
    assert comparison.error <= comparison.limit
    assert comparison.best.median % 500 == 0 < comparison.best.median  # microseconds, as often as an iteration has the calls
    launch, empty = triton_backend._launch, torch.empty

    def launch_all_but_the_last(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        is_own = kernel.fn.__name__ == f"{key[0]}_kernel"
        launch(kernel, programs - 1 if is_own else programs, *arguments, **constants)

    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: empty(*sizes, **options).fill_(77))
    monkeypatch.setattr(triton_backend, "_launch", launch_all_but_the_last)
    wrong = launch_trial.compared(key, DEFAULT[key], candidate, "cpu")
    assert not wrong.error <= wrong.limit


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Conversion of an array with ndim > 0:DeprecationWarning")
def test_a_kernel_is_timed_with_what_adds_up_its_partial_sums(interpreted: list[str]) -> None:
    key: Key = ("pointwise_input_gradient", 4, "small")
    table = dict(DEFAULT)
    call = calls_of(key, Inputs(torch.device("cpu"), drawn=True))[0].prepare()
    launch_trial._microseconds(key, call, table, [DEFAULT[key]], torch.device("cpu"))
    assert interpreted == 3 * ["pointwise_input_gradient_kernel", "sum_partials_kernel"]  # no other sum, no weight's gradient


def table_text(journal: Journal, earlier: dict[Key, Entry] | None = None) -> str:
    command = "python bench/tune.py --minutes 4 --kernels " + " ".join(CHOICES)
    return tune.table_text("NVIDIA H200", "torch 2.11.0, Triton 3.6.0", command, "2026-11-30", journal, earlier or {})


def test_the_written_file_holds_what_was_better(journal: Journal, tmp_path: Path) -> None:
    weight: Key = ("pointwise_weight_gradient", 2, "small")
    journal.add(Trial(weight, Launch(64, 128, 32, 8, 3, 264), BETTER, 20.0, 18.0))
    journal.add(Trial(weight, Launch(64, 128, 32, 8, 3, 528), BETTER, 18.5, 17.0))
    journal.add(Trial(KEY, Launch(64, 64, 0, 4, 1), NOT_BETTER, 10.0, 11.0))
    fold, slower = Launch(512, 8, 0, 4, 1), Launch(64, 64, 0, 4, 1)
    earlier = {
        FOLD: Entry(fold, '    ("fold", 4, "small"): Launch(512, 8, 0, 4, 1),  # 5.00 -> 4.00 us'),
        KEY: Entry(slower, ""),
    }
    path = tmp_path / "nvidia_h200.py"
    path.write_text(table_text(journal, earlier))
    names: dict[str, Any] = {}
    exec(path.read_text(), names)
    assert names["LAUNCHES"] == {weight: Launch(64, 128, 32, 8, 3, 528), FOLD: fold}
    assert "# 20.00 -> 17.00 us" in path.read_text()
    assert {key: entry.launch for key, entry in tune.entries_of(path).items()} == names["LAUNCHES"]
    assert table_text(journal, earlier) == path.read_text()  # the same each time


@pytest.mark.parametrize("is_empty", [True, False])
def test_the_written_file_has_the_form_of_all_others(is_empty: bool, journal: Journal, tmp_path: Path) -> None:
    pytest.importorskip("ruff")
    if not is_empty:
        journal.add(Trial(KEY, Launch(64, 64, 0, 4, 1), BETTER, 10.0, 9.0))
    path = tmp_path / "nvidia_h200.py"
    path.write_text(table_text(journal))
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config", str(ROOT / "pyproject.toml"), str(path)]
        result = subprocess.run(ruff, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "is_available", lambda: True)
    monkeypatch.setattr(tune, "resolve_device", lambda device: "cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Example GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: mock.Mock(major=9, minor=0))
    monkeypatch.setattr(tune, "Compilers", mock.MagicMock())
    monkeypatch.setattr(tune, "Worker", mock.MagicMock())


def test_ctrl_c_leaves_what_is_known(pretended_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trials(self: Examiner, key: Key, best: Launch, left: list[Launch]) -> Trial:
        if best != DEFAULT[key]:
            raise KeyboardInterrupt
        return Trial(key, left[0], BETTER, 10.0, 9.0)

    monkeypatch.setattr(Examiner, "__call__", trials)
    out = tmp_path / "table.py"
    with pytest.raises(SystemExit) as exit:
        tune.main(["--kernels", "fold", "--out", str(out)])
    assert exit.value.code == 130
    assert list(tune.entries_of(out)) == [FOLD]
    assert len(out.with_suffix(".jsonl").read_text().splitlines()) == 1


def test_the_limit_ends_it_and_the_rest_is_named(
    pretended_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def trials(self: Examiner, key: Key, best: Launch, left: list[Launch]) -> Trial:
        time.sleep(0.01)
        return Trial(key, left[0], NOT_BETTER, 10.0, 10.0)

    monkeypatch.setattr(Examiner, "__call__", trials)
    start = time.monotonic()
    with pytest.raises(SystemExit) as exit:
        tune.main(["--minutes", "0.01", "--out", str(tmp_path / "table.py")])
    assert exit.value.code == 0
    assert time.monotonic() - start < 10
    assert "not reached with" in capsys.readouterr().out


def test_without_a_gpu_it_says_so() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, "bench/tune.py"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("no GPU that Triton can use")
    assert "--compile-for 90" in result.stderr
    assert result.stderr.count("\n") == 1


def test_needs_no_library_of_flags_or_studies() -> None:
    program = "import sys; sys.modules.update(dict.fromkeys(['tyro', 'optuna', 'sqlalchemy'])); import bench.tune"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_compiling_ahead_fills_the_cache(compiling: Path) -> None:
    command = [sys.executable, "bench/tune.py", "--compile-for", "90", "--kernels", "unfold"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.search(rf"^(\d+) of \1 launches compiled into {compiling}: 0 .*; 0 failed$", result.stdout, re.MULTILINE)
    assert any(compiling.iterdir())


def test_compiling_ahead_stops_in_time(capsys: pytest.CaptureFixture[str], compiling: Path) -> None:
    start = time.monotonic()
    with Compilers(90, processes=1) as compilers:
        tune.compile_ahead(tune.keys_of(list(CHOICES)), compilers, start + 1.0, SHARED_BYTES[90])
    assert time.monotonic() - start < 15
    done, wanted = re.findall(r"(\d+) of (\d+) launches", capsys.readouterr().out)[0]
    assert int(done) < int(wanted)
