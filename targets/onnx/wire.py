"""Protobuf's wire format, as far as a file is looked through before a library gets it: fields by number, no schema.

What is not well-formed raises ValueError. Nothing is copied, and nesting is followed only by the caller.
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, BYTES = 0, 2
_FIXED = {1: 8, 5: 4}
_LONGEST = 10  # bytes of a varint


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of each field of a message: an int of a varint, the bytes of anything else."""
    at, end = 0, len(data)
    while at < end:
        tag = data[at]
        if tag < 0x80:
            at += 1
        else:
            tag, at = _varint(data, at)
        kind = tag & 7
        if kind == BYTES:
            if at < end and data[at] < 0x80:
                size, at = data[at], at + 1
            else:
                size, at = _varint(data, at)
            if size > end - at:
                raise ValueError("a field is longer than its message")
            yield tag >> 3, data[at : at + size]
            at += size
        elif kind == VARINT:
            value, at = _varint(data, at)
            yield tag >> 3, value
        elif kind in _FIXED:
            size = _FIXED[kind]
            if size > end - at:
                raise ValueError("a field is longer than its message")
            yield tag >> 3, data[at : at + size]
            at += size
        else:
            raise ValueError(f"a field of the unknown kind {kind}")


def varints(value: int | memoryview) -> list[int]:
    """The numbers of a repeated field: one, or packed."""
    if isinstance(value, int):
        return [value]
    found, at = [], 0
    while at < len(value):
        number, at = _varint(value, at)
        found.append(number)
    return found


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """(value, where it ends) of the varint at `at`."""
    value = shift = 0
    for i in range(at, min(at + _LONGEST, len(data))):
        byte = data[i]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, i + 1
        shift += 7
    raise ValueError("a number without an end")
