"""KV caches in int8: a token's keys and values of a head as codes with one scale, and attention over them.

What may enter: torch, `attention`. Codes are [batch, kv_heads, capacity, head_dim] int8, scales [batch, kv_heads, capacity, 1]
float32, each the largest magnitude of its row divided by 127. A token's codes depend on that token alone, so that a prompt
gives the same cache whole, in chunks or token by token. Per token, as KIVI does it for values (arXiv 2402.02750); its groups
along the tokens for keys would quantize a token again each time a group grows.
"""

from __future__ import annotations

import torch

from .attention import _attend, causal_mask

LEVELS = 127
"""Codes go from -127 to 127: symmetric."""


def quantize_kv_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # The bound keeps a row of zeros from 0 / 0; below it floats are denormal, which some runtimes flush.
    scales = (x.abs().amax(-1, keepdim=True) / LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.round(x / scales).to(torch.int8).contiguous(), scales.contiguous()


def append_kv_reference(cache: torch.Tensor, new: torch.Tensor, past_length: torch.Tensor) -> torch.Tensor:
    positions = past_length + torch.arange(new.shape[2], device=new.device)
    return cache.index_copy(2, positions, new)


def quantized_attention_reference(
    q: torch.Tensor,
    k_codes: torch.Tensor,
    k_scales: torch.Tensor,
    v_codes: torch.Tensor,
    v_scales: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    k, v = k_codes.to(torch.float32) * k_scales, v_codes.to(torch.float32) * v_scales
    return _attend(q.transpose(1, 2), k, v, mask, scale, softcap)


def quantized_causal_attention_reference(
    q: torch.Tensor,
    k_codes: torch.Tensor,
    k_scales: torch.Tensor,
    v_codes: torch.Tensor,
    v_scales: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> torch.Tensor:
    seen = causal_mask(positions, k_codes.shape[2], window)
    return quantized_attention_reference(q, k_codes, k_scales, v_codes, v_scales, seen, scale, softcap)


def quantized_merged_attention_reference(
    q: torch.Tensor,
    k_codes: torch.Tensor,
    k_scales: torch.Tensor,
    v_codes: torch.Tensor,
    v_scales: torch.Tensor,
    cross_k_codes: torch.Tensor,
    cross_k_scales: torch.Tensor,
    cross_v_codes: torch.Tensor,
    cross_v_scales: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> torch.Tensor:
    own = causal_mask(positions, k_codes.shape[2], window).expand(q.shape[0], 1, -1, -1)
    seen = torch.cat((own, mask.expand(-1, -1, q.shape[1], -1)), -1)
    keys = torch.cat((k_codes, cross_k_codes), 2), torch.cat((k_scales, cross_k_scales), 2)
    values = torch.cat((v_codes, cross_v_codes), 2), torch.cat((v_scales, cross_v_scales), 2)
    return quantized_attention_reference(q, *keys, *values, seen, scale, softcap)


@torch.library.custom_op("edgewright::quantize_kv", mutates_args=())
def quantize_kv(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., D] as int8 codes of the same shape and float32 scales [..., 1]; codes times scales is x within half a scale."""
    return quantize_kv_reference(x)


@quantize_kv.register_fake
def _(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.custom_op("edgewright::append_kv", mutates_args=())
def append_kv(cache: torch.Tensor, new: torch.Tensor, past_length: torch.Tensor) -> torch.Tensor:
    """The cache [B, KV, C, N] with `new` [B, KV, S, N] behind its first past_length (int64 [1]) tokens."""
    return append_kv_reference(cache, new, past_length)


@append_kv.register_fake
def _(cache: torch.Tensor, new: torch.Tensor, past_length: torch.Tensor) -> torch.Tensor:
    return cache.new_empty(cache.shape)


@torch.library.custom_op("edgewright::quantized_attention", mutates_args=())
def quantized_attention(
    q: torch.Tensor,
    k_codes: torch.Tensor,
    k_scales: torch.Tensor,
    v_codes: torch.Tensor,
    v_scales: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Attention over keys and values in int8. q: [B, S, H, D]; codes: int8 [B, KV, T, D]; scales: [B, KV, T, 1].

    mask: bool [B, 1, 1, T], true where a key is seen. Returns [B, S, H * D].
    """
    return quantized_attention_reference(q, k_codes, k_scales, v_codes, v_scales, mask, scale, softcap)


@quantized_attention.register_fake
def _(
    q: torch.Tensor,
    k_codes: torch.Tensor,
    k_scales: torch.Tensor,
    v_codes: torch.Tensor,
    v_scales: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2] * q.shape[3]))


@torch.library.custom_op("edgewright::quantized_causal_attention", mutates_args=())
def quantized_causal_attention(
    q: torch.Tensor,
    k_codes: torch.Tensor,
    k_scales: torch.Tensor,
    v_codes: torch.Tensor,
    v_scales: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> torch.Tensor:
    """Causal attention over an int8 cache that the same call has written.

    q: [B, S, H, D]; codes: int8 [B, KV, C, D]; scales: [B, KV, C, 1]; positions: int64 [S], the slot of each query's own
    token: it sees the last `window` slots up to that one, all of them where window is 0. Returns [B, S, H * D].
    """
    return quantized_causal_attention_reference(
        q, k_codes, k_scales, v_codes, v_scales, positions, scale, softcap, window
    )


@quantized_causal_attention.register_fake
def _(
    q: torch.Tensor,
    k_codes: torch.Tensor,
    k_scales: torch.Tensor,
    v_codes: torch.Tensor,
    v_scales: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2] * q.shape[3]))


@torch.library.custom_op("edgewright::quantized_merged_attention", mutates_args=())
def quantized_merged_attention(
    q: torch.Tensor,
    k_codes: torch.Tensor,
    k_scales: torch.Tensor,
    v_codes: torch.Tensor,
    v_scales: torch.Tensor,
    cross_k_codes: torch.Tensor,
    cross_k_scales: torch.Tensor,
    cross_v_codes: torch.Tensor,
    cross_v_scales: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> torch.Tensor:
    """`quantized_causal_attention` that sees an encoder's keys and values under the same softmax (T5Gemma 2).

    Of the encoder, codes: int8 [B, KV, T, D]; scales: [B, KV, T, 1]; mask: bool [B, 1, 1, T], true at real source tokens.
    """
    own, cross = (k_codes, k_scales, v_codes, v_scales), (cross_k_codes, cross_k_scales, cross_v_codes, cross_v_scales)
    return quantized_merged_attention_reference(q, *own, *cross, mask, positions, scale, softcap, window)


@quantized_merged_attention.register_fake
def _(
    q: torch.Tensor,
    k_codes: torch.Tensor,
    k_scales: torch.Tensor,
    v_codes: torch.Tensor,
    v_scales: torch.Tensor,
    cross_k_codes: torch.Tensor,
    cross_k_scales: torch.Tensor,
    cross_v_codes: torch.Tensor,
    cross_v_scales: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2] * q.shape[3]))
