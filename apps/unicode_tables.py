"""Unicode's tables for clients, from Python's own database: general categories, and, as initializers of C++, what NFC needs."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from functools import cache

VERSION = unicodedata.unidata_version
_LAST = 0x110000
_SURROGATES = range(0xD800, 0xE000)
_CATEGORIES = {"Letters": "L", "Marks": "M", "Numbers": "N", "Digits": "Nd", "Connectors": "Pc", "Punctuation": "P"}


@cache
def categories() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(name, ranges `{first, last}`) of each category that tokenizers ask for."""
    return tuple((name, tuple(f"{{{a:#x}, {b:#x}}}" for a, b in ranges)) for name, ranges in spans())


@cache
def spans() -> tuple[tuple[str, tuple[tuple[int, int], ...]], ...]:
    """(name, (first, last) of each range) of those categories."""
    return tuple((name, tuple(_ranges(prefix))) for name, prefix in _CATEGORIES.items())


@cache
def combining() -> tuple[str, ...]:
    """`{first, last, class}` of all characters with a canonical combining class."""
    return tuple(f"{{{a:#x}, {b:#x}, {kind}}}" for a, b, kind in _runs(lambda c: unicodedata.combining(chr(c))))


@cache
def decompositions() -> tuple[str, ...]:
    """`{character, first, second, composes}` of each canonical decomposition; second is 0 where there is one character alone."""
    rows = []
    for code in range(_LAST):
        parts = unicodedata.decomposition(chr(code)).split()
        if not parts or parts[0].startswith("<"):
            continue
        composes = len(parts) == 2 and unicodedata.normalize("NFC", chr(code)) == chr(code)
        first, second = (*parts, "0")[:2]
        rows.append(f"{{{code:#x}, 0x{first.lower()}, 0x{second.lower()}, {str(composes).lower()}}}")
    return tuple(rows)


def _ranges(prefix: str) -> Iterator[tuple[int, int]]:
    for first, last, _ in _runs(lambda c: int(unicodedata.category(chr(c)).startswith(prefix))):
        yield first, last


def _runs(value: Callable[[int], int]) -> Iterator[tuple[int, int, int]]:
    """(first, last, value) of the runs of characters with one value that is not 0."""
    first, before = 0, 0
    for code in range(_LAST + 1):
        now = value(code) if code < _LAST and code not in _SURROGATES else 0
        if now != before:
            if before:
                yield first, code - 1, before
            first, before = code, now
