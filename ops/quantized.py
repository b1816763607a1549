"""Quantized linear and quantized embedding. What may enter: torch.

The reference dequantizes the codes exactly (code times scale, in float32) and is also the decomposition: a backend
without the op computes these very lines.
"""

from __future__ import annotations

import torch

from .packing import unpack


def dequantize(codes: torch.Tensor, scales: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """float32 values [N, K] of packed codes [N, K*bits/8] (uint8) and scales [N, K/group_size] (any float dtype)."""
    groups = scales.shape[1]
    unsigned = unpack(codes, bits, groups * group_size)
    signed = unsigned.to(torch.float32) - float(1 << (bits - 1))
    values = signed.reshape(-1, groups, group_size) * scales.to(torch.float32).unsqueeze(-1)
    return values.reshape(-1, groups * group_size)


def quantized_linear_reference(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, bits: int, group_size: int
) -> torch.Tensor:
    return torch.nn.functional.linear(x, dequantize(codes, scales, bits, group_size).to(x.dtype), bias)


def quantized_embedding_reference(
    ids: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bits: int, group_size: int
) -> torch.Tensor:
    flat = ids.reshape(-1)
    rows = dequantize(codes.index_select(0, flat), scales.index_select(0, flat), bits, group_size)
    return rows.reshape(*ids.shape, rows.shape[-1])


@torch.library.custom_op("edgewright::quantized_linear", mutates_args=())
def quantized_linear(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, bits: int, group_size: int
) -> torch.Tensor:
    """`x @ W.T + bias` with W [N, K] as codes and scales. x: [..., K] float; returns [..., N]."""
    return quantized_linear_reference(x, codes, scales, bias, bits, group_size)


@quantized_linear.register_fake
def _(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, bits: int, group_size: int
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.custom_op("edgewright::quantized_embedding", mutates_args=())
def quantized_embedding(
    ids: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bits: int, group_size: int
) -> torch.Tensor:
    """Rows `ids` of W [N, K] as codes and scales. ids: int64 [...]; returns float32 [..., K]."""
    return quantized_embedding_reference(ids, codes, scales, bits, group_size)


@quantized_embedding.register_fake
def _(ids: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    return scales.new_empty((*ids.shape, scales.shape[1] * group_size), dtype=torch.float32)
