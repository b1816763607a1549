"""Writing one safetensors file piece by piece; the header is known ahead.

A tensor is filled from its start by as many `write` calls as it takes, so none is in memory at once, and calls for several
tensors may alternate. The file has a temporary name until it is complete. The same entries and data give the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import torch

from ..errors import UserError
from ..system.dtypes import SAFETENSORS

_ALIGNMENT = 64
_LARGEST_WRITE = 1 << 30


@dataclass
class _Slot:
    """Where a tensor lies in the file, and up to where it is written."""

    dtype: torch.dtype
    start: int
    stop: int
    cursor: int


class StreamingWriter:
    """A context manager: on a normal exit the file gets its name, on an exception it is deleted.

    Args:
        path: the file to write. Until the exit it is `<name>.partial`, beside it.
        entries: (name, dtype as the format spells it, shape) of every tensor. In the file they are sorted by element size,
            the largest first, so that every tensor is aligned to its elements. The data are aligned to 64 bytes.
        metadata: the header's string map.

    Raises ValueError for a name given twice, an unknown dtype, or data that do not fit; UserError if the disk refuses.
    """

    def __init__(
        self, path: Path, entries: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]
    ) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
        self._slots: dict[str, _Slot] = {}
        offset = 0
        for name, kind, shape in sorted(entries, key=lambda entry: -_element(entry[1])):
            if name in self._slots or name == "__metadata__":
                raise ValueError(f"tensor {name!r} is given twice or has a reserved name")
            size = prod(shape) * _element(kind)
            header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, offset + size]}
            self._slots[name] = _Slot(SAFETENSORS[kind], offset, offset + size, offset)
            offset += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        self._prefix = len(text).to_bytes(8, "little") + text
        self.file_bytes = len(self._prefix) + offset
        self._descriptor = -1

    def __enter__(self) -> StreamingWriter:
        try:
            self._descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | _BINARY, 0o666)
            os.ftruncate(self._descriptor, self.file_bytes)
            self._put(self._prefix, 0)
        except OSError as error:
            self._discard()
            raise self._refused(error) from None
        return self

    def write(self, name: str, data: torch.Tensor) -> None:
        """Append `data` (the tensor's dtype, any shape, row-major) to tensor `name`. Raises ValueError or UserError."""
        slot = self._slots[name]
        if data.dtype != slot.dtype:
            raise ValueError(f"{name} has dtype {slot.dtype}, got {data.dtype}")
        octets = data.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        if slot.cursor + octets.nbytes > slot.stop:
            raise ValueError(f"{name} has {slot.stop - slot.start} bytes, got more")
        try:
            self._put(octets.data, len(self._prefix) + slot.cursor)
        except OSError as error:
            raise self._refused(error) from None
        slot.cursor += octets.nbytes

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            return
        for name, slot in self._slots.items():
            if slot.cursor != slot.stop:
                self._discard()
                raise ValueError(f"{name} got {slot.cursor - slot.start} of its {slot.stop - slot.start} bytes")
        try:
            os.close(self._descriptor)
            self._descriptor = -1
            os.replace(self._partial, self._path)
        except OSError as error:
            self._discard()
            raise self._refused(error) from None

    def _put(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while len(view):
            done = os.pwrite(self._descriptor, view[:_LARGEST_WRITE], offset)
            view, offset = view[done:], offset + done

    def _discard(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._partial.unlink(missing_ok=True)

    def _refused(self, error: OSError) -> UserError:
        return UserError(f"{self._path} cannot be written ({error.strerror}); it takes {self.file_bytes} bytes")


def _element(kind: str) -> int:
    """Bytes of one element."""
    if kind not in SAFETENSORS:
        raise ValueError(f"dtype {kind!r} is not one of {', '.join(SAFETENSORS)}")
    return SAFETENSORS[kind].itemsize


_BINARY = getattr(os, "O_BINARY", 0)
