"""Plain encoders as data: `EncoderSpec` says what a family's layers are, one module computes them all.

They are BERT's kind (arXiv 1810.04805): learned positions, and a norm behind each residual sum. A family is a function from
config.json to an `EncoderSpec`; what a checkpoint calls the parameters says its `names`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..checkpoints.names import Names
from .config import ConfigReader
from .decoder import PositionTable
from .embedding import EmbeddingModel
from .language_model import TextEncoder, TextStack
from .layers.attention import AttentionSpec, BidirectionalAttention
from .layers.linear import Embedding
from .layers.mlp import FeedForward
from .layers.norm import NormSpec
from .rope import Rope


@dataclass(frozen=True)
class EncoderSpec:
    """A plain encoder.

    Attributes:
        vocab, hidden, intermediate, layers, heads: sizes.
        positions: rows of the table of learned positions.
        before: rows of that table before the one of the first token; RoBERTa's lie behind the padding's.
        types: rows of the table of token types, of which the first is used: a text is one segment. 0 without.
        act, eps: of the feed-forward, of the norms.
    """

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    positions: int
    before: int = 0
    types: int = 0
    act: str = "gelu"
    eps: float = 1e-12

    @property
    def norm(self) -> NormSpec:
        return NormSpec(self.eps, "layer", bias=True)

    @property
    def attention(self) -> AttentionSpec:
        head_dim = self.hidden // self.heads
        return AttentionSpec(
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=Rope(),
            bias=True,
            out_bias=True,
            rotated=0,
        )


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, a norm behind each residual sum."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.self_attn = BidirectionalAttention(spec.attention)
        self.self_attn_norm = spec.norm.of(spec.hidden)
        self.mlp = FeedForward(spec.hidden, spec.intermediate, spec.act, bias=True)
        self.mlp_norm = spec.norm.of(spec.hidden)

    def forward(self, h: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """positions: int64 [T]; mask: bool [B, 1, T, T]."""
        h = self.self_attn_norm(h + self.self_attn(h, positions, mask))
        out: torch.Tensor = self.mlp_norm(h + self.mlp(h))
        return out


class EncoderStack(TextStack):
    """Embeddings of tokens, positions and type, their norm, and the layers."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.before = spec.before
        self.embed_tokens = Embedding(spec.vocab, spec.hidden)
        self.embed_positions = PositionTable(spec.positions, spec.hidden)
        self.embed_types = PositionTable(spec.types, spec.hidden) if spec.types else None
        self.embedding_norm = spec.norm.of(spec.hidden)
        self.layers = nn.ModuleList(EncoderLayer(spec) for _ in range(spec.layers))

    def hidden_states(self, input_ids: torch.Tensor, encoder_mask: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        h = self.embed_tokens(input_ids) + self.embed_positions(positions + self.before if self.before else positions)
        if self.embed_types is not None:
            h = h + self.embed_types.weight[0].to(h.dtype)
        h = self.embedding_norm(h)
        everywhere = (positions.unsqueeze(1) + positions.unsqueeze(0) >= 0).unsqueeze(0).unsqueeze(0)
        mask = torch.logical_and(encoder_mask.unsqueeze(1).unsqueeze(1), everywhere)
        for layer in self.layers:
            h = layer(h, positions, mask)
        out: torch.Tensor = h
        return out


class DescribedEncoder(EmbeddingModel):
    """An embedding model whose text encoder is an `EncoderSpec`."""

    def __init__(self, config: dict[str, Any]) -> None:
        spec = self.describe(ConfigReader(config, ""))
        stack = EncoderStack(spec)
        super().__init__(
            config, TextEncoder(stack, spec.hidden, spec.vocab, spec.positions - spec.before, self.table())
        )

    @staticmethod
    @abstractmethod
    def describe(section: ConfigReader) -> EncoderSpec:
        """The encoder of a config.json. Raises UserError for a bad value."""

    @staticmethod
    @abstractmethod
    def table() -> Names:
        """What files call the parameters."""

    @classmethod
    def own_pooling(cls, config: dict[str, Any]) -> str:
        return "mean"


def heads_of(section: ConfigReader, key: str, hidden: int) -> int:
    """A number of heads, each of a multiple of 8 dimensions, which the attention kernels need."""
    heads = section.divisor(key, hidden)
    if hidden // heads % 8 or hidden // heads > 4096:
        raise section.error(key, heads, f"{hidden} / heads to be a multiple of 8 up to 4096")
    return heads
