"""Plain decoders as data: `DecoderSpec` says what a family's layers are, one module computes them all.

A family is a function from config.json to a `DecoderSpec`. Parameters have Llama's names; what a checkpoint calls them says the
family's `names` (`checkpoints.names`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from ..errors import UserError
from ..graph import Graph, State
from .causal import CausalModel, DecoderParts, kv_states
from .config import ConfigReader, StackKeys
from .kv_cache import Cache
from .language_model import TextEncoder, TextStack
from .layers.activations import softcap
from .layers.attention import AttentionSpec, BidirectionalAttention, CachedAttention, SelfAttention
from .layers.linear import Embedding, Linear
from .layers.mlp import FeedForward, GatedMLP
from .layers.norm import LayerNorm, NormSpec, RMSNorm
from .rope import Rope

Placement = Literal["pre", "post", "sandwich", "parallel", "shared"]
"""Where a layer's norms are: before its two blocks (Llama), behind them (OLMo 2), both (Gemma 2); or the blocks beside each
other, each behind a norm (GPT-NeoX) or both behind one (Phi-2)."""


@dataclass(frozen=True)
class DecoderSpec:
    """A plain decoder.

    Attributes:
        vocab, hidden, intermediate, positions: sizes; positions as the config gives them.
        attention: of each layer.
        norm, placement: of the layers and behind the last.
        act, gated, mlp_bias: of the feed-forward.
        embedding_scale, residual_scale, logits_scale: factors of the embeddings, of what a block adds, and of the logits.
        final_softcap: of the logits; 0 for none.
        table: rows of learned positions that are added to the embeddings; 0 for none.
        head_bias: the head has a bias.
        tied: the head is the embedding's table.
        bidirectional: tokens see those behind them, too. Such a model generates nothing; a window is of either side.
    """

    vocab: int
    hidden: int
    intermediate: int
    positions: int
    attention: tuple[AttentionSpec, ...]
    norm: NormSpec
    placement: Placement = "pre"
    act: str = "silu"
    gated: bool = True
    mlp_bias: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    final_softcap: float = 0.0
    table: int = 0
    head_bias: bool = False
    tied: bool = False
    bidirectional: bool = False


class Blocks(nn.Module):
    """Attention and feed-forward of a layer, with norms where `DecoderSpec.placement` says; heirs run the attention."""

    input_layernorm: RMSNorm | LayerNorm
    post_attention_layernorm: RMSNorm | LayerNorm
    pre_feedforward_layernorm: RMSNorm | LayerNorm
    post_feedforward_layernorm: RMSNorm | LayerNorm

    def __init__(self, spec: DecoderSpec, attention: SelfAttention) -> None:
        super().__init__()
        self.placement, self.residual_scale = spec.placement, spec.residual_scale
        self.self_attn = attention
        mlp = GatedMLP if spec.gated else FeedForward
        self.mlp = mlp(spec.hidden, spec.intermediate, spec.act, spec.mlp_bias)
        for name in _NORMS[spec.placement]:
            self.add_module(name, spec.norm.of(spec.hidden))

    def attention_input(self, h: torch.Tensor) -> torch.Tensor:
        """What the attention reads of h [B, S, hidden]."""
        return h if self.placement == "post" else self.input_layernorm(h)

    def behind(self, h: torch.Tensor, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The layer's output; attended: what the attention made of its input x."""
        if self.placement in ("parallel", "shared"):
            y = self.post_attention_layernorm(h) if self.placement == "parallel" else x
            out: torch.Tensor = h + attended + self.mlp(y)
            return out
        if self.placement == "pre":
            h = self._add(h, attended)
            return self._add(h, self.mlp(self.post_attention_layernorm(h)))
        h = self._add(h, self.post_attention_layernorm(attended))
        y = h if self.placement == "post" else self.pre_feedforward_layernorm(h)
        return self._add(h, self.post_feedforward_layernorm(self.mlp(y)))

    def _add(self, h: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return h + (new if self.residual_scale == 1.0 else new * self.residual_scale)


class DecoderLayer(Blocks):
    """A layer whose attention is causal and appends to its KV cache."""

    def __init__(self, spec: DecoderSpec, layer: int) -> None:
        super().__init__(spec, CachedAttention(spec.attention[layer]))

    def forward(
        self, h: torch.Tensor, past_length: torch.Tensor, k_cache: Cache, v_cache: Cache
    ) -> tuple[torch.Tensor, Cache, Cache]:
        x = self.attention_input(h)
        attended, k, v = self.self_attn(x, past_length, k_cache, v_cache)
        return self.behind(h, x, attended), k, v


class EncodingLayer(Blocks):
    """The same layer without a cache: it reads a whole text, and the mask says which token sees which."""

    def __init__(self, spec: DecoderSpec, layer: int) -> None:
        super().__init__(spec, BidirectionalAttention(spec.attention[layer]))

    def forward(self, h: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """positions: int64 [S]; mask: bool [B, 1, S, S]."""
        x = self.attention_input(h)
        return self.behind(h, x, self.self_attn(x, positions, mask))


_NORMS: dict[Placement, tuple[str, ...]] = {
    "pre": ("input_layernorm", "post_attention_layernorm"),
    "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "sandwich": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "parallel": ("input_layernorm", "post_attention_layernorm"),
    "shared": ("input_layernorm",),
}


class PositionTable(nn.Module):
    """Learned positions, weight [rows, hidden]. It is no `Embedding`, so it is not quantized."""

    def __init__(self, rows: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, hidden), requires_grad=False)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(positions, self.weight).to(torch.float32)


class DecoderEmbedding(nn.Module):
    """The embedding of a stack; heirs have the layers and the last norm."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.scale = spec.embedding_scale
        self.embed_tokens = Embedding(spec.vocab, spec.hidden)
        self.embed_positions = PositionTable(spec.table, spec.hidden) if spec.table else None

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, S, hidden] of input_ids [B, S]."""
        h: torch.Tensor = self.embed_tokens(input_ids)
        return h if self.scale == 1.0 else h * self.scale


class DecoderStack(DecoderEmbedding):
    """Embedding, layers and last norm."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__(spec)
        self.layers = nn.ModuleList(DecoderLayer(spec, i) for i in range(len(spec.attention)))
        self.norm = spec.norm.of(spec.hidden)

    def parts(self, head: Any) -> DecoderParts:
        return DecoderParts(self.embed, self.layers, self.norm, head, self.embed_positions)


class EncodingStack(DecoderEmbedding, TextStack):
    """The same layers as an encoder of texts, causal unless the spec says bidirectional."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__(spec)
        self.layers = nn.ModuleList(EncodingLayer(spec, i) for i in range(len(spec.attention)))
        self.norm = spec.norm.of(spec.hidden)
        self.windows = tuple(a.window for a in spec.attention)
        self.bidirectional = spec.bidirectional

    def hidden_states(self, input_ids: torch.Tensor, encoder_mask: torch.Tensor) -> torch.Tensor:
        h = self.embed(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        if self.embed_positions is not None:
            h = h + self.embed_positions(positions)
        masks = {window: self._mask(positions, encoder_mask, window) for window in sorted(set(self.windows))}
        for layer, window in zip(self.layers, self.windows, strict=True):
            h = layer(h, positions, masks[window])
        out: torch.Tensor = self.norm(h)
        return out

    def _mask(self, positions: torch.Tensor, encoder_mask: torch.Tensor, window: int) -> torch.Tensor:
        """bool [B, 1, S, S]: the last `window` tokens up to the own, all where it is 0; bidirectional: as many ahead."""
        back = positions.unsqueeze(1) - positions.unsqueeze(0)
        distance = back.abs() if self.bidirectional else back
        seen = distance >= 0
        if window:
            seen = torch.logical_and(seen, distance < window)
        return torch.logical_and(encoder_mask.unsqueeze(1).unsqueeze(1), seen.unsqueeze(0).unsqueeze(0))


class DescribedDecoder(CausalModel):
    """A decoder-only model that is a `DecoderSpec`, with a head and a KV cache in each layer."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.spec = spec = self.describe(self.section)
        self.vocab = spec.vocab
        self.max_context = min(a.rope.within(spec.table or spec.positions) for a in spec.attention)
        self.model = DecoderStack(spec)
        self.lm_head = Linear(spec.hidden, spec.vocab, spec.head_bias)
        self.tied = {"lm_head.weight": "model.embed_tokens.weight"} if spec.tied else {}

    @staticmethod
    @abstractmethod
    def describe(section: ConfigReader) -> DecoderSpec:
        """The decoder of a config.json. Raises UserError for a bad value."""

    def head(self, h: torch.Tensor) -> torch.Tensor:
        """Logits [B, L, vocab] of normed hidden states [B, L, hidden]."""
        logits: torch.Tensor = self.lm_head(h)
        if self.spec.logits_scale != 1.0:
            logits = logits * self.spec.logits_scale
        return softcap(logits, self.spec.final_softcap)

    def parts(self) -> DecoderParts:
        return self.model.parts(self.head)

    def states(self) -> list[list[State]]:
        return [kv_states(i, a.kv_heads, a.head_dim) for i, a in enumerate(self.spec.attention)]

    def text_encoder(self) -> TextEncoder:
        return TextEncoder(EncodingStack(self.spec), self.spec.hidden, self.spec.vocab, self.max_context, self.names)

    def graphs(self) -> list[Graph]:
        if self.spec.bidirectional:
            raise UserError(
                "config.json: use_bidirectional_attention is set: an encoder of texts, which generates nothing"
            )
        return super().graphs()


def attentions(
    keys: StackKeys,
    rope: Rope | Sequence[Rope],
    windows: Sequence[int] = (),
    unrotated: Sequence[int] = (),
    **changes: Any,
) -> tuple[AttentionSpec, ...]:
    """The attention of each layer.

    rope: of all layers, or of each; windows: of each, 0 where it attends to everything; unrotated: layers without RoPE;
    changes: other fields of all.
    """
    common = AttentionSpec(
        hidden=keys.hidden,
        heads=keys.heads,
        kv_heads=keys.kv_heads,
        head_dim=keys.head_dim,
        scale=keys.head_dim**-0.5,
        rope=Rope(),
    )
    common = replace(common, **changes)
    return tuple(
        replace(
            common,
            rope=rope if isinstance(rope, Rope) else rope[i],
            window=windows[i] if windows else 0,
            rotated=0 if i in unrotated else common.rotated,
        )
        for i in range(keys.layers)
    )


def plain(keys: StackKeys, section: ConfigReader, attention: tuple[AttentionSpec, ...], **changes: Any) -> DecoderSpec:
    """A Llama of these keys and attentions: RMSNorm before the blocks, a gated feed-forward. changes: other fields."""
    fields: dict[str, Any] = {
        "vocab": keys.vocab,
        "hidden": keys.hidden,
        "intermediate": keys.intermediate,
        "positions": keys.max_positions,
        "attention": attention,
        "norm": NormSpec(keys.eps),
    }
    if "act" not in changes:
        fields["act"] = section.text("hidden_act", "silu")
    if "tied" not in changes:
        fields["tied"] = section.flag("tie_word_embeddings", False)
    return DecoderSpec(**(fields | changes))
