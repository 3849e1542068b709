"""Re-ranking a tiny search end to end: it finishes, goes on after any end, and its ranks are those of what it trained."""

import csv
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

import search.random
import search.reports.run_files
import search.rerank
import search.training.memory
from fast.checkpoint import load_network
from reference.cell import Branch, Cell, Conv1x1, PyramidPooling
from search.cells.space import cell_hash, load_cell
from search.datasets import Dataset, Fingerprint
from search.dense_tasks import DenseTask
from search.dense_tasks.segmentation import Segmentation
from search.errors import InputError
from search.files import write_json
from search.random import RandomSettings
from search.reports.front import front_of
from search.reports.reranking import Candidate, correlation, finish_reranking
from search.rerank import RerankSettings, candidates_of, ranks, training_settings, used_splits
from search.runs.study import Run, load_run, ranked
from search.settings import BackboneSettings, DataSettings, LossSettings, known
from search.tasks.end_to_end import EndToEndResult, EndToEndTask, Failed, read_outcome
from search.tasks.held_out import HeldOut, open_held_out
from search.tasks.proxy import NotFiniteError
from search.training.loop import Training
from search.training.state import read_curve
from tests.search.composed import changed, composed
from tests.search.tasks.test_end_to_end import measured, write_backbone
from tests.search.test_random import BACKBONE, skip_report, write_camvid
from tests.search.test_train import kill_at_call, killed_while

ITERATIONS = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished search of four cells."""
    folder = tmp_path_factory.mktemp("searched")
    data_dir = write_camvid(folder / "camvid")
    for kind in ("", "annot"):  # its own validation pictures hold mostly a class that is rare in training
        shutil.copytree(data_dir / f"train{kind}", data_dir / f"val{kind}", dirs_exist_ok=True)
    settings = composed(
        RandomSettings,
        dataset="camvid",
        data_dir=data_dir,
        backbone=BACKBONE,
        weights=write_backbone(folder / "weights.pth"),
        cache_dir=folder / "cache",
        out=folder / "runs" / "camvid",
        device="cpu",
        trials=4,
        iterations=8,
        batch_size=4,
        learning_rate=0.5,
        branch_channels=8,
        branches=3,
        seed=1,
        statistics_batches=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search.reports.run_files, "write_report", skip_report)
        search.random.main(settings)
    return load_run(folder / "runs" / "camvid")


@pytest.fixture(scope="module")
def tiny(run: Run, tmp_path_factory: pytest.TempPathFactory) -> RerankSettings:
    """Settings of a re-ranking that takes some seconds."""
    return composed(
        RerankSettings,
        run=run.directory,
        top=3,
        compare=("dpc",),
        crop_size=(33, 33),
        batch_size=4,
        iterations=ITERATIONS,
        learning_rate=0.5,
        statistics_batches=1,
        checkpoint_every=1,
        loading_processes=0,
        device="cpu",
        out=tmp_path_factory.mktemp("uninterrupted"),
    )


@pytest.fixture(scope="module")
def uninterrupted(tiny: RerankSettings) -> Path:
    search.rerank.main(tiny)
    assert tiny.out is not None
    return tiny.out


def results(directory: Path) -> dict[str, Any]:
    read = {path.parent.name: read_outcome(path.parent) for path in directory.glob("*/result.json")}
    return {name: measured(result) if isinstance(result, EndToEndResult) else result for name, result in read.items()}


def rows(directory: Path) -> dict[str, dict[str, str]]:
    with (directory / "ranks.csv").open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(*_: object) -> None:
        raise AssertionError("nothing is left to train")

    monkeypatch.setattr(EndToEndTask, "evaluate", evaluate)


# The whole command


def test_the_best_cells_are_trained_and_ranked_again(tiny: RerankSettings, run: Run, uninterrupted: Path) -> None:
    best = ranked(run.trials)[:3]
    table = rows(uninterrupted)
    assert set(table) == {"dpc", *(f"trial {record.number}" for record in best)}
    assert table["dpc"]["proxy_rank"] == table["dpc"]["final_rank"] == ""
    for proxy_rank, record in enumerate(best, start=1):
        row = table[f"trial {record.number}"]
        folder = uninterrupted / f"{cell_hash(record.cell)}-0-0"
        assert row["folder"] == folder.name
        network, description = load_network(folder / "last.safetensors")
        assert record.result is not None
        assert (int(row["proxy_rank"]), float(row["proxy_mean_iou"])) == (proxy_rank, record.result.score)
        assert float(row["final_mean_iou"]) == description["source"]["mean_iou"]
        assert int(row["parameters"]) == record.result.parameters  # of the same cell, with as many filters
        assert network.head.context.cell == Cell.from_json(row["cell"]) == record.cell
    found = sorted((row for name, row in table.items() if name != "dpc"), key=lambda row: int(row["final_rank"]))
    finals = [float(row["final_mean_iou"]) for row in found]
    assert len(set(finals)) == 3  # else nothing would be ranked
    assert finals == sorted(finals, reverse=True)
    assert Cell.load(uninterrupted / "best_cell.json") == Cell.from_json(found[0]["cell"])
    with Image.open(uninterrupted / "scatter.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("L")))) > 2


def test_of_a_finished_training_the_network_stays_and_the_state_goes(uninterrupted: Path) -> None:
    folders = [path for path in uninterrupted.iterdir() if path.is_dir()]
    assert len(folders) == 4
    for folder in folders:
        names = {path.name for path in folder.iterdir()}
        assert {"last.safetensors", "curve.csv", "cell.json", "result.json"} <= names
        assert not names & {"state.pt", "best.safetensors"}
        assert [row[0] for row in read_curve(folder) if row[3] is not None] == [ITERATIONS]  # validated once, at the end


def test_the_same_command_again_prints_the_same_table(
    tiny: RerankSettings, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (uninterrupted / "ranks.csv").read_bytes()
    forbid_training(monkeypatch)
    search.rerank.main(tiny)
    assert (uninterrupted / "ranks.csv").read_bytes() == before
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows(uninterrupted))
    assert "3 cells: Spearman's ρ = " in printed
    network = re.search(r"^its network: (.+)$", printed, re.MULTILINE)
    assert network is not None
    assert load_network(Path(network[1]))[0].head.context.cell == Cell.load(uninterrupted / "best_cell.json")
    assert "the same command goes on" not in printed


def test_more_seeds_and_cells_keep_what_is_trained(
    tiny: RerankSettings, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = changed(tiny, out=tmp_path, top=1, compare=())
    search.rerank.main(small)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/result.json")}
    assert len(times) == 1
    search.rerank.main(replace(small, top=2, seeds=2))
    assert "takes 3 cells of the search; here are 2" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    outcomes = results(tmp_path)
    assert len(outcomes) == 4
    assert outcomes.items() >= {name: result for name, result in results(uninterrupted).items() if name in outcomes}.items()
    for row in rows(tmp_path).values():
        scores = [outcomes[f"{cell_hash(Cell.from_json(row['cell']))}-0-{k}"].score for k in (0, 1)]
        assert scores[0] != scores[1]
        assert (float(row["final_mean_iou"]), float(row["final_std"])) == (np.mean(scores), np.std(scores, ddof=1))


@pytest.mark.parametrize(
    "arm",
    [
        kill_at_call(Training, "_step", 2),
        kill_at_call(Training, "_step", ITERATIONS + 2),
        kill_at_call(search.rerank, "_record", 2),
        kill_at_call(search.rerank, "_delete_state", 2),
        kill_at_call(search.rerank, "finish_reranking", 1),
    ],
    ids=["first_cell", "second_cell", "before_its_result", "after_its_result", "before_the_table"],
)
def test_a_killed_reranking_goes_on_to_the_same_results(
    tiny: RerankSettings, uninterrupted: Path, tmp_path: Path, arm: Callable[[], None]
) -> None:
    settings = changed(tiny, out=tmp_path)
    killed_while(lambda: search.rerank.main(settings), arm)
    search.rerank.main(settings)
    assert results(tmp_path) == results(uninterrupted)
    assert not list(tmp_path.glob("*/state.pt"))
    without_time = [
        {name: {**row, "seconds": ""} for name, row in rows(folder).items()} for folder in (tmp_path, uninterrupted)
    ]
    assert without_time[0] == without_time[1]


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_shows_what_there_is_and_goes_on(
    tiny: RerankSettings,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings, step, calls = changed(tiny, out=tmp_path), Training._step, iter(range(1, 100))

    def interrupted_step(self: Training, batches: Any) -> bool:
        if next(calls) == 2 * ITERATIONS + 1:  # in the third of four cells
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", interrupted_step)
        with pytest.raises(KeyboardInterrupt):
            search.rerank.main(settings)
    printed = capsys.readouterr().out
    assert "2 of 4 trainings are done; the same command goes on" in printed
    assert "best cell:" in printed
    search.rerank.main(settings)
    assert results(tmp_path) == results(uninterrupted)


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"learning_rate": 0.2}, "`learning_rate` 0.5, now it is 0.2"),
        ({"branch_channels": 4}, "`branch_channels` 8, now it is 4"),  # 8 was the run's
        ({"seed": 1}, "`seed`"),
        ({"val_split": "train"}, "`val_split`"),
        ({"crop_size": (49, 49)}, "`crop_size`"),
    ],
)
def test_other_settings_are_refused(tiny: RerankSettings, uninterrupted: Path, change: dict[str, Any], flag: str) -> None:
    with pytest.raises(InputError, match=flag):
        search.rerank.main(changed(tiny, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top": 0}, "`top` must be at least 1, got 0"),
        ({"seeds": 0}, "`seeds` must be at least 1, got 0"),
        ({"iterations": 0}, "`iterations` must be at least 1, got 0"),
        ({"output_stride": 0}, "`output_stride` must be 4 to 32, got 0"),
        ({"branch_channels": 0}, "`branch_channels` must be at least 1, got 0"),
        ({"compare": ("nothing",)}, "there is no cell 'nothing'"),
        ({"run": Path("nowhere")}, "nowhere is not a run"),
        ({"weights": Path("nowhere.pth")}, r"nowhere\.pth.*`weights`"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tiny: RerankSettings, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        search.rerank.main(changed(tiny, out=tmp_path / "out", **change))
    assert not (tmp_path / "out").exists()


def test_a_validation_that_cannot_fit_is_refused_before_a_cell_is_trained(
    tiny: RerankSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.training.memory, "free_memory", lambda: 10_000)
    with pytest.raises(InputError, match=r"picture \d \(camvid val\) of 33 × 49 pixels needs about 0\.0 GB of memory"):
        search.rerank.main(changed(tiny, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_cell_whose_training_diverges_fails_and_the_others_go_on(
    tiny: RerankSettings,
    run: Run,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    best, evaluate = ranked(run.trials)[0], EndToEndTask.evaluate

    def diverging(self: EndToEndTask, cell: Cell, seed: Sequence[int], on_step: Any) -> Any:
        if cell == best.cell:
            raise NotFiniteError("the loss was nan at iteration 2")
        return evaluate(self, cell, seed, on_step)

    settings = changed(tiny, out=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(EndToEndTask, "evaluate", diverging)
        search.rerank.main(settings)
    output = capsys.readouterr()
    assert f"trial {best.number}, seed 0 failed: the loss was nan at iteration 2; delete" in output.err
    failed = rows(tmp_path)[f"trial {best.number}"]
    assert (failed["final_rank"], failed["failures"]) == ("", "the loss was nan at iteration 2")
    assert "failed" in next(line for line in output.out.splitlines() if line.startswith(f"trial {best.number} "))
    name = f"{cell_hash(best.cell)}-0-0"
    assert {**results(uninterrupted), name: Failed("the loss was nan at iteration 2")} == results(tmp_path)

    forbid_training(monkeypatch)  # a failure is final: it would fail again
    search.rerank.main(settings)


def test_all_cells_failing_still_ends_in_order(
    tiny: RerankSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1"):
        search.rerank.main(changed(tiny, out=tmp_path, learning_rate=1e30))
    assert "no cell of the search is trained yet (4 trainings failed)" in capsys.readouterr().err


def test_a_damaged_result_is_named(tiny: RerankSettings, tmp_path: Path) -> None:
    settings = changed(tiny, out=tmp_path, top=1, compare=())
    search.rerank.main(settings)
    (path,), before = tmp_path.glob("*/result.json"), results(tmp_path)
    path.write_text('{"result": {')
    with pytest.raises(InputError, match=r"result\.json is damaged .* delete it and run the same command again"):
        search.rerank.main(settings)
    path.unlink()
    search.rerank.main(settings)
    assert results(tmp_path) == before


def test_two_ray_workers_give_the_same_as_one(
    tiny: RerankSettings, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="Ray is an extra: pip install -e '.[workers]'")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    search.rerank.main(changed(tiny, out=tmp_path, workers=2))
    assert results(tmp_path) == results(uninterrupted)


# What is trained, and what comes of it


def test_data_and_backbone_are_the_runs_unless_given(tiny: RerankSettings, run: Run, tmp_path: Path) -> None:
    assert run.settings.data.data_dir is not None
    inherited = training_settings(tiny, run)
    assert (inherited.data.dataset, inherited.backbone.backbone, inherited.backbone.stride) == ("camvid", BACKBONE, 16)
    assert (inherited.data, inherited.backbone) == (run.settings.data, run.settings.backbone)
    recipe = EndToEndTask(inherited, tmp_path).settings.recipe  # which completes it
    assert (inherited.head.branch_channels, recipe.iterations, recipe.validate_every) == (8, ITERATIONS, ITERATIONS)

    weighted = replace(run, settings=replace(run.settings, loss=LossSettings(class_weights=(2.0,) * 11)))
    assert (inherited.loss, training_settings(tiny, weighted).loss) == (LossSettings(), weighted.settings.loss)
    assert training_settings(changed(tiny, class_weights="balanced"), weighted).loss.class_weights == "balanced"

    other = training_settings(changed(tiny, dataset="shapes", backbone="resnet18", validate_every=1, branch_channels=4), run)
    assert other.data == DataSettings(dataset="shapes", data_dir=None, train_split="train")
    assert other.backbone == BackboneSettings(backbone="resnet18", weights=None, pretrained=False)
    assert (other.recipe.validate_every, other.head.branch_channels) == (1, 4)

    weights = training_settings(changed(tiny, weights=Path("other.pth"), weights_origin="tensorflow"), run)
    assert weights.backbone == BackboneSettings(backbone=BACKBONE, weights=Path("other.pth"), weights_origin="tensorflow")
    resampled = replace(run.settings.backbone, layers=(-1, -4), patch_size=16)
    patches = replace(run, settings=replace(run.settings, backbone=resampled))
    weights = training_settings(changed(tiny, weights=Path("other.pth")), patches)
    assert (weights.backbone.layers, weights.backbone.patch_size) == ((-1, -4), 16)


def pooling_cell(grid: int) -> Cell:
    return Cell((Branch(-1, Conv1x1()), Branch(0, PyramidPooling(grid_size=(grid, grid)))))


class Folders(EndToEndTask):
    """The folders of the task alone."""

    dense_task: DenseTask = Segmentation(("a", "b"))  # elsewhere it is that of the data

    def __init__(self, directory: Path) -> None:
        self.directory, self.held_out = directory, []


FINAL = ((0.10, 0.10), (0.20, 0.40), (0.25, 0.15), (0.35, 0.45))  # means .1 .3 .2 .4 in the order of the proxy's ranks 4 3 2 1


@pytest.fixture
def made(tmp_path: Path, tiny: RerankSettings) -> tuple[Folders, list[Candidate], RerankSettings]:
    """Four cells and a known one with two seeds each, and one that failed with its second, as written by hand."""
    task = Folders(tmp_path)
    names = [Candidate(f"trial {i}", pooling_cell(grid), (0.1 * (i + 1),), 4 - i) for i, grid in enumerate((1, 2, 4, 8))]
    known = [Candidate("aspp", load_cell("aspp"), (0.9, 0.8), None), Candidate("psp", load_cell("psp"), (), None)]
    for candidate, scores in zip((*names, *known), (*FINAL, (0.05, 0.05), (0.9,)), strict=True):
        for k, score in enumerate(scores):
            result = {
                "scores": {"score": score, "details": [score, None]},
                "parameters": 7,
                "multiply_adds": 2e9,
                "seconds": 1.5,
            }
            write_json(task.folder(candidate.cell, (0, k)) / "result.json", {"result": result, "failure": None})
    write_json(task.folder(known[1].cell, (0, 1)) / "result.json", {"result": None, "failure": "nan"})
    return task, [*known, *names], changed(tiny, seeds=2)


def test_ranks_and_correlation_of_known_scores(made: tuple[Folders, list[Candidate], RerankSettings]) -> None:
    ordered = ranks(*made)
    assert [row.candidate.name for row in ordered] == ["trial 3", "trial 1", "trial 2", "trial 0", "aspp", "psp"]
    assert [row.final_rank for row in ordered] == [1, 2, 3, 4, None, None]
    assert [row.candidate.proxy_rank for row in ordered] == [1, 3, 2, 4, None, None]
    assert ordered[1].mean == pytest.approx(0.3)
    assert ordered[-1].failures == ("nan",)
    rho = correlation(ordered)
    assert rho is not None
    assert rho.rho == pytest.approx(0.8)  # 1 − 6·(0 + 1 + 1 + 0) / (4·15); with ASPP, best on the proxy, it would be lower
    assert rho.count == 4
    assert correlation(ordered[:2]) is None


def test_the_table_of_known_scores(
    made: tuple[Folders, list[Candidate], RerankSettings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish_reranking(tmp_path, ranks(*made), made[2].seeds, made[0].dense_task)
    lines = capsys.readouterr().out.splitlines()
    fields = {line.split("  ")[0]: line.split() for line in lines}
    assert fields["trial 1"][:7] == ["trial", "1", "3", "20.00", "2", "30.00", "±"]  # ±10 around it, one degree of freedom
    assert fields["trial 1"][7:12] == ["14.14", "7", "2.00", "B", "1.5"]
    assert lines[6].split()[:5] == ["aspp", "–", "85.00", "–", "5.00"]
    assert lines[7].split()[:8] == ["psp", "–", "–", "–", "failed", "–", "–", "–"]
    assert not any("the same command goes on" in line for line in lines)
    assert any(line.startswith("proxy and final score, 4 cells: Spearman's ρ = 0.80 (") for line in lines)
    assert json.loads((tmp_path / "best_cell.json").read_text()) == json.loads(pooling_cell(8).to_json())


class Split:
    """The name of a split of which no picture is read."""

    def __init__(self, split: str) -> None:
        self.name, self.split = "made", split


def held_out(split: str, content: str = "a") -> HeldOut:
    return HeldOut(cast(Dataset, Split(split)), Fingerprint(content, "labels"))


@pytest.fixture
def tested(made: tuple[Folders, list[Candidate], RerankSettings]) -> tuple[Folders, list[Candidate], RerankSettings]:
    """Two test splits with scores of all trainings: a tenth and a hundredth of the final one, but for one on the second."""
    task, candidates, _ = made
    task.held_out = [held_out("other"), held_out("night")]
    for candidate in candidates:
        for k in (0, 1):
            folder = task.folder(candidate.cell, (0, k))
            result = read_outcome(folder)
            for split, share in zip(task.held_out, (0.1, 0.01), strict=True):
                if isinstance(result, EndToEndResult) and (candidate.name, k, split.name) != ("trial 2", 1, "night"):
                    scores = {"score": share * result.score, "details": [None]}
                    write_json(folder / f"test-{split.name}.json", {"content": ["a", "labels"], "scores": scores})
    return made


def test_scores_on_test_splits_stand_beside_the_final_ones_and_rank_nothing(
    tested: tuple[Folders, list[Candidate], RerankSettings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tested[0]
    ordered = ranks(*tested)
    finish_reranking(tmp_path, ordered, 2, task.dense_task)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["proxy", "final", "other", "night"]
    fields = {line.split("  ")[0]: line.split() for line in lines[2:8]}
    assert fields["trial 3"][5:14] == ["40.00", "±", "7.07", "4.00", "±", "0.71", "0.40", "±", "0.07"]
    assert fields["trial 2"][5:13] == ["20.00", "±", "7.07", "2.00", "±", "0.71", "–", "7"]  # one is not made
    assert fields["psp"][4:9] == ["failed", "–", "–", "–", "–"]
    assert "test splits, which choose nothing: other, night (scores are missing; the same command makes them)" in lines
    csv_row = rows(tmp_path)["trial 3"]
    assert float(csv_row["test_other_mean_iou"]) == pytest.approx(0.04)
    assert float(csv_row["test_other_std"]) == pytest.approx(0.01 / 2**0.5)
    assert rows(tmp_path)["trial 2"]["test_night_mean_iou"] == ""
    task.held_out = []
    assert ranks(*tested) == [replace(row, test_scores={}) for row in ordered]


def test_the_lead_over_known_cells_is_of_equal_seeds(
    tested: tuple[Folders, list[Candidate], RerankSettings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, candidates, _ = tested

    def lead() -> list[list[str]]:
        finish_reranking(tmp_path, ranks(*tested), 2, task.dense_task)
        lines = capsys.readouterr().out.splitlines()
        heading = next(line for line in lines if " less each known cell, " in line)
        below = lines[lines.index(heading) + 1 :]
        return [heading.split(), *(line.split() for line in below[: below.index("")])]

    heading, columns, *of_cells = lead()
    assert heading[:2] == ["trial", "3,"]
    assert heading[-5:] == ["standard", "deviation", "of", "2", "seeds:"]
    assert columns == ["than", "final", "other", "night"]
    assert of_cells == [["aspp", "+35.00", "±", "7.07", "+3.50", "±", "0.71", "+0.35", "±", "0.07"]]  # psp has failed
    # where the best cell has the second seed alone, and ASPP the first alone, there is nothing to compare
    by_name = {candidate.name: candidate.cell for candidate in candidates}
    (task.folder(by_name["trial 3"], (0, 0)) / "result.json").unlink()
    (task.folder(by_name["aspp"], (0, 1)) / "result.json").unlink()
    heading, _, *of_cells = lead()
    assert " ".join(heading).endswith("of one seed, so nothing says how much is noise:")
    assert of_cells == [["aspp", "–", "–", "–"]]


def test_a_score_of_other_pictures_does_not_count(tested: tuple[Folders, list[Candidate], RerankSettings]) -> None:
    task, candidates, _ = tested
    folder = task.folder(candidates[0].cell, (0, 0))
    assert held_out("other").scores(folder) is not None
    assert held_out("other", "b").scores(folder) is None
    (folder / "test-other.json").write_text('{"content": ["a", "labels"]}')
    with pytest.raises(InputError, match=r"test-other\.json is damaged .* delete it and run the same command again"):
        held_out("other").scores(folder)


def with_test_split(run: Run, folder: Path, *, changed_by: int) -> Path:
    """The search's data with its validation pictures as test split, but that one pixel of each is `changed_by` so much."""
    data_dir = shutil.copytree(known(run.settings.data.data_dir), folder)
    (data_dir / "test").mkdir()
    shutil.copytree(data_dir / "valannot", data_dir / "testannot")
    for path in (data_dir / "val").iterdir():
        with Image.open(path) as picture:
            pixels = np.array(picture)
        pixels[0, 0] += np.uint8(changed_by)
        Image.fromarray(pixels).save(data_dir / "test" / path.name)
    (data_dir / "test.txt").write_text((data_dir / "val.txt").read_text().replace("val", "test"))
    return data_dir


@pytest.fixture
def to_test(tiny: RerankSettings, run: Run, uninterrupted: Path, tmp_path: Path) -> RerankSettings:
    """Settings by which the finished re-ranking is tested."""
    out = shutil.copytree(uninterrupted, tmp_path / "out")
    data_dir = with_test_split(run, tmp_path / "camvid", changed_by=1)
    return changed(tiny, out=out, data_dir=data_dir, test_splits=("test",))


def test_networks_are_tested_as_they_were_validated(
    to_test: RerankSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the validation pictures, but for one pixel of each, scores are the final ones but for a little."""
    out = known(to_test.out)
    with monkeypatch.context() as patch:
        patch.setattr(EndToEndTask, "_train", lambda *_: pytest.fail("all is trained"))
        search.rerank.main(to_test)
    table = rows(out)
    assert len({row["final_mean_iou"] for row in table.values()}) == 4
    for row in table.values():
        assert float(row["test_test_mean_iou"]) == pytest.approx(float(row["final_mean_iou"]), abs=1e-3)
    forbid_training(monkeypatch)  # once is enough
    search.rerank.main(replace(to_test, test_splits=("test", "test")))
    assert rows(out) == table
    assert capsys.readouterr().out.count("test splits, which choose nothing: test\n") == 2


def test_a_killed_test_goes_on(to_test: RerankSettings) -> None:
    killed_while(lambda: search.rerank.main(to_test), kill_at_call(HeldOut, "score", 2))
    assert len(list(known(to_test.out).glob("*/test-test.json"))) == 1
    search.rerank.main(to_test)
    assert all(row["test_test_mean_iou"] for row in rows(known(to_test.out)).values())


def test_a_network_that_is_trained_again_is_tested_again(to_test: RerankSettings) -> None:
    search.rerank.main(to_test)
    table, (first, *_) = rows(known(to_test.out)), sorted(known(to_test.out).glob("*/result.json"))
    kept = first.with_name("test-test.json")
    write_json(kept, json.loads(kept.read_text()) | {"scores": {"score": 0.123, "details": [None] * 11}})
    first.unlink()
    search.rerank.main(to_test)
    without_time = [{name: row | {"seconds": ""} for name, row in each.items()} for each in (table, rows(known(to_test.out)))]
    assert without_time[0] == without_time[1]


def test_a_network_that_is_gone_is_named(to_test: RerankSettings) -> None:
    first, *_ = sorted(known(to_test.out).glob("*/last.safetensors"))
    first.unlink()
    with pytest.raises(InputError, match=r"last\.safetensors.* restore the file, or delete .* to train the network again"):
        search.rerank.main(to_test)


def test_pictures_that_were_used_are_no_test(tiny: RerankSettings, run: Run, tmp_path: Path) -> None:
    data_dir = with_test_split(run, tmp_path / "camvid", changed_by=0)
    settings = changed(tiny, out=tmp_path / "out", data_dir=data_dir)
    refused = {
        "train": r"^train is used already, so scores on train would be too good: give another `test_splits`$",
        "test": r"^\w+ and test have \d pictures in common under other names, such as .*, so scores on test would be too good",
        "vall": "split 'vall' of camvid is unknown",
    }
    for split, message in refused.items():
        with pytest.raises(InputError, match=message):
            search.rerank.main(replace(settings, test_splits=(split,)))
    shapes = changed(tiny, dataset="shapes", out=tmp_path / "out", test_splits=("train",), branch_channels=8)
    with pytest.raises(InputError, match=r"^train is used already, so scores on train would be too good"):
        search.rerank.main(shapes)
    # what the search was scored on is used too, where networks are validated on other pictures
    moved = shutil.copytree(data_dir, tmp_path / "moved")
    for path in (moved / "train").iterdir():
        with Image.open(path) as picture:
            Image.fromarray(255 - np.array(picture)).save(path)
    with pytest.raises(InputError, match=r"^train and val have \d pictures in common under other names, such as"):
        search.rerank.main(changed(tiny, out=tmp_path / "out", data_dir=moved, val_split="train", test_splits=("val",)))
    assert not (tmp_path / "out").exists()


def test_only_a_test_asks_for_the_data_of_the_search(tiny: RerankSettings, run: Run, tmp_path: Path) -> None:
    data_dir = with_test_split(run, tmp_path / "camvid", changed_by=1)
    elsewhere = replace(run, settings=replace(run.settings, data=replace(run.settings.data, data_dir=Path("gone"))))
    settings = training_settings(changed(tiny, data_dir=data_dir), elsewhere)
    task = EndToEndTask(settings, tmp_path / "out", ("test",))
    with pytest.raises(InputError, match=r"its data cannot be opened .*gone.*: restore them, or leave `test_splits` out"):
        used_splits(elsewhere, task)


def test_a_test_split_that_no_file_can_be_named_after_is_refused(tmp_path: Path) -> None:
    folder = write_camvid(tmp_path / "camvid")
    lines = ['classes = ["a", "b", "c", "d"]', 'images = "{split}/{name}.png"', 'labels = "{split}annot/{name}.png"']
    lines += ["[splits.train]", '[splits."val/1"]', 'folder = "val"']
    (folder / "set.toml").write_text("\n".join(lines))
    data = DataSettings(dataset=str(folder / "set.toml"))
    with pytest.raises(InputError, match=r"^a split of `test_splits` is called 'val/1', which is no name of a file"):
        open_held_out(("val/1",), data)


def test_of_a_search_that_was_cut_short_only_cells_in_full_are_compared(
    made: tuple[Folders, list[Candidate], RerankSettings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, candidates, settings = made
    shorter = {"trial 0": 62}  # iterations; the others have 1,000
    of_rungs = [
        replace(each, proxy_iterations=shorter.get(each.name, 1000), is_in_full=each.name not in shorter)
        for each in candidates
    ]
    ordered = ranks(task, of_rungs, settings)
    assert [row.final_rank for row in ordered] == [1, 2, 3, 4, None, None]  # which cells were trained is as before
    rho = correlation(ordered)
    assert rho is not None
    assert rho.count == 3
    assert rho.rho == pytest.approx(0.5)  # 1 − 6·(0 + 1 + 1) / (3·8)
    finish_reranking(tmp_path, ordered, settings.seeds, task.dense_task)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["rank", "iterations", "mIOU"]
    fields = {line.split("  ")[0]: line.split() for line in lines}
    assert fields["trial 0"][:6] == ["trial", "0", "4", "62", "10.00", "4"]
    assert "picture and rho are without 1 cell that the search did not train in full" in lines
    assert any(line.startswith("proxy and final score, 3 cells: Spearman's ρ = 0.50 (") for line in lines)
    assert {name: row["proxy_iterations"] for name, row in rows(tmp_path).items()} == {
        each.name: "62" if each.name in shorter else "1000" for each in candidates
    }
    names = re.findall(r"<title>([^:<]+):", (tmp_path / "scatter.svg").read_text(encoding="utf-8"))
    assert sorted(names) == ["aspp", "trial 1", "trial 2", "trial 3"]


def test_cells_of_a_search_with_rungs_say_how_long_they_were_trained(tiny: RerankSettings, run: Run) -> None:
    best = ranked(run.trials)
    trials = [replace(record, rung=0 if record == best[0] else 1) for record in run.trials]
    found = candidates_of(replace(run, trials=trials, rungs=(2, 8)), changed(tiny, top=4))
    told = {each.name: (each.proxy_rank, each.proxy_iterations, each.is_in_full) for each in found}
    assert told["dpc"] == (None, 8, True)
    assert told[f"trial {best[0].number}"] == (len(best), 2, False)  # behind those in full
    assert told[f"trial {best[1].number}"] == (1, 8, True)
    assert all(each.proxy_iterations is None and each.is_in_full for each in candidates_of(run, tiny))


def test_of_two_objectives_the_front_is_trained(tiny: RerankSettings, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    of_two = replace(run, identity=run.identity | {"second_objective": "multiply_adds"})
    front = front_of(of_two, ranked(run.trials))
    assert 0 < len(front) < len(ranked(run.trials))
    found = candidates_of(of_two, changed(tiny, top=50))
    of_search = [each for each in found if each.proxy_rank is not None]
    assert [each.cell for each in of_search] == [record.cell for record in front]
    places = [record.number for record in ranked(run.trials)]
    assert [each.proxy_rank for each in of_search] == [places.index(record.number) + 1 for record in front]
    assert [each.cost for each in of_search] == [("multiply_adds", record.multiply_adds) for record in front]
    assert f"{len(front)} of the {len(front)} cells on the Pareto front are trained" in capsys.readouterr().err
    for each in found:
        costs = [known.result.multiply_adds for known in run.baselines if known.name == each.name]
        assert each.proxy_rank is not None or (each.cost and each.cost[1]) == (costs[0] if costs else None)


def test_of_a_long_front_those_with_the_most_room_around_are_trained(tiny: RerankSettings, run: Run) -> None:
    places = {0: (0.5, 9), 1: (0.49, 8), 2: (0.3, 4), 3: (0.1, 1), 4: (0.2, 9)}  # the last is beaten
    trials = [
        replace(run.trials[0], number=number, form=str(number), score=score, multiply_adds=cost, rung=0)
        for number, (score, cost) in places.items()
    ]
    of_two = replace(run, trials=trials, identity=run.identity | {"second_objective": "multiply_adds"})
    for top, names in ((2, [0, 3]), (3, [0, 2, 3]), (9, [0, 1, 2, 3])):
        found = candidates_of(of_two, changed(tiny, top=top))
        assert [each.name for each in found if each.proxy_rank] == [f"trial {number}" for number in names]


def test_of_two_objectives_the_final_front_is_named(
    made: tuple[Folders, list[Candidate], RerankSettings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By final scores: trial 3, then 1, 2, 0, and of the known cells those with a cost."""
    task, candidates, settings = made
    costs = {"trial 3": 0.9, "trial 1": 1.1, "trial 2": 0.8, "trial 0": 0.7, "aspp": 0.75}
    of_two = [replace(each, cost=("latency", costs[each.name]) if each.name in costs else None) for each in candidates]
    finish_reranking(tmp_path, ranks(task, of_two, settings), settings.seeds, task.dense_task)
    assert "Pareto front of final mIOU and the search's latency: trial 3, trial 2, trial 0\n" in capsys.readouterr().out
    found = {name: (row["proxy_latency"], row["is_on_front"]) for name, row in rows(tmp_path).items()}
    on_front = ("trial 3", "trial 2", "trial 0")
    assert found == {each.name: (str(costs.get(each.name, "")), str(each.name in on_front)) for each in candidates}


def test_in_an_unfinished_ranking_only_shared_seeds_count(
    made: tuple[Folders, list[Candidate], RerankSettings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, candidates, _ = made
    (task.folder(candidates[2].cell, (0, 1)) / "result.json").unlink()  # trial 0 has its first seed alone
    ordered = ranks(*made)
    assert [row.candidate.name for row in ordered] == ["trial 3", "trial 2", "trial 1", "trial 0", "aspp", "psp"]
    assert [row.mean for row in ordered[:4]] == [0.35, 0.25, 0.2, 0.1]
    finish_reranking(tmp_path, ordered, made[2].seeds, made[0].dense_task)
    assert "11 of 12 trainings are done; the same command goes on" in capsys.readouterr().out.splitlines()


def test_of_a_cell_that_failed_with_one_seed_the_others_give_no_rank(
    made: tuple[Folders, list[Candidate], RerankSettings],
) -> None:
    task, candidates, _ = made
    best = task.folder(candidates[5].cell, (0, 1)) / "result.json"
    write_json(best, {"result": None, "failure": "nan"})
    ordered = ranks(*made)
    assert [row.candidate.name for row in ordered if row.final_rank] == ["trial 1", "trial 2", "trial 0"]
    assert ordered[0].mean == pytest.approx(0.3)  # of both seeds: the failed one keeps nobody waiting


def test_known_cells_have_the_proxy_scores_of_the_same_cell(tiny: RerankSettings, run: Run, tmp_path: Path) -> None:
    scores = {record.name: record.result.score for record in run.baselines}
    assert {"dpc", "aspp"} <= scores.keys()
    other = tmp_path / "aspp.json"  # another cell of a known name
    other.write_text(pooling_cell(4).to_json())
    found = candidates_of(run, changed(tiny, compare=("dpc", str(other))))
    assert [candidate.proxy_scores for candidate in found[:2]] == [(scores["dpc"],), ()]
    with pytest.raises(InputError, match=r"`compare` has two cells of the name 'aspp': rename the file .*aspp\.json"):
        candidates_of(run, changed(tiny, compare=("aspp", str(other))))


def test_a_passing_failure_is_tried_again(
    tiny: RerankSettings,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings, step, calls = changed(tiny, out=tmp_path), Training._step, iter(range(1, 100))

    def full_once(self: Training, batches: Any) -> bool:
        if next(calls) == ITERATIONS + 3:  # in the second of four cells
            raise torch.OutOfMemoryError("tried to allocate 20 MiB")
        return step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", full_once)
        search.rerank.main(settings)
    printed = capsys.readouterr()
    assert "failed: out of GPU memory: tried to allocate 20 MiB; the same command goes on with it" in printed.err
    assert "3 of 4 trainings are done; the same command goes on" in printed.out
    assert len(list(tmp_path.glob("*/state.pt"))) == 1
    search.rerank.main(settings)
    assert results(tmp_path) == results(uninterrupted)


def test_equal_cells_in_another_order_of_branches_are_one_training(tiny: RerankSettings, tmp_path: Path) -> None:
    branches = Branch(-1, Conv1x1()), Branch(-1, PyramidPooling(grid_size=(2, 2)))
    for name, cell in (("first", Cell(branches)), ("second", Cell(branches[::-1]))):
        (tmp_path / f"{name}.json").write_text(cell.to_json())
    settings = changed(tiny, out=tmp_path / "out", top=1, compare=(str(tmp_path / "first.json"),))
    killed_while(lambda: search.rerank.main(settings), kill_at_call(Training, "_step", 2))
    search.rerank.main(changed(settings, compare=(*settings.compare, str(tmp_path / "second.json"))))
    table = rows(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*/result.json"))) == len(table) - 1 == 2
    assert table["first"]["final_mean_iou"] == table["second"]["final_mean_iou"] != ""


def test_an_error_of_a_training_names_the_flag_of_this_command(tiny: RerankSettings, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^`loading_processes` must be at least 0, got -1"):
        search.rerank.main(changed(tiny, out=tmp_path / "out", loading_processes=-1))
