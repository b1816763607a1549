"""Mu, the encoder-decoder of "Return of the Encoder" (arXiv 2501.16273).

Pre-norm RMSNorm, biases on every linear, a plain feed-forward with tanh-GELU, one embedding for encoder, decoder and head.
Parameters are named as in the state dict of the authors' code. The authors have no config.json, so its keys are ours, in the
manner of T5: `d_model`, `d_kv`, `d_ff`, `num_layers`, `num_decoder_layers`, `num_heads`, `num_key_value_heads`,
`n_positions`, `rope_theta`, `layer_norm_epsilon`.

The authors centre the encoder's positions: pos - (n - 1) // 2 for n source tokens. A rotary score depends on the difference of
two positions only, so here positions count from 0.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from ..causal import DecoderParts
from ..config import ConfigReader
from ..kv_cache import Cache, cached_attention, cross_attention
from ..layers.activations import gelu_tanh
from ..layers.block import Block, Groups
from ..layers.linear import Embedding, Linear
from ..layers.norm import RMSNorm
from ..layers.ops import EW
from ..rope import Rope
from ..seq2seq import EncoderDecoder, Seq2seqModel


class Config:
    """The keys of config.json."""

    def __init__(self, section: ConfigReader) -> None:
        self.vocab = section.integer("vocab_size", 32128)
        self.hidden = section.integer("d_model", 1024)
        self.intermediate = section.integer("d_ff", 4096)
        self.encoder_layers = section.integer("num_layers", 20, most=1024)
        self.decoder_layers = section.integer("num_decoder_layers", 10, most=1024)
        self.heads = section.integer("num_heads", 6, most=4096)
        self.kv_heads = section.kv_heads(self.heads, 3)
        self.head_dim = section.integer("d_kv", 64, most=4096)
        if self.head_dim % 8:
            raise section.error("d_kv", self.head_dim, "a multiple of 8")
        self.eps = section.number("layer_norm_epsilon", 1e-6)
        self.theta = section.number("rope_theta", 10000.0, least=1.0)
        self.max_positions = section.integer("n_positions", 1024)
        if not section.boolean("tie_word_embeddings", True):
            raise section.error("tie_word_embeddings", False, "true, as Mu has one embedding")

    def norm(self) -> RMSNorm:
        return RMSNorm(self.hidden, self.eps, offset=0.0)


class Attention(Block):
    """The four projections, and the order of heads: in Mu query head h reads key head h mod kv_heads.

    In the ops it reads key head h // (heads / kv_heads). So queries are reordered before attention, and its output back.
    """

    fused: ClassVar[Groups] = (("q_linear", "k_linear", "v_linear"),)
    key_value = ("k_linear", "v_linear")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.scale = config.head_dim**-0.5
        self.q_linear = Linear(config.hidden, config.heads * config.head_dim, bias=True)
        self.k_linear = Linear(config.hidden, config.kv_heads * config.head_dim, bias=True)
        self.v_linear = Linear(config.hidden, config.kv_heads * config.head_dim, bias=True)
        self.out_linear = Linear(config.heads * config.head_dim, config.hidden, bias=True)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """Queries [B, S, H, D] of x [B, S, hidden], those of one key head side by side."""
        lead, groups = x.shape[:2], self.heads // self.kv_heads
        q: torch.Tensor = self.q_linear(x).reshape(*lead, groups, self.kv_heads, self.head_dim)
        return q.transpose(2, 3).reshape(*lead, self.heads, self.head_dim)

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v [B, S, KV, D] of x [B, S, hidden]."""
        shape = (*x.shape[:2], self.kv_heads, self.head_dim)
        return self.k_linear(x).reshape(shape), self.v_linear(x).reshape(shape)

    def output(self, attended: torch.Tensor) -> torch.Tensor:
        """[B, S, hidden] of attended [B, S, H * D], its heads in the order of `queries`."""
        lead, groups = attended.shape[:2], self.heads // self.kv_heads
        back = attended.reshape(*lead, self.kv_heads, groups, self.head_dim).transpose(2, 3)
        out: torch.Tensor = self.out_linear(back.reshape(*lead, self.heads * self.head_dim))
        return out


class RotaryAttention(Attention):
    """Self-attention, with RoPE."""

    inv_freq: torch.Tensor

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.register_buffer("inv_freq", Rope(config.theta).frequencies(config.head_dim), persistent=False)

    def project(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        k, v = self.keys_values(x)
        return EW.rope(self.queries(x), positions, self.inv_freq), EW.rope(k, positions, self.inv_freq), v


class EncoderAttention(RotaryAttention):
    """Bidirectional self-attention."""

    def forward(self, x: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x, positions)
        return self.output(EW.bidirectional_attention(q, k, v, mask, self.scale, 0.0))


class CausalAttention(RotaryAttention):
    """Causal self-attention that appends to its KV cache."""

    def forward(
        self, x: torch.Tensor, past_length: torch.Tensor, k_cache: Cache, v_cache: Cache
    ) -> tuple[torch.Tensor, Cache, Cache]:
        q, k, v = self.project(x, past_length + torch.arange(x.shape[1], device=x.device))
        attended, k_out, v_out = cached_attention(q, k, v, k_cache, v_cache, past_length, self.scale, 0.0, 0)
        return self.output(attended), k_out, v_out


class CrossAttention(Attention):
    """Attention to keys and values that are projected once from the encoder's output. No RoPE."""

    fused = (("k_linear", "v_linear"),)

    def project_encoder(self, encoder_hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v [B, KV, T, D] of encoder_hidden [B, T, hidden]."""
        k, v = self.keys_values(encoder_hidden)
        return k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: torch.Tensor, k: Cache, v: Cache, mask: torch.Tensor) -> torch.Tensor:
        return self.output(cross_attention(self.queries(x), k, v, mask, self.scale, 0.0))


class FeedForward(nn.Module):
    """`fc2(gelu(fc1(x)))`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden, config.intermediate, bias=True)
        self.fc2 = Linear(config.intermediate, config.hidden, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(gelu_tanh(self.fc1(x)))
        return out


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each behind a norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.ln1, self.ln2 = config.norm(), config.norm()
        self.attn = EncoderAttention(config)
        self.mlp = FeedForward(config)

    def forward(self, h: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = h + self.attn(self.ln1(h), positions, mask)
        out: torch.Tensor = h + self.mlp(self.ln2(h))
        return out


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward, each behind a norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.ln1, self.ln2, self.ln3 = config.norm(), config.norm(), config.norm()
        self.causal_attn = CausalAttention(config)
        self.cross_attn = CrossAttention(config)
        self.mlp = FeedForward(config)

    def project_encoder(self, encoder_hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v [B, KV, T, D] of encoder_hidden [B, T, hidden]."""
        return self.cross_attn.project_encoder(encoder_hidden)

    def forward(
        self, h: torch.Tensor, past_length: torch.Tensor, mask: torch.Tensor, states: list[Cache]
    ) -> tuple[torch.Tensor, Cache, Cache]:
        k_cache, v_cache, cross_k, cross_v = states
        attended, k_out, v_out = self.causal_attn(self.ln1(h), past_length, k_cache, v_cache)
        h = h + attended
        h = h + self.cross_attn(self.ln2(h), cross_k, cross_v, mask)
        return h + self.mlp(self.ln3(h)), k_out, v_out


class Transformer(nn.Module):
    """Both stacks under the checkpoint's names: wte is the embedding, e the encoder, h the decoder."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.wte = Embedding(config.vocab, config.hidden)
        self.e = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.ln_e = config.norm()
        self.h = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.ln_f = config.norm()


class Encode(nn.Module):
    """The graph `encoder`."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.transformer = model.transformer

    def forward(self, input_ids: torch.Tensor, encoder_mask: torch.Tensor) -> tuple[torch.Tensor]:
        """input_ids: int64 [B, T]; encoder_mask: bool [B, T], true at real tokens. Returns ([B, T, hidden],)."""
        parts = self.transformer
        h = parts.wte(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        everywhere = (positions.unsqueeze(1) + positions.unsqueeze(0) >= 0).unsqueeze(0).unsqueeze(0)
        mask = torch.logical_and(encoder_mask.unsqueeze(1).unsqueeze(1), everywhere)
        for layer in parts.e:
            h = layer(h, positions, mask)
        return (parts.ln_e(h),)


class Model(Seq2seqModel):
    """A Mu checkpoint's modules, named as the checkpoint names them."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.config = Config(self.section)
        self.transformer = Transformer(self.config)
        self.lm_head = Linear(self.config.hidden, self.config.vocab)
        self.tied = {"lm_head.weight": "transformer.wte.weight"}
        self.decoder_start = self.first_token(self.section, 0)
        self.max_context = self.config.max_positions

    @classmethod
    def shorten(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        published = {"num_layers": 20, "num_decoder_layers": 10}
        return config | {key: min(layers, config.get(key, most)) for key, most in published.items()}

    def stacks(self) -> dict[str, nn.ModuleList]:
        return {"encoder": self.transformer.e, "decoder": self.transformer.h}

    def encoder_decoder(self) -> EncoderDecoder:
        parts, config = self.transformer, self.config
        return EncoderDecoder(
            encoder=Encode(self),
            encoder_root="",
            stack={"transformer": parts},
            head={"lm_head": self.lm_head},
            decoder=DecoderParts(parts.wte, parts.h, parts.ln_f, self.lm_head),
            encoder_hidden=config.hidden,
            vocab=config.vocab,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            source_positions=config.max_positions,
            target_positions=config.max_positions,
        )
