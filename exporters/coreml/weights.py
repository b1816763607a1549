"""Weights of a Core ML program: codes and scales as `constexpr` ops, everything else as float16 constants.

4 and 8 bits are stored blockwise. 2, 3 and 6 bits are indices into an int8 table, whose result is scaled by group; 5-bit codes use
the 6-bit form. In every form the dequantized value is code times scale. Scales are canonical, hence exact in float16.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import UserError
from ...ops.packing import unpack
from ...system.digest import of_tensor, of_text
from ...targets.coreml.library import Builder as mb
from ...targets.coreml.library import types
from ...targets.storage import container

_ROWS = 4096  # rows of codes unpacked at a time
_TABLES = {2: types.np_uint2_dtype, 3: types.np_uint3_dtype, 6: types.np_uint6_dtype}
_LARGEST = 65504.0  # of float16


@dataclass(frozen=True)
class Stored:
    """One quantized weight as numpy arrays that several functions share. Its codes are in a mapped scratch file."""

    key: str
    codes: Any
    scales: Any
    table: Any | None


class WeightStore:
    """The weights of all functions of a package; the same bytes get the same `weight_id` and are written once.

    scratch: a folder for the unpacked codes, a byte each; coremltools packs them when it writes the package. names: data pointer
    of a tensor of the checkpoint (of a quantized one, its codes) -> its name.
    """

    def __init__(self, scratch: Path, names: dict[int, str]) -> None:
        self.scratch, self.names = scratch, names
        self._stored: dict[str, Stored] = {}
        self.labels: dict[str, list[str]] = {}
        """Name in the program -> its names in the checkpoint: several where tensors are alike."""

    def stored(self, codes: torch.Tensor, scales: torch.Tensor, bits: int) -> Stored:
        """The arrays of a weight, made once for equal contents. Raises ValueError for scales that are not canonical."""
        key = f"{bits}:{tuple(scales.shape)}:{content_key(codes)}:{content_key(scales)}"
        if key not in self._stored:
            wide = container("coreml", bits)
            columns = codes.shape[1] * 8 // bits
            path = self.scratch / f"{len(self._stored)}.codes"
            with path.open("wb") as file:
                for start in range(0, codes.shape[0], _ROWS):
                    unsigned = unpack(codes[start : start + _ROWS], bits, columns)
                    if wide in _TABLES:
                        part = (unsigned + ((1 << (wide - 1)) - (1 << (bits - 1)))).numpy()
                    else:
                        part = (unsigned.to(torch.int16) - (1 << (bits - 1))).to(torch.int8).numpy()
                    file.write(np.ascontiguousarray(part).data)
            dtype = _TABLES.get(wide) or (types.np_int4_dtype if wide == 4 else np.dtype(np.int8))
            shape = (codes.shape[0], columns)
            mapped = np.memmap(path, mode="r", dtype=np.uint8, shape=shape).view(dtype)
            half = np.float16(scales.to(torch.float32).numpy())
            if not np.array_equal(half.astype(np.float32), scales.to(torch.float32).numpy()):
                raise ValueError("a scale is not exact in float16: the checkpoint's scales are not canonical")
            table = None
            if wide in _TABLES:
                values = np.arange(-(1 << (wide - 1)), 1 << (wide - 1), dtype=np.int8)
                table = values.reshape(1, 1, -1, 1)
            self._stored[key] = Stored(key, mapped, half, table)
        return self._stored[key]


class Constants:
    """The constants of one function. Each distinct weight, table and small array is emitted once."""

    def __init__(self, store: WeightStore) -> None:
        self.store = store
        self._vars: dict[Any, Any] = {}

    def weight(self, codes: torch.Tensor, scales: torch.Tensor, bits: int) -> Any:
        """A float16 constexpr variable [N, K]; a tied embedding and head share it."""
        stored = self.store.stored(codes, scales, bits)
        if stored.key not in self._vars:
            name = self.name(codes, "weight")
            data = self._file(stored.codes, f"{stored.key}:codes", f"{name}_codes")
            if stored.table is not None:
                table = self._file(stored.table, f"table{stored.table.size}", f"{name}_table")
                data = mb.constexpr_lut_to_dense(indices=data, lut=table, name=f"{name}_integers")
            scale = self._file(stored.scales, f"{stored.key}:scales", f"{name}_scales")
            self._vars[stored.key] = mb.constexpr_blockwise_shift_scale(data=data, scale=scale, name=name)
        return self.labelled(codes, self._vars[stored.key])

    def tensor(self, tensor: torch.Tensor) -> Any:
        """A constant: float64 as float32, other floats as float16, else int32 or bool.

        Raises UserError for values beyond the range of float16.
        """
        key = ("tensor", content_key(tensor), tuple(tensor.shape), tensor.dtype)
        if key not in self._vars:
            name = self.name(tensor, "tensor")
            if tensor.dtype == torch.float64:
                array: Any = tensor.detach().to(torch.float32).numpy()
            elif tensor.is_floating_point():
                wide = tensor.detach().to(torch.float32).numpy()
                if wide.size and not float(np.abs(wide).max()) <= _LARGEST:
                    raise UserError(f"--format coreml: {name} has values beyond float16, the type of Core ML's weights")
                array = wide.astype(np.float16)
            else:
                kind = np.bool_ if tensor.dtype == torch.bool else np.int32
                array = tensor.detach().numpy().astype(kind)
            self._vars[key] = self._file(array, str(key), name)
        return self.labelled(tensor, self._vars[key])

    def array(self, array: Any) -> Any:
        """A small constant, in the array's own dtype."""
        array = np.asarray(array)
        key = ("array", array.dtype.str, array.shape, array.tobytes())
        if key not in self._vars:
            # A scalar must stay one: Core ML takes rank 0 where it asks for a scalar.
            self._vars[key] = self._file(array if array.shape else array[()], str(key), f"const_{len(self._vars)}")
        return self._vars[key]

    def name(self, tensor: torch.Tensor, kind: str) -> str:
        """A legal name in the program, for a tensor of the checkpoint or one of the graph."""
        name = self.store.names.get(tensor.data_ptr(), f"{kind}_{len(self._vars)}")
        return "w_" + "".join(c if c.isalnum() and c.isascii() else "_" for c in name)

    def labelled(self, tensor: torch.Tensor, var: Any) -> Any:
        """`var`; if `tensor` has a name in the checkpoint, `read_weights` will find it by that name."""
        name = self.store.names.get(tensor.data_ptr())
        if name is not None and name not in self.store.labels.setdefault(var.name, []):
            self.store.labels[var.name].append(name)
        return var

    def _file(self, array: Any, key: str, name: str) -> Any:
        var = mb.const(val=array, name=name)
        var.op.weight_id = of_text(key)
        return var


def content_key(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes: never its address, which a freed buffer may have had."""
    return of_tensor(tensor)
