"""What the first layers make of an error in an embedding. Top-level: forward, gradients, `models` enter.

What an error D of a row that is looked up does is taken from the first layer of each stack: the sum over its linears of the
relative squared error of their outputs, D J^T J D^T, by a backward pass through that layer alone. With it GPTQ can quantize a
table that nothing multiplies. A table that is embedding and head at once has one set of codes for both, and on the head's
inputs alone GPTQ spends the lookups' precision: of what Gemma 3 270M loses with it at 2 bits three quarters come in there. The
first layer says as much as the Fisher information of embeddings, which takes a backward pass through the whole model
(benchmarks/RESULTS.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ..bundle import Generation
from ..checkpoints.checkpoint import Checkpoint
from ..models.language_model import LanguageModel
from ..models.layers.block import attention_heads
from ..models.layers.linear import Embedding, Linear
from ..models.registry import stored_name
from .backward import RECURRENCES, GradientSession
from .forward import PART_TOKENS, CalibrationForward, parted
from .samples import Sample, evenly

DRAWS = 8
"""Random projections of the outputs for each token: E[(J^T v)(J^T v)^T] = J^T J for v of random signs."""

KEPT = 5
"""Times the ends of a linear, and attention's scores, that a backward pass keeps: measured 3.7 to 4.5 (Llama's layer)."""

_SEED = 3


class _Done(Exception):
    """The first layers have run: nothing after them is wanted."""


def embedding_hessians(
    model: LanguageModel, checkpoint: Checkpoint, spec: Generation, samples: Sequence[Sample], names: Collection[str]
) -> dict[str, tuple[torch.Tensor, int]]:
    """For each of `names` that rows are looked up in: the mean of J^T J, fp32 [K, K] of trace 1, and of how many draws it is.

    model: built on the meta device and not hooked yet; a copy of it is run. One part of the samples is read. No gradient goes
    through a recurrence. Tables that no sample reaches are left out. What comes out for one table does not depend on `names`.
    """
    if not samples or not any(name in names for name in _tables(model).values()):
        return {}
    model = copy.deepcopy(model)
    tables = {m: name for m, name in _tables(model).items() if name in names}
    some = evenly(samples, max(1, PART_TOKENS * len(samples) // sum(s.size for s in samples)))
    part = max(parted(some), key=lambda places: sum(some[i].size for i in places))
    session = GradientSession(model.graphs(), RECURRENCES)
    forward = CalibrationForward(model, checkpoint, spec, [some[i] for i in part], session=session)
    watch = _Watch(tables, [layers[0] for layers in model.stacks().values() if len(layers)], forward.rows)
    with suppress(_Done):
        forward.logits(1)
    traces = {name: float(sums.trace()) for name, sums in watch.sums.items()}
    return {n: (watch.sums[n] / t, watch.counts[n]) for n, t in traces.items() if 0.0 < t < float("inf")}


def embedding_hessian_bytes(model: LanguageModel, longest: int) -> tuple[int, int]:
    """About what `embedding_hessians` takes while it runs, and what it gives. longest: tokens of a sample.

    Counted: a first layer's weights, and what a backward pass through it keeps of a part: both ends of each linear and what
    lies between them, and attention's scores.
    """
    shapes = {name: int(m.weight.shape[1]) for m, name in _tables(model).items()}
    given = sum(4 * width**2 for width in shapes.values())
    most = 0
    for layers in model.stacks().values() if shapes else ():
        inside = list(layers[0].modules()) if len(layers) else []
        linears = [tuple(m.weight.shape) for m in inside if isinstance(m, Linear)]
        heads = max((attention_heads(m) for m in inside), default=0)
        kept = sum(4 * KEPT * (n + k) for n, k in linears) + 4 * KEPT * heads * longest
        most = max(most, sum(4 * n * k for n, k in linears) + max(PART_TOKENS, longest) * kept)
    return most, given


def _tables(model: LanguageModel) -> dict[Embedding, str]:
    """Each embedding with its weight's stored name."""
    return {m: stored_name(model, f"{path}.weight") for path, m in model.named_modules() if isinstance(m, Embedding)}


class _Watch:
    """Hooks that differentiate each first layer as soon as it has run. sums, counts: of the gradients' products, by table."""

    def __init__(
        self,
        tables: dict[Embedding, str],
        firsts: Sequence[nn.Module],
        rows: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self.sums = {name: torch.zeros(m.weight.shape[1], m.weight.shape[1]) for m, name in tables.items()}
        self.counts = dict.fromkeys(self.sums, 0)
        self._rows, self._left = rows, set(firsts)
        self._looked_up: list[tuple[str, torch.Tensor]] = []
        self._outputs: dict[nn.Module, list[torch.Tensor]] = {layer: [] for layer in firsts}
        for table, name in tables.items():
            table.register_forward_hook(self._embedding_hook(name))
        for i, layer in enumerate(firsts):
            for module in layer.modules():
                if isinstance(module, Linear):
                    module.register_forward_hook(self._seen(self._outputs[layer]))
            layer.register_forward_hook(self._differentiate(torch.Generator().manual_seed(_SEED + i)))

    def _embedding_hook(self, name: str) -> Callable[..., torch.Tensor]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            leaf = output.detach().requires_grad_()
            self._looked_up.append((name, leaf))
            return leaf

        return hook

    def _seen(self, outputs: list[torch.Tensor]) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if output.requires_grad:
                outputs.append(self._rows(output))

        return hook

    def _differentiate(self, signs: torch.Generator) -> Callable[..., Any]:
        """A hook that adds the gradients of randomly signed sums of the layer's outputs, each linear's of size one."""

        def hook(layer: nn.Module, args: Any, output: Any) -> Any:
            outputs, leaves = self._outputs[layer], [leaf for _, leaf in self._looked_up]
            for _ in range(DRAWS if outputs else 0):
                total = torch.zeros(())
                for y in outputs:
                    size = y.detach().square().sum(-1).mean().sqrt().clamp(min=1e-20)
                    total = total + (y * (torch.randint(0, 2, y.shape, generator=signs) * 2.0 - 1.0)).sum() / size
                found = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
                for (name, _), gradient in zip(self._looked_up, found, strict=True):
                    if gradient is not None:
                        rows = self._rows(gradient)
                        self.sums[name].addmm_(rows.T, rows)
                        self.counts[name] += int(rows.any(1).sum())
            self._looked_up, self._outputs[layer] = [], []
            self._left.discard(layer)
            if not self._left:
                raise _Done
            return tuple(map(_detached, output)) if isinstance(output, tuple) else _detached(output)

        return hook


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value
