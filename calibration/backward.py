"""A model's graphs run so that a backward pass can follow. Top-level: graph, ops, layers and the eager runtime enter."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..graph import Graph
from ..models.language_model import LanguageModel
from ..models.layers.block import attention_heads
from ..models.layers.linear import Linear
from ..ops import DECOMPOSITIONS
from ..runtimes.eager import EagerSession

_BY_OP = {op.overloadpacket: reference for op, reference in DECOMPOSITIONS.items()}

RECURRENCES = frozenset(
    getattr(torch.ops.edgewright, name) for name in ("gated_delta_rule", "linear_attention", "selective_scan")
)
"""Ops whose references keep a state for every token when they are differentiated: megabytes a token."""

# What a backward pass keeps, measured: of a linear's ends, of attention's scores, of logits, of a scan's state at every token;
# and of the matrices over tokens and tokens that a recurrence with matrices for states is computed by; in times their size.
_KEPT, _SCORES, _LOGITS, _SCANNED, _FADES = 2, 2, 4, 64, 64
_WIDE = 16  # outputs an input, above which a linear is a head


def backward_bytes(model: LanguageModel, tokens: int, longest: int, positions: int) -> int:
    """About what a backward pass through `model` keeps of `tokens` tokens in sequences of `longest`, logits at `positions`."""
    widths, heads = 0, 0
    for module in model.modules():
        if isinstance(module, Linear):
            rows, columns = module.weight.shape
            widths += columns + (0 if rows > _WIDE * columns else rows)  # a head's outputs are the logits
        heads += attention_heads(module)
    vocab = max((int(p.shape[-1]) for g in model.graphs() for p in g.outputs if p.name == "logits"), default=0)
    states = [tuple(int(n) for n in s.shape[1:]) for g in model.graphs() for s in g.states if s.kind == "recurrent"]
    recurrent = sum(_SCANNED * math.prod(s) if len(s) < 3 else math.prod(s) + _FADES * s[0] * longest for s in states)
    each = _KEPT * widths + _SCORES * heads * longest + recurrent
    return int(4 * (tokens * each + _LOGITS * positions * vocab))


class References(TorchFunctionMode):
    """`edgewright::` ops run as their references, plain operations that PyTorch can differentiate; those of `cut` as they are."""

    def __init__(self, cut: Collection[Any] = ()) -> None:
        super().__init__()
        self._cut = cut

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in self._cut:
            with torch.no_grad():
                return func(*args, **(kwargs or {}))
        return _BY_OP.get(func, func)(*args, **(kwargs or {}))


class GradientSession(EagerSession):
    """The eager runtime that keeps what a backward pass needs; inputs and outputs are tensors, or arrays as elsewhere.

    cut: ops through which no gradient goes.
    """

    def __init__(self, graphs: Sequence[Graph], cut: Collection[Any] = ()) -> None:
        super().__init__(graphs)
        self._cut = cut

    def run(self, graph: str, inputs: Any, state: Any) -> dict[str, Any]:
        g = self._graphs[graph]
        given = [torch.as_tensor(inputs[p.name]) for p in g.inputs] + [state[s.name] for s in g.states]
        with torch.enable_grad(), References(self._cut):
            outputs = dict(zip(g.output_names, g.call(given), strict=True))
        for name in [n for n in outputs if n.removesuffix("_out") in self._states]:
            state[name.removesuffix("_out")] = outputs.pop(name)
        return outputs
