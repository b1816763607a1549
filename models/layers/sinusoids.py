"""Sinusoidal positions ("Attention Is All You Need"), as a table that is made when the model is built."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from ...errors import UserError

_MOST = 1 << 27  # numbers of a table: half a gigabyte


@dataclass(frozen=True)
class SinusoidSpec:
    """first: the number of the first position. whole: the slowest wave has the base's wavelength itself, as in tensor2tensor."""

    first: int = 0
    whole: bool = False


class Sinusoids(nn.Module):
    """Sines, then cosines, of positions: rows [S, hidden] of positions int64 [S]."""

    table: torch.Tensor

    def __init__(self, spec: SinusoidSpec, positions: int, hidden: int) -> None:
        super().__init__()
        if positions * hidden > _MOST:
            raise UserError(
                f"config.json: max_position_embeddings is {positions}; {positions} sinusoidal positions of {hidden} "
                f"numbers are more than the {_MOST} that a model may have; give fewer"
            )
        with torch.device("cpu"):
            self.register_buffer("table", _table(spec, positions, hidden), persistent=False)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(positions, self.table)


def _table(spec: SinusoidSpec, positions: int, hidden: int) -> torch.Tensor:
    """float32 [positions, hidden], in the precision and order of operations of transformers."""
    half = hidden // 2
    if spec.whole:
        rates = torch.exp(torch.arange(half).float() * -(math.log(10000) / (half - 1)))
        angles = (torch.arange(positions) + spec.first).float().unsqueeze(1) * rates.unsqueeze(0)
        return torch.cat((angles.sin(), angles.cos()), 1)
    bases = torch.pow(torch.tensor(10000.0, dtype=torch.float64), 2 * torch.arange(half, dtype=torch.float64) / hidden)
    angles = (torch.arange(positions) + spec.first).double().unsqueeze(1) / bases
    return torch.cat((angles.sin(), angles.cos()), 1).float()
