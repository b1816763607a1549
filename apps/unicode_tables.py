"""Unicode's tables for clients: as ranges, and as initializers of C++.

General categories and what NFC needs are Python's own. What is punctuation, and what BERT's steps do to a character, is the
`tokenizers` library's, whose tables are of another age.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from functools import cache

from tokenizers import normalizers, pre_tokenizers

VERSION = unicodedata.unidata_version
_LAST = 0x110000
_SURROGATES = range(0xD800, 0xE000)
_CODES = [code for code in range(1, _LAST) if code not in _SURROGATES]
_CATEGORIES = {"Letters": "L", "Marks": "M", "Numbers": "N", "Digits": "Nd", "Connectors": "Pc"}


@cache
def categories() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(name, ranges `{first, last}`) of each category that tokenizers ask for."""
    return tuple((name, tuple(f"{{{a:#x}, {b:#x}}}" for a, b in ranges)) for name, ranges in spans())


@cache
def spans() -> tuple[tuple[str, tuple[tuple[int, int], ...]], ...]:
    """(name, (first, last) of each range) of those categories."""
    named = tuple((name, tuple(_ranges(prefix))) for name, prefix in _CATEGORIES.items())
    return (*named, ("Punctuation", tuple(_spans(_punctuation()))))


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


@cache
def bert() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(name, ranges `{first, last}`) of what cleaning drops, and of what is dropped from a decomposed text as an accent."""
    found = {"Dropped": _vanishing(_bert(clean_text=True)), "Accents": _vanishing(_bert(strip_accents=True))}
    return tuple((name, tuple(f"{{{a:#x}, {b:#x}}}" for a, b in _spans(codes))) for name, codes in found.items())


@cache
def lower() -> tuple[str, ...]:
    """`{character, first, second}` of what is written otherwise in lower case; second is 0 where that is one character."""
    small = _mapped(_bert(lowercase=True))
    rows = ((code, [*map(ord, new), 0]) for code, new in zip(_CODES, small, strict=True) if new != chr(code))
    return tuple(f"{{{code:#x}, {new[0]:#x}, {new[1]:#x}}}" for code, new in rows)


def _bert(**on: bool) -> normalizers.Normalizer:
    """BERT's normalizer with one of its steps."""
    steps = {"clean_text": False, "handle_chinese_chars": False, "strip_accents": False, "lowercase": False}
    return normalizers.BertNormalizer(**(steps | on))


def _mapped(step: normalizers.Normalizer) -> list[str]:
    """What a step makes of each character, all in one call: a sign stands between them."""
    sign = "|"
    whole = step.normalize_str(sign.join(chr(code) for code in _CODES if chr(code) != sign))
    out: list[str] = whole.split(sign)
    out.insert(_CODES.index(ord(sign)), sign)
    return out


def _vanishing(step: normalizers.Normalizer) -> set[int]:
    return {code for code, new in zip(_CODES, _mapped(step), strict=True) if new == ""}


def _punctuation() -> set[int]:
    pieces = pre_tokenizers.Punctuation("removed").pre_tokenize_str("".join(map(chr, _CODES)))
    kept = {_CODES[i] for _, (first, last) in pieces for i in range(first, last)}
    return set(_CODES) - kept


def _spans(codes: set[int]) -> Iterator[tuple[int, int]]:
    for first, last, _ in _runs(lambda c: int(c in codes)):
        yield first, last


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
