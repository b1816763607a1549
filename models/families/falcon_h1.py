"""Falcon-H1 (arXiv 2507.22448): Mamba-2 (arXiv 2405.21060) and attention side by side in every layer.

The config's multipliers (muP) stay where the model has them. Only the key multiplier is part of the scale of the scores, which
are linear in the keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...graph import State
from ..causal import CausalModel, DecoderParts, conv_state, kv_states, recurrent_state
from ..config import ConfigReader
from ..kv_cache import Cache
from ..layers.activations import activation, silu, softplus
from ..layers.attention import AttentionSpec, CachedAttention
from ..layers.block import Block
from ..layers.linear import Embedding, Linear
from ..layers.norm import CausalConv, RMSNorm
from ..layers.ops import EW
from ..rope import read_rope


def scaled(x: torch.Tensor, by: float) -> torch.Tensor:
    """`x * by`; x itself if `by` is 1, so the graph has no node for it."""
    return x if by == 1.0 else x * by


@dataclass(frozen=True)
class MambaSpec:
    """Sizes and options of one Mamba-2 mixer.

    norm: 'none', 'before' or 'after' the gate. into: the multiplier of the input. parts: multipliers of z, x, B, C and dt.
    """

    hidden: int
    heads: int
    head_dim: int
    groups: int
    state: int
    taps: int
    act: str
    eps: float
    conv_bias: bool
    in_bias: bool
    out_bias: bool
    norm: str
    into: float
    parts: tuple[float, ...]

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """The channels of x, B and C, which the convolution runs over."""
        return self.inner + 2 * self.groups * self.state


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


class Mamba(Block):
    """`out(gate(scan(conv(in(x)))))`; the input projection computes gate z, x, B, C and dt side by side.

    The decay depends on dt, the last few rows of that matrix. They do not justify 16 bits for all of it, so it is not protected.
    """

    def __init__(self, spec: MambaSpec) -> None:
        super().__init__()
        self.spec, self.heads, self.act = spec, spec.heads, activation(spec.act)
        self.in_proj = Linear(spec.hidden, spec.inner + spec.channels + spec.heads, spec.in_bias)
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
        s, lead = self.spec, h.shape[:2]
        joined = self.in_proj(scaled(h, s.into))
        gate = scaled(joined.narrow(2, 0, s.inner), s.parts[0])
        dt = scaled(joined.narrow(2, s.inner + s.channels, s.heads), s.parts[4])
        mixed, conv = self.conv1d(self.convolved(joined), conv)
        mixed = self.act(mixed)
        x = mixed.narrow(2, 0, s.inner).reshape(*lead, s.heads, s.head_dim)
        b = mixed.narrow(2, s.inner, s.groups * s.state).reshape(*lead, s.groups, s.state)
        c = mixed.narrow(2, s.inner + s.groups * s.state, s.groups * s.state).reshape(*lead, s.groups, s.state)
        step = softplus(dt + self.dt_bias.to(dt.dtype)).unsqueeze(3)  # [B, T, H, 1]
        fade = step * -torch.exp(self.A_log.to(dt.dtype)).unsqueeze(1)
        y, state = EW.linear_attention(c, b, x * step, fade, state, 1.0)
        y = (y + x * self.D.to(x.dtype).unsqueeze(1)).reshape(*lead, s.inner)
        return self.out_proj(self.gated(y, gate)), conv, state

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
        if self.spec.norm == "after":
            y = self.norm(y)
        return y


class ScaledMLP(Block):
    """`down(up(x) * act(gate(x) * into)) * out`."""

    fused = (("gate_proj", "up_proj"),)

    def __init__(self, hidden: int, intermediate: int, act: str, bias: bool, into: float, out: float) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate, bias)
        self.up_proj = Linear(hidden, intermediate, bias)
        self.down_proj = Linear(intermediate, hidden, bias)
        self.act, self.into, self.out = activation(act), into, out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gated = self.act(scaled(self.gate_proj(x), self.into)) * self.up_proj(x)
        return scaled(self.down_proj(gated), self.out)


@dataclass(frozen=True)
class Multipliers:
    """Multipliers of a layer's attention input and output, of its Mamba output, of its MLP's gate and output."""

    attention_in: float
    attention_out: float
    mamba_out: float
    mlp: tuple[float, ...]


class Layer(nn.Module):
    """Mamba-2 and attention side by side, then the gated MLP. by: the multipliers."""

    def __init__(self, spec: AttentionSpec, mamba: MambaSpec, section: ConfigReader, by: Multipliers) -> None:
        super().__init__()
        intermediate, act = section.integer("intermediate_size"), section.text("hidden_act", "silu")
        self.by = by
        self.feed_forward = ScaledMLP(spec.hidden, intermediate, act, section.boolean("mlp_bias", False), *by.mlp)
        self.mamba = Mamba(mamba)
        self.self_attn = CachedAttention(spec)
        self.input_layernorm = RMSNorm(spec.hidden, mamba.eps, offset=0.0)
        self.pre_ff_layernorm = RMSNorm(spec.hidden, mamba.eps, offset=0.0)

    def forward(
        self,
        h: torch.Tensor,
        past_length: torch.Tensor,
        k_cache: Cache,
        v_cache: Cache,
        conv: torch.Tensor,
        state: torch.Tensor,
    ) -> tuple[Cache, ...]:
        x = self.input_layernorm(h)
        scanned, conv, state = self.mamba(x, conv, state)
        attended, k, v = self.self_attn(scaled(x, self.by.attention_in), past_length, k_cache, v_cache)
        h = h + scaled(scanned, self.by.mamba_out) + scaled(attended, self.by.attention_out)
        return h + self.feed_forward(self.pre_ff_layernorm(h)), k, v, conv, state


class Decoder(nn.Module):
    """Embedding, layers and last norm."""

    def __init__(self, section: ConfigReader, vocab: int) -> None:
        super().__init__()
        self.hidden = hidden = section.integer("hidden_size")
        heads = section.integer("num_attention_heads", most=4096)
        kv_heads = section.divisor("num_key_value_heads", heads, heads)
        head_dim = section.head_dim(hidden // heads)
        rope = read_rope(section, 10000.0)
        bias = section.boolean("attention_bias", False)
        scale = head_dim**-0.5 * multiplier(section, "key_multiplier")
        self.attention = AttentionSpec(hidden, heads, kv_heads, head_dim, scale, rope, bias=bias, out_bias=bias)
        self.mamba = read_mamba(section, hidden)
        by = Multipliers(
            multiplier(section, "attention_in_multiplier"),
            multiplier(section, "attention_out_multiplier"),
            multiplier(section, "ssm_out_multiplier"),
            multipliers(section, "mlp_multipliers", 2),
        )
        self.embedding_multiplier = multiplier(section, "embedding_multiplier")
        self.embed_tokens = Embedding(vocab, hidden)
        layers = section.integer("num_hidden_layers", most=1024)
        self.layers = nn.ModuleList(Layer(self.attention, self.mamba, section, by) for _ in range(layers))
        self.final_layernorm = RMSNorm(hidden, self.mamba.eps, offset=0.0)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        return scaled(self.embed_tokens(input_ids), self.embedding_multiplier)

    def states(self) -> list[list[State]]:
        a, m = self.attention, self.mamba
        return [
            [
                *kv_states(i, a.kv_heads, a.head_dim),
                conv_state(i, m.channels, m.taps),
                recurrent_state(i, m.heads, m.state, m.head_dim),
            ]
            for i in range(len(self.layers))
        ]


def multiplier(section: ConfigReader, key: str) -> float:
    """The number under `key`, which may be negative; 1 if it is absent."""
    return section.number(key, 1.0, least=-1e6)


def multipliers(section: ConfigReader, key: str, count: int) -> tuple[float, ...]:
    """The list of `count` numbers under `key`; ones if it is absent."""
    values = section.values.get(key)
    if values is None:
        values = [1.0] * count
    if not isinstance(values, list | tuple) or len(values) != count:
        raise section.error(key, values, f"a list of {count} numbers")
    return tuple(ConfigReader({key: v}, section.where).number(key, least=-1e6) for v in values)


def read_mamba(section: ConfigReader, hidden: int) -> MambaSpec:
    """The sizes by the `mamba_…` and `ssm_…` keys. Raises UserError for a bad value or a clamped time step."""
    heads = section.integer("mamba_n_heads", 128, most=4096)
    inner = section.values.get("mamba_d_ssm", 1024)
    if inner is None:
        inner = section.integer("mamba_expand", 2, most=64) * hidden
    if isinstance(inner, bool) or not isinstance(inner, int) or not heads <= inner <= 1 << 24 or inner % heads:
        raise section.error("mamba_d_ssm", inner, f"a multiple of {heads} heads")
    if section.values.get("mamba_d_head", "auto") not in ("auto", None, inner // heads):
        raise section.error("mamba_d_head", section.values["mamba_d_head"], f"'auto' or {inner // heads}")
    norm = "before" if section.boolean("mamba_norm_before_gate", True) else "after"
    groups = section.divisor("mamba_n_groups", heads, 1)
    if groups > 64:
        raise section.error("mamba_n_groups", groups, "at most 64")
    _refuse_clamp(section)
    return MambaSpec(
        hidden,
        heads,
        inner // heads,
        groups,
        section.integer("mamba_d_state", 256, most=65536),
        section.integer("mamba_d_conv", 4, least=2, most=64),
        section.text("hidden_act", "silu"),
        section.number("rms_norm_eps", 1e-5),
        conv_bias=section.boolean("mamba_conv_bias", True),
        in_bias=section.boolean("mamba_proj_bias", False),
        out_bias=section.boolean("projectors_bias", False),
        norm=norm if section.boolean("mamba_rms_norm", False) else "none",
        into=multiplier(section, "ssm_in_multiplier"),
        parts=multipliers(section, "ssm_multipliers", 5),
    )


def _refuse_clamp(section: ConfigReader) -> None:
    """Raises UserError unless `time_step_limit` is absent, null, or 0 to infinity."""
    limit = section.values.get("time_step_limit")
    if limit is None:
        return
    tagged = {"__float__": "Infinity"}  # how transformers writes it
    if (
        not isinstance(limit, list | tuple)
        or len(limit) != 2
        or limit[0] != 0
        or limit[1] not in (float("inf"), tagged)
    ):
        raise section.error("time_step_limit", limit, "nothing: a clamped time step is not supported")


class Model(CausalModel):
    """A Falcon-H1 checkpoint's modules, named as the checkpoint names them."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.vocab = self.section.integer("vocab_size")
        self.model = Decoder(self.section, self.vocab)
        self.lm_head = Linear(self.model.hidden, self.vocab)
        self.head_multiplier = multiplier(self.section, "lm_head_multiplier")
        self.tied = self.tied_head(default=False)
        self.max_context = self.section.integer("max_position_embeddings", 8192)

    def head(self, h: torch.Tensor) -> torch.Tensor:
        """Logits of the last hidden states h [B, L, hidden]."""
        return scaled(self.lm_head(h), self.head_multiplier)

    def parts(self) -> DecoderParts:
        return DecoderParts(self.model.embed, self.model.layers, self.model.final_layernorm, self.head)

    def states(self) -> list[list[State]]:
        return self.model.states()
