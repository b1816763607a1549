"""A graph being lowered to the standard's own ops, and what a compiler of those ops wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from .lowering import Lowering
from .weight_file import content_key

MASKED = -30000.0
"""What is added to a masked score: far below any score, and the sum is a finite float16."""

Lower = Callable[["StandardLowering", ir.Node], None]


@dataclass(frozen=True)
class Dialect:
    """What differs between the compilers that take the standard's ops: weights, how a cache is written, the float type.

    half: linears, attention and caches in float16, the residual in float32. all_half: everything in float16.
    """

    linear: Lower
    embedding: Lower
    write_cache: Callable[[StandardLowering, ir.Node, ir.Value, ir.Value, ir.Value, ir.Value], ir.Value]
    half: bool = False
    all_half: bool = False


@dataclass(kw_only=True)
class StandardLowering(Lowering):
    """One graph being lowered in a dialect."""

    dialect: Dialect

    def scalar(self, value: float, narrow: bool) -> ir.Value:
        """A constant in the matrix type (narrow) or that of the residual."""
        half = self.dialect.all_half or (narrow and self.dialect.half)
        return self.constant(np.array(value, np.float16 if half else np.float32))

    def float_tensor(self, name: str, tensor: torch.Tensor) -> ir.Value:
        """An initializer holding `tensor` in the type of the residual."""
        if not self.dialect.all_half:
            return super().float_tensor(name, tensor)
        data = tensor.detach().to(torch.float16).contiguous()
        key = f"f16:{tuple(data.shape)}:{content_key(data)}"
        return self.weight(name, key, [data.numpy()], ir.DataType.FLOAT16, tuple(data.shape))

    def narrow(self, before: ir.Node, value: ir.Value) -> ir.Value:
        """`value` in the dialect's matrix type; a cast is made once for each value."""
        if not self.dialect.half or value.dtype == ir.DataType.FLOAT16:
            return value
        key = ("half", value)
        if key not in self.shared:
            out = self.one(before, "Cast", [value], to=ir.DataType.FLOAT16)
            out.type, out.shape = ir.TensorType(ir.DataType.FLOAT16), value.shape
            self.shared[key] = out
        return self.shared[key]

    def widen(self, before: ir.Node, value: ir.Value) -> ir.Value:
        """`value` in the type of the residual."""
        return self.one(before, "Cast", [value], to=ir.DataType.FLOAT) if self.dialect.half else value
