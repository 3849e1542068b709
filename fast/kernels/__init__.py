"""What computes maps: C++ kernels on a CPU (`cpp/`), Triton kernels on an NVIDIA GPU (`triton/`), else PyTorch (`library.py`).

`interface.py` says what is computed, and how a map travels whose norm is not yet applied; `choose.py` who computes it.
"""

from fast.kernels.choose import backend_for, explain, iteration_kernels_for, observer, operations_for, using, value
from fast.kernels.interface import (
    Backend,
    Dropout,
    Folded,
    IterationKernels,
    LiveConv,
    NormedMap,
    Operations,
    Unfolded,
    in_mode,
)

__all__ = [
    "Backend",
    "Dropout",
    "Folded",
    "IterationKernels",
    "LiveConv",
    "NormedMap",
    "Operations",
    "Unfolded",
    "backend_for",
    "explain",
    "in_mode",
    "iteration_kernels_for",
    "observer",
    "operations_for",
    "using",
    "value",
]
