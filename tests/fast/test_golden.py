"""The fast path with the authors' weights gives the authors' outputs; see tests/golden/README.md."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fast.dense_prediction_cell import DensePredictionCell, load_reference_weights
from tests.golden.authors_dumps import dump_files, load_cell_dump

OUTPUT_BOUND = 5e-5  # absolute, on maps of values up to 10: two float32 computations, each through up to ten convolutions


@pytest.mark.parametrize("path", [*dump_files("dpc_cells/*.npz"), *dump_files("dpc_train/*.npz")])
def test_output(path: Path) -> None:
    dump = load_cell_dump(path)
    cell_channels, concat_channels = dump.weights.projection.weight.shape[:2]
    cell = DensePredictionCell(
        dump.cell,
        dump.features.shape[1],
        branch_channels=concat_channels // len(dump.cell.branches),
        cell_channels=cell_channels,
        output_stride=16 // dump.options.rate_multiplier,
        dropout_rate=0.0,
        pooling=dump.options.pooling,
        pooling_size=dump.options.pooling_size,
    )
    load_reference_weights(cell, dump.weights)
    with torch.no_grad():
        output = cell.train(dump.options.training)(torch.from_numpy(dump.features).float())
    np.testing.assert_allclose(output.numpy(), dump.output, rtol=0, atol=OUTPUT_BOUND)
