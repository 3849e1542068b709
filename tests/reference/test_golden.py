"""The reference against outputs of the authors' own code, described in tests/golden/README.md. Those are float32."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reference.batch_norm import Array, BatchNorm, updated_running_statistics
from reference.dense_prediction_cell import branch_outputs, dense_prediction_cell, dense_prediction_cell_backward
from reference.mean_iou import confusion_matrix, mean_iou
from reference.upsampled_cross_entropy import upsampled_cross_entropy, upsampled_cross_entropy_backward
from tests.golden.authors_dumps import (
    GRADIENT_BOUND,
    LOSS,
    LOSS_BOUND,
    OUTPUT_BOUND,
    SCORE_BOUND,
    STATISTICS_BOUND,
    CellDump,
    cell_weights,
    dump_files,
    load_cell_dump,
    nchw,
    with_prefix,
)
from tests.reference.directional_derivative import leaves, with_batch_norms

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
    with np.load(path) as file:
        logits, labels = nchw(file["logits"]), file["labels"][..., 0]
        grad_logits = nchw(file["grad_plain"])
    assert upsampled_cross_entropy(logits, labels) == pytest.approx(LOSS, abs=LOSS_BOUND)
    bound = GRADIENT_BOUND * np.abs(grad_logits).max()
    np.testing.assert_allclose(upsampled_cross_entropy_backward(logits, labels), grad_logits, rtol=0, atol=bound)
    assert upsampled_cross_entropy(logits, np.full_like(labels, 255)) == 0.0  # as the authors' for no label at all


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
