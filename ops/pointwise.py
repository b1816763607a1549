"""RMS normalisation and tanh-GELU, spelled out.

Both are ops because backends compute the usual forms wrongly without a warning. Core ML turns tanh-GELU into the exact one and
divides the input of `rms_norm` by its largest magnitude before it adds eps; XNNPACK's own tanh-GELU is inexact. Decomposed,
both are plain arithmetic.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .define import define


@define(fake=lambda x, weight, eps, offset: torch.empty_like(x))
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """`x / rms(x) * (offset + weight)` over the last dimension; offset is 1 for Gemma, 0 elsewhere. x: [..., D]."""
    wide = x.to(torch.float32)
    normed = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
    return (normed * (weight.to(torch.float32) + offset)).to(x.dtype)


@define(fake=torch.empty_like)
def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh formula (Gemma's activation). x: any shape."""
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * x * x))
    return 0.5 * x * (1.0 + torch.tanh(inner))
