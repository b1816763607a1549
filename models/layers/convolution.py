"""Convolution over time as a linear over the patches that it sees, so that it is quantized and lowered as any other linear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .linear import Linear


@dataclass(frozen=True)
class ConvolutionSpec:
    """channels, out: widths. padding: zeros before and behind."""

    channels: int
    out: int
    taps: int
    stride: int = 1
    padding: int = 0
    bias: bool = True

    def positions(self, length: int) -> int:
        """Outputs of so many inputs."""
        return (length + 2 * self.padding - self.taps) // self.stride + 1


class Convolution(nn.Module):
    """x [B, T, channels] -> [B, `positions(T)`, out]. A checkpoint's weight is read by the rule `checkpoints.names.convolution`."""

    def __init__(self, spec: ConvolutionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.patches = Linear(spec.taps * spec.channels, spec.out, spec.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = self.spec
        if s.padding:
            x = nn.functional.pad(x, (0, 0, s.padding, s.padding))
        last = (s.positions(x.shape[1] - 2 * s.padding) - 1) * s.stride + 1
        views = [x[:, tap : tap + last : s.stride] for tap in range(s.taps)]
        out: torch.Tensor = self.patches(torch.cat(views, -1) if len(views) > 1 else views[0])
        return out
