"""What breaks costs its own stage; what was said before stays."""

import csv
import json
import os
import pickle
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import bench.run
import bench.runner
import bench.stages
from bench.cases import EAGER, OURS, Job, OperationCase, Provider, Workload
from bench.measure import Run, measure_apart
from bench.plans import EVERY_KIND, Plan, plan_of_minutes
from bench.profiles import Kernel, Prediction, counters, in_order, predictions, profile
from bench.results import Results, Row
from bench.roofline import NO_ROOFS
from bench.run import BenchSettings, main, parser
from bench.runner import measure_jobs, run_stages
from bench.stages import Stage, gpu_tests, tiny_cell
from bench.worker import OutOfTime, Say, Worker
from reference.cell import Operation
from search.errors import InputError
from tests.bench.tiny_runs import CPU, ENVIRONMENT, SEPARABLE, TINY, row

RUN = Run("cpu", 1, 1, NO_ROOFS, Path("nowhere"))


def test_the_tiny_cell_has_every_operation() -> None:
    assert {type(branch.operation) for branch in EVERY_KIND.branches} == {*get_args(Operation)}


def say_roof(run: Run, say: Say) -> None:
    say({"roof": "copy", "gb_per_s": 12.5})


def say_known_roof(run: Run, say: Say) -> None:
    say({"known": run.roofs.copy_gb_per_s})


def say_and(what: Callable[[], None], say: Say) -> None:
    say({"number": 1})
    what()


def crash(run: Run, say: Say) -> None:
    say_and(lambda: os.kill(os.getpid(), signal.SIGSEGV), say)


def hang(run: Run, say: Say) -> None:
    say_and(lambda: time.sleep(600), say)


def fail(run: Run, say: Say) -> None:
    say_and(lambda: 1 // 0, say)  # type: ignore[arg-type]


def be_ready() -> None:
    """Called in a worker before what has a limit: by then it has imported all, which may take longer than the limit."""


def test_a_stage_that_crashes_hangs_or_fails_costs_itself(tmp_path: Path) -> None:
    heard: list[tuple[str, Any]] = []
    stages = [
        Stage("roof", 60, function=say_roof),
        Stage("crash", 60, function=crash),
        Stage("hang", 20, function=hang),  # in a new process, which has to import PyTorch first
        Stage("fail", 60, function=fail),
        Stage("jobs", 60, jobs=(Job(SEPARABLE, "float32", (OURS, EAGER)),)),
        Stage("known", 60, function=say_known_roof),
    ]
    results = Results(ENVIRONMENT, NO_ROOFS)
    end = time.monotonic() + 300
    run_stages(stages, replace(RUN, folder=tmp_path), results, end, lambda stage, value: heard.append((stage, value)))
    ends = {stage: value["status"] for stage, value in heard if isinstance(value, dict) and "status" in value}
    assert ends == {
        "roof": "done",
        "crash": "the process ended with signal SIGSEGV",
        "hang": "out of time",
        "fail": "ZeroDivisionError: integer division or modulo by zero",
        "jobs": "done",
        "known": "done",
    }
    assert [stage for stage, value in heard if value == {"number": 1}] == ["crash", "hang", "fail"]
    assert [value.provider for _, value in heard if isinstance(value, Row)] == ["ours", "eager"]
    assert ("known", {"known": 12.5}) in heard  # later stages judge by what the first has measured
    assert "ZeroDivisionError" in (tmp_path / "log").read_text()
    assert results.failures() == ["crash", "fail"]
    again = Results(ENVIRONMENT, NO_ROOFS)
    run_stages(stages, replace(RUN, folder=tmp_path), again, time.monotonic())  # all of it is read from the files
    assert again == results


def say_and_wait_once(run: Run, say: Say) -> None:
    say({"number": 1})
    if not (marker := run.folder / "waited").exists():
        marker.touch()
        time.sleep(600)


def test_what_the_end_of_the_minutes_cuts_off_or_leaves_out_is_done_by_a_run_that_goes_on(tmp_path: Path) -> None:
    stages = [Stage("wait", 600, function=say_and_wait_once), Stage("roof", 60, function=say_roof)]
    run, told = replace(RUN, folder=tmp_path), list[Any]()
    first = Results(ENVIRONMENT, NO_ROOFS)
    assert run_stages(stages, run, first, time.monotonic() + 20, lambda stage, value: told.append(value)) == 2
    assert [number.get("status") for number in first.numbers] == [None, "no time left", "no time left"]
    assert told == [{key: value for key, value in number.items() if key != "stage"} for number in first.numbers]
    assert first.numbers[1]["note"] in ("stopped after 19 s", "stopped after 20 s")
    assert first.failures() == []
    for seconds in (60, 0):  # the second one reads what the first has added, and nothing twice
        more = Results(ENVIRONMENT, NO_ROOFS)
        assert run_stages(stages, run, more, time.monotonic() + seconds) == 0
        assert [number.get("status") for number in more.numbers] == [None, "done", None, "done"]


def test_the_cases_that_a_stage_has_measured_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [Job(replace(SEPARABLE, name=f"sep3x3 {rate}x1"), "float32", (OURS, EAGER)) for rate in (1, 3, 6)]
    made: list[str] = []

    def measure_or_stop(worker: object, job: Job, *arguments: Any) -> list[Row]:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(job.case.name)
        return [row(who, 1.0, suite="ops", case=job.case.name, shape=job.case.shape) for who in ("ours", "eager")]

    monkeypatch.setattr(bench.runner, "measure_apart", measure_or_stop)
    stages, run = [Stage("ops", 60, jobs=tuple(jobs))], replace(RUN, folder=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_stages(stages, run, Results(ENVIRONMENT, NO_ROOFS), time.monotonic() + 60)
    made.clear()
    for left in (["sep3x3 6x1"], []):
        results = Results(ENVIRONMENT, NO_ROOFS)
        assert run_stages(stages, run, results, time.monotonic() + 60) == 0
        assert made == left
        assert len(results.rows) == 6
        made.clear()


class DyingCase(OperationCase):
    """Ours ends its process, as a kernel that breaks the GPU's context would."""

    def workload(self, provider: Provider, dtype: str, device: torch.device) -> Workload:
        if provider == OURS:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().workload(provider, dtype, device)


class HangingCase(OperationCase):
    def workload(self, provider: Provider, dtype: str, device: torch.device) -> Workload:
        if provider == OURS:
            time.sleep(600)
        return super().workload(provider, dtype, device)


def as_case(kind: type[OperationCase]) -> OperationCase:
    return kind(**vars(SEPARABLE))


def test_who_breaks_the_process_is_named_and_the_others_are_measured() -> None:
    with Worker() as worker:
        rows = measure_apart(worker, Job(as_case(DyingCase), "float32", (OURS, EAGER)), RUN)
    assert [(row.provider, row.status) for row in rows] == [("ours", "failed"), ("eager", "ok")]
    assert rows[0].note == "the process ended with signal SIGKILL"
    assert rows[1].median_ms


def test_the_end_of_the_time_is_nobodys_failure() -> None:
    job = Job(as_case(HangingCase), "float32", (EAGER, OURS))
    with Worker() as worker:
        worker(be_ready)
        with pytest.raises(OutOfTime, match="stopped after 8 s, while ours was at work"):
            measure_apart(worker, job, RUN, limit_s=8.0)


def test_a_case_that_hangs_costs_itself_and_not_those_behind_it() -> None:
    said: list[Any] = []
    jobs = [Job(as_case(HangingCase), "float32", (OURS,)), *[Job(SEPARABLE, "float32", (OURS, EAGER))] * 3]
    with Worker() as worker, pytest.raises(OutOfTime, match=r"^sep3x3 6x21, training: stopped after 2[12] s, while ours"):
        measure_jobs(jobs, RUN, worker, time.monotonic() + 60, said.append)
    assert [row.status for row in said] == ["ok"] * 6


def test_every_stage_can_be_sent_to_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for device in ("cpu", "cuda:0"):
        stages = plan_of_minutes(torch.device(device), TINY).stages
        assert pickle.loads(pickle.dumps(stages)) == stages


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tiny_cell_of_every_kind_is_right(dtype: Any) -> None:
    said: list[dict[str, Any]] = []
    (job,) = next(stage.jobs for stage in plan_of_minutes(CPU, TINY).stages if stage.function is tiny_cell)
    tiny_cell(RUN, replace(job, dtype=dtype), said.append)
    assert said[:2] == [{"at_work": "eager"}, {"at_work": "ours"}]
    assert [(line["provider"], line["result"]) for line in said[2:]] == [("ours", "ok"), ("eager", "ok")]


def test_the_plan_begins_with_what_matters_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    names = [stage.name for stage in plan_of_minutes(torch.device("cuda:0"), TINY).stages]
    assert names[:6] == [
        "roofs",
        "tiny cell, bfloat16",
        "tiny cell, float32",
        "iteration, bfloat16",
        "profile, bfloat16",
        "graph beside calls, bfloat16",
    ]
    compiled = [name for name in names if "compile" in name]
    assert compiled == ["iteration beside torch.compile", "iteration beside torch.compile max-autotune"]
    assert names.index("tests") < names.index(compiled[0])


def test_a_profile_is_written_in_order_and_summed(tmp_path: Path) -> None:
    said: list[dict[str, Any]] = []
    (job,) = next(stage.jobs for stage in plan_of_minutes(CPU, TINY).stages if stage.function is profile)
    profile(replace(RUN, folder=tmp_path), job, said.append)
    with (tmp_path / f"profile-{job.dtype}.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert said[0]["launches"] == pytest.approx(sum(float(line["launches"]) for line in lines), rel=1e-3)
    assert said[0]["launches"] > len(lines) > 10
    assert sum(float(line["us"]) for line in lines) == pytest.approx(said[0]["busy_us"], rel=1e-3)
    kernels = [line for line in said if "kernel" in line]
    assert [line["us"] for line in kernels] == sorted((line["us"] for line in kernels), reverse=True)


def test_kernels_in_order_with_the_median_of_the_replays_and_the_idle_time_before_them() -> None:
    replays = [
        [("a", 0.0, 2.0), ("b", 3.0, 4.0), ("a", 4.5, 9.5)],
        [("a", 10.0, 13.0), ("b", 13.5, 15.5), ("a", 16.0, 20.0)],
        [("a", 20.0, 21.0), ("b", 22.0, 28.0), ("a", 29.5, 30.5)],
    ]
    spans = [span for replay in replays[::-1] for span in replay]
    first, last = Prediction("one map", 1.5), Prediction("another", 2.5)
    expected = [
        Kernel("a", "one map", 1, 2.0, 0.0, 1.5),
        Kernel("b", "", 1, 2.0, 1.0, None),
        Kernel("a", "another", 1, 4.0, 0.5, 2.5),
    ]
    assert in_order(spans, {"a": [first, last]}) == expected
    with pytest.raises(ValueError, match="3 replays are not alike"):
        in_order(spans[:-1], {})


def test_predictions_name_kernels_that_there_are() -> None:
    for dtype in ("bfloat16", "float32"):
        predicted = predictions(dtype)
        assert {"depthwise_forward_kernel", "pointwise_forward_kernel", "cell_gradients_kernel"} <= predicted.keys()
        assert all(0 < prediction.us < 1000 for values in predicted.values() for prediction in values)
    assert predictions("float16") == {}


def test_the_tests_are_counted_as_they_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tests" / "fast" / "kernels"
    folder.mkdir(parents=True)
    parametrized = "import pytest\n@pytest.mark.parametrize('size', [(8, 256)], ids=str)\n"
    bad = "def test_good(): ...\n" + parametrized + "def test_bad(size):\n    assert 1 == 2\n"
    (folder / "test_triton_on_gpu.py").write_text(bad)
    (folder.parent / "test_train_step.py").write_text("import pytest\n@pytest.mark.skip\ndef test_later(): ...\n")
    monkeypatch.setattr(bench.stages, "ROOT", tmp_path)
    (folder.parent / "test_others.py").write_text("def test_other(): ...\n")
    said: list[dict[str, Any]] = []
    gpu_tests(RUN, said.append)
    said = [line for line in said if {"failed_test", "of"} & line.keys()]  # on a slow machine counts come in between
    assert said[0] == {"failed_test": "tests/fast/kernels/test_triton_on_gpu.py::test_bad[(8, 256)]"}
    first = {"passed": 1, "failed": 1, "skipped": 1}
    assert said[1] == first | {"of": "tests/fast/kernels/test_triton_on_gpu.py", "pytest_exit_code": 1}
    assert said[2] == first | {"passed": 2, "of": "tests/fast", "pytest_exit_code": 0}
    told = capfd.readouterr().err
    assert "test_bad[(8, 256)]" in told
    assert "assert 1 == 2" in told


@pytest.mark.parametrize("is_installed", [True, False])
def test_counters_are_read_where_there_is_a_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_installed: bool
) -> None:
    ncu = tmp_path / "ncu"
    ncu.write_text('#!/bin/sh\necho "ID,Kernel Name"\necho "$@" | grep -q profile-from-start && echo "0,fold_kernel"\n')
    ncu.chmod(ncu.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}" if is_installed else "/bin")
    said: list[dict[str, Any]] = []
    counters(replace(RUN, folder=tmp_path), Job(SEPARABLE, "bfloat16", (OURS,)), said.append)
    if is_installed:
        assert said == [{"file": "counters-bfloat16.csv", "lines": 2, "ncu_exit_code": 0}]
    else:
        assert said == [{"skipped": "ncu is not installed"}]


def test_a_run_of_minutes_writes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    stages = (
        Stage("roof", 60, function=say_roof),
        Stage("crash", 60, function=crash),
        Stage("jobs", 60, jobs=(Job(SEPARABLE, "float32", (OURS, EAGER)),)),
    )
    monkeypatch.setattr(bench.run, "plan_of_minutes", lambda *arguments: Plan(stages))
    with pytest.raises(SystemExit, match="1"):
        main(BenchSettings(device="cpu", minutes=5.0, rounds=1, out=tmp_path))
    (folder,) = (path.parent for path in tmp_path.rglob("settings.json"))
    assert {path.name for path in folder.iterdir()} == {
        *("log", "rows.csv", "settings.json", "stages", "summary.md", "summary.png")
    }
    assert json.loads((folder / "settings.json").read_text())["environment"]["torch"] == torch.__version__
    roof = json.loads((folder / "stages" / "000-roof.json").read_text())
    assert roof["said"][0] == {"roof": "copy", "gb_per_s": 12.5}
    assert roof["said"][1]["status"] == "done"
    summary = (folder / "summary.md").read_text()
    assert "\n- roof, " in summary
    assert "**the process ended with signal SIGSEGV**" in summary
    assert "copy 12.5 GB/s" in summary
    assert "sep3x3 6x21" in (folder / "rows.csv").read_text()
    printed = capsys.readouterr()
    assert "gb_per_s 12.5" in printed.out
    assert "wrong or failed: crash" in printed.err


@pytest.mark.parametrize("flags", [{"quick": True}, {"suite": ("ops",)}, {"dtype": ("float32",)}, {"minutes": 0.0}])
def test_flags_that_contradict_minutes_are_refused(flags: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"minutes": 1.0, "device": "cpu"} | flags
    with pytest.raises(InputError, match="--minutes"):
        main(BenchSettings(**arguments))


def test_of_two_rows_the_newer_numbers_and_the_worse_verdict_stand() -> None:
    results = Results(ENVIRONMENT, NO_ROOFS)
    for added in (
        row("ours", 2.0, status="not checked", first_call_s=9.0),
        row("ours", 1.5, rms_error=1e-7),
        row("eager", 6.0),
    ):
        results.add(added)
    mine, other = results.rows
    assert (mine.status, mine.median_ms, mine.first_call_s, mine.rms_error) == ("ok", 1.5, 9.0, 1e-7)
    assert (mine.ratio_to_best_other, other.ratio_to_best_other) == (4.0, None)
    results.add(row("torch.compile", 3.0))
    assert results.rows[0].ratio_to_best_other == 2.0
    assert results.failures() == []
    for status, note in (("failed", "no memory left"), ("WRONG", "by far"), ("ok", ""), ("failed", "again")):
        results.add(row("ours", 1.0, status=status, note=note))
    assert (results.rows[0].status, results.rows[0].note) == ("WRONG", "by far")
    assert results.rows[0].ratio_to_best_other is None
    assert results.failures() == ["iteration, float32: WRONG"]


@pytest.mark.parametrize(
    ("number", "is_failure"),
    [
        ({"status": "done"}, False),
        ({"status": "out of time", "note": "stopped after 6 s"}, False),
        ({"status": "the process ended with signal SIGSEGV"}, True),
        ({"status": "no time left"}, False),
        ({"failed_test": "tests/a.py::b"}, True),
        ({"provider": "ours", "result": "WRONG"}, True),
        ({"provider": "eager", "result": "failed"}, False),
    ],
)
def test_stages_that_fail_are_failures_of_the_run(number: dict[str, Any], is_failure: bool) -> None:
    results = Results(ENVIRONMENT, NO_ROOFS, numbers=[{"stage": "it", **number}])
    assert results.failures() == (["it"] if is_failure else [])


def test_the_benchmark_needs_no_library_of_flags_and_no_database() -> None:
    """As on a machine that has PyTorch, and not what `pip install` would bring."""
    code = "import sys, runpy; sys.modules.update(dict.fromkeys(['tyro', 'optuna', 'sqlalchemy', 'ray']))\n"
    code += "sys.argv = ['bench/run.py', '--help']; runpy.run_path('bench/run.py', run_name='__main__')"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=bench.stages.ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--minutes" in result.stdout


def test_flags_are_parsed_and_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    flags: Any = vars(parser().parse_args(["--suite", "loss", "proxy", "--minutes", "8", "--out", "there"]))
    assert BenchSettings(**flags) == BenchSettings(suite=["loss", "proxy"], minutes=8.0, out=Path("there"))
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(["--suite", "lost"])
    assert "invalid choice: 'lost'" in capsys.readouterr().err


COMPILE = """
import torch
from bench.plans import plan_of_minutes
from bench.stages import compile_kernels, tiny_cell
from tests.bench.tiny_runs import TINY
(job, *_) = (stage.jobs[0] for stage in plan_of_minutes(torch.device("cuda"), TINY).stages if stage.function is tiny_cell)
print(compile_kernels(90, [job]))
"""


def test_kernels_are_compiled_ahead_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton has no build for this system")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILE]
    found = []
    for _ in range(2):
        result = subprocess.run(command, cwd=bench.stages.ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        found.append((int(result.stdout), sorted(path.name for path in tmp_path.rglob("*.cubin"))))
    assert found[0] == found[1]  # the second process compiles nothing
    assert found[0][0] == len(found[0][1])
    assert {
        f"{name}_kernel.cubin" for name in ("depthwise_backward", "pointwise_weight_gradient", "cell_gradients", "fold")
    } <= {*found[0][1]}
