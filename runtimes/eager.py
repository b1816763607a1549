"""The reference: the graphs' modules run by PyTorch, in float32. What may enter: `models`, `graph`, torch.

`Int8Session` is the reference with the activations some runtimes force on a linear: what that arithmetic costs by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from ..graph import Graph
from ..models.layers.linear import Linear
from .session import Array, StateBuffers, sized


class EagerSession:
    """Graphs of a model whose weights are loaded (see `models.loading`), run as they stand."""

    def __init__(self, graphs: Sequence[Graph]) -> None:
        self._graphs = {g.name: g for g in graphs}
        self._states = {s.name: s for g in graphs for s in g.states}

    def new_state(self, batch: int, capacity: int, graph: str = "decoder") -> StateBuffers:
        sizes = {"batch": batch, "capacity": capacity}
        states = self._graphs[graph].states
        return {s.name: torch.zeros(sized(s.shape, sizes), dtype=s.dtype) for s in states if s.updated}

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


class Int8Session(EagerSession):
    """The reference whose quantized linears see their input in int8, a scale and a zero point a row, as XNNPACK makes them.

    linears: the checkpoint's names of those weights, such as "model.layers.0.mlp.up_proj.weight".
    """

    def __init__(self, graphs: Sequence[Graph], linears: Collection[str]) -> None:
        super().__init__(graphs)
        named = [(g.checkpoint_name(f"{path}.weight"), m) for g in graphs for path, m in g.module.named_modules()]
        self._linears = list(dict.fromkeys(m for name, m in named if name in linears and isinstance(m, Linear)))

    def run(self, graph: str, inputs: Mapping[str, Array], state: StateBuffers) -> dict[str, Array]:
        hooks = [m.register_forward_pre_hook(_through_int8) for m in self._linears]
        try:
            return super().run(graph, inputs, state)
        finally:  # the modules are the reference's own
            for hook in hooks:
                hook.remove()


def _through_int8(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """x [..., K] rounded to 256 steps between the least and the largest of its row, zero among them."""
    x = args[0]
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).eps)
    zero = (-128 - low / scale).round().clamp(-128, 127)
    return ((((x / scale).round() + zero).clamp(-128, 127) - zero) * scale, *args[1:])
