"""A model's graphs run so that a backward pass can follow. Top-level: ops and the eager runtime enter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .ops import DECOMPOSITIONS
from .runtimes.eager import EagerSession

_BY_OP = {op.overloadpacket: reference for op, reference in DECOMPOSITIONS.items()}


class References(TorchFunctionMode):
    """`edgewright::` ops run as their references, plain operations that PyTorch can differentiate."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _BY_OP.get(func, func)(*args, **(kwargs or {}))


class GradientSession(EagerSession):
    """The eager runtime that keeps what a backward pass needs; inputs and outputs are tensors, or arrays as elsewhere."""

    def run(self, graph: str, inputs: Any, state: Any) -> dict[str, Any]:
        g = self._graphs[graph]
        given = [torch.as_tensor(inputs[p.name]) for p in g.inputs] + [state[s.name] for s in g.states]
        with torch.enable_grad(), References():
            outputs = dict(zip(g.output_names, g.call(given), strict=True))
        for name in [n for n in outputs if n.removesuffix("_out") in self._states]:
            state[name.removesuffix("_out")] = outputs.pop(name)
        return outputs
