"""What the Gated DeltaNet layers (arXiv 2412.06464) of Qwen and OLMo share: sizes, convolution, decay, the delta rule.

Each checkpoint names and cuts its projections in its own way, so those are in the families' files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...graph import State
from ..causal import conv_state, kv_states, recurrent_state
from ..config import ConfigReader
from ..layers.activations import activation, l2_normalise, softplus
from ..layers.attention import AttentionSpec
from ..layers.block import Block
from ..layers.norm import CausalConv
from ..layers.ops import EW


@dataclass(frozen=True)
class DeltaSpec:
    """Sizes of one layer. act: the activation behind the convolution. rate: the greatest beta, 2 for negative eigenvalues."""

    hidden: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    act: str
    rate: float = 1.0

    @property
    def keys(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """The channels of queries, keys and values, which the convolution runs over."""
        return 2 * self.keys + self.values

    def states(self, layer: int) -> list[State]:
        return [
            conv_state(layer, self.channels, self.taps),
            recurrent_state(layer, self.value_heads, self.key_dim, self.value_dim),
        ]


def read_delta(
    section: ConfigReader, hidden: int, heads: tuple[int, int], key_dim: int, value_dim: int | None, rate: float = 1.0
) -> DeltaSpec:
    """The sizes by the `linear_…` keys. heads (key, value), key_dim, value_dim (None: twice the keys'): the defaults."""
    key_heads = section.integer("linear_num_key_heads", heads[0], most=4096)
    value_heads = section.integer("linear_num_value_heads", heads[1], most=4096)
    if value_heads % key_heads:
        raise section.error("linear_num_value_heads", value_heads, f"a multiple of {key_heads} key heads")
    width = section.integer("linear_key_head_dim", key_dim, most=4096)
    return DeltaSpec(
        hidden,
        key_heads,
        value_heads,
        width,
        section.integer("linear_value_head_dim", 2 * width if value_dim is None else value_dim, most=8192),
        section.integer("linear_conv_kernel_dim", 4, least=2, most=64),
        section.text("hidden_act", "silu"),
        rate,
    )


def hybrid_states(types: Sequence[str], delta: DeltaSpec, attention: AttentionSpec) -> list[list[State]]:
    """The states of each layer of a stack of DeltaNets ("linear_attention") and attentions."""
    return [
        delta.states(i) if kind == "linear_attention" else kv_states(i, attention.kv_heads, attention.head_dim)
        for i, kind in enumerate(types)
    ]


class GatedDelta(Block):
    """Convolution, decay and delta rule, without the projections before and the gate after."""

    def __init__(self, spec: DeltaSpec) -> None:
        super().__init__()
        self.delta, self.act = spec, activation(spec.act)
        self.conv1d = CausalConv(spec.channels, spec.taps, bias=False)
        self.A_log = nn.Parameter(torch.empty(spec.value_heads), requires_grad=False)
        self.dt_bias = nn.Parameter(torch.empty(spec.value_heads), requires_grad=False)

    def mix(
        self, qkv: torch.Tensor, a: torch.Tensor, b: torch.Tensor, conv: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """qkv: [B, T, channels]; a (decay), b (rate): [B, T, H]. Returns [B, T, H, Dv] and both states after these tokens."""
        s, lead = self.delta, qkv.shape[:2]
        mixed, conv = self.conv1d(qkv, conv)
        mixed = self.act(mixed)
        q = mixed.narrow(2, 0, s.keys).reshape(*lead, s.key_heads, s.key_dim)
        k = mixed.narrow(2, s.keys, s.keys).reshape(*lead, s.key_heads, s.key_dim)
        v = mixed.narrow(2, 2 * s.keys, s.values).reshape(*lead, s.value_heads, s.value_dim)
        beta = torch.sigmoid(b)
        if s.rate != 1.0:
            beta = beta * s.rate
        fade = -torch.exp(self.A_log.to(a.dtype)) * softplus(a + self.dt_bias.to(a.dtype))
        out, state = EW.gated_delta_rule(l2_normalise(q), l2_normalise(k), v, fade, beta, state, s.key_dim**-0.5)
        return out, conv, state
