"""Rotary embedding and attention as MIL operations.

Scores are float16, angles float32. Query heads that share a key head are rows of one product, so that no key is copied.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ...targets.coreml.library import Builder as mb
from .builder import Lowering, scaled

MASKED = -30000.0
"""A masked score. It is finite, as in the reference, so that a row that is masked throughout stays finite; its exp is 0."""


def rope(low: Lowering, _: Any, x: Any, positions: Any, inv_freq: torch.Tensor) -> Any:
    cos, sin = low.once(
        ("rope", id(positions), inv_freq.numpy().tobytes()), lambda: _rotation(low, positions, inv_freq)
    )
    half = inv_freq.shape[0]
    x1, x2 = mb.split(x=x, split_sizes=[half, half], axis=-1)
    first = mb.sub(x=mb.mul(x=x1, y=cos), y=mb.mul(x=x2, y=sin))
    second = mb.add(x=mb.mul(x=x2, y=cos), y=mb.mul(x=x1, y=sin))
    return mb.concat(values=[first, second], axis=-1)


def _rotation(low: Lowering, positions: Any, inv_freq: torch.Tensor) -> tuple[Any, Any]:
    """cos and sin [seq, 1, half] in float16, of float32 angles moved into [-pi, pi], as fast sines on GPUs want them."""
    column = mb.expand_dims(x=mb.cast(x=low.var(positions), dtype="fp32"), axes=[1, 2])
    angles = mb.mul(x=column, y=low.constants.array(inv_freq.numpy().reshape(1, 1, -1)))
    turns = mb.round(x=mb.mul(x=angles, y=low.constants.array(np.float32(0.5 / math.pi))))
    # 2 pi in two parts: the first has few enough digits that its product with `turns` is exact.
    angles = mb.sub(x=angles, y=mb.mul(x=turns, y=low.constants.array(np.float32(6.28125))))
    angles = mb.sub(x=angles, y=mb.mul(x=turns, y=low.constants.array(np.float32(2 * math.pi - 6.28125))))
    return mb.cast(x=mb.cos(x=angles), dtype="fp16"), mb.cast(x=mb.sin(x=angles), dtype="fp16")


def _attend(low: Lowering, q: Any, k: Any, v: Any, allowed: Any, scale: float, softcap: float, bias: Any = None) -> Any:
    """q [1, S, H, D]; k, v [1, KV, T, D]; allowed bool [S or 1, T]; bias [H, S, T]. Returns [1, S, H * D]."""
    rows = _rows(low, q, k.shape[1], scale)
    scores = _scores(low, rows, k, allowed, q.shape[2] // k.shape[1], softcap, bias)
    return _unfold(mb.matmul(x=mb.softmax(x=scores, axis=-1), y=mb.squeeze(x=v, axes=[0])), q)


def _rows(low: Lowering, q: Any, kv_heads: int, scale: float) -> Any:
    """q [1, S, H, D] as [KV, H / KV * S, D]: the queries of a key head are the rows of one product."""
    rows = mb.transpose(x=mb.squeeze(x=scaled(low, q, scale), axes=[0]), perm=[1, 0, 2])
    return mb.reshape(x=rows, shape=[kv_heads, -1, q.shape[3]])


def _scores(low: Lowering, rows: Any, k: Any, allowed: Any, groups: int, softcap: float, bias: Any = None) -> Any:
    """Masked scores [KV, H / KV * S, T] of rows [KV, H / KV * S, D] and keys k [1, KV, T, D], with a bias [H, S, T]."""
    scores = mb.matmul(x=rows, y=mb.squeeze(x=k, axes=[0]), transpose_y=True)
    if softcap:
        scores = mb.mul(x=mb.tanh(x=mb.real_div(x=scores, y=low.half(softcap))), y=low.half(softcap))
    if bias is not None:
        below = bias if groups == 1 else mb.reshape(x=bias, shape=[k.shape[1], -1, k.shape[2]])
        scores = mb.add(x=scores, y=below)
    if groups > 1 and allowed.shape[0] != 1:
        allowed = low.once(("groups", id(allowed), groups), lambda: mb.concat(values=[allowed] * groups, axis=0))
    allowed = low.once(("mask", id(allowed)), lambda: mb.expand_dims(x=allowed, axes=[0]))
    return mb.select(cond=allowed, a=scores, b=low.half(MASKED))


def _unfold(out: Any, q: Any) -> Any:
    """[KV, H / KV * S, D] -> [1, S, H * D]."""
    heads, dim = q.shape[2], q.shape[3]
    out = mb.transpose(x=mb.reshape(x=out, shape=[heads, -1, dim]), perm=[1, 0, 2])
    return mb.reshape(x=out, shape=[1, -1, heads * dim])


def bidirectional_attention(
    low: Lowering, _: Any, q: Any, k: Any, v: Any, mask: Any, scale: float, softcap: float
) -> Any:
    k, v = mb.transpose(x=k, perm=[0, 2, 1, 3]), mb.transpose(x=v, perm=[0, 2, 1, 3])
    return _attend(low, q, k, v, _flat_mask(low, mask), scale, softcap)


def cross_attention(low: Lowering, _: Any, q: Any, k: Any, v: Any, mask: Any, scale: float, softcap: float) -> Any:
    return _attend(low, q, k, v, _flat_mask(low, mask), scale, softcap)


def _flat_mask(low: Lowering, mask: Any) -> Any:
    return low.once(("flat", id(mask)), lambda: mb.squeeze(x=low.var(mask), axes=[0, 1]))


def cached_attention(
    low: Lowering,
    node: Any,
    q: Any,
    k: Any,
    v: Any,
    k_cache: Any,
    v_cache: Any,
    past: Any,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[Any, Any, Any]:
    """Write new keys and values into the states with slice_update, then attend to all slots of the static cache."""
    keys, values, allowed = _appended(low, node, k, v, k_cache, v_cache, past, window)
    return _attend(low, q, keys, values, allowed, scale, softcap), keys, values


def biased_attention(
    low: Lowering,
    node: Any,
    q: Any,
    k: Any,
    v: Any,
    k_cache: Any,
    v_cache: Any,
    past: Any,
    distances: Any,
    scale: float,
) -> tuple[Any, Any, Any]:
    """As `cached_attention`; the bias is made once for all layers that share the distances [M, H]."""
    keys, values, allowed = _appended(low, node, k, v, k_cache, v_cache, past, 0)
    length, table = low.size(node.args[0].meta["val"].shape[1]), low.var(distances)
    bias = low.once(("biased", id(past), id(table)), lambda: _bias(low, past, length, keys.shape[2], table))
    return _attend(low, q, keys, values, allowed, scale, 0.0, bias), keys, values


def _bias(low: Lowering, past: Any, length: Any, capacity: int, distances: Any) -> Any:
    """[H, S, capacity]: what each head adds, by how far before the token a slot is."""
    back = mb.sub(x=mb.expand_dims(x=_positions(low, past, length), axes=[1]), y=_slots(low, capacity))
    back = mb.minimum(x=mb.maximum(x=back, y=np.int32(0)), y=np.int32(distances.shape[0] - 1))
    return mb.gather(x=mb.transpose(x=distances, perm=[1, 0]), indices=back, axis=1)


def merged_attention(
    low: Lowering,
    node: Any,
    q: Any,
    k: Any,
    v: Any,
    k_cache: Any,
    v_cache: Any,
    cross_k: Any,
    cross_v: Any,
    mask: Any,
    past: Any,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[Any, Any, Any]:
    """As `cached_attention`. The scores of the cache and of the encoder are joined for the softmax; the keys are not."""
    keys, values, allowed = _appended(low, node, k, v, k_cache, v_cache, past, window)
    kv_heads, capacity = keys.shape[1], keys.shape[2]
    rows, groups = _rows(low, q, kv_heads, scale), q.shape[2] // kv_heads
    own = _scores(low, rows, keys, allowed, groups, softcap)
    other = _scores(low, rows, cross_k, _flat_mask(low, mask), groups, softcap)
    shares = mb.softmax(x=mb.concat(values=[own, other], axis=-1), axis=-1)
    masks = [True, True, False]
    first = mb.slice_by_index(x=shares, begin=[0, 0, 0], end=[0, 0, capacity], begin_mask=[True] * 3, end_mask=masks)
    rest = mb.slice_by_index(x=shares, begin=[0, 0, capacity], end=[0, 0, 0], begin_mask=masks, end_mask=[True] * 3)
    parts = [mb.matmul(x=s, y=mb.squeeze(x=t, axes=[0])) for s, t in ((first, values), (rest, cross_v))]
    return _unfold(mb.add(x=parts[0], y=parts[1]), q), keys, values


def shared_attention(
    low: Lowering, _: Any, q: Any, keys: Any, values: Any, positions: Any, scale: float, window: int
) -> Any:
    """Over the caches that `cached_attention` returned."""
    positions, capacity = low.var(positions), keys.shape[2]
    slots = _slots(low, capacity)

    def seen() -> Any:
        own = mb.expand_dims(x=positions, axes=[1])
        upto = mb.less_equal(x=slots, y=own)
        if not window:
            return upto
        oldest = mb.sub(x=own, y=low.constants.array(np.array(window, np.int32)))
        return mb.logical_and(x=upto, y=mb.greater(x=slots, y=oldest))

    allowed = low.once(("seen", id(positions), capacity, window), seen)
    return _attend(low, q, keys, values, allowed, scale, 0.0)


def _appended(
    low: Lowering, node: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, past: Any, window: int
) -> tuple[Any, Any, Any]:
    """Both caches with the new keys and values written, and which slots each new token sees."""
    length = low.size(node.args[0].meta["val"].shape[1])
    begin, end = low.once(("span", id(past)), lambda: _span(low, past, length))
    keys, values = _append(low, k_cache, k, begin, end), _append(low, v_cache, v, begin, end)
    capacity = keys.shape[2]
    allowed = low.once(("causal", id(past), window, capacity), lambda: _causal(low, past, length, capacity, window))
    return keys, values, allowed


def _span(low: Lowering, past: Any, length: Any) -> tuple[Any, Any]:
    zero = low.constants.array(np.zeros(1, np.int32))
    end = mb.add(x=past, y=low.var(length))
    return mb.concat(values=[zero, zero, past, zero], axis=0), mb.concat(values=[zero, zero, end, zero], axis=0)


def _append(low: Lowering, state: Any, new: Any, begin: Any, end: Any) -> Any:
    cache = mb.slice_update(
        x=mb.read_state(input=state),
        update=mb.transpose(x=new, perm=[0, 2, 1, 3]),
        begin=begin,
        end=end,
        begin_mask=[True, True, False, True],
        end_mask=[True, True, False, True],
    )
    updated = mb.coreml_update_state(state=state, value=cache)
    low.written[id(updated)] = updated
    return updated


def _causal(low: Lowering, past: Any, length: Any, capacity: int, window: int) -> Any:
    """bool [S, capacity]: the slots that each new token sees."""
    position = mb.expand_dims(x=_positions(low, past, length), axes=[1])
    slots = _slots(low, capacity)
    allowed = mb.less_equal(x=slots, y=position)
    if window:
        oldest = mb.sub(x=position, y=np.int32(window))
        allowed = mb.logical_and(x=allowed, y=mb.greater(x=slots, y=oldest))
    return allowed


def _positions(low: Lowering, past: Any, length: Any) -> Any:
    """int32 [S]: the positions of the new tokens."""
    new = (
        low.constants.array(np.arange(length, dtype=np.int32))
        if isinstance(length, int)
        else mb.range_1d(start=np.int32(0), end=length, step=np.int32(1))
    )
    return mb.add(x=past, y=new)


def _slots(low: Lowering, capacity: int) -> Any:
    """int32 [1, capacity]: the slots of a cache."""
    return low.constants.array(np.arange(capacity, dtype=np.int32).reshape(1, -1))
