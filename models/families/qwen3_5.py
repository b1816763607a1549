"""Qwen3.5, text, and dense Qwen3-Next: Gated DeltaNet layers (arXiv 2412.06464), gated attention every few layers.

The two differ in how the DeltaNet's projections are cut.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from ...errors import UserError
from ...graph import State
from ..causal import CausalModel, DecoderParts
from ..config import ConfigReader
from ..kv_cache import Cache
from ..language_model import shorten_stack
from ..layers.activations import silu
from ..layers.attention import AttentionSpec, GatedCachedAttention
from ..layers.linear import Embedding, Linear
from ..layers.mlp import GatedMLP
from ..layers.norm import RMSNorm
from ..rope import read_rope
from .gated_delta import DeltaSpec, GatedDelta, hybrid_states, read_delta

Projected = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class _DeltaNet(GatedDelta, ABC):
    """Norm, gate z and output projection. An heir projects the inputs."""

    def __init__(self, spec: DeltaSpec, eps: float) -> None:
        super().__init__(spec)
        self.norm = RMSNorm(spec.value_dim, eps, offset=0.0)
        self.out_proj = Linear(spec.values, spec.hidden)

    @abstractmethod
    def project(self, x: torch.Tensor) -> Projected:
        """qkv [B, T, channels], z [B, T, H, Dv], and a, b [B, T, H] of x [B, T, hidden]."""

    def forward(
        self, x: torch.Tensor, conv: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        qkv, z, a, b = self.project(x)
        out, conv, state = self.mix(qkv, a, b, conv, state)
        gated = self.norm(out) * silu(z)
        return self.out_proj(gated.reshape(*x.shape[:2], self.delta.values)), conv, state


class DeltaNet(_DeltaNet):
    """Qwen3.5's: one projection for queries, keys and values, one each for z, b and a."""

    fused = (("in_proj_qkv", "in_proj_z"),)
    protected = ("in_proj_a", "in_proj_b")

    def __init__(self, spec: DeltaSpec, eps: float) -> None:
        super().__init__(spec, eps)
        self.in_proj_qkv = Linear(spec.hidden, spec.channels)
        self.in_proj_z = Linear(spec.hidden, spec.values)
        self.in_proj_b = Linear(spec.hidden, spec.value_heads)
        self.in_proj_a = Linear(spec.hidden, spec.value_heads)

    def project(self, x: torch.Tensor) -> Projected:
        z = self.in_proj_z(x).reshape(*x.shape[:2], self.delta.value_heads, self.delta.value_dim)
        return self.in_proj_qkv(x), z, self.in_proj_a(x), self.in_proj_b(x)


class NextDeltaNet(_DeltaNet):
    """Qwen3-Next's: for each key head its query, key, values and z side by side, and likewise b and a."""

    protected = ("in_proj_ba",)

    def __init__(self, spec: DeltaSpec, eps: float) -> None:
        super().__init__(spec, eps)
        self.in_proj_qkvz = Linear(spec.hidden, spec.channels + spec.values)
        self.in_proj_ba = Linear(spec.hidden, 2 * spec.value_heads)

    def project(self, x: torch.Tensor) -> Projected:
        s, lead = self.delta, x.shape[:2]
        each = s.value_heads // s.key_heads
        wide = each * s.value_dim
        heads = self.in_proj_qkvz(x).reshape(*lead, s.key_heads, 2 * s.key_dim + 2 * wide)
        q = heads.narrow(3, 0, s.key_dim).reshape(*lead, s.keys)
        k = heads.narrow(3, s.key_dim, s.key_dim).reshape(*lead, s.keys)
        v = heads.narrow(3, 2 * s.key_dim, wide).reshape(*lead, s.values)
        z = heads.narrow(3, 2 * s.key_dim + wide, wide).reshape(*lead, s.value_heads, s.value_dim)
        gates = self.in_proj_ba(x).reshape(*lead, s.key_heads, 2 * each)
        b = gates.narrow(3, 0, each).reshape(*lead, s.value_heads)
        a = gates.narrow(3, each, each).reshape(*lead, s.value_heads)
        return torch.cat((q, k, v), 2), z, a, b


class Layer(nn.Module):
    """A DeltaNet as `linear_attn` or an attention as `self_attn`, and the gated MLP."""

    def __init__(self, mixer: _DeltaNet | GatedCachedAttention, hidden: int, mlp: GatedMLP, eps: float) -> None:
        super().__init__()
        self.linear = isinstance(mixer, _DeltaNet)
        if isinstance(mixer, _DeltaNet):
            self.linear_attn = mixer
        else:
            self.self_attn = mixer
        self.mlp = mlp
        self.input_layernorm = RMSNorm(hidden, eps, offset=1.0)
        self.post_attention_layernorm = RMSNorm(hidden, eps, offset=1.0)

    def forward(self, h: torch.Tensor, past_length: torch.Tensor, *states: Cache) -> tuple[Cache, ...]:
        x = self.input_layernorm(h)
        mixed, *new = self.linear_attn(x, *states) if self.linear else self.self_attn(x, past_length, *states)
        h = h + mixed
        return (h + self.mlp(self.post_attention_layernorm(h)), *new)


class Decoder(nn.Module):
    """Embedding, layers and last norm."""

    def __init__(self, section: ConfigReader, vocab: int) -> None:
        super().__init__()
        self.hidden = hidden = section.integer("hidden_size")
        heads = section.integer("num_attention_heads", 16, most=4096)
        is_next = section.text("model_type") == "qwen3_next"
        kv_heads = section.divisor("num_key_value_heads", heads, 2 if is_next else 4)
        head_dim = section.head_dim(256)
        rope = read_rope(section, 10000.0, partial=True)
        eps, bias = section.number("rms_norm_eps", 1e-6), section.boolean("attention_bias", False)
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
            rotated=section.rotated(head_dim, 0.25),
        )
        self.delta = read_delta(section, hidden, (16, 32), 128, 128)
        delta_net = NextDeltaNet if is_next else DeltaNet
        intermediate, act = section.integer("intermediate_size"), section.text("hidden_act", "silu")
        self.types = layer_types(section)
        self.embed_tokens = Embedding(vocab, hidden)
        self.layers = nn.ModuleList(
            Layer(
                delta_net(self.delta, eps) if kind == "linear_attention" else GatedCachedAttention(self.attention),
                hidden,
                GatedMLP(hidden, intermediate, act),
                eps,
            )
            for kind in self.types
        )
        self.norm = RMSNorm(hidden, eps, offset=1.0)

    def states(self) -> list[list[State]]:
        return hybrid_states(self.types, self.delta, self.attention)


def layer_types(section: ConfigReader) -> list[str]:
    """`layer_types`; if absent, full attention in every `full_attention_interval`-th layer."""
    layers = section.integer("num_hidden_layers", most=1024)
    every = section.integer("full_attention_interval", 4, most=1024)
    default = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    return section.kinds(layers, ("linear_attention", "full_attention"), default)


def _refuse_experts(section: ConfigReader) -> None:
    """Raises UserError if a layer of a Qwen3-Next config is a mixture of experts."""
    experts = section.integer("num_experts", 512, least=0)
    step = section.integer("decoder_sparse_step", 1, most=1024)
    dense = section.values.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise section.error("mlp_only_layers", dense, "a list of layers")
    layers = range(section.integer("num_hidden_layers", most=1024))
    sparse = [i for i in layers if i not in dense and (i + 1) % step == 0]
    if experts and sparse:
        raise UserError(
            f"config.json: num_experts is {experts}: layer {sparse[0]} is a mixture of experts, which is not supported; "
            "give a dense model"
        )


class Model(CausalModel):
    """A Qwen3.5 text or dense Qwen3-Next checkpoint's modules, named as the checkpoint names them."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        if self.section.text("model_type") == "qwen3_next":
            _refuse_experts(self.section)
        self.vocab = self.section.integer("vocab_size")
        self.model = Decoder(self.section, self.vocab)
        self.lm_head = Linear(self.model.hidden, self.vocab)
        self.tied = self.tied_head(default=False)
        self.max_context = self.section.integer("max_position_embeddings", 32768)

    @classmethod
    def shorten(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        return shorten_stack(config | {"layer_types": layer_types(ConfigReader(config, ""))}, layers)

    def parts(self) -> DecoderParts:
        return DecoderParts(self.model.embed_tokens, self.model.layers, self.model.norm, self.lm_head)

    def states(self) -> list[list[State]]:
        return self.model.states()
