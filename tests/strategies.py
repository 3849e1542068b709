"""What property tests draw: cells, map sizes and seeds, never arrays; arrays follow from a seed.

The weights of this file are not those of an initialised network: scales of both signs, offsets and running statistics that
differ by channel, so that a forgotten or swapped one shows.
"""

from collections.abc import Sequence
from typing import assert_never

import numpy as np
from hypothesis import strategies as st

from reference.atrous_separable_conv import SeparableConv
from reference.batch_norm import Array, BatchNorm
from reference.cell import (
    GRID_SIZES,
    RATES,
    AtrousSeparableConv,
    Branch,
    Cell,
    Conv1x1,
    Operation,
    PyramidPooling,
)
from reference.decoder import DecoderWeights
from reference.dense_prediction_cell import BranchWeights, CellWeights
from reference.pointwise_conv import ConvNorm


def rng_seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**32 - 1)


def map_sizes(max_size: int = 12) -> st.SearchStrategy[tuple[int, int]]:
    """(height, width), each from 1 to max_size."""
    return st.tuples(st.integers(1, max_size), st.integers(1, max_size))


def operations(searchable: bool = False) -> st.SearchStrategy[Operation]:
    """Every kind equally often; `searchable` keeps to the paper's 81, otherwise rates up to 24 and grids up to 10."""
    rates = st.sampled_from(RATES) if searchable else st.integers(1, 24)
    grid_sizes = st.sampled_from(GRID_SIZES) if searchable else st.integers(1, 10)
    return st.one_of(
        st.just(Conv1x1()),
        st.builds(AtrousSeparableConv, rate=st.tuples(rates, rates)),
        st.builds(PyramidPooling, grid_size=st.tuples(grid_sizes, grid_sizes)),
    )


@st.composite
def cells(
    draw: st.DrawFn, min_branches: int = 1, max_branches: int = 10, searchable: bool = False, num_inputs: int = 1
) -> Cell:
    """Cells that read at most so many layers of a backbone."""
    num_branches = draw(st.integers(min_branches, max_branches))
    inputs = [draw(st.integers(-num_inputs, i - 1)) for i in range(num_branches)]
    return Cell(tuple(Branch(input_index, draw(operations(searchable))) for input_index in inputs))


def random_batch_norm(channels: int, rng: np.random.Generator) -> BatchNorm[Array]:
    return BatchNorm(
        scale=rng.uniform(0.5, 1.5, channels) * rng.choice([-1.0, 1.0], channels, p=[0.2, 0.8]),
        offset=rng.normal(0.0, 0.5, channels),
        running_mean=rng.normal(0.0, 0.5, channels),
        running_var=rng.uniform(0.5, 2.0, channels),
    )


def random_pointwise(in_channels: int, out_channels: int, rng: np.random.Generator) -> ConvNorm[Array]:
    weight = rng.normal(0.0, in_channels**-0.5, (out_channels, in_channels, 1, 1))
    return ConvNorm(weight, random_batch_norm(out_channels, rng))


def random_separable(in_channels: int, out_channels: int, rng: np.random.Generator) -> SeparableConv[Array]:
    depthwise = ConvNorm(rng.normal(0.0, 1 / 3, (in_channels, 1, 3, 3)), random_batch_norm(in_channels, rng))
    return SeparableConv(depthwise, random_pointwise(in_channels, out_channels, rng))


def random_cell_weights(
    cell: Cell, in_channels: int | Sequence[int], branch_channels: int, cell_channels: int, rng: np.random.Generator
) -> CellWeights[Array]:
    """Weights of every branch and of the projection; convolutions keep the variance of their input."""
    input_channels = (in_channels,) if isinstance(in_channels, int) else in_channels
    if not cell.branches:
        return CellWeights((), random_batch_norm(sum(input_channels), rng))
    branches: list[BranchWeights[Array]] = []
    for branch, channels in zip(cell.branches, cell.channels_read(input_channels, branch_channels), strict=True):
        match branch.operation:
            case Conv1x1() | PyramidPooling():
                branches.append(random_pointwise(channels, branch_channels, rng))
            case AtrousSeparableConv():
                branches.append(random_separable(channels, branch_channels, rng))
            case _:
                assert_never(branch.operation)
    return CellWeights(tuple(branches), random_pointwise(len(branches) * branch_channels, cell_channels, rng))


def random_decoder_weights(
    channels: int, low_level_channels: int, projected_channels: int, rng: np.random.Generator
) -> DecoderWeights[Array]:
    """As many channels out as of context."""
    projection = random_pointwise(low_level_channels, projected_channels, rng)
    widths = (channels + projected_channels, channels)
    return DecoderWeights(projection, tuple(random_separable(width, channels, rng) for width in widths))
