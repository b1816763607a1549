"""External data of the ONNX files: one `weights.bin`, written as a stream, with equal bytes stored once.

Codes and scales go from the mapped quantized checkpoint to the file in chunks of rows. Values do not change, only the width of
their container.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
import torch

from ...ops.packing import repack
from ...system.digest import of_tensor

ALIGNMENT = 4096  # a page: the runtime maps external data, and a tensor that is not aligned is copied
_CHUNK = 8 << 20  # bytes of source codes converted at a time


class WeightFile:
    """Appends tensors to `weights.bin`; `add` returns the initializer that points there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("wb")
        self._known: dict[str, tuple[int, int]] = {}

    def add(
        self, name: str, key: str, chunks: Iterable[np.ndarray], dtype: ir.DataType, shape: tuple[int, ...]
    ) -> ir.Value:
        """An initializer over the bytes of `chunks`, which are written once for each `key`, also if shapes differ."""
        if key not in self._known:
            start = self._file.tell()
            padding = -start % ALIGNMENT
            self._file.write(bytes(padding))
            for chunk in chunks:
                self._file.write(np.ascontiguousarray(chunk).data)
            self._known[key] = (start + padding, self._file.tell() - start - padding)
        offset, length = self._known[key]
        expected = int(np.prod(shape)) * dtype.itemsize
        if length != expected:
            raise ValueError(f"{name}: {length} bytes written where {list(shape)} {dtype} takes {expected}")
        tensor = ir.ExternalTensor(
            self.path.name, offset, length, dtype, shape=ir.Shape(shape), name=name, base_dir=self.path.parent
        )
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)

    def close(self) -> None:
        self._file.close()


def codes_chunks(parts: Iterable[torch.Tensor], bits: int, container: int, columns: int) -> Iterator[np.ndarray]:
    """Rows of packed codes, one part after the other, in a container of `container` bits."""
    for part in parts:
        rows = max(1, _CHUNK // max(1, part.shape[1]))
        for start in range(0, part.shape[0], rows):
            chunk = part[start : start + rows]
            yield (chunk if container == bits else repack(chunk, bits, container, columns)).numpy()


def scales_chunks(parts: Iterable[torch.Tensor], repeat: int) -> Iterator[np.ndarray]:
    """Rows of scales as float32, each repeated `repeat` times (a channel's scale in every block of it)."""
    for part in parts:
        rows = max(1, _CHUNK // max(1, part.shape[1] * repeat))
        for start in range(0, part.shape[0], rows):
            chunk = part[start : start + rows].to(torch.float32)
            yield (chunk if repeat == 1 else chunk.repeat_interleave(repeat, 1)).numpy()


def content_key(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes: never its name or address, which two graphs or a freed buffer may share."""
    return of_tensor(tensor)
