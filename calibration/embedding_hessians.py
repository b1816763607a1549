"""What the first layers make of an error in an embedding.

The effect of an error D of a row is taken from the first layer of each stack: the sum over its linears of the relative squared
error of their outputs, D J^T J D^T, by a backward pass through that layer alone. With it GPTQ can quantize a table that no
linear multiplies. A table that is embedding and head at once has one set of codes for both uses; the head's inputs alone would
say nothing of the rows that are looked up (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ..models.language_model import LanguageModel
from ..models.layers.block import attention_heads
from ..models.layers.linear import Embedding, Linear
from ..models.registry import stored_name
from .backward import RECURRENCES, GradientRecorder, GradientSession
from .forward import CalibrationForward
from .samples import evenly
from .source import PART_TOKENS, Source

DRAWS = 8
"""Random projections of the outputs for each token: E[(J^T v)(J^T v)^T] = J^T J for v of random signs."""

KEPT = 5
"""Times a linear's inputs and outputs, and attention's scores, that a backward pass keeps (measured, rounded up)."""

_SEED = 3


class _Done(Exception):
    """The first layers have run: nothing after them is needed."""


def embedding_hessians(
    model: LanguageModel, source: Source, names: Collection[str], draws: int = DRAWS
) -> dict[str, tuple[torch.Tensor, int]]:
    """For each of `names` that rows are looked up in: the mean of J^T J, fp32 [K, K] of trace 1, and of how many draws it is.

    model: built on the meta device, without hooks; a copy of it is run. One part of the samples is read. No gradient goes
    through a recurrence. Tables that no sample reaches are left out. The value of one table does not depend on `names`.
    """
    samples = source.samples
    if not samples or not any(name in names for name in _tables(model).values()):
        return {}
    model = copy.deepcopy(model)
    tables = _tables(model)  # all of them, as what depends on one decides the draws of all
    some = source.over(evenly(samples, max(1, source.part_tokens * len(samples) // source.tokens)))
    largest = max(some.parts(), key=lambda places: sum(some.samples[i].size for i in places))
    session = GradientSession(model.graphs(), RECURRENCES)
    forward = CalibrationForward(model, source.over([some.samples[i] for i in largest]), session=session)
    first_layers = [layers[0] for layers in model.stacks().values() if len(layers)]
    products = _GradientProducts(tables, first_layers, forward.rows, draws)
    with suppress(_Done):
        forward.logits(1)
    traces = {name: float(sums.trace()) for name, sums in products.sums.items()}
    found = {n: t for n, t in traces.items() if n in names and 0.0 < t < float("inf")}
    return {n: (products.sums[n] / t, products.counts[n]) for n, t in found.items()}


def embedding_hessian_bytes(model: LanguageModel, longest: int) -> tuple[int, int]:
    """About what `embedding_hessians` takes while it runs, and what it returns. longest: tokens of a sample.

    Counted: a first layer's weights, and what a backward pass through it keeps of a part: inputs and outputs of each linear,
    what lies between them, and attention's scores.
    """
    columns = {name: int(m.weight.shape[1]) for m, name in _tables(model).items()}
    returned = sum(4 * width**2 for width in columns.values())
    most = 0
    for layers in model.stacks().values() if columns else ():
        modules = list(layers[0].modules()) if len(layers) else []
        linears = [tuple(m.weight.shape) for m in modules if isinstance(m, Linear)]
        heads = max((attention_heads(m) for m in modules), default=0)
        kept = sum(4 * KEPT * (n + k) for n, k in linears) + 4 * KEPT * heads * longest
        most = max(most, sum(4 * n * k for n, k in linears) + max(PART_TOKENS, longest) * kept)
    return most, returned


def _tables(model: LanguageModel) -> dict[Embedding, str]:
    """Each embedding with its weight's stored name."""
    return {m: stored_name(model, f"{path}.weight") for path, m in model.named_modules() if isinstance(m, Embedding)}


class _GradientProducts:
    """Differentiates each first layer as soon as it has run. sums, counts: of the gradients' products, by table."""

    def __init__(
        self,
        tables: Mapping[Embedding, str],
        first_layers: Sequence[nn.Module],
        rows: Callable[[torch.Tensor], torch.Tensor],
        draws: int,
    ) -> None:
        self.sums = {name: torch.zeros(m.weight.shape[1], m.weight.shape[1]) for m, name in tables.items()}
        self.counts = dict.fromkeys(self.sums, 0)
        self._tables, self._rows, self._draws = tables, rows, draws
        self._waiting = set(first_layers)
        self._recorder = GradientRecorder()
        self._outputs: dict[nn.Module, list[torch.Tensor]] = {layer: [] for layer in first_layers}
        for table in tables:
            self._recorder.watch_table(table)
        for i, layer in enumerate(first_layers):
            for module in layer.modules():
                if isinstance(module, Linear):
                    module.register_forward_hook(self._collect(self._outputs[layer]))
            layer.register_forward_hook(self._differentiate(torch.Generator().manual_seed(_SEED + i)))

    def _collect(self, outputs: list[torch.Tensor]) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if output.requires_grad:
                outputs.append(self._rows(output))

        return hook

    def _differentiate(self, signs: torch.Generator) -> Callable[..., Any]:
        """A hook that adds the gradients of randomly signed sums of the layer's outputs, each linear's of size one."""

        def hook(layer: nn.Module, args: Any, output: Any) -> Any:
            outputs, lookups = self._outputs[layer], self._recorder.take_lookups()
            leaves = [lookup.rows for lookup in lookups]
            for _ in range(self._draws if outputs else 0):
                total = torch.zeros(())
                for y in outputs:
                    size = y.detach().square().sum(-1).mean().sqrt().clamp(min=1e-20)
                    total = total + (y * (torch.randint(0, 2, y.shape, generator=signs) * 2.0 - 1.0)).sum() / size
                gradients = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
                for lookup, gradient in zip(lookups, gradients, strict=True):
                    if gradient is not None:
                        name, rows = self._tables[lookup.table], self._rows(gradient)
                        self.sums[name].addmm_(rows.T, rows)
                        self.counts[name] += int(rows.any(1).sum())
            self._outputs[layer] = []
            self._waiting.discard(layer)
            if not self._waiting:
                raise _Done
            return tuple(map(_detached, output)) if isinstance(output, tuple) else _detached(output)

        return hook


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value
