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

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import search.backbones.shapes
import search.fidelity
import search.reports.fidelity
from reference.cell import BACKBONE_FEATURE, Cell
from search.cells.space import SearchSpace, canonical_form, load_cell
from search.errors import InputError
from search.features import FeatureSettings, create_backbone, write_json
from search.fidelity import PROTOCOLS, FidelitySettings, fidelity_cells
from search.reports.fidelity import (
    Score,
    agreements,
    cell_scores,
    load_scores,
    noise_ceiling,
    score_path,
    self_agreement,
    write_report,
)
from search.reports.rank_correlation import spearman
from search.tasks.end_to_end import EndToEndTask
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
        large_backbone=LARGE,
        large_weights=folder / f"{LARGE}.pth",
        cache_dir=folder / "cache",
        out=folder / "runs" / "camvid",
        device="cpu",
        crop_size=SIZE,
        iterations=3,
        long_iterations=6,
        end_to_end_iterations=2,
        end_to_end_batch_size=2,
        batch_size=2,
        learning_rate=0.5,
        branch_channels=8,
        statistics_batches=1,
        loading_processes=0,
        seeds=1,
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
        search.fidelity.main(changed(tiny, name="uninterrupted", seeds=2))
    return tiny.runs_dir / "fidelity" / "uninterrupted"


@pytest.fixture
def settings(tiny: FidelitySettings, tmp_path: Path) -> FidelitySettings:
    """The same in a folder of its own, two protocols."""
    return changed(tiny, runs_dir=tmp_path, protocols=("proxy", "end_to_end"))


def scores_of(
    directory: Path, protocols: Sequence[str] = PROTOCOLS, seeds: int = 2
) -> dict[tuple[str, str, int], float | None]:
    scores = [score for score in load_scores(directory, protocols, list(FOUR)) if score.seed < seeds]
    return {(score.protocol, score.cell_name, score.seed): score.mean_iou for score in scores}


def run(settings: FidelitySettings) -> Path:
    search.fidelity.main(settings)
    return settings.runs_dir / "fidelity" / "camvid"


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
    search.fidelity.main(changed(tiny, name="uninterrupted", seeds=2))
    means = {p: [np.mean([rows[p, name, seed] for seed in (0, 1)]) for name in FOUR] for p in PROTOCOLS}
    rho = spearman([float(x) for x in means["proxy"]], [float(y) for y in means["long"]])
    table = capsys.readouterr().out.splitlines()
    (line,) = [line for line in table if line.startswith("proxy – long training")]
    assert line.split()[4:6] == ["4", f"{rho:.2f}"]


def test_every_training_has_random_numbers_of_its_own(tiny: FidelitySettings) -> None:
    settings = changed(tiny, seeds=3)
    jobs = [job for protocol in PROTOCOLS for job in search.fidelity._jobs(settings, protocol, FOUR)]
    assert len({job.seed for job in jobs}) == len(jobs) == 4 * 4 * 3


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
    "before a score is written": (search.fidelity, "write_json", 2 + 3),  # the settings of two protocols come first
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
    kept = scores_of(settings.runs_dir / "fidelity" / "camvid")
    assert kept.items() <= expected.items()
    assert (len(kept) == len(expected)) == (death == "before the last network is deleted")
    directory = run(settings)
    assert scores_of(directory) == expected
    assert not (directory / "end_to_end" / "trainings").exists()


def failing(protocol_number: int, cell_number: int, error: BaseException) -> Callable[..., Any]:
    original = ProxyTask.evaluate

    def evaluate(self: ProxyTask, cell: Cell, seed: Sequence[int], on_step: Any) -> Any:
        if (seed[1], seed[3]) == (protocol_number, cell_number):
            raise error
        return original(self, cell, seed, on_step)

    return evaluate


def test_ctrl_c_shows_what_is_there_and_goes_on(
    settings: FidelitySettings, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = changed(settings, protocols=("proxy", "long"))
    with monkeypatch.context() as patch:
        patch.setattr(ProxyTask, "evaluate", failing(1, 3, KeyboardInterrupt()))
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
    monkeypatch.setattr(ProxyTask, "evaluate", failing(0, 0, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        search.fidelity.main(settings)
    assert "proxy – end to end                    –      –" in capsys.readouterr().out


def test_a_cell_that_fails_is_left_out_and_named(
    settings: FidelitySettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = changed(settings, protocols=("proxy", "long"))
    name = list(FOUR)[1]
    with monkeypatch.context() as patch:
        patch.setattr(ProxyTask, "evaluate", failing(1, 1, NotFiniteError("the loss was nan at iteration 2")))
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
        patch.setattr(ProxyTask, "evaluate", failing(0, 1, torch.OutOfMemoryError("tried 3 GiB")))
        assert len(scores_of(run(settings))) == len(FOUR) - 1
    assert "seed 0 failed: out of GPU memory: tried 3 GiB; the same command goes on with it" in capsys.readouterr().err
    assert scores_of(run(settings)) == scores_of(uninterrupted, ("proxy",), seeds=1)


# What is refused


def test_other_data_are_refused_by_their_split(tiny: FidelitySettings, uninterrupted: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        folder = tmp_path / split
        shutil.copytree(tiny.data_dir or Path(), folder)
        Image.fromarray(np.zeros(SIZE, np.uint8)).save(folder / f"{split}annot" / "0.png")
        changed = changed(tiny, name="uninterrupted", protocols=("end_to_end",), data_dir=folder)
        role = {"train": "training", "val": "validation"}[split]
        with pytest.raises(InputError, match=rf"end_to_end in .* was scored with `data_dir` \({role}\)"):
            search.fidelity.main(changed)


def test_crops_are_whole_images_by_default(tiny: FidelitySettings, tmp_path: Path) -> None:
    settings = changed(tiny, crop_size=None)
    protocols = search.fidelity.prepare_protocols(changed(settings, protocols=("end_to_end",)), tmp_path)
    assert protocols[0].identity["--crop-size"] == list(SIZE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"iterations": 4}, "proxy in .* was scored with `iterations` 3, now it is 4"),
        ({"learning_rate": 0.1}, "with `learning_rate` 0.5, now it is 0.1"),
        ({"seed": 1}, "with `seed` 0, now it is 1"),
        ({"end_to_end_iterations": 3}, "end_to_end in .* with `end_to_end_iterations` 2, now it is 3"),
        ({"end_to_end_batch_size": 4}, "with `end_to_end_batch_size` 2, now it is 4"),
        ({"end_to_end_learning_rate": 0.2}, "with `end_to_end_learning_rate` 0.1, now it is 0.2"),
        ({"end_to_end_max_scale": 1.0}, "with `end_to_end_max_scale` 2.0, now it is 1.0"),
        ({"long_iterations": 7}, "long in .* with `long_iterations` 6, now it is 7"),
        (
            {"large_backbone": SMALL, "large_weights": "weights"},
            f"large in .* with `large_backbone` {LARGE}, now it is {SMALL}",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_other_settings_are_refused_by_their_flag(
    tiny: FidelitySettings, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    if "large_backbone" in changes:
        changes = changes | {"large_weights": tiny.weights}
    forbid_evaluation(monkeypatch)
    with pytest.raises(InputError, match=words):
        search.fidelity.main(changed(tiny, name="uninterrupted", **changes))


def test_settings_of_another_protocol_do_not_matter(
    tiny: FidelitySettings, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_evaluation(monkeypatch)
    search.fidelity.main(changed(tiny, name="uninterrupted", protocols=("proxy", "large"), long_iterations=99))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": 0}, "`seeds` must be at least 1, got 0"),
        ({"long_iterations": 0}, "`long_iterations` must be at least 1, got 0"),
        ({"learning_rate": math.nan}, "`learning_rate` must be above 0, got nan"),
        ({"dropout": 1.0}, "`dropout` must be"),
        ({"protocols": ("proxy", "proxy")}, "`protocols` must name some of proxy, long, large, end_to_end, each once"),
        ({"protocols": ()}, "`protocols` must name"),
        ({"large_weights": None}, "give `large_weights` FILE, or `large_pretrained`"),
        ({"large_backbone": "no_such_model"}, "correct `large_backbone`, `large_weights`"),
        ({"crop_size": (32, 32)}, "`crop_size` 32 32 must be"),
        ({"end_to_end_min_scale": 0.0}, "^`end_to_end_min_scale` must be above 0"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    settings: FidelitySettings, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        search.fidelity.main(changed(settings, **{"protocols": PROTOCOLS} | changes))
    assert not settings.runs_dir.joinpath("fidelity").exists()


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
        write_json(score_path(tmp_path, score.protocol, score.cell_name, score.seed), {**vars(score), "cell": []})
    loaded = load_scores(tmp_path, ("proxy", "long"), [f"c{i}" for i in range(5)])
    assert loaded == scores
    (pair,) = agreements(loaded, ("proxy", "long"))
    assert pair.correlation is not None
    assert pair.correlation.rho == pytest.approx(0.9, abs=1e-12)  # rounding
    assert math.isnan(pair.ceiling)  # one seed of long says nothing of its noise
    text = write_report(tmp_path, loaded, ("proxy", "long"), "python -m search.fidelity")
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
    scores[5] = replace(scores[5], mean_iou=None, failure="out of memory")
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
    settings = composed(FeatureSettings, cache_dir=tmp_path, backbone="shapes_cnn_wide")
    wide, again, small = (create_backbone(s) for s in (settings, settings, changed(settings, backbone=None)))
    assert trained == ["shapes_cnn_wide", "shapes_cnn"]  # each once, then from its own file
    assert again.weights_hash() == wide.weights_hash()
    assert (wide.name, wide.channels, small.name, small.channels) == ("shapes_cnn_wide", 256, "shapes_cnn", 128)


def test_a_score_file_says_which_cell_it_is_of(uninterrupted: Path) -> None:
    for name, cell in FOUR.items():
        content = json.loads(score_path(uninterrupted, "large", name, 1).read_text(encoding="utf-8"))
        assert Cell.from_json(json.dumps(content["cell"])) == cell
