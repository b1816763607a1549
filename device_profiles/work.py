"""What a call asks of a compute unit: bytes, operations and counts, each a term that a cost is multiplied with. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Phase = Literal["decode", "prefill"]

DECODE = ("weights", "cache", "attention", "layers", "fixed", "recurrent", "experts")
"""Terms of a token generated: bytes of weights, bytes of cache read, multiply-adds of one query's attention, layers with attention
or a recurrence, 1, recurrent layers, layers of experts."""

PREFILL = ("products", "attention", "weights", "layers", "recurrent", "experts")
"""Terms of one token of a prompt: operations of the weights' products, operations of attention, bytes of weights and layers (both
divided by the tokens of a chunk), recurrent layers, operations of experts."""

TERMS: dict[Phase, tuple[str, ...]] = {"decode": DECODE, "prefill": PREFILL}


@dataclass(frozen=True)
class Work:
    """The terms of one token in a phase.

    weight_format: the codes that most of the weights are stored in, as int4, int8, float16. activations: int8, int16, float16 or
    float32. tokens: that a call takes at once (the chunk of a prefill).
    """

    phase: Phase
    terms: Mapping[str, float]
    weight_format: str
    activations: str
    tokens: int = 1

    @property
    def format(self) -> str:
        """The key of efficiencies: weights and activations."""
        return f"{self.weight_format}/{self.activations}"


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder that bound its speed.

    attention_layers: those with a cache of keys and values. window_layers: of them, those that see `window` tokens alone.
    global_head_dim: of the layers that see everything. body, head: weights of the layers and of the output head that one
    token multiplies. state_bytes: of the recurrent states. expert_layers: layers that choose among experts.
    """

    layers: int
    attention_layers: int
    recurrent_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    body: float
    head: float
    window: int = 0
    window_layers: int = 0
    global_head_dim: int = 0
    state_bytes: float = 0
    expert_layers: int = 0

    def seen(self, depth: float) -> float:
        """Cached positions that a query at `depth` attends to, summed over the layers and weighted by their head's width."""
        windowed = min(self.window_layers, self.attention_layers)
        wide = (self.global_head_dim or self.head_dim) / self.head_dim
        return (self.attention_layers - windowed) * depth * wide + windowed * min(self.window or depth, depth)


def decode_work(
    shape: DecoderShape,
    weight_bytes: float,
    depth: float,
    cache_bytes: int,
    weight_format: str,
    activations: str,
    least_head: int = 0,
) -> Work:
    """One token at a cache depth.

    depth: positions that are read; where a runtime reads its whole static cache, those allocated. cache_bytes: of one cached
    number. least_head: the head width that a head of fewer numbers costs."""
    seen = shape.seen(depth)
    head_dim = max(shape.head_dim, least_head)
    terms = {
        "weights": weight_bytes,
        "cache": 2 * shape.kv_heads * shape.head_dim * cache_bytes * seen + 2 * shape.state_bytes,
        "attention": 2 * shape.heads * head_dim * seen,
        "layers": float(shape.layers),
        "fixed": 1.0,
        "recurrent": float(shape.recurrent_layers),
        "experts": float(shape.expert_layers),
    }
    return Work("decode", terms, weight_format, activations)


def prefill_work(
    shape: DecoderShape,
    weight_bytes: float,
    depth: float,
    chunk: float,
    weight_format: str,
    activations: str,
    least_head: int = 0,
) -> Work:
    """One token of a prompt. depth: the mean positions that a query attends to. weight_bytes: of what a chunk reads."""
    head_dim = max(shape.head_dim, least_head)
    products = 2 * shape.body
    terms = {
        "products": products,
        "attention": 4 * shape.heads * head_dim * shape.seen(depth),
        "weights": weight_bytes / chunk,
        "layers": shape.layers / chunk,
        "recurrent": float(shape.recurrent_layers),
        "experts": products if shape.expert_layers else 0.0,
    }
    return Work("prefill", terms, weight_format, activations, tokens=int(chunk))
