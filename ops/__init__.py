"""The `edgewright::` torch ops. Each is defined once, with `define.define`, and called as `torch.ops.edgewright.<name>`.

An exporter lowers the ops that its table names; the others are decomposed by `DECOMPOSITIONS`.
"""

from __future__ import annotations

from . import attention, pointwise, quantized, quantized_cache, recurrence
from .define import DECOMPOSITIONS

__all__ = ["DECOMPOSITIONS", "attention", "pointwise", "quantized", "quantized_cache", "recurrence"]
