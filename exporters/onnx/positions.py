"""Positions of tokens, and which slots of a cache they see, as ONNX nodes. A size that is known becomes a constant."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .lowering import Lowering


def new_positions(low: Lowering, node: ir.Node, past: ir.Value, tokens: ir.Value) -> ir.Value:
    """past + 0, 1, 2 … for each token of `tokens` [B, S, …], int64 [S]."""
    return low.one(node, "Add", [past, _numbers(low, node, tokens, 1)])


def causal_mask(low: Lowering, node: ir.Node, cache: ir.Value, positions: ir.Value | None, window: int) -> ir.Value:
    """bool [S, T]: which slots of a cache [B, KV, T, D] each position sees: those up to its own, the last `window` of them."""
    slots = _numbers(low, node, cache, 2)
    rows = low.one(node, "Unsqueeze", [positions, low.ints(1)])
    allowed = low.one(node, "LessOrEqual", [slots, rows])
    if window:
        first = low.one(node, "Sub", [rows, low.ints(window)])
        allowed = low.one(node, "And", [allowed, low.one(node, "Greater", [slots, first])])
    return allowed


def distances_back(
    low: Lowering, node: ir.Node, cache: ir.Value, positions: ir.Value | None, farthest: int
) -> ir.Value:
    """int64 [S, T]: how far before each position a slot of a cache [B, KV, T, D] is, from 0 to `farthest`."""
    rows = low.one(node, "Unsqueeze", [positions, low.ints(1)])
    back = low.one(node, "Sub", [rows, _numbers(low, node, cache, 2)])
    least, most = (low.constant(np.array(n, np.int64)) for n in (0, farthest))
    return low.one(node, "Min", [low.one(node, "Max", [back, least]), most])


def _numbers(low: Lowering, node: ir.Node, value: ir.Value, axis: int) -> ir.Value:
    """0, 1, 2 … as many as `value` is long along `axis`."""
    size = value.shape[axis] if value.shape is not None else None
    if isinstance(size, int):
        return low.constant(np.arange(size, dtype=np.int64))
    length = low.one(node, "Squeeze", [low.one(node, "Shape", [value], start=axis, end=axis + 1)])
    zero, one = (low.constant(np.array(n, np.int64)) for n in (0, 1))
    return low.one(node, "Range", [zero, length, one])
