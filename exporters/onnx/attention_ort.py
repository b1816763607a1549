"""Attention on ONNX Runtime's CPU kernels, by GroupQueryAttention where it fits.

Caches are written in place: past and present are one buffer (`runtimes.onnx`). What the kernels do is tested in
tests/exporters/onnx/test_onnx_attention_facts.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ...targets.onnx.nodes import attr
from .attention_cached import Part, attend, first_node, flat, float_mask, over_its_cache
from .linear import has_bias, matmul
from .lowering import MS, Lowering, dims, torch_tensor
from .translate import DOMAIN

HEAD, ROTATED = 16, 16
"""GroupQueryAttention takes heads, and rotates parts of heads, whose size is a multiple of these."""


# ---- operands -------------------------------------------------------------------------------------------------------


@dataclass
class Heads:
    """An attention operand [B, S, heads, head_dim] and its flat value [B, S, heads * head_dim]."""

    flat: ir.Value
    heads: int
    head_dim: int


def _heads(low: Lowering, value: ir.Value, before: ir.Node) -> Heads:
    heads, dim = dims(value)
    return Heads(flat(low, value, before), heads, dim)


@dataclass
class Rotation:
    """A query or key [B, S, heads, D] before its rotary embedding, and the Rope node that rotates its first dimensions."""

    before: ir.Value
    rope: ir.Node

    @property
    def frequencies(self) -> torch.Tensor:
        return torch_tensor(self.rope.inputs[2]).to(torch.float32)


def _rotation(value: ir.Value | None) -> Rotation | None:
    """How `value` was rotated: all of each head, or its first dimensions with the others joined to them; None if neither."""
    node = value.producer() if value is not None else None
    if node is None:
        return None
    if node.domain == DOMAIN and node.op_type == "Rope":
        assert node.inputs[0] is not None
        return Rotation(node.inputs[0], node)
    if node.op_type != "Concat" or len(node.inputs) != 2 or int(attr(node, "axis")) not in (3, -1):
        return None
    rope, rest = (v.producer() if v is not None else None for v in node.inputs)
    if rope is None or rest is None or rope.domain != DOMAIN or rope.op_type != "Rope":
        return None
    first, width = rope.inputs[0].producer() if rope.inputs[0] is not None else None, dims(rope.inputs[0])[1]
    source = first.inputs[0] if first is not None else None
    if source is None or not _slices(first, source, 0) or not _slices(rest, source, width):
        return None
    return Rotation(source, rope) if dims(source) == dims(value) else None


def _slices(node: ir.Node | None, source: ir.Value, start: int) -> bool:
    """Whether `node` cuts `source` along its last dimension, from `start` on."""
    if node is None or node.op_type != "Slice" or node.inputs[0] is not source or len(node.inputs) < 4:
        return False
    constants = [
        v.const_value.numpy().reshape(-1).tolist() if v is not None and v.const_value is not None else None
        for v in node.inputs[1:]
    ]
    steps = constants[3] if len(constants) > 3 else [1]
    return constants[0] == [start] and constants[2] in ([3], [-1]) and steps == [1]


def _tables(low: Lowering, inv_freq: torch.Tensor) -> tuple[ir.Value, ir.Value]:
    """cos and sin [max_positions, rotated / 2] as initializers."""
    angles = torch.arange(low.max_positions, dtype=torch.float32).unsqueeze(-1) * inv_freq
    return low.float_tensor("rope.cos", angles.cos()), low.float_tensor("rope.sin", angles.sin())


def _rotary_inside(
    low: Lowering, q: ir.Value | None, k: ir.Value | None, counts: Callable[[ir.Value | None], bool]
) -> tuple[ir.Value, ir.Value, list[ir.Value | None]]:
    """q and k as GroupQueryAttention takes them, and its tables: none where it does not rotate.

    counts: whether positions are those that the kernel counts by itself.
    """
    assert q is not None
    assert k is not None
    of_q, of_k = _rotation(q), _rotation(k)
    if of_q is None or of_k is None or not torch.equal(of_q.frequencies, of_k.frequencies):
        return q, k, [None, None]
    inside = counts(of_q.rope.inputs[1]) and counts(of_k.rope.inputs[1])
    if not inside or 2 * len(of_q.frequencies) % ROTATED:
        return q, k, [None, None]
    return of_q.before, of_k.before, [*_tables(low, of_q.frequencies)]


def _operands(low: Lowering, node: ir.Node, parts: list[Heads]) -> list[ir.Value | None]:
    """q, k and v for GroupQueryAttention: the packed output of one MatMulNBits where their linears are alike, else apart.

    No other linears are fused: gate and up as one product would need a Split, which costs more than the fusion saves.
    """
    family = [p.flat.producer() for p in parts]
    linears = [n for n in family if n is not None and n.domain == DOMAIN and n.op_type == "QuantizedLinear"]

    def form(n: ir.Node) -> Any:
        return n.inputs[0], attr(n, "bits"), attr(n, "group_size"), has_bias(n)

    if len(linears) < 3 or len({form(n) for n in linears}) > 1:
        return [p.flat for p in parts]
    return [matmul(low, linears, before=node), None, None]


def lower_rope(low: Lowering, node: ir.Node) -> None:
    """RotaryEmbedding with tables, for a query or key that GroupQueryAttention does not rotate."""
    x, positions, inv_freq = node.inputs[:3]
    heads, dim = dims(x)

    def rows() -> ir.Value:
        batch = low.one(node, "Shape", [low.graph.inputs[0]], start=0, end=1)
        shape = low.one(node, "Concat", [batch, low.one(node, "Shape", [positions])], axis=0)
        return low.one(node, "Expand", [positions, shape])

    inputs = [flat(low, x, node), low.built(("rows", positions), rows)]
    inputs += _tables(low, torch_tensor(inv_freq).to(torch.float32))
    rotated = low.one(node, "RotaryEmbedding", [*inputs], domain=MS)
    low.replace(node, [low.one(node, "Reshape", [rotated, low.ints(0, 0, heads, dim)])])


# ---- GroupQueryAttention --------------------------------------------------------------------------------------------


def lower_cached_attention(low: Lowering, node: ir.Node) -> None:
    """GroupQueryAttention with past and present in one buffer. It rotates q and k where positions go on from past_length."""
    q_in, k_in, v, k_cache, v_cache, past = node.inputs[:6]
    if dims(q_in)[1] % HEAD:
        return over_its_cache(low, node, [])
    q, k, tables = _rotary_inside(low, q_in, k_in, lambda positions: _counts_on(positions, past))
    assert v is not None
    assert past is not None
    parts = [_heads(low, q, node), _heads(low, k, node), _heads(low, v, node)]
    operands = _operands(low, node, parts)
    total = low.built(("total", past), lambda: _total_length(low, past))
    lengths = low.built(("lengths", past), lambda: _seqlens(low, total))
    window = int(attr(node, "window"))
    inputs = [*operands, k_cache, v_cache, lengths, total, *tables]
    return low.replace(node, list(_group_query_attention(low, node, inputs, parts, local_window_size=window or -1)))


def lower_bidirectional_attention(low: Lowering, node: ir.Node) -> None:
    """GroupQueryAttention that is not causal, with the mask as a bias; soft-capping comes before the bias."""
    q_in, k_in, v, mask = node.inputs[:4]
    assert v is not None
    assert mask is not None
    if dims(q_in)[1] % HEAD or not low.has("GroupQueryAttention", "causal"):
        keys, values = (low.one(node, "Transpose", [x], perm=[0, 2, 1, 3]) for x in (k_in, v))
        return low.replace(node, [attend(low, node, q_in, dims(k_in)[0], [Part(keys, values, mask)])])
    q, k, tables = _rotary_inside(low, q_in, k_in, _counts_from_zero)
    parts = [_heads(low, q, node), _heads(low, k, node), _heads(low, v, node)]
    operands = _operands(low, node, parts)
    total = low.built("source_total", lambda: _source_length(low, node, mask))
    lengths = low.built("source_lengths", lambda: _seqlens(low, total))
    inputs = [*operands, None, None, lengths, total, *tables, None, float_mask(low, mask)]
    out, _, _ = _group_query_attention(low, node, inputs, parts, local_window_size=-1, causal=0)
    return low.replace(node, [out])


def _group_query_attention(
    low: Lowering,
    node: ir.Node,
    inputs: list[ir.Value | None],
    parts: list[Heads],
    local_window_size: int,
    **others: int,
) -> tuple[ir.Value, ...]:
    """The kernel for q, k and v as `parts`; inputs 7 and 8 are the rotary tables, or None where it does not rotate."""
    return low.emit(
        node,
        "GroupQueryAttention",
        inputs,
        outputs=3,
        domain=MS,
        num_heads=parts[0].heads,
        kv_num_heads=parts[1].heads,
        scale=float(attr(node, "scale")),
        softcap=float(attr(node, "softcap")),
        local_window_size=local_window_size,
        do_rotary=int(inputs[7] is not None),
        rotary_interleaved=0,
        **others,
    )


def _counts_on(positions: ir.Value | None, past: ir.Value | None) -> bool:
    add = positions.producer() if positions is not None else None
    if add is None or add.op_type != "Add" or past not in add.inputs:
        return False
    other = add.inputs[1] if add.inputs[0] is past else add.inputs[0]
    return _counts_from_zero(other)


def _counts_from_zero(positions: ir.Value | None) -> bool:
    numbers = positions.producer() if positions is not None else None
    if numbers is None or numbers.op_type != "Range":
        return False
    start, _, step = numbers.inputs
    return _is(start, 0) and _is(step, 1)


def _is(value: ir.Value | None, number: int) -> bool:
    constant = value.const_value if value is not None else None
    return constant is not None and constant.size == 1 and int(constant.numpy().item()) == number


def _total_length(low: Lowering, past: ir.Value) -> ir.Value:
    """past + new tokens, int32 scalar."""
    anchor = first_node(low)
    length = low.one(anchor, "Shape", [low.graph.inputs[0]], start=1, end=2)
    scalar = low.one(anchor, "Squeeze", [low.one(anchor, "Add", [past, length])])
    return low.one(anchor, "Cast", [scalar], to=ir.DataType.INT32)


def _source_length(low: Lowering, node: ir.Node, mask: ir.Value) -> ir.Value:
    """Positions of an encoder, of which all layers have the same: the last of a mask's four dimensions, int32 scalar.

    They are no graph input's where convolutions stand before the layers; and who asks a query keeps what made it.
    """
    length = low.one(node, "Shape", [mask], start=3, end=4)
    return low.one(node, "Cast", [low.one(node, "Squeeze", [length])], to=ir.DataType.INT32)


def _seqlens(low: Lowering, total: ir.Value) -> ir.Value:
    """total - 1 for every row of the batch, int32 [B]."""
    producer = total.producer()
    assert producer is not None
    batch_node = ir.node("Shape", [low.graph.inputs[0]], {"start": 0, "end": 1})
    less = ir.node("Sub", [total, low.constant(np.array(1, np.int32))])
    expand = ir.node("Expand", [less.outputs[0], batch_node.outputs[0]])
    low.graph.insert_after(producer, [batch_node, less, expand])
    return expand.outputs[0]
