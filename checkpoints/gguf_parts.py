"""Which GGUF files make a model: one, all parts of a split one, or what a folder holds."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import UserError
from ..system.reading import one_line
from .gguf_file import GgufFile, GgufTensor, read_gguf

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL | re.IGNORECASE)
_COMPANIONS = ("mmproj", "imatrix")
_LISTED = 6


def read_parts(path: Path) -> tuple[GgufFile, tuple[Path, ...]]:
    """The file at `path` with the tensors of all parts, if it is one of several, and the files. The first part has the metadata.

    Raises UserError if a part is missing, of another model, or corrupt.
    """
    first = read_gguf(path)
    count = _count(first)
    if count <= 1:
        return first, (path,)
    match = _PART.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise UserError(
            f"{one_line(path)}: one of {count} parts of a model, which are found by their names; "
            f"name them NAME-00001-of-{count:05}.gguf and so on, as they were"
        )
    paths = tuple(path.with_name(f"{match['stem']}-{i + 1:05}-of-{count:05}.gguf") for i in range(count))
    if missing := next((p for p in paths if not p.is_file()), None):
        raise UserError(f"{one_line(path)}: part {missing.name} of the model is not beside it; download it too")
    tensors: dict[str, GgufTensor] = {}
    metadata: dict[str, object] = {}
    for i, part in enumerate(paths):
        file = read_gguf(part)
        if _count(file) != count or file.metadata.get("split.no") != i:
            raise UserError(f"{one_line(part)}: by its metadata not part {i + 1} of {count}; download it again")
        if twice := file.tensors.keys() & tensors.keys():
            raise UserError(f"{one_line(part)}: tensor {one_line(min(twice), 60)} is in two parts; download them again")
        tensors |= file.tensors
        metadata = file.metadata if i == 0 else metadata
    total = metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise UserError(
            f"{one_line(path)}: {len(tensors)} tensors in {count} parts, not {one_line(total, 20)}; are they whole?"
        )
    return GgufFile(paths[0], metadata, tensors), paths


def _count(file: GgufFile) -> int:
    count = file.metadata.get("split.count", 0)
    if type(count) is not int or not 0 <= count < 100_000:
        raise UserError(f"{one_line(file.path)}: split.count is {one_line(count, 40)}; download it again")
    return count


def gguf_in(directory: Path) -> Path | None:
    """The GGUF model of a folder, of a split one the first part; None if there is none.

    Encoders of images and importance matrices, which lie beside models, are left aside. Raises UserError if there are several.
    """
    names = sorted(p.name for p in directory.iterdir() if p.suffix.lower() == ".gguf")
    models: dict[str, str] = {}
    for name in names:
        match = _PART.fullmatch(name)
        models.setdefault(name if match is None else f"{match['stem']}-of-{match['count']}", name)
    chosen = [name for name in models.values() if not name.lower().startswith(_COMPANIONS)]
    if len(chosen) > 1:
        listed = ", ".join(one_line(name, 80) for name in chosen[:_LISTED])
        more = f" and {len(chosen) - _LISTED} more" if len(chosen) > _LISTED else ""
        raise UserError(f"{one_line(directory)}: several GGUF models: {listed}{more}; give the path of one")
    return directory / chosen[0] if chosen else None
