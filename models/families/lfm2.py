"""LFM2 (arXiv 2511.23404): gated short convolutions, attention with QK-norm in some layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...graph import State
from ..causal import CausalModel, DecoderParts, conv_state, kv_states
from ..config import ConfigReader
from ..kv_cache import Cache, cached_attention
from ..language_model import shorten_stack
from ..layers.activations import silu
from ..layers.attention import AttentionSpec
from ..layers.block import Block
from ..layers.linear import Embedding, Linear
from ..layers.norm import CausalConv, RMSNorm
from ..layers.ops import EW
from ..rope import read_rope


class ShortConv(nn.Module):
    """`out(C * conv(B * x))`; one linear projects B, C and x side by side."""

    def __init__(self, hidden: int, taps: int, bias: bool) -> None:
        super().__init__()
        self.hidden = hidden
        self.conv = CausalConv(hidden, taps, bias)
        self.in_proj = Linear(hidden, 3 * hidden, bias)
        self.out_proj = Linear(hidden, hidden, bias)

    def forward(self, h: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        joined, n = self.in_proj(h), self.hidden
        mixed, state = self.conv(joined.narrow(2, 0, n) * joined.narrow(2, 2 * n, n), state)
        return self.out_proj(joined.narrow(2, n, n) * mixed), state


class Attention(Block):
    """Causal attention with QK-norm and a KV cache, under the names of LFM2's checkpoints."""

    fused = (("q_proj", "k_proj", "v_proj"),)
    key_value = ("k_proj", "v_proj")
    inv_freq: torch.Tensor

    def __init__(self, spec: AttentionSpec, eps: float) -> None:
        super().__init__()
        self.spec, self.heads = spec, spec.heads
        self.q_proj = Linear(spec.hidden, spec.heads * spec.head_dim)
        self.k_proj = Linear(spec.hidden, spec.kv_heads * spec.head_dim)
        self.v_proj = Linear(spec.hidden, spec.kv_heads * spec.head_dim)
        self.out_proj = Linear(spec.heads * spec.head_dim, spec.hidden)
        self.q_layernorm = RMSNorm(spec.head_dim, eps, offset=0.0)
        self.k_layernorm = RMSNorm(spec.head_dim, eps, offset=0.0)
        self.register_buffer("inv_freq", spec.rope.frequencies(spec.head_dim), persistent=False)

    def forward(
        self, x: torch.Tensor, past_length: torch.Tensor, k_cache: Cache, v_cache: Cache
    ) -> tuple[torch.Tensor, Cache, Cache]:
        s, lead = self.spec, x.shape[:2]
        positions = past_length + torch.arange(x.shape[1], device=x.device)
        q = self.q_layernorm(self.q_proj(x).reshape(*lead, s.heads, s.head_dim))
        k = self.k_layernorm(self.k_proj(x).reshape(*lead, s.kv_heads, s.head_dim))
        v = self.v_proj(x).reshape(*lead, s.kv_heads, s.head_dim)
        q, k = EW.rope(q, positions, self.inv_freq), EW.rope(k, positions, self.inv_freq)
        attended, k_out, v_out = cached_attention(q, k, v, k_cache, v_cache, past_length, s.rotated_scale, 0.0, 0)
        return self.out_proj(attended), k_out, v_out


class MLP(Block):
    """`w2(silu(w1(x)) * w3(x))`."""

    fused = (("w1", "w3"),)

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.w1 = Linear(hidden, intermediate)
        self.w3 = Linear(hidden, intermediate)
        self.w2 = Linear(intermediate, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.w2(silu(self.w1(x)) * self.w3(x))
        return out


class Layer(nn.Module):
    """A short convolution as `conv` or an attention as `self_attn`, and the gated MLP."""

    def __init__(self, mixer: ShortConv | Attention, hidden: int, intermediate: int, eps: float) -> None:
        super().__init__()
        self.attends = isinstance(mixer, Attention)
        if isinstance(mixer, Attention):
            self.self_attn = mixer
        else:
            self.conv = mixer
        self.feed_forward = MLP(hidden, intermediate)
        self.operator_norm = RMSNorm(hidden, eps, offset=0.0)
        self.ffn_norm = RMSNorm(hidden, eps, offset=0.0)

    def forward(self, h: torch.Tensor, past_length: torch.Tensor, *states: Cache) -> tuple[Cache, ...]:
        x = self.operator_norm(h)
        mixed, *new = self.self_attn(x, past_length, *states) if self.attends else self.conv(x, *states)
        h = h + mixed
        return (h + self.feed_forward(self.ffn_norm(h)), *new)


class Decoder(nn.Module):
    """Embedding, layers and last norm."""

    def __init__(self, section: ConfigReader, vocab: int) -> None:
        super().__init__()
        self.hidden = hidden = section.integer("hidden_size")
        heads = section.integer("num_attention_heads", 32, most=4096)
        kv_heads = section.divisor("num_key_value_heads", heads, min(8, heads))
        head_dim = section.head_dim(hidden // heads)
        eps, bias = section.number("norm_eps", 1e-5), section.boolean("conv_bias", False)
        self.taps = section.integer("conv_L_cache", 3, least=2, most=64)
        self.attention = AttentionSpec(hidden, heads, kv_heads, head_dim, head_dim**-0.5, read_rope(section, 1e6))
        self.types, intermediate = layer_types(section), intermediate_size(section)
        self.embed_tokens = Embedding(vocab, hidden)
        self.layers = nn.ModuleList(
            Layer(
                ShortConv(hidden, self.taps, bias) if kind == "conv" else Attention(self.attention, eps),
                hidden,
                intermediate,
                eps,
            )
            for kind in self.types
        )
        self.embedding_norm = RMSNorm(hidden, eps, offset=0.0)

    def states(self) -> list[list[State]]:
        spec = self.attention
        return [
            [conv_state(i, self.hidden, self.taps)] if kind == "conv" else kv_states(i, spec.kv_heads, spec.head_dim)
            for i, kind in enumerate(self.types)
        ]


def layer_types(section: ConfigReader) -> list[str]:
    """`layer_types`; if absent, attention in the layers of `full_attn_idxs`; if that is absent too, in all."""
    layers = section.integer("num_hidden_layers", most=1024)
    attending = section.values.get("full_attn_idxs")
    if attending is None:
        attending = list(range(layers))
    if not isinstance(attending, list):
        raise section.error("full_attn_idxs", attending, "a list of layers")
    default = ["full_attention" if i in attending else "conv" for i in range(layers)]
    return section.kinds(layers, ("conv", "full_attention"), default)


def intermediate_size(section: ConfigReader) -> int:
    """The width of the MLP: with `block_auto_adjust_ff_dim` two thirds of what the config says, rounded up."""
    wide = section.integer("block_ff_dim" if "block_ff_dim" in section.values else "intermediate_size", 12288)
    if not section.boolean("block_auto_adjust_ff_dim", True):
        return wide
    wide = 2 * wide // 3
    if "block_ffn_dim_multiplier" in section.values and section.values["block_ffn_dim_multiplier"] is None:
        return wide
    wide = int(min(section.number("block_ffn_dim_multiplier", 1.0), 64.0) * wide)
    step = section.integer("block_multiple_of", 256)
    return max(1, -(-wide // step)) * step


class Model(CausalModel):
    """An LFM2 checkpoint's modules, named as the checkpoint names them."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.vocab = self.section.integer("vocab_size")
        self.model = Decoder(self.section, self.vocab)
        self.lm_head = Linear(self.model.hidden, self.vocab)
        self.tied = self.tied_head(
            default=True, key="tie_embedding" if "tie_embedding" in config else "tie_word_embeddings"
        )
        self.max_context = self.section.integer("max_position_embeddings", 128000)

    @classmethod
    def shorten(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        return shorten_stack(config | {"layer_types": layer_types(ConfigReader(config, ""))}, layers)

    def parts(self) -> DecoderParts:
        return DecoderParts(self.model.embed_tokens, self.model.layers, self.model.embedding_norm, self.lm_head)

    def states(self) -> list[list[State]]:
        return self.model.states()
