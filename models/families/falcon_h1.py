"""Falcon-H1 (arXiv 2507.22448): Mamba-2 (arXiv 2405.21060) and attention side by side in every layer.

The config's multipliers (muP) stay where the model has them. Only the key multiplier is part of the scale of the scores, which
are linear in the keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ...checkpoints.names import Names
from ...graph import State
from ..causal import CausalModel, DecoderParts, kv_states
from ..config import ConfigReader
from ..kv_cache import Cache
from ..layers.activations import activation
from ..layers.attention import AttentionSpec, CachedAttention
from ..layers.block import Block
from ..layers.linear import Embedding, Linear
from ..layers.mamba2 import Mamba2, Mamba2Spec, in_proj_names, read_groups, read_time_steps, scaled
from ..layers.norm import RMSNorm
from ..rope import read_rope


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

    def __init__(self, spec: AttentionSpec, mamba: Mamba2Spec, section: ConfigReader, by: Multipliers) -> None:
        super().__init__()
        intermediate, act = section.integer("intermediate_size"), section.text("hidden_act", "silu")
        self.by = by
        self.feed_forward = ScaledMLP(spec.hidden, intermediate, act, section.boolean("mlp_bias", False), *by.mlp)
        self.mamba = Mamba2(mamba)
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
                *m.states(i),
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


def read_mamba(section: ConfigReader, hidden: int) -> Mamba2Spec:
    """The sizes by the `mamba_…` and `ssm_…` keys. Raises UserError for a bad value."""
    heads = section.integer("mamba_n_heads", 128, most=4096)
    inner = section.values.get("mamba_d_ssm", 1024)
    if inner is None:
        inner = section.integer("mamba_expand", 2, most=64) * hidden
    if isinstance(inner, bool) or not isinstance(inner, int) or not heads <= inner <= 1 << 24 or inner % heads:
        raise section.error("mamba_d_ssm", inner, f"a multiple of {heads} heads")
    if section.values.get("mamba_d_head", "auto") not in ("auto", None, inner // heads):
        raise section.error("mamba_d_head", section.values["mamba_d_head"], f"'auto' or {inner // heads}")
    norm: Literal["before", "after"] = "before" if section.boolean("mamba_norm_before_gate", True) else "after"
    return Mamba2Spec(
        hidden,
        heads,
        inner // heads,
        read_groups(section, "mamba_n_groups", heads, 1),
        section.integer("mamba_d_state", 256, most=65536),
        section.integer("mamba_d_conv", 4, least=2, most=64),
        section.text("hidden_act", "silu"),
        section.number("rms_norm_eps", 1e-5),
        conv_bias=section.boolean("mamba_conv_bias", True),
        in_bias=section.boolean("mamba_proj_bias", False),
        out_bias=section.boolean("projectors_bias", False),
        norm=norm if section.boolean("mamba_rms_norm", False) else "none",
        limits=read_time_steps(section),
        into=multiplier(section, "ssm_in_multiplier"),
        parts=multipliers(section, "ssm_multipliers", 5),
    )


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

    @property
    def names(self) -> Names:
        mixer = "model.layers.{}.mamba"
        return Names(in_proj_names(self.model.mamba, mixer, mixer))

    def head(self, h: torch.Tensor) -> torch.Tensor:
        """Logits of the last hidden states h [B, L, hidden]."""
        return scaled(self.lm_head(h), self.head_multiplier)

    def parts(self) -> DecoderParts:
        return DecoderParts(self.model.embed, self.model.layers, self.model.final_layernorm, self.head)

    def states(self) -> list[list[State]]:
        return self.model.states()
