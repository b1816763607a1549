"""The reference: the graphs' modules run by PyTorch, in float32.

`Int8Session` is the reference with int8 activations, which some runtimes force on linears: it shows what they cost by
themselves.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch

from ..graph import Graph
from ..models.layers.linear import Linear
from .session import Array, StateBuffers, keep_states, require_room, sized


class EagerSession:
    """The graphs of a model whose weights are loaded (see `models.loading`)."""

    def __init__(self, graphs: Sequence[Graph]) -> None:
        self._graphs = {g.name: g for g in graphs}
        self._states = {s.name: s for g in graphs for s in g.states}

    def new_state(self, batch: int, capacity: int, graph: str = "decoder") -> StateBuffers:
        sizes = {"batch": batch, "capacity": capacity}
        updated = [s for s in self._graphs[graph].states if s.updated]
        require_room(sum(s.dtype.itemsize * math.prod(sized(s.shape, sizes)) for s in updated), capacity)
        return {s.name: torch.zeros(sized(s.shape, sizes), dtype=s.dtype) for s in updated}

    def run(self, graph: str, inputs: Mapping[str, Array], state: StateBuffers) -> dict[str, Array]:
        g = self._graphs[graph]
        values = [torch.from_numpy(inputs[p.name]) for p in g.inputs] + [state[s.name] for s in g.states]
        with torch.no_grad():
            outputs = dict(zip(g.output_names, g.call(values), strict=True))
        keep_states(outputs, [s.name for s in g.states if s.updated], self._states, state)
        return {name: value.numpy() for name, value in outputs.items()}


class Int8Session(EagerSession):
    """The reference with the inputs of quantized linears rounded to int8, with a scale and a zero point per row, as in XNNPACK.

    linears: names of those weights in the checkpoint, such as "model.layers.0.mlp.up_proj.weight".
    """

    def __init__(self, graphs: Sequence[Graph], linears: Collection[str]) -> None:
        super().__init__(graphs)
        named = [(g.checkpoint_name(f"{path}.weight"), m) for g in graphs for path, m in g.module.named_modules()]
        self._linears = list(dict.fromkeys(m for name, m in named if name in linears and isinstance(m, Linear)))

    def run(self, graph: str, inputs: Mapping[str, Array], state: StateBuffers) -> dict[str, Array]:
        hooks = [m.register_forward_pre_hook(_through_int8) for m in self._linears]
        try:
            return super().run(graph, inputs, state)
        finally:  # the reference runs the same modules without hooks
            for hook in hooks:
                hook.remove()


def _through_int8(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """x [..., K] rounded to 256 steps between the least and the largest value of its row; zero is one of the steps."""
    x = args[0]
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).eps)
    zero = (-128 - low / scale).round().clamp(-128, 127)
    return ((((x / scale).round() + zero).clamp(-128, 127) - zero) * scale, *args[1:])
