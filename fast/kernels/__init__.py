"""What computes a map: C++ kernels on a CPU (`cpp/`), Triton kernels on an NVIDIA GPU (`triton/`), PyTorch everywhere else.

`interface.py` says what is computed, and how a map travels whose norm is not yet applied; `choose.py` who computes it.
"""

from fast.kernels.choose import backend_for, explain, using
from fast.kernels.interface import Backend, Dropout, Folded, NormedMap, Unfolded

__all__ = ["Backend", "Dropout", "Folded", "NormedMap", "Unfolded", "backend_for", "explain", "using"]
