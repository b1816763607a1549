"""KV caches in int8 in words that ExecuTorch's kernels and XNNPACK know. What may enter: `ops`, `executorch_lowerings`.

Plain Python functions, as those of `executorch_lowerings`. Caches are buffers, codes [1, capacity, kv_heads, head_dim] and
scales [1, capacity, kv_heads, 1]. ExecuTorch has an attention over int8 caches, but it wants the queries in int8 too; here
the filled part is given to XNNPACK as floats, unscaled, and a token's scale multiplies a column of the scores.
"""

from __future__ import annotations

import torch

from ...ops.quantized_cache import LEVELS
from .lowerings import attend


def quantize_kv(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Without the copies that make the reference's results contiguous."""
    scales = (x.abs().amax(-1, keepdim=True) / LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.round(x / scales).to(torch.int8), scales


def append_kv(cache: torch.Tensor, new: torch.Tensor, start: int) -> torch.Tensor:
    """The buffer, with new [1, KV, S, N] written behind its first `start` tokens."""
    torch.ops.llama.update_cache(new.transpose(1, 2), cache, start)
    return cache


def causal_attention(
    q: torch.Tensor,
    k_codes: torch.Tensor,
    k_scales: torch.Tensor,
    v_codes: torch.Tensor,
    v_scales: torch.Tensor,
    bias: torch.Tensor,
    slots: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Over the filled part of buffers, as many tokens as `slots` has; bias [1, G * S, filled]."""
    end = slots.shape[0]
    keys, values = _filled(k_codes, end), _filled(v_codes, end)
    scales = _filled_scales(k_scales, end), _filled_scales(v_scales, end)
    return attend(q, keys.permute(0, 2, 1), values, bias, scale, softcap, scales)


def cross_attention(
    q: torch.Tensor,
    k_codes: torch.Tensor,
    k_scales: torch.Tensor,
    v_codes: torch.Tensor,
    v_scales: torch.Tensor,
    bias: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Over codes [1, KV, T, D] and scales [1, KV, T, 1] that another method gave; bias [1, 1, T]."""
    keys, values = k_codes.squeeze(0).to(torch.float32), v_codes.squeeze(0).to(torch.float32)
    scales = k_scales.squeeze(0).permute(0, 2, 1), v_scales.squeeze(0).permute(0, 2, 1)
    return attend(q, keys.permute(0, 2, 1), values, bias, scale, softcap, scales)


def merged_attention(
    q: torch.Tensor,
    k_codes: torch.Tensor,
    k_scales: torch.Tensor,
    v_codes: torch.Tensor,
    v_scales: torch.Tensor,
    cross_k_codes: torch.Tensor,
    cross_k_scales: torch.Tensor,
    cross_v_codes: torch.Tensor,
    cross_v_scales: torch.Tensor,
    bias: torch.Tensor,
    slots: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Over the filled part of buffers and what another method gave, together; bias [1, G * S, filled + T]."""
    end = slots.shape[0]
    keys = torch.cat((_filled(k_codes, end), cross_k_codes.squeeze(0).to(torch.float32)), 1)
    values = torch.cat((_filled(v_codes, end), cross_v_codes.squeeze(0).to(torch.float32)), 1)
    key_scales = torch.cat((_filled_scales(k_scales, end), cross_k_scales.squeeze(0).permute(0, 2, 1)), 2)
    value_scales = torch.cat((_filled_scales(v_scales, end), cross_v_scales.squeeze(0).permute(0, 2, 1)), 2)
    return attend(q, keys.permute(0, 2, 1), values, bias, scale, softcap, (key_scales, value_scales))


def _filled(codes: torch.Tensor, end: int) -> torch.Tensor:
    """The first `end` tokens of a buffer as floats [KV, end, D]."""
    kv, width = codes.shape[2], codes.shape[3]
    return codes.narrow(1, 0, end).to(torch.float32).view(-1, kv, width).permute(1, 0, 2)


def _filled_scales(scales: torch.Tensor, end: int) -> torch.Tensor:
    """The same of scales, [KV, 1, end]."""
    return scales.narrow(1, 0, end).view(-1, scales.shape[2], 1).permute(1, 2, 0)
