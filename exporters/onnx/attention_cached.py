"""Attention on ONNX Runtime's CPU kernels without GroupQueryAttention: merged, shared and cross attention, heads of any size.

A cache is written in place: past and present are one buffer (`runtimes.onnx`). What the kernels do is tested in
tests/exporters/onnx/test_onnx_attention_facts.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ...targets.onnx.nodes import attr
from .lowering import MS, Lowering, dims, kv_heads_of
from .positions import causal_mask, distances_back, new_positions
from .standard_attention import scatter_slots

MASKED = float(np.finfo(np.float32).min)
"""What is added to a masked score. A row that is masked throughout must stay finite: later layers read padding rows too."""


# ---- operands -------------------------------------------------------------------------------------------------------


def flat(low: Lowering, value: ir.Value | None, before: ir.Node) -> ir.Value:
    """[B, S, heads, D] as [B, S, heads * D]: the input of the Reshape that made the heads, else the output of a new Reshape."""
    assert value is not None
    reshape = value.producer()
    if reshape is not None and reshape.op_type == "Reshape" and reshape.domain == "":
        source = reshape.inputs[0]
        if source is not None and source.shape is not None and len(source.shape) == 3:
            return source
    heads, dim = dims(value)
    return low.one(before, "Reshape", [value, low.ints(0, 0, heads * dim)])


def first_node(low: Lowering) -> ir.Node:
    return next(iter(low.graph))


def float_mask(low: Lowering, mask: ir.Value) -> ir.Value:
    """A bool mask as 0 or the lowest float, made once for each mask."""

    def build() -> ir.Value:
        where = ir.node(
            "Where", [mask, low.constant(np.array(0.0, np.float32)), low.constant(np.array(MASKED, np.float32))]
        )
        producer = mask.producer()
        if producer is None:
            low.graph.insert_before(first_node(low), where)
        else:
            low.graph.insert_after(producer, where)
        return where.outputs[0]

    return low.built(("bias", mask), build)


# ---- the ops --------------------------------------------------------------------------------------------------------


def lower_merged_attention(low: Lowering, node: ir.Node) -> None:
    """One softmax over the own cache and the encoder's keys. The scores are computed apart, so that no key is copied."""
    cross_k, cross_v, mask = node.inputs[5:8]
    over_its_cache(low, node, [Part(cross_k, cross_v, mask)])


def lower_shared_attention(low: Lowering, node: ir.Node) -> None:
    """Over the filled slots of a cache that another layer wrote."""
    q, k_cache, v_cache, positions = node.inputs[:4]
    assert positions is not None
    keys, values = (in_use(low, node, cache, positions) for cache in (k_cache, v_cache))
    window = int(attr(node, "window"))
    allowed = low.built(("seen", positions, window), lambda: causal_mask(low, node, keys, positions, window))
    low.replace(node, [attend(low, node, q, kv_heads_of(k_cache), [Part(keys, values, allowed)])])


def in_use(low: Lowering, node: ir.Node, cache: ir.Value | None, positions: ir.Value | None) -> ir.Value:
    """The slots of a cache [B, KV, C, N] up to the last of the positions; cut out once for all layers that share it."""

    def used() -> ir.Value:
        last = low.one(node, "ReduceMax", [positions, low.ints(0)], keepdims=1)
        return low.one(node, "Add", [last, low.ints(1)])

    inputs = [cache, low.ints(0), low.built(("used", positions), used), low.ints(2)]
    return low.built(("cut", cache, positions), lambda: low.one(node, "Slice", inputs))


class Part(NamedTuple):
    """Keys and values [B, KV, T, D], and which of them a query sees: bool, broadcastable to [B, 1, S, T].

    With scales [B, KV, T, 1] they are int8 codes. added: goes to the scores in the place of the mask, [H, S, T].
    """

    keys: ir.Value | None
    values: ir.Value | None
    allowed: ir.Value | None
    key_scales: ir.Value | None = None
    value_scales: ir.Value | None = None
    added: ir.Value | None = None


def starts(low: Lowering, node: ir.Node, past: ir.Value | None) -> ir.Value:
    """past [1] for every row of the batch, int64 [B]: where TensorScatter writes."""

    def build() -> ir.Value:
        batch = low.one(node, "Shape", [low.graph.inputs[0]], start=0, end=1)
        return low.one(node, "Expand", [past, batch])

    return low.built(("starts", past), build)


def write(low: Lowering, node: ir.Node, cache: ir.Value | None, new: ir.Value | None, past: ir.Value) -> ir.Value:
    """The cache [B, KV, C, N] with `new` [B, KV, S, N] behind its first `past`; both ops write in place."""
    assert cache is not None
    if low.has("TensorScatter"):
        return low.one(node, "TensorScatter", [cache, new, starts(low, node, past)], axis=-2)
    assert new is not None
    positions = low.built(("positions", past), lambda: new_positions(low, node, past, low.graph.inputs[0]))
    return scatter_slots(low, node, cache, new, past, positions)


def over_its_cache(low: Lowering, node: ir.Node, others: Sequence[Part], distances: ir.Value | None = None) -> None:
    """Write the new keys and values into the caches, and attend to them and to `others`.

    distances: of a relative bias, [M, H].
    """
    q, k, v, k_cache, v_cache = node.inputs[:5]
    past = node.inputs[8 if others else 5]
    assert past is not None

    def written(cache: ir.Value | None, new: ir.Value | None) -> ir.Value:
        turned = low.one(node, "Transpose", [new], perm=[0, 2, 1, 3])
        return write(low, node, cache, turned, past)

    caches = [written(k_cache, k), written(v_cache, v)]
    window = int(attr(node, "window")) if "window" in node.attributes else 0
    positions = low.built(("positions", past), lambda: new_positions(low, node, past, low.graph.inputs[0]))
    allowed = low.built(("causal", past, window), lambda: causal_mask(low, node, caches[0], positions, window))
    own = Part(caches[0], caches[1], allowed)
    parts = [own if distances is None else biased(low, node, own, distances, positions), *others]
    low.replace(node, [attend(low, node, q, kv_heads_of(k_cache), parts), *caches])


def lower_biased_attention(low: Lowering, node: ir.Node) -> None:
    over_its_cache(low, node, [], node.inputs[6])


def biased(low: Lowering, node: ir.Node, part: Part, distances: ir.Value, positions: ir.Value | None) -> Part:
    """The keys and values of a cache with a relative bias of distances [M, H]; what is added is made once for all layers."""
    assert part.keys is not None
    assert part.allowed is not None
    assert distances.shape is not None
    keys, mask, rows = part.keys, float_mask(low, part.allowed), int(distances.shape[0])  # type: ignore[arg-type]

    def build() -> ir.Value:
        back = distances_back(low, node, keys, positions, rows - 1)
        by_head = low.one(node, "Transpose", [distances], perm=[1, 0])
        return low.one(node, "Add", [low.one(node, "Gather", [by_head, back], axis=1), mask])

    return part._replace(added=low.built(("biased", distances, positions), build))


def attend(low: Lowering, node: ir.Node, q: ir.Value | None, kv_heads: int, parts: Sequence[Part]) -> ir.Value:
    """Attention of q [B, S, H, D] to all `parts` under one softmax, [B, S, H * D].

    The heads that share a key head are folded into the query axis, so that no key is repeated. Soft-capping comes before the mask.
    The scale of a key or value multiplies a column of the scores: codes are not multiplied one by one.
    """
    heads, dim = dims(q)
    cap = float(attr(node, "softcap")) if "softcap" in node.attributes else 0.0
    scale = float(attr(node, "scale")) / (cap or 1.0)
    folded = low.one(node, "Transpose", [q], perm=[0, 2, 1, 3])
    folded = low.one(node, "Reshape", [folded, low.ints(0, kv_heads, -1, dim)])
    scores = []
    for keys, _, allowed, key_scales, _, added in parts:
        assert allowed is not None
        floats = keys if key_scales is None else low.one(node, "Cast", [keys], to=ir.DataType.FLOAT)
        part = low.one(node, "FusedMatMul", [folded, floats], domain=MS, transB=1, alpha=scale)
        part = part if key_scales is None else _scaled(low, node, part, key_scales)
        part = low.one(node, "Reshape", [part, low.ints(0, heads, -1, 0)])
        if cap:
            cap_value = low.constant(np.array(cap, np.float32))
            part = low.one(node, "Mul", [low.one(node, "Tanh", [part]), cap_value])
        scores.append(low.one(node, "Add", [part, float_mask(low, allowed) if added is None else added]))
    together = low.one(node, "Concat", [*scores], axis=3) if len(scores) > 1 else scores[0]
    weights = low.one(node, "Softmax", [together], axis=-1)
    weights = low.one(node, "Reshape", [weights, low.ints(0, kv_heads, -1, 0)])
    apart: tuple[ir.Value, ...] = (weights,)
    if len(parts) > 1:
        lengths = [low.one(node, "Shape", [p.keys], start=2, end=3) for p in parts]
        sizes = low.one(node, "Concat", [*lengths], axis=0)
        apart = low.emit(node, "Split", [weights, sizes], outputs=len(parts), axis=3)
    sums = []
    for share, (_, values, _, _, value_scales, _) in zip(apart, parts, strict=True):
        if value_scales is not None:
            share = _scaled(low, node, share, value_scales)
            values = low.one(node, "Cast", [values], to=ir.DataType.FLOAT)
        sums.append(low.one(node, "MatMul", [share, values]))
    attended = sums[0]
    for other in sums[1:]:
        attended = low.one(node, "Add", [attended, other])
    attended = low.one(node, "Reshape", [attended, low.ints(0, heads, -1, dim)])
    back = low.one(node, "Transpose", [attended], perm=[0, 2, 1, 3])
    return low.one(node, "Reshape", [back, low.ints(0, 0, heads * dim)])


def _scaled(low: Lowering, node: ir.Node, scores: ir.Value, scales: ir.Value) -> ir.Value:
    """scores [B, KV, rows, T] times scales [B, KV, T, 1]."""
    return low.one(node, "Mul", [scores, low.one(node, "Transpose", [scales], perm=[0, 1, 3, 2])])


def lower_cross_attention(low: Lowering, node: ir.Node) -> None:
    """The standard's Attention (opset 24): the only CPU kernel with soft-capping whose query and key lengths may differ."""
    q, k, v, mask = node.inputs[:4]
    if not low.has("Attention"):
        return low.replace(node, [attend(low, node, q, kv_heads_of(k), [Part(k, v, mask)])])
    heads, dim = dims(q)
    rows = _mask_rows(low, node, mask, q)
    q_first = low.one(node, "Transpose", [q], perm=[0, 2, 1, 3])
    attended = low.one(
        node,
        "Attention",
        [q_first, k, v, rows],
        scale=float(attr(node, "scale")),
        softcap=float(attr(node, "softcap")),
    )
    back = low.one(node, "Transpose", [attended], perm=[0, 2, 1, 3])
    return low.replace(node, [low.one(node, "Reshape", [back, low.ints(0, 0, heads * dim)])])


def _mask_rows(low: Lowering, node: ir.Node, mask: ir.Value | None, q: ir.Value | None) -> ir.Value:
    """A mask [B, 1, 1, T] as [B, 1, S, T], S as long as q [B, S, H, D]: the kernel does not broadcast over queries."""
    assert q is not None
    assert q.shape is not None

    def build() -> ir.Value:
        one = low.ints(1)
        shape = low.one(node, "Concat", [one, one, low.one(node, "Shape", [q], start=1, end=2), one], axis=0)
        return low.one(node, "Expand", [mask, shape])

    length = q.shape[1]  # queries of one known length share their rows
    known = length if isinstance(length, int) else length.value
    return low.built(("rows", mask, q if known is None else known), build)
