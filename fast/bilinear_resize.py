"""`reference/bilinear_resize.py` on PyTorch."""

from torch import Tensor

from fast.kernels import NormedMap, library


def bilinear_resize(x: Tensor, size: tuple[int, int], *, align_corners: bool = True) -> Tensor:
    """x: (N, C, H, W) -> (N, C, *size).

    Always PyTorch's: it makes images and full-size logits, whose gradient nobody asks for, without a product by matrices. Maps
    within a cell are resized by `Operations.resize`; on kernels, its gradient is the same at every run.
    """
    return library.resize(NormedMap(x), size, align_corners)
