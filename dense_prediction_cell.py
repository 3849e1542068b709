"""Dense Prediction Cells for PyTorch: `import dense_prediction_cell as dpc`.

It needs PyTorch and NumPy alone. Files of heads and networks need safetensors too, and timm's backbones timm: both come with
`pip install 'dense-prediction-cell[search]'`, which also brings the commands (`dpc-search`, `dpc-train`, and so on).

>>> import torch
>>> context = DensePredictionCell(load_cell("dpc"), in_channels=320)
>>> context(torch.zeros(2, 320, 33, 33)).shape
torch.Size([2, 256, 33, 33])
"""

from importlib.metadata import PackageNotFoundError, version

from fast import Decoder, DensePredictionCell, SegmentationHead, SegmentationNetwork, explain, kernels, predict_scales
from fast.backbone import timm_backbone
from fast.batch_norm import authors_norm
from fast.checkpoint import load_context, load_head, load_network, save_context, save_head, save_network
from fast.weights import load_weights
from reference.cell import Cell
from search.cells.space import load_cell
from search.commands import DISTRIBUTION
from search.commands import run_script as _run_script  # noqa: F401  # what all scripts call, dpc-search and the others

__all__ = [
    "Cell",
    "Decoder",
    "DensePredictionCell",
    "SegmentationHead",
    "SegmentationNetwork",
    "__version__",
    "authors_norm",
    "explain",
    "kernels",
    "load_cell",
    "load_context",
    "load_head",
    "load_network",
    "load_weights",
    "predict_scales",
    "save_context",
    "save_head",
    "save_network",
    "timm_backbone",
]

try:
    __version__ = version(DISTRIBUTION)
except PackageNotFoundError:  # a checkout that nobody installed
    __version__ = "0+unknown"
