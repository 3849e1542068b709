from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from scipy.stats import chi2
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import fast.train_step
from fast.dense_prediction_cell import DensePredictionCell, decays
from fast.kernels import backend_for, using
from fast.segmentation import SegmentationHead
from fast.train_step import OptimizerName, Precision, TrainStep
from fast.upsampled_cross_entropy import upsampled_cross_entropy
from reference.batch_norm import Array, BatchNorm
from reference.cell import Cell
from reference.grid import Grid
from reference.l2_penalty import l2_penalty_backward
from tests.fake_gpu import fake_gpu
from tests.fast.against_reference import every_device
from tests.strategies import rng_seeds

GRID, CENTRES = Grid(16), Grid(16, align_corners=False)
STRIDE = GRID.stride
DECAY = 4e-5
CELL = Cell.from_json(
    '[{"op": "conv", "kernel": 3, "rate": [1, 6], "input": -1}, {"op": "conv", "kernel": 1, "input": 0},'
    ' {"op": "pyramid_pooling", "grid_size": [2, 1], "input": 0}]'
)


def make_head(device: str = "cpu", *, in_channels: int = 3, classes: int = 4, dropout_rate: float = 0.0) -> SegmentationHead:
    torch.manual_seed(0)
    context = DensePredictionCell(CELL, in_channels, branch_channels=8, cell_channels=8, dropout_rate=dropout_rate)
    return SegmentationHead(context, classes).to(device, torch.float64)


def make_step(head: SegmentationHead, features: Tensor, labels: Tensor, **settings: Any) -> TrainStep:
    defaults: dict[str, Any] = {"grid": GRID, "crop": (3, 4), "batch_size": 3, "iterations": 6}
    return TrainStep(head, features, labels, **defaults | {"precision": "float32"} | settings)


def random_data(device: str = "cpu", grid: Grid = GRID) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 3, 255], (5, *grid.pixels((5, 6)))).astype(np.uint8)
    return torch.from_numpy(rng.standard_normal((5, 3, 5, 6))).to(device), torch.from_numpy(labels).to(device)


@dataclass
class PlainStep:
    """The same iteration as anyone would write it, on given batches."""

    head: SegmentationHead
    iterations: int
    class_weights: Tensor | None = None
    adamw: bool = False
    align_corners: bool = True

    def run(self, batches: Iterator[tuple[Tensor, Tensor]]) -> list[float]:
        decay = decays(self.head)
        groups = [
            {"params": [p for n, p in self.head.named_parameters() if decay[n] is wanted], "weight_decay": DECAY * wanted}
            for wanted in (True, False)
        ]
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
        schedule: LRScheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, self.iterations, power=0.9)
        if self.adamw:
            optimizer = torch.optim.AdamW(groups, lr=0.01)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.iterations)
        losses = []
        for features, labels in batches:
            with using(None):
                logits = self.head(features)
            size = (labels.shape[1], labels.shape[2])
            upsampled = F.interpolate(logits, size, mode="bilinear", align_corners=self.align_corners)
            total = F.cross_entropy(upsampled, labels.long(), self.class_weights, ignore_index=255, reduction="sum")
            loss = total / (labels != 255).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        return losses


@every_device
@pytest.mark.parametrize("grid", [GRID, CENTRES], ids=lambda grid: grid.name)
@pytest.mark.parametrize(
    ("weights", "recipe"),
    [(None, {}), ([0.0, 0.5, 1.0, 4.0], {}), (None, {"optimizer": "adamw", "schedule": "cosine"})],
    ids=["", "weighted", "adamw"],
)
def test_follows_plain_training(device: str, weights: list[float] | None, recipe: dict[str, Any], grid: Grid) -> None:
    """Losses, weights and statistics of six iterations; the learning rate is kept in float32, hence 1e-6."""
    class_weights = None if weights is None else torch.tensor(weights, device=device, dtype=torch.float64)
    drawn: list[tuple[Tensor, Tensor]] = []
    head, other = make_head(device), make_head(device)
    loss = partial(upsampled_cross_entropy, class_weights=class_weights)
    step = make_step(head, *random_data(device, grid), grid=grid, learning_rate=0.01, weight_decay=DECAY, loss=loss, **recipe)
    draw = step.draw

    def recording(dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        drawn.append(draw(dtype))
        return drawn[-1]

    step.draw = recording  # type: ignore[method-assign]
    step._replay = step._iterate  # type: ignore[method-assign]  # what a graph draws cannot be recorded
    losses = [step().item() for _ in range(6)]
    plain = PlainStep(other, 6, class_weights, bool(recipe), grid.align_corners)
    np.testing.assert_allclose(losses, plain.run(iter(drawn)), rtol=1e-6)
    for (name, tensor), expected in zip(head.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.allclose(tensor, expected, rtol=1e-6, atol=1e-9), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["cut by a kernel", "gathered"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_graph_trains_as_the_same_calls_do(
    precision: Precision, layout: torch.memory_format, optimizer: OptimizerName
) -> None:
    """Replays draw new crops and dropout from the same generator as calls would: the same losses."""
    losses = []
    features, labels = random_data("cuda")
    features = features.half().contiguous(memory_format=layout)
    for captured in (True, False):
        head = make_head("cuda", dropout_rate=0.1).float()
        torch.manual_seed(1)
        recipe = {"optimizer": optimizer, "schedule": "cosine", "warmup_iterations": 6}
        step = make_step(head, features, labels, iterations=20, precision=precision, **recipe)
        if not captured:
            step._replay = step._iterate  # type: ignore[method-assign]
        losses.append([step().item() for _ in range(12)])
        assert {int(count) for count in counters(head)} == {12}
    assert len(set(losses[0])) == 12
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def counters(head: SegmentationHead) -> list[Tensor]:
    return [buffer for name, buffer in head.named_buffers() if name.endswith("num_batches_tracked")]


def test_an_iteration_calls_no_submodule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cell and classifier are fused, on kernels as on PyTorch's operations."""
    step = make_step(make_head(dropout_rate=0.1), *random_data())
    for kind in (nn.Conv2d, nn.BatchNorm2d, nn.Dropout):
        monkeypatch.setattr(kind, "forward", mock.Mock(side_effect=AssertionError("called")))
    step()
    with using(None):
        step()


@every_device
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_is_the_gradient_of_the_l2_penalty(device: str, optimizer: OptimizerName) -> None:
    """Of a loss that is 0 whatever the weights are, nothing else is left of a first step of either optimiser."""
    head, rate = make_head(device), 0.25

    def weights() -> Any:
        live = head.context.weights(), head.classifier.weight, torch.as_tensor(head.classifier.bias)
        return tree_map(lambda tensor: tensor.detach().cpu().numpy().copy(), live)

    *before, bias = weights()
    step = make_step(
        head,
        *random_data(device),
        optimizer=optimizer,
        learning_rate=rate,
        weight_decay=0.5,
        loss=lambda outputs, labels, align_corners: 0.0 * outputs.sum(),
    )
    assert step().item() == 0.0
    *after, bias_after = weights()
    gradient = l2_penalty_backward(tuple(before), weight_decay=0.5)
    for new, old, slope in zip(learnt(after), learnt(before), learnt(gradient), strict=True):
        np.testing.assert_allclose(new, old - rate * slope, rtol=1e-6, atol=0)  # the rate is kept in float32
    assert np.array_equal(bias_after, bias)


def learnt(tree: Any) -> Iterator[Array]:
    """All arrays but running statistics, which follow the batch."""
    if isinstance(tree, BatchNorm):
        yield from (tree.scale, tree.offset)
    elif isinstance(tree, np.ndarray):
        yield tree
    else:
        for child in tree:
            yield from learnt(child)


class Touching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operations that take one of these tensors."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.addresses = {tensor.data_ptr() for tensor in tensors}
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(leaf.data_ptr() in self.addresses for leaf in leaves):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_one_operation_counts_the_batch_for_all_norms() -> None:
    """On a GPU a launch; nothing else reads or writes the counts, so no iteration waits for the device."""
    head = make_head()
    step = make_step(head, *random_data())
    with using(backend_for(head.classifier.weight)), Touching(counters(head)) as touching:
        for _ in range(3):
            step()
    assert touching.seen == 3 * ["aten._foreach_add_.Scalar"]
    assert [int(count) for count in counters(head)] == [3] * 5


@every_device
def test_features_elsewhere_arrive_on_the_device(device: str) -> None:
    if device == "cpu":
        pytest.skip("a CPU has its features at home")
    step = make_step(make_head(device).float(), *random_data("cpu"))
    assert all(torch.isfinite(step()) for _ in range(6))


def test_training_learns() -> None:
    """Labels that the features show: the loss falls to less than half."""
    torch.manual_seed(0)
    classes = torch.randint(4, (6, 5, 6))
    features = F.one_hot(classes, 4).permute(0, 3, 1, 2).double()
    labels = torch.full((6, *GRID.pixels((5, 6))), 255, dtype=torch.uint8)
    labels[:, ::STRIDE, ::STRIDE] = classes
    head = make_head(in_channels=4, dropout_rate=0.1)
    step = make_step(head, features, labels, crop=(4, 5), batch_size=8, iterations=150, learning_rate=0.5)
    losses = [step().item() for _ in range(150)]
    assert np.mean(losses[-10:]) < 0.5 * losses[0]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_first_step_of_a_warm_up_moves_nothing(optimizer: OptimizerName) -> None:
    """Whatever the gradient: its rate is 0. The next ones do."""
    head = make_head()
    step = make_step(head, *random_data(), optimizer=optimizer, warmup_iterations=2, weight_decay=0.5)
    before = [parameter.clone() for parameter in head.parameters()]
    step()
    assert all(torch.equal(parameter, was) for parameter, was in zip(head.parameters(), before, strict=True))
    step()
    assert not all(torch.equal(parameter, was) for parameter, was in zip(head.parameters(), before, strict=True))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_adamw_is_captured_on_a_gpu_with_a_rate_that_a_graph_can_change() -> None:
    with fake_gpu() as gpu:
        head = SegmentationHead(DensePredictionCell(CELL, 3, branch_channels=8, cell_channels=8), 4).to("cuda")
        features, labels = random_data("cuda")
        features = features.half().contiguous(memory_format=torch.channels_last)
        step = make_step(head, features, labels, optimizer="adamw", precision="bfloat16")
        for _ in range(fast.train_step.EAGER_ITERATIONS + 2):
            step()
        (group, _) = step._optimizer.param_groups
        assert group["capturable"]
        assert group["fused"]
        assert group["lr"] is step._rate
        assert all(state["step"].device.type == "cuda" for state in step._optimizer.state.values())
        assert gpu.launches > 0


# In parts


RECIPES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "without momentum": {"momentum": 0.0},
    "adamw": {"optimizer": "adamw", "schedule": "cosine", "warmup_iterations": 4},
    "bfloat16": {"precision": "bfloat16"},
}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert (value.dtype, value.shape) == (expected[name].dtype, expected[name].shape), name
        assert torch.equal(value, expected[name]), name


@every_device
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels last", "contiguous"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_training_in_parts_is_the_one_in_one_go(recipe: dict[str, Any], layout: torch.memory_format, device: str) -> None:
    """To the last bit: losses, weights, statistics, the optimiser's memory. On a GPU also where a graph was captured before,
    and is after.
    """
    features, labels = random_data(device)
    features = features.half().contiguous(memory_format=layout)

    def new_step(seed: int) -> TrainStep:
        head = make_head(device, dropout_rate=0.3).float()
        torch.manual_seed(seed)
        for parameter in head.parameters():
            nn.init.normal_(parameter)
        return make_step(head, features, labels, iterations=12, learning_rate=0.1, weight_decay=0.01, **recipe)

    whole = new_step(0)
    losses, states = [], [whole.state()]
    for _ in range(12):
        losses.append(whole().item())
        states.append(whole.state())
    assert len(set(losses)) == 12
    for begin, end in ((0, 12), (1, 3), (2, 12), (fast.train_step.EAGER_ITERATIONS + 2, 12)):
        other = new_step(1)  # other weights, other random numbers
        other.restore(load(save(states[begin])))
        assert_same(other.state(), states[begin])
        assert [other().item() for _ in range(begin, end)] == losses[begin:end]
        assert_same(other.state(), states[end])
        assert_same(other.head.state_dict(), {k: v.to(device) for k, v in head_of(states[end]).items()})


def head_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("head."): value for name, value in state.items() if name.startswith("head.")}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_state_is_dense_tensors_on_the_cpu_that_share_nothing(recipe: dict[str, Any]) -> None:
    """Not even with the step that goes on; and of weights that are channels last."""
    head = make_head().float().to(memory_format=torch.channels_last)
    step = make_step(head, *random_data(), **recipe)
    step()
    state = step.state()
    assert all(value.is_contiguous() and value.device.type == "cpu" and not value.requires_grad for value in state.values())
    assert len({value.untyped_storage().data_ptr() for value in state.values()}) == len(state)
    before = save(state)
    step()
    assert save(state) == before
    step.restore(load(before))
    assert save(step.state()) == before


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("recipe", [RECIPES["sgd"], RECIPES["adamw"]], ids=["sgd", "adamw"])
def test_a_training_on_a_gpu_is_divided_too(recipe: dict[str, Any]) -> None:
    """What is kept is on the CPU, what goes on is on the GPU, and a graph is captured in each part."""
    with fake_gpu() as gpu:

        def new_step() -> TrainStep:
            head = SegmentationHead(DensePredictionCell(CELL, 3, branch_channels=8, cell_channels=8), 4).to("cuda")
            features, labels = random_data("cuda")
            return make_step(head, features.half().contiguous(memory_format=torch.channels_last), labels, **recipe)

        step, other = new_step(), new_step()
        for _ in range(fast.train_step.EAGER_ITERATIONS + 2):
            step()
        state = step.state()
        assert all(type(value) is Tensor and value.device.type == "cpu" for value in state.values())
        other.restore(state)
        memories = [memory for kept in other._optimizer.state.values() for memory in kept.values() if memory is not None]
        assert len(memories) == sum(name.startswith("optimizer.") for name in state)
        assert {memory.device.type for memory in memories} <= {"cuda"}
        launches = gpu.launches
        for _ in range(fast.train_step.EAGER_ITERATIONS + 2):
            other()
        assert gpu.launches > launches
        assert other.state().keys() == state.keys()


def test_the_state_of_another_head_is_refused() -> None:
    step = make_step(make_head(), *random_data())
    step()
    state = step.state()
    for other in (make_head(classes=5), SegmentationHead(DensePredictionCell(Cell(()), 3), 4)):
        with pytest.raises((KeyError, RuntimeError)):
            make_step(other.double(), *random_data()).restore(state)
    for name in ("iterations", "random.cpu", "head.classifier.bias"):
        with pytest.raises((KeyError, RuntimeError), match=name.removeprefix("head.").removeprefix("random.")):
            make_step(make_head(), *random_data()).restore({key: value for key, value in state.items() if key != name})


def test_a_head_without_branches_learns() -> None:
    """The linear probe: a norm and a classifier."""
    torch.manual_seed(0)
    features, labels = random_data()
    head = SegmentationHead(DensePredictionCell(Cell(()), features.shape[1]), 4).to(features.dtype)
    step = make_step(head, features, labels, iterations=60)
    losses = [step().item() for _ in range(60)]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    assert {int(count) for count in counters(head)} == {60}


def test_depends_on_the_seed_alone() -> None:
    def losses(seed: int) -> list[float]:
        head = make_head(dropout_rate=0.5)
        torch.manual_seed(seed)
        step = make_step(head, *random_data())
        return [step().item() for _ in range(4)]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_bfloat16_stays_near(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only products are rounded, to 8 bits: of logits of about 1, the loss moves by a few thousandths."""
    data = random_data()
    losses = []
    for precision in ("float32", "bfloat16"):
        head = make_head().float()
        torch.manual_seed(1)
        torch.nn.init.normal_(head.classifier.weight)
        losses.append(make_step(head, *data, precision=precision)().item())
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)

    monkeypatch.setattr(fast.train_step, "has_fast_bf16", lambda device: True)
    torch.manual_seed(1)
    assert make_step(make_head().float(), *data, precision="auto")._bf16


# Crops


def make_crops(features: Tensor, labels: Tensor, crop: tuple[int, int], batch_size: int, grid: Grid = GRID) -> TrainStep:
    return make_step(make_head(), features, labels.to(torch.uint8), grid=grid, crop=crop, batch_size=batch_size)


@given(
    crop=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    size=st.tuples(st.integers(4, 7), st.integers(5, 7)),
    grid=st.sampled_from((GRID, CENTRES)),
    seed=rng_seeds(),
)
def test_crops_of_features_lie_on_their_labels(crop: tuple[int, int], size: tuple[int, int], grid: Grid, seed: int) -> None:
    """Features say where they are; labels say which feature they belong to, at the first pixel of its patch."""
    h, w = size
    index, i, j = np.meshgrid(np.arange(3), np.arange(h), np.arange(w), indexing="ij")
    features = torch.from_numpy(np.stack([index, i, j], axis=1)).half()
    labels = np.full((3, *grid.pixels(size)), 255)
    labels[:, ::STRIDE, ::STRIDE] = index * h * w + i * w + j
    step = make_crops(features, torch.from_numpy(labels), crop, 3, grid)
    torch.manual_seed(seed)
    seen = set()
    for _ in range(10):
        batch, targets = step.draw()
        assert batch.shape == (3, 3, *crop)
        assert targets.shape == (3, *grid.pixels(crop))
        n, y, x = batch.long().unbind(dim=1)
        assert torch.equal(targets[:, ::STRIDE, ::STRIDE].long(), n * h * w + y * w + x)
        assert int((targets != 255).sum()) == n.numel()  # and nothing in between
        seen |= set(zip(n[:, 0, 0].tolist(), y[:, 0, 0].tolist(), x[:, 0, 0].tolist(), strict=True))
    assert all(y <= h - crop[0] and x <= w - crop[1] for _, y, x in seen)


def test_gathered_crops_equal_cut_ones() -> None:
    """A GPU gathers windows without asking the host; the same places, the same values."""
    features, labels = random_data()
    index, top, left = torch.tensor([4, 0, 4]), torch.tensor([2, 0, 1]), torch.tensor([0, 2, 1])
    batch, targets = make_crops(features, labels, (3, 4), 3)._cut(index.tolist(), top.tolist(), left.tolist())
    gathered = fast.train_step._gather(features, index, top, left, (3, 4)).permute(0, 3, 1, 2)
    assert torch.equal(gathered, batch)
    windows = fast.train_step._gather(labels[:, None], index, STRIDE * top, STRIDE * left, GRID.pixels((3, 4)))
    assert torch.equal(windows[..., 0], targets)


def test_crops_reach_every_picture_and_place_equally_often() -> None:
    index, i, j = np.meshgrid(np.arange(2), np.arange(4), np.arange(5), indexing="ij")
    features = torch.from_numpy(np.stack([index, i, j], axis=1)).half()
    step = make_crops(features, torch.zeros(2, *GRID.pixels((4, 5))), (2, 3), 60)
    torch.manual_seed(0)
    counts = np.zeros((2, 3, 3))
    for _ in range(50):
        np.add.at(counts, tuple(step.draw()[0][:, :, 0, 0].long().numpy().T), 1)
    expected = counts.sum() / counts.size
    assert ((counts - expected) ** 2 / expected).sum() < chi2.isf(1e-4, 17)  # false alarm: one seed in 10,000
