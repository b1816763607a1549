"""The Mamba-2 mixer (arXiv 2405.21060) of every family that has one; what differs between them is data.

Files hold gate z, x, B, C and dt as one projection, `in_proj`. The model has two, `zxbc_proj` and `dt_proj`: dt is the last few
rows, and what it gets wrong stays in the state, so it keeps 16 bits (`in_proj_names` cuts the file's weight).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ...checkpoints.names import Rule, split
from ...graph import State
from ..causal import conv_state, recurrent_state
from ..config import ConfigReader
from .activations import activation, silu, softplus
from .block import Block
from .linear import Linear
from .norm import CausalConv, RMSNorm
from .ops import EW

NO_LIMIT = (0.0, math.inf)


@dataclass(frozen=True)
class Mamba2Spec:
    """Sizes and options of one Mamba-2 mixer.

    Attributes:
        groups: how many B and C there are, each read by heads / groups heads.
        taps: of the convolution.
        norm: where the RMSNorm of each group of heads is, against the gate; "none" for none.
        limits: the least and the greatest time step.
        into: the multiplier of the input.
        parts: the multipliers of z, x, B, C and dt.
    """

    hidden: int
    heads: int
    head_dim: int
    groups: int
    state: int
    taps: int
    act: str
    eps: float
    conv_bias: bool = True
    in_bias: bool = False
    out_bias: bool = False
    norm: Literal["none", "before", "after"] = "after"
    limits: tuple[float, float] = NO_LIMIT
    into: float = 1.0
    parts: tuple[float, ...] = (1.0,) * 5

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """The channels of x, B and C, which the convolution runs over."""
        return self.inner + 2 * self.groups * self.state

    def states(self, layer: int) -> list[State]:
        return [
            conv_state(layer, self.channels, self.taps),
            recurrent_state(layer, self.heads, self.state, self.head_dim),
        ]


def in_proj_names(spec: Mamba2Spec, path: str, new: str) -> Rule:
    """The input projection of the mixer at `path` of the file, as the two projections of the mixer at `new` of the model."""
    return split(f"{path}.in_proj", {f"{new}.zxbc_proj": spec.inner + spec.channels, f"{new}.dt_proj": spec.heads})


def read_time_steps(section: ConfigReader, key: str = "time_step_limit") -> tuple[float, float]:
    """The least and the greatest time step under `key`; no limits where it is absent or null. Raises UserError for a bad value."""
    limits = section.values.get(key)
    if limits is None:
        return NO_LIMIT
    infinite = {"__float__": "Infinity"}  # how transformers writes it
    wanted = "two numbers, the first at least 0 and less than the second"
    if not isinstance(limits, list | tuple) or len(limits) != 2:
        raise section.error(key, limits, wanted)
    least, most = (math.inf if value == infinite else value for value in limits)
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in (least, most)):
        raise section.error(key, limits, wanted)
    if not 0 <= least < most:
        raise section.error(key, limits, wanted)
    return float(least), float(most)


def read_groups(section: ConfigReader, key: str, heads: int, default: int) -> int:
    """The number of B and C under `key`: a divisor of `heads`, at most 64."""
    groups = section.divisor(key, heads, default)
    if groups > 64:
        raise section.error(key, groups, "at most 64")
    return groups


class GroupedRMSNorm(RMSNorm):
    """RMSNorm of each of `groups` equal parts of the last dimension."""

    def __init__(self, size: int, eps: float, groups: int) -> None:
        super().__init__(size, eps, offset=0.0)
        self.groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.groups == 1:
            return super().forward(x)
        # By hand: the op has one weight for a whole dimension, which backends store as the checkpoint has it.
        parts = x.reshape(*x.shape[:-1], self.groups, x.shape[-1] // self.groups)
        parts = parts * torch.rsqrt((parts * parts).mean(-1, keepdim=True) + self.eps)
        return parts.reshape(x.shape) * self.weight.to(x.dtype)


class Mamba2(Block):
    """`out(gate(scan(conv(in(x)))))`, under the names of transformers' files but for the input projections."""

    protected = ("dt_proj",)

    def __init__(self, spec: Mamba2Spec) -> None:
        super().__init__()
        self.spec, self.heads, self.act = spec, spec.heads, activation(spec.act)
        self.zxbc_proj = Linear(spec.hidden, spec.inner + spec.channels, spec.in_bias)
        self.dt_proj = Linear(spec.hidden, spec.heads, spec.in_bias)
        self.conv1d = CausalConv(spec.channels, spec.taps, spec.conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(spec.heads), requires_grad=False)
        self.A_log = nn.Parameter(torch.empty(spec.heads), requires_grad=False)
        self.D = nn.Parameter(torch.empty(spec.heads), requires_grad=False)
        if spec.norm != "none":
            self.norm = GroupedRMSNorm(spec.inner, spec.eps, spec.groups)
        self.out_proj = Linear(spec.inner, spec.hidden, spec.out_bias)

    def forward(
        self, h: torch.Tensor, conv: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """h: [B, T, hidden]; conv and state as in `Mamba2Spec.states`. Returns [B, T, hidden] and both after these tokens."""
        s, lead = self.spec, h.shape[:2]
        h = scaled(h, s.into)
        joined = self.zxbc_proj(h)
        gate = scaled(joined.narrow(2, 0, s.inner), s.parts[0])
        mixed, conv = self.conv1d(self.convolved(joined), conv)
        mixed = self.act(mixed)
        x = mixed.narrow(2, 0, s.inner).reshape(*lead, s.heads, s.head_dim)
        b = mixed.narrow(2, s.inner, s.groups * s.state).reshape(*lead, s.groups, s.state)
        c = mixed.narrow(2, s.inner + s.groups * s.state, s.groups * s.state).reshape(*lead, s.groups, s.state)
        step = self.time_step(scaled(self.dt_proj(h), s.parts[4])).unsqueeze(3)  # [B, T, H, 1]
        fade = step * -torch.exp(self.A_log.to(step.dtype)).unsqueeze(1)
        y, state = EW.linear_attention(c, b, x * step, fade, state, 1.0)
        y = (y + x * self.D.to(x.dtype).unsqueeze(1)).reshape(*lead, s.inner)
        return self.out_proj(self.gated(y, gate)), conv, state

    def time_step(self, dt: torch.Tensor) -> torch.Tensor:
        """Time steps [B, T, H] of projections dt [B, T, H]."""
        step, (least, most) = softplus(dt + self.dt_bias.to(dt.dtype)), self.spec.limits
        if least > 0:  # by relu, which every backend computes where it computes the rest
            step = torch.relu(step - least) + least
        return step if math.isinf(most) else most - torch.relu(most - step)

    def convolved(self, joined: torch.Tensor) -> torch.Tensor:
        """x, B and C of the input projection [B, T, channels], each times its multiplier."""
        s = self.spec
        if s.parts[1:4] == (1.0, 1.0, 1.0):
            return joined.narrow(2, s.inner, s.channels)
        at, parts = s.inner, []
        for width, by in zip((s.inner, s.groups * s.state, s.groups * s.state), s.parts[1:4], strict=True):
            parts.append(scaled(joined.narrow(2, at, width), by))
            at += width
        return torch.cat(parts, 2)

    def gated(self, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        if self.spec.norm == "before":
            y = self.norm(y)
        y = y * silu(gate)
        return self.norm(y) if self.spec.norm == "after" else y


def scaled(x: torch.Tensor, by: float) -> torch.Tensor:
    """`x * by`; x itself if `by` is 1, so the graph has no node for it."""
    return x if by == 1.0 else x * by
