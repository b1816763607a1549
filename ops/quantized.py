"""Quantized linear and quantized embedding: the codes are dequantized exactly, code times scale in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from .define import define
from .packing import unpack


def dequantize(codes: Tensor, scales: Tensor, bits: int, group_size: int) -> Tensor:
    """float32 values [N, K] of packed codes [N, K*bits/8] (uint8) and scales [N, K/group_size] (any float dtype)."""
    groups = scales.shape[1]
    unsigned = unpack(codes, bits, groups * group_size)
    signed = unsigned.to(torch.float32) - float(1 << (bits - 1))
    values = signed.reshape(-1, groups, group_size) * scales.to(torch.float32).unsqueeze(-1)
    return values.reshape(-1, groups * group_size)


@define(fake=lambda x, codes, *_: x.new_empty((*x.shape[:-1], codes.shape[0])))
def quantized_linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """`x @ W.T + bias` with W [N, K] as codes and scales. x: [..., K] float; returns [..., N]."""
    return torch.nn.functional.linear(x, dequantize(codes, scales, bits, group_size).to(x.dtype), bias)


def _rows(ids: Tensor, codes: Tensor, scales: Tensor, bits: int, group_size: int) -> Tensor:
    return scales.new_empty((*ids.shape, scales.shape[1] * group_size), dtype=torch.float32)


@define(fake=_rows)
def quantized_embedding(ids: Tensor, codes: Tensor, scales: Tensor, bits: int, group_size: int) -> Tensor:
    """Rows `ids` of W [N, K] as codes and scales. ids: int64 [...]; returns float32 [..., K]."""
    flat = ids.reshape(-1)
    rows = dequantize(codes.index_select(0, flat), scales.index_select(0, flat), bits, group_size)
    return rows.reshape(*ids.shape, rows.shape[-1])
