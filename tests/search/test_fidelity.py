"""The 31 cells, four protocols end to end on a tiny CamVid, any end in between, and what is made of the scores."""

import csv
import json
import math
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import search.backbones.shapes
import search.fidelity
import search.reports.fidelity
from reference.cell import BACKBONE_FEATURE, Cell
from reference.grid import Grid
from search.backbones import create_backbone
from search.cells.space import SearchSpace, canonical_form, load_cell
from search.datasets import open_dataset, open_splits
from search.dense_tasks import Measure
from search.errors import InputError
from search.fidelity import PROTOCOLS, FidelitySettings, fidelity_cells
from search.folder import Folder
from search.reports.fidelity import (
    Score,
    agreements,
    cell_scores,
    load_scores,
    noise_ceiling,
    score_name,
    self_agreement,
    write_report,
)
from search.reports.rank_correlation import spearman
from search.settings import SHAPES, BackboneSettings, known
from search.tasks.end_to_end import EndToEndTask
from search.tasks.feature_cache import padded_size
from search.tasks.proxy import NotFiniteError, ProxyTask
from tests.search.composed import changed, composed

SMALL, LARGE = "test_efficientnet", "test_resnet"
FOUR = dict(list(fidelity_cells().items())[3:7])  # r18, pool, 1x1+r6, 1x1+r12
SIZE = (33, 49)


# The space


def test_the_space_has_31_different_cells_of_the_search_space() -> None:
    cells = fidelity_cells()
    assert len(cells) == len(set(cells.values())) == 31
    for cell in cells.values():
        assert canonical_form(cell) == cell
        assert SearchSpace(len(cell.branches)).contains(cell)
        assert {branch.input_index for branch in cell.branches} == {BACKBONE_FEATURE}


def test_the_space_is_every_choice_of_aspps_branches() -> None:
    aspp = load_cell("aspp")
    choices = [frozenset(branch.operation for branch in cell.branches) for cell in fidelity_cells().values()]
    assert len(set(choices)) == 31
    assert frozenset().union(*choices) == {branch.operation for branch in aspp.branches}
    assert fidelity_cells()["1x1+r6+r12+r18+pool"] == canonical_form(aspp)
    for branch in aspp.branches:
        assert sum(branch.operation in choice for choice in choices) == 16  # with each choice of the other four


# A whole run


def write_camvid(folder: Path) -> Path:
    """Four training and three validation pictures in SegNet's layout: each half of a picture has a colour and a class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        for name in (split, f"{split}annot"):
            (folder / name).mkdir(parents=True)
        for i in range(count):
            label = np.repeat(rng.integers(0, 4, 2), (16, SIZE[1] - 16)).astype(np.uint8)[None].repeat(SIZE[0], axis=0)
            image = 60 * label[..., None] + rng.integers(0, 30, (*SIZE, 3), dtype=np.uint8)
            Image.fromarray(image.astype(np.uint8)).save(folder / split / f"{i}.png")
            Image.fromarray(label).save(folder / f"{split}annot" / f"{i}.png")
        lines = [f"/SegNet/{split}/{i}.png /SegNet/{split}annot/{i}.png\n" for i in range(count)]
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> FidelitySettings:
    """Settings under which a cell takes a tenth of a second."""
    folder = tmp_path_factory.mktemp("tiny")
    for name in (SMALL, LARGE):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            torch.save(timm.create_model(name).state_dict(), folder / f"{name}.pth")
    return composed(
        FidelitySettings,
        dataset="camvid",
        data_dir=write_camvid(folder / "camvid"),
        backbone=SMALL,
        weights=folder / f"{SMALL}.pth",
        cache_dir=folder / "cache",
        out=folder / "runs" / "camvid",
        device="cpu",
        crop_size=SIZE,
        iterations=3,
        long_iterations=6,
        batch_size=2,
        learning_rate=0.5,
        branch_channels=8,
        statistics_batches=1,
        seeds=1,
        **{
            "large.backbone": LARGE,
            "large.weights": folder / f"{LARGE}.pth",
            "end_to_end.iterations": 2,
            "end_to_end.batch_size": 2,
            "end_to_end.statistics_batches": 1,
            "end_to_end.loading_processes": 0,
        },
    )


@pytest.fixture(autouse=True)
def few_cells_and_no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cells instead of 31 where `search.fidelity` looks the space up; pictures are drawn by `uninterrupted` alone."""
    monkeypatch.setattr(search.fidelity, "fidelity_cells", lambda: FOUR)
    monkeypatch.setattr(search.reports.fidelity, "write_scatters", lambda *_: None)


@pytest.fixture(scope="module")
def uninterrupted(tiny: FidelitySettings) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search.fidelity, "fidelity_cells", lambda: FOUR)
        search.fidelity.main(changed(tiny, seeds=2))
    return known(tiny.out)


@pytest.fixture
def settings(tiny: FidelitySettings, tmp_path: Path) -> FidelitySettings:
    """The same in a folder of its own, two protocols."""
    return changed(tiny, out=tmp_path / "camvid", protocols=("proxy", "end_to_end"))


def scores_of(
    directory: Path, protocols: Sequence[str] = PROTOCOLS, seeds: int = 2
) -> dict[tuple[str, str, int], float | None]:
    scores = [score for score in load_scores(directory, protocols, list(FOUR)) if score.seed < seeds]
    return {(score.protocol, score.cell_name, score.seed): score.score for score in scores}


def run(settings: FidelitySettings) -> Path:
    search.fidelity.main(settings)
    return known(settings.out)


def score_path(directory: Path, protocol: str, cell_name: str, seed: int) -> Path:
    return Folder(directory / protocol).result_path(score_name(cell_name, seed))


def forbid_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(*_: object) -> None:
        raise AssertionError("nothing is left to evaluate")

    for task in (ProxyTask, EndToEndTask):
        monkeypatch.setattr(task, "evaluate", evaluate)


def test_a_run_leaves_what_it_is_for(
    tiny: FidelitySettings, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with (uninterrupted / "scores.csv").open(newline="") as file:
        rows = {(row["protocol"], row["cell"], int(row["seed"])): float(row["mean_iou"]) for row in csv.DictReader(file)}
    assert set(rows) == {(protocol, name, seed) for protocol in PROTOCOLS for name in FOUR for seed in (0, 1)}
    assert rows == scores_of(uninterrupted)
    assert len(set(rows.values())) > len(PROTOCOLS) * len(FOUR)  # seeds, protocols and cells differ
    pairs = [f"{a}_{b}.png" for i, a in enumerate(PROTOCOLS) for b in PROTOCOLS[i + 1 :]]
    assert len(pairs) == 6
    assert all((uninterrupted / name).is_file() for name in (*pairs, "fidelity.png", "report.md"))
    assert not (uninterrupted / "end_to_end" / "trainings").exists()

    capsys.readouterr()
    forbid_evaluation(monkeypatch)
    search.fidelity.main(changed(tiny, seeds=2))
    means = {p: [np.mean([rows[p, name, seed] for seed in (0, 1)]) for name in FOUR] for p in PROTOCOLS}
    rho = spearman([float(x) for x in means["proxy"]], [float(y) for y in means["long"]])
    table = capsys.readouterr().out.splitlines()
    (line,) = [line for line in table if line.startswith("proxy – long training")]
    assert line.split()[4:6] == ["4", f"{rho:.2f}"]


def test_every_training_has_random_numbers_of_its_own(tiny: FidelitySettings) -> None:
    settings = changed(tiny, seeds=3)
    jobs = [job for protocol in PROTOCOLS for job in search.fidelity._jobs(settings, protocol, FOUR)]
    assert len({job.seed for job in jobs}) == len(jobs) == 4 * 4 * 3


def test_random_numbers_follow_from_names_alone(tiny: FidelitySettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def numbers(cells: dict[str, Cell]) -> dict[object, Sequence[int]]:
        jobs = [job for protocol in PROTOCOLS for job in search.fidelity._jobs(changed(tiny, seeds=2), protocol, cells)]
        return {job.key: job.seed for job in jobs}

    before = numbers(FOUR)
    assert before["long", "pool", 1] == (0, crc32(b"long"), 1, crc32(b"pool"))
    monkeypatch.setattr(search.fidelity, "PROTOCOLS", ("earlier", *reversed(PROTOCOLS)))
    after = numbers(dict(reversed(fidelity_cells().items())))
    assert after.items() >= before.items()
    assert len(set(after.values())) == len(after) == 4 * 31 * 2


def test_a_protocol_added_before_another_reseeds_nothing(settings: FidelitySettings, uninterrupted: Path) -> None:
    alone = scores_of(run(changed(settings, protocols=("long",))))
    assert alone == scores_of(uninterrupted, ("long",), seeds=1)
    times = {path: path.stat().st_mtime_ns for path in known(settings.out).glob("long/*-seed*.json")}
    assert len(times) == len(FOUR)
    both = scores_of(run(changed(settings, protocols=("proxy", "long"))))
    assert both == scores_of(uninterrupted, ("proxy", "long"), seeds=1)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_protocols_and_seeds_can_be_added(settings: FidelitySettings, uninterrupted: Path) -> None:
    first = scores_of(run(changed(settings, protocols=("proxy",))))
    assert set(first) == {("proxy", name, 0) for name in FOUR}
    more = scores_of(run(changed(settings, protocols=("proxy", "long"), seeds=2)))
    assert more == {key: score for key, score in scores_of(uninterrupted).items() if key[0] in ("proxy", "long")}

    directory = run(changed(settings, protocols=("long",), seeds=1))  # asks for less, and takes nothing from the report
    with (directory / "scores.csv").open(newline="") as file:
        reported = {(row["protocol"], row["seed"]) for row in csv.DictReader(file)}
    assert reported == {(protocol, seed) for protocol in ("proxy", "long") for seed in "01"}


# Any end in between


def die_at(owner: Any, name: str, call: int) -> None:
    original, calls = getattr(owner, name), 0

    def counting(*args: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **keywords)

    setattr(owner, name, counting)


DEATHS: dict[str, tuple[Any, str, int]] = {
    "before a score is written": (Folder, "write_result", 3),
    "in a proxy training": (ProxyTask, "evaluate", 2),
    "before a network is deleted": (shutil, "rmtree", 2),
    "before the last network is deleted": (shutil, "rmtree", 4),
    "in the second training end to end": (EndToEndTask, "evaluate", 2),
}


def run_until_death(settings: FidelitySettings, death: str) -> None:
    torch.set_num_threads(1)
    vars(search.fidelity)["fidelity_cells"] = lambda: FOUR
    die_at(*DEATHS[death])
    search.fidelity.main(settings)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a server of children that have everything imported needs fork")
@pytest.mark.parametrize("death", DEATHS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(settings: FidelitySettings, uninterrupted: Path, death: str) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    child = context.Process(target=run_until_death, args=(settings, death))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL

    expected = {(p, name, s): x for (p, name, s), x in scores_of(uninterrupted).items() if p in settings.protocols and s == 0}
    kept = scores_of(known(settings.out))
    assert kept.items() <= expected.items()
    assert (len(kept) == len(expected)) == (death == "before the last network is deleted")
    directory = run(settings)
    assert scores_of(directory) == expected
    assert not (directory / "end_to_end" / "trainings").exists()


def failing(protocol: str, cell_number: int, error: BaseException) -> Callable[..., Any]:
    original, numbers = ProxyTask.evaluate, (crc32(protocol.encode()), crc32(list(FOUR)[cell_number].encode()))

    def evaluate(self: ProxyTask, cell: Cell, seed: Sequence[int], on_step: Any) -> Any:
        if (seed[1], seed[3]) == numbers:
            raise error
        return original(self, cell, seed, on_step)

    return evaluate


def test_ctrl_c_shows_what_is_there_and_goes_on(
    settings: FidelitySettings, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = changed(settings, protocols=("proxy", "long"))
    with monkeypatch.context() as patch:
        patch.setattr(ProxyTask, "evaluate", failing("long", 3, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            search.fidelity.main(settings)
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("proxy – long training")
    assert line.split()[4] == "3"  # cells that both have
    expected = scores_of(uninterrupted, settings.protocols, seeds=1)
    assert scores_of(run(settings)) == expected


def test_ctrl_c_before_the_first_score_ends_in_order(
    settings: FidelitySettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ProxyTask, "evaluate", failing("proxy", 0, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        search.fidelity.main(settings)
    assert "proxy – end to end                    –      –" in capsys.readouterr().out


def test_a_run_without_a_folder_of_its_own_is_named_after_its_data(
    settings: FidelitySettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ProxyTask, "evaluate", failing("proxy", 0, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        search.fidelity.main(changed(settings, out=None))
    assert (tmp_path / "runs" / "fidelity" / "camvid" / "report.md").is_file()


def test_a_cell_that_fails_is_left_out_and_named(
    settings: FidelitySettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = changed(settings, protocols=("proxy", "long"))
    name = list(FOUR)[1]
    with monkeypatch.context() as patch:
        patch.setattr(ProxyTask, "evaluate", failing("long", 1, NotFiniteError("the loss was nan at iteration 2")))
        directory = run(settings)
    printed = capsys.readouterr()
    assert f"left out: {name} of long training, seed 0: the loss was nan at iteration 2" in printed.out
    assert f"long, {name}, seed 0 failed: the loss was nan at iteration 2" in printed.err
    assert printed.out.splitlines()[1].split()[4] == "3"
    assert "the loss was nan" in (directory / "scores.csv").read_text()
    assert "the loss was nan" in (directory / "report.md").read_text(encoding="utf-8")

    forbid_evaluation(monkeypatch)  # a failure is final: it would fail again
    run(settings)


def test_a_passing_failure_leaves_no_score_and_is_tried_again(
    settings: FidelitySettings, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = changed(settings, protocols=("proxy",))
    with monkeypatch.context() as patch:
        patch.setattr(ProxyTask, "evaluate", failing("proxy", 1, torch.OutOfMemoryError("tried 3 GiB")))
        assert len(scores_of(run(settings))) == len(FOUR) - 1
    assert "seed 0 failed: out of GPU memory: tried 3 GiB; the same command goes on with it" in capsys.readouterr().err
    assert scores_of(run(settings)) == scores_of(uninterrupted, ("proxy",), seeds=1)


# What is refused


def test_other_data_are_refused_by_their_split(tiny: FidelitySettings, uninterrupted: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        folder = tmp_path / split
        shutil.copytree(known(tiny.data.data_dir), folder)
        Image.fromarray(np.zeros(SIZE, np.uint8)).save(folder / f"{split}annot" / "0.png")
        other = changed(tiny, protocols=("end_to_end",), data_dir=folder)
        blamed = rf"other labels of `{split}_split` than now"
        with pytest.raises(InputError, match=rf"protocol .*/end_to_end was started with {blamed} .*: restore them, "):
            search.fidelity.main(other)


def test_crops_are_whole_images_by_default(tiny: FidelitySettings, tmp_path: Path) -> None:
    settings = changed(tiny, crop_size=None)
    protocols = search.fidelity.prepare_protocols(
        changed(settings, protocols=("end_to_end",)), open_splits(settings.data), tmp_path
    )
    assert protocols[0].identity["end_to_end.crop_size"] == list(SIZE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"iterations": 4}, "protocol .*/proxy was started with `iterations` 3, now it is 4"),
        ({"learning_rate": 0.1}, "with `learning_rate` 0.5, now it is 0.1"),
        ({"seed": 1}, "with `seed` 0, now it is 1"),
        ({"class_weights": "balanced"}, r"with `class_weights` None, now it is \["),
        (
            {"protocols": ("end_to_end",), "class_weights": "balanced"},
            r"/end_to_end was .* `class_weights` None, now it is \[",
        ),
        ({"end_to_end.iterations": 3}, "protocol .*/end_to_end was started with `end_to_end.iterations` 2, now it is 3"),
        ({"end_to_end.batch_size": 4}, "with `end_to_end.batch_size` 2, now it is 4"),
        ({"end_to_end.learning_rate": 0.2}, "with `end_to_end.learning_rate` 0.1, now it is 0.2"),
        ({"end_to_end.max_scale": 1.0}, "with `end_to_end.max_scale` 2.0, now it is 1.0"),
        ({"long_iterations": 7}, "protocol .*/long was started with `long_iterations` 6, now it is 7"),
        (
            {"large.backbone": SMALL, "large.weights": "weights"},
            f"protocol .*/large was started with .*`large.backbone` {LARGE}, now it is {SMALL}",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_other_settings_are_refused_by_their_flag(
    tiny: FidelitySettings, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    if "large.backbone" in changes:
        changes = changes | {"large.weights": tiny.backbone.weights}
    forbid_evaluation(monkeypatch)
    with pytest.raises(InputError, match=words):
        search.fidelity.main(changed(tiny, **changes))


def test_settings_of_another_protocol_do_not_matter(
    tiny: FidelitySettings, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_evaluation(monkeypatch)
    search.fidelity.main(changed(tiny, protocols=("proxy", "large"), long_iterations=99))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": 0}, "`seeds` must be at least 1, got 0"),
        ({"long_iterations": 0}, "`long_iterations` must be at least 1, got 0"),
        ({"long_iterations": 2, "warmup_iterations": 2}, "`warmup_iterations` 2 leaves none of `long_iterations` 2"),
        ({"learning_rate": math.nan}, "`learning_rate` must be above 0, got nan"),
        ({"dropout": 1.0}, "`dropout` must be"),
        ({"protocols": ("proxy", "proxy")}, "`protocols` must name some of proxy, long, large, end_to_end, each once"),
        ({"protocols": ()}, "`protocols` must name"),
        ({"large.weights": None}, "give `large.weights`, or `large.pretrained`"),
        ({"large.backbone": "no_such_model"}, "no_such_model.*; correct `large.backbone`"),
        ({"crop_size": (32, 32)}, "`crop_size` 32 32 must be"),
        ({"large.output_stride": 3}, "^`large.output_stride` must be 4 to 32, got 3"),
        ({"end_to_end.iterations": 0}, "^`end_to_end.iterations` must be at least 1, got 0"),
        ({"end_to_end.min_scale": 0.0}, "^`end_to_end.min_scale` must be above 0"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    settings: FidelitySettings, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        search.fidelity.main(changed(settings, **{"protocols": PROTOCOLS} | changes))
    assert not known(settings.out).exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"large.output_stride": 3},
        {"end_to_end.iterations": 0},
        {"end_to_end.min_scale": 0.0},
        {"end_to_end.validate_every": 0},
    ],
)
def test_numbers_that_cannot_work_are_refused_before_features_are_computed(
    settings: FidelitySettings, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.fidelity, "prepare_caches", lambda *_: pytest.fail("features take hours"))
    with pytest.raises(InputError, match=f"`{next(iter(changes))}`"):
        search.fidelity.main(changed(settings, **{"protocols": PROTOCOLS} | changes))


@pytest.mark.parametrize(
    ("changes", "crop"), [({"crop_size": (33, 33)}, None), ({"end_to_end.crop_size": (17, 33)}, (17, 33))]
)
def test_end_to_end_crops_whole_pictures_unless_told_otherwise(
    settings: FidelitySettings, changes: dict[str, Any], crop: tuple[int, int] | None
) -> None:
    settings = changed(settings, protocols=("end_to_end",), **changes)
    (protocol,) = search.fidelity.prepare_protocols(settings, open_splits(settings.data), known(settings.out))
    whole = padded_size(settings.features, open_dataset("camvid", "train", settings.data.data_dir), Grid(16))
    assert protocol.identity["end_to_end.crop_size"] == list(crop or whole)


def test_a_damaged_score_is_named(settings: FidelitySettings) -> None:
    settings = changed(settings, protocols=("proxy",))
    path = score_path(run(settings), "proxy", "pool", 0)
    path.write_text("{")
    with pytest.raises(InputError, match=f"{path} is damaged .* delete it"):
        run(settings)


# What is made of the scores


def made_scores(columns: dict[str, list[list[float]]]) -> list[Score]:
    """By protocol, one list of scores for each seed; cell i is named `ci`."""
    return [
        Score(protocol, f"c{i}", seed, value, 1.0, None)
        for protocol, seeds in columns.items()
        for seed, values in enumerate(seeds)
        for i, value in enumerate(values)
    ]


def test_made_scores_give_the_known_rho(tmp_path: Path) -> None:
    # Means over seeds (1, 2, 3, 4, 5) and (2, 1, 3, 4, 5): squared differences of the ranks 1, 1, 0, 0, 0: 1 − 6·2 / (5·24).
    scores = made_scores(
        {"proxy": [[0.1, 0.1, 0.3, 0.5, 0.4], [0.1, 0.3, 0.3, 0.3, 0.6]], "long": [[0.2, 0.1, 0.3, 0.4, 0.5]]}
    )
    for score in scores:
        name = score_name(score.cell_name, score.seed)
        Folder(tmp_path / score.protocol).write_result(name, {**vars(score), "cell": []})
    loaded = load_scores(tmp_path, ("proxy", "long"), [f"c{i}" for i in range(5)])
    assert loaded == scores
    (pair,) = agreements(loaded, ("proxy", "long"))
    assert pair.correlation is not None
    assert pair.correlation.rho == pytest.approx(0.9, abs=1e-12)  # rounding
    assert math.isnan(pair.ceiling)  # one seed of long says nothing of its noise
    text = write_report(tmp_path, loaded, ("proxy", "long"), "python -m search.fidelity", Measure("mIOU", "mean_iou"))
    assert text.splitlines()[1].split()[4:6] == ["5", "0.90"]
    assert "| c1 | 20.00 ± 14.14 (4) | 10.00 (5) |" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_agreement_with_itself_is_the_mean_over_pairs_of_seeds() -> None:
    # Orders 1234, 1234 and 1243: ρ is 1, 0.8 and 0.8, for squared differences 0, 2 and 2 of 1 − 6·d / (4·15).
    by_cell = cell_scores(made_scores({"proxy": [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 4, 3]]}), "proxy")
    rho = (1 + 0.8 + 0.8) / 3
    assert self_agreement(by_cell) == pytest.approx(rho, abs=1e-12)  # rounding
    assert noise_ceiling(by_cell, by_cell) == pytest.approx(3 * rho / (1 + 2 * rho), abs=1e-12)


def test_the_ceiling_of_noise_alone_is_zero() -> None:
    noise = cell_scores(made_scores({"proxy": [[1, 2, 3, 4], [4, 3, 2, 1]]}), "proxy")
    clean = cell_scores(made_scores({"long": [[1, 2, 3, 4], [1, 2, 3, 4]]}), "long")
    assert self_agreement(noise) == pytest.approx(-1)
    assert noise_ceiling(noise, clean) == 0


def test_a_cell_that_fails_with_one_seed_is_left_out_altogether() -> None:
    scores = made_scores({"proxy": [[1, 2, 3, 4], [1, 2, 3, 4]]})
    scores[5] = replace(scores[5], score=None, failure="out of memory")
    assert list(cell_scores(scores, "proxy")) == ["c0", "c2", "c3"]


def test_seeds_that_are_not_finished_do_not_count_for_the_noise() -> None:
    scores = made_scores({"proxy": [[1, 2, 3, 4], [1, 3, 2, 4]]})
    assert self_agreement(cell_scores(scores, "proxy")) == pytest.approx(0.8, abs=1e-12)  # 1 − 6·2 / (4·15)
    assert self_agreement(cell_scores(scores[:-1], "proxy")) == pytest.approx(0.5, abs=1e-12)  # 1 − 6·2 / (3·8)
    assert math.isnan(self_agreement(cell_scores(scores[:6], "proxy")))  # two cells


# The wide backbone of the shapes


def test_the_shapes_have_a_wide_backbone_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []
    monkeypatch.setattr(search.backbones.shapes, "_train", lambda backbone, _: trained.append(backbone.name))
    names = ("shapes_cnn_wide", "shapes_cnn_wide", None)
    wide, again, small = (create_backbone(BackboneSettings(backbone=name), SHAPES, tmp_path) for name in names)
    assert trained == ["shapes_cnn_wide", "shapes_cnn"]  # each once, then from its own file
    assert again.weights_hash() == wide.weights_hash()
    assert (wide.name, wide.channels, small.name, small.channels) == ("shapes_cnn_wide", 256, "shapes_cnn", 128)


def test_a_score_file_says_which_cell_it_is_of(uninterrupted: Path) -> None:
    for name, cell in FOUR.items():
        content = json.loads(score_path(uninterrupted, "large", name, 1).read_text(encoding="utf-8"))
        assert Cell.from_json(json.dumps(content["cell"])) == cell
