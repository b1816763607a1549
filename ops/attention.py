"""Rotary embedding and the attentions: bidirectional, over a growing cache, over one written once or by another layer, over two.

What may enter: torch. Heads stay in [batch, seq, heads, head_dim]; caches are [batch, kv_heads, capacity, head_dim].
Query head h reads key head h // (heads / kv_heads). Soft-capping is `cap * tanh(scores / cap)`, before the mask, as in
Gemma 2 (arXiv 2408.00118); 0 turns it off.
"""

from __future__ import annotations

import torch


def rope_reference(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    angles = positions.to(torch.float32).unsqueeze(-1) * inv_freq  # [seq, head_dim / 2]
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    """q [B, H, S, D]; k, v [B, KV, T, D]; allowed bool, broadcastable to [B, H, S, T]. Returns [B, S, H * D]."""
    batch, heads, seq, head_dim = q.shape
    # Expanded heads, not folded groups: folding into the query axis breaks dynamic lengths in XNNPACK.
    groups = heads // k.shape[1]
    k = k.unsqueeze(2).expand(-1, -1, groups, -1, -1).reshape(batch, heads, -1, head_dim)
    v = v.unsqueeze(2).expand(-1, -1, groups, -1, -1).reshape(batch, heads, -1, head_dim)
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = torch.where(allowed, scores, torch.full_like(scores, torch.finfo(scores.dtype).min))
    out = torch.matmul(torch.softmax(scores, dim=-1), v)
    return out.transpose(1, 2).reshape(batch, seq, heads * head_dim)


def bidirectional_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    return _attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, scale, softcap)


def cross_attention_reference(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, mask: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    return _attend(q.transpose(1, 2), k_cache, v_cache, mask, scale, softcap)


def cached_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    past_length: torch.Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    positions = past_length + torch.arange(q.shape[1], device=q.device)  # [seq]
    k_new = k_cache.index_copy(2, positions, k.transpose(1, 2))
    v_new = v_cache.index_copy(2, positions, v.transpose(1, 2))
    allowed = causal_mask(positions, k_cache.shape[2], window)
    out = _attend(q.transpose(1, 2), k_new, v_new, allowed, scale, softcap)
    return out, k_new, v_new


def merged_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cross_k: torch.Tensor,
    cross_v: torch.Tensor,
    mask: torch.Tensor,
    past_length: torch.Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    positions = past_length + torch.arange(q.shape[1], device=q.device)  # [seq]
    k_new = k_cache.index_copy(2, positions, k.transpose(1, 2))
    v_new = v_cache.index_copy(2, positions, v.transpose(1, 2))
    own = causal_mask(positions, k_cache.shape[2], window)
    batch, seq = q.shape[0], q.shape[1]
    allowed = torch.cat((own.expand(batch, 1, -1, -1), mask.expand(-1, -1, seq, -1)), -1)
    keys, values = torch.cat((k_new, cross_k), 2), torch.cat((v_new, cross_v), 2)
    return _attend(q.transpose(1, 2), keys, values, allowed, scale, softcap), k_new, v_new


def shared_attention_reference(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, positions: torch.Tensor, scale: float
) -> torch.Tensor:
    allowed = causal_mask(positions, k_cache.shape[2], 0)
    return _attend(q.transpose(1, 2), k_cache, v_cache, allowed, scale, 0.0)


def causal_mask(positions: torch.Tensor, slots: int, window: int) -> torch.Tensor:
    """bool [S, slots]: true where the token at `positions` [S] sees the slot: up to its own, the last `window` of them."""
    numbers = torch.arange(slots, device=positions.device)
    seen = numbers.unsqueeze(0) <= positions.unsqueeze(1)
    if window:
        seen = torch.logical_and(seen, numbers.unsqueeze(0) > positions.unsqueeze(1) - window)
    return seen


@torch.library.custom_op("edgewright::rope", mutates_args=())
def rope(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (arXiv 2104.09864), halves rotated. x: [B, S, H, D]; positions: int64 [S]; inv_freq: [D / 2]."""
    return rope_reference(x, positions, inv_freq)


@rope.register_fake
def _(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)  # contiguous, as the concatenation of the halves is, whatever the strides of x


@torch.library.custom_op("edgewright::bidirectional_attention", mutates_args=())
def bidirectional_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    """Self-attention of an encoder. q: [B, T, H, D]; k, v: [B, T, KV, D]; mask: bool [B, 1, T, T]. Returns [B, T, H*D]."""
    return bidirectional_attention_reference(q, k, v, mask, scale, softcap)


@bidirectional_attention.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2] * q.shape[3]))


@torch.library.custom_op("edgewright::cross_attention", mutates_args=())
def cross_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, mask: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    """Attention over a cache written once. q: [B, S, H, D]; k_cache, v_cache: [B, KV, T, D]; mask: bool [B, 1, 1, T].

    Returns [B, S, H * D].
    """
    return cross_attention_reference(q, k_cache, v_cache, mask, scale, softcap)


@cross_attention.register_fake
def _(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, mask: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2] * q.shape[3]))


@torch.library.custom_op("edgewright::cached_attention", mutates_args=())
def cached_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    past_length: torch.Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Causal attention that appends to a KV cache: the same op for prefill and decode step.

    q: [B, S, H, D]; k, v: [B, S, KV, D]; caches: [B, KV, C, D]; past_length: int64 [1], tokens in the cache before
    this call (the same for every row of a batch). Token i attends to the last `window` tokens up to itself, all of
    them where window is 0. Returns out [B, S, H * D] and both caches. past_length + S must not exceed C.
    """
    return cached_attention_reference(q, k, v, k_cache, v_cache, past_length, scale, softcap, window)


@cached_attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    past_length: torch.Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = q.new_empty((q.shape[0], q.shape[1], q.shape[2] * q.shape[3]))
    return out, k_cache.new_empty(k_cache.shape), v_cache.new_empty(v_cache.shape)  # contiguous, whatever came in


@torch.library.custom_op("edgewright::merged_attention", mutates_args=())
def merged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cross_k: torch.Tensor,
    cross_v: torch.Tensor,
    mask: torch.Tensor,
    past_length: torch.Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Causal attention that appends to a KV cache and sees an encoder's keys and values under the same softmax (T5Gemma 2).

    As `cached_attention`; cross_k, cross_v: [B, KV, T, D], written once; mask: bool [B, 1, 1, T], true at real source tokens.
    """
    return merged_attention_reference(
        q, k, v, k_cache, v_cache, cross_k, cross_v, mask, past_length, scale, softcap, window
    )


@merged_attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cross_k: torch.Tensor,
    cross_v: torch.Tensor,
    mask: torch.Tensor,
    past_length: torch.Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = q.new_empty((q.shape[0], q.shape[1], q.shape[2] * q.shape[3]))
    return out, k_cache.new_empty(k_cache.shape), v_cache.new_empty(v_cache.shape)


@torch.library.custom_op("edgewright::shared_attention", mutates_args=())
def shared_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, positions: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention over a KV cache that an earlier layer of the same call wrote (SambaY's cross-decoder).

    q: [B, S, H, D]; caches: [B, KV, C, D] as `cached_attention` returned them; positions: int64 [S], the slot of each
    query's own token: it sees all slots up to that one. Returns [B, S, H * D].
    """
    return shared_attention_reference(q, k_cache, v_cache, positions, scale)


@shared_attention.register_fake
def _(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, positions: torch.Tensor, scale: float
) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2] * q.shape[3]))
