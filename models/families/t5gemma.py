"""T5Gemma: two Gemma 2 stacks, encoder and decoder (arXiv 2504.06225)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..causal import DecoderParts
from ..config import ConfigReader
from ..kv_cache import Cache
from ..language_model import shorten_stack
from ..layers.activations import softcap
from ..layers.attention import CachedAttention, CrossAttention
from ..layers.linear import Embedding
from ..layers.mlp import GatedMLP
from ..seq2seq import EncoderDecoder, Seq2seqModel
from .gemma import FULL, SLIDING, EncoderLayer, GemmaConfig, Head, optional_number


class StackConfig(GemmaConfig):
    """One stack's section of config.json."""

    def __init__(self, section: ConfigReader) -> None:
        super().__init__(section, positions=8192, pattern=2)
        self.softcap = optional_number(section, "attn_logit_softcapping")
        self.bases = dict.fromkeys((FULL, SLIDING), section.rope(10000.0))


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


class Encoder(nn.Module):
    """The graph `encoder`."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(EncoderLayer(config, i) for i in range(config.layers))
        self.norm = config.norm()

    def forward(self, input_ids: torch.Tensor, encoder_mask: torch.Tensor) -> tuple[torch.Tensor]:
        """input_ids: int64 [B, T]; encoder_mask: bool [B, T], true at real tokens. Returns ([B, T, hidden],)."""
        h = self.embed_tokens(input_ids) * self.config.hidden**0.5
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        distance = (positions.unsqueeze(1) - positions.unsqueeze(0)).abs()
        padding = encoder_mask.unsqueeze(1).unsqueeze(1)
        full = torch.logical_and(padding, (distance >= 0).unsqueeze(0).unsqueeze(0))
        # Inclusive on both sides, as transformers computes it (the paper's window is exclusive).
        sliding = torch.logical_and(padding, (distance <= self.config.window).unsqueeze(0).unsqueeze(0))
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            h = layer(h, positions, sliding if kind == SLIDING else full)
        return (self.norm(h),)


class Decoder(nn.Module):
    """Embedding, layers and last norm."""

    def __init__(self, config: StackConfig, encoder_hidden: int) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(DecoderLayer(config, i, encoder_hidden) for i in range(config.layers))
        self.norm = config.norm()

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.embed_tokens(input_ids) * self.config.hidden**0.5
        return out


class Stacks(nn.Module):
    """Encoder and decoder."""

    def __init__(self, encoder: StackConfig, decoder: StackConfig) -> None:
        super().__init__()
        self.encoder = Encoder(encoder)
        self.decoder = Decoder(decoder, encoder.hidden)


class Model(Seq2seqModel):
    """A T5Gemma checkpoint's modules, named as the checkpoint names them."""

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

    def stacks(self) -> dict[str, nn.ModuleList]:
        return {"encoder": self.model.encoder.layers, "decoder": self.model.decoder.layers}

    def head(self, h: torch.Tensor) -> torch.Tensor:
        """Logits of the last hidden states h [B, L, hidden]."""
        return softcap(self.lm_head.out_proj(h), self.decoder_config.final_softcap)

    def encoder_decoder(self) -> EncoderDecoder:
        decoder, config = self.model.decoder, self.decoder_config
        return EncoderDecoder(
            encoder=self.model.encoder,
            encoder_root="model.encoder.",
            stack={"model": self.model},
            head={"lm_head": self.lm_head},
            decoder=DecoderParts(decoder.embed, decoder.layers, decoder.norm, self.head),
            encoder_hidden=self.encoder_config.hidden,
            vocab=config.vocab,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            source_positions=self.encoder_config.max_positions,
            target_positions=config.max_positions,
        )
