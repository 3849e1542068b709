"""`reference/bilinear_resize.py` on PyTorch."""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fast.kernels import NormedMap, backend_for
from fast.lazy_norm import plane_product, value
from reference.batch_norm import Array
from reference.bilinear_resize import interpolation_matrix


def bilinear_resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """x: (N, C, H, W) -> (N, C, *size), corners aligned."""
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


def lazy_bilinear_resize(x: NormedMap, size: tuple[int, int]) -> Tensor:
    """Like `bilinear_resize`, of a map whose norm is applied on load; kernels make its gradient the same in every run."""
    backend = backend_for(x.raw)
    if backend is None:
        return bilinear_resize(value(x), size)
    like = (torch.promote_types(x.raw.dtype, torch.float32), x.raw.device)
    rows, columns = (resize_matrix(x.raw.shape[2 + i], size[i], *like) for i in range(2))
    return plane_product(backend, x, rows, columns)


@functools.cache
def resize_matrix(in_size: int, out_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The resize along one axis as a matrix: (out_size, in_size).

    The result is never dropped from memory: a captured CUDA graph reads it at each replay and cannot make it again.
    """
    return constant(interpolation_matrix(in_size, out_size), dtype, device)


def constant(matrix: Array, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A matrix of the reference as a tensor that inference and training may share."""
    with torch.inference_mode(False):
        return torch.from_numpy(np.ascontiguousarray(matrix)).to(device, dtype)
