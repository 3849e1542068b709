"""The operations of `reference/` on PyTorch, under the same names, and the modules built from them."""

from fast.dense_prediction_cell import DensePredictionCell
from fast.segmentation import SegmentationHead, SegmentationNetwork

__all__ = ["DensePredictionCell", "SegmentationHead", "SegmentationNetwork"]
