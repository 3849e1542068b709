"""All of the tuner but the measuring itself: without a GPU, and with times that are made up."""

import json
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
from bench.kernel_calls import calls_of
from bench.launch_trial import BETTER, COMPILED, FAILED, NO_FIT, NOT_BETTER, WRONG, Trial
from bench.tune import CHOICES, Candidate, Examiner, Journal
from bench.worker import OutOfTime, Worker, WorkerLost
from fast.kernels import triton as triton_backend
from fast.kernels.triton import batch_norm
from fast.kernels.triton.compilation import CUOBJDUMP
from fast.kernels.triton.launches import DEFAULT, Key, Launch, Measured, Table, measured
from search.turns import Summary

ROOT = Path(__file__).parents[2]
KEY: Key = ("depthwise_forward", 2, "small")
FOLD: Key = ("fold", 4, "small")
QUICKEST = DEFAULT[KEY]._replace(block_p=16, block_n=32, warps=8)


class MadeUpTimes:
    """Examines as a GPU would whose time grows with the distance from `quickest`."""

    def __init__(self, quickest: Launch, wrong: tuple[Launch, ...] = ()) -> None:
        self.quickest, self.wrong, self.examined = quickest, wrong, list[Launch]()
        self.stop_at = -1

    def microseconds(self, launch: Launch) -> float:
        return 10.0 + sum(abs(math.log2(a / b)) for a, b in zip(launch, self.quickest, strict=True) if a != b)

    def __call__(self, ahead: list[Candidate], best: Launch) -> Trial:
        key, candidate = ahead[0]
        if len(self.examined) == self.stop_at:
            raise TimeoutError
        self.examined.append(candidate)
        if candidate in self.wrong:
            return Trial(key, candidate, WRONG)
        before, after = self.microseconds(best), self.microseconds(candidate)
        return Trial(key, candidate, BETTER if after < before else NOT_BETTER, before, after)


def search(journal: Journal, examine: Callable[[list[Candidate], Launch], Trial], known: Table | None = None) -> None:
    tune.tune([KEY], journal, examine, known or {})


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "trials.jsonl", "a GPU")


def test_the_best_is_found_step_by_step(journal: Journal) -> None:
    times = MadeUpTimes(quickest=QUICKEST)
    search(journal, times)
    assert journal.best()[KEY] == times.quickest
    assert len(set(times.examined)) == len(times.examined)  # none twice
    first = times.examined[0]
    assert sum(a != b for a, b in zip(first, DEFAULT[KEY], strict=True)) == 1


def test_neither_wrong_nor_slower_launches_are_taken(journal: Journal) -> None:
    quickest = DEFAULT[KEY]._replace(block_p=16)
    wrong = tuple(launch for launch in tune.near(KEY[0], DEFAULT[KEY], 2) if launch.block_p == 16)
    times = MadeUpTimes(quickest, wrong=wrong)
    search(journal, times)
    assert quickest in times.examined
    assert journal.best()[KEY] == DEFAULT[KEY]
    assert all(trial.us == 0 for trial in journal.trials if trial.verdict == WRONG)


def test_an_earlier_file_is_tried_first(journal: Journal) -> None:
    times = MadeUpTimes(quickest=QUICKEST)
    search(journal, times, known={KEY: QUICKEST})
    assert times.examined[0] == times.quickest == journal.best()[KEY]


def test_search_stops_in_time_and_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, times = tmp_path / "trials.jsonl", MadeUpTimes(quickest=QUICKEST)
    times.stop_at = 5
    search(Journal(path, "a GPU"), times)
    assert len(times.examined) == 5
    assert "not reached with 1 changed at once: depthwise_forward 2 small" in capsys.readouterr().out
    times.stop_at = -1
    with path.open("a") as file:
        file.write('["a GPU", ["depthwise_f')  # the machine died while it wrote
    for _ in range(2):
        search(Journal(path, "a GPU"), times)
    assert "not reached" not in capsys.readouterr().out
    assert len(set(times.examined)) == len(times.examined)
    assert Journal(path, "a GPU").best()[KEY] == times.quickest
    assert Journal(path, "a GPU with another driver").trials == []


def test_candidates_change_few_fields_first() -> None:
    for key, launch in DEFAULT.items():
        near = tune.near(key[0], launch, changes=2)
        changed = [sum(a != b for a, b in zip(launch, candidate, strict=True)) for candidate in near]
        assert changed == sorted(changed)
        assert set(changed) == {1, 2}
        assert set(CHOICES[key[0]]) <= {field for field, value in launch._asdict().items() if value}


def test_one_change_of_every_kernel_comes_before_two_of_any(journal: Journal) -> None:
    changed: list[tuple[int, Key]] = []

    def examine(ahead: list[Candidate], best: Launch) -> Trial:
        key, candidate = ahead[0]
        changed.append((sum(a != b for a, b in zip(best, candidate, strict=True)), key))
        return Trial(key, candidate, NOT_BETTER, 10.0, 10.0)

    tune.tune([KEY, FOLD], journal, examine, {})
    assert list(dict.fromkeys(changed)) == [(1, KEY), (1, FOLD), (2, KEY), (2, FOLD)]


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
        for _, call in calls_of(key, "cpu", drawn=False):
            monkeypatch.setattr(triton_backend, "table_for", mock.Mock(return_value=(table := Lookups())))
            call()
            taken.append(key in table.keys_taken)
    assert taken
    assert all(taken) or key == ("sum_partials", 4, "large")  # the classifier's weight is a small sum


@pytest.mark.parametrize(
    ("candidate", "verdict"),
    [
        (Summary(8.0, 7.9, 8.1), BETTER),
        (Summary(9.9, 9.5, 10.1), NOT_BETTER),  # within the spread
        (Summary(12.0, 11.9, 12.1), NOT_BETTER),
    ],
)
def test_only_what_is_quicker_by_more_than_the_spread_is_better(candidate: Summary, verdict: str) -> None:
    assert launch_trial.verdict(Summary(10.0, 9.9, 10.2), candidate) == verdict


@pytest.mark.parametrize(
    ("result", "expected", "is_right"),
    [
        (1.005, 1.0, True),
        (1.02, 1.0, False),
        (math.inf, 1.0, False),
        (math.nan, 1.0, False),
        (1.0, math.nan, False),
        (math.nan, math.nan, False),
    ],
)
def test_wrong_results_are_not_timed(result: float, expected: float, is_right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With right results around it, so that a NaN is not lost among the errors."""
    right, timed = torch.ones(2), mock.Mock(return_value=np.ones((2, 3)))
    prepared = [
        (1, lambda: right, right),
        (1, lambda: (right, None, [torch.tensor([0.5, result])]), (right, None, [torch.tensor([0.5, expected])])),
        (1, lambda: right, right),
    ]
    monkeypatch.setattr(torch.cuda, "set_device", mock.Mock())
    monkeypatch.setattr(launch_trial, "_prepared", lambda key, device: prepared)
    monkeypatch.setattr(launch_trial, "_microseconds", timed)
    trial = launch_trial.compared(KEY, Launch(64, 64, 0, 4, 1), DEFAULT[KEY], "cpu")
    assert trial.verdict == (NOT_BETTER if is_right else WRONG)
    assert timed.called == is_right
    assert "limit 1e-02" in trial.note or is_right


def examining(monkeypatch: pytest.MonkeyPatch, work: Callable[..., Any], seconds: float = 600.0) -> Examiner:
    """An examiner whose processes do this `work` of a function's name instead."""

    def worker(function: Callable[..., Any], *arguments: Any, limit_s: float) -> Any:
        return work(function.__name__)

    monkeypatch.setattr(tune, "Worker", lambda: mock.Mock(side_effect=worker))
    return Examiner(90, time.monotonic() + seconds, "cuda:0")


def test_what_does_not_fit_never_reaches_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    does_not_fit = Trial(KEY, Launch(64, 64, 0, 4, 1), NO_FIT, note="spills")
    work = mock.Mock(return_value=does_not_fit)
    with examining(monkeypatch, work) as examine:
        assert examine([(KEY, does_not_fit.launch)], DEFAULT[KEY]) == does_not_fit
    assert {call.args for call in work.call_args_list} == {("compiled",)}


def test_a_candidate_that_breaks_the_gpu_costs_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Launch(64, 64, 0, 4, 1), Launch(16, 64, 0, 4, 1)
    answers: list[Trial | WorkerLost] = [WorkerLost("illegal address"), better := Trial(KEY, second, BETTER, 2.0, 1.0)]

    def work(name: str) -> Trial:
        answer = Trial(KEY, first, COMPILED) if name == "compiled" else answers.pop(0)
        if isinstance(answer, WorkerLost):
            raise answer
        return answer

    with examining(monkeypatch, work) as examine:
        assert examine([(KEY, first), (KEY, second)], DEFAULT[KEY]) == Trial(KEY, first, FAILED, note="illegal address")
        assert examine([(KEY, second)], DEFAULT[KEY]) == better


@pytest.mark.parametrize("during", ["compiled", "compared"])
def test_the_end_of_the_time_is_no_verdict(journal: Journal, during: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The candidate stays untried, so that the same command begins with it."""
    asked: list[str] = []

    def work(name: str) -> Trial:
        asked.append(name)
        if name == during:
            time.sleep(1.0)
            raise OutOfTime("stopped after 1 s")
        return Trial(KEY, DEFAULT[KEY], COMPILED)

    with examining(monkeypatch, work, seconds=0.5) as examine:
        search(journal, examine)
    assert during in asked
    assert journal.trials == []


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment in which kernels are compiled, into the folder that is returned."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_launches_are_compiled_for_an_absent_gpu_and_spilling_ones_dropped(compiling: Path) -> None:
    wider: Candidate = (FOLD, Launch(512, 8, 0, 8, 1))
    spilling: Candidate = (("mean_loss", 4, "small"), Launch(16384, 0, 0, 16, 1))  # 32 float64 and as many int64 per thread
    with Examiner(90, time.monotonic() + 600) as examine:
        assert examine([wider], DEFAULT[FOLD]) == Trial(*wider, COMPILED)
        trial = examine([spilling], spilling[1])
    metadata = [json.loads(path.read_text()) for path in compiling.glob("*/fold_kernel.json")]
    assert sorted(entry["num_warps"] for entry in metadata) == [DEFAULT[FOLD].warps, 8]
    if CUOBJDUMP.exists():  # else this build of Triton comes without it
        assert trial.verdict == NO_FIT
        assert "spills" in trial.note


def test_what_needs_too_much_shared_memory_does_not_fit() -> None:
    usage = {"stack": 0, "local": 0, "shared": 200_000}
    assert "shared memory" in launch_trial.why_not(usage, 86)
    assert launch_trial.why_not(usage, 90) == launch_trial.why_not(usage, 999) == ""


REAL_LAUNCH = """
from bench.kernel_calls import calls_of
from fast.kernels.triton.compilation import choose_absent_gpu

choose_absent_gpu(90)
for _, call in calls_of(("depthwise_forward", 2, "small"), "cpu", drawn=False):
    try:
        call()
    except AttributeError:  # compiled or found, but an absent GPU can load nothing
        print("at the GPU")
"""


def test_a_real_launch_finds_what_was_compiled_ahead(compiling: Path) -> None:
    with Worker() as worker:
        worker(launch_trial.compiled, KEY, Launch(64, 32, 0, 4, 1), 90)
        assert {path.stem for path in compiling.glob("*/*.cubin")} == {"depthwise_forward_kernel"}
        worker(launch_trial.compiled, KEY, DEFAULT[KEY], 90)
    assert {path.stem for path in compiling.glob("*/*.cubin")} == {"depthwise_forward_kernel", "fold_kernel"}
    before = set(compiling.iterdir())
    result = subprocess.run([sys.executable, "-c", REAL_LAUNCH], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.split("\n")[0] == "at the GPU", result.stderr
    assert set(compiling.iterdir()) == before


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Launch]]:
    """Tiny calls on the CPU, timed by a clock that stands still; all kernels that run, and how they are launched."""
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
    launch_for_real, ran = triton_backend._launch, list[tuple[str, Launch]]()

    def noted(kernel: Any, programs: int, launch: Launch, *arguments: Any, **constants: Any) -> None:
        ran.append((kernel.fn.__name__, launch))
        launch_for_real(kernel, programs, launch, *arguments, **constants)

    monkeypatch.setattr(triton_backend, "_launch", noted)
    launch_trial._prepared.cache_clear()
    return ran


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a kernel that is timed alone reads what no other has written
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # Triton 3.6's
@pytest.mark.parametrize("key", [key for key in DEFAULT if key[1] == 4 and key[2] == "small"], ids=lambda key: key[0])
def test_comparison_accepts_another_tiling_and_finds_what_is_missing(
    key: Key, interpreted: list[tuple[str, Launch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counted launch's results are finite in every call, or nothing would be accepted."""
    candidate = tune.near(key[0], DEFAULT[key], changes=1)[0]
    trial = launch_trial.compared(key, candidate, DEFAULT[key], "cpu")
    assert trial.verdict == NOT_BETTER, trial.note
    assert trial.best_us % 500 == 0 < trial.best_us  # microseconds, as often as an iteration has the calls
    launch, empty, empty_like = triton_backend._launch, torch.empty, torch.empty_like

    def launch_all_but_the_last(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        is_own = kernel.fn.__name__ == f"{key[0]}_kernel"
        launch(kernel, programs - 1 if is_own else programs, *arguments, **constants)

    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: empty(*sizes, **options).fill_(77))
    monkeypatch.setattr(torch, "empty_like", lambda x: empty_like(x).fill_(77))  # or it may hold the right results
    monkeypatch.setattr(triton_backend, "_launch", launch_all_but_the_last)
    assert launch_trial.compared(key, candidate, DEFAULT[key], "cpu").verdict == WRONG


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Conversion of an array with ndim > 0:DeprecationWarning")
def test_a_kernel_is_timed_with_what_adds_up_its_partial_sums(
    interpreted: list[tuple[str, Launch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_backend, "_product_launch", triton_backend._map_launch)  # as where the GPU has TF32
    key: Key = ("pointwise_input_gradient", 4, "small")
    _, call = next(calls_of(key, "cpu", drawn=True))
    best, candidate = DEFAULT[key], tune.near(key[0], DEFAULT[key], changes=1)[0]
    launch_trial._microseconds(key, call, best, candidate, "cpu")
    own, sums = f"{key[0]}_kernel", "sum_partials_kernel"
    assert [name for name, _ in interpreted] == 2 * 3 * [own, sums]  # no other sum, no weight's gradient
    for rounds in (interpreted[:4], interpreted[4:8], interpreted[8:]):  # the first loads the kernels
        assert {launch for name, launch in rounds if name == own} == {best, candidate}


def written(path: Path, journal: Journal, earlier: dict[Key, Measured] | None = None) -> dict[Key, Measured]:
    path.write_text(json.dumps({"gpu": "NVIDIA H200", "launches": tune.entries(journal, earlier or {})}))
    return measured(path, "NVIDIA H200")


def test_the_written_file_holds_what_was_better(journal: Journal, tmp_path: Path) -> None:
    weight: Key = ("pointwise_weight_gradient", 2, "small")
    last = Launch(64, 128, 32, 8, 3, 528)
    journal.add(Trial(weight, Launch(64, 128, 32, 8, 3, 264), BETTER, 20.0, 18.0))
    journal.add(Trial(weight, last, BETTER, 18.5, 17.0))
    journal.add(Trial(KEY, Launch(64, 64, 0, 4, 1), NOT_BETTER, 10.0, 11.0))
    untried, slower = Measured(Launch(512, 8, 0, 4, 1), 5.0, 4.0), Measured(Launch(64, 64, 0, 4, 1), 10.0, 9.0)
    table = written(tmp_path / "nvidia_h200.json", journal, {FOLD: untried, KEY: slower})
    assert table == {weight: Measured(last, 20.0, 17.0), FOLD: untried}
    assert written(tmp_path / "nvidia_h200.json", journal, table) == table  # the same each time


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "is_available", lambda: True)
    monkeypatch.setattr(tune, "resolve_device", lambda device: "cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Example GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: mock.Mock(major=9, minor=0))
    monkeypatch.setattr(tune, "Worker", mock.Mock())


def test_ctrl_c_leaves_what_is_known(
    pretended_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def trials(self: Examiner, ahead: list[Candidate], best: Launch) -> Trial:
        key, launch = ahead[0]
        if best != DEFAULT[key]:
            raise KeyboardInterrupt
        return Trial(key, launch, BETTER, 10.0, 9.0)

    monkeypatch.setattr(Examiner, "__call__", trials)
    out = tmp_path / "folder" / "table.json"
    with pytest.raises(SystemExit) as exit:
        tune.main(["--kernels", "fold", "--out", str(out)])
    assert exit.value.code == 130
    assert list(measured(out, "Example GPU")) == [FOLD]
    assert json.loads(out.read_text())["command"] == f"python bench/tune.py --kernels fold --out {out}"
    assert len(out.with_suffix(".jsonl").read_text().splitlines()) == 1
    assert "not reached with 1 changed at once: fold 4 large" in capsys.readouterr().out


def test_the_limit_ends_it_and_the_rest_is_named(
    pretended_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(function: Callable[..., Any], key: Key, launch: Launch, *arguments: Any, limit_s: float) -> Trial:
        if function is launch_trial.compiled:
            return Trial(key, launch, COMPILED)
        time.sleep(0.01)
        return Trial(key, launch, NOT_BETTER, 10.0, 10.0)

    monkeypatch.setattr(tune, "Worker", lambda: mock.Mock(side_effect=work))
    start = time.monotonic()
    tune.main(["--minutes", "0.01", "--out", str(tmp_path / "table.json")])
    assert time.monotonic() - start < 10
    assert len((tmp_path / "table.jsonl").read_text().splitlines()) > 1
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
    tune.compile_ahead(tune.keys_of(list(CHOICES)), 90, start + 1.0)
    assert time.monotonic() - start < 15
    done, wanted = re.findall(r"(\d+) of (\d+) launches", capsys.readouterr().out)[0]
    assert int(done) < int(wanted)
