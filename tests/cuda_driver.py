"""Asks NVIDIA's driver, without PyTorch: tests of the reference need none, and Triton must be told before its first import."""

import ctypes
import sys


def sees_a_gpu() -> bool:
    """Whether the driver is there and shows this process a device (CUDA_VISIBLE_DEVICES may hide them)."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
