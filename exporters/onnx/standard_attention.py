"""Rotary embedding and attention in the standard's own ops.

The heads that share a key head are folded into the query axis, so that no key is repeated. Soft-capping comes before the mask,
which is added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
import torch

from ...targets.onnx.nodes import attr
from .dialect import MASKED, StandardLowering
from .lowering import Lowering, dims, kv_heads_of, operands, torch_tensor
from .positions import causal_mask, distances_back, new_positions


def _heads_first(low: StandardLowering, node: ir.Node, value: ir.Value | None) -> ir.Value:
    """[B, S, heads, D] as [B, heads, S, D] in the matrix type."""
    return low.narrow(node, low.one(node, "Transpose", [value], perm=[0, 2, 1, 3]))


def _bias(low: StandardLowering, node: ir.Node, allowed: ir.Value) -> ir.Value:
    """A bool mask as what is added to the scores, made once for each mask."""
    return low.built(
        ("bias", allowed),
        lambda: low.one(node, "Where", [allowed, low.scalar(0.0, True), low.scalar(MASKED, True)]),
    )


Part = tuple[ir.Value, ir.Value, ir.Value]
"""Keys and values [B, KV, T, D], and which of them a query sees: bool, broadcastable to [B, 1, S, T]."""


def _attend(
    low: StandardLowering,
    node: ir.Node,
    q: ir.Value | None,
    kv_heads: int,
    parts: Sequence[Part],
    added: ir.Value | None = None,
) -> ir.Value:
    """Attention of q [B, S, H, D] to all `parts` under one softmax. Gives float32 [B, S, H * D].

    added: goes to the scores of a single part in the place of its mask, [H, S, T].
    """
    heads, dim = dims(q)
    scale = float(attr(node, "scale"))
    cap = float(attr(node, "softcap")) if "softcap" in node.attributes else 0.0
    scaled = low.one(node, "Mul", [q, low.scalar(scale / cap if cap else scale, False)])
    scaled = _heads_first(low, node, scaled)
    folded = low.one(node, "Reshape", [scaled, low.ints(0, kv_heads, -1, dim)])
    masked = []
    for keys, _, allowed in parts:
        scores = low.one(node, "MatMul", [folded, low.one(node, "Transpose", [keys], perm=[0, 1, 3, 2])])
        if heads != kv_heads:
            scores = low.one(node, "Reshape", [scores, low.ints(0, heads, -1, 0)])
        if cap:
            scores = low.one(node, "Mul", [low.one(node, "Tanh", [scores]), low.scalar(cap, True)])
        masked.append(low.one(node, "Add", [scores, _bias(low, node, allowed) if added is None else added]))
    together = low.one(node, "Concat", [*masked], axis=3) if len(masked) > 1 else masked[0]
    weights = low.one(node, "Softmax", [together], axis=-1)
    if heads != kv_heads:
        weights = low.one(node, "Reshape", [weights, low.ints(0, kv_heads, -1, 0)])
    apart = _split(low, node, weights, [keys for keys, _, _ in parts])
    sums = [low.one(node, "MatMul", [w, values]) for w, (_, values, _) in zip(apart, parts, strict=True)]
    attended = sums[0]
    for other in sums[1:]:
        attended = low.one(node, "Add", [attended, other])
    attended = low.one(node, "Reshape", [attended, low.ints(0, heads, -1, dim)])
    back = low.one(node, "Transpose", [attended], perm=[0, 2, 1, 3])
    return low.widen(node, low.one(node, "Reshape", [back, low.ints(0, 0, heads * dim)]))


def _split(low: StandardLowering, node: ir.Node, weights: ir.Value, keys: Sequence[ir.Value]) -> tuple[ir.Value, ...]:
    """Attention weights [B, KV, …, T] as those of each of `keys`, which make up T."""
    if len(keys) == 1:
        return (weights,)
    known = [k.shape[2] if k.shape is not None else None for k in keys]
    if all(isinstance(n, int) for n in known):
        sizes = low.ints(*known)  # type: ignore[arg-type]
    else:
        lengths = [low.one(node, "Shape", [k], start=2, end=3) for k in keys]
        sizes = low.one(node, "Concat", [*lengths], axis=0)
    return low.emit(node, "Split", [weights, sizes], outputs=len(keys), axis=3)


def lower_cached_attention(low: StandardLowering, node: ir.Node) -> None:
    (past,) = operands(node, 5, 6)
    _over_its_cache(low, node, past, [])


def lower_biased_attention(low: StandardLowering, node: ir.Node) -> None:
    past, distances = operands(node, 5, 7)
    _over_its_cache(low, node, past, [], distances)


def lower_merged_attention(low: StandardLowering, node: ir.Node) -> None:
    cross_k, cross_v, mask, past = operands(node, 5, 9)
    _over_its_cache(low, node, past, [(_narrowed(low, node, cross_k), _narrowed(low, node, cross_v), mask)])


def _narrowed(low: StandardLowering, node: ir.Node, value: ir.Value) -> ir.Value:
    """`value` in the matrix type, with its shape."""
    narrow = low.narrow(node, value)
    narrow.shape = value.shape
    return narrow


def _over_its_cache(
    low: StandardLowering, node: ir.Node, past: ir.Value, others: Sequence[Part], distances: ir.Value | None = None
) -> None:
    """Write the new keys and values into the caches, attend to these and to `others`. distances: of a relative bias, [M, H]."""
    q, k, v, k_cache, v_cache = operands(node, 0, 5)
    positions = low.built(("positions", past), lambda: new_positions(low, node, past, q))
    kv_heads, _ = dims(k)
    caches = []
    for cache, new in ((k_cache, k), (v_cache, v)):
        written = low.dialect.write_cache(low, node, cache, _heads_first(low, node, new), past, positions)
        written.shape, written.type = cache.shape, cache.type
        caches.append(written)
    window = int(attr(node, "window")) if "window" in node.attributes else 0
    allowed = _causal(low, node, k_cache, positions, window)
    parts: list[Part] = [(caches[0], caches[1], allowed), *others]
    added = None if distances is None else _biased(low, node, k_cache, positions, distances, allowed)
    attended = _attend(low, node, q, kv_heads, parts, added)
    low.replace(node, [attended, *caches])
    for cache, source in zip(caches, (k_cache, v_cache), strict=True):
        cache.type = source.type


def lower_shared_attention(low: StandardLowering, node: ir.Node) -> None:
    q, k_cache, v_cache, positions = operands(node, 0, 4)
    keys, values = _narrowed(low, node, k_cache), _narrowed(low, node, v_cache)
    allowed = _causal(low, node, k_cache, positions, int(attr(node, "window")))
    low.replace(node, [_attend(low, node, q, kv_heads_of(k_cache), [(keys, values, allowed)])])


def _causal(low: StandardLowering, node: ir.Node, cache: ir.Value, positions: ir.Value, window: int) -> ir.Value:
    """`causal_mask`, made once for all layers."""
    return low.built(("causal", positions, window), lambda: causal_mask(low, node, cache, positions, window))


def _biased(
    low: StandardLowering,
    node: ir.Node,
    cache: ir.Value,
    positions: ir.Value,
    distances: ir.Value,
    allowed: ir.Value,
) -> ir.Value:
    """A relative bias of distances [M, H] and the mask, [H, S, T], made once for all layers that share them."""
    assert distances.shape is not None
    rows = int(distances.shape[0])  # type: ignore[arg-type]

    def build() -> ir.Value:
        back = distances_back(low, node, cache, positions, rows - 1)
        by_head = low.one(node, "Transpose", [low.narrow(node, distances)], perm=[1, 0])
        return low.one(node, "Add", [low.one(node, "Gather", [by_head, back], axis=1), _bias(low, node, allowed)])

    return low.built(("biased", distances, positions), build)


def lower_bidirectional_attention(low: StandardLowering, node: ir.Node) -> None:
    q, k, v, mask = operands(node, 0, 4)
    kv_heads, _ = dims(k)
    keys, values = _heads_first(low, node, k), _heads_first(low, node, v)
    low.replace(node, [_attend(low, node, q, kv_heads, [(keys, values, mask)])])


def lower_cross_attention(low: StandardLowering, node: ir.Node) -> None:
    q, k, v, mask = operands(node, 0, 4)
    part = (low.narrow(node, k), low.narrow(node, v), mask)
    low.replace(node, [_attend(low, node, q, kv_heads_of(k), [part])])


def lower_rope(low: StandardLowering, node: ir.Node) -> None:
    """Rotated halves in float32, cosines and sines from tables: float16 cannot tell large angles apart."""
    x, positions, inv_freq = operands(node, 0, 3)
    _, dim = dims(x)
    frequencies = torch_tensor(inv_freq).to(torch.float32)

    def table(function: Callable[[torch.Tensor], torch.Tensor]) -> ir.Value:
        angles = torch.arange(low.max_positions, dtype=torch.float32).unsqueeze(-1) * frequencies
        rows = low.float_tensor(f"rope.{function.__name__}", function(angles))
        gathered = low.one(node, "Gather", [rows, positions], axis=0)
        return low.one(node, "Unsqueeze", [gathered, low.ints(1)])  # [S, 1, D / 2]

    key = (positions, tuple(frequencies.tolist()))
    cos = low.built(("cos", *key), lambda: table(torch.cos))
    sin = low.built(("sin", *key), lambda: table(torch.sin))
    first, second = low.emit(node, "Split", [x, low.ints(dim // 2, dim // 2)], outputs=2, axis=-1)

    def product(a: ir.Value, b: ir.Value) -> ir.Value:
        return low.one(node, "Mul", [a, b])

    turned_first = low.one(node, "Sub", [product(first, cos), product(second, sin)])
    turned_second = low.one(node, "Add", [product(second, cos), product(first, sin)])
    low.replace(node, [low.one(node, "Concat", [turned_first, turned_second], axis=-1)])


def scatter_slots(
    low: Lowering, node: ir.Node, cache: ir.Value, new: ir.Value, past: ir.Value, positions: ir.Value
) -> ir.Value:
    """The cache after ScatterElements: its rows `positions` (axis 2) become those of `new` [B, KV, S, D]."""

    def indices() -> ir.Value:
        column = low.one(node, "Unsqueeze", [positions, low.ints(1)])
        return low.one(node, "Expand", [column, low.one(node, "Shape", [new])])

    assert cache.shape is not None
    rows = low.built(("slots", positions, cache.shape[1], cache.shape[3]), indices)
    return low.one(node, "ScatterElements", [cache, rows, new], axis=2)
