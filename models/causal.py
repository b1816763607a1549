"""The one graph of a decoder-only model, shared by the architectures that have it. What may enter: `graph`, torch.

An architecture brings `embed`, its `layers` (each called with `(h, past_length, k_cache, v_cache)`), `norm` and `head`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..graph import Graph, Port, State


class CausalStep(nn.Module):
    """Prefill and decode step of a decoder-only model."""

    def __init__(
        self,
        model: nn.Module,
        embed: Callable[[torch.Tensor], torch.Tensor],
        layers: nn.ModuleList,
        norm: nn.Module,
        head: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__()
        self.whole = model  # registers the parameters under the checkpoint's names
        self.parts = (embed, list(layers), norm, head)  # in a tuple: registered again, they would have two names

    def forward(
        self,
        input_ids: torch.Tensor,
        past_length: torch.Tensor,
        logit_positions: torch.Tensor,
        states: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        embed, layers, norm, head = self.parts
        h = embed(input_ids)
        updated: list[torch.Tensor] = []
        for i, layer in enumerate(layers):
            h, k, v = layer(h, past_length, states[2 * i], states[2 * i + 1])
            updated += [k, v]
        return (head(norm(h.index_select(1, logit_positions))), *updated)


def causal_graph(step: CausalStep, kv_shapes: Sequence[tuple[int, int]], vocab: int, max_positions: int) -> list[Graph]:
    """The graph `decoder` with one (kv_heads, head_dim) per layer."""
    f32, i64 = torch.float32, torch.int64
    states = tuple(
        State(f"{n}_cache_{i}", "kv", f32, ("batch", heads, "capacity", dim), updated=True)
        for i, (heads, dim) in enumerate(kv_shapes)
        for n in ("k", "v")
    )
    return [
        Graph(
            name="decoder",
            module=step,
            inputs=(
                Port("input_ids", i64, ("batch", "sequence")),
                Port("past_length", i64, (1,)),
                Port("logit_positions", i64, ("logits",)),
            ),
            outputs=(Port("logits", f32, ("batch", "logits", vocab)),),
            states=states,
            example={"batch": 2, "sequence": 3, "capacity": 7, "logits": 2},
            bounds={
                "batch": (1, 1024),
                "sequence": (1, max_positions),
                "capacity": (1, max_positions),
                "logits": (1, max_positions),
            },
        )
    ]
