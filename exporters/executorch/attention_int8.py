"""KV caches in int8 in ATen that ExecuTorch's kernels and XNNPACK compute; `passes` points the private nodes at these functions.

Caches are buffers: codes [1, capacity, kv_heads, head_dim] and scales [1, capacity, kv_heads, 1]. ExecuTorch's own attention over
int8 caches wants the queries in int8 too. Here XNNPACK gets the filled codes as floats, unscaled, and a token's scale multiplies
a column of the scores.
"""

from __future__ import annotations

import torch

from ...ops.quantized_cache import LEVELS
from .lowerings import Pair, attend


def quantize_kv(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As the op, without the copies that make the reference's results contiguous."""
    scales = (x.abs().amax(-1, keepdim=True) / LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.round(x / scales).to(torch.int8), scales


def append_kv(cache: torch.Tensor, new: torch.Tensor, start: int) -> torch.Tensor:
    """The buffer, with new [1, KV, S, N] written behind its first `start` tokens."""
    torch.ops.llama.update_cache(new.transpose(1, 2), cache, start)
    return cache


def causal_attention(
    q: torch.Tensor, keys: Pair, values: Pair, bias: torch.Tensor, slots: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    """Over the filled part of buffers, as many tokens as `slots` has.

    keys, values: codes and scales; bias [1 or KV, G * S, filled].
    """
    end = slots.shape[0]
    k, v = _filled(keys[0], end), _filled(values[0], end)
    scales = _filled_scales(keys[1], end), _filled_scales(values[1], end)
    return attend(q, k.permute(0, 2, 1), v, bias, scale, softcap, scales)


def cross_attention(
    q: torch.Tensor, keys: Pair, values: Pair, bias: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    """Over codes [1, KV, T, D] and scales [1, KV, T, 1] from another method; bias [1, 1, T]."""
    k, v = keys[0].squeeze(0).to(torch.float32), values[0].squeeze(0).to(torch.float32)
    scales = keys[1].squeeze(0).permute(0, 2, 1), values[1].squeeze(0).permute(0, 2, 1)
    return attend(q, k.permute(0, 2, 1), v, bias, scale, softcap, scales)


def merged_attention(
    q: torch.Tensor,
    keys: Pair,
    values: Pair,
    cross_keys: Pair,
    cross_values: Pair,
    bias: torch.Tensor,
    slots: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Over the filled part of buffers and the codes from another method, together; bias [1, G * S, filled + T]."""
    end = slots.shape[0]
    k = torch.cat((_filled(keys[0], end), cross_keys[0].squeeze(0).to(torch.float32)), 1)
    v = torch.cat((_filled(values[0], end), cross_values[0].squeeze(0).to(torch.float32)), 1)
    key_scales = torch.cat((_filled_scales(keys[1], end), cross_keys[1].squeeze(0).permute(0, 2, 1)), 2)
    value_scales = torch.cat((_filled_scales(values[1], end), cross_values[1].squeeze(0).permute(0, 2, 1)), 2)
    return attend(q, k.permute(0, 2, 1), v, bias, scale, softcap, (key_scales, value_scales))


def _filled(codes: torch.Tensor, end: int) -> torch.Tensor:
    """The first `end` tokens of a buffer as floats [KV, end, D]."""
    kv, width = codes.shape[2], codes.shape[3]
    return codes.narrow(1, 0, end).to(torch.float32).view(-1, kv, width).permute(1, 0, 2)


def _filled_scales(scales: torch.Tensor, end: int) -> torch.Tensor:
    """The same of scales, [KV, 1, end]."""
    return scales.narrow(1, 0, end).view(-1, scales.shape[2], 1).permute(1, 2, 0)
