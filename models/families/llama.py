"""Llama (arXiv 2302.13971) and its small kin such as SmolLM2."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...graph import State
from ..causal import CausalModel, DecoderParts, kv_states
from ..config import ConfigReader, StackKeys
from ..kv_cache import Cache
from ..layers.attention import AttentionSpec, CachedAttention
from ..layers.linear import Embedding, Linear
from ..layers.mlp import GatedMLP
from ..layers.norm import RMSNorm


class StackConfig(StackKeys):
    """The keys of one Llama stack. windows: of each layer, 0 where it attends to everything."""

    bias: bool
    out_bias: bool
    mlp_bias: bool
    windows: list[int]

    def __init__(self, section: ConfigReader, positions: int = 2048) -> None:
        super().__init__(section, positions)
        self.act = section.text("hidden_act", "silu")
        self.theta, self.rope_factor = section.rope(10000.0)
        self.read_layers(section)

    def read_layers(self, section: ConfigReader) -> None:
        """Set the biases and windows."""
        self.bias = self.out_bias = section.boolean("attention_bias", False)
        self.mlp_bias = section.boolean("mlp_bias", False)
        self.windows = [0] * self.layers

    def attention(self, layer: int) -> AttentionSpec:
        return AttentionSpec(
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
            theta=self.theta,
            rope_factor=self.rope_factor,
            window=self.windows[layer],
            bias=self.bias,
            out_bias=self.out_bias,
        )


class Layer(nn.Module):
    """Attention and gated MLP, each behind a norm."""

    def __init__(self, config: StackConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = CachedAttention(config.attention(layer))
        self.mlp = GatedMLP(config.hidden, config.intermediate, config.act, config.mlp_bias)
        self.input_layernorm = RMSNorm(config.hidden, config.eps, offset=0.0)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.eps, offset=0.0)

    def forward(
        self, h: torch.Tensor, past_length: torch.Tensor, k_cache: Cache, v_cache: Cache
    ) -> tuple[torch.Tensor, Cache, Cache]:
        attended, k, v = self.self_attn(self.input_layernorm(h), past_length, k_cache, v_cache)
        h = h + attended
        return h + self.mlp(self.post_attention_layernorm(h)), k, v


class Stack(nn.Module):
    """Embedding, layers and last norm."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.eps, offset=0.0)

    def parts(self, head: nn.Module) -> DecoderParts:
        return DecoderParts(self.embed_tokens, self.layers, self.norm, head)


class StackModel(CausalModel):
    """A stack with a head and a KV cache in each layer. config: the stack's keys."""

    def __init__(self, config: dict[str, Any], keys: type[StackConfig]) -> None:
        super().__init__(config)
        self.keys = keys(self.section)
        self.vocab, self.max_context = self.keys.vocab, self.keys.max_positions
        self.model = Stack(self.keys)
        self.lm_head = Linear(self.keys.hidden, self.vocab)
        self.tied = self.tied_head(default=False)

    def parts(self) -> DecoderParts:
        return self.model.parts(self.lm_head)

    def states(self) -> list[list[State]]:
        return [kv_states(i, self.keys.kv_heads, self.keys.head_dim) for i in range(self.keys.layers)]


class Model(StackModel):
    """A Llama checkpoint's modules, named as the checkpoint names them."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config, StackConfig)
