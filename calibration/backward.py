"""A model's graphs run so that a backward pass can follow, and the gradients that it gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..graph import Graph
from ..models.language_model import LanguageModel
from ..models.layers.block import attention_heads
from ..models.layers.linear import Embedding, Linear
from ..ops import DECOMPOSITIONS
from ..runtimes.eager import EagerSession

_BY_OP = {op.overloadpacket: reference for op, reference in DECOMPOSITIONS.items()}

RECURRENCES = frozenset(
    getattr(torch.ops.edgewright, name)
    for name in ("gated_delta_rule", "generalized_delta_rule", "linear_attention", "selective_scan", "diagonal_scan")
)
"""Ops whose references keep a state for every token when they are differentiated: megabytes a token."""

# What a backward pass keeps, measured, in times the size: of a linear's inputs and outputs, of attention's scores, of logits, of
# a scan's state at every token, and of the matrices over tokens and tokens of a recurrence whose states are matrices.
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
    """Runs `edgewright::` ops as their references, which PyTorch can differentiate. Ops of `cut` run as they are."""

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
    """The eager runtime that keeps what a backward pass needs. Inputs and outputs are tensors, or arrays as elsewhere.

    cut: ops through which no gradient goes.
    """

    def __init__(self, graphs: Sequence[Graph], cut: Collection[Any] = ()) -> None:
        super().__init__(graphs)
        self._cut = cut

    def run(self, graph: str, inputs: Any, state: Any) -> dict[str, Any]:
        g = self._graphs[graph]
        values = [torch.as_tensor(inputs[p.name]) for p in g.inputs] + [state[s.name] for s in g.states]
        with torch.enable_grad(), References(self._cut):
            outputs = dict(zip(g.output_names, g.call(values), strict=True))
        for name in [n for n in outputs if n.removesuffix("_out") in self._states]:
            state[name.removesuffix("_out")] = outputs.pop(name)
        return outputs


@dataclass(frozen=True, eq=False)
class Lookup:
    """One call of an embedding. ids: int64 [...]. rows: the rows of `table` at them, [..., K], of which gradients are taken."""

    table: Embedding
    ids: torch.Tensor
    rows: torch.Tensor


class GradientRecorder:
    """Takes the gradients of weights: of a parameter as soon as the backward pass has it, of a table by its lookups."""

    def __init__(self) -> None:
        self._lookups: list[Lookup] = []

    def watch_parameter(self, parameter: nn.Parameter, take: Callable[[torch.Tensor], None]) -> None:
        """Give the gradient of `parameter` to `take` in each backward pass, then free it. `parameter` must require it."""

        def hook(weight: torch.Tensor) -> None:
            if weight.grad is not None:
                take(weight.grad)
                weight.grad = None

        parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def watch_table(self, table: Embedding) -> None:
        """Record what `table` looks up. Its rows become leaves: gradients end there, and the table itself gets none."""

        def hook(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            leaf = output.detach().requires_grad_()
            self._lookups.append(Lookup(table, args[0], leaf))
            return leaf

        table.register_forward_hook(hook)

    def take_lookups(self) -> list[Lookup]:
        """The lookups since the last call, in order; the recorder forgets them."""
        lookups, self._lookups = self._lookups, []
        return lookups
