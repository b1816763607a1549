"""Mutants of a file: of its bytes, of the values in its JSON, of the numbers in its header. A seed gives the same mutant."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable
from typing import Any

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 10**6, 10**9, 2**31, 2**32 - 1, 2**63, 2**64, 10**12, 10**40, -(10**12)),
    *(0.0, -0.5, 0.5, 1e-30, 1e30, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", "a", "../../etc/passwd", "/dev/zero", "a" * 5000, "\x1b[31m", "\ud800", "\x00", "{{", "int8", "float32"),
    *([], [[]], {}, {"a": {}}, [None], [0] * 300, [[1, 2], [3]], {"type": "x"}),
)
_NUMBERS = (
    *(0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF),
    *(2**40, 2**62, 2**63, 2**64 - 1),
)
_WORDS = (
    b"\x00",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"9" * 400,
    b"[" * 2000,
    b"{",
    b"}",
    b'"',
    b"\\",
    b"\n",
    b"\t",
    b"=",
    b"-",
    b"1e999",
    b"NaN",
)

Mutator = Callable[[bytes, random.Random], bytes]


def of_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four changes anywhere: bytes flipped, removed, repeated, replaced, inserted, cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(changed) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 64, 500))
        match rng.randrange(7):
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                del changed[at : at + length]
            case 2:
                changed[at:at] = changed[at : at + length] * rng.choice((1, 2, 50))
            case 3:
                changed[at : at + length] = rng.randbytes(length)
            case 4:
                changed[at:at] = rng.choice(_WORDS)
            case 5:
                del changed[at:]
            case _:
                changed += rng.randbytes(length)
    return bytes(changed)


def of_numbers(data: bytes, rng: random.Random) -> bytes:
    """A few little-endian numbers near the start of a binary file become extreme ones."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind, size = rng.choice((("<I", 4), ("<Q", 8), ("<H", 2)))
        near = min(len(changed), rng.choice((64, 512, 4096, 1 << 20)))
        if near <= size:
            continue
        at = rng.randrange(near - size)
        struct.pack_into(kind, changed, at, rng.choice(_NUMBERS) & ((1 << 8 * size) - 1))
    return bytes(changed)


def of_json(data: bytes, rng: random.Random) -> bytes:
    """Some values of a JSON text are replaced, removed, wrapped, moved or given another name."""
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _changed(value, rng)
    return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def _changed(value: Any, rng: random.Random) -> Any:
    if not isinstance(value, dict | list) or not value or rng.random() < 0.05:
        return rng.choice(HOSTILE)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        match rng.randrange(4):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return value[: at + 1] * rng.choice((1, 2, 9))
            case _:
                return [*value[:at], _changed(value[at], rng), *value[at + 1 :]]
    key = rng.choice(sorted(value))
    match rng.randrange(8):
        case 0:
            return {k: v for k, v in value.items() if k != key}
        case 1:
            return {(k if k != key else rng.choice(("", k + "x", "a" * 3000, "\x07"))): v for k, v in value.items()}
        case 2:
            return value | {key: value[rng.choice(sorted(value))]}
        case 3:
            return value | {key: rng.choice(([value[key]], {"a": value[key]}, [value[key]] * 3))}
        case 4:
            return value | {key: rng.choice(HOSTILE)}
        case _:
            return value | {key: _changed(value[key], rng)}


def of_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header is changed as JSON, its length mended, so that the reader comes to it; or numbers and bytes are."""
    if rng.random() < 0.25:
        return (of_bytes if rng.random() < 0.5 else of_numbers)(data, rng)
    length = struct.unpack_from("<Q", data)[0]
    header = of_json(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def of_binary(data: bytes, rng: random.Random) -> bytes:
    return (of_numbers if rng.random() < 0.7 else of_bytes)(data, rng)


_TOKEN = re.compile(rb"[A-Za-z0-9_.+-]+")


def of_text(data: bytes, rng: random.Random) -> bytes:
    """Words and numbers of a text become hostile ones; or its bytes are changed."""
    words = list(_TOKEN.finditer(data))
    if rng.random() < 0.3 or not words:
        return of_bytes(data, rng)
    word = rng.choice(words)
    replacement = rng.choice(
        (*_WORDS, b"inf", b"nan", b"-1", b"0", b"1e400", b"0x" + b"f" * 300, b"9" * 30, b"true", b"[]", b"''")
    )
    return data[: word.start()] + replacement + data[word.end() :]


def json_or_bytes(data: bytes, rng: random.Random) -> bytes:
    return (of_json if rng.random() < 0.8 else of_bytes)(data, rng)
