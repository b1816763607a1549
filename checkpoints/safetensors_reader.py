"""Tensors of safetensors files, memory-mapped. Their headers are checked first."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open

from ..errors import UserError
from ..system.dtypes import SAFETENSORS
from ..system.reading import one_line, require_regular
from .checkpoint import TensorInfo

_SAMPLE = 1024

INDEX = "model.safetensors.index.json"
"""The file that says which weight file holds which tensor, where there are several."""


class _Header(Protocol):
    def get_dtype(self) -> object: ...

    def get_shape(self) -> list[int]: ...


class _MappedFile(Protocol):
    """What is used of the library's `safe_open`, which has no types of its own."""

    def offset_keys(self) -> list[str]: ...

    def get_slice(self, name: str) -> _Header: ...

    def get_tensor(self, name: str) -> torch.Tensor: ...


class SafetensorsStore:
    """The tensors of one or more safetensors files, each mapped once. The library has validated the headers.

    Args:
        directory: where the files are.
        files: file name -> names of the tensors that must be in it. With an empty set the file may hold any.

    Raises UserError for a truncated, overlapping or otherwise corrupt file, an unknown dtype, a tensor two files have,
    or one the index promises and the file lacks.
    """

    def __init__(self, directory: Path, files: dict[str, set[str]]) -> None:
        self.files = tuple(directory / name for name in sorted(files))
        self.infos: dict[str, TensorInfo] = {}
        self._handles: dict[str, _MappedFile] = {}
        owner: dict[str, str] = {}
        for path in self.files:
            handle = _open_safetensors(path)
            for name in handle.offset_keys():
                if name in owner:
                    raise UserError(f"{path.parent}: {one_line(name)} is in both {owner[name]} and {path.name}")
                owner[name] = path.name
                self.infos[name] = _header_info(path, handle, name)
                self._handles[name] = handle
            lacking = sorted(files[str(path.relative_to(directory))] - set(handle.offset_keys()))
            if lacking:
                raise UserError(f"{path}: lacks {one_line(lacking[0])}, which {INDEX} says it has; download it again")
        if not self.infos:
            raise UserError(f"{directory}: the safetensors files hold no tensors")

    def tensor(self, name: str) -> torch.Tensor:
        # get_tensor gives a slice of the mapped storage, no anonymous memory; tests/checkpoints/test_checkpoint.py checks it.
        return self._handles[name].get_tensor(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.tensor(name)[start:stop].float()

    def sample(self, name: str) -> bytes:
        data = self.tensor(name).reshape(-1).view(torch.uint8)
        middle = max(0, data.numel() - _SAMPLE) // 2
        return data[middle : middle + _SAMPLE].numpy().tobytes()


def _open_safetensors(path: Path) -> _MappedFile:
    require_regular(path)
    try:
        return cast(_MappedFile, safe_open(path, framework="pt"))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        reason = one_line(error, 120)
        raise UserError(f"{path}: not a whole safetensors file ({reason}); download it again") from None


def _header_info(path: Path, handle: _MappedFile, name: str) -> TensorInfo:
    header = handle.get_slice(name)
    kind = str(header.get_dtype())
    dtype = SAFETENSORS.get(kind)
    if dtype is None:
        raise UserError(f"{path}: {one_line(name)} has dtype {kind}, which is not supported; save it as float32")
    return TensorInfo(name, dtype, tuple(int(n) for n in header.get_shape()))
