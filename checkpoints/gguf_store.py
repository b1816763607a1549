"""The tensors of a GGUF file under the names of Hugging Face's layout, dequantized when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from .checkpoint import TensorInfo
from .gguf_file import GgufTensor
from .gguf_layout import Stored

_SAMPLE = 1024
_CHUNK = 4 << 20  # elements dequantized at a time, 16 MiB of float32


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the file, and how to get its values from the file's."""

    tensor: GgufTensor
    stored: Stored

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape(self.tensor.shape)


class GgufStore:
    """The tensors of GGUF files by their names in the model. Each is dequantized to float32 when it is read."""

    def __init__(self, files: tuple[Path, ...], places: Mapping[str, Place]) -> None:
        self.files = files
        self.infos = {name: TensorInfo(name, torch.float32, place.shape) for name, place in places.items()}
        self._places = places

    def tensor(self, name: str) -> torch.Tensor:
        shape = self.infos[name].shape
        if len(shape) == 1:
            return self.rows(name, 0, shape[0])
        out = torch.empty(shape)
        step = max(1, _CHUNK // (out.numel() // shape[0]))
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            out[start:stop] = self.rows(name, start, stop)
        return out

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        place, shape = self._places[name], self.infos[name].shape
        order = place.stored.rows
        wanted = slice(start, stop) if order is None else order(np.arange(start, stop))
        if len(shape) == 1:  # a vector is read whole, whatever its blocks
            values = _values(place, place.tensor.data).reshape(-1)[wanted]
        else:
            data = place.tensor.data.reshape(shape[0], -1)[wanted]
            blocks = data.reshape(-1, place.tensor.data.shape[1])
            values = _values(place, blocks).reshape(stop - start, *shape[1:])
        if place.stored.columns is not None:
            values = values[..., place.stored.columns(np.arange(shape[-1]))]
        return torch.from_numpy(np.ascontiguousarray(values))

    def sample(self, name: str) -> bytes:
        data = self._places[name].tensor.data.reshape(-1)
        middle = max(0, data.size - _SAMPLE) // 2
        return data[middle : middle + _SAMPLE].tobytes()


def _values(place: Place, blocks: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """float32 values [rows, width] of block bytes [rows, bytes a row]."""
    kind = place.tensor.kind
    if blocks.shape[0] == 0:
        return np.empty((0, place.tensor.shape[-1]), np.float32)
    values: npt.NDArray[np.float32]
    if kind == GGMLQuantizationType.F32:
        values = np.ascontiguousarray(blocks).view(np.float32)
    else:
        values = np.ascontiguousarray(dequantize(blocks, kind), dtype=np.float32)
    if place.stored.add:
        values = values + np.float32(place.stored.add)
    if place.stored.log:
        with np.errstate(
            invalid="ignore", divide="ignore"
        ):  # what is not finite is refused by whoever reads the weights
            values = np.log(-values)
    return values


def zeros(name: str, count: int) -> GgufTensor:
    """A vector of zeros that a file leaves out."""
    return GgufTensor(name, GGMLQuantizationType.F32, (count,), np.zeros((1, 4 * count), np.uint8))
