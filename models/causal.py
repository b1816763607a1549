"""Decoder-only models: their one graph, `decoder`, which is prefill and decode step, and the states it carries.

A family's `Model` derives from `CausalModel` and gives its parts and its states. A layer is called with
`(h, past_length, *states)` and returns `(h, *updated states)`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..graph import Graph, Port, State
from ..ops.recurrence import CHUNK
from .kv_cache import Cache
from .language_model import LanguageModel

Layers = Sequence[Sequence[State]]
"""The states of each layer."""


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


@dataclass(frozen=True)
class DecoderParts:
    """The parts of a decoder, whatever the checkpoint calls them.

    Attributes:
        embed: ids int64 [B, S] -> hidden states [B, S, hidden].
        layers: the layers, in order.
        norm: the norm behind the last layer.
        head: hidden states [B, L, hidden] -> logits [B, L, vocab].
        positions: positions int64 [S] -> rows [S, hidden] that are added to the embeddings; None for none.
        embedding_norm: of the embeddings with their positions; None for none.
        shared: what every layer of an encoder-decoder takes beside its states, computed once in a call.
    """

    embed: Callable[[torch.Tensor], torch.Tensor]
    layers: nn.ModuleList
    norm: Callable[[torch.Tensor], torch.Tensor]
    head: Callable[[torch.Tensor], torch.Tensor]
    positions: Callable[[torch.Tensor], torch.Tensor] | None = None
    embedding_norm: Callable[[torch.Tensor], torch.Tensor] | None = None
    shared: Callable[[], tuple[torch.Tensor, ...]] = tuple

    def embedded(self, input_ids: torch.Tensor, past_length: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, S, hidden] of ids [B, S] behind past_length tokens."""
        h = self.embed(input_ids)
        if self.positions is not None:
            h = h + self.positions(past_length + torch.arange(input_ids.shape[1], device=input_ids.device))
        return h if self.embedding_norm is None else self.embedding_norm(h)


def run_layers(
    layers: Iterable[nn.Module],
    counts: Sequence[int],
    h: torch.Tensor,
    past_length: torch.Tensor,
    states: Sequence[Cache],
) -> tuple[torch.Tensor, list[Cache]]:
    """h [B, S, hidden] behind all layers, and the updated states. counts: how many of `states` each layer has."""
    updated: list[Cache] = []
    for layer, count in zip(layers, counts, strict=True):
        h, *new = layer(h, past_length, *states[len(updated) : len(updated) + count])
        updated += new
    return h, updated


class CausalStep(nn.Module):
    """Prefill and decode step of a decoder-only model.

    registered: modules of the model that hold all parameters, by the names under which `Graph.checkpoint_name` reads them.
    counts: how many states each layer has.
    """

    def __init__(self, registered: Mapping[str, nn.Module], parts: DecoderParts, counts: Sequence[int]) -> None:
        super().__init__()
        for name, module in registered.items():
            self.add_module(name, module)
        self.parts = parts  # no module itself, so its parameters get no second name
        self.counts = tuple(counts)

    def forward(
        self,
        input_ids: torch.Tensor,
        past_length: torch.Tensor,
        logit_positions: torch.Tensor,
        states: list[Cache],
    ) -> tuple[Cache, ...]:
        """input_ids: int64 [B, S]; past_length: int64 [1]; logit_positions: int64 [L]. Returns logits [B, L, vocab] and the
        updated states."""
        h, updated = self.hidden(self.parts.embedded(input_ids, past_length), past_length, logit_positions, states)
        return (self.parts.head(self.parts.norm(h)), *updated)

    def hidden(
        self, h: torch.Tensor, past_length: torch.Tensor, logit_positions: torch.Tensor, states: list[Cache]
    ) -> tuple[torch.Tensor, list[Cache]]:
        """Behind the last layer, [B, L, hidden] at the logit positions, and the updated states. h: [B, S, hidden]."""
        h, updated = run_layers(self.parts.layers, self.counts, h, past_length, states)
        return h.index_select(1, logit_positions), updated


def causal_graph(step: nn.Module, states: Layers, vocab: int, max_positions: int) -> Graph:
    """The graph `decoder` of `step`, which takes `(input_ids, past_length, logit_positions, states)`."""
    f32, i64 = torch.float32, torch.int64
    flat = tuple(state for layer in states for state in layer)
    # A recurrence bounds the tokens of one call.
    longest = min(CHUNK, max_positions) if any(s.kind == "recurrent" for s in flat) else max_positions
    growing = any("capacity" in s.shape for s in flat)
    return Graph(
        name="decoder",
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


class CausalModel(LanguageModel):
    """A decoder-only model. vocab: rows of its logits."""

    task = "causal"
    vocab: int

    @abstractmethod
    def parts(self) -> DecoderParts:
        """The decoder's parts."""

    @abstractmethod
    def states(self) -> list[list[State]]:
        """The states of each layer."""

    def step(self) -> CausalStep:
        """The module of the graph."""
        return CausalStep({"whole": self}, self.parts(), [len(states) for states in self.states()])

    def stacks(self) -> dict[str, nn.ModuleList]:
        return {"decoder": self.parts().layers}

    def graphs(self) -> list[Graph]:
        return [causal_graph(self.step(), self.states(), self.vocab, self.max_context)]
