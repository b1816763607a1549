"""Which GGUF files make a model: one, all parts of a split one, or what a folder holds."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..system.reading import one_line
from .gguf_file import GgufFile, GgufTensor, read_gguf
from .gguf_names import PART, listed, models_of


def read_parts(path: Path) -> tuple[GgufFile, tuple[Path, ...]]:
    """The file at `path` with the tensors of all parts, if it is one of several, and the files. The first part has the metadata.

    Raises UserError if a part is missing, of another model, or corrupt.
    """
    first = read_gguf(path)
    count = _count(first)
    if count <= 1:
        return first, (path,)
    match = PART.fullmatch(path.name)
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
    """The GGUF model of a folder, of a split one the first part; None if there is none. Raises UserError if there are several."""
    models = models_of([p.name for p in directory.iterdir() if p.suffix.lower() == ".gguf"])
    if len(models) > 1:
        raise UserError(f"{one_line(directory)}: several GGUF models: {listed(models)}; give the path of one")
    return directory / models[0][0] if models else None
