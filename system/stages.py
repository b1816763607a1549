"""What a child process is doing, told to the parent in a file: native code cannot be asked, and may never come back.

The child marks a stage before it hands a stranger's file to a library. The parent (`system.subprocesses`) reads the mark: it ends
a child that stays in one stage too long, and names the stage in which a child died.
"""

from __future__ import annotations

import mmap
import struct
import time
from pathlib import Path
from types import TracebackType

SIZE = 200
"""Bytes of the file: the time at which the stage began, 0 outside of one, and its name."""

_TIME = struct.Struct("<d")
_NAME = SIZE - _TIME.size
_shared: mmap.mmap | None = None
_now: Stage | None = None


def report_to(path: Path) -> None:
    """From now on this process tells its stages in `path`, a file of SIZE zeros."""
    global _shared
    with path.open("r+b") as file:
        _shared = mmap.mmap(file.fileno(), SIZE)


class Stage:
    """`with Stage("onnx: loading"):` marks a stage; the innermost counts. Costs nothing where nobody reads it."""

    __slots__ = ("_before", "_name")

    def __init__(self, name: str) -> None:
        self._name = name.encode("utf-8", "replace")[:_NAME].ljust(_NAME, b"\0")
        self._before: Stage | None = None

    def __enter__(self) -> None:
        global _now
        if _shared is not None:
            self._before, _now = _now, self
            _tell(self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        global _now
        if _shared is not None:
            _now = self._before
            _tell(_now)

    def write(self, shared: mmap.mmap) -> None:
        shared[_TIME.size :] = self._name
        _TIME.pack_into(shared, 0, time.monotonic())


def _tell(stage: Stage | None) -> None:
    if _shared is not None:
        _TIME.pack_into(_shared, 0, 0.0)
        if stage is not None:
            stage.write(_shared)


def read_stage(path: Path) -> tuple[str, float]:
    """(name, seconds in it so far) of the stage that a process told in `path`; ("", 0.0) where it is in none."""
    data = path.read_bytes()
    (start,) = _TIME.unpack_from(data)
    if not start:
        return "", 0.0
    return data[_TIME.size : SIZE].rstrip(b"\0").decode("utf-8", "replace"), time.monotonic() - start
