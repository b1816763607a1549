"""The one graph of a decoder-only model, and of one that reads a memory, shared by the architectures that have it.

What may enter: `graph`, `ops.recurrence`, torch.

An architecture brings `embed`, its `layers`, `norm` and `head`. A layer is called with `(h, past_length, *states)` and gives
`(h, *updated states)`; what its states are the architecture says in `causal_graph`, a list of states for each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..graph import Graph, Port, State
from ..ops.recurrence import CHUNK
from .kv_cache import Cache

Layers = Sequence[Sequence[State]]


def kv_states(layer: int, kv_heads: int, head_dim: int) -> list[State]:
    """The KV cache of an attention layer."""
    shape = ("batch", kv_heads, "capacity", head_dim)
    return [State(f"{n}_cache_{layer}", "kv", torch.float32, shape, updated=True) for n in ("k", "v")]


def window_states(layer: int, kv_heads: int, head_dim: int, window: int) -> list[State]:
    """The last `window - 1` keys and values of an attention layer within a window (`layers.window_attention`)."""
    shape = ("batch", kv_heads, window - 1, head_dim)
    return [State(f"{n}_window_{layer}", "window", torch.float32, shape, updated=True) for n in ("k", "v")]


def conv_state(layer: int, channels: int, taps: int) -> State:
    """The last `taps - 1` inputs of a causal convolution."""
    return State(f"conv_{layer}", "conv", torch.float32, ("batch", channels, taps - 1), updated=True)


def recurrent_state(layer: int, *shape: int) -> State:
    """What a recurrence carries, [batch, *shape]."""
    return State(f"recurrent_{layer}", "recurrent", torch.float32, ("batch", *shape), updated=True)


def chunk(states: Sequence[State], max_positions: int) -> int:
    """The most tokens of one call: recurrences bound them (`ops.recurrence`)."""
    return min(CHUNK, max_positions) if any(s.kind == "recurrent" for s in states) else max_positions


class CausalStep(nn.Module):
    """Prefill and decode step of a decoder-only model. `counts`: how many states each layer has."""

    def __init__(
        self,
        model: nn.Module,
        embed: Callable[[torch.Tensor], torch.Tensor],
        layers: nn.ModuleList,
        norm: nn.Module,
        head: Callable[[torch.Tensor], torch.Tensor],
        counts: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.whole = model  # registers the parameters under the checkpoint's names
        self.parts = (embed, list(layers), norm, head)  # in a tuple: registered again, they would have two names
        self.counts = tuple(counts or [2] * len(layers))

    def forward(
        self,
        input_ids: torch.Tensor,
        past_length: torch.Tensor,
        logit_positions: torch.Tensor,
        states: list[Cache],
    ) -> tuple[Cache, ...]:
        embed, layers, norm, head = self.parts
        h = embed(input_ids)
        updated: list[Cache] = []
        for layer, count in zip(layers, self.counts, strict=True):
            h, *new = layer(h, past_length, *states[len(updated) : len(updated) + count])
            updated += new
        return (head(norm(h.index_select(1, logit_positions))), *updated)


def causal_graph(step: nn.Module, states: Layers, vocab: int, max_positions: int, name: str = "decoder") -> list[Graph]:
    """The graph `decoder` of `step`, which takes `(input_ids, past_length, logit_positions, states)`."""
    f32, i64 = torch.float32, torch.int64
    flat = tuple(state for layer in states for state in layer)
    longest = chunk(flat, max_positions)
    growing = any("capacity" in s.shape for s in flat)
    return [
        Graph(
            name=name,
            module=step,
            inputs=(
                Port("input_ids", i64, ("batch", "sequence")),
                Port("past_length", i64, (1,)),
                Port("logit_positions", i64, ("logits",)),
            ),
            outputs=(Port("logits", f32, ("batch", "logits", vocab)),),
            states=flat,
            example={"batch": 2, "sequence": 3, "logits": 2} | ({"capacity": 7} if growing else {}),
            bounds={"batch": (1, 1024), "sequence": (1, longest), "logits": (1, longest)}
            | ({"capacity": (1, max_positions)} if growing else {}),
        )
    ]
