"""Norms and the causal convolution."""

from __future__ import annotations

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
