"""SHA-256 of files, several at a time: regular files alone, and where a folder is given, those inside it alone.

A snapshot in the hub's cache counts as whole: its files are links to `blobs` of the same repository.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..errors import UserError
from .reading import one_line, open_regular
from .refusals import is_environment

_THREADS = 4
_CHUNK = 4 << 20
"""Bytes read at a time. Between two a thread waits for Python, which may be busy with imports."""

_REPOSITORY = re.compile(r"(models|datasets|spaces)--[^/]+")
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def of_file(path: Path) -> str:
    """The SHA-256 (hex) of a regular file. Raises UserError for anything else."""
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
    view = memoryview(buffer)
    with open_regular(path) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def of_files(paths: Sequence[Path]) -> list[str]:
    """`of_file` of each, in order."""
    if len(paths) < 2:
        return [of_file(path) for path in paths]
    with ThreadPoolExecutor(_threads(len(paths))) as pool:
        return list(pool.map(of_file, paths))


def first_fault(root: Path, files: Mapping[str, str]) -> tuple[str, str] | None:
    """(name, what is wrong) of the first file, by name, that is not inside `root` with its hash; None if all are.

    files: path below `root` -> SHA-256. A link may lead to another file inside, and in the hub's cache to a blob. Raises UserError
    for a file that the system does not let read, which says nothing of the file.
    """
    names = sorted(files)
    if not names:
        return None
    inside = _Inside(root)
    pool = ThreadPoolExecutor(_threads(len(names)))
    try:
        # the large ones first, so that no thread begins one when the others are done
        order = sorted(names, key=lambda name: -_size(root / name))
        found = {name: pool.submit(_fault, inside, root / name, files[name]) for name in order}
        faults = ((name, found[name].result()) for name in names)
        return next(((name, fault) for name, fault in faults if fault is not None), None)
    finally:
        pool.shutdown(cancel_futures=True)


def first_odd_entry(folder: Path, root: Path) -> tuple[Path, str] | None:
    """(path, what is wrong) of an entry below `folder` that is no regular file or folder inside `root`; None without one.

    A link may lead where one of `first_fault` may.
    """
    inside = _Inside(root)
    for path in _entries(folder):
        fault = _odd(path, inside)
        if fault is not None:
            return path, fault
    return None


class _Inside:
    """Where links of a bundle may lead: into the bundle, and from a snapshot of the hub's cache to blobs of that repository.

    A snapshot is `models--OWNER--NAME/snapshots/REVISION` or a folder in one; a blob is a file named by its hash right in the
    repository's `blobs`, which is no link.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._blobs: Path | None = None
        for folder in (self._root, *self._root.parents):
            repository = folder.parent.parent
            if folder.parent.name == "snapshots" and _REPOSITORY.fullmatch(repository.name):
                blobs = repository / "blobs"
                self._blobs = None if blobs.is_symlink() else blobs
                return

    def has(self, path: Path) -> bool:
        """Whether a path, all its links followed, lies there."""
        place = path.resolve()
        return place.is_relative_to(self._root) or (
            self._blobs is not None and place.parent == self._blobs and _BLOB.fullmatch(place.name) is not None
        )


def _entries(folder: Path) -> Iterator[Path]:
    """The folder and all below it; links are not followed."""
    yield folder
    for above, folders, files in os.walk(folder):
        yield from (Path(above, name) for name in sorted(folders + files))


def _odd(path: Path, inside: _Inside) -> str | None:
    try:
        if path.is_symlink() and not inside.has(path):
            return "a link leads out of the bundle"
        mode = os.stat(path).st_mode
    except (OSError, RuntimeError) as error:
        return f"cannot be read ({one_line(error, 80)})"
    return None if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else "no regular file"


def _fault(inside: _Inside, file: Path, digest: str) -> str | None:
    try:
        if not inside.has(file):
            return "a link leads out of the bundle"
        if not file.exists() or file.is_dir():
            return "missing from the bundle"
        if not file.is_file():
            return "no regular file"
        if of_file(file) != digest:
            return "the file is not what was exported (its SHA-256 differs)"
    except Exception as error:  # OSError; RuntimeError for links in a circle; UserError if it was changed meanwhile
        if is_environment(error) or is_environment(error.__context__):
            why = error if isinstance(error, UserError) else f"{file}: cannot be read ({one_line(error, 80)})"
            raise UserError(f"{one_line(why)}; mend that and run the command again") from None
        return f"cannot be read ({one_line(str(error).removeprefix(f'{file}: '), 80)})"
    return None


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return 0


def _threads(count: int) -> int:
    return max(1, min(_THREADS, count, os.cpu_count() or 1))
