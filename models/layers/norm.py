"""Norms and the causal convolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from .ops import EW


class RMSNorm(nn.Module):
    """`x / rms(x) * (offset + weight)` over the last dimension; offset 1 is Gemma's form."""

    def __init__(self, size: int, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps, self.offset = eps, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = EW.rms_norm(x, self.weight, self.eps, self.offset)
        return out


class LayerNorm(nn.Module):
    """`(x - mean) / std * weight`, with or without a bias, by hand. x: [..., size]."""

    def __init__(self, size: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        centred = wide - wide.mean(-1, keepdim=True)
        normed = centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + self.eps)
        normed = normed * self.weight.to(torch.float32)
        return (normed if self.bias is None else normed + self.bias.to(torch.float32)).to(x.dtype)


@dataclass(frozen=True)
class NormSpec:
    """A norm of any size. kind: "rms" or "layer"; offset: what is added to an RMSNorm's weight; bias: of a LayerNorm."""

    eps: float
    kind: Literal["rms", "layer"] = "rms"
    offset: float = 0.0
    bias: bool = False

    def of(self, size: int) -> RMSNorm | LayerNorm:
        return RMSNorm(size, self.eps, self.offset) if self.kind == "rms" else LayerNorm(size, self.eps, self.bias)


class CausalConv(nn.Module):
    """Depthwise causal convolution. weight: [channels, 1, taps], as in checkpoints."""

    def __init__(self, channels: int, taps: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(channels), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [B, T, channels]; state: [B, channels, taps - 1]. Returns both after these tokens."""
        out, new = EW.causal_conv(x, self.weight.squeeze(1), self.bias, state)
        return out, new
