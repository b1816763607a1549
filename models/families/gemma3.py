"""Gemma 3, text (arXiv 2503.19786): QK-norm, five sliding layers to one full, a RoPE base for each kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...errors import UserError
from ...graph import State
from ..causal import CausalModel, DecoderParts, kv_states
from ..kv_cache import Cache
from ..layers.activations import softcap
from ..layers.attention import CachedAttention
from ..layers.linear import Embedding, Linear
from ..layers.mlp import GatedMLP
from .gemma import Gemma3Config, GemmaStack


class Layer(nn.Module):
    """Attention and gated MLP, each between two norms."""

    def __init__(self, config: Gemma3Config, layer: int) -> None:
        super().__init__()
        self.self_attn = CachedAttention(config.attention(layer))
        self.mlp = GatedMLP(config.hidden, config.intermediate, config.act)
        self.input_layernorm = config.norm()
        self.post_attention_layernorm = config.norm()
        self.pre_feedforward_layernorm = config.norm()
        self.post_feedforward_layernorm = config.norm()

    def forward(
        self, h: torch.Tensor, past_length: torch.Tensor, k_cache: Cache, v_cache: Cache
    ) -> tuple[torch.Tensor, Cache, Cache]:
        attended, k, v = self.self_attn(self.input_layernorm(h), past_length, k_cache, v_cache)
        h = h + self.post_attention_layernorm(attended)
        return h + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h))), k, v


class Decoder(GemmaStack):
    """Embedding, layers and last norm."""

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__(
            config, Embedding(config.vocab, config.hidden), (Layer(config, i) for i in range(config.layers))
        )


class Model(CausalModel):
    """A Gemma 3 text checkpoint's modules, named as the checkpoint names them."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        if config.get("use_bidirectional_attention"):
            raise UserError(
                "config.json: use_bidirectional_attention is set; EmbeddingGemma encoders are not supported"
            )
        self.keys = Gemma3Config(self.section, 32768, "Gemma 3")
        self.vocab, self.max_context = self.keys.vocab, self.keys.max_positions
        self.model = Decoder(self.keys)
        self.lm_head = Linear(self.keys.hidden, self.vocab)
        self.tied = self.tied_head(default=True)

    def head(self, h: torch.Tensor) -> torch.Tensor:
        return softcap(self.lm_head(h), self.keys.final_softcap)

    def parts(self) -> DecoderParts:
        return DecoderParts(self.model.embed, self.model.layers, self.model.norm, self.head)

    def states(self) -> list[list[State]]:
        return [kv_states(i, self.keys.kv_heads, self.keys.head_dim) for i in range(self.keys.layers)]
