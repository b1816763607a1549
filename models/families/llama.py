"""Llama (arXiv 2302.13971) and its small kin such as SmolLM2. What may enter: `ops`, the shared layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...graph import Graph
from ..causal import CausalStep, causal_graph, kv_states
from ..config import ConfigReader
from ..kv_cache import Cache
from ..layers.attention import AttentionSpec, CachedAttention
from ..layers.linear import Embedding, Linear
from ..layers.mlp import GatedMLP
from ..layers.norm import RMSNorm


class Layer(nn.Module):
    def __init__(self, spec: AttentionSpec, intermediate: int, act: str, eps: float, mlp_bias: bool) -> None:
        super().__init__()
        self.self_attn = CachedAttention(spec)
        self.mlp = GatedMLP(spec.hidden, intermediate, act, mlp_bias)
        self.input_layernorm = RMSNorm(spec.hidden, eps, offset=0.0)
        self.post_attention_layernorm = RMSNorm(spec.hidden, eps, offset=0.0)

    def forward(
        self, h: torch.Tensor, past_length: torch.Tensor, k_cache: Cache, v_cache: Cache
    ) -> tuple[torch.Tensor, Cache, Cache]:
        attended, k, v = self.self_attn(self.input_layernorm(h), past_length, k_cache, v_cache)
        h = h + attended
        return h + self.mlp(self.post_attention_layernorm(h)), k, v


class Decoder(nn.Module):
    def __init__(self, spec: AttentionSpec, section: ConfigReader, vocab: int, eps: float) -> None:
        super().__init__()
        self.embed_tokens = Embedding(vocab, spec.hidden)
        intermediate = section.integer("intermediate_size")
        act, mlp_bias = section.text("hidden_act", "silu"), section.boolean("mlp_bias", False)
        self.layers = nn.ModuleList(
            Layer(spec, intermediate, act, eps, mlp_bias)
            for _ in range(section.integer("num_hidden_layers", most=1024))
        )
        self.norm = RMSNorm(spec.hidden, eps, offset=0.0)


class Model(nn.Module):
    """A Llama checkpoint's modules, named as the checkpoint names them."""

    task = "causal"

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        section = ConfigReader(config, "")
        hidden, heads = section.integer("hidden_size"), section.integer("num_attention_heads", most=4096)
        head_dim = section.head_dim(hidden // heads)
        kv_heads = section.integer("num_key_value_heads", heads, most=4096)
        if heads % kv_heads:
            raise section.error("num_key_value_heads", kv_heads, f"a divisor of {heads} heads")
        theta, factor = section.rope(10000.0)
        bias = section.boolean("attention_bias", False)
        spec = AttentionSpec(hidden, heads, kv_heads, head_dim, head_dim**-0.5, theta, factor, bias=bias, out_bias=bias)
        self.spec, self.vocab = spec, section.integer("vocab_size")
        self.model = Decoder(spec, section, self.vocab, section.number("rms_norm_eps", 1e-6))
        self.lm_head = Linear(hidden, self.vocab)
        tied = section.boolean("tie_word_embeddings", False)
        self.tied = {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}
        self.decoder_start = None
        self.max_context = section.integer("max_position_embeddings", 2048)

    @staticmethod
    def shorten(config: dict[str, Any], layers: int) -> dict[str, Any]:
        """The config with at most `layers` layers (a rehearsal)."""
        return config | {"num_hidden_layers": min(layers, config["num_hidden_layers"])}

    def stacks(self) -> dict[str, nn.ModuleList]:
        return {"decoder": self.model.layers}

    def graphs(self) -> list[Graph]:
        inner = self.model
        step = CausalStep(self, inner.embed_tokens, inner.layers, inner.norm, self.lm_head)
        states = [kv_states(i, self.spec.kv_heads, self.spec.head_dim) for i in range(len(inner.layers))]
        return causal_graph(step, states, self.vocab, self.max_context)
