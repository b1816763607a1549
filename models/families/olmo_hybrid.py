"""OLMo Hybrid: Gated DeltaNet layers (arXiv 2412.06464) with OLMo 3's attention every few layers.

Norms stand before the mixer and the MLP in a DeltaNet layer, after them in an attention layer. Without `rope_parameters` the
attention has no positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...checkpoints.names import Names, join, rename
from ...graph import State
from ..causal import CausalModel, DecoderParts
from ..config import ConfigReader
from ..kv_cache import Cache
from ..language_model import shorten_stack
from ..layers.activations import silu
from ..layers.attention import AttentionSpec, CachedAttention
from ..layers.linear import Embedding, Linear
from ..layers.mlp import GatedMLP
from ..layers.norm import RMSNorm
from ..rope import Rope, read_rope
from .gated_delta import DeltaSpec, GatedDelta, hybrid_states, read_delta

_GATE_EPS = 1e-5  # of the norm before the gate, whatever rms_norm_eps says


class DeltaNet(GatedDelta):
    """One projection each for queries, keys, values, decay, rate and gate."""

    fused = (("q_proj", "k_proj", "v_proj", "g_proj"),)
    protected = ("a_proj", "b_proj")

    def __init__(self, spec: DeltaSpec) -> None:
        super().__init__(spec)
        self.q_proj = Linear(spec.hidden, spec.keys)
        self.k_proj = Linear(spec.hidden, spec.keys)
        self.v_proj = Linear(spec.hidden, spec.values)
        self.a_proj = Linear(spec.hidden, spec.value_heads)
        self.b_proj = Linear(spec.hidden, spec.value_heads)
        self.g_proj = Linear(spec.hidden, spec.values)
        self.o_norm = RMSNorm(spec.value_dim, _GATE_EPS, offset=0.0)
        self.o_proj = Linear(spec.values, spec.hidden)

    def forward(
        self, x: torch.Tensor, conv: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        s, lead = self.delta, x.shape[:2]
        qkv = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), 2)
        out, conv, state = self.mix(qkv, self.a_proj(x), self.b_proj(x), conv, state)
        gated = self.o_norm(out) * silu(self.g_proj(x).reshape(*lead, s.value_heads, s.value_dim))
        return self.o_proj(gated.reshape(*lead, s.values)), conv, state


class LinearLayer(nn.Module):
    """A DeltaNet and the gated MLP, each behind a norm."""

    def __init__(self, spec: DeltaSpec, mlp: GatedMLP, eps: float) -> None:
        super().__init__()
        self.linear_attn = DeltaNet(spec)
        self.mlp = mlp
        self.input_layernorm = RMSNorm(spec.hidden, eps, offset=0.0)
        self.post_attention_layernorm = RMSNorm(spec.hidden, eps, offset=0.0)

    def forward(
        self, h: torch.Tensor, past_length: torch.Tensor, conv: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mixed, conv, state = self.linear_attn(self.input_layernorm(h), conv, state)
        h = h + mixed
        return h + self.mlp(self.post_attention_layernorm(h)), conv, state


class AttentionLayer(nn.Module):
    """Attention and the gated MLP, each before a norm."""

    def __init__(self, spec: AttentionSpec, mlp: GatedMLP, eps: float) -> None:
        super().__init__()
        self.self_attn = CachedAttention(spec)
        self.mlp = mlp
        self.post_attention_layernorm = RMSNorm(spec.hidden, eps, offset=0.0)
        self.post_feedforward_layernorm = RMSNorm(spec.hidden, eps, offset=0.0)

    def forward(
        self, h: torch.Tensor, past_length: torch.Tensor, k_cache: Cache, v_cache: Cache
    ) -> tuple[torch.Tensor, Cache, Cache]:
        attended, k, v = self.self_attn(h, past_length, k_cache, v_cache)
        h = h + self.post_attention_layernorm(attended)
        return h + self.post_feedforward_layernorm(self.mlp(h)), k, v


def layer_types(section: ConfigReader) -> list[str]:
    """`layer_types`; if absent, full attention in every fourth layer, and in the last of fewer than four."""
    layers = section.integer("num_hidden_layers", most=1024)
    default = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)]
    if layers < 4:
        default[-1] = "full_attention"
    return section.kinds(layers, ("linear_attention", "full_attention"), default)


class Decoder(nn.Module):
    """Embedding, layers and last norm."""

    def __init__(self, section: ConfigReader, vocab: int) -> None:
        super().__init__()
        self.hidden = hidden = section.integer("hidden_size")
        heads = section.integer("num_attention_heads", most=4096)
        kv_heads = section.divisor("num_key_value_heads", heads, heads)
        head_dim = section.head_dim(hidden // heads)
        eps, bias = section.number("rms_norm_eps", 1e-6), section.boolean("attention_bias", False)
        rope, rotated = rotary(section)
        self.attention = AttentionSpec(
            hidden,
            heads,
            kv_heads,
            head_dim,
            head_dim**-0.5,
            rope,
            bias=bias,
            out_bias=bias,
            norm_eps=eps,
            norm_offset=0.0,
            norm_whole=True,
            rotated=rotated,
        )
        rate = 2.0 if section.boolean("linear_allow_neg_eigval", True) else 1.0
        key_heads = section.integer("linear_num_key_heads", heads, most=4096)
        self.delta = read_delta(section, hidden, (heads, heads), max(1, 3 * hidden // (4 * key_heads)), None, rate)
        intermediate, act = section.integer("intermediate_size"), section.text("hidden_act", "silu")
        self.types = layer_types(section)
        self.embed_tokens = Embedding(vocab, hidden)
        self.layers = nn.ModuleList()
        for kind in self.types:
            mlp = GatedMLP(hidden, intermediate, act)
            linear = kind == "linear_attention"
            self.layers.append(
                LinearLayer(self.delta, mlp, eps) if linear else AttentionLayer(self.attention, mlp, eps)
            )
        self.norm = RMSNorm(hidden, eps, offset=0.0)

    def states(self) -> list[list[State]]:
        return hybrid_states(self.types, self.delta, self.attention)


def rotary(section: ConfigReader) -> tuple[Rope, int | None]:
    """RoPE and rotated dimensions; no dimension rotates if the config has no rope_theta."""
    params = section.values.get("rope_parameters")
    theta = params.get("rope_theta") if isinstance(params, dict) else params
    if theta is None and section.values.get("rope_theta") is None:
        return Rope(), 0
    return read_rope(section, 500000.0), None


class Model(CausalModel):
    """An OLMo Hybrid checkpoint's modules, named as the checkpoint names them."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.vocab = self.section.integer("vocab_size")
        self.model = Decoder(self.section, self.vocab)
        self.lm_head = Linear(self.model.hidden, self.vocab)
        self.tied = self.tied_head(default=False)
        self.max_context = self.section.integer("max_position_embeddings", 65536)

    @property
    def names(self) -> Names:
        """Files have a convolution each for queries, keys and values, and norms of other names."""
        layer = "model.layers.{}."
        return Names(
            *join((f"{layer}linear_attn.{n}_conv1d" for n in "qkv"), f"{layer}linear_attn.conv1d"),
            rename(f"{layer}attention_layer_norm", f"{layer}input_layernorm"),
            rename(f"{layer}feedforward_layer_norm", f"{layer}post_attention_layernorm"),
        )

    @classmethod
    def shorten(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        return shorten_stack(config | {"layer_types": layer_types(ConfigReader(config, ""))}, layers)

    def parts(self) -> DecoderParts:
        return DecoderParts(self.model.embed_tokens, self.model.layers, self.model.norm, self.lm_head)

    def states(self) -> list[list[State]]:
        return self.model.states()
