"""T5Gemma: two Gemma 2 stacks, encoder and decoder (arXiv 2504.06225)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..config import ConfigReader
from ..kv_cache import Cache
from ..language_model import shorten_stack
from ..layers.attention import CachedAttention, CrossAttention
from ..layers.linear import Embedding
from ..layers.mlp import GatedMLP
from ..rope import read_rope
from .gemma import (
    FULL,
    SLIDING,
    EncoderLayer,
    GemmaConfig,
    GemmaEncoder,
    GemmaSeq2seq,
    GemmaStack,
    Head,
    optional_number,
)


class StackConfig(GemmaConfig):
    """One stack's section of config.json."""

    def __init__(self, section: ConfigReader) -> None:
        super().__init__(section, positions=8192, pattern=2)
        self.softcap = optional_number(section, "attn_logit_softcapping")
        self.ropes = dict.fromkeys((FULL, SLIDING), read_rope(section, 10000.0))


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and gated MLP, each between two norms."""

    def __init__(self, config: StackConfig, layer: int, encoder_hidden: int) -> None:
        super().__init__()
        spec = config.attention(layer)
        self.self_attn = CachedAttention(spec)
        self.cross_attn = CrossAttention(spec, encoder_hidden)
        self.mlp = GatedMLP(config.hidden, config.intermediate, config.act)
        self.pre_self_attn_layernorm = config.norm()
        self.post_self_attn_layernorm = config.norm()
        self.pre_cross_attn_layernorm = config.norm()
        self.post_cross_attn_layernorm = config.norm()
        self.pre_feedforward_layernorm = config.norm()
        self.post_feedforward_layernorm = config.norm()

    def project_encoder(self, encoder_hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v [B, KV, T, D] of encoder_hidden [B, T, hidden]."""
        return self.cross_attn.project_encoder(encoder_hidden)

    def forward(
        self, h: torch.Tensor, past_length: torch.Tensor, encoder_mask: torch.Tensor, states: list[Cache]
    ) -> tuple[torch.Tensor, Cache, Cache]:
        k_cache, v_cache, cross_k, cross_v = states
        attended, k_out, v_out = self.self_attn(self.pre_self_attn_layernorm(h), past_length, k_cache, v_cache)
        h = h + self.post_self_attn_layernorm(attended)
        crossed = self.cross_attn(self.pre_cross_attn_layernorm(h), cross_k, cross_v, encoder_mask)
        h = h + self.post_cross_attn_layernorm(crossed)
        return h + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h))), k_out, v_out


class Encoder(GemmaEncoder):
    """The graph `encoder`."""

    def __init__(self, config: StackConfig) -> None:
        layers = (EncoderLayer(config, i) for i in range(config.layers))
        super().__init__(config, Embedding(config.vocab, config.hidden), layers)

    def masks(self, positions: torch.Tensor, encoder_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        distance = (positions.unsqueeze(1) - positions.unsqueeze(0)).abs()
        padding = encoder_mask.unsqueeze(1).unsqueeze(1)
        full = torch.logical_and(padding, (distance >= 0).unsqueeze(0).unsqueeze(0))
        # Inclusive on both sides, as transformers computes it (the paper's window is exclusive).
        sliding = torch.logical_and(padding, (distance <= self.config.window).unsqueeze(0).unsqueeze(0))
        return full, sliding


class Decoder(GemmaStack):
    """Embedding, layers and last norm."""

    def __init__(self, config: StackConfig, encoder_hidden: int) -> None:
        layers = (DecoderLayer(config, i, encoder_hidden) for i in range(config.layers))
        super().__init__(config, Embedding(config.vocab, config.hidden), layers)


class Stacks(nn.Module):
    """Encoder and decoder."""

    def __init__(self, encoder: StackConfig, decoder: StackConfig) -> None:
        super().__init__()
        self.encoder = Encoder(encoder)
        self.decoder = Decoder(decoder, encoder.hidden)


class Model(GemmaSeq2seq):
    """A T5Gemma checkpoint's modules, named as the checkpoint names them."""

    model: Stacks

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        decoder = self.section.section("decoder")
        self.encoder_config, self.decoder_config = StackConfig(self.section.section("encoder")), StackConfig(decoder)
        self.model = Stacks(self.encoder_config, self.decoder_config)
        self.lm_head = Head(self.decoder_config.hidden, self.decoder_config.vocab)
        self.tied = self.tied_head(True, "lm_head.out_proj.weight", "model.decoder.embed_tokens.weight")
        self.decoder_start = self.first_token(decoder, 2)
        # One bound for prompt and output: the smaller of what the two stacks were made for.
        self.max_context = min(self.encoder_config.max_positions, self.decoder_config.max_positions)

    @classmethod
    def shorten(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        return config | {name: shorten_stack(config[name], layers) for name in ("encoder", "decoder")}

    @property
    def encoder(self) -> Encoder:
        return self.model.encoder

    @property
    def decoder(self) -> Decoder:
        return self.model.decoder
