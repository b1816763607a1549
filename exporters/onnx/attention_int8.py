"""KV caches in int8 on ONNX Runtime's CPU kernels.

GroupQueryAttention takes int8 caches, but with one scale for all tokens. So the attention is spelled out, over the filled slots.
A token's scale multiplies a column of the scores: codes are not multiplied one by one.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...ops.quantized_cache import LEVELS
from ...targets.onnx.nodes import attr
from .attention_cached import Part, attend, biased, in_use, write
from .lowering import Lowering, kv_heads_of
from .positions import causal_mask


def lower_quantize_kv(low: Lowering, node: ir.Node) -> None:
    x = node.inputs[0]
    peaks = low.one(node, "ReduceMax", [low.one(node, "Abs", [x]), low.ints(-1)], keepdims=1)
    levels = low.constant(np.array(LEVELS, np.float32))
    least = low.constant(np.array(np.finfo(np.float32).tiny))
    scales = low.one(node, "Max", [low.one(node, "Div", [peaks, levels]), least])
    rounded = low.one(node, "Round", [low.one(node, "Div", [x, scales])])
    low.replace(node, [low.one(node, "Cast", [rounded], to=ir.DataType.INT8), scales])


def lower_append_kv(low: Lowering, node: ir.Node) -> None:
    cache, new, past = node.inputs[:3]
    assert past is not None
    low.replace(node, [write(low, node, cache, new, past)])


def lower_quantized_attention(low: Lowering, node: ir.Node) -> None:
    q, keys, key_scales, values, value_scales, mask = node.inputs[:6]
    part = Part(keys, values, mask, key_scales, value_scales)
    low.replace(node, [attend(low, node, q, kv_heads_of(keys), [part])])


def lower_quantized_causal_attention(low: Lowering, node: ir.Node) -> None:
    q, *caches = node.inputs[:5]
    own = _own(low, node, caches, node.inputs[5])
    low.replace(node, [attend(low, node, q, kv_heads_of(caches[0]), [own])])


def lower_quantized_biased_attention(low: Lowering, node: ir.Node) -> None:
    q, *caches = node.inputs[:5]
    positions, distances = node.inputs[5:7]
    assert distances is not None
    own = biased(low, node, _own(low, node, caches, positions), distances, positions)
    low.replace(node, [attend(low, node, q, kv_heads_of(caches[0]), [own])])


def lower_quantized_merged_attention(low: Lowering, node: ir.Node) -> None:
    """One softmax over the own cache and the encoder's keys. The scores are computed apart, so that no key is copied."""
    q, *caches = node.inputs[:5]
    keys, key_scales, values, value_scales, mask = node.inputs[5:10]
    parts = [_own(low, node, caches, node.inputs[10]), Part(keys, values, mask, key_scales, value_scales)]
    low.replace(node, [attend(low, node, q, kv_heads_of(caches[0]), parts)])


def _own(low: Lowering, node: ir.Node, caches: list[ir.Value | None], positions: ir.Value | None) -> Part:
    """The filled slots of caches that this call has written: codes and scales of keys, then of values."""
    keys, key_scales, values, value_scales = (in_use(low, node, cache, positions) for cache in caches)
    window = int(attr(node, "window")) if "window" in node.attributes else 0
    allowed = low.built(("seen", positions, window), lambda: causal_mask(low, node, keys, positions, window))
    return Part(keys, values, allowed, key_scales, value_scales)
