"""A bilinear resize and a pooling along one axis, as the small matrices that a product of planes takes."""

import functools

import numpy as np
import torch
from torch import Tensor

from reference.batch_norm import Array
from reference.bilinear_resize import interpolation_matrix
from reference.pyramid_pooling import PoolingVariant
from reference.pyramid_pooling import pooling_matrix as reference_pooling_matrix


@functools.cache
def resize_matrix(in_size: int, out_size: int, dtype: torch.dtype, device: torch.device, align_corners: bool = True) -> Tensor:
    """The resize along one axis: (out_size, in_size).

    Kept for good: a captured CUDA graph cannot copy it again, and reads it at each replay, which no cache hears of.
    """
    return _tensor(interpolation_matrix(in_size, out_size, align_corners=align_corners), dtype, device)


@functools.cache  # for good, as `resize_matrix`
def pooling_matrix(
    size: int, grid: int, variant: PoolingVariant, pooling_size: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The means along one axis: (rows or columns of means, size); `pooling_size` pins the window."""
    return _tensor(reference_pooling_matrix(size, grid, variant=variant, pooling_size=pooling_size), dtype, device)


def _tensor(matrix: Array, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A matrix of the reference as a tensor that inference and training may share."""
    with torch.inference_mode(False):
        return torch.from_numpy(np.ascontiguousarray(matrix)).to(device, dtype)
