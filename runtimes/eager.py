"""The reference: the graphs' modules run by PyTorch, in float32. What may enter: `models`, `graph`, torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..graph import Graph
from .session import Array, StateBuffers, sized


class EagerSession:
    """Graphs of a model whose weights are loaded (see `models.loading`), run as they stand."""

    def __init__(self, graphs: Sequence[Graph]) -> None:
        self._graphs = {g.name: g for g in graphs}
        self._states = {s.name: s for g in graphs for s in g.states}

    def new_state(self, batch: int, capacity: int) -> StateBuffers:
        sizes = {"batch": batch, "capacity": capacity}
        return {s.name: torch.zeros(sized(s.shape, sizes), dtype=s.dtype) for s in self._states.values() if s.updated}

    def run(self, graph: str, inputs: Mapping[str, Array], state: StateBuffers) -> dict[str, Array]:
        g = self._graphs[graph]
        values = [torch.from_numpy(inputs[p.name]) for p in g.inputs] + [state[s.name] for s in g.states]
        with torch.no_grad():
            outputs = dict(zip(g.output_names, g.call(values), strict=True))
        for s in g.states:
            if s.updated:
                state[s.name] = outputs.pop(f"{s.name}_out")
        for name in [n for n in outputs if n in self._states]:
            state[name] = outputs.pop(name)
        return {name: value.numpy() for name, value in outputs.items()}
