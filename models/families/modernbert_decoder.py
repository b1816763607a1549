"""The causal twin of ModernBERT, the decoder of the Ettin pairs (arXiv 2507.11412).

Its attention differs: separate projections, a KV cache, and a window that reaches back only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...graph import State
from ..causal import CausalModel, DecoderParts, kv_states
from ..kv_cache import Cache, cached_attention
from ..layers.block import Block
from ..layers.linear import Linear
from ..layers.ops import EW
from .modernbert import TABLE, Config, GatedFeedForward, PredictionHead, Stack


class Attention(Block):
    """Causal self-attention that appends to its KV cache."""

    fused = (("q_proj", "k_proj", "v_proj"),)
    key_value = ("k_proj", "v_proj")
    inv_freq: torch.Tensor

    def __init__(self, config: Config, kind: str) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        self.window = config.half_window if kind == "sliding_attention" else 0
        self.q_proj = Linear(config.hidden, config.hidden, config.attention_bias)
        self.k_proj = Linear(config.hidden, config.hidden, config.attention_bias)
        self.v_proj = Linear(config.hidden, config.hidden, config.attention_bias)
        self.Wo = Linear(config.hidden, config.hidden, config.attention_bias)
        self.register_buffer("inv_freq", config.frequencies(kind), persistent=False)

    def forward(
        self, x: torch.Tensor, past_length: torch.Tensor, k_cache: Cache, v_cache: Cache
    ) -> tuple[torch.Tensor, Cache, Cache]:
        positions = past_length + torch.arange(x.shape[1], device=x.device)
        shape = (*x.shape[:2], self.heads, self.head_dim)
        q, k, v = (linear(x).reshape(shape) for linear in (self.q_proj, self.k_proj, self.v_proj))
        q, k = EW.rope(q, positions, self.inv_freq), EW.rope(k, positions, self.inv_freq)
        attended, k_out, v_out = cached_attention(
            q, k, v, k_cache, v_cache, past_length, self.head_dim**-0.5, 0.0, self.window
        )
        return self.Wo(attended), k_out, v_out


class Layer(nn.Module):
    """Attention and gated feed-forward, each behind a norm."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        # The embedding is normalised.
        self.attn_norm: nn.Module = config.norm() if index else nn.Identity()
        self.attn = Attention(config, config.layer_types[index])
        self.mlp_norm = config.norm()
        self.mlp = GatedFeedForward(config)

    def forward(
        self, h: torch.Tensor, past_length: torch.Tensor, k_cache: Cache, v_cache: Cache
    ) -> tuple[torch.Tensor, Cache, Cache]:
        attended, k, v = self.attn(self.attn_norm(h), past_length, k_cache, v_cache)
        h = h + attended
        return h + self.mlp(self.mlp_norm(h)), k, v


class Model(CausalModel):
    """A ModernBERT decoder checkpoint's modules, named as the checkpoint names them."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.config = Config(config)
        if config.get("sliding_window") is not None:  # transformers writes it beside `local_attention`, twice as large
            self.config.half_window = self.section.integer("sliding_window")
        self.vocab, self.max_context = self.config.vocab, self.config.max_positions
        self.model = Stack(self.config, Layer)
        self.lm_head = PredictionHead(self.config)
        self.decoder = Linear(self.config.hidden, self.config.vocab, self.config.decoder_bias)
        self.tied = self.tied_head(True, "decoder.weight", TABLE)

    def head(self, h: torch.Tensor) -> torch.Tensor:
        """Logits of the last hidden states h [B, L, hidden]."""
        out: torch.Tensor = self.decoder(self.lm_head(h))
        return out

    def parts(self) -> DecoderParts:
        return DecoderParts(self.model.embeddings, self.model.layers, self.model.final_norm, self.head)

    def states(self) -> list[list[State]]:
        return [kv_states(i, self.config.heads, self.config.head_dim) for i in range(self.config.layers)]
