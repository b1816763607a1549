"""RMS normalisation and tanh-GELU, spelled out. What may enter: torch.

Both are ops because backends get the obvious forms silently wrong: Core ML turns tanh-GELU into the exact one and divides
`rms_norm` by max|x| before adding eps; XNNPACK's tanh-GELU is off by 1.2e-4. Decomposed, they are plain arithmetic.
"""

from __future__ import annotations

import math

import torch


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    wide = x.to(torch.float32)
    normed = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
    return (normed * (weight.to(torch.float32) + offset)).to(x.dtype)


def gelu_tanh_reference(x: torch.Tensor) -> torch.Tensor:
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * x * x))
    return 0.5 * x * (1.0 + torch.tanh(inner))


@torch.library.custom_op("edgewright::rms_norm", mutates_args=())
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """`x / rms(x) * (offset + weight)` over the last dimension; offset is 1 for Gemma, 0 elsewhere. x: [..., D]."""
    return rms_norm_reference(x, weight, eps, offset)


@rms_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("edgewright::gelu_tanh", mutates_args=())
def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh formula (Gemma's activation). x: any shape."""
    return gelu_tanh_reference(x)


@gelu_tanh.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)
