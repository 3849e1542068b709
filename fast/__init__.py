"""The operations of `reference/` on PyTorch, under the same names, and the modules built from them."""

from fast.decoder import Decoder
from fast.dense_prediction_cell import DensePredictionCell
from fast.fusion import explain
from fast.segmentation import SegmentationHead, SegmentationNetwork, predict_scales

__all__ = ["Decoder", "DensePredictionCell", "SegmentationHead", "SegmentationNetwork", "explain", "predict_scales"]
