"""The proxy task: what a score depends on, that crops fit their labels, that cells learn, and what is refused."""

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn

import search.cells.latency
import search.tasks.proxy
from fast.batch_norm import MOMENTUM, recompute_statistics
from fast.kernels import using
from fast.mean_iou import confusion_matrix
from fast.segmentation import SegmentationHead
from reference.cell import BACKBONE_FEATURE, AtrousSeparableConv, Branch, Cell, Conv1x1, PyramidPooling
from reference.mean_iou import class_iou, mean_iou
from reference.pyramid_pooling import PoolingVariant
from search.cells.cost import cell_cost
from search.cells.space import load_cell
from search.errors import InputError
from search.settings import HeadSettings, ProxySettings, field_names
from search.tasks.feature_cache import FeatureCache
from search.tasks.proxy import NotFiniteError, ProxyResult, ProxyTask, Stretch
from tests.strategies import cells, rng_seeds

STRIDE = 16
SIZE = (4, 5)  # of a feature map
CELL = Cell.from_json('[{"op": "conv", "kernel": 3, "rate": [1, 1], "input": -1}, {"op": "conv", "kernel": 1, "input": 0}]')
SETTINGS = ProxySettings(iterations=4, batch_size=3, learning_rate=0.2, statistics_batches=2, weight_decay=4e-5)
HEAD = HeadSettings(branch_channels=8, dropout=0.1)


def make_cache(features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> FeatureCache:
    identity = {"dataset": "made", "class_names": [f"class {i}" for i in range(num_classes)], "output_stride": STRIDE}
    return FeatureCache(Path("in memory"), features, labels.to(torch.uint8), identity)


def label_size(size: tuple[int, int]) -> tuple[int, int]:
    return STRIDE * (size[0] - 1) + 1, STRIDE * (size[1] - 1) + 1


def easy_cache(seed: int, count: int = 6, num_classes: int = 3) -> FeatureCache:
    """The class of a pixel is told by the nearest feature, up to noise; a tenth of the pixels is not labelled."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, num_classes, (count, *SIZE))
    features = np.eye(num_classes)[classes].transpose(0, 3, 1, 2) + 0.1 * rng.normal(size=(count, num_classes, *SIZE))
    rows, columns = (np.round(np.arange(extent) / STRIDE).astype(int) for extent in label_size(SIZE))
    labels = classes[:, rows][:, :, columns]
    labels[rng.random(labels.shape) < 0.1] = 255
    return make_cache(torch.from_numpy(features).half(), torch.from_numpy(labels), num_classes)


TRAIN, VAL = easy_cache(0), easy_cache(1, count=5)


def make_task(
    train: FeatureCache = TRAIN, val: FeatureCache = VAL, *, with_latency: bool = False, **changes: Any
) -> ProxyTask:
    of_head = {name: changes.pop(name) for name in field_names(HeadSettings) & changes.keys()}
    return ProxyTask(train, val, replace(SETTINGS, **changes), replace(HEAD, **of_head), with_latency=with_latency)


def measured(result: ProxyResult) -> dict[str, Any]:
    return {key: value for key, value in asdict(result).items() if key not in ("seconds", "peak_memory_bytes")}


def test_norms_have_the_authors_momentum() -> None:
    head = make_task()._create_head(load_cell("dpc"))
    assert {norm.momentum for norm in head.modules() if isinstance(norm, nn.BatchNorm2d)} == {MOMENTUM}


# What a score depends on


@given(cell=cells(max_branches=3, searchable=True), seed=rng_seeds())
def test_the_same_cell_and_seed_give_the_same_result(cell: Cell, seed: int) -> None:
    first, head = make_task().evaluate(cell, (seed, 0))
    torch.manual_seed(seed + 1)  # nobody else's random numbers
    np.random.seed(1)  # noqa: NPY002  # the global state is what must not matter
    again, head_again = make_task().evaluate(cell, (seed, 0))
    assert measured(first) == measured(again)
    torch.testing.assert_close(head.state_dict(), head_again.state_dict(), rtol=0, atol=0)
    other, _ = make_task().evaluate(cell, (seed, 1))
    assert other.loss_curve != first.loss_curve


@pytest.mark.parametrize("with_latency", [False, True])
def test_the_task_leaves_the_random_numbers_of_others_alone(with_latency: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search.cells.latency, "_QUICK", 0.0)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    make_task(with_latency=with_latency).evaluate(CELL, (0,))
    assert torch.equal(torch.rand(3), expected)


def test_a_latency_is_measured_beside_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Really, by the clock: it changes neither scores nor weights, and is in no other number."""
    monkeypatch.setattr(search.cells.latency, "_QUICK", 0.0)
    plain, head = make_task().evaluate(CELL, (0,))
    timed, timed_head = make_task(with_latency=True).evaluate(CELL, (0,))
    assert plain.latency is None
    assert 0 < timed.cost("latency") < 100
    assert measured(timed) | {"latency": None} == measured(plain)
    torch.testing.assert_close(head.state_dict(), timed_head.state_dict(), rtol=0, atol=0)
    assert make_task(with_latency=True).evaluate(load_cell("dpc"), (0,))[0].latency == 1
    with pytest.raises(ValueError, match="no latency"):
        plain.cost("latency")
    calls: list[str] = []

    def noted(name: str, value: float) -> Callable[..., float]:
        def measure(*_: object) -> float:
            calls.append(name)
            return value

        return measure

    monkeypatch.setattr(search.tasks.proxy, "_peak_memory_bytes", noted("memory", 7))
    monkeypatch.setattr(search.tasks.proxy, "relative_latency", noted("latency", 0.5))
    assert make_task(with_latency=True).evaluate(CELL, (0,))[0].latency == 0.5
    assert calls == ["memory", "latency"]  # it may take memory, and seconds


def test_earlier_evaluations_do_not_matter() -> None:
    task = make_task()
    first, _ = task.evaluate(CELL, (5,))
    task.evaluate(load_cell("aspp"), (6,))
    again, _ = task.evaluate(CELL, (5,))
    assert measured(again) == measured(first)


def test_cells_that_do_the_same_on_the_map_have_the_same_result() -> None:
    """The map has 4×5 features."""
    twins = [
        Cell((Branch(BACKBONE_FEATURE, AtrousSeparableConv(rate)), Branch(0, AtrousSeparableConv((1, 3))), Branch(0, pool)))
        for rate, pool in (((4, 21), PyramidPooling((8, 8))), ((18, 6), Conv1x1()))
    ]
    results = [measured(make_task().evaluate(cell, (0,))[0]) for cell in twins]
    assert results[0] == results[1]


# Learning


def test_an_easy_task_is_learned() -> None:
    result, head = make_task(iterations=60).evaluate(CELL, (0,))
    losses = [loss for _, loss in result.loss_curve]
    assert losses[0] == pytest.approx(np.log(3), rel=0.1)  # a fresh classifier knows nothing
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    assert result.score > 0.6  # chance: below 0.2
    assert result.score == pytest.approx(np.mean([iou for iou in result.scores.details if iou is not None]))
    assert not head.training
    assert [iteration for iteration, _ in result.loss_curve] == list(range(1, 61))


def test_shuffled_labels_are_not_learned() -> None:
    """So the score above comes from the features, and no label leaks into a prediction."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(VAL.labels[0].numel()))
    shuffled = VAL.labels.flatten(1)[:, order].view_as(VAL.labels)
    task = make_task(val=make_cache(VAL.features, shuffled, 3), iterations=60)
    assert task.evaluate(CELL, (0,))[0].score < 0.3


def test_the_loss_curve_is_thinned_and_keeps_its_end() -> None:
    result, _ = make_task(iterations=250, batch_size=1, statistics_batches=1).evaluate(CELL, (0,))
    assert [iteration for iteration, _ in result.loss_curve] == list(range(2, 251, 2))


@pytest.mark.parametrize("pooling", ["sliding_window", "grid_cells"])
def test_cost_time_and_memory_are_recorded(pooling: PoolingVariant) -> None:
    pool = Branch(BACKBONE_FEATURE, PyramidPooling(grid_size=(2, 2)))
    cell = Cell((*CELL.branches, pool))
    result, _ = make_task(pooling=pooling).evaluate(cell, (0,))
    cost = cell_cost(cell, 3, SIZE, branch_channels=8, cell_channels=8, pooling=pooling).total
    assert (result.parameters, result.multiply_adds) == (cost.parameters, cost.multiply_adds)
    assert 0 < result.seconds < 60
    assert result.peak_memory_bytes > 10**7


@pytest.mark.parametrize("rate", [1e30, float("inf")])
def test_a_loss_that_is_not_finite_is_an_error(rate: float) -> None:
    with pytest.raises(NotFiniteError, match="try a lower learning rate"):
        make_task(learning_rate=rate).evaluate(CELL, (0,))


def test_scores_that_are_not_finite_are_an_error() -> None:
    """Also where the last loss was read before the weights were ruined."""
    with pytest.raises(NotFiniteError, match="scores that are not finite"):
        make_task(learning_rate=1e38, iterations=1).evaluate(CELL, (0,))


# The optimizer


def test_schedule_and_weight_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    decays: dict[int, float] = {}
    momenta: set[float] = set()

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append(float(self.param_groups[0]["lr"]))
            assert all(float(group["lr"]) == rates[-1] for group in self.param_groups)
            momenta.update(group["momentum"] for group in self.param_groups)
            decays.update({p.data_ptr(): group["weight_decay"] for group in self.param_groups for p in group["params"]})
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "SGD", Spy)
    _, head = make_task(iterations=10).evaluate(CELL, (0,))
    np.testing.assert_allclose(rates, [0.2 * (1 - t / 10) ** 0.9 for t in range(10)], rtol=1e-6)  # towards 0, in float32
    assert momenta == {0.9}

    decay = {name: decays.pop(parameter.data_ptr()) for name, parameter in head.named_parameters()}
    assert decays == {}  # nothing else is trained
    assert {name for name, value in decay.items() if value == SETTINGS.weight_decay} == {
        "context.branches.0.pointwise.weight",
        "context.branches.1.pointwise.weight",
        "context.projection.weight",
        "classifier.weight",
    }
    assert {value for value in decay.values() if value} == {SETTINGS.weight_decay}
    assert decay["context.branches.0.depthwise.weight"] == decay["classifier.bias"] == 0


def test_adamw_has_its_own_defaults_and_follows_warm_up_and_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    class Spy(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            rates.append(float(self.param_groups[0]["lr"]))
            assert [group["weight_decay"] for group in self.param_groups] == [0.05, 0.0]
            assert {group["betas"] for group in self.param_groups} == {(0.9, 0.999)}
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    recipe: dict[str, Any] = {"optimizer": "adamw", "schedule": "cosine", "warmup_iterations": 4}
    make_task(iterations=12, learning_rate=None, weight_decay=None, **recipe).evaluate(CELL, (0,))
    cosine = [0.5 * (1 + np.cos(np.pi * t / 8)) for t in range(8)]
    np.testing.assert_allclose(rates, [1e-3 * each for each in (0, 0.25, 0.5, 0.75, *cosine)], rtol=1e-5)  # float32


def test_a_recipe_changes_the_score_and_can_be_repeated() -> None:
    """Each of its parts is heard: other losses than without it, and the same ones again."""
    curves = []
    recipes: list[dict[str, Any]] = [{}, {"optimizer": "adamw"}, {"schedule": "cosine"}, {"warmup_iterations": 2}]
    for recipe in recipes:
        first, again = (make_task(**recipe).evaluate(CELL, (0,))[0].loss_curve for _ in range(2))
        assert first == again
        curves.append(first)
    assert len(set(curves)) == 4


def test_steps_of_adamw_that_are_too_large_end_in_the_same_sentence() -> None:
    with pytest.raises(NotFiniteError, match=r"(loss was nan|not finite).*; try a lower learning rate"):
        make_task(optimizer="adamw", learning_rate=1e38).evaluate(CELL, (0,))


# Crops


@pytest.mark.parametrize("crop", [(40, 33), (33, 40), (65, 33), (33, 81), (0, 33), (-15, 33)])
def test_a_crop_that_does_not_fit_is_refused(crop: tuple[int, int]) -> None:
    height, width = label_size(SIZE)
    with pytest.raises(InputError, match=rf"`crop_size` {crop[0]} {crop[1]} must be 16·k \+ 1 each, at most {height} {width}"):
        make_task(crop_size=crop)


def test_the_largest_crop_is_the_whole_image() -> None:
    assert make_task(crop_size=label_size(SIZE)).crop == make_task().crop == SIZE


# Scoring


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_every_labelled_pixel_is_counted_once(batch_size: int) -> None:
    task = make_task(batch_size=batch_size)
    torch.manual_seed(0)
    head = task._create_head(CELL).eval()
    confusion = task._totals(head)
    labels = VAL.labels[VAL.labels != 255]
    np.testing.assert_array_equal(confusion.sum(axis=1), np.bincount(labels.numpy(), minlength=3))

    with torch.inference_mode():
        logits = head(VAL.features.float())
        upsampled = torch.nn.functional.interpolate(logits, label_size(SIZE), mode="bilinear", align_corners=True)
    expected = confusion_matrix(upsampled.argmax(dim=1), VAL.labels, num_classes=3).numpy()
    assert np.abs(confusion - expected).sum() <= 0.001 * expected.sum()  # pixels between two classes may fall to either side


def test_the_recorded_score_is_that_of_the_returned_head() -> None:
    task = make_task()
    result, head = task.evaluate(CELL, (0,))
    confusion = task._totals(head)
    assert result.score == mean_iou(confusion)
    assert result.scores.details == tuple(class_iou(confusion))


def test_a_class_that_is_nowhere_has_no_score() -> None:
    train, val = (make_cache(cache.features, cache.labels, 4) for cache in (TRAIN, VAL))
    result, _ = make_task(train, val, iterations=20).evaluate(CELL, (0,))
    assert result.scores.details[3] is None
    present = [iou for iou in result.scores.details if iou is not None]
    assert len(present) == 3
    assert result.score == pytest.approx(np.mean(present))


def test_statistics_are_those_of_the_trained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before scoring, running statistics are recomputed in as many batches as asked for, without touching a weight."""
    seen: dict[str, Any] = {}
    original = recompute_statistics

    def spy(head: SegmentationHead, batches: Any) -> None:
        before = [p.clone() for p in head.parameters()]
        batches = list(batches)
        original(head, iter(batches))
        seen.update(count=len(batches), unchanged=all(map(torch.equal, before, head.parameters())))

    monkeypatch.setattr(search.tasks.proxy, "recompute_statistics", spy)
    make_task(statistics_batches=5).evaluate(CELL, (0,))
    assert seen == {"count": 5, "unchanged": True}


def test_progress_is_told_step_by_step() -> None:
    steps: list[int] = []
    make_task(iterations=5).evaluate(CELL, (0,), steps.append)
    assert steps == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("dataset", "channels"), [("shapes", 64), ("camvid", 256)])
def test_a_head_has_the_filters_of_its_data_set_unless_told(dataset: str, channels: int) -> None:
    train = replace(TRAIN, identity={**TRAIN.identity, "dataset": dataset})
    assert make_task(train, branch_channels=None)._create_head(CELL).classifier.in_channels == channels
    assert make_task(train)._create_head(CELL).classifier.in_channels == 8


# In parts


_usual = settings.get_profile(settings.get_current_profile_name()).max_examples
few_examples = settings(max_examples=max(10, _usual // 5))  # each is a few trainings


def go_on(
    task: ProxyTask, cell: Cell, seed: int, until: int, state: bytes | None = None
) -> tuple[ProxyResult, SegmentationHead, bytes | None]:
    steps = task.evaluation(cell, (seed,), Stretch(until, state))
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: tuple[ProxyResult, SegmentationHead, bytes | None] = end.value
            return result


def assert_same_bits(one: SegmentationHead, other: SegmentationHead) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


@few_examples
@given(
    cell=cells(max_branches=2, searchable=True),
    seed=rng_seeds(),
    ends=st.sets(st.integers(1, 5), max_size=3).map(sorted),
    optimizer=st.sampled_from(("sgd", "adamw")),
)
def test_a_training_in_parts_ends_as_one_in_one_go(cell: Cell, seed: int, ends: list[int], optimizer: str) -> None:
    """Wherever it is divided, and scored; each part by a task of its own, among other users of random numbers."""
    recipe: dict[str, Any] = {"iterations": 6, "batch_size": 2, "optimizer": optimizer, "learning_rate": 0.05}
    whole, head = make_task(**recipe).evaluate(cell, (seed,))
    state = None
    for end in ends:
        torch.manual_seed(end)
        torch.rand(end)
        part, _, state = go_on(make_task(**recipe), cell, seed, end, state)
        assert state is not None
        assert part.loss_curve == whole.loss_curve[:end]
    last, head_of_parts, state = go_on(make_task(**recipe), cell, seed, 6, state)
    assert state is None  # nothing follows
    assert measured(last) == measured(whole)
    assert_same_bits(head_of_parts, head)


def test_a_part_has_the_score_and_the_head_of_its_end() -> None:
    """Those of a training that is stopped there, at the same rates."""
    task = make_task(iterations=40, batch_size=8)
    parts = [go_on(task, CELL, 0, until)[:2] for until in (10, 40)]
    assert parts[0][0].score != parts[1][0].score
    for part, head in parts:
        assert not head.training
        assert part.score == mean_iou(task._totals(head))
        assert (part.parameters, part.multiply_adds) == (parts[0][0].parameters, parts[0][0].multiply_adds)


def test_where_a_part_ends_and_how_it_is_scored_is_not_seen_in_its_state() -> None:
    states = []
    for batches in (1, 5):
        _, _, state = go_on(make_task(statistics_batches=batches), CELL, 0, 3, go_on(make_task(), CELL, 0, batches % 3)[2])
        assert state is not None
        states.append({name: value for name, value in load(state).items() if name != "training.seconds"})
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_no_part_of_a_thinned_loss_curve_has_points_of_its_own() -> None:
    task = make_task(iterations=250, batch_size=1, statistics_batches=1)
    first, _, state = go_on(task, CELL, 0, 5)
    assert [iteration for iteration, _ in first.loss_curve] == [2, 4]
    last, _, _ = go_on(task, CELL, 0, 250, state)
    assert [iteration for iteration, _ in last.loss_curve] == list(range(2, 251, 2))
    assert last.loss_curve[:2] == first.loss_curve


@pytest.mark.parametrize("until", [1, 3, 5])
def test_a_loss_that_is_not_finite_ends_a_part_where_the_curve_has_no_point(until: int) -> None:
    """So no state is kept that could only fail later."""
    nothing = make_cache(torch.full_like(TRAIN.features, float("nan")), TRAIN.labels, 3)
    task = make_task(nothing, iterations=1000)  # every tenth loss is on the curve
    with pytest.raises(NotFiniteError, match=f"the loss was nan at iteration {until}; try a lower learning rate"):
        go_on(task, CELL, 0, until)


def test_seconds_of_parts_add_up() -> None:
    """Those of the trainings, and of the last scoring."""
    first, _, state = go_on(make_task(), CELL, 0, 2)
    assert state is not None
    kept = load(state)
    trained = float(kept["training.seconds"])
    assert 0 < trained < first.seconds
    long_ago = save(kept | {"training.seconds": torch.tensor(1e6 + trained, dtype=torch.float64)})
    second, _, state = go_on(make_task(), CELL, 0, 3, long_ago)
    assert state is not None
    assert 1e6 + trained < float(load(state)["training.seconds"]) < second.seconds < 1e6 + 60
    last, _, _ = go_on(make_task(), CELL, 0, 4, state)
    assert float(load(state)["training.seconds"]) < last.seconds < 1e6 + 60


def assert_begins_anew(cell: Cell, state: bytes, until: int = 3) -> None:
    """It costs time alone, and is said."""
    said = io.StringIO()
    with redirect_stderr(said):
        result, head, _ = go_on(make_task(), cell, 0, until, state)
    assert said.getvalue().startswith("a training begins anew: its state ")
    expected, expected_head, _ = go_on(make_task(), cell, 0, until)
    assert measured(result) == measured(expected)
    assert_same_bits(head, expected_head)


@few_examples
@given(content=st.binary(max_size=64))
def test_with_what_is_no_state_a_training_begins_anew(content: bytes) -> None:
    assert_begins_anew(CELL, content)


@pytest.fixture(scope="module")
def state() -> bytes:
    """Of CELL after two iterations."""
    _, _, state = go_on(make_task(), CELL, 0, 2)
    assert state is not None
    return state


@few_examples
@given(data=st.data())
def test_with_a_state_that_was_cut_off_it_begins_anew(state: bytes, data: st.DataObject) -> None:
    assert_begins_anew(CELL, state[: data.draw(st.integers(0, len(state) - 1))])


@pytest.mark.parametrize(
    "name", ["training.curve", "training.seconds", "training.done", "iterations", "classifier.bias", "random.cpu"]
)
def test_with_a_state_without_one_of_its_parts_it_begins_anew(state: bytes, name: str) -> None:
    rest = {key: value for key, value in load(state).items() if not key.endswith(name)}
    assert_begins_anew(CELL, save(rest))


@pytest.mark.parametrize("name", ["dpc", "linear", "aspp"])
def test_with_the_state_of_another_cell_it_begins_anew(state: bytes, name: str) -> None:
    assert_begins_anew(load_cell(name), state)


def test_a_state_of_a_later_iteration_is_not_used(state: bytes) -> None:
    assert_begins_anew(CELL, state, until=1)


# With kernels and without


def hard_cache(seed: int) -> FeatureCache:
    """Features that show the class of their pixel through noise as large as the signal: no cell scores 0 or 1."""
    cache = easy_cache(seed, count=8)
    noise = torch.randn(cache.features.shape, generator=torch.Generator().manual_seed(seed))
    return replace(cache, features=(cache.features.float() + 0.7 * noise).half())


def train_with_and_without_kernels(seeds: int, **changes: Any) -> tuple[list[ProxyResult], list[ProxyResult]]:
    task = make_task(hard_cache(0), hard_cache(1), iterations=120, batch_size=8, **changes)
    cell = Cell.from_json(
        '[{"op": "conv", "kernel": 3, "rate": [1, 1], "input": -1}, {"op": "conv", "kernel": 1, "input": 0},'
        ' {"op": "pyramid_pooling", "grid_size": [1, 2], "input": 0}]'
    )
    ours = [task.evaluate(cell, (seed,))[0] for seed in range(seeds)]
    with using(None):
        librarys = [task.evaluate(cell, (seed,))[0] for seed in range(seeds)]
    return ours, librarys


def test_kernels_train_as_the_library_does() -> None:
    """The same crops and weights: 120 steps amplify float32 rounding to less than a hundredth of the loss."""
    for ours, librarys in zip(*train_with_and_without_kernels(3, dropout=0.0, precision="float32"), strict=True):
        curves = np.array(ours.loss_curve), np.array(librarys.loss_curve)
        np.testing.assert_allclose(curves[0], curves[1], rtol=0.01)
        assert curves[0][-1, 1] < 0.8 * curves[0][0, 1]  # and it learns
        assert ours.score == pytest.approx(librarys.score, abs=0.01)


def test_kernels_reach_the_same_score_with_dropout() -> None:
    """Other masks, so other runs: the mean scores over six seeds lie within one standard deviation."""
    scores = [np.array([result.score for result in results]) for results in train_with_and_without_kernels(6, dropout=0.3)]
    deviation = np.concatenate([values - values.mean() for values in scores]).std(ddof=2)
    assert abs(scores[0].mean() - scores[1].mean()) <= deviation
