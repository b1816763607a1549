"""What the system refuses for reasons of its own, such as a full disk: it says nothing of an artefact."""

from __future__ import annotations

import errno

_NAMES = (
    *("EACCES", "EPERM", "EIO", "EMFILE", "ENFILE", "ENOMEM", "ENOSPC", "EDQUOT", "EROFS", "ESTALE", "EPIPE", "EAGAIN"),
    *("ETIMEDOUT", "EHOSTDOWN", "ENOTCONN", "EREMOTEIO"),
)
_NUMBERS = {getattr(errno, name) for name in _NAMES if hasattr(errno, name)}


def is_environment(error: BaseException | None) -> bool:
    """Whether the system refused something that would succeed on another machine, or on this one another day."""
    return isinstance(error, OSError) and error.errno in _NUMBERS


def in_words(error: OSError) -> str:
    """What was refused, and of which file where that is known."""
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror or error}"
