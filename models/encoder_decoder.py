"""Encoder-decoders as data: `EncoderDecoderSpec` says what a family's layers are, one module computes them all.

A family is a function from config.json to an `EncoderDecoderSpec`. Parameters have the names below; what a checkpoint calls them
says the family's `names` (`checkpoints.names`). Padding is behind the text, as `runtimes.generate` puts it: positions count all
tokens of a row from 0.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from .causal import DecoderParts
from .config import ConfigReader
from .decoder import PositionTable
from .kv_cache import Cache
from .layers.attention import AttentionSpec, BidirectionalAttention, CachedAttention, CrossAttention
from .layers.linear import Embedding, Linear, LogitsBias
from .layers.mlp import FeedForward, GatedMLP
from .layers.norm import NormSpec
from .layers.relative import RelativeBias, RelativeCachedAttention, RelativeEncoderAttention, RelativeSpec
from .layers.sinusoids import Sinusoids, SinusoidSpec
from .seq2seq import EncoderDecoder, Seq2seqModel


@dataclass(frozen=True)
class StackSpec:
    """One of the two stacks.

    vocab: of its embedding; layers, intermediate: sizes; attention: of every layer. act, gated: of its feed-forward, where they are
    not those of both stacks.
    """

    vocab: int
    layers: int
    intermediate: int
    attention: AttentionSpec
    act: str | None = None
    gated: bool | None = None


@dataclass(frozen=True)
class EncoderDecoderSpec:
    """A plain encoder-decoder.

    Attributes:
        encoder, decoder: the stacks. Their attentions have one width of heads.
        hidden, positions: sizes; positions are the most tokens of each stack.
        norm: of all layers.
        placement: norms are before a layer's blocks and behind the last layer (T5), or behind each residual sum (BART).
        act, gated, mlp_bias: of the feed-forward.
        embedding_scale, output_scale: factors of the embeddings, and of what the head reads.
        embedding_norm: a norm behind embeddings and positions.
        relative: relative bias in self-attention; None without.
        learned: rows of a learned position table that lie before that of position 0; None without such a table.
        sinusoids: the positions that are computed; None without.
        shared: encoder and decoder have one embedding; else the head belongs to the decoder's.
        tied: the head is the embedding.
        logits_bias: a bias of the logits.
    """

    encoder: StackSpec
    decoder: StackSpec
    hidden: int
    positions: int
    norm: NormSpec
    placement: Literal["pre", "post"] = "pre"
    act: str = "relu"
    gated: bool = False
    mlp_bias: bool = False
    embedding_scale: float = 1.0
    output_scale: float = 1.0
    embedding_norm: bool = False
    relative: RelativeSpec | None = None
    learned: int | None = None
    sinusoids: SinusoidSpec | None = None
    shared: bool = True
    tied: bool = True
    logits_bias: bool = False

    def mlp(self, stack: StackSpec) -> GatedMLP | FeedForward:
        kind = GatedMLP if (self.gated if stack.gated is None else stack.gated) else FeedForward
        return kind(self.hidden, stack.intermediate, stack.act or self.act, self.mlp_bias)

    def relative_of(self, bidirectional: bool, each: bool) -> RelativeBias | None:
        """The relative bias of the encoder (bidirectional) or the decoder; None unless it is of each layer, or of all, as asked."""
        if self.relative is None or self.relative.each != each:
            return None
        stack = self.encoder if bidirectional else self.decoder
        return RelativeBias(self.relative, stack.attention.heads, bidirectional)


class Layer(nn.Module):
    """What a layer of either stack does with its blocks: each is normed before, or its sum with the residual behind."""

    def __init__(self, spec: EncoderDecoderSpec) -> None:
        super().__init__()
        self.before = spec.placement == "pre"

    def normed(self, norm: nn.Module, h: torch.Tensor) -> torch.Tensor:
        """What a block reads."""
        out: torch.Tensor = norm(h) if self.before else h
        return out

    def added(self, norm: nn.Module, h: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """The residual behind a block."""
        out: torch.Tensor = h + new if self.before else norm(h + new)
        return out


class EncoderLayer(Layer):
    """Self-attention and feed-forward. mask: bool [B, 1, T, T], of a relative bias what is added to the scores."""

    def __init__(self, spec: EncoderDecoderSpec) -> None:
        super().__init__(spec)
        stack = spec.encoder
        self.relative = spec.relative_of(bidirectional=True, each=True)
        self.self_attn = (RelativeEncoderAttention if spec.relative else BidirectionalAttention)(stack.attention)
        self.mlp = spec.mlp(stack)
        self.self_attn_norm, self.mlp_norm = spec.norm.of(spec.hidden), spec.norm.of(spec.hidden)

    def forward(
        self, h: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, encoder_mask: torch.Tensor
    ) -> torch.Tensor:
        if self.relative is not None:
            mask = self.relative.between(h.shape[1], encoder_mask)
        attended = self.self_attn(self.normed(self.self_attn_norm, h), positions, mask)
        h = self.added(self.self_attn_norm, h, attended)
        return self.added(self.mlp_norm, h, self.mlp(self.normed(self.mlp_norm, h)))


class DecoderLayer(Layer):
    """Self-attention, cross-attention and feed-forward."""

    def __init__(self, spec: EncoderDecoderSpec) -> None:
        super().__init__(spec)
        stack = spec.decoder
        self.relative = spec.relative_of(bidirectional=False, each=True)
        self.self_attn = (RelativeCachedAttention if spec.relative else CachedAttention)(stack.attention)
        self.cross_attn = CrossAttention(stack.attention, spec.hidden)
        self.mlp = spec.mlp(stack)
        self.self_attn_norm, self.cross_attn_norm = spec.norm.of(spec.hidden), spec.norm.of(spec.hidden)
        self.mlp_norm = spec.norm.of(spec.hidden)

    def project_encoder(self, encoder_hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v [B, KV, T, D] of encoder_hidden [B, T, hidden]."""
        return self.cross_attn.project_encoder(encoder_hidden)

    def forward(
        self,
        h: torch.Tensor,
        past_length: torch.Tensor,
        mask: torch.Tensor,
        states: list[Cache],
        *distances: torch.Tensor,
    ) -> tuple[torch.Tensor, Cache, Cache]:
        """distances: of a relative bias that all layers share."""
        k_cache, v_cache, cross_k, cross_v = states
        if self.relative is not None:
            distances = (self.relative.distances(),)
        x = self.normed(self.self_attn_norm, h)
        attended, k_out, v_out = self.self_attn(x, past_length, k_cache, v_cache, *distances)
        h = self.added(self.self_attn_norm, h, attended)
        crossed = self.cross_attn(self.normed(self.cross_attn_norm, h), cross_k, cross_v, mask)
        h = self.added(self.cross_attn_norm, h, crossed)
        return self.added(self.mlp_norm, h, self.mlp(self.normed(self.mlp_norm, h))), k_out, v_out


class Stack(nn.Module):
    """What is around the layers of either stack: positions, norms, and a relative bias that all layers share."""

    def __init__(self, spec: EncoderDecoderSpec, bidirectional: bool) -> None:
        super().__init__()
        stack = spec.encoder if bidirectional else spec.decoder
        self.scale, self.before = spec.embedding_scale, spec.learned or 0
        self.embed_tokens = None if spec.shared else Embedding(stack.vocab, spec.hidden)
        self.embed_positions: PositionTable | Sinusoids | None = None
        if spec.learned is not None:
            self.embed_positions = PositionTable(spec.positions + spec.learned, spec.hidden)
        elif spec.sinusoids is not None:
            self.embed_positions = Sinusoids(spec.sinusoids, spec.positions, spec.hidden)
        self.embedding_norm = spec.norm.of(spec.hidden) if spec.embedding_norm else None
        self.relative = spec.relative_of(bidirectional, each=False)
        layer = EncoderLayer if bidirectional else DecoderLayer
        self.layers = nn.ModuleList(layer(spec) for _ in range(stack.layers))
        self.norm = spec.norm.of(spec.hidden) if spec.placement == "pre" else nn.Identity()

    def positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Rows [S, hidden] of positions int64 [S]."""
        assert self.embed_positions is not None
        rows: torch.Tensor = self.embed_positions(positions + self.before if self.before else positions)
        return rows

    def distances(self) -> tuple[torch.Tensor, ...]:
        """Of the relative bias that all layers share; () where there is none."""
        return () if self.relative is None else (self.relative.distances(),)

    def parts(self, table: Callable[[torch.Tensor], torch.Tensor], head: Any) -> DecoderParts:
        """table: ids [B, S] -> rows [B, S, hidden] of the embedding."""

        def embed(input_ids: torch.Tensor) -> torch.Tensor:
            rows = table(input_ids)
            return rows if self.scale == 1.0 else rows * self.scale

        return DecoderParts(
            embed,
            self.layers,
            self.norm,
            head,
            None if self.embed_positions is None else self.positions,
            self.embedding_norm,
            self.distances,
        )


class Stacks(nn.Module):
    """Both stacks, and the embedding that they share."""

    def __init__(self, spec: EncoderDecoderSpec) -> None:
        super().__init__()
        self.shared = Embedding(spec.encoder.vocab, spec.hidden) if spec.shared else None
        self.encoder, self.decoder = Stack(spec, True), Stack(spec, False)

    def table(self, stack: Stack) -> Embedding:
        """The embedding of a stack."""
        table = self.shared if stack.embed_tokens is None else stack.embed_tokens
        assert table is not None
        return table


class Encode(nn.Module):
    """The graph `encoder`."""

    def __init__(self, model: Stacks) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, encoder_mask: torch.Tensor) -> tuple[torch.Tensor]:
        """input_ids: int64 [B, T]; encoder_mask: bool [B, T], true at real tokens. Returns ([B, T, hidden],)."""
        stack, length = self.model.encoder, input_ids.shape[1]
        parts = stack.parts(self.model.table(stack), None)
        positions = torch.arange(length, device=input_ids.device)
        h = parts.embedded(input_ids, torch.zeros(1, dtype=torch.int64, device=input_ids.device))
        if stack.relative is not None:
            mask = stack.relative.between(length, encoder_mask)
        else:
            everywhere = (positions.unsqueeze(1) + positions.unsqueeze(0) >= 0).unsqueeze(0).unsqueeze(0)
            mask = torch.logical_and(encoder_mask.unsqueeze(1).unsqueeze(1), everywhere)
        for layer in stack.layers:
            h = layer(h, positions, mask, encoder_mask)
        return (parts.norm(h),)


class DescribedEncoderDecoder(Seq2seqModel):
    """An encoder-decoder that is an `EncoderDecoderSpec`."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.spec = spec = self.describe(self.section)
        self.max_context = spec.positions
        self.model = Stacks(spec)
        self.lm_head = Linear(spec.hidden, spec.decoder.vocab)
        self.logits_bias = LogitsBias(spec.decoder.vocab) if spec.logits_bias else None
        table = "model.shared.weight" if spec.shared else "model.decoder.embed_tokens.weight"
        self.tied = {"lm_head.weight": table} if spec.tied else {}

    @staticmethod
    @abstractmethod
    def describe(section: ConfigReader) -> EncoderDecoderSpec:
        """The encoder-decoder of a config.json. Raises UserError for a bad value."""

    def head(self, h: torch.Tensor) -> torch.Tensor:
        """Logits [B, L, vocab] of hidden states [B, L, hidden]."""
        scale = self.spec.output_scale
        logits: torch.Tensor = self.lm_head(h if scale == 1.0 else h * scale)
        return logits if self.logits_bias is None else self.logits_bias(logits)

    def stacks(self) -> dict[str, nn.ModuleList]:
        return {"encoder": self.model.encoder.layers, "decoder": self.model.decoder.layers}

    def encoder_decoder(self) -> EncoderDecoder:
        spec, stack = self.spec, self.model.decoder
        head: dict[str, nn.Module] = {"lm_head": self.lm_head}
        if self.logits_bias is not None:
            head["logits_bias"] = self.logits_bias
        return EncoderDecoder(
            encoder=Encode(self.model),
            encoder_root="",
            stack={"model": self.model},
            head=head,
            decoder=stack.parts(self.model.table(stack), self.head),
            encoder_hidden=spec.hidden,
            vocab=spec.decoder.vocab,
            kv_heads=spec.decoder.attention.kv_heads,
            head_dim=spec.decoder.attention.head_dim,
            source_positions=spec.positions,
            target_positions=spec.positions,
        )
