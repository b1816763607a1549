"""A context's decoder that writes a memory, chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..graph import Graph, Port, State
from .kv_cache import Cache


class MemoryStep(nn.Module):
    """Prefill and decode step of a decoder some of whose positions hold rows of a memory in place of tokens.

    model: has `embed_tokens`, `layers` and `norm`; both are registered under the checkpoint's names.
    """

    def __init__(self, model: nn.Module, lm_head: nn.Module) -> None:
        super().__init__()
        self.model, self.lm_head = model, lm_head

    def forward(
        self,
        input_ids: torch.Tensor,
        past_length: torch.Tensor,
        logit_positions: torch.Tensor,
        memory: torch.Tensor,
        slots: torch.Tensor,
        states: list[Cache],
    ) -> tuple[Cache, ...]:
        """memory: [B, M, hidden]; slots: int64 [S], the row of memory that stands at a position, -1 for the token's own."""
        inner: Any = self.model
        rows = memory.index_select(1, slots.clamp(min=0))
        h = torch.where((slots >= 0).unsqueeze(-1), rows, inner.embed_tokens(input_ids))
        updated: list[Cache] = []
        for i, layer in enumerate(inner.layers):
            h, k, v = layer(h, past_length, *states[2 * i : 2 * i + 2])
            updated += [k, v]
        return (self.lm_head(inner.norm(h.index_select(1, logit_positions))), *updated)


def memory_graph(
    step: MemoryStep, states: Sequence[State], hidden: int, vocab: int, max_positions: int, rows: int
) -> Graph:
    """The graph `decoder` of `step`; memory [batch, at most `rows`, hidden] is an input, kept by whoever runs it."""
    f32, i64, most = torch.float32, torch.int64, max_positions
    return Graph(
        name="decoder",
        module=step,
        inputs=(
            Port("input_ids", i64, ("batch", "sequence")),
            Port("past_length", i64, (1,)),
            Port("logit_positions", i64, ("logits",)),
            Port("memory", f32, ("batch", "memory", hidden)),
            Port("slots", i64, ("sequence",)),
        ),
        outputs=(Port("logits", f32, ("batch", "logits", vocab)),),
        states=tuple(states),
        example={"batch": 2, "sequence": 3, "capacity": 7, "logits": 2, "memory": 4},
        bounds={
            "batch": (1, 1024),
            "sequence": (1, most),
            "capacity": (1, most),
            "logits": (1, most),
            "memory": (1, min(most, rows)),
        },
    )
