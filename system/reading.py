"""Small files that strangers wrote: read with a bound on their size, checked, refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UserError

MEBIBYTE = 1 << 20


def one_line(text: object, limit: int = 240) -> str:
    """`str(text)` for an error message: on one line, unprintable characters replaced, cut at `limit` characters."""
    words = " ".join(str(text).split())
    shown = "".join(c if c.isprintable() else "?" for c in words)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def read_text(path: Path, limit: int) -> str:
    """The UTF-8 text of `path`, at most `limit` bytes. Raises UserError if it is absent, larger, or not UTF-8."""
    name = one_line(path)
    try:
        size = path.stat().st_size
        if size > limit:
            raise UserError(f"{name}: {size} bytes, more than the {limit} such a file may have; is it the right file?")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{name}: not UTF-8 text; download the file again") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror or one_line(error)})") from None


def read_json_object(path: Path, limit: int = 16 * MEBIBYTE) -> dict[str, Any]:
    """The JSON object in `path`, at most `limit` bytes. Raises UserError for anything else."""
    text = read_text(path, limit)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{one_line(path)}: not valid JSON ({one_line(error, 80)}); download the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{one_line(path)}: holds a JSON {type(value).__name__}, an object is needed")
    return value
