"""A saved .mlpackage read from its files: functions as lists of ops, constants from the weight file. No torch enters.

Only the protobuf classes of coremltools are used; the weight file is read by its layout (a 64-byte record at a blob's
offset: sentinel, type, size, data offset). Sub-byte values are a little-endian bit stream, lowest bits first. Every size
and offset is checked against the file before anything is allocated.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError
from ...system.reading import one_line

Array = NDArray[Any]

PACKAGE = "model.mlpackage"
STEP = "_step"
"""What the name of a graph's one-token function ends in."""
OUT = "_out"
"""What stands behind a state's name where it leaves a function as an output."""
LABELS = "edgewright.weights"
"""The metadata entry that maps a name in the program to the checkpoint's names (several where weights are alike)."""

_SENTINEL, _RECORD = 0xDEADBEEF, 64
_PROGRAM_LIMIT = 512 << 20  # bytes of model.mlmodel; 300 layers take some 20 MiB
_DTYPES: dict[str, Any] = {
    "FLOAT16": np.float16,
    "FLOAT32": np.float32,
    "FLOAT64": np.float64,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT16": np.int16,
    "UINT16": np.uint16,
    "INT32": np.int32,
    "UINT32": np.uint32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}
_NARROW = {"INT4": (4, True), "UINT1": (1, False), "UINT2": (2, False), "UINT3": (3, False)}
_NARROW |= {"UINT4": (4, False), "UINT6": (6, False)}
# What a record of the weight file calls a type; a bool is stored as uint8.
_IN_BLOB = {
    "FLOAT16": 1,
    "FLOAT32": 2,
    "UINT8": 3,
    "BOOL": 3,
    "INT8": 4,
    "INT16": 6,
    "UINT16": 7,
    "INT4": 8,
    "UINT1": 9,
}
_IN_BLOB |= {"UINT2": 10, "UINT4": 11, "UINT3": 12, "UINT6": 13, "INT32": 14, "UINT32": 15}


@dataclass(frozen=True)
class Stored:
    """A constant in the package: in the weight file at `offset`, or `inline` bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int | None
    inline: Any


@dataclass(frozen=True)
class Op:
    """One operation. inputs: parameter -> names of values (str) and constants; outputs: (name, dtype)."""

    kind: str
    name: str
    inputs: dict[str, list[str | Stored]]
    outputs: tuple[tuple[str, str], ...]


@dataclass
class FunctionDef:
    """One function: `inputs` and `states` map names to (dtype, shape), -1 for a dynamic length."""

    inputs: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    states: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


class Package:
    """A package opened: `functions` by name. Raises UserError if the folder is not a package this code can read."""

    def __init__(self, path: Path) -> None:
        from google.protobuf.message import DecodeError

        from .library import MIL_pb2, Model_pb2

        self.path = path
        inside = path / "Data" / "com.apple.CoreML"
        program, blob = inside / "model.mlmodel", inside / "weights" / "weight.bin"
        if not program.is_file():
            raise UserError(f"{path}: no Core ML package")
        if program.stat().st_size > _PROGRAM_LIMIT:
            raise UserError(f"{program}: {program.stat().st_size} bytes; no program is that large")
        spec = Model_pb2.Model()
        stat = program.stat()
        self.identity = (str(program.resolve()), stat.st_mtime_ns, stat.st_size)
        """Of the file that was read: another package in its place is another one."""
        self._kinds = MIL_pb2.DataType
        self._blob: Array = np.zeros(0, np.uint8)
        if blob.is_file() and blob.stat().st_size:
            self._blob = np.memmap(blob, np.uint8, "r")
        try:
            spec.ParseFromString(program.read_bytes())
            self.functions = {name: self._function(proto) for name, proto in spec.mlProgram.functions.items()}
            self._labels = _labels(spec.description.metadata.userDefined[LABELS] or "{}")
        except (DecodeError, LookupError, RecursionError, ValueError) as error:
            raise UserError(f"{path}: model.mlmodel is damaged ({one_line(error, 120)}); export again") from error

    def op_counts(self) -> dict[str, dict[str, int]]:
        """Function -> op -> how many, constants left out."""
        return {
            name: dict(Counter(op.kind for op in function.ops if op.kind != "const"))
            for name, function in sorted(self.functions.items())
        }

    def read(self, stored: Stored) -> Array:
        """The values of a constant; sub-byte ones as int8 or uint8. Raises UserError if the file does not hold them."""
        if stored.dtype not in _NARROW and stored.dtype not in _DTYPES:
            raise UserError(f"{self.path}: constants of type {stored.dtype} are not understood")
        count = math.prod(stored.shape)
        bits = _NARROW[stored.dtype][0] if stored.dtype in _NARROW else 8 * np.dtype(_DTYPES[stored.dtype]).itemsize
        needed = -(-count * bits // 8)
        if stored.offset is not None:
            raw = self._record(stored.offset, stored.dtype, needed)
        elif isinstance(stored.inline, bytes):
            raw = np.frombuffer(stored.inline, np.uint8)
        elif len(stored.inline) == count:
            return np.asarray(stored.inline, _DTYPES.get(stored.dtype)).reshape(stored.shape)
        else:
            raise UserError(f"{self.path}: a constant of {list(stored.shape)} has {len(stored.inline)} values")
        if min(stored.shape, default=0) < 0 or raw.size < needed:
            raise UserError(f"{self.path}: a constant of {list(stored.shape)} has {raw.size} bytes; export again")
        if stored.dtype in _NARROW:
            return _unpack(raw, count, *_NARROW[stored.dtype]).reshape(stored.shape)
        return np.frombuffer(raw.data, _DTYPES[stored.dtype], count).reshape(stored.shape)

    def _record(self, offset: int, dtype: str, needed: int) -> Array:
        """The bytes of the weight file that the record at `offset` points to."""
        if offset + _RECORD > self._blob.size:
            raise UserError(f"{self.path}: a weight lies beyond the end of weight.bin; export again")
        sentinel, kind, size, start = struct.unpack("<IIQQ", self._blob[offset : offset + 24].tobytes())
        if sentinel != _SENTINEL or kind != _IN_BLOB.get(dtype) or size < needed or start + size > self._blob.size:
            raise UserError(f"{self.path}: weight.bin is damaged at {offset}; export again")
        return self._blob[start : start + size]

    def dequantized(self, op: Op, made: Mapping[str, Array]) -> Array:
        """The float32 (or integer) value of a constexpr op; `made` holds the values it may refer to by name.

        Raises UserError for a form other than ours: one table, scales over groups of a row, no offset.
        """

        def value(parameter: str) -> Array:
            given = (op.inputs.get(parameter) or [""])[0]
            if isinstance(given, Stored):
                return self.read(given)
            if given not in made:
                raise UserError(f"{self.path}: {op.name} has no {parameter}; export again")
            return made[given]

        if op.kind == "constexpr_lut_to_dense":
            table, indices = value("lut"), value("indices")
            if table.ndim != indices.ndim + 2 or table.shape[-1] != 1 or table.size != table.shape[-2]:
                raise UserError(f"{self.path}: {op.name} has several lookup tables; only one is understood")
            if indices.size and int(indices.max()) >= table.size:
                raise UserError(f"{self.path}: {op.name} has indices beyond its table; export again")
            return table.reshape(-1)[indices]
        if op.kind == "constexpr_blockwise_shift_scale" and "offset" not in op.inputs:
            data, scale = value("data"), value("scale").astype(np.float32)
            rows_alike = data.ndim == scale.ndim == 2 and data.shape[0] == scale.shape[0]
            if not rows_alike or not scale.size or data.shape[1] % scale.shape[1]:
                raise UserError(f"{self.path}: {op.name} has scales over other than groups of a row")
            dense: Array = data.astype(np.float32)
            grouped = dense.reshape(*scale.shape, -1)
            grouped *= scale[..., None]
            return dense
        raise UserError(f"{self.path}: {op.kind} of {op.name} is not understood")

    def weights(self) -> Iterator[tuple[str, Array]]:
        """(checkpoint name, float32 values) of every weight and other parameter that a function holds.

        One comes again if another function stores it elsewhere, not if both point to the same bytes.
        """
        seen: set[tuple[str, str]] = set()
        for function in self.functions.values():
            by_name = {op.outputs[0][0]: op for op in function.ops if op.kind.startswith("const") and op.outputs}
            for output, op in by_name.items():
                where = repr(sorted((p, [_source(by_name, g) for g in given]) for p, given in op.inputs.items()))
                if output not in self._labels or (output, where) in seen:
                    continue
                seen.add((output, where))
                value = self._value_of(by_name, op, 0).astype(np.float32)
                for name in self._labels[output]:
                    yield name, value

    def _value_of(self, by_name: Mapping[str, Op], op: Op, depth: int) -> Array:
        """The value of a const or constexpr op, and of those it refers to."""
        if op.kind == "const":
            given = (op.inputs.get("val") or [""])[0]
            if isinstance(given, Stored):
                return self.read(given)
        named = {g for given in op.inputs.values() for g in given if isinstance(g, str)} & by_name.keys()
        if op.kind == "const" or depth > 2:
            raise UserError(f"{self.path}: {op.name} has no value; export again")
        return self.dequantized(op, {n: self._value_of(by_name, by_name[n], depth + 1) for n in named})

    def _function(self, proto: Any) -> FunctionDef:
        made = FunctionDef()
        for port in proto.inputs:
            if port.type.WhichOneof("type") == "stateType":
                made.states[port.name] = self._type(port.type.stateType.wrappedType)
            else:
                made.inputs[port.name] = self._type(port.type)
        (block,) = proto.block_specializations.values()
        made.ops = [self._op(op) for op in block.operations]
        made.outputs = list(block.outputs)
        return made

    def _op(self, proto: Any) -> Op:
        if proto.blocks:
            raise UserError(f"{self.path}: control flow ({proto.type}) is not understood")
        inputs: dict[str, list[str | Stored]] = {}
        for parameter, argument in proto.inputs.items():
            inputs[parameter] = [
                b.name if b.WhichOneof("binding") == "name" else self._value(b.value) for b in argument.arguments
            ]
        name = ""
        for attribute, value in proto.attributes.items():
            if attribute == "name":
                name = value.immediateValue.tensor.strings.values[0]
            else:
                inputs[attribute] = [self._value(value)]
        outputs = tuple((o.name, self._type(o.type)[0]) for o in proto.outputs)
        return Op(proto.type, name, inputs, outputs)

    def _type(self, proto: Any) -> tuple[str, tuple[int, ...]]:
        tensor = proto.tensorType
        shape = tuple(d.constant.size if d.WhichOneof("dimension") == "constant" else -1 for d in tensor.dimensions)
        return self._kinds.Name(tensor.dataType), shape

    def _value(self, proto: Any) -> Stored:
        dtype, shape = self._type(proto.type)
        if proto.WhichOneof("value") == "blobFileValue":
            return Stored(dtype, shape, int(proto.blobFileValue.offset), None)
        tensor = proto.immediateValue.tensor
        kind = tensor.WhichOneof("value")
        data = getattr(tensor, kind).values if kind is not None else []
        return Stored(dtype, shape, None, data if isinstance(data, bytes) else list(data))


def _labels(text: str) -> dict[str, list[str]]:
    """The metadata entry `LABELS`. Raises ValueError for anything else."""
    found = json.loads(text)
    lists = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(names, list) and all(isinstance(n, str) for n in names) for names in lists):
        raise ValueError(f"{LABELS} is no table of names")
    return dict(found)


def _source(by_name: Mapping[str, Op], given: str | Stored) -> object:
    """What an input of a constexpr op points to, whatever it is called in its function."""
    op = by_name.get(given) if isinstance(given, str) else None
    return given if op is None else [s for _, values in sorted(op.inputs.items()) for s in values]


def _unpack(raw: Array, count: int, bits: int, signed: bool) -> Array:
    """uint8 bytes -> `count` values of `bits` bits, in chunks of whole bytes."""
    out = np.empty(count, np.uint8)
    step = 1 << 20  # a multiple of 8 values: every chunk starts at a byte
    weights = (1 << np.arange(bits)).astype(np.uint8)
    for start in range(0, count, step):
        stop = min(count, start + step)
        octets = np.asarray(raw[start * bits // 8 : -(-stop * bits // 8)])
        if bits == 4:
            both = np.stack([octets & 15, octets >> 4], -1).reshape(-1)
            out[start:stop] = both[: stop - start]
        else:
            stream = np.unpackbits(octets, bitorder="little")[: (stop - start) * bits]
            out[start:stop] = stream.reshape(-1, bits) @ weights
    if not signed:
        return out
    half = np.uint8(1 << (bits - 1))
    result: Array = ((out ^ half).astype(np.int16) - int(half)).astype(np.int8)
    return result
