"""A file's tensors under the names of a model (`names`): each is one piece of a tensor of the file, or several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import UserError
from ..system.reading import one_line
from .checkpoint import TensorInfo, TensorStore
from .names import Piece

_WAY_OUT = "is config.json the one of these weights?"


class NamedStore:
    """The tensors of `base` under new names.

    pieces: name -> what it consists of, one below the other. Raises UserError if pieces do not fit their tensors or each other.
    """

    def __init__(self, base: TensorStore, pieces: Mapping[str, tuple[Piece, ...]]) -> None:
        self._base, self._pieces = base, pieces
        self.infos = {name: self._info(name, parts) for name, parts in pieces.items()}

    @property
    def files(self) -> tuple[Path, ...]:
        return self._base.files

    def _info(self, name: str, parts: tuple[Piece, ...]) -> TensorInfo:
        shapes: list[tuple[int, ...]] = []
        infos = [self._base.infos[part.source] for part in parts]
        for part, info in zip(parts, infos, strict=True):
            try:
                shapes.append(part.shape(info.shape))
            except ValueError as error:
                raise UserError(
                    f"{one_line(part.source)} has shape {list(info.shape)}, of which {name} cannot be a part ({error}); {_WAY_OUT}"
                ) from None
        if len(shapes) == 1:
            changed = parts[0].add != 0.0
            return TensorInfo(name, torch.float32 if changed else infos[0].dtype, shapes[0])
        if len({s[1:] for s in shapes}) > 1 or len({i.dtype for i in infos}) > 1 or not shapes[0]:
            names = ", ".join(one_line(p.source) for p in parts)
            raise UserError(f"{names} differ in width or dtype, so they cannot be joined as {name}; {_WAY_OUT}")
        return TensorInfo(name, infos[0].dtype, (sum(s[0] for s in shapes), *shapes[0][1:]))

    def tensor(self, name: str) -> torch.Tensor:
        parts = [self._piece(part) for part in self._pieces[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _piece(self, part: Piece) -> torch.Tensor:
        whole = self._base.tensor(part.source)
        if part.transposed and whole.dim() == 2:
            whole = whole.t()
        if part.order:
            total = part.shape(tuple(self._base.infos[part.source].shape))[0]
            whole = whole[torch.as_tensor(part.file_rows(0, total, total))]
        elif part.start or part.rows is not None:
            whole = whole[part.start : None if part.rows is None else part.start + part.rows]
        return _laid_out(whole, part).contiguous()

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        taken, at = [], 0
        for part in self._pieces[name]:
            total = part.shape(tuple(self._base.infos[part.source].shape))[0]
            first, last = max(start - at, 0), min(stop - at, total)
            at += total
            if first < last:
                taken.append(self._rows(part, first, last, total))
        if not taken:
            return torch.empty((0, *self.infos[name].shape[1:]))
        return taken[0] if len(taken) == 1 else torch.cat(taken)

    def _rows(self, part: Piece, start: int, stop: int, total: int) -> torch.Tensor:
        where = part.file_rows(start, stop, total)
        if part.transposed and len(self._base.infos[part.source].shape) == 2:
            columns = self._base.tensor(part.source).t()
            return _laid_out(columns[where if isinstance(where, slice) else torch.as_tensor(where)].float(), part)
        if isinstance(where, slice):
            return _laid_out(self._base.rows(part.source, where.start, where.stop), part)
        low, high = int(where.min()), int(where.max()) + 1
        return _laid_out(self._base.rows(part.source, low, high)[torch.as_tensor(where - low)], part)

    def sample(self, name: str) -> bytes:
        parts = self._pieces[name]
        if len(parts) == 1 and parts[0] == Piece(parts[0].source):
            return self._base.sample(parts[0].source)
        return b"".join(repr(part).encode() + self._base.sample(part.source) for part in parts)


def _laid_out(values: torch.Tensor, part: Piece) -> torch.Tensor:
    """Rows of the file as the model has them: a convolution as a matrix, and what is added."""
    if part.taps and values.dim() == 3:
        values = values.permute(0, 2, 1).flatten(1)
    return values.float() + part.add if part.add else values
