"""The reference against outputs of the authors' own code, described in tests/golden/README.md. Those are float32."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reference.batch_norm import Array, BatchNorm, updated_running_statistics
from reference.dense_prediction_cell import branch_outputs, dense_prediction_cell, dense_prediction_cell_backward
from reference.hard_example_mining import mined_cross_entropy, mined_cross_entropy_backward
from reference.mean_iou import confusion_matrix, mean_iou
from reference.upsampled_cross_entropy import upsampled_cross_entropy, upsampled_cross_entropy_backward
from tests.golden.authors_dumps import (
    GRADIENT_BOUND,
    LOSS_BOUND,
    OUTPUT_BOUND,
    SCORE_BOUND,
    STATISTICS_BOUND,
    CellDump,
    cell_weights,
    dump_files,
    load_cell_dump,
    load_loss_dump,
    nchw,
    with_prefix,
)
from tests.reference.directional_derivative import leaves, with_batch_norms

MINED = ("topk25", "topk25_mining100_step40", "topk25_weights")
SCOPE = "meta_architecture/"


@pytest.mark.parametrize("path", dump_files("dpc_cells/*.npz"))
def test_inference(path: Path) -> None:
    check_outputs(load_cell_dump(path))


@pytest.mark.parametrize("path", dump_files("dpc_train/*.npz"))
def test_training_step(path: Path) -> None:
    dump = load_cell_dump(path)
    check_outputs(dump)
    cotangent = nchw(dump.arrays["cotangent"])  # of loss = Σ cotangent · output
    actual = dense_prediction_cell_backward(cotangent, dump.features, dump.cell, dump.weights, dump.options)
    expected_weights = cell_weights(with_prefix(dump.arrays, f"grad/{SCOPE}"), dump.cell)
    expected = nchw(dump.arrays["grad_features"]), expected_weights
    for gradient, golden in zip(leaves(actual), leaves(expected), strict=True):
        np.testing.assert_allclose(gradient, golden, rtol=0, atol=GRADIENT_BOUND * np.abs(golden).max())


@pytest.mark.parametrize("path", dump_files("dpc_train/*.npz"))
def test_running_statistics_after_a_training_step(path: Path) -> None:
    """Frozen statistics (`fine_tune_batch_norm` false) have no update in the file and none in the reference."""
    dump = load_cell_dump(path)
    variables = with_prefix(dump.arrays, f"var/{SCOPE}") | with_prefix(dump.arrays, f"var_after_update/{SCOPE}")
    expected = batch_norms(cell_weights(variables, dump.cell))
    _, calls = with_batch_norms(lambda x: dense_prediction_cell(x, dump.cell, dump.weights, dump.options), (dump.features,))
    momentum = 1.0 - dump.meta["bn_decay"] if dump.options.training else 0.0
    for call, golden in zip(calls, expected, strict=True):
        after = updated_running_statistics(call.x, call.norm, momentum=momentum)
        np.testing.assert_allclose(after.running_mean, golden.running_mean, rtol=0, atol=STATISTICS_BOUND)
        np.testing.assert_allclose(after.running_var, golden.running_var, rtol=0, atol=STATISTICS_BOUND)


@pytest.mark.parametrize("path", dump_files("train_facts/loss.npz"))
def test_loss_and_its_gradient(path: Path) -> None:
    dump = load_loss_dump(path, "plain")
    assert upsampled_cross_entropy(dump.logits, dump.labels) == pytest.approx(dump.loss, abs=LOSS_BOUND)
    bound = GRADIENT_BOUND * np.abs(dump.grad_logits).max()
    gradient = upsampled_cross_entropy_backward(dump.logits, dump.labels)
    np.testing.assert_allclose(gradient, dump.grad_logits, rtol=0, atol=bound)
    nothing = np.full_like(dump.labels, 255)
    assert upsampled_cross_entropy(dump.logits, nothing) == 0.0  # as the authors' for no label at all


@pytest.mark.parametrize("name", MINED)
@pytest.mark.parametrize("path", dump_files("train_facts/loss.npz"))
def test_hard_example_mining(path: Path, name: str) -> None:
    """One pixel more or less moves these losses by 5e-5, and the gradients by half a percent of the largest."""
    logits, labels, share, class_weights, loss, grad_logits = load_loss_dump(path, name)
    assert share < 1.0
    actual = mined_cross_entropy(logits, labels, share, class_weights=class_weights)
    assert actual == pytest.approx(loss, abs=LOSS_BOUND)
    gradient = mined_cross_entropy_backward(logits, labels, share, class_weights=class_weights)
    np.testing.assert_allclose(gradient, grad_logits, rtol=0, atol=GRADIENT_BOUND * np.abs(grad_logits).max())


@pytest.mark.parametrize("path", dump_files("train_facts/miou.npz"))
def test_mean_iou(path: Path) -> None:
    """`tf.metrics.mean_iou` over 5000 pixels, in which one of the 19 classes does not occur; float32."""
    with np.load(path) as file:
        confusion = confusion_matrix(file["predictions"], file["labels"], num_classes=19)
        assert mean_iou(confusion) == pytest.approx(float(file["mean_iou"]), abs=SCORE_BOUND)


def check_outputs(dump: CellDump) -> None:
    branches = branch_outputs(dump.features, dump.cell, dump.weights, dump.options)
    for i, golden in with_prefix(dump.arrays, "branch/").items():
        np.testing.assert_allclose(branches[int(i)], nchw(golden), rtol=0, atol=OUTPUT_BOUND, err_msg=f"branch {i}")
    output = dense_prediction_cell(dump.features, dump.cell, dump.weights, dump.options)
    np.testing.assert_allclose(output, dump.output, rtol=0, atol=OUTPUT_BOUND)


def batch_norms(tree: Any) -> list[BatchNorm[Array]]:
    """The batch norms of a cell's weights, in the order of the forward pass."""
    if isinstance(tree, BatchNorm):
        return [tree]
    return [] if isinstance(tree, np.ndarray) else [norm for child in tree for norm in batch_norms(child)]
