"""GPU memory through the NVIDIA driver's own library: allocate, copy, free.

The driver is there wherever a GPU is, so no toolkit and no package of bindings is needed.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...targets.tensorrt.driver import driver
from ..session import Array


class Buffer:
    """An array in GPU memory, freed with the object. shape, dtype as in numpy; address: a device pointer."""

    def __init__(self, device: Device, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        self.device, self.shape, self.dtype = device, tuple(shape), dtype
        self.nbytes = int(np.prod(self.shape, dtype=np.int64)) * dtype.itemsize
        self.address = device.allocate(max(1, self.nbytes))
        weakref.finalize(self, device.free, self.address)

    def numpy(self) -> Array:
        """A copy in host memory."""
        array = np.empty(self.shape, self.dtype)
        if self.nbytes:
            pointer = ctypes.c_void_p(array.ctypes.data)
            self.device.call("cuMemcpyDtoH_v2", pointer, _u64(self.address), ctypes.c_size_t(self.nbytes))
        return array


class Device:
    """The first GPU, its primary context current in this thread. Raises RuntimeError if the driver refuses."""

    def __init__(self) -> None:
        self._cuda: Any = driver()
        if self._cuda is None:
            raise RuntimeError("no NVIDIA driver on this host")
        self.call("cuInit", 0)
        number, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(number), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
        self.call("cuCtxSetCurrent", context)

    def call(self, function: str, *arguments: Any) -> None:
        """Call the driver. Raises RuntimeError with its error code."""
        status = getattr(self._cuda, function)(*arguments)
        if status != 0:
            raise RuntimeError(f"{function}: CUDA driver error {status}")

    def allocate(self, nbytes: int) -> int:
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        return int(address.value)

    def free(self, address: int) -> None:
        self._cuda.cuMemFree_v2(_u64(address))

    def synchronize(self) -> None:
        self.call("cuCtxSynchronize")

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> Buffer:
        return Buffer(self, shape, dtype)

    def zeros(self, shape: Sequence[int], dtype: np.dtype[Any]) -> Buffer:
        buffer = Buffer(self, shape, dtype)
        self.call("cuMemsetD8_v2", _u64(buffer.address), ctypes.c_ubyte(0), ctypes.c_size_t(buffer.nbytes))
        return buffer

    def put(self, array: Array) -> Buffer:
        """A copy of a host array."""
        source = np.ascontiguousarray(array)
        buffer = Buffer(self, source.shape, source.dtype)
        if source.nbytes:
            pointer = ctypes.c_void_p(source.ctypes.data)
            self.call("cuMemcpyHtoD_v2", _u64(buffer.address), pointer, ctypes.c_size_t(source.nbytes))
        return buffer


def _u64(address: int) -> ctypes.c_uint64:
    return ctypes.c_uint64(address)
