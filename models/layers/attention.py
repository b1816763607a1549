"""Attention: bidirectional, causal with a KV cache, across to an encoder's output, and within a window."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kv_cache import Cache, cached_attention, cross_attention
from ..rope import Rope
from .block import Block
from .linear import Linear
from .norm import RMSNorm
from .ops import EW


@dataclass(frozen=True)
class AttentionSpec:
    """Sizes and options of one attention.

    Attributes:
        scale: what scores are multiplied by.
        rope: the RoPE of the dimensions that rotate.
        softcap: of the scores; 0 for none.
        window: the most tokens that a query sees; 0 for all.
        norm_eps: of the QK-norm; None without.
        norm_offset: of the QK-norm; 1 is Gemma's form.
        norm_whole: the QK-norm spans all heads at once, as in OLMo 2, not each head.
        norm_rotated: the QK-norm comes behind RoPE.
        rotated: how many dimensions of a head rotate, the first ones; None for all, 0 for none.
        key_bias: keys have a bias too, where `bias` says that the projections have one.
        padding: zeros behind each head's query, key and value: kernels want heads of a multiple of 8.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope
    softcap: float = 0.0
    window: int = 0
    bias: bool = False
    out_bias: bool = False
    norm_eps: float | None = None
    norm_offset: float = 1.0
    norm_whole: bool = False
    norm_rotated: bool = False
    rotated: int | None = None
    key_bias: bool = True
    padding: int = 0

    @property
    def cached_dim(self) -> int:
        """Of a head in a cache."""
        return self.head_dim + self.padding

    @property
    def rotary_dims(self) -> int:
        return self.head_dim if self.rotated is None else self.rotated

    @property
    def rotated_scale(self) -> float:
        """`scale` with the factor of rotated queries and keys, where all dimensions rotate."""
        return self.scale * self.rope.attention**2 if self.rotary_dims == self.head_dim else self.scale


def padded(x: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """Heads [B, S, H, D] with their padding."""
    return torch.nn.functional.pad(x, (0, spec.padding)) if spec.padding else x


def unpadded(attended: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """[B, S, H * D] without the padding of each head."""
    if not spec.padding:
        return attended
    batch, length = attended.shape[:2]
    heads = attended.reshape(batch, length, spec.heads, spec.cached_dim).narrow(3, 0, spec.head_dim)
    return heads.reshape(batch, length, spec.heads * spec.head_dim)


class SelfAttention(Block):
    """Projections, optional QK-norm and RoPE of the self-attention of encoders and decoders."""

    fused = (("q_proj", "k_proj", "v_proj"),)
    key_value = ("k_proj", "v_proj")
    inv_freq: torch.Tensor

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.spec, self.heads = spec, spec.heads
        self.q_proj = Linear(spec.hidden, spec.heads * spec.head_dim, spec.bias)
        self.k_proj = Linear(spec.hidden, spec.kv_heads * spec.head_dim, spec.bias and spec.key_bias)
        self.v_proj = Linear(spec.hidden, spec.kv_heads * spec.head_dim, spec.bias)
        self.o_proj = Linear(spec.heads * spec.head_dim, spec.hidden, spec.out_bias)
        if spec.norm_eps is not None:
            q_size, k_size = (spec.heads, spec.kv_heads) if spec.norm_whole else (1, 1)
            self.q_norm = RMSNorm(q_size * spec.head_dim, spec.norm_eps, spec.norm_offset)
            self.k_norm = RMSNorm(k_size * spec.head_dim, spec.norm_eps, spec.norm_offset)
        if spec.rotary_dims:
            self.register_buffer("inv_freq", spec.rope.frequencies(spec.rotary_dims), persistent=False)

    def project(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [B, S, H, D] and k, v [B, S, KV, D] of x [B, S, hidden], q and k rotated; D with the padding."""
        return self.normed_and_rotated(self.q_proj(x), self.k_proj(x), self.v_proj(x), positions)

    def normed_and_rotated(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [B, S, H, D] and k, v [B, S, KV, D] of projections q [B, S, H * D] and k, v [B, S, KV * D], q and k rotated."""
        s, lead = self.spec, q.shape[:2]
        if s.norm_eps is not None and s.norm_whole:
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.reshape(*lead, s.heads, s.head_dim)
        k = k.reshape(*lead, s.kv_heads, s.head_dim)
        v = v.reshape(*lead, s.kv_heads, s.head_dim)
        each = s.norm_eps is not None and not s.norm_whole
        if each and not s.norm_rotated:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        if each and s.norm_rotated:
            q, k = self.q_norm(q), self.k_norm(k)
        return padded(q, s), padded(k, s), padded(v, s)

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The first `rotary_dims` of each head of x [B, S, heads, D] rotated; where all are, RoPE's factor is in the scale."""
        dims, head_dim = self.spec.rotary_dims, self.spec.head_dim
        if not dims:
            return x
        if dims == head_dim:
            out: torch.Tensor = EW.rope(x, positions, self.inv_freq)
            return out
        turned = EW.rope(x.narrow(3, 0, dims), positions, self.inv_freq)
        if self.spec.rope.attention != 1.0:
            turned = turned * self.spec.rope.attention
        return torch.cat((turned, x.narrow(3, dims, head_dim - dims)), 3)


class BidirectionalAttention(SelfAttention):
    """Self-attention of an encoder."""

    def forward(self, x: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x, positions)
        attended = EW.bidirectional_attention(q, k, v, mask, self.spec.rotated_scale, self.spec.softcap)
        out: torch.Tensor = self.o_proj(unpadded(attended, self.spec))
        return out


class CachedAttention(SelfAttention):
    """Causal self-attention that appends to its KV cache. x: [B, S, hidden]."""

    def forward(
        self, x: torch.Tensor, past_length: torch.Tensor, k_cache: Cache, v_cache: Cache
    ) -> tuple[torch.Tensor, Cache, Cache]:
        positions = past_length + torch.arange(x.shape[1], device=x.device)
        q, k, v = self.project(x, positions)
        s = self.spec
        attended, k_out, v_out = cached_attention(
            q, k, v, k_cache, v_cache, past_length, s.rotated_scale, s.softcap, s.window
        )
        return self.o_proj(unpadded(attended, s)), k_out, v_out


class WindowAttention(SelfAttention):
    """Causal self-attention within `spec.window`, which keeps the window's keys and values alone (`window_attention`)."""

    def forward(
        self, x: torch.Tensor, past_length: torch.Tensor, k_past: torch.Tensor, v_past: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        positions = past_length + torch.arange(x.shape[1], device=x.device)
        q, k, v = self.project(x, positions)
        attended, k_last, v_last = window_attention(q, k, v, k_past, v_past, past_length, self.spec.rotated_scale)
        return self.o_proj(attended), k_last, v_last


class GatedCachedAttention(SelfAttention):
    """`CachedAttention` whose output is gated by a sigmoid. For each head `q_proj` computes the query, then the gate."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        self.q_proj = Linear(spec.hidden, 2 * spec.heads * spec.head_dim, spec.bias)

    def forward(
        self, x: torch.Tensor, past_length: torch.Tensor, k_cache: Cache, v_cache: Cache
    ) -> tuple[torch.Tensor, Cache, Cache]:
        s, lead = self.spec, x.shape[:2]
        both = self.q_proj(x).reshape(*lead, s.heads, 2 * s.head_dim)
        query = both.narrow(3, 0, s.head_dim).reshape(*lead, s.heads * s.head_dim)
        gate = both.narrow(3, s.head_dim, s.head_dim).reshape(*lead, s.heads * s.head_dim)
        positions = past_length + torch.arange(x.shape[1], device=x.device)
        q, k, v = self.normed_and_rotated(query, self.k_proj(x), self.v_proj(x), positions)
        attended, k_out, v_out = cached_attention(
            q, k, v, k_cache, v_cache, past_length, s.rotated_scale, s.softcap, s.window
        )
        return self.o_proj(attended * torch.sigmoid(gate)), k_out, v_out


class CrossAttention(Block):
    """Attention of a decoder to keys and values that are projected once from the encoder's output. No RoPE, no window."""

    fused = (("k_proj", "v_proj"),)
    key_value = ("k_proj", "v_proj")

    def __init__(self, spec: AttentionSpec, encoder_hidden: int) -> None:
        super().__init__()
        self.spec, self.heads = spec, spec.heads
        self.q_proj = Linear(spec.hidden, spec.heads * spec.head_dim, spec.bias)
        self.k_proj = Linear(encoder_hidden, spec.kv_heads * spec.head_dim, spec.bias and spec.key_bias)
        self.v_proj = Linear(encoder_hidden, spec.kv_heads * spec.head_dim, spec.bias)
        self.o_proj = Linear(spec.heads * spec.head_dim, spec.hidden, spec.out_bias)

    def project_encoder(self, encoder_hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v [B, KV, T, D] of encoder_hidden [B, T, hidden]; D with the padding."""
        s, lead = self.spec, encoder_hidden.shape[:2]
        k = self.k_proj(encoder_hidden).reshape(*lead, s.kv_heads, s.head_dim)
        v = self.v_proj(encoder_hidden).reshape(*lead, s.kv_heads, s.head_dim)
        return padded(k, s).transpose(1, 2), padded(v, s).transpose(1, 2)

    def forward(self, x: torch.Tensor, k: Cache, v: Cache, mask: torch.Tensor) -> torch.Tensor:
        s = self.spec
        q = padded(self.q_proj(x).reshape(*x.shape[:2], s.heads, s.head_dim), s)
        out: torch.Tensor = self.o_proj(unpadded(cross_attention(q, k, v, mask, s.scale, s.softcap), s))
        return out


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_past: torch.Tensor,
    v_past: torch.Tensor,
    past_length: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Causal attention to the last `window` tokens. Only their keys and values are kept, so time and memory of a step do not
    grow with the context.

    q: [B, S, H, D]; k, v: [B, S, KV, D]; k_past, v_past: [B, KV, window - 1, D], oldest first, zeros before the first token;
    past_length: int64 [1]. Returns [B, S, H * D] and both pasts after these tokens. Of plain ATen operations.
    """
    batch, length, heads, dim = q.shape
    kept = k_past.shape[2]
    keys = torch.cat((k_past, k.transpose(1, 2)), 2)
    values = torch.cat((v_past, v.transpose(1, 2)), 2)
    slots = torch.arange(kept + length, device=q.device)
    own = torch.arange(length, device=q.device).unsqueeze(1)
    seen = torch.logical_and(slots >= own, slots <= own + kept)  # the window, up to the token itself
    seen = torch.logical_and(seen, slots >= kept - past_length)  # a slot before the first token is empty
    bias = (seen.to(q.dtype) - 1.0) * 30000.0  # finite in float16
    wide_keys, wide_values = _spread_heads(keys, heads), _spread_heads(values, heads)
    scores = torch.matmul(q.transpose(1, 2), wide_keys.transpose(2, 3)) * scale + bias
    out = torch.matmul(torch.softmax(scores, -1), wide_values).transpose(1, 2).reshape(batch, length, heads * dim)
    last = torch.arange(kept, device=q.device) + length
    return out, keys.index_select(2, last), values.index_select(2, last)


def _spread_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, KV, T, D] as [B, heads, T, D]: head h is key head h // (heads / KV). A reshaped view would fix the range of T."""
    groups = heads // x.shape[1]
    if groups == 1:
        return x
    return torch.cat([head for i in range(x.shape[1]) for head in [x.narrow(1, i, 1)] * groups], 1)
