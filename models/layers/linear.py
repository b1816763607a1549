"""Linears and embeddings, plain and quantized."""

from __future__ import annotations

import torch
from torch import nn

from .ops import EW


class Linear(nn.Module):
    """`x @ weight.T + bias` in the dtype of x. weight: [out, in] in any float dtype; x: [..., in]."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)


class Embedding(nn.Module):
    """Rows of weight [vocab, hidden], as float32 [..., hidden], by ids int64 [...]."""

    def __init__(self, vocab: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, hidden), requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(ids, self.weight).to(torch.float32)


class LogitsBias(nn.Module):
    """A bias of the logits, weight [1, vocab]."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, vocab), requires_grad=False)

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits + self.weight.to(logits.dtype)


class QuantizedLinear(nn.Module):
    """A `Linear` whose weight is codes uint8 [out, in * bits / 8] and scales [out, in / group_size]."""

    def __init__(
        self, codes: torch.Tensor, scales: torch.Tensor, bits: int, group_size: int, bias: torch.Tensor | None
    ) -> None:
        super().__init__()
        self.bits, self.group_size = bits, group_size
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        out: torch.Tensor = EW.quantized_linear(x, self.codes, self.scales, bias, self.bits, self.group_size)
        return out


class QuantizedEmbedding(nn.Module):
    """An `Embedding` whose table is codes uint8 [vocab, hidden * bits / 8] and scales [vocab, hidden / group_size]."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, bits: int, group_size: int) -> None:
        super().__init__()
        self.bits, self.group_size = bits, group_size
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = EW.quantized_embedding(ids, self.codes, self.scales, self.bits, self.group_size)
        return out
