"""Files that strangers wrote: regular ones alone, of a bounded size, refused in one line; and their text made printable."""

from __future__ import annotations

import difflib
import json
import os
import re
import stat
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError

MEBIBYTE = 1 << 20

DEEPEST = 64
"""Levels of lists and objects in a JSON file: what is nested deeper can be read, and then neither printed nor written."""

_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))


def one_line(text: object, limit: int = 240) -> str:
    """`str(text)` for an error message: on one line, unprintable characters replaced, cut at `limit` characters."""
    whole = str(text)
    words = " ".join(whole[: 8 * limit].split())  # the rest of a long one cannot be seen
    shown = "".join(c if c.isprintable() else "?" for c in words)
    cut = len(shown) > limit or len(whole) > 8 * limit
    return shown[: limit - 1] + "…" if cut else shown


def shown(value: object, limit: int = 120) -> str:
    """`repr(value)` for an error message. A list that is nested too deep, or a number of thousands of digits, has none."""
    try:
        return one_line(repr(value), limit)
    except (RecursionError, ValueError):
        return f"a {type(value).__name__} too large to print"


# Control characters but line ends and tabs, surrogates, and what reverses the order of a line.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text without characters that control a terminal or cannot be encoded; line ends and tabs stay."""
    return _UNPRINTABLE.sub("?", text)


def require_regular(path: Path, limit: int | None = None) -> int:
    """The size of a regular file. Raises UserError for a folder, a pipe, a device, more than `limit` bytes, or none at all."""
    try:
        facts = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _unreadable(path, error) from None
    return _checked(path, facts, limit)


def open_regular(path: Path, limit: int | None = None) -> BufferedReader:
    """A regular file opened for reading. Raises UserError as `require_regular` does."""
    try:
        # Without O_NONBLOCK, opening a pipe that nobody writes to waits for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    try:
        _checked(path, os.fstat(descriptor), limit)
    except BaseException:
        os.close(descriptor)
        raise
    return open(descriptor, "rb")


def read_bytes(path: Path, limit: int) -> bytes:
    """The contents of a regular file of at most `limit` bytes. Raises UserError as `require_regular` does."""
    with open_regular(path, limit) as file:
        try:
            data = file.read(limit + 1)  # not its size: a file of /proc says 0, and one may grow
        except OSError as error:
            raise _unreadable(path, error) from None
    if len(data) > limit:
        raise _too_large(path, len(data), limit)
    return data


def read_text(path: Path, limit: int) -> str:
    """The UTF-8 text of `path` without a byte order mark, at most `limit` bytes.

    Raises UserError if it is absent, larger, no regular file, or not UTF-8.
    """
    try:
        text = read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{one_line(path)}: not UTF-8 text; download the file again") from None
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def read_stream(stream: BinaryIO, name: str, limit: int) -> str:
    """The UTF-8 text of a stream such as standard input, at most `limit` bytes. Raises UserError for more, or another encoding."""
    data = stream.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{name}: more than the {limit} bytes that are read from it; give less")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{name} is not UTF-8 text") from None


def read_json_object(path: Path, limit: int = 16 * MEBIBYTE) -> dict[str, Any]:
    """The JSON object in `path`, at most `limit` bytes and `DEEPEST` levels. Raises UserError for anything else."""
    value = _read_json(path, limit)
    if not isinstance(value, dict):
        raise UserError(f"{one_line(path)}: holds a JSON {type(value).__name__}, an object is needed")
    return value


def read_json_list(path: Path, limit: int = MEBIBYTE) -> list[Any]:
    """The JSON list in `path`; as `read_json_object`."""
    value = _read_json(path, limit)
    if not isinstance(value, list):
        raise UserError(f"{one_line(path)}: holds a JSON {type(value).__name__}, a list is needed")
    return value


def _read_json(path: Path, limit: int) -> object:
    text = read_text(path, limit)
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{one_line(path)}: not valid JSON ({one_line(error, 80)}); download the file again") from None
    if nested_deeper(value, DEEPEST):
        raise UserError(f"{one_line(path)}: nested deeper than {DEEPEST} levels, as no such file is; download it again")
    return value


def nested_deeper(value: object, levels: int) -> bool:
    """Whether lists and dicts are nested in more than `levels` levels."""
    level = [value]
    for _ in range(levels):
        inner = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list))
        level = [v for values in inner for v in values if isinstance(v, dict | list)]
        if not level:
            return False
    return True


def _checked(path: Path, facts: os.stat_result, limit: int | None) -> int:
    if not stat.S_ISREG(facts.st_mode):
        kind = next((name for test, name in _KINDS if test(facts.st_mode)), "a device")
        raise UserError(f"{one_line(path)}: {kind}, a regular file is needed")
    if limit is not None and facts.st_size > limit:
        raise _too_large(path, facts.st_size, limit)
    return facts.st_size


def _too_large(path: Path, size: int, limit: int) -> UserError:
    return UserError(
        f"{one_line(path)}: {size} bytes, more than the {limit} such a file may have; is it the right file?"
    )


def _unreadable(path: Path, error: OSError | ValueError) -> UserError:
    reason = (error.strerror if isinstance(error, OSError) else None) or one_line(error)
    return UserError(f"{one_line(path)}: cannot be read ({reason})")


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean …?)` where a known name is near to an unknown one, else nothing."""
    found = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {found[0]}?)" if found else ""
