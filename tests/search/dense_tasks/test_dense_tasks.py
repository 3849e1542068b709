"""What is asked of every task: labels, loss, counts, scores, pictures and files that belong together."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from fast.bilinear_resize import bilinear_resize
from reference import mean_iou, upsampled_cross_entropy, upsampled_l1
from search.datasets.shapes import METRES, WALL, Shapes, ShapesDepth, draw_scene
from search.dense_tasks import UNLABELLED_COLOUR, DenseTask, Label, Scores, details_beside, restored_task
from search.dense_tasks.depth import Depth
from search.dense_tasks.segmentation import Segmentation
from tests.strategies import map_sizes, rng_seeds

SEGMENTATION = Segmentation(("sky", "road", "car"), np.array([(0, 0, 255), (90, 90, 90), (255, 0, 0)], np.uint8), (7, 3, 200))
DEPTH = Depth(256.0)
every_task = pytest.mark.parametrize("task", [SEGMENTATION, DEPTH], ids=lambda task: task.name)


def made_labels(task: DenseTask, shape: tuple[int, ...], seed: int, labelled: float = 0.8) -> Label:
    """Labels (N, H, W) of which this share is labelled."""
    rng = np.random.default_rng(seed)
    labels = np.stack([task.unlabelled((shape[1], shape[2]))] * shape[0])
    known = rng.random(shape) < labelled
    values = rng.integers(0, 3, shape) if task is SEGMENTATION else np.exp(rng.normal(1.0, 0.5, shape))
    labels[known] = values[known].astype(task.label_dtype)
    return labels


def made_outputs(task: DenseTask, shape: tuple[int, ...], seed: int) -> Tensor:
    rng = np.random.default_rng([seed, 1])
    return torch.from_numpy(rng.normal(1.0, 1.0, (shape[0], len(task.outputs), *shape[1:])).astype(np.float32))


def perfect_outputs(task: DenseTask, labels: Label) -> Tensor:
    """Outputs (N, K, H, W) whose prediction is the label, wherever there is one."""
    tensor = torch.from_numpy(labels)
    if task is SEGMENTATION:
        return torch.stack([(tensor == k) * 9.0 for k in range(3)], dim=1)
    return tensor.log().nan_to_num(nan=0.0)[:, None]


# Labels


@every_task
def test_what_is_unlabelled_counts_nowhere(task: DenseTask) -> None:
    label = task.unlabelled((5, 7))
    assert (label.shape, label.dtype) == ((5, 7), task.label_dtype)
    labels = torch.from_numpy(label)[None]
    assert not task.is_labelled(labels).any()
    assert task.histogram(label).tolist() == [0] * len(task.bins) + [35]
    assert task.loss(made_outputs(task, (1, 2, 3), 0), labels) == 0
    totals = task.count(task.predict(made_outputs(task, (1, 5, 7), 0)), labels)
    assert totals.count_nonzero() == 0
    scores = task.scores(totals.numpy())
    assert math.isnan(scores.score)
    assert scores.details == (None,) * len(task.details)
    assert task.named(scores)[task.score.key] is None
    json.dumps(task.facts(totals.numpy()), allow_nan=False)
    assert "–" in task.table(totals.numpy())


@every_task
@given(map_sizes(), rng_seeds())
def test_the_histogram_counts_every_pixel_once(task: DenseTask, size: tuple[int, int], seed: int) -> None:
    label = made_labels(task, (1, *size), seed)[0]
    counts = task.histogram(label)
    assert counts.sum() == label.size
    assert counts[-1] == label.size - int(task.is_labelled(torch.from_numpy(label)).sum())


def test_depths_are_counted_between_round_distances() -> None:
    label = np.array([[0.5, 1.0, 1.99], [50.0, 4999.0, np.nan]], np.float32)
    assert dict(zip((*Depth.bins, "unknown"), DEPTH.histogram(label).tolist(), strict=True)) == {
        "below 1 m": 1,
        "1 to 2 m": 2,
        "2 to 5 m": 0,
        "5 to 10 m": 0,
        "10 to 20 m": 0,
        "20 to 50 m": 0,
        "from 50 m": 2,
        "unknown": 1,
    }


def test_things_that_look_twice_as_large_are_half_as_far() -> None:
    label = np.array([[3.0, np.nan]], np.float32)
    enlarged = DEPTH.at_scale(label, 2.0)
    np.testing.assert_array_equal(enlarged, np.array([[1.5, np.nan]], np.float32))
    assert enlarged.dtype == np.float32
    classes = np.array([[1, 255]], np.uint8)
    assert SEGMENTATION.at_scale(classes, 2.0) is classes


# Outputs, loss and scores


@every_task
@given(map_sizes(5), map_sizes(), st.sampled_from((0.0, 0.5, 1.0)), rng_seeds())
def test_the_loss_is_the_references(
    task: DenseTask, size: tuple[int, int], label_size: tuple[int, int], labelled: float, seed: int
) -> None:
    outputs, labels = made_outputs(task, (2, *size), seed), made_labels(task, (2, *label_size), seed, labelled)
    plain = outputs.double().numpy()
    expected = (
        upsampled_cross_entropy.upsampled_cross_entropy(plain, labels)
        if task is SEGMENTATION
        else upsampled_l1.upsampled_l1(plain, np.log(labels.astype(np.float64)))
    )
    assert task.loss(outputs, torch.from_numpy(labels)).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)  # float32


def test_class_weights_are_in_the_loss_and_in_the_choice_of_hard_pixels_alone() -> None:
    weights = (0.25, 0.0, 3.0)
    task = SEGMENTATION.weighted(weights)
    outputs, labels = made_outputs(task, (2, 9, 11), 0), made_labels(SEGMENTATION, (2, 9, 11), 0)
    given = torch.from_numpy(labels)
    expected = upsampled_cross_entropy.upsampled_cross_entropy(
        outputs.double().numpy(), labels, class_weights=np.array(weights)
    )
    assert task.loss(outputs, given).item() == pytest.approx(expected, rel=1e-5)  # float32
    assert torch.equal(task.hardest(outputs, given, 1.0), torch.where(given == 1, 255, given))  # a loss of 0 is never kept
    assert task.hardest(outputs, given, 0.2).ne(SEGMENTATION.hardest(outputs, given, 0.2)).any()
    assert (task.describe(), SEGMENTATION.class_weights) == (SEGMENTATION.describe(), None)
    assert task.weighted(None).loss(outputs, given) == SEGMENTATION.loss(outputs, given)


@every_task
@given(map_sizes(5), map_sizes(), rng_seeds())
def test_counts_of_small_outputs_are_those_of_resized_ones(
    task: DenseTask, size: tuple[int, int], label_size: tuple[int, int], seed: int
) -> None:
    outputs, labels = made_outputs(task, (2, *size), seed), torch.from_numpy(made_labels(task, (2, *label_size), seed))
    expected = task.count(task.predict(bilinear_resize(outputs, label_size)), labels)
    torch.testing.assert_close(task.count_upsampled(outputs, labels), expected)


@every_task
def test_counts_are_added_over_pictures(task: DenseTask) -> None:
    predictions = task.predict(made_outputs(task, (4, 9, 9), 0))
    labels = torch.from_numpy(made_labels(task, (4, 9, 9), 1))
    parts = [task.count(predictions[i : i + 1], labels[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(torch.stack(parts).sum(dim=0), task.count(predictions, labels))


@every_task
def test_perfect_predictions_have_the_best_score(task: DenseTask) -> None:
    labels = made_labels(task, (3, 8, 9), 0)
    totals = task.count(task.predict(perfect_outputs(task, labels)), torch.from_numpy(labels)).numpy()
    scores = task.scores(totals)
    assert scores.score == 1
    named = task.named(scores)
    assert named[task.score.key] == 1
    if task is DEPTH:
        assert (named["delta_2"], named["delta_3"]) == (1, 1)
        assert max(named["rmse"], named["abs_rel"]) < 1e-6  # exp(log(d)) in float32
    else:
        assert list(named["class_iou"].items()) == [("sky", 1.0), ("road", 1.0), ("car", 1.0)]
    assert task.facts(totals).items() >= named.items()


def test_depth_scores_are_those_counted_by_hand() -> None:
    depths = torch.tensor([[[1.0, 2.0, 4.0, torch.nan]]])
    predictions = torch.tensor([[[1.2, 1.0, 5.0, 9.0]]])  # ratios 1.2, 2 and 1.25
    scores = DEPTH.scores(DEPTH.count(predictions, depths).numpy())
    assert scores.score == pytest.approx(1 / 3)
    rmse, abs_rel = math.sqrt((0.2**2 + 1 + 1) / 3), (0.2 + 0.5 + 0.25) / 3
    assert scores.details == pytest.approx((rmse, abs_rel, 2 / 3, 2 / 3), rel=1e-6)  # 1.2 in float32; 2 is more than 1.25³
    assert details_beside(DEPTH, [scores, Scores(0.0, (None, None, None, None))]) == [scores.details[0]]
    assert details_beside(SEGMENTATION, [Scores(0.5, (0.5, 0.5, 0.5))]) == []


def test_extreme_outputs_have_finite_scores() -> None:
    outputs = torch.tensor([-1e30, 1e30]).view(1, 1, 1, 2)
    scores = DEPTH.scores(DEPTH.count(DEPTH.predict(outputs), torch.ones(1, 1, 2)).numpy())
    assert scores.score == 0
    assert all(value is not None and math.isfinite(value) for value in scores.details)


@every_task
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_hardest_pixels_are_those_with_the_largest_loss(task: DenseTask, share: float) -> None:
    labels = torch.from_numpy(made_labels(task, (2, 9, 11), 3))
    outputs = made_outputs(task, (2, 9, 11), 3)
    kept = task.hardest(outputs, labels, share)
    assert kept.dtype == labels.dtype
    is_kept = task.is_labelled(kept)
    assert int(is_kept.sum()) == int(share * labels.numel())
    assert torch.equal(kept[is_kept], labels[is_kept])
    alone = torch.stack([pixel_loss(task, outputs, labels, place) for place in is_kept.nonzero()])
    others = (task.is_labelled(labels) & ~is_kept).nonzero()
    assert alone.min() >= torch.stack([pixel_loss(task, outputs, labels, place) for place in others]).max() - 1e-6


def pixel_loss(task: DenseTask, outputs: Tensor, labels: Tensor, place: Tensor) -> Tensor:
    n, row, column = place.tolist()
    return task.loss(outputs[n : n + 1, :, row : row + 1, column : column + 1], labels[n : n + 1, row, column].view(1, 1, 1))


def test_what_is_averaged_over_scales_is_the_depth_at_scale_1() -> None:
    depth = torch.tensor([0.7, 12.0]).view(1, 1, 2)
    averaged = [DEPTH.to_average((depth / scale).log()[:, None], scale) for scale in (0.5, 1.0, 2.0)]
    torch.testing.assert_close(DEPTH.predict(torch.stack(averaged).mean(dim=0)), depth)


# Pictures and files


@every_task
def test_a_value_has_one_colour_in_all_maps_and_the_legend(task: DenseTask) -> None:
    first, second = made_labels(task, (2, 20, 30), 0)
    second[:, :5] = first[:, :5]
    pictures = task.colours([first, second])
    assert all(picture.shape == (20, 30, 3) and picture.dtype == np.uint8 for picture in pictures)
    np.testing.assert_array_equal(pictures[0][:, :5], pictures[1][:, :5])
    unknown = ~task.is_labelled(torch.from_numpy(first)).numpy()
    assert unknown.any()
    assert (pictures[0][unknown] == UNLABELLED_COLOUR).all()
    assert not (pictures[0][~unknown] == UNLABELLED_COLOUR).all(axis=1).any()
    legend = task.legend([first, second])
    assert legend[-1][1] == UNLABELLED_COLOUR
    if task is SEGMENTATION:
        assert legend[:-1] == [("sky", (0, 0, 255)), ("road", (90, 90, 90)), ("car", (255, 0, 0))]
        assert task.legend([np.full((2, 2), 1, np.uint8)])[0][0] == "road"
    else:
        brightness = [sum(colour) for _, colour in legend[:-1]]
        assert brightness == sorted(brightness, reverse=True)  # near is bright
        metres = [float(name.removesuffix(" m")) for name, _ in legend[:-1]]
        assert metres == sorted(metres)


def test_maps_without_any_depth_have_pictures() -> None:
    assert (DEPTH.colours([DEPTH.unlabelled((2, 3))])[0] == UNLABELLED_COLOUR).all()
    assert DEPTH.legend([DEPTH.unlabelled((2, 3))])
    assert len(DEPTH.colours([np.full((2, 3), 4.0, np.float32)])) == 1


def test_the_legend_reads_as_people_write() -> None:
    far = [name for name, _ in DEPTH.legend([np.geomspace(3, 150, 99, dtype=np.float32)[None]])]
    assert far == ["3.1 m", "8.1 m", "21 m", "55 m", "144 m"]
    assert [name for name, _ in DEPTH.legend([np.array([[5.0, np.nan]], np.float32)])] == ["5 m", "not measured"]


@every_task
def test_a_description_brings_the_task_back(task: DenseTask) -> None:
    back = restored_task(json.loads(json.dumps({"another": "field", **task.describe()})))
    assert (back.name, back.outputs, back.describe()) == (task.name, task.outputs, task.describe())


def test_descriptions_of_earlier_files_have_classes_alone() -> None:
    assert restored_task({"class_names": ["a", "b"]}).name == "segmentation"
    with pytest.raises(KeyError):
        restored_task({"cell": []})


# The generated scenes


@pytest.fixture(scope="module")
def scenes() -> list[tuple[NDArray[np.uint8], NDArray[np.float32]]]:
    classes, depths = Shapes("val", 10), ShapesDepth("val", 10)
    for i in range(10):
        np.testing.assert_array_equal(classes[i].image, depths[i].image)
    return [(classes[i].label, depths[i].label) for i in range(10)]


def test_the_same_scenes_have_depths_where_they_have_classes(
    scenes: list[tuple[NDArray[np.uint8], NDArray[np.float32]]],
) -> None:
    for label, depth in scenes:
        np.testing.assert_array_equal(np.isnan(depth), label == 255)
        assert (depth[label == 0] == np.float32(WALL)).all()
        assert (depth[label == 6] == np.float32(WALL)).all()  # dots are painted on the wall
        assert (depth[(label > 0) & (label < 6)] < WALL).mean() > 0.9  # a small tall bar may be behind it


def test_a_shapes_distance_is_its_length_over_its_apparent_one() -> None:
    seen, fits = set(), []
    for seed in range(40):
        scene = draw_scene(np.random.default_rng(seed), 129)
        for kind in METRES:
            for depth in np.unique(scene.depth[scene.label == kind]):
                extent = 129 * METRES[kind] / depth
                assert extent == pytest.approx(round(extent), abs=1e-3)  # of whole pixels
                rows, columns = np.nonzero((scene.label == kind) & (scene.depth == depth))
                fits.append(max(np.ptp(rows), np.ptp(columns)) < extent)  # what is visible is no larger
                seen.add(kind)
    assert seen == set(METRES)
    assert np.mean(fits) > 0.95  # unless two of a kind happen to be equally long


def test_inlays_are_as_far_as_what_they_lie_on(scenes: list[tuple[NDArray[np.uint8], NDArray[np.float32]]]) -> None:
    inlays = [np.unique(depth[label == 7]) for label, depth in scenes]
    hosts = [np.unique(depth[(label > 0) & (label < 6)]) for label, depth in scenes]
    assert sum(map(len, inlays)) > 10
    for inlay, host in zip(inlays, hosts, strict=True):
        assert set(inlay) <= set(host)


def test_data_sets_with_other_labels_have_other_names_and_fingerprints() -> None:
    assert Shapes.name != ShapesDepth.name
    assert Shapes("val", 10).fingerprint() != ShapesDepth("val", 10).fingerprint()


def test_confusion_of_the_reference_is_what_segmentation_counts() -> None:
    labels = made_labels(SEGMENTATION, (2, 6, 7), 0)
    predictions = np.random.default_rng(0).integers(0, 3, labels.shape)
    expected = mean_iou.confusion_matrix(predictions, labels, num_classes=3)
    np.testing.assert_array_equal(SEGMENTATION.count(torch.from_numpy(predictions), torch.from_numpy(labels)), expected)
