"""The feed-forward blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .activations import activation
from .block import Block
from .linear import Linear


class GatedMLP(Block):
    """`down(act(gate(x)) * up(x))`. x: [..., hidden] -> [..., hidden]."""

    fused = (("gate_proj", "up_proj"),)

    def __init__(self, hidden: int, intermediate: int, act: str, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate, bias)
        self.up_proj = Linear(hidden, intermediate, bias)
        self.down_proj = Linear(intermediate, hidden, bias)
        self.act = activation(act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return out


class FeedForward(Block):
    """`down(act(up(x)))`. x: [..., hidden] -> [..., hidden]."""

    def __init__(self, hidden: int, intermediate: int, act: str, bias: bool = False) -> None:
        super().__init__()
        self.up_proj = Linear(hidden, intermediate, bias)
        self.down_proj = Linear(intermediate, hidden, bias)
        self.act = activation(act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(self.act(self.up_proj(x)))
        return out


@dataclass(frozen=True)
class MLPSpec:
    """A feed-forward. gated: `GatedMLP`, else `FeedForward`; bias: of all its linears."""

    hidden: int
    intermediate: int
    act: str
    gated: bool = True
    bias: bool = False

    def made(self) -> GatedMLP | FeedForward:
        kind = GatedMLP if self.gated else FeedForward
        return kind(self.hidden, self.intermediate, self.act, self.bias)
