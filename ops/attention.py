"""Rotary embedding and attention: bidirectional; over a cache that grows, or was written once, or by another layer; over both.

Heads stay in [batch, seq, heads, head_dim]; caches are [batch, kv_heads, capacity, head_dim]. Query head h reads key head
h // (heads / kv_heads). Soft-capping is `cap * tanh(scores / cap)`, before the mask, as in Gemma 2 (arXiv 2408.00118); 0 turns
it off.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .define import define


@define(fake=lambda x, positions, inv_freq: x.new_empty(x.shape))  # contiguous whatever the strides of x are
def rope(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864), halves rotated. x: [B, S, H, D]; positions: int64 [S]; inv_freq: [D / 2]."""
    angles = positions.to(torch.float32).unsqueeze(-1) * inv_freq  # [S, D / 2]
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


# ---- what the attentions share --------------------------------------------------------------------------------------


def attend(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float, softcap: float, bias: Tensor | None = None
) -> Tensor:
    """q [B, H, S, D]; k, v [B, KV, T, D]; allowed bool and bias, broadcastable to [B, H, S, T]. Returns [B, S, H * D]."""
    batch, heads, seq, head_dim = q.shape
    # Expanded heads, not folded groups: folding into the query axis breaks dynamic lengths in XNNPACK.
    groups = heads // k.shape[1]
    k = k.unsqueeze(2).expand(-1, -1, groups, -1, -1).reshape(batch, heads, -1, head_dim)
    v = v.unsqueeze(2).expand(-1, -1, groups, -1, -1).reshape(batch, heads, -1, head_dim)
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    scores = torch.where(allowed, scores, torch.full_like(scores, torch.finfo(scores.dtype).min))
    out = torch.matmul(torch.softmax(scores, dim=-1), v)
    return out.transpose(1, 2).reshape(batch, seq, heads * head_dim)


def causal_mask(positions: Tensor, slots: int, window: int) -> Tensor:
    """bool [S, slots]: true where the token at `positions` [S] sees the slot: up to its own, the last `window` of them."""
    numbers = torch.arange(slots, device=positions.device)
    allowed = numbers.unsqueeze(0) <= positions.unsqueeze(1)
    if window:
        allowed = torch.logical_and(allowed, numbers.unsqueeze(0) > positions.unsqueeze(1) - window)
    return allowed


def bias_of_distances(distances: Tensor, positions: Tensor, slots: int) -> Tensor:
    """What each head adds to the scores, [H, S, slots], of distances [M, H]: row d is for the slot d before a position [S]."""
    away = positions.unsqueeze(1) - torch.arange(slots, device=positions.device).unsqueeze(0)
    return torch.nn.functional.embedding(away.clamp(0, distances.shape[0] - 1), distances).permute(2, 0, 1)


def fake_attention(q: Tensor, *_: object) -> Tensor:
    """The fake of an attention with queries q [B, S, H, D] and no other output than [B, S, H * D]."""
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2] * q.shape[3]))


def _fake_with_caches(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *_: object
) -> tuple[Tensor, ...]:
    """As `fake_attention`, and both caches, which are contiguous whatever strides came in."""
    return fake_attention(q), k_cache.new_empty(k_cache.shape), v_cache.new_empty(v_cache.shape)


# ---- the ops --------------------------------------------------------------------------------------------------------


@define(fake=fake_attention)
def bidirectional_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """Self-attention of an encoder. q: [B, T, H, D]; k, v: [B, T, KV, D]; mask: bool [B, 1, T, T]. Returns [B, T, H * D]."""
    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, scale, softcap)


@define(fake=fake_attention)
def cross_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """Attention over a cache written once. q: [B, S, H, D]; k_cache, v_cache: [B, KV, T, D]; mask: bool [B, 1, 1, T].

    Returns [B, S, H * D].
    """
    return attend(q.transpose(1, 2), k_cache, v_cache, mask, scale, softcap)


@define(fake=_fake_with_caches)
def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    past_length: Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention that appends to a KV cache: the same op for prefill and decode step.

    q: [B, S, H, D]; k, v: [B, S, KV, D]; caches: [B, KV, C, D]; past_length: int64 [1], tokens in the cache before
    this call (the same for every row of a batch). Token i attends to the last `window` tokens up to itself, to all of
    them where window is 0. Returns out [B, S, H * D] and both caches. past_length + S must not exceed C.
    """
    positions = past_length + torch.arange(q.shape[1], device=q.device)  # [S]
    k_new = k_cache.index_copy(2, positions, k.transpose(1, 2))
    v_new = v_cache.index_copy(2, positions, v.transpose(1, 2))
    allowed = causal_mask(positions, k_cache.shape[2], window)
    return attend(q.transpose(1, 2), k_new, v_new, allowed, scale, softcap), k_new, v_new


@define(fake=_fake_with_caches)
def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    past_length: Tensor,
    distances: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`cached_attention` with a relative bias (T5, arXiv 1910.10683): each head adds a number by how far back the key is.

    distances: float32 [M, H], row d for a key d tokens before the query, the last row for all that are farther.
    """
    positions = past_length + torch.arange(q.shape[1], device=q.device)  # [S]
    k_new = k_cache.index_copy(2, positions, k.transpose(1, 2))
    v_new = v_cache.index_copy(2, positions, v.transpose(1, 2))
    allowed = causal_mask(positions, k_cache.shape[2], 0)
    bias = bias_of_distances(distances, positions, k_cache.shape[2])
    return attend(q.transpose(1, 2), k_new, v_new, allowed, scale, 0.0, bias), k_new, v_new


@define(fake=_fake_with_caches)
def merged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cross_k: Tensor,
    cross_v: Tensor,
    mask: Tensor,
    past_length: Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention that appends to a KV cache and sees an encoder's keys and values under the same softmax (T5Gemma 2).

    As `cached_attention`; cross_k, cross_v: [B, KV, T, D], written once; mask: bool [B, 1, 1, T], true at real source tokens.
    """
    positions = past_length + torch.arange(q.shape[1], device=q.device)  # [S]
    k_new = k_cache.index_copy(2, positions, k.transpose(1, 2))
    v_new = v_cache.index_copy(2, positions, v.transpose(1, 2))
    own = causal_mask(positions, k_cache.shape[2], window)
    batch, seq = q.shape[0], q.shape[1]
    allowed = torch.cat((own.expand(batch, 1, -1, -1), mask.expand(-1, -1, seq, -1)), -1)
    keys, values = torch.cat((k_new, cross_k), 2), torch.cat((v_new, cross_v), 2)
    return attend(q.transpose(1, 2), keys, values, allowed, scale, softcap), k_new, v_new


@define(fake=fake_attention)
def shared_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, scale: float, window: int
) -> Tensor:
    """Causal attention over a KV cache that an earlier layer of the same call wrote (SambaY's cross-decoder, Gemma 4).

    q: [B, S, H, D]; caches: [B, KV, C, D] as `cached_attention` returned them; positions: int64 [S], the slot of each
    query's own token: it sees all slots up to that one, or the last `window` of them. Returns [B, S, H * D].
    """
    return attend(q.transpose(1, 2), k_cache, v_cache, causal_mask(positions, k_cache.shape[2], window), scale, 0.0)
