"""A user's own module as a checkpoint: its weights by name, in the memory of this process."""

from __future__ import annotations

from pathlib import Path

import torch

from ...checkpoints.checkpoint import WEIGHT_DTYPES, Checkpoint, TensorInfo
from ...errors import UserError
from .module import allow, tensors

_SAMPLE = 1024


def open_module(model: str) -> Checkpoint:
    """The module that `package.module:factory` makes. The user gave that name, so its code may run. Raises UserError."""
    allow(model)
    config = {"model_type": "module", "factory": model}
    return Checkpoint(model, config, {}, ModuleStore(model), lambda: None)


class ModuleStore:
    """The parameters of a factory's module. Raises UserError if there are none, or one is not of a plain floating dtype."""

    files: tuple[Path, ...] = ()

    def __init__(self, factory: str) -> None:
        self._tensors = tensors(factory)
        self.infos = {n: TensorInfo(n, t.dtype, tuple(t.shape)) for n, t in self._tensors.items()}
        if not self.infos:
            raise UserError(f"-m {factory}: the module has no parameters; there is nothing to compile")
        for name, info in self.infos.items():
            if info.dtype not in WEIGHT_DTYPES:
                raise UserError(f"-m {factory}: {name} is {info.dtype}; a float parameter is needed")

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._tensors[name][start:stop].float()

    def sample(self, name: str) -> bytes:
        data = self._tensors[name].contiguous().reshape(-1).view(torch.uint8)
        middle = max(0, data.numel() - _SAMPLE) // 2
        return data[middle : middle + _SAMPLE].numpy().tobytes()
