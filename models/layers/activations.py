"""Activations in forms that every backend computes right."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ...errors import UserError
from ...system.reading import shown
from .ops import EW


def silu(x: torch.Tensor) -> torch.Tensor:
    """`x * sigmoid(x)`."""
    return x * torch.sigmoid(x)


def twice_atanh(z: torch.Tensor) -> torch.Tensor:
    """`2 atanh(z)` = log((1 + z) / (1 - z)), for z from 0 to 1/3 within 2e-7.

    For logarithms near 1 in half precision: log(1 + u) with u = 2z / (1 - z) would round 1 + u and lose a small u.
    """
    square = z * z
    series = square * (2 / 11) + 2 / 9
    for divisor in (7, 5, 3, 1):
        series = series * square + 2 / divisor
    return series * z


def softplus(x: torch.Tensor) -> torch.Tensor:
    """`log(1 + exp(x))` within 1e-6; small values have the relative precision of the dtype."""
    small = torch.exp(-torch.abs(x))
    return torch.relu(x) + twice_atanh(small / (small + 2.0))


def l2_normalise(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """`x / sqrt(sum of x squared + eps)` over the last dimension."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh approximation."""
    out: torch.Tensor = EW.gelu_tanh(x)
    return out


def gelu(x: torch.Tensor) -> torch.Tensor:
    """The exact GELU."""
    return 0.5 * x * (1.0 + torch.erf(x * math.sqrt(0.5)))


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """`relu(x)` squared."""
    positive = torch.relu(x)
    return positive * positive


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """`x * sigmoid(1.702 x)`."""
    return x * torch.sigmoid(x * 1.702)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": silu,
    "swish": silu,
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": torch.relu,
    "relu2": squared_relu,
}


def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The activation that config.json names. Raises UserError for one that is not known."""
    if name not in ACTIVATIONS:
        raise UserError(f"activation {shown(name, 60)} is not supported; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def softcap(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """`cap * tanh(logits / cap)`; the logits themselves if cap is 0."""
    return torch.tanh(logits / cap) * cap if cap else logits
