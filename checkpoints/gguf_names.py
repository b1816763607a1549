"""Names of GGUF files: which of them are one model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from ..system.reading import one_line

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL | re.IGNORECASE)
"""The name of one part of a split model."""

_COMPANIONS = ("mmproj", "imatrix")
_LISTED = 6


def models_of(names: Iterable[str]) -> list[list[str]]:
    """Files by name, those of each model together and in order.

    Encoders of images and importance matrices, which lie beside models, are left aside.
    """
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        if PurePosixPath(name).name.lower().startswith(_COMPANIONS):
            continue
        match = PART.fullmatch(name)
        models.setdefault(name if match is None else f"{match['stem']}-of-{match['count']}", []).append(name)
    return list(models.values())


def listed(models: Sequence[Sequence[str]]) -> str:
    """Some of the models, by the names of their first files."""
    more = f" and {len(models) - _LISTED} more" if len(models) > _LISTED else ""
    return ", ".join(one_line(files[0], 80) for files in models[:_LISTED]) + more
