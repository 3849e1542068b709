"""Tables, files and exit codes: whole or not at all, readable, and no claim that was not measured."""

import csv
import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from PIL import Image

import bench.run
import bench.runner
from bench.cases import COMPILE, EAGER, OURS, SUITES, Job
from bench.costs import Cost
from bench.measure import Run, measure, note_times
from bench.plans import NEW_CELL, PAPER
from bench.plots import draw
from bench.report import table
from bench.results import Environment, Results, Row, environment, ratio, with_ratio, write_csv
from bench.roofline import NO_ROOFS, Roofs, measure_roofs
from bench.run import SUMMARY, BenchSettings, main, write
from bench.targets import extrapolation, judged_targets
from bench.timing import Samples
from fast.atrous_separable_conv import atrous_separable_conv
from search.errors import InputError
from tests.bench.tiny_runs import CPU, ENVIRONMENT, ROOFS, SEPARABLE, plan_of, row, tiny_results

SEPARABLE_SEEN = replace(SEPARABLE, mode="inference")


def results_of(*rows: Row, **changes: Any) -> Results:
    return Results(replace(ENVIRONMENT, **changes), ROOFS, rows=list(rows), is_complete=True)


def test_a_whole_run_is_written_and_read_back(tmp_path: Path) -> None:
    results = tiny_results()
    paths = write(results, tmp_path, {**SUMMARY, "summary.png": draw})
    assert [path.name for path in paths] == ["rows.csv", "summary.md", "summary.png"]
    with paths[0].open(newline="") as file:
        read = list(csv.DictReader(file))
    wanted = {f.name for f in fields(Row)} | {f.name for f in fields(Environment)} - {"folder"}
    assert set(read[0]) == wanted
    assert len(read) == len(results.rows)
    assert {line["status"] for line in read} == {"ok", "not supported here"}, [line["note"] for line in read]
    timed = [line for line in read if line["status"] == "ok"]
    assert all(float(line["median_ms"]) > 0 for line in timed)
    assert all(float(line["p20_ms"]) <= float(line["median_ms"]) <= float(line["p80_ms"]) for line in timed)
    assert {line["suite"] for line in timed} == set(SUITES)
    assert [line["dtype"] for line in read if line["status"] == "not supported here"] == ["bfloat16"] * len(SUITES)
    with Image.open(paths[2]) as picture:
        assert picture.width > 1000
    summary = paths[1].read_text()
    assert all(f"\n## {suite}, " in summary for suite in SUITES)
    assert "nothing but time" in summary
    assert max(len(line) for line in table(results).splitlines() if line.startswith("|")) <= 120
    assert table(results) in summary


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.csv"
    write_csv(path, results_of(row("ours", 1.0)))
    before = path.read_text()

    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_csv(path, results_of(row("ours", 2.0)))
    assert path.read_text() == before


def test_what_cannot_be_written_is_said_and_the_rest_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.report._targets", lambda results: 1 // 0)
    results = results_of(row("ours", 1.0))
    assert [path.name for path in write(results, tmp_path, SUMMARY)] == ["rows.csv"]
    assert "summary.md could not be written" in capsys.readouterr().err


def cells_of(results: Results) -> dict[str, dict[str, str]]:
    """The only table of times, by its first column and its header."""
    times, _ = table(results).split("## Targets")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in times.splitlines() if line.startswith("|")]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


def test_every_cell_of_the_table_stands_under_its_provider() -> None:
    mine = row("ours", 2.0, back_to_back_ms=1.75, peak_memory_mb=321.0, percent_of_roof=66.4)
    compiled = row("torch.compile", 4.0, first_call_s=41.25)
    cells = cells_of(results_of(mine, row("eager", 10.0, peak_memory_mb=2000.0), compiled))
    iteration = {"case": "iteration", "mode": "training", "ours": "2", "eager": "10", "compile": "4"}
    nothing = dict.fromkeys(("mode", "ours", "eager", "compile", "ratio", "roof"), "")
    assert cells == {
        "iteration": iteration | {"ratio": "2.00×", "roof": "66 %"},
        "· back to back, ms": nothing | {"case": "· back to back, ms", "ours": "1.75"},
        "· first call, s": nothing | {"case": "· first call, s", "compile": "41.25"},
        "· peak memory, MB": nothing | {"case": "· peak memory, MB", "ours": "321", "eager": "2000"},
    }


def test_cases_of_one_kind_are_one_line_for_the_providers_of_them_all() -> None:
    times = {"sep3x3 1x1": (1.0, 2.0), "sep3x3 1x3": (2.0, 8.0), "sep3x3 3x3": (3.0, 2.4)}
    rows = [row("ours", mine, suite="ops", case=case) for case, (mine, _) in times.items()]
    rows += [row("eager", other, suite="ops", case=case) for case, (_, other) in times.items()]
    rows.append(row("torch.compile", 1.0, suite="ops", case="sep3x3 1x1"))
    (line,) = cells_of(results_of(*rows)).values()
    assert line["case"] == "sep3x3 (3)"
    assert [line[name] for name in ("ours", "eager", "compile", "ratio")] == ["2", "2.4", "", "0.80-4.00×"]


@pytest.mark.parametrize("status", ["WRONG", "failed", "not checked"])
def test_what_is_not_right_is_in_no_ratio_and_said_below_the_table(status: str) -> None:
    other = row("eager", 1.25, status=status, note="by far")
    results = results_of(row("ours", 2.0), other, row("torch.compile", 6.0))
    line = cells_of(results)["iteration"]
    assert (line["eager"], line["ratio"]) == ("", "3.00×")
    assert f"- **{status}**: case iteration, mode training, provider eager, median_ms 1.25, note by far" in table(results)


def test_ratio_is_to_the_best_of_the_right_others() -> None:
    rows = [row("ours", 2.0), row("eager", 10.0), row("torch.compile", 6.0), row("eager channels-last", None)]
    assert ratio(rows) == 3.0
    assert ratio(rows[:1]) is ratio(rows[1:]) is None
    assert ratio([row("ours", None), row("eager", 1.0)]) is None


def verdicts(results: Results) -> dict[str, str]:
    return dict(judged_targets(results))


def test_targets_are_met_missed_or_not_measured() -> None:
    rows = [row("ours", 100.0, peak_memory_mb=1200.0), row("eager", 600.0), row("torch.compile", 300.0)]
    found = verdicts(results_of(*rows))
    assert found["proxy iteration, float32: at least 5× as quick as eager PyTorch"] == "met: 6.00×"
    assert found["proxy iteration: at least 4× as quick as the best of PyTorch"] == "missed: 3.00×"
    assert found["peak memory of an iteration: under 1000 MB"] == "missed: 1.2e+03 MB"
    assert found["a new cell has trained its first iteration within 1 s"] == "not measured"
    assert found[CACHING] == "not measured"
    assert len(found) == 9


@pytest.mark.parametrize(("factor", "verdict"), [(0.5, "met"), (1.5, "missed")])
def test_what_trials_cost_to_keep_is_judged_after_the_paper_s_number_of_them(factor: float, verdict: str) -> None:
    by_many = 1e3 * PAPER.study.at_once / 20  # milliseconds
    whole, few = "28,000 trials, SQLite", {"suite": "study", "shape": "0 trials, SQLite"}
    many = f"28,000 trials, PostgreSQL, {PAPER.study.at_once} by 64 processes"
    rows = [
        row("ours", 50.0 * factor, suite="study", case="ask + tell", shape=whole, first_call_s=5 * factor),
        row("ours", 1e6, case="ask + tell", **few),
        row("Optuna", 1e6, suite="study", case="ask + tell", shape=whole),
        row("ours", 1e6, suite="study", case="report", shape=whole, written_mb=5 * factor),
        row("ours", by_many * factor, suite="study", case="trials of many processes", shape=many),
    ]
    found = {text: said for text, said in verdicts(results_of(*rows)).items() if "after 28,000 trials" in text}
    assert len(found) == 4
    assert all(said.startswith(f"{verdict}: ") for said in found.values())
    assert (
        found["trials by 64 processes after 28,000 trials: at least 20 a second"] == f"{verdict}: {20 / factor:.3g} a second"
    )


CACHING = "caching features: at least 0.91× as quick as the model alone"


@pytest.mark.parametrize("cuda", ["none", "13.0"])
@pytest.mark.parametrize(("ours_ms", "verdict"), [(105.0, "met: 0.95×"), (115.0, "missed: 0.87×")])
def test_caching_is_judged_beside_the_model(ours_ms: float, verdict: str, cuda: str) -> None:
    rows = [row("ours", ours_ms, suite="features"), row("eager", 100.0, suite="features")]
    assert verdicts(results_of(*rows, cuda=cuda))[CACHING] == verdict


ITERATION = "proxy iteration: at least 4× as quick as the best of PyTorch"


def judged(ours_ms: Sequence[float], other_ms: Sequence[float], **changes: Any) -> str:
    """The verdict on an iteration from the times of its rounds, with a roof that allows 1 ms."""
    rows = []
    for provider, times in (("ours", ours_ms), ("eager", other_ms)):
        made = row(provider, None, status="ok", bytes=10**7, flops=1)
        note_times(made, Samples(list(times), []), ROOFS, changes.get("others_percent"))
        rows.append(made)
    return verdicts(results_of(*rows))[ITERATION]


TEN = [100.0, 99.0, 101.0, 98.0, 102.0, 97.0, 103.0, 96.0, 104.0, 95.0]  # the interval of the median: 96 to 103


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (4.5, "met: 4.50× (4.35× to 4.66×)"),
        (4.1, "undecided: 4.10× (3.96× to 4.25×)"),
        (3.9, "undecided: 3.90× (3.77× to 4.04×)"),
        (3.6, "missed: 3.60× (3.48× to 3.73×)"),
    ],
)
def test_a_verdict_holds_for_the_whole_interval(ratio: float, verdict: str) -> None:
    assert judged(TEN, [ratio * 99.5] * 10) == verdict


def test_one_slow_round_changes_no_verdict() -> None:
    assert judged([*TEN[:9], 5000.0], [450.0] * 9 + [9.0]) == "met: 4.48× (4.33× to 4.64×)"


def test_three_rounds_decide_nothing() -> None:
    assert judged([100.0] * 3, [900.0] * 3) == "undecided: 9.00× (too few rounds)"


@pytest.mark.parametrize(("others", "verdict"), [(4.9, "met: 15.00×"), (48.0, "no verdict: 15.00× (busy machine)")])
def test_a_busy_machine_gets_no_verdict(others: float, verdict: str) -> None:
    assert judged([100.0] * 10, [1500.0] * 10, others_percent=others) == verdict


def test_a_busy_machine_is_named_in_the_table_and_the_files(tmp_path: Path) -> None:
    busy = {"others_percent": 48.0}
    rows = [row("ours", 100.0, **busy), row("eager", 1505.0, **busy), row("ours", 1.0, case=NEW_CELL, others_percent=1.0)]
    results = results_of()
    for each in rows:
        results.add(each)
    cells = cells_of(results)
    assert (cells["iteration"]["ours"], cells["iteration"]["ratio"], cells["iteration"]["roof"]) == ("100", "busy", "busy")
    assert cells[NEW_CELL]["ratio"] == ""
    write(results, tmp_path, SUMMARY)
    for text in (table(results), (tmp_path / "summary.md").read_text()):
        assert "**Busy machine.** Others used up to 48 % of the processor during 1 of the cases." in text
        assert "(the paper: 2,590 GPU-days), on a busy machine" in text
        assert "15.05" not in text.replace("no verdict: 15.05× (busy machine)", "")
    with (tmp_path / "rows.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [(line["others_percent"], line["ratio_to_best_other"]) for line in read] == [("48", ""), ("48", ""), ("1", "")]


def test_the_ends_of_a_ratio_are_in_the_file() -> None:
    mine, other = row("ours", 2.0, median_low_ms=1.0, median_high_ms=4.0), row("eager", 10.0, median_low_ms=8.0)
    first, _ = with_ratio([mine, other])
    assert (first.ratio_low, first.ratio_to_best_other, first.ratio_high) == (2.0, 5.0, 10.0)


def test_an_unstable_roof_is_said_and_nothing_is_measured_by_it(tmp_path: Path) -> None:
    results = results_of()
    results.hear(
        "roofs", {"roof": "copy", "gb_per_s": 1.0, "unstable": "the best of 7 calls is 35 % quicker than their median"}
    )
    made = row("ours", 1.0, bytes=10**6, flops=1)
    note_times(made, Samples([1.0] * 10, []), results.roofs, None)
    results.add(made)
    assert made.percent_of_roof is None
    write(results, tmp_path, SUMMARY)
    said = "**Unstable roof**, copy: the best of 7 calls is 35 % quicker than their median."
    assert said in table(results)
    assert said in (tmp_path / "summary.md").read_text()


def test_who_is_quicker_than_the_roof_has_no_share_of_it() -> None:
    made = row("ours", 1.0, bytes=10**7, flops=1)  # 1 ms at 10 GB/s
    note_times(made, Samples([0.1355] * 10, []), ROOFS, None)
    assert (made.percent_of_roof, made.note) == (None, "quicker than the roof, which is not stable (738 %)")
    assert cells_of(results_of(made))["iteration"]["roof"] == "unstable"
    note_times(made, Samples([0.9, 1.1] * 5, []), ROOFS, None)  # it may be as quick as that
    assert made.percent_of_roof == pytest.approx(100.0)


def test_gpu_targets_are_judged_on_a_gpu_only() -> None:
    rows = [row("ours", 0.5), row("eager", 5.0), row("ours", 40.0, case=NEW_CELL)]
    found = verdicts(results_of(*rows, cuda="13.0"))
    assert found["proxy iteration: at most 0.67 ms"] == "met: 0.5 ms"
    assert found["a cell all in, 30,000 iterations and its start: at most 21.6 s"] == "met: 15.0 s"
    assert len(found) == 9


def test_one_slower_rate_misses_never_slower() -> None:
    rows = [
        row(provider, ms, suite="ops", case=f"sep3x3 {rate}x1")
        for rate, mine in ((1, 1.0), (3, 2.5))
        for provider, ms in (("ours", mine), ("eager", 2.0))
    ]
    found = verdicts(results_of(*rows, cuda="13.0"))
    assert found["separable convolution: never slower, at any rate"] == "missed: least 0.80×"


def test_extrapolation_to_the_papers_search() -> None:
    lines = extrapolation(results_of(row("ours", 0.72), row("eager", 7.2)))
    assert lines == [
        "28,000 cells × 30,000 iterations in float32: device-days 7 by ours, 70 by eager (the paper: 2,590 GPU-days)"
    ]
    search = row("ours", 60_000.0, suite="search", shape="4 cells, 80 iterations")
    assert extrapolation(results_of(search)) == ["4 cells, 80 iterations, ours, float32: 240 cells per hour"]


def test_the_roof_is_the_slower_of_bytes_and_operations() -> None:
    roofs = Roofs(copy_gb_per_s=100.0, matrix_gflops={"float32": 1000.0})
    assert roofs.floor_ms(Cost(bytes=10**9, flops=10**9), "float32") == pytest.approx(10.0)
    assert roofs.floor_ms(Cost(bytes=10**6, flops=10**10), "float32") == pytest.approx(10.0)
    assert roofs.percent(Cost(10**9, 0), "float32", 20.0) == pytest.approx(50.0)
    assert roofs.percent(None, "float32", 20.0) is None


def test_measured_roofs_are_those_of_a_computer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.roofline.last_level_cache_bytes", lambda device: 1 << 20)
    roofs = NO_ROOFS
    for number in measure_roofs(CPU, ["float32"]):
        roofs = roofs.with_number(number)  # also one that is not stable, as on a busy machine
    assert 0.1 < roofs.copy_gb_per_s < 10_000  # a slip of units would be a factor of a thousand
    assert 0.1 < roofs.matrix_gflops["float32"] < 100_000


def test_the_environment_names_device_and_commit() -> None:
    found = environment(CPU, Path())
    assert re.fullmatch(r"[a-z0-9-]+-cores", found.folder)
    assert found.torch == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?|sources-[0-9a-f]{8}", found.commit)


def test_results_in_the_checkout_do_not_make_it_dirty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("bench.results.ROOT", tmp_path)
    for arguments in (["init"], ["add", "."], ["commit", "--allow-empty", "-m", "one"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "rows.csv").write_text("")
    assert re.fullmatch(r"[0-9a-f]{7,}", environment(CPU, tmp_path / "out").commit)
    assert environment(CPU, Path("/elsewhere")).commit.endswith("-dirty")


def test_outside_a_checkout_the_sources_name_themselves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("bench.results.ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "fast").mkdir()
    names = []
    for source in ("x = 1", "x = 2", "x = 1"):
        (tmp_path / "fast" / "layer.py").write_text(source)
        names.append(environment(CPU, Path()).commit)
    assert names[0] == names[2] != names[1]
    assert re.fullmatch(r"sources-[0-9a-f]{8}", names[0])


@pytest.fixture
def tiny_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` with two tiny jobs."""
    plan_with(monkeypatch, Job(SEPARABLE, "float32", (OURS, EAGER)), Job(SEPARABLE_SEEN, "float32", (OURS, EAGER)))


def plan_with(monkeypatch: pytest.MonkeyPatch, *jobs: Job) -> None:
    for plan in ("make_plan", "plan_of_minutes"):
        monkeypatch.setattr(bench.run, plan, lambda *arguments, **flags: plan_of(*jobs))


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what a test replaces is replaced where it is measured."""

    def measure_here(worker: object, job: Job, run: Run, limit_s: float) -> list[Row]:
        return measure(job, CPU, run.rounds, run.roofs)

    monkeypatch.setattr(bench.runner, "measure_apart", measure_here)


def run_folders(out: Path) -> list[Path]:
    return sorted(path.parent for path in out.rglob("settings.json"))


@pytest.mark.usefixtures("tiny_plan")
def test_main_writes_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(BenchSettings(device="cpu", out=tmp_path))
    printed = capsys.readouterr().out
    (folder,) = run_folders(tmp_path)
    written = sorted(path for path in folder.iterdir() if path.is_file())
    assert [path.name for path in written] == ["log", "rows.csv", "settings.json", "summary.md", "summary.png"]
    assert all(str(path) in printed for path in written)
    assert "sep3x3 6x21" in printed
    first = (folder / "rows.csv").read_bytes()
    main(BenchSettings(device="cpu", out=tmp_path))  # of the same day and commit
    assert {path.name.removesuffix("-2") for path in run_folders(tmp_path)} == {folder.name}
    assert len(run_folders(tmp_path)) == 2
    assert (folder / "rows.csv").read_bytes() == first


def test_float16_on_a_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--dtype float16 is measured on a GPU alone"):
        main(BenchSettings(device="cpu", dtype=("float16",), out=tmp_path))


@pytest.mark.usefixtures("in_this_process")
def test_a_compiler_that_fails_is_a_row_and_no_error_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **flags: object) -> None:
        raise RuntimeError("no compiler today")

    plan_with(monkeypatch, Job(SEPARABLE, "float32", (OURS, EAGER, COMPILE)))
    monkeypatch.setattr(torch, "compile", fail)
    main(BenchSettings(device="cpu", rounds=1, out=tmp_path))
    assert "no compiler today" in next(tmp_path.rglob("rows.csv")).read_text()


@pytest.mark.usefixtures("tiny_plan", "in_this_process")
def test_main_exits_with_1_on_a_wrong_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "bench.cases.atrous_separable_conv", lambda *args, **kwargs: 2 * atrous_separable_conv(*args, **kwargs)
    )
    with pytest.raises(SystemExit) as stopped:
        main(BenchSettings(device="cpu", rounds=1, out=tmp_path))
    assert stopped.value.code == 1
    assert "WRONG" in next(tmp_path.rglob("rows.csv")).read_text()


def stop_at(monkeypatch: pytest.MonkeyPatch, calls: int, by: type[BaseException]) -> list[float]:
    """Every case takes as many milliseconds as cases came before it; the one behind `calls` of them ends the run."""
    made: list[float] = []

    def measure_or_stop(worker: object, job: Job, *arguments: Any) -> list[Row]:
        if len(made) == calls:
            raise by
        made.append(float(len(made) + 1))
        return [row("ours", made[-1], suite="ops", case=job.case.name, mode=job.case.mode)]

    monkeypatch.setattr(bench.runner, "measure_apart", measure_or_stop)
    return made


@pytest.mark.usefixtures("tiny_plan")
@pytest.mark.parametrize("by", [KeyboardInterrupt, MemoryError])  # what is not caught stands for kill -9
@pytest.mark.parametrize("minutes", [None, 5.0])
def test_the_same_command_goes_on_with_a_stopped_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: type[BaseException], minutes: float | None
) -> None:
    monkeypatch.setattr(bench.run, "environment", lambda device, out: ENVIRONMENT)
    command = BenchSettings(device="cpu", minutes=minutes, out=tmp_path)
    stop_at(monkeypatch, 1, by)
    with pytest.raises(SystemExit if by is KeyboardInterrupt else by):
        main(command)
    (folder,) = run_folders(tmp_path)
    assert len((folder / "rows.csv").read_text().splitlines()) == 2
    assert "stopped before its end" in (folder / "summary.md").read_text()
    assert [path.name[:3] for path in (folder / "stages").iterdir()] == ["000"]
    made = stop_at(monkeypatch, 2, AssertionError)
    made.append(1.0)  # measured by the first part
    main(command)
    assert run_folders(tmp_path) == [folder]
    with (folder / "rows.csv").open(newline="") as file:
        assert [line["median_ms"] for line in csv.DictReader(file)] == ["1", "2"]
    summary = (folder / "summary.md").read_text()
    assert "made in 2 parts" in summary
    assert "before its end" not in summary
    stop_at(monkeypatch, 2, AssertionError)
    main(command)  # a run that came to its end does not go on
    assert len(run_folders(tmp_path)) == 2


@pytest.mark.usefixtures("tiny_plan")
@pytest.mark.parametrize("then", [{"rounds": 7}, {"commit": "4567def"}, {"commit": "0123abc-dirty"}, {"torch": "3"}])
def test_another_command_or_code_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], then: dict[str, Any]
) -> None:
    monkeypatch.setattr(bench.run, "environment", lambda device, out: ENVIRONMENT)
    stop_at(monkeypatch, 1, KeyboardInterrupt)
    with pytest.raises(SystemExit, match="130"):
        main(BenchSettings(device="cpu", out=tmp_path))
    flags = {"rounds": then.pop("rounds")} if "rounds" in then else {}
    monkeypatch.setattr(bench.run, "environment", lambda device, out: replace(ENVIRONMENT, **then))
    made = stop_at(monkeypatch, 2, AssertionError)
    main(BenchSettings(device="cpu", out=tmp_path, **flags))
    assert len(made) == 2
    said = capsys.readouterr().err
    assert "going on" not in said
    assert ("0123abc does not go on: begun with " in said) == (then.get("commit") != "0123abc-dirty")
    assert "`" not in said


@pytest.mark.usefixtures("tiny_plan")
@pytest.mark.parametrize(
    "damage",
    [
        ("stages/000-*.json", '{"stage": "x", "is_whole": true, "said": [1, 2]}'),
        ("stages/000-*.json", '{"said": 5}'),
        ("stages/000-*.json", '{"stage": "x", "is_whole": true, "said": [{"row": {"no": 1}}]}'),
        ("stages/000-*.json", '{"stage'),
    ],
)
def test_a_damaged_stage_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: tuple[str, str]) -> None:
    monkeypatch.setattr(bench.run, "environment", lambda device, out: ENVIRONMENT)
    stop_at(monkeypatch, 1, KeyboardInterrupt)
    with pytest.raises(SystemExit, match="130"):
        main(BenchSettings(device="cpu", out=tmp_path))
    (folder,) = run_folders(tmp_path)
    (path,) = folder.glob(damage[0])
    path.write_text(damage[1])
    with pytest.raises(InputError, match=r"000-.*json is damaged .*: delete it and run the same command again"):
        main(BenchSettings(device="cpu", out=tmp_path))


@pytest.mark.usefixtures("tiny_plan")
@pytest.mark.parametrize("change", [{"environment": {"no": 1}}, {"parts": "x"}, {"identity": 5}])
def test_damaged_settings_do_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench.run, "environment", lambda device, out: ENVIRONMENT)
    stop_at(monkeypatch, 1, KeyboardInterrupt)
    with pytest.raises(SystemExit, match="130"):
        main(BenchSettings(device="cpu", out=tmp_path))
    (path,) = tmp_path.rglob("settings.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if "identity" in change:  # whose it is cannot be told
        stop_at(monkeypatch, 2, AssertionError)
        main(BenchSettings(device="cpu", out=tmp_path))
        assert "settings.json is damaged" in capsys.readouterr().err
    else:
        with pytest.raises(InputError, match=r"settings.json is damaged .*: delete that folder"):
            main(BenchSettings(device="cpu", out=tmp_path))


@pytest.mark.usefixtures("tiny_plan", "in_this_process")
def test_a_full_disk_is_said_and_the_same_command_writes_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, results: Results) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(bench.run, "environment", lambda device, out: ENVIRONMENT)
    monkeypatch.setattr("bench.plots.draw", full)
    with pytest.raises(SystemExit, match="1"):
        main(BenchSettings(device="cpu", rounds=1, out=tmp_path))
    assert "a file is missing" in capsys.readouterr().err
    monkeypatch.setattr("bench.plots.draw", draw)
    stop_at(monkeypatch, 0, AssertionError)  # nothing is measured again
    main(BenchSettings(device="cpu", rounds=1, out=tmp_path))
    assert len(list(tmp_path.rglob("summary.png"))) == len(run_folders(tmp_path)) == 1


@pytest.mark.usefixtures("tiny_plan")
def test_two_benchmarks_at_once_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / environment(CPU, Path()).folder
    folder.mkdir()
    with FileLock(folder / "lock"), pytest.raises(InputError, match="in use by another process"):
        main(BenchSettings(device="cpu", out=tmp_path))


@pytest.mark.parametrize("settings", [BenchSettings(rounds=0), BenchSettings(minutes=1.0, quick=True)])
def test_flags_that_cannot_work_are_refused(settings: BenchSettings) -> None:
    with pytest.raises(InputError):
        main(settings)
