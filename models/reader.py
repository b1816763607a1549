"""Models that read a memory: a context becomes rows of embeddings, and the decoder's prompt holds slots for them.

Two graphs: `context` makes a memory of a context, `decoder` is prefill and decode step. A memory can be kept and read again.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..graph import Graph, Port, State
from .causal import DecoderParts, kv_states, run_layers
from .decoder import DecoderSpec
from .kv_cache import Cache
from .language_model import LanguageModel

WINDOWS = 8
"""The most memories that one prompt can hold, each of its own window of the context."""


class MemoryStep(nn.Module):
    """Prefill and decode step of a decoder; some of its positions hold rows of a memory in place of tokens.

    registered: modules of the model that hold all parameters, by the names under which `Graph.checkpoint_name` reads them.
    """

    def __init__(self, registered: Mapping[str, nn.Module], parts: DecoderParts) -> None:
        super().__init__()
        for name, module in registered.items():
            self.add_module(name, module)
        self.parts = parts

    def forward(
        self,
        input_ids: torch.Tensor,
        past_length: torch.Tensor,
        logit_positions: torch.Tensor,
        memory: torch.Tensor,
        slots: torch.Tensor,
        states: list[Cache],
    ) -> tuple[Cache, ...]:
        """memory: [B, M, hidden]; slots: int64 [S], the row of the memory that stands at a position, -1 for the token's own.

        The other arguments and the outputs are those of `CausalStep`.
        """
        parts = self.parts
        rows = memory.index_select(1, slots.clamp(min=0))
        h = torch.where((slots >= 0).unsqueeze(-1), rows, parts.embedded(input_ids, past_length))
        h, updated = run_layers(parts.layers, [2] * len(parts.layers), h, past_length, states)
        return (parts.head(parts.norm(h.index_select(1, logit_positions))), *updated)


def memory_graph(step: MemoryStep, states: Sequence[State], spec: DecoderSpec, rows: int) -> Graph:
    """The graph `decoder` of `step`. Its input memory [batch, at most `rows`, hidden] is kept by the caller."""
    f32, i64, most = torch.float32, torch.int64, spec.positions
    return Graph(
        name="decoder",
        module=step,
        inputs=(
            Port("input_ids", i64, ("batch", "sequence")),
            Port("past_length", i64, (1,)),
            Port("logit_positions", i64, ("logits",)),
            Port("memory", f32, ("batch", "memory", spec.hidden)),
            Port("slots", i64, ("sequence",)),
        ),
        outputs=(Port("logits", f32, ("batch", "logits", spec.vocab)),),
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


class MemoryModel(LanguageModel):
    """A model of the task "memory". main: its decoder."""

    task = "memory"
    main: DecoderSpec

    @property
    @abstractmethod
    def rows(self) -> int:
        """The most rows of one memory."""

    @abstractmethod
    def context_graph(self) -> Graph:
        """The graph `context`, whose output is a memory."""

    @abstractmethod
    def decoder_step(self) -> MemoryStep:
        """The module of the graph `decoder`."""

    def graphs(self) -> list[Graph]:
        states = cache_states(self.main)
        return [self.context_graph(), memory_graph(self.decoder_step(), states, self.main, WINDOWS * self.rows)]


def cache_states(spec: DecoderSpec) -> list[State]:
    """The KV caches of all layers of a decoder."""
    return [s for i, a in enumerate(spec.attention) for s in kv_states(i, a.kv_heads, a.head_dim)]


def token_ids(ids: object, vocab: int) -> tuple[int, ...] | None:
    """`ids` of config.json as token ids; None unless it is a list of at most 1024 ids below `vocab`."""
    if not isinstance(ids, list) or len(ids) > 1024:
        return None
    return tuple(ids) if all(type(i) is int and 0 <= i < vocab for i in ids) else None
