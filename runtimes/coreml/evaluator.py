"""One function of a saved Core ML package, computed in numpy.

It is as fast as numpy's BLAS: weights are dequantized once and shared, caches are written in place where nothing else reads
them, and only newly computed values are rounded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from ...errors import UserError
from ...system.reading import one_line
from ...targets.coreml.package import FunctionDef, Op, Package, Stored
from ..session import Array
from .ops import MOVES, OPS, write_slice

_FLOATS = ("FLOAT16", "FLOAT32")


@dataclass(frozen=True)
class _Step:
    """An op ready to run: its constants, the names of inputs from other ops, and which outputs are rounded.

    in_place: a slice_update whose target is read by nothing else before the state is written.
    """

    kind: str
    name: str
    constants: dict[str, Any]
    names: dict[str, str | list[str]]
    outputs: tuple[str, ...]
    rounded: tuple[bool, ...]
    in_place: bool = False


_dense: WeakValueDictionary[tuple[object, ...], Array] = WeakValueDictionary()
"""Dequantized weights in use, shared by functions and sessions: (package, where the weight lies, rounded) -> values."""


class Evaluator:
    """One function of a package, in numpy. Raises UserError for an operation that the table lacks.

    rounding: whether tensors that the program declares as float16 are rounded to it after their operation.
    """

    def __init__(self, package: Package, name: str, rounding: bool) -> None:
        self.package, self.rounding = package, rounding
        self.function: FunctionDef = package.functions[name]
        self._fixed: dict[str, Any] = {}
        self._steps: list[_Step] = []
        updates = _updates_in_place(self.function)
        for op in self.function.ops:
            self._prepare(op, updates)
        self._last = self._last_uses()

    def run(self, inputs: Mapping[str, Array], states: dict[str, Array]) -> dict[str, Array]:
        """Outputs by name, floats as float32. `states` is updated, and its arrays may be written in place."""
        values: dict[str, Any] = {}
        for name, (dtype, shape) in self.function.inputs.items():
            value = np.asarray(inputs[name])
            if len(shape) != value.ndim or any(d not in (-1, s) for d, s in zip(shape, value.shape, strict=True)):
                raise UserError(f"{self.package.path}: input {name} is {list(value.shape)}, expected {list(shape)}")
            values[name] = (
                self._round(value.astype(np.float32), dtype == "FLOAT16")
                if dtype in _FLOATS
                else value.astype(np.int32)
            )
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            for index, step in enumerate(self._steps):
                try:
                    self._compute(step, values, states)
                except (ArithmeticError, LookupError, MemoryError, TypeError, ValueError) as error:
                    reason = one_line(error, 120)
                    raise UserError(
                        f"{self.package.path}: {step.kind} {step.name} cannot be computed ({reason})"
                    ) from error
                for name in self._last.get(index, ()):
                    values.pop(name, None)
        return {name: values[name] for name in self.function.outputs}

    def _compute(self, step: _Step, values: dict[str, Any], states: dict[str, Array]) -> None:
        if step.kind == "read_state":
            values[step.outputs[0]] = states[str(step.names["input"])]
            return
        if step.kind == "write_state":
            states[str(step.names["input"])] = values[str(step.names["data"])]
            return
        inputs = dict(step.constants)
        for parameter, names in step.names.items():
            inputs[parameter] = (
                [self._get(values, n) for n in names] if isinstance(names, list) else self._get(values, names)
            )
        try:
            outputs = write_slice(inputs) if step.in_place else OPS[step.kind](inputs)
        except NotImplementedError as error:
            raise UserError(f"{self.package.path}: {step.name}: {error} is not understood by the evaluator") from error
        for name, value, rounded in zip(
            step.outputs, outputs if isinstance(outputs, list) else [outputs], step.rounded, strict=True
        ):
            if isinstance(value, np.floating | np.ndarray) and value.dtype == np.float64:
                value = value.astype(np.float32)
            values[name] = self._round(value, rounded)

    def _get(self, values: dict[str, Any], name: str) -> Any:
        return values[name] if name in values else self._fixed[name]

    def _round(self, value: Any, rounded: bool) -> Any:
        return through_half(value) if rounded and self.rounding else value

    def _prepare(self, op: Op, updates: frozenset[str]) -> None:
        if op.kind == "const":
            (stored,) = op.inputs["val"]
            assert isinstance(stored, Stored)
            self._fixed[op.outputs[0][0]] = self._constant(stored)
            return
        if op.kind.startswith("constexpr_"):
            self._fixed[op.outputs[0][0]] = self._weight(op)
            return
        if op.kind not in OPS and op.kind not in ("read_state", "write_state"):
            raise UserError(f"{self.package.path}: the evaluator does not know the operation '{op.kind}' ({op.name})")
        constants: dict[str, Any] = {}
        names: dict[str, str | list[str]] = {}
        for parameter, arguments in op.inputs.items():
            if parameter == "values":
                names[parameter] = [a for a in arguments if isinstance(a, str)]
                continue
            (argument,) = arguments
            if isinstance(argument, str) and argument not in self._fixed:
                names[parameter] = argument
            else:
                constants[parameter] = self._fixed[argument] if isinstance(argument, str) else self._constant(argument)
        outputs = tuple(name for name, _ in op.outputs)
        # An operation that only moves or selects float16 values needs no rounding.
        rounded = tuple(dtype == "FLOAT16" and op.kind not in MOVES for _, dtype in op.outputs)
        in_place = outputs[:1] != () and outputs[0] in updates
        self._steps.append(_Step(op.kind, op.name, constants, names, outputs, rounded, in_place))

    def _constant(self, stored: Stored) -> Any:
        if stored.dtype == "STRING":
            return stored.inline[0]
        value = self.package.read(stored)
        return value.astype(np.float32) if value.dtype == np.float16 else value

    def _weight(self, op: Op) -> Array:
        """Dequantized values. Where rounding changes nothing (up to 4 bits) both kinds of session share one copy."""
        where = (self.package.identity, repr(sorted(op.inputs.items())), op.outputs[0][0])
        values = _dense.get((*where, self.rounding))
        if values is None:
            plain = _dense.get((*where, False))
            values = plain if plain is not None else self.package.dequantized(op, self._fixed)
            if values.dtype == np.float32 and self.rounding and op.outputs[0][1] == "FLOAT16":
                rounded = self._round(values, True)
                if not np.array_equal(rounded, values):
                    values = rounded
                else:
                    _dense[(*where, False)] = values
            if values.dtype == np.float32:
                _dense[(*where, self.rounding)] = values
        return values

    def _last_uses(self) -> dict[int, list[str]]:
        """Step -> values that no later step reads: they are dropped, so that a prefill does not keep every activation."""
        last: dict[str, int] = {}
        for index, step in enumerate(self._steps):
            for names in (*step.names.values(), list(step.outputs)):
                for name in names if isinstance(names, list) else [names]:
                    last[name] = index
        uses: dict[int, list[str]] = {}
        for name, index in last.items():
            if name not in self.function.outputs:
                uses.setdefault(index, []).append(name)
        return uses


_BLOCK = 1 << 15  # values rounded at a time: they stay in the processor's cache
_NORMAL = 0x38800000  # float32 bits of 2^-14, the least normal float16
_OVERFLOW = 0x477FF000  # float32 bits of 65520, which float16 rounds to infinity


def through_half(values: Any) -> Any:
    """float32 values rounded to float16, to nearest with ties to even, and back; the same as numpy's casts, but faster."""
    if np.size(values) < 4 * _BLOCK:
        return values.astype(np.float16).astype(np.float32)
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    result = np.empty_like(flat)
    for start in range(0, flat.size, _BLOCK):
        source, target = flat[start : start + _BLOCK], result[start : start + _BLOCK]
        bits, rounded = source.view(np.uint32), target.view(np.uint32)
        np.right_shift(bits, 13, out=rounded)  # float32 has 13 bits more than float16
        rounded &= np.uint32(1)
        rounded += np.uint32(0x0FFF)
        rounded += bits
        rounded &= np.uint32(0xFFFFE000)
        size = bits & np.uint32(0x7FFFFFFF)
        beyond = (size - np.uint32(_NORMAL)) >= np.uint32(_OVERFLOW - _NORMAL)  # smaller ones wrap around
        beyond &= size != 0
        if beyond.any():
            target[beyond] = source[beyond].astype(np.float16)
    return result.reshape(values.shape)


def _updates_in_place(function: FunctionDef) -> frozenset[str]:
    """Outputs of the slice_updates that may write into the array of their state without any effect on other ops.

    Such a slice_update stands in read_state -> slice_update -> write_state of one state, which is written once and, before
    that, read only for this update.
    """
    uses = Counter(
        a for op in function.ops for arguments in op.inputs.values() for a in arguments if isinstance(a, str)
    )
    uses.update(function.outputs)

    def name(op: Op, parameter: str) -> str:
        argument = (op.inputs.get(parameter) or [""])[0]
        return argument if isinstance(argument, str) else ""

    producers = {op.outputs[0][0]: op for op in function.ops if op.outputs}
    written: dict[str, list[int]] = {}
    read: dict[str, list[int]] = {}
    for index, op in enumerate(function.ops):
        if op.kind in ("read_state", "write_state"):
            (read if op.kind == "read_state" else written).setdefault(name(op, "input"), []).append(index)
    in_place = set()
    for state, (first, *more) in written.items():
        update = producers.get(name(function.ops[first], "data"))
        source = producers.get(name(update, "x")) if update is not None and update.kind == "slice_update" else None
        before = [i for i in read.get(state, []) if i < first]
        alone = source is not None and [function.ops[i] for i in before] == [source] and uses[source.outputs[0][0]] == 1
        if update is not None and alone and not more:
            in_place.add(update.outputs[0][0])
    return frozenset(in_place)
