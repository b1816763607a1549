"""Rewrites of embeddings, rotary embedding and attention over float caches: each node is pointed at its function in `lowerings`."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .. import lowerings
from .patterns import joined_rest
from .rewriting import Rewriting

EW = torch.ops.edgewright


def embedding(rewriting: Rewriting, node: fx.Node) -> None:
    ids, codes, scales, bits, group = node.args
    assert isinstance(bits, int)
    assert isinstance(group, int)
    packed, factors = rewriting.value(codes), rewriting.value(scales)
    wide = lowerings.table_bits(bits)
    key = (codes.target, scales.target)  # type: ignore[union-attr]
    node.target = lowerings.quantized_embedding
    node.args = (
        ids,
        rewriting.constant(("rows", *key), lambda: lowerings.table(packed, bits, wide, factors.shape[1] * group)),
        rewriting.constant(("factors", *key), lambda: factors.to(torch.float16)),  # canonical scales: exact
        wide,
    )


def rope(rewriting: Rewriting, node: fx.Node) -> None:
    """Where only the first dimensions of a head are rotated and the others joined to them, all of the head is taken."""
    x, positions, inv_freq = node.args
    assert isinstance(inv_freq, fx.Node)
    values, joined = rewriting.value(inv_freq), joined_rest(node)
    result, x = (node, x) if joined is None else joined
    half, width = values.shape[0], int(x.meta["val"].shape[-1])  # type: ignore[union-attr]
    rates = rewriting.constant(("frequencies", inv_freq.target, width), lambda: lowerings.frequencies(values, width))
    tables = rewriting.once(lowerings.rotary_tables, positions, rates)
    cos, sin = (rewriting.once(operator.getitem, tables, i) for i in (0, 1))
    rotation = rewriting.constant(("rotation", half, width), lambda: lowerings.rotation(half, width))
    result.target = lowerings.rope
    result.args = (x, cos, sin, rotation)
    result.kwargs = {}


def bidirectional(rewriting: Rewriting, node: fx.Node) -> None:
    q, k, v, mask, scale, softcap = node.args
    node.target = lowerings.bidirectional_attention
    bias = rewriting.once(lowerings.per_group, rewriting.once(lowerings.mask_bias, mask), groups_of(q, k))
    node.args = (q, k, v, bias, scale, softcap)


def cross(rewriting: Rewriting, node: fx.Node) -> None:
    q, k, v, mask, scale, softcap = node.args
    node.target = lowerings.cross_attention
    node.args = (q, k, v, rewriting.once(lowerings.mask_bias, mask), scale, softcap)


def cached(rewriting: Rewriting, node: fx.Node) -> None:
    q, k, v, k_cache, v_cache, past_length, scale, softcap, window = node.args
    assert isinstance(past_length, fx.Node)
    start = rewriting.start(past_length)
    _pass_on_caches(rewriting, node, k_cache, v_cache)
    window = window_of(rewriting, window)
    if not softcap and not window:
        node.target = lowerings.flash_attention
        node.args = (q, (k, v), (k_cache, v_cache), start, scale)
        return
    bias = _causal_bias(rewriting, past_length, window)
    if softcap:
        node.target = lowerings.capped_attention
        bias = rewriting.once(lowerings.per_group, bias, groups_of(q, k))
        node.args = (q, (k, v), (k_cache, v_cache), start, bias, scale, softcap)
    else:
        node.target = lowerings.windowed_attention
        node.args = (q, (k, v), (k_cache, v_cache), start, bias, scale)


def biased(rewriting: Rewriting, node: fx.Node) -> None:
    """Spelled out over the filled part of the cache: the kernel takes a mask for all heads alone."""
    q, k, v, k_cache, v_cache, past_length, distances, scale = node.args
    assert isinstance(past_length, fx.Node)
    start = rewriting.start(past_length)
    _pass_on_caches(rewriting, node, k_cache, v_cache)
    causal = _causal_bias(rewriting, past_length, 0)
    positions = rewriting.once(lowerings.new_positions, past_length, rewriting.input(0))
    bias = rewriting.once(lowerings.biased, distances, positions, rewriting.input(-1), causal)
    bias = rewriting.once(lowerings.groups_below, bias, groups_of(q, k))
    node.target = lowerings.capped_attention
    node.args = (q, (k, v), (k_cache, v_cache), start, bias, scale, 0.0)


def merged(rewriting: Rewriting, node: fx.Node) -> None:
    q, k, v, k_cache, v_cache, cross_k, cross_v, mask, past_length, scale, softcap, window = node.args
    assert isinstance(past_length, fx.Node)
    start = rewriting.start(past_length)
    _pass_on_caches(rewriting, node, k_cache, v_cache)
    own = _causal_bias(rewriting, past_length, window_of(rewriting, window))
    bias = rewriting.once(lowerings.per_group, rewriting.once(lowerings.merged_bias, own, mask), groups_of(q, k))
    node.target = lowerings.merged_attention
    new, caches, cross_part = (k, v), (k_cache, v_cache), (cross_k, cross_v)
    node.args = (q, new, caches, cross_part, start, bias, rewriting.input(-1), scale, softcap)


def shared(rewriting: Rewriting, node: fx.Node) -> None:
    q, k_cache, v_cache, positions, scale, window = node.args
    start = rewriting.start(rewriting.past_length)
    bias = rewriting.once(lowerings.causal_bias, positions, rewriting.input(-1), window_of(rewriting, window))
    node.target = lowerings.shared_attention
    node.args = (q, k_cache, v_cache, start, bias, scale)


def groups_of(q: Any, k: Any) -> int:
    """Query heads to a key head."""
    return int(q.meta["val"].shape[2]) // int(k.meta["val"].shape[2])


def window_of(rewriting: Rewriting, window: Any) -> int:
    """The window, or 0 where it covers all of the cache."""
    return 0 if window >= rewriting.capacity else int(window)


def _causal_bias(rewriting: Rewriting, past_length: fx.Node, window: int) -> fx.Node:
    # XNNPACK takes the length of an input, such as the last one; it refuses a length computed from past_length.
    slots, ids = rewriting.input(-1), rewriting.input(0)
    positions = rewriting.once(lowerings.new_positions, past_length, ids)
    return rewriting.once(lowerings.causal_bias, positions, slots, window)


def _pass_on_caches(rewriting: Rewriting, node: fx.Node, k_cache: Any, v_cache: Any) -> None:
    """Whoever reads a cache that an attention returns reads the buffer that the attention writes."""
    rewriting.past_length = node.args[8] if node.target is EW.merged_attention.default else node.args[5]
    for user in list(node.users):
        if user.target is operator.getitem and user.args[1] != 0:
            user.replace_all_uses_with(k_cache if user.args[1] == 1 else v_cache)
            rewriting.graph.erase_node(user)
