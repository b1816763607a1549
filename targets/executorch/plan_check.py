"""A `.pte` looked through before ExecuTorch's runtime gets it: only its flatbuffer's tables are read, and no torch is imported.

Refused is what would let a method run for ever or take any size: jumps, which no exporter here writes, and more planned memory than
there is.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flatbuffers import encode
from flatbuffers import number_types as numbers
from flatbuffers.table import Table

from ...errors import UserError
from ...system.memory import require_available
from ...system.reading import one_line, open_regular

_IDENTIFIER, _AT = b"ET12", 4
_MOST_TABLES = 4_000_000
"""Tables that are looked at: vectors may overlap, so a small file could have endlessly many."""

# Fields by their place in program.fbs.
_PROGRAM_PLANS = 1
_PLAN_CHAINS, _PLAN_BUFFERS = 5, 8
_CHAIN_INSTRUCTIONS = 2
_INSTRUCTION_KIND = 0
_JUMP, _KINDS = 4, (1, 2, 3, 5)


def check_program(path: Path) -> int:
    """The bytes that one method plans at most. Raises UserError unless it is a program without jumps whose memory is there."""
    try:
        with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            planned = _Looking(data).planned_bytes()
    except (ValueError, struct.error, IndexError, TypeError, OverflowError) as error:
        raise UserError(
            f"{one_line(path)} is no whole ExecuTorch program ({one_line(error, 120)}); export again"
        ) from None
    require_planned(path, planned)
    return planned


def require_planned(path: Path, planned: int) -> None:
    """Raise UserError where a method's planned memory is not there."""
    require_available(planned, f"{one_line(path)} plans memory", "export with a shorter --max-context, or give more")


class _Looking:
    """One look through a program. Raises ValueError or what the readers of numbers raise."""

    def __init__(self, data: Any) -> None:
        if data[_AT : _AT + 4] != _IDENTIFIER:
            raise ValueError("no flatbuffer of a program")
        self._seen = 0
        self._root = Table(data, encode.Get(numbers.UOffsetTFlags.packer_type, data, 0))

    def planned_bytes(self) -> int:
        """The most that one method plans for its values."""
        planned = 0
        for plan in self._tables(self._root, _PROGRAM_PLANS):
            sizes = list(self._longs(plan, _PLAN_BUFFERS))
            if min(sizes, default=0) < 0:
                raise ValueError("a buffer of a negative size")
            planned = max(planned, sum(sizes))
            for chain in self._tables(plan, _PLAN_CHAINS):
                for instruction in self._tables(chain, _CHAIN_INSTRUCTIONS):
                    kind = instruction.GetSlot(_slot(_INSTRUCTION_KIND), 0, numbers.Uint8Flags)
                    if kind == _JUMP:
                        raise ValueError("it jumps, as no export does")
                    if kind not in _KINDS:
                        raise ValueError(f"an instruction of the kind {kind}")
        return planned

    def _tables(self, table: Any, field: int) -> Iterator[Any]:
        """The tables of a vector."""
        offset = table.Offset(_slot(field))
        if not offset:
            return
        start = table.Vector(offset)
        for i in range(table.VectorLen(offset)):
            self._seen += 1
            if self._seen > _MOST_TABLES:
                raise ValueError(f"more than {_MOST_TABLES} parts")
            yield Table(table.Bytes, table.Indirect(start + 4 * i))

    def _longs(self, table: Any, field: int) -> Iterator[int]:
        offset = table.Offset(_slot(field))
        if not offset:
            return
        start = table.Vector(offset)
        for i in range(table.VectorLen(offset)):
            yield table.Get(numbers.Int64Flags, start + 8 * i)


def _slot(field: int) -> int:
    """Where a vtable says how far a field is from its table."""
    return 4 + 2 * field
