"""A store whose quantized weights are seen as float32 values; each is computed from its parts when it is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from ...errors import UserError
from ...system.reading import one_line
from ..checkpoint import TensorInfo, TensorStore
from .parts import Weight

_CHUNK = 2 << 20  # values computed at a time, 8 MiB of float32


class DequantizedStore:
    """The tensors of `base`, with `weights` in place of their parts.

    unused: tensors of `base` that are left out. Raises UserError if a weight is there in both forms.
    """

    def __init__(self, base: TensorStore, weights: Mapping[str, Weight], unused: Iterable[str] = ()) -> None:
        self._base, self._weights = base, weights
        owner = {part: name for name, weight in weights.items() for part in weight.parts}
        hidden = set(unused)
        self.infos: dict[str, TensorInfo] = {}
        for name, info in base.infos.items():  # the file's order, so that reading is sequential
            whole = owner.get(name, name)
            if whole in weights:
                if name == whole and name not in weights[name].parts:
                    raise UserError(f"the checkpoint holds {one_line(name)} twice: quantized, and as it is")
                self.infos[whole] = TensorInfo(whole, torch.float32, weights[whole].shape)
            elif name not in hidden:
                self.infos[name] = info

    @property
    def files(self) -> tuple[Path, ...]:
        return self._base.files

    def tensor(self, name: str) -> torch.Tensor:
        weight = self._weights.get(name)
        return self._base.tensor(name) if weight is None else whole(weight)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        weight = self._weights.get(name)
        if weight is None:
            return self._base.rows(name, start, stop)
        return weight.rows(start, stop) if start < stop else torch.empty((0, weight.shape[1]))

    def sample(self, name: str) -> bytes:
        weight = self._weights.get(name)
        if weight is None:
            return self._base.sample(name)
        return weight.kind.encode() + b"".join(self._base.sample(part) for part in weight.parts)


def whole(weight: Weight) -> torch.Tensor:
    """All of a weight, computed a chunk of rows at a time."""
    out = torch.empty(weight.shape)
    step = max(1, _CHUNK // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        stop = min(start + step, weight.shape[0])
        out[start:stop] = weight.rows(start, stop)
    return out
