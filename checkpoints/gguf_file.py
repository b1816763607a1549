"""The GGUF container: metadata and where tensors lie. Each read is checked against the file's end.

Format: ggml's docs/gguf.md, versions 2 and 3. The reader of the `gguf` package is not used: it makes an array object for each
token of a vocabulary, and a hostile array length sends it into an endless loop. Its tables of block types are used.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from ..errors import UserError
from ..system.reading import one_line, require_regular

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "|b1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_SMALLEST_PAIR = 8 + 4 + 1  # key length, value type, one byte of value
_SMALLEST_TENSOR = 8 + 4 + 4 + 8
_MAX_DIMS = 4


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the file has it: its shape, slowest axis first, and the bytes of its blocks [rows, bytes a row], mapped."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class GgufFile:
    """A file's metadata and tensors."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Read a GGUF header and map its tensors. Weights stay on disk.

    Raises UserError if the file is not GGUF, is truncated, or contradicts itself.
    """
    require_regular(path)
    try:
        # Copy-on-write: torch wants writable arrays, and a write must not reach the file.
        data = np.memmap(path, dtype=np.uint8, mode="c")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be mapped ({one_line(error, 80)}); download it again") from None
    try:
        return _parse(path, data)
    except _Malformed as error:
        raise UserError(
            f"{one_line(path)}: not a whole GGUF file ({one_line(error, 120)}); download it again"
        ) from None


class _Malformed(Exception):
    """What is wrong with the file. `read_gguf` adds the file's name."""


def _parse(path: Path, data: npt.NDArray[np.uint8]) -> GgufFile:
    cursor = _Cursor(data)
    if cursor.take(4) != b"GGUF":
        raise _Malformed("bad magic")
    version = cursor.number("<u4")
    if version not in (2, 3):
        raise _Malformed("big-endian" if version & 0xFFFF == 0 else f"version {version}, known are 2 and 3")
    tensor_count, pair_count = cursor.count(_SMALLEST_TENSOR), cursor.count(_SMALLEST_PAIR)
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.text()
        if key in metadata:
            raise _Malformed(f"key {key} twice")
        metadata[key] = cursor.value(cursor.number("<u4"))
    places = [_tensor_place(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise _Malformed(f"alignment {alignment}")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    end = 0
    for name, kind, shape, offset in sorted(places, key=lambda place: place[3]):
        if name in tensors:
            raise _Malformed(f"tensor {name} twice")
        rows, row_bytes = math.prod(shape[:-1]), _row_bytes(name, kind, shape[-1])
        if offset % alignment or offset < end:
            raise _Malformed(f"tensor {name} overlaps another or is not aligned")
        end = offset + rows * row_bytes
        if start + end > data.size:
            raise _Malformed(f"tensor {name} ends at byte {start + end} of {data.size}")
        blocks = data[start + offset : start + end].reshape(rows, row_bytes)
        tensors[name] = GgufTensor(name, kind, shape, blocks)
    return GgufFile(path, metadata, tensors)


def _tensor_place(cursor: _Cursor) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
    name = cursor.text()
    dims = cursor.number("<u4")
    if not 1 <= dims <= _MAX_DIMS:
        raise _Malformed(f"tensor {name} has {dims} dimensions")
    shape = tuple(cursor.number("<u8") for _ in range(dims))[::-1]  # the file has the fastest axis first
    if min(shape) < 1:
        raise _Malformed(f"tensor {name} has shape {list(shape)}")
    kind = cursor.number("<u4")
    try:
        return name, GGMLQuantizationType(kind), shape, cursor.number("<u8")
    except ValueError:
        raise _Malformed(f"tensor {name} has unknown type {kind}") from None


def _row_bytes(name: str, kind: GGMLQuantizationType, width: int) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    if width % block:
        raise _Malformed(f"tensor {name} has rows of {width}, not a multiple of {kind.name}'s {block}")
    return int(width // block * size)


class _Cursor:
    """A position in the file. It moves forward, and not past the end."""

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        self._bytes = memoryview(data.data)
        self.at = 0

    def take(self, size: int) -> bytes:
        if size > len(self._bytes) - self.at:
            raise _Malformed(f"{size} bytes wanted at {self.at} of {len(self._bytes)}")
        self.at += size
        return bytes(self._bytes[self.at - size : self.at])

    def number(self, form: str) -> Any:
        dtype = np.dtype(form)
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def count(self, smallest: int) -> int:
        """A count of entries of at least `smallest` bytes each. Refuses one that the rest of the file cannot hold."""
        count: int = struct.unpack("<Q", self.take(8))[0]
        if count > (len(self._bytes) - self.at) // smallest:
            raise _Malformed(f"{count} entries announced at {self.at} of {len(self._bytes)}")
        return count

    def text(self) -> str:
        try:
            return self.take(struct.unpack("<Q", self.take(8))[0]).decode()
        except UnicodeDecodeError:
            raise _Malformed(f"a string before {self.at} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise _Malformed(f"value type {kind} at {self.at}")
        inner = self.number("<u4")
        if inner == _STRING:
            return [self.text() for _ in range(self.count(8))]
        if inner not in _SCALARS:
            raise _Malformed(f"array of type {inner} at {self.at}")
        dtype = np.dtype(_SCALARS[inner])
        return np.frombuffer(self.take(self.count(dtype.itemsize) * dtype.itemsize), dtype).tolist()
