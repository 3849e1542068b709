import ctypes
from unittest import mock

import pytest

from tests.cuda_driver import sees_a_gpu


class Driver:
    """Answers as libcuda does: 0 is success, 100 means that there is no device."""

    def __init__(self, init: int, count: int) -> None:
        self.init, self.count = init, count

    def cuInit(self, flags: int) -> int:
        return self.init

    def cuDeviceGetCount(self, count: "ctypes._Pointer[ctypes.c_int]") -> int:
        ctypes.cast(count, ctypes.POINTER(ctypes.c_int))[0] = self.count
        return 0


@pytest.mark.parametrize(
    ("driver", "expected"),
    [(Driver(0, 2), True), (Driver(0, 0), False), (Driver(100, 2), False), (OSError("no such library"), False)],
    ids=["two devices", "none", "hidden", "no driver"],
)
def test_a_gpu_is_what_the_driver_shows(driver: Driver | OSError, expected: bool) -> None:
    with mock.patch.object(ctypes, "CDLL", side_effect=[driver]):
        assert sees_a_gpu() == expected
