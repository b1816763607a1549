"""The recurrent block of Griffin (arXiv 2402.19427): a short convolution and a real-gated linear recurrent unit (RG-LRU)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ...graph import State
from ..causal import conv_state, recurrent_state
from .activations import activation, softplus
from .block import Block
from .linear import Linear
from .norm import CausalConv
from .ops import EW

_RATE = 8.0  # the paper's c: how fast a channel whose gate is open forgets


@dataclass(frozen=True)
class RecurrentSpec:
    """Sizes of one recurrent block. width: channels of the unit; blocks: parts of them whose gates are computed alone."""

    hidden: int
    width: int
    blocks: int
    taps: int
    act: str

    def states(self, layer: int) -> list[State]:
        return [conv_state(layer, self.width, self.taps), recurrent_state(layer, self.width)]


class RGLRU(nn.Module):
    """`h = a h + sqrt(1 - a^2) (gate x)`, `a = exp(-8 softplus(recurrent_param) gate)`; both gates are block-diagonal.

    The gates' weights are no `Linear`, so they keep 16 bits.
    """

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        each = width // blocks
        self.recurrent_param = nn.Parameter(torch.empty(width), requires_grad=False)
        self.input_gate_weight = nn.Parameter(torch.empty(blocks, each, each), requires_grad=False)
        self.input_gate_bias = nn.Parameter(torch.empty(blocks, each), requires_grad=False)
        self.recurrent_gate_weight = nn.Parameter(torch.empty(blocks, each, each), requires_grad=False)
        self.recurrent_gate_bias = nn.Parameter(torch.empty(blocks, each), requires_grad=False)

    def forward(
        self, x: torch.Tensor, past_length: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [B, T, width]; state: [B, width]. Returns [B, T, width] and the state after these tokens."""
        rate = self.gate(x, self.recurrent_gate_weight, self.recurrent_gate_bias)
        rate = rate * (softplus(self.recurrent_param.to(x.dtype)) * _RATE)  # -log a
        # sqrt(1 - a^2), by a tanh that keeps the small digits of a slow channel in half precision, too
        tanh = torch.tanh(rate)
        kept = torch.sqrt(tanh * 2.0 / (tanh + 1.0))
        positions = past_length + torch.arange(x.shape[1], device=x.device)
        first = (positions < 1).to(x.dtype).unsqueeze(1)  # the first token of all enters whole
        value = x * self.gate(x, self.input_gate_weight, self.input_gate_bias) * (kept + (1.0 - kept) * first)
        out, new = EW.diagonal_scan(torch.exp(-rate), value, state)
        return out, new

    def gate(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        blocks, each, _ = weight.shape
        parts = x.reshape(*x.shape[:2], blocks, each).transpose(1, 2)  # [B, blocks, T, each]
        found = torch.matmul(parts, weight.to(x.dtype)).transpose(1, 2) + bias.to(x.dtype)
        return torch.sigmoid(found).reshape(x.shape)


class RecurrentBlock(Block):
    """`out(rg_lru(conv(x)) * act(y))`, x and y two projections of the input."""

    fused = (("linear_x", "linear_y"),)

    def __init__(self, spec: RecurrentSpec) -> None:
        super().__init__()
        self.heads, self.act = spec.blocks, activation(spec.act)
        self.linear_y = Linear(spec.hidden, spec.width, bias=True)
        self.linear_x = Linear(spec.hidden, spec.width, bias=True)
        self.linear_out = Linear(spec.width, spec.hidden, bias=True)
        self.conv_1d = CausalConv(spec.width, spec.taps, bias=True)
        self.rg_lru = RGLRU(spec.width, spec.blocks)

    def forward(
        self, x: torch.Tensor, past_length: torch.Tensor, conv: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gate = self.act(self.linear_y(x))
        mixed, conv = self.conv_1d(self.linear_x(x), conv)
        mixed, state = self.rg_lru(mixed, past_length, state)
        return self.linear_out(mixed * gate), conv, state
