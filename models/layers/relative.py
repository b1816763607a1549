"""Relative position bias (T5, arXiv 1910.10683): each head adds a learned number to a score, by how far apart query and key are.

Distances share buckets, wider the farther they are. Which bucket a distance has is a table, made when the model is built: no
logarithm at run time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from ..kv_cache import Cache, biased_attention
from .attention import SelfAttention

MASKED = -30000.0
"""What is added to a masked score: far below any score, and finite in float16."""


@dataclass(frozen=True)
class RelativeSpec:
    """buckets: how many there are; farthest: the distance from which on all share the last; each: every layer has its own bias."""

    buckets: int
    farthest: int
    each: bool = False


class RelativeBias(nn.Module):
    """The bias by bucket and head, weight [buckets, heads]. It is no `Embedding`, so it is not quantized."""

    bucket_of: torch.Tensor

    def __init__(self, spec: RelativeSpec, heads: int, bidirectional: bool) -> None:
        super().__init__()
        self.farthest = spec.farthest
        self.weight = nn.Parameter(torch.empty(spec.buckets, heads), requires_grad=False)
        with torch.device("cpu"):
            table = _both_ways(spec) if bidirectional else _buckets(spec.buckets, spec.farthest)
        self.register_buffer("bucket_of", table, persistent=False)

    def distances(self) -> torch.Tensor:
        """float32 [M, heads]: of the decoder row d for a key d tokens before the query, of the encoder row `farthest` + d for one
        d tokens behind it."""
        return nn.functional.embedding(self.bucket_of, self.weight).to(torch.float32)

    def between(self, length: int, mask: torch.Tensor) -> torch.Tensor:
        """What is added to an encoder's scores, [B, heads, T, T]: the bias, and `MASKED` where mask bool [B, T] is false."""
        positions = torch.arange(length, device=mask.device)
        ahead = (positions.unsqueeze(0) - positions.unsqueeze(1)).clamp(-self.farthest, self.farthest) + self.farthest
        # No new dimension is made of floats: ExecuTorch would leave that one operation out of its delegate.
        bias = nn.functional.embedding(ahead.unsqueeze(0), self.distances()).permute(0, 3, 1, 2)
        return bias + (mask.unsqueeze(1).unsqueeze(1).to(torch.float32) - 1.0) * -MASKED


def _buckets(count: int, farthest: int) -> torch.Tensor:
    """int64 [farthest + 1]: the bucket of each distance, in the order of operations of transformers."""
    distance = torch.arange(farthest + 1)
    exact = count // 2
    far = torch.log(distance.float() / exact) / math.log(farthest / exact) * (count - exact)
    wide = (exact + far.clamp(min=0).to(torch.long)).clamp(max=count - 1)
    return torch.where(distance < exact, distance, wide)


def _both_ways(spec: RelativeSpec) -> torch.Tensor:
    """int64 [2 * farthest + 1]: of keys from `farthest` tokens before the query to as many behind it, which have buckets of their
    own."""
    one_way = _buckets(spec.buckets // 2, spec.farthest)
    return torch.cat((one_way.flip(0), one_way[1:] + spec.buckets // 2))


class RelativeEncoderAttention(SelfAttention):
    """Self-attention of an encoder, of plain ATen operations. bias: what `RelativeBias.between` gives."""

    def forward(self, x: torch.Tensor, positions: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        s = self.spec
        q, k, v = (t.transpose(1, 2) for t in self.project(x, positions))
        scores = torch.matmul(q, k.transpose(2, 3))
        scores = (scores if s.scale == 1.0 else scores * s.scale) + bias
        attended = torch.matmul(torch.softmax(scores, -1), v).transpose(1, 2)
        out: torch.Tensor = self.o_proj(attended.reshape(*x.shape[:2], s.heads * s.head_dim))
        return out


class RelativeCachedAttention(SelfAttention):
    """Causal self-attention that appends to its KV cache. distances: what `RelativeBias.distances` gives."""

    def forward(
        self, x: torch.Tensor, past_length: torch.Tensor, k_cache: Cache, v_cache: Cache, distances: torch.Tensor
    ) -> tuple[torch.Tensor, Cache, Cache]:
        positions = past_length + torch.arange(x.shape[1], device=x.device)
        q, k, v = self.project(x, positions)
        attended, k_out, v_out = biased_attention(q, k, v, k_cache, v_cache, past_length, distances, self.spec.scale)
        return self.o_proj(attended), k_out, v_out
