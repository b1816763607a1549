"""Gemma 3, text (arXiv 2503.19786): QK-norm, five sliding layers to one full, a RoPE base for each kind.

What may enter: `ops`, the shared layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...errors import UserError
from ...graph import Graph
from ..causal import CausalStep, causal_graph, kv_states
from ..config import ConfigReader
from ..kv_cache import Cache
from ..layers.activations import softcap
from ..layers.attention import AttentionSpec, CachedAttention
from ..layers.linear import Embedding, Linear
from ..layers.mlp import GatedMLP
from ..layers.norm import RMSNorm


class Layer(nn.Module):
    def __init__(self, spec: AttentionSpec, intermediate: int, act: str, eps: float) -> None:
        super().__init__()
        self.self_attn = CachedAttention(spec)
        self.mlp = GatedMLP(spec.hidden, intermediate, act)
        self.input_layernorm = RMSNorm(spec.hidden, eps, offset=1.0)
        self.post_attention_layernorm = RMSNorm(spec.hidden, eps, offset=1.0)
        self.pre_feedforward_layernorm = RMSNorm(spec.hidden, eps, offset=1.0)
        self.post_feedforward_layernorm = RMSNorm(spec.hidden, eps, offset=1.0)

    def forward(
        self, h: torch.Tensor, past_length: torch.Tensor, k_cache: Cache, v_cache: Cache
    ) -> tuple[torch.Tensor, Cache, Cache]:
        attended, k, v = self.self_attn(self.input_layernorm(h), past_length, k_cache, v_cache)
        h = h + self.post_attention_layernorm(attended)
        return h + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h))), k, v


class Decoder(nn.Module):
    def __init__(self, section: ConfigReader, vocab: int) -> None:
        super().__init__()
        hidden, heads = section.integer("hidden_size"), section.integer("num_attention_heads", most=4096)
        head_dim = section.head_dim(256)
        kv_heads = section.integer("num_key_value_heads", heads, most=4096)
        if heads % kv_heads:
            raise section.error("num_key_value_heads", kv_heads, f"a divisor of {heads} heads")
        layers = section.integer("num_hidden_layers", most=1024)
        types = section.layer_types(layers, section.integer("sliding_window_pattern", 6))
        eps, intermediate = section.number("rms_norm_eps", 1e-6), section.integer("intermediate_size")
        act = section.text("hidden_activation", "gelu_pytorch_tanh")
        bias = section.boolean("attention_bias", False)
        scale = section.number("query_pre_attn_scalar", 256.0, least=1e-6) ** -0.5
        cap = section.values.get("attn_logit_softcapping")
        if cap is not None:
            # transformers' Gemma 3 reads the key and leaves it unused; a checkpoint that sets it is not one we know.
            raise UserError(f"config.json: attn_logit_softcapping is {cap!r}; Gemma 3 has no attention soft-capping")
        window = section.window(types)
        bases = {
            "full_attention": section.rope(1e6, "full_attention"),
            "sliding_attention": section.rope(1e4, "sliding_attention"),
        }
        self.hidden = hidden
        self.kv_shape = (kv_heads, head_dim)
        self.embed_tokens = Embedding(vocab, hidden)
        self.layers = nn.ModuleList(
            Layer(
                AttentionSpec(
                    hidden,
                    heads,
                    kv_heads,
                    head_dim,
                    scale,
                    theta=bases[kind][0],
                    rope_factor=bases[kind][1],
                    window=window if kind == "sliding_attention" else 0,
                    bias=bias,
                    out_bias=bias,
                    norm_eps=eps,
                ),
                intermediate,
                act,
                eps,
            )
            for kind in types
        )
        self.norm = RMSNorm(hidden, eps, offset=1.0)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.embed_tokens(input_ids) * self.hidden**0.5
        return out


class Model(nn.Module):
    """A Gemma 3 text checkpoint's modules, named as the checkpoint names them."""

    task = "causal"

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        section = ConfigReader(config, "")
        if config.get("use_bidirectional_attention"):
            raise UserError(
                "config.json: use_bidirectional_attention is set; EmbeddingGemma encoders are not supported"
            )
        self.vocab = section.integer("vocab_size")
        self.model = Decoder(section, self.vocab)
        self.lm_head = Linear(self.model.hidden, self.vocab)
        self.cap = section.number("final_logit_softcapping") if config.get("final_logit_softcapping") else 0.0
        tied = section.boolean("tie_word_embeddings", True)
        self.tied = {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}
        self.decoder_start = None
        self.max_context = section.integer("max_position_embeddings", 32768)

    @staticmethod
    def shorten(config: dict[str, Any], layers: int) -> dict[str, Any]:
        """The config with at most `layers` layers (a rehearsal)."""
        short = config | {"num_hidden_layers": min(layers, config["num_hidden_layers"])}
        if short.get("layer_types"):
            short["layer_types"] = short["layer_types"][: short["num_hidden_layers"]]
        return short

    def stacks(self) -> dict[str, nn.ModuleList]:
        return {"decoder": self.model.layers}

    def head(self, h: torch.Tensor) -> torch.Tensor:
        return softcap(self.lm_head(h), self.cap)

    def graphs(self) -> list[Graph]:
        inner = self.model
        step = CausalStep(self, inner.embed, inner.layers, inner.norm, self.head)
        states = [kv_states(i, *inner.kv_shape) for i in range(len(inner.layers))]
        return causal_graph(step, states, self.vocab, self.max_context)
