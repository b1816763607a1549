"""Rewrites of attention over caches in int8: each node is pointed at its function in `attention_int8`."""

from __future__ import annotations

from torch import fx

from .. import attention_int8, lowerings
from .attention import groups_of, window_of
from .rewriting import Rewriting


def quantize(rewriting: Rewriting, node: fx.Node) -> None:
    node.target = attention_int8.quantize_kv


def append(rewriting: Rewriting, node: fx.Node) -> None:
    cache, new, past_length = node.args
    assert isinstance(past_length, fx.Node)
    node.target = attention_int8.append_kv
    node.args = (cache, new, rewriting.start(past_length))


def causal(rewriting: Rewriting, node: fx.Node) -> None:
    q, keys, key_scales, values, value_scales, positions, scale, softcap, window = node.args
    slots = rewriting.input(-1)
    bias = rewriting.once(lowerings.causal_bias, positions, slots, window_of(rewriting, window))
    bias = rewriting.once(lowerings.per_group, bias, groups_of(q, keys))
    node.target = attention_int8.causal_attention
    node.args = (q, (keys, key_scales), (values, value_scales), bias, slots, scale, softcap)


def biased(rewriting: Rewriting, node: fx.Node) -> None:
    q, keys, key_scales, values, value_scales, positions, distances, scale = node.args
    slots = rewriting.input(-1)
    causal = rewriting.once(lowerings.causal_bias, positions, slots, 0)
    bias = rewriting.once(lowerings.biased, distances, positions, slots, causal)
    bias = rewriting.once(lowerings.groups_below, bias, groups_of(q, keys))
    node.target = attention_int8.causal_attention
    node.args = (q, (keys, key_scales), (values, value_scales), bias, slots, scale, 0.0)


def cross(rewriting: Rewriting, node: fx.Node) -> None:
    q, keys, key_scales, values, value_scales, mask, scale, softcap = node.args
    bias = rewriting.once(lowerings.mask_bias, mask)
    node.target = attention_int8.cross_attention
    node.args = (q, (keys, key_scales), (values, value_scales), bias, scale, softcap)


def merged(rewriting: Rewriting, node: fx.Node) -> None:
    q, *caches = node.args[:9]  # codes and scales of the own keys, values, and the encoder's keys, values
    mask, positions, scale, softcap, window = node.args[9:]
    slots = rewriting.input(-1)
    bias = rewriting.once(lowerings.causal_bias, positions, slots, window_of(rewriting, window))
    bias = rewriting.once(lowerings.merged_bias, bias, mask)
    bias = rewriting.once(lowerings.per_group, bias, groups_of(q, caches[0]))
    node.target = attention_int8.merged_attention
    pairs = [(caches[i], caches[i + 1]) for i in range(0, 8, 2)]
    node.args = (q, *pairs, bias, slots, scale, softcap)
