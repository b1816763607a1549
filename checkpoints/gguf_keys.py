"""The metadata of a GGUF file under its architecture's prefix: each value is checked when it is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.quants import dequantize

from ..errors import UserError
from ..system.reading import one_line
from .gguf_file import GgufFile

WAY_OUT = "give the safetensors checkpoint instead"
_MOST = 1 << 31
_MOST_FACTORS = 4096


class Keys:
    """The metadata under `prefix`. Its methods raise UserError for a bad value, with the key and the value.

    notes: lines for the user, to which whoever reads a key may add.
    """

    def __init__(self, file: GgufFile, prefix: str) -> None:
        self.file, self.prefix = file, prefix
        self.notes: list[str] = []

    def get(self, key: str) -> Any:
        return self.file.metadata.get(f"{self.prefix}.{key}")

    def size(self, key: str, default: int | None = None, least: int = 1) -> int:
        """An integer of at least `least`, or a list that repeats one."""
        value = self.get(key)
        if isinstance(value, list) and value and all(type(v) is int for v in value) and len(set(value)) == 1:
            value = value[0]
        value = default if value is None else value
        if isinstance(value, list):
            raise self.error(key, f"not the same in all layers ({one_line(value, 40)})")
        if type(value) is not int or not least <= value < _MOST:
            raise self.error(key, value)
        return value

    def sizes(self, key: str, layers: int, default: int) -> list[int]:
        """An integer for each layer, which may be 0: the list in the file, or its one number for all."""
        value = self.get(key)
        values = value if isinstance(value, list) else [default if value is None else value] * layers
        if len(values) != layers or not all(type(v) in (int, bool) and 0 <= v < _MOST for v in values):
            raise self.error(key, value)
        return [int(v) for v in values]

    def real(self, key: str, default: float | None = None) -> float:
        """A positive finite number, as the shortest decimal of its float32 (1e-05, not 9.999999747378752e-06)."""
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.error(key, value)
        return float(str(np.float32(value)))

    def factor(self, *keys: str) -> float:
        """The first of these keys that the file has, as `real`; 1 where it has none, or a 0."""
        for key in keys:
            if (value := self.get(key)) is not None:
                return 1.0 if value == 0 else self.real(key)
        return 1.0

    def layers(self) -> int:
        """The number of layers. A count that the file's tensors cannot fill is refused: it would make a long loop."""
        layers = self.size("block_count")
        if layers > len(self.file.tensors):
            raise UserError(
                f"{self.file.path}: {layers} layers in {len(self.file.tensors)} tensors (block_count); is the file complete?"
            )
        return layers

    def vector(self, name: str, count: int) -> list[float] | None:
        """The tensor `name` of `count` positive numbers; None if the file has none of that name."""
        tensor = self.file.tensors.get(name)
        if tensor is None:
            return None
        if tensor.shape != (count,) or count > _MOST_FACTORS:
            raise UserError(f"{self.file.path}: {name} has shape {list(tensor.shape)}, expected [{count}]; {WAY_OUT}")
        values: npt.NDArray[np.float32] = dequantize(tensor.data, tensor.kind)[0]
        if not bool(np.all((values > 0) & (values < 1e30))):
            raise UserError(f"{self.file.path}: {name} holds values that are no positive numbers; {WAY_OUT}")
        return [float(str(value)) for value in values]

    def error(self, key: str, value: object) -> UserError:
        return UserError(f"{self.file.path}: {self.prefix}.{key} is {one_line(value, 60)}; {WAY_OUT}")
