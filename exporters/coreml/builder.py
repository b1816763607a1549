"""One function of an ML program while it is built: how numbers, constants and lengths become variables.

All floats are float16, the only float type of the Neural Engine, but for rotary angles and what `precision` moves to float64:
these are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch

from ...errors import UserError
from ...targets.coreml.library import Builder as mb
from ...targets.coreml.library import Var, types
from .weights import Constants

SHRINK = 2.0**-6
"""The factor of sums of activations in the program. Gemma's residual grows beyond float16. A power of two costs no digit, and the
norms that read the residual divide by its size anyway."""


class Lowering:
    """One function being built. Values are MIL variables, Python numbers, or torch tensors not yet emitted."""

    def __init__(self, constants: Constants) -> None:
        self.constants = constants
        self.symbols: dict[str, tuple[Any, int]] = {}
        self.states: dict[str, Any] = {}
        self.written: dict[int, Any] = {}
        """The new values of states that ops have written, by identity."""
        self.shared: dict[Any, Any] = {}
        self._shrunk: dict[int, Any] = {}

    def mark_shrunk(self, var: Any) -> Any:
        """`var`, which from now on counts as `SHRINK` times its value."""
        self._shrunk[id(var)] = var
        return var

    def is_shrunk(self, value: Any) -> bool:
        return id(value) in self._shrunk

    def shrunk(self, var: Any) -> Any:
        """An activation times `SHRINK`."""
        return var if self.is_shrunk(var) else self.once(("shrunk", var), lambda: mb.mul(x=var, y=self.half(SHRINK)))

    def plain(self, value: Any) -> Any:
        """A value, or a list of them, at its own size."""
        if isinstance(value, list):
            return [self.plain(v) for v in value]
        if not self.is_shrunk(value):
            return value
        return self.once(("plain", value), lambda: mb.mul(x=value, y=self.half(1 / SHRINK)))

    def var(self, value: Any, like: Any = None) -> Any:
        """`value` as a variable. A number has the dtype of `like`; floats beside a float32 `like` become float32."""
        wide = like is not None and like.dtype == types.fp32
        if isinstance(value, Var):
            return self.cast(value, "fp32") if wide and value.dtype == types.fp16 else value
        if isinstance(value, torch.Tensor):
            return self.constants.tensor(value.to(torch.float64) if wide and value.is_floating_point() else value)
        if isinstance(value, bool):
            return self.constants.array(np.bool_(value))
        if like is not None and types.is_float(like.dtype):
            return self.half(value) if like.dtype == types.fp16 else self.constants.array(np.float32(value))
        if isinstance(value, int):
            return self.constants.array(np.int32(value))
        return self.half(value)

    def cast(self, var: Any, dtype: str) -> Any:
        return self.once(("cast", var, dtype), lambda: mb.cast(x=var, dtype=dtype))

    def half(self, value: float) -> Any:
        return self.constants.array(np.float16(value))

    def linear(self, x: Any, weight: Any, bias: Any) -> Any:
        """x W' + b. Where there is no bias, zeros shared by size: else coremltools stores zeros for each linear."""
        zeros = self.constants.array(np.zeros(weight.shape[0], np.float16)) if bias is None else self.var(bias)
        return mb.linear(x=x, weight=weight, bias=zeros)

    def size(self, value: Any) -> Any:
        """A dimension as an int, or as an int32 scalar variable where it is dynamic; sums and products of those too."""
        if isinstance(value, int | Var):
            return value
        expression = value.node.expr if isinstance(value, torch.SymInt) else value
        if expression.is_Integer:
            return int(expression)
        if expression.is_Add or expression.is_Mul:
            join = mb.add if expression.is_Add else mb.mul
            first, *rest = (self.var(self.size(part)) for part in expression.args)
            return self.once(("size", str(expression)), lambda: reduce(lambda a, b: join(x=a, y=b), rest, first))
        name = str(expression)
        if name not in self.symbols:
            raise UserError(f"--format coreml: the length {name} is no dimension of an input")
        var, axis = self.symbols[name]
        return self.once(("size", name), lambda: mb.gather(x=mb.shape(x=var), indices=axis, axis=0))

    def once(self, key: Any, build: Callable[[], Any]) -> Any:
        """`build()`, called once for each key."""
        if key not in self.shared:
            self.shared[key] = build()
        return self.shared[key]


def op_name(op: Any) -> str:
    """`aten::add` of any overload."""
    schema = getattr(op, "_schema", None)
    return schema.name if schema is not None else str(getattr(op, "__name__", op))


def scaled(low: Lowering, x: Any, factor: float) -> Any:
    """x times a number. A number that float16 would round is applied as two factors, right to about 2^-21."""
    first, second = halves(factor)
    x = mb.mul(x=x, y=low.half(first))
    return x if second == 1.0 else mb.mul(x=x, y=low.half(second))


def halves(factor: float) -> tuple[float, float]:
    """Two float16 numbers with the product closest to `factor`; the second is 1 where one number is exact enough."""
    if factor == 0.0 or abs(float(np.float16(factor)) / factor - 1.0) < 1e-6:
        return float(np.float16(factor)), 1.0
    firsts = 1.0 + np.arange(1024) / 1024.0
    seconds = (factor / firsts).astype(np.float16).astype(np.float64)
    best = int(np.abs(firsts * seconds - factor).argmin())
    return float(firsts[best]), float(seconds[best])
