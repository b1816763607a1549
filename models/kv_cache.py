"""KV caches as a graph stores them: float32, or int8 codes with one scale for each token and head.

`stored_as` turns graphs with float caches into graphs with int8 caches, for every family: a state of keys or values becomes
two. A model gets both as one `Int8Cache` and passes it to the attentions below as it passes a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ..errors import UserError
from ..graph import Graph

EW = torch.ops.edgewright

Stored = Literal["float32", "int8"]
SCALE = "_scale"
"""Follows a state's name in the name of its scales."""


class Int8Cache(NamedTuple):
    """Keys or values: codes int8 [B, KV, T, D], scales float32 [B, KV, T, 1] (`ops.quantized_cache`)."""

    codes: torch.Tensor
    scales: torch.Tensor


Cache = torch.Tensor | Int8Cache
"""Keys or values [B, KV, T, D] of one layer."""


# ---- attention over either form -------------------------------------------------------------------------------------


def cached_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: Cache,
    v_cache: Cache,
    past_length: torch.Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[torch.Tensor, Cache, Cache]:
    """`ops.attention.cached_attention`. Over int8 caches it reads the new tokens, too, from their codes."""
    if isinstance(k_cache, torch.Tensor):
        out, k_out, v_out = EW.cached_attention(q, k, v, k_cache, v_cache, past_length, scale, softcap, window)
        return out, k_out, v_out
    assert isinstance(v_cache, Int8Cache)
    k_new, v_new = _appended(k_cache, k, past_length), _appended(v_cache, v, past_length)
    positions = past_length + torch.arange(q.shape[1], device=q.device)
    return EW.quantized_causal_attention(q, *k_new, *v_new, positions, scale, softcap, window), k_new, v_new


def biased_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: Cache,
    v_cache: Cache,
    past_length: torch.Tensor,
    distances: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, Cache, Cache]:
    """`ops.attention.biased_attention`. Over int8 caches it reads the new tokens, too, from their codes."""
    if isinstance(k_cache, torch.Tensor):
        out, k_out, v_out = EW.biased_attention(q, k, v, k_cache, v_cache, past_length, distances, scale)
        return out, k_out, v_out
    assert isinstance(v_cache, Int8Cache)
    k_new, v_new = _appended(k_cache, k, past_length), _appended(v_cache, v, past_length)
    positions = past_length + torch.arange(q.shape[1], device=q.device)
    return EW.quantized_biased_attention(q, *k_new, *v_new, positions, distances, scale), k_new, v_new


def merged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: Cache,
    v_cache: Cache,
    cross_k: Cache,
    cross_v: Cache,
    mask: torch.Tensor,
    past_length: torch.Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[torch.Tensor, Cache, Cache]:
    """`ops.attention.merged_attention` over caches that are all of one form."""
    if isinstance(k_cache, torch.Tensor):
        out, k_out, v_out = EW.merged_attention(
            q, k, v, k_cache, v_cache, cross_k, cross_v, mask, past_length, scale, softcap, window
        )
        return out, k_out, v_out
    assert isinstance(v_cache, Int8Cache)
    k_new, v_new = _appended(k_cache, k, past_length), _appended(v_cache, v, past_length)
    positions = past_length + torch.arange(q.shape[1], device=q.device)
    seen = (mask, positions, scale, softcap, window)
    return EW.quantized_merged_attention(q, *k_new, *v_new, *cross_k, *cross_v, *seen), k_new, v_new


def cross_attention(
    q: torch.Tensor, k: Cache, v: Cache, mask: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    """`ops.attention.cross_attention`."""
    if isinstance(k, torch.Tensor):
        out: torch.Tensor = EW.cross_attention(q, k, v, mask, scale, softcap)
        return out
    quantized: torch.Tensor = EW.quantized_attention(q, *k, *v, mask, scale, softcap)
    return quantized


def shared_attention(
    q: torch.Tensor, k_cache: Cache, v_cache: Cache, positions: torch.Tensor, scale: float, window: int = 0
) -> torch.Tensor:
    """`ops.attention.shared_attention`."""
    if isinstance(k_cache, torch.Tensor):
        out: torch.Tensor = EW.shared_attention(q, k_cache, v_cache, positions, scale, window)
        return out
    quantized: torch.Tensor = EW.quantized_causal_attention(q, *k_cache, *v_cache, positions, scale, 0.0, window)
    return quantized


def _appended(cache: Int8Cache, new: torch.Tensor, past_length: torch.Tensor) -> Int8Cache:
    """The cache with new [B, S, KV, D] behind its first past_length tokens."""
    codes, scales = EW.quantize_kv(new.transpose(1, 2))
    return Int8Cache(EW.append_kv(cache.codes, codes, past_length), EW.append_kv(cache.scales, scales, past_length))


# ---- graphs ---------------------------------------------------------------------------------------------------------


def stored_as(graphs: Sequence[Graph], stored: Stored) -> list[Graph]:
    """A model's graphs with their keys and values stored as `stored`: those of self-attention and of cross-attention.

    The graph that computes keys and values of cross-attention then returns codes and scales. Raises UserError for int8 if the
    graphs have no KV cache.
    """
    if stored == "float32":
        return list(graphs)
    names = {s.name for g in graphs for s in g.states if s.kind in ("kv", "cross")}
    if not names:
        raise UserError("--kv-cache int8: this model keeps no KV cache; export it without")
    return [_int8(graph, names) for graph in graphs]


def _int8(graph: Graph, names: set[str]) -> Graph:
    """The graph with the states and outputs of these names in two, its module in an `Int8Step`."""
    if names.isdisjoint([p.name for p in graph.outputs] + [s.name for s in graph.states]):
        return graph
    states = [half for s in graph.states for half in (_halves(s) if s.name in names else (s,))]
    outputs = [half for p in graph.outputs for half in (_halves(p) if p.name in names else (p,))]
    return replace(graph, module=Int8Step(graph, names), outputs=tuple(outputs), states=tuple(states))


def _halves(port: Any) -> tuple[Any, Any]:
    """The codes and the scales of a `Port` or a `State`."""
    scales = replace(port, name=port.name + SCALE, dtype=torch.float32, shape=(*port.shape[:-1], 1))
    return replace(port, dtype=torch.int8), scales


class Int8Step(nn.Module):
    """A graph's module behind int8 ports: it gets its caches as `Int8Cache`, and the keys and values that it computes for
    other graphs are quantized."""

    def __init__(self, graph: Graph, names: set[str]) -> None:
        super().__init__()
        for name, child in graph.module.named_children():  # the parameters keep their names
            self.add_module(name, child)
        self.inner = (graph.module,)  # in a tuple: a registered module would give them a second name
        self.inputs = len(graph.inputs)
        self.joined = [s.name in names for s in graph.states]
        self.quantized = [p.name in names for p in graph.outputs]

    def forward(self, *values: Any) -> tuple[torch.Tensor, ...]:
        """values: the graph's inputs and, if it has states, their list, as `Graph.call` passes them."""
        inputs, states = values[: self.inputs], values[self.inputs :]
        if states:
            tensors = iter(states[0])
            caches = [Int8Cache(next(tensors), next(tensors)) if joined else next(tensors) for joined in self.joined]
            out = self.inner[0](*inputs, caches)
        else:
            out = self.inner[0](*inputs)
        return tuple(self._split(out))

    def _split(self, out: Sequence[Cache]) -> Iterator[torch.Tensor]:
        count = len(self.quantized)
        for value, quantized in zip(out[:count], self.quantized, strict=True):
            assert isinstance(value, torch.Tensor)
            yield from EW.quantize_kv(value) if quantized else (value,)
        for value in out[count:]:
            yield from value if isinstance(value, Int8Cache) else (value,)
