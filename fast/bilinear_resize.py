"""`reference/bilinear_resize.py` on PyTorch."""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reference.batch_norm import Array
from reference.bilinear_resize import interpolation_matrix


def bilinear_resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """x: (N, C, H, W) -> (N, C, *size), corners aligned."""
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


@functools.lru_cache(maxsize=256)
def resize_matrix(in_size: int, out_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The resize along one axis as a matrix: (out_size, in_size). Kept, so that a captured CUDA graph copies nothing."""
    return constant(interpolation_matrix(in_size, out_size), dtype, device)


def constant(matrix: Array, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A matrix of the reference as a tensor that inference and training may share."""
    with torch.inference_mode(False):
        return torch.from_numpy(np.ascontiguousarray(matrix)).to(device, dtype)
