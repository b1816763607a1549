"""KV caches in int8: a token's keys and values of a head as codes with one scale, and attention over them.

Codes are int8 [batch, kv_heads, capacity, head_dim], scales float32 [batch, kv_heads, capacity, 1]: the largest magnitude of a
row divided by 127. A token's codes depend on that token alone, so a prompt gives the same cache in one call, in chunks or token
by token. Values are quantized per token as in KIVI (arXiv 2402.02750). Keys are too: KIVI groups them along the tokens, and then
a token would be quantized again whenever its group grows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import attend, bias_of_distances, causal_mask, fake_attention
from .define import define

LEVELS = 127
"""Codes go from -127 to 127: symmetric."""


@define(
    fake=lambda x: (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((*x.shape[:-1], 1), dtype=torch.float32),
    )
)
def quantize_kv(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] as int8 codes of the same shape and float32 scales [..., 1]; codes times scales is x within half a scale."""
    # The bound keeps a row of zeros from 0 / 0; below it floats are denormal, which some runtimes flush to zero.
    scales = (x.abs().amax(-1, keepdim=True) / LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.round(x / scales).to(torch.int8).contiguous(), scales.contiguous()


@define(fake=lambda cache, new, past_length: cache.new_empty(cache.shape))
def append_kv(cache: Tensor, new: Tensor, past_length: Tensor) -> Tensor:
    """The cache [B, KV, C, N] with `new` [B, KV, S, N] behind its first past_length (int64 [1]) tokens."""
    positions = past_length + torch.arange(new.shape[2], device=new.device)
    return cache.index_copy(2, positions, new)


@define(fake=fake_attention)
def quantized_attention(
    q: Tensor,
    k_codes: Tensor,
    k_scales: Tensor,
    v_codes: Tensor,
    v_scales: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float,
) -> Tensor:
    """Attention over keys and values in int8. q: [B, S, H, D]; codes: int8 [B, KV, T, D]; scales: [B, KV, T, 1].

    mask: bool [B, 1, 1, T], true where a key is seen. Returns [B, S, H * D].
    """
    k, v = k_codes.to(torch.float32) * k_scales, v_codes.to(torch.float32) * v_scales
    return attend(q.transpose(1, 2), k, v, mask, scale, softcap)


@define(fake=fake_attention)
def quantized_causal_attention(
    q: Tensor,
    k_codes: Tensor,
    k_scales: Tensor,
    v_codes: Tensor,
    v_scales: Tensor,
    positions: Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> Tensor:
    """Causal attention over an int8 cache that the same call has written.

    q: [B, S, H, D]; codes: int8 [B, KV, C, D]; scales: [B, KV, C, 1]; positions: int64 [S], the slot of each query's own
    token: it sees the last `window` slots up to that one, all of them where window is 0. Returns [B, S, H * D].
    """
    allowed = causal_mask(positions, k_codes.shape[2], window)
    return quantized_attention(q, k_codes, k_scales, v_codes, v_scales, allowed, scale, softcap)


@define(fake=fake_attention)
def quantized_biased_attention(
    q: Tensor,
    k_codes: Tensor,
    k_scales: Tensor,
    v_codes: Tensor,
    v_scales: Tensor,
    positions: Tensor,
    distances: Tensor,
    scale: float,
) -> Tensor:
    """`quantized_causal_attention` with a relative bias of distances [M, H], as `biased_attention` adds it."""
    k, v = k_codes.to(torch.float32) * k_scales, v_codes.to(torch.float32) * v_scales
    slots = k_codes.shape[2]
    bias = bias_of_distances(distances, positions, slots)
    return attend(q.transpose(1, 2), k, v, causal_mask(positions, slots, 0), scale, 0.0, bias)


@define(fake=fake_attention)
def quantized_merged_attention(
    q: Tensor,
    k_codes: Tensor,
    k_scales: Tensor,
    v_codes: Tensor,
    v_scales: Tensor,
    cross_k_codes: Tensor,
    cross_k_scales: Tensor,
    cross_v_codes: Tensor,
    cross_v_scales: Tensor,
    mask: Tensor,
    positions: Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> Tensor:
    """`quantized_causal_attention` that sees an encoder's keys and values under the same softmax (T5Gemma 2).

    Of the encoder, codes: int8 [B, KV, T, D]; scales: [B, KV, T, 1]; mask: bool [B, 1, 1, T], true at real source tokens.
    """
    own = causal_mask(positions, k_codes.shape[2], window).expand(q.shape[0], 1, -1, -1)
    allowed = torch.cat((own, mask.expand(-1, -1, q.shape[1], -1)), -1)
    keys = torch.cat((k_codes, cross_k_codes), 2), torch.cat((k_scales, cross_k_scales), 2)
    values = torch.cat((v_codes, cross_v_codes), 2), torch.cat((v_scales, cross_v_scales), 2)
    return quantized_attention(q, *keys, *values, allowed, scale, softcap)
