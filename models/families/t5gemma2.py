"""T5Gemma 2 (arXiv 2512.14856), its text path: two Gemma 3 stacks, self- and cross-attention merged in the decoder.

One set of projections is for the decoder's own tokens and for the encoder's: a query sees both under one softmax, the encoder's
keys without RoPE. One embedding is for encoder, decoder and head. The token that ends an image has its own row, which is not
scaled. The vision tower is left out (`Model.names`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...checkpoints.names import Names, rename
from ...errors import UserError
from ..config import ConfigReader
from ..kv_cache import Cache, merged_attention
from ..language_model import shorten_stack
from ..layers.attention import SelfAttention
from ..layers.linear import Embedding
from ..layers.mlp import GatedMLP
from ..layers.ops import EW
from .gemma import EncoderLayer, Gemma3Config, GemmaEncoder, GemmaSeq2seq, GemmaStack, Head

EMBEDDING = "model.encoder.text_model.embed_tokens"
END_OF_IMAGE = 256_000  # transformers' default of `eoi_token_index`


class StackConfig(Gemma3Config):
    """One stack's section of config.json: `encoder.text_config` or `decoder`."""

    def __init__(self, section: ConfigReader, end_of_image: int) -> None:
        super().__init__(section, 131_072, "T5Gemma 2")
        self.end_of_image = end_of_image


class TokenEmbedding(Embedding):
    """An `Embedding` with a further row for the token that ends an image, which `embed` uses."""

    def __init__(self, vocab: int, hidden: int) -> None:
        super().__init__(vocab, hidden)
        self.eoi_embedding = nn.Parameter(torch.empty(hidden), requires_grad=False)


def embed(config: StackConfig, embed_tokens: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Hidden states [B, S, hidden] of input_ids [B, S]: rows times sqrt(hidden); the row of an image's end is not scaled."""
    rows: torch.Tensor = embed_tokens(input_ids) * config.hidden**0.5
    row: Any = embed_tokens.eoi_embedding
    return torch.where((input_ids == config.end_of_image).unsqueeze(-1), row.to(rows.dtype), rows)


class MergedAttention(SelfAttention):
    """Attention of a decoder to its own past and to the encoder's output under one softmax, with the same weights for both."""

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v [B, S, KV, D] of x [B, S, hidden]; k is normalised and not rotated."""
        shape = (*x.shape[:2], self.spec.kv_heads, self.spec.head_dim)
        return self.k_norm(self.k_proj(x).reshape(shape)), self.v_proj(x).reshape(shape)

    def project_encoder(self, encoder_hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v [B, KV, T, D] of encoder_hidden [B, T, hidden]."""
        k, v = self.keys_values(encoder_hidden)
        return k.transpose(1, 2), v.transpose(1, 2)

    def forward(
        self, x: torch.Tensor, past_length: torch.Tensor, mask: torch.Tensor, states: list[Cache]
    ) -> tuple[torch.Tensor, Cache, Cache]:
        s = self.spec
        positions = past_length + torch.arange(x.shape[1], device=x.device)
        q = EW.rope(self.q_norm(self.q_proj(x).reshape(*x.shape[:2], s.heads, s.head_dim)), positions, self.inv_freq)
        k, v = self.keys_values(x)
        k = EW.rope(k, positions, self.inv_freq)
        if s.rope.attention != 1.0:  # the encoder's keys are not rotated, so this is no factor of all scores
            q, k = q * s.rope.attention, k * s.rope.attention
        own_k, own_v, cross_k, cross_v = states
        attended, k_out, v_out = merged_attention(
            q, k, v, own_k, own_v, cross_k, cross_v, mask, past_length, s.scale, s.softcap, s.window
        )
        return self.o_proj(attended), k_out, v_out


class DecoderLayer(nn.Module):
    """Merged attention and gated MLP, each between two norms."""

    def __init__(self, config: StackConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = MergedAttention(config.attention(layer))
        self.mlp = GatedMLP(config.hidden, config.intermediate, config.act)
        self.pre_self_attn_layernorm = config.norm()
        self.post_self_attn_layernorm = config.norm()
        self.pre_feedforward_layernorm = config.norm()
        self.post_feedforward_layernorm = config.norm()

    def project_encoder(self, encoder_hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v [B, KV, T, D] of encoder_hidden [B, T, hidden]."""
        return self.self_attn.project_encoder(encoder_hidden)

    def forward(
        self, h: torch.Tensor, past_length: torch.Tensor, mask: torch.Tensor, states: list[Cache]
    ) -> tuple[torch.Tensor, Cache, Cache]:
        attended, k_out, v_out = self.self_attn(self.pre_self_attn_layernorm(h), past_length, mask, states)
        h = h + self.post_self_attn_layernorm(attended)
        return h + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h))), k_out, v_out


class TextEncoder(GemmaEncoder):
    """The graph `encoder`."""

    config: StackConfig

    def __init__(self, config: StackConfig) -> None:
        layers = (EncoderLayer(config, i) for i in range(config.layers))
        super().__init__(config, TokenEmbedding(config.vocab, config.hidden), layers)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        return embed(self.config, self.embed_tokens, input_ids)

    def masks(self, positions: torch.Tensor, encoder_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ahead = positions.unsqueeze(0) - positions.unsqueeze(1)  # [query, key]
        padding = encoder_mask.unsqueeze(1).unsqueeze(1)
        full = torch.logical_and(padding, (ahead.abs() >= 0).unsqueeze(0).unsqueeze(0))
        # A window of w tokens: (w + 1) // 2 up to the token itself, and w // 2 after it.
        before, after = (self.config.window + 1) // 2, self.config.window // 2
        near = torch.logical_and(ahead > -before, ahead <= after).unsqueeze(0).unsqueeze(0)
        return full, torch.logical_and(padding, near)


class Encoder(nn.Module):
    """The text encoder, under its name in the checkpoint."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.text_model = TextEncoder(config)


class Decoder(GemmaStack):
    """Embedding, layers and last norm."""

    config: StackConfig

    def __init__(self, config: StackConfig) -> None:
        layers = (DecoderLayer(config, i) for i in range(config.layers))
        super().__init__(config, TokenEmbedding(config.vocab, config.hidden), layers)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        return embed(self.config, self.embed_tokens, input_ids)


class Stacks(nn.Module):
    """Encoder and decoder."""

    def __init__(self, encoder: StackConfig, decoder: StackConfig) -> None:
        super().__init__()
        self.encoder = Encoder(encoder)
        self.decoder = Decoder(decoder)


class Model(GemmaSeq2seq):
    """The text path of a T5Gemma 2 checkpoint, its modules named as the checkpoint names them."""

    model: Stacks

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        section = self.section
        encoder, decoder = section.section("encoder"), section.section("decoder")
        text = encoder.section("text_config") if "text_config" in encoder.values else encoder
        end = encoder.token("eoi_token_index", section.token("eoi_token_index", END_OF_IMAGE))
        assert end is not None
        self.encoder_config, self.decoder_config = StackConfig(text, end), StackConfig(decoder, end)
        _require_equal("hidden_size", self.encoder_config.hidden, self.decoder_config.hidden)
        _require_equal("vocab_size", self.encoder_config.vocab, self.decoder_config.vocab)
        if not section.boolean("tie_word_embeddings", True):
            raise section.error("tie_word_embeddings", False, "true, as T5Gemma 2 has one embedding")
        self.model = Stacks(self.encoder_config, self.decoder_config)
        self.lm_head = Head(self.decoder_config.hidden, self.decoder_config.vocab)
        self.tied = {
            "lm_head.out_proj.weight": f"{EMBEDDING}.weight",
            "model.decoder.embed_tokens.weight": f"{EMBEDDING}.weight",
            "model.decoder.embed_tokens.eoi_embedding": f"{EMBEDDING}.eoi_embedding",
        }
        self.decoder_start = self.first_token(decoder, 2)
        # One bound for prompt and output: the smaller of what the two stacks were made for.
        self.max_context = min(self.encoder_config.max_positions, self.decoder_config.max_positions)

    @property
    def names(self) -> Names:
        """transformers writes the text encoder's layers without their place beside the vision tower."""
        encoder = "model.encoder."
        return Names(
            *(rename(f"{encoder}{n}", f"{encoder}text_model.{n}") for n in ("layers.*", "norm", "embed_tokens.*")),
            ignored=(f"{encoder}vision_tower.*", f"{encoder}multi_modal_projector.*"),
        )

    @classmethod
    def shorten(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        encoder = config["encoder"]
        if "text_config" in encoder:
            encoder = encoder | {"text_config": shorten_stack(encoder["text_config"], layers)}
        else:
            encoder = shorten_stack(encoder, layers)
        return config | {"encoder": encoder, "decoder": shorten_stack(config["decoder"], layers)}

    @property
    def encoder(self) -> TextEncoder:
        return self.model.encoder.text_model

    @property
    def decoder(self) -> Decoder:
        return self.model.decoder


def _require_equal(key: str, encoder: int, decoder: int) -> None:
    """Raises UserError if encoder and decoder cannot share one embedding."""
    if encoder != decoder:
        raise UserError(
            f"config.json: the encoder's {key} is {encoder}, the decoder's {decoder}; T5Gemma 2 shares one embedding"
        )
