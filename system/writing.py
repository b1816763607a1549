"""Files that a user asked for: they appear whole or not at all, and trouble is one line."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UserError
from .reading import one_line


def write_file(path: Path, data: bytes | str, option: str = "-o") -> None:
    """Write `data` to `path`, under a temporary name that is renamed when the file is whole. Text is UTF-8.

    A device or a pipe is written to as it is. option: of the command line, for the error. Raises UserError if it cannot be
    written.
    """
    content = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    try:
        target = path.resolve()  # a link stays, what it names is replaced
        if target.exists() and not target.is_file():
            with target.open("wb", buffering=0) as file:
                _write_all(file.fileno(), content)
            return
        partial = target.with_name(f".{target.name[:200]}.partial")
        try:
            with partial.open("wb", buffering=0) as file:
                _write_all(file.fileno(), content)
            os.replace(partial, target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or one_line(error)
        raise UserError(f"{one_line(path)} cannot be written ({reason}); choose another {option}") from None


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
