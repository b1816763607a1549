"""NVIDIA's driver library, by which a GPU is found without any package of bindings."""

from __future__ import annotations

import ctypes

_NAMES = ("libcuda.so.1", "nvcuda.dll")


def driver() -> ctypes.CDLL | None:
    """The driver's library, None where there is none."""
    for name in _NAMES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def gpu_available() -> bool:
    """Whether there is a driver and at least one GPU."""
    cuda = driver()
    count = ctypes.c_int()
    return bool(
        cuda is not None and cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    )
