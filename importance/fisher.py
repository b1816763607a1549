"""The Fisher information of a model's weights by one backward pass over data, and the losses predicted from it.

For each window of the data the model's log-likelihood of tokens drawn from its own distribution is differentiated. The mean
square of that gradient is the Fisher information, whatever the true next tokens are. One window is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..calibration.backward import GradientRecorder, GradientSession, Lookup, backward_bytes
from ..calibration.embedding_hessians import embedding_hessians
from ..calibration.forward import CalibrationForward
from ..calibration.hessians import InputHessians
from ..calibration.samples import Sample, evenly
from ..calibration.source import Source
from ..errors import UserError
from ..models.language_model import LanguageModel
from ..models.layers.linear import Embedding, Linear
from ..models.loading import load_original
from ..models.registry import stored_name
from ..quant.hessian import Factor
from ..quant.plan import Choice
from .candidates import Candidates, Losses, fill_unreached, unit_losses
from .divergence import Measure, measure_of
from .fisher_losses import Curvature, Gradients, WeightLosses

POSITIONS = 256
"""Of a window, the most positions whose tokens are drawn: the logits of a large vocabulary are what takes memory."""

WINDOWS = 32
"""Windows of the backward pass at most; each gives one gradient of every weight."""

HESSIAN_WINDOWS = 16
"""Windows that the Hessians for GPTQ's predicted losses are of; GPTQ itself reads all."""

REFERENCE = Choice(4, 64)
"""The choice at which units are compared in tables: any weight can have it."""

_SEED = 5
Progress = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Fisher:
    """What the backward pass gives. weights: stored name -> the curvature of each of its uses. tokens: how many were drawn.

    samples: those that were differentiated.
    """

    weights: dict[str, list[Curvature]]
    tokens: int
    samples: Sequence[Sample] = ()


@dataclass(frozen=True)
class PredictedLosses:
    """units: of each unit at each choice. linears: stored name -> the loss of that weight alone at `REFERENCE`."""

    units: Losses
    linears: dict[str, float]


def fisher(source: Source, windows: int = WINDOWS, progress: Progress = lambda _: None) -> Fisher:
    """The curvature of every linear and embedding, of at most `windows` samples.

    Raises UserError for a model without logits, or one whose logits are not finite on the data.
    """
    model = source.build()
    load_original(model, source.checkpoint)
    gradients = _UseGradients(model)
    chosen = evenly(source.samples, windows)
    generator = torch.Generator().manual_seed(_SEED)
    tokens = 0
    for i, sample in enumerate(chosen):
        if i % 8 == 0:
            progress(f"fisher: window {i + 1} of {len(chosen)}")
        session = GradientSession(model.graphs())
        forward = CalibrationForward(model, source.over([sample]), session=session)
        tokens += _differentiate(forward, measure_of(source.generation.task), generator)
        gradients.finish_window()
    return Fisher(gradients.curvatures(tokens), tokens, chosen)


def _differentiate(forward: CalibrationForward, measure: Measure, generator: torch.Generator) -> int:
    """The gradient of one window's log-likelihood of drawn tokens, to the recorder; the number of those tokens.

    Of a model of embeddings one vector is drawn."""
    every, real = forward.logits(POSITIONS)
    logits = torch.as_tensor(every)[torch.as_tensor(real)]
    if not bool(torch.isfinite(logits).all()):
        raise UserError("the model's logits are not finite on the calibration data; use --importance zd")
    measure.drawn(measure.predictions(logits), generator).backward()  # type: ignore[no-untyped-call]
    return len(logits)


def fisher_bytes(model: LanguageModel, longest: int) -> int:
    """About the memory that `fisher` takes: weights, a matrix over the inputs of each, and one window's activations.

    longest: tokens of the longest sample.
    """
    weights, curvatures, largest = 0, 0, 0
    for module in model.modules():
        own = sum(p.numel() for p in module.parameters(recurse=False))
        weights, largest = weights + own, max(largest, own)
        if isinstance(module, Linear | Embedding):
            rows, columns = module.weight.shape
            curvatures += rows + columns * columns
    return int(4 * (weights + curvatures + largest)) + backward_bytes(model, longest, longest, POSITIONS)


class _UseGradients:
    """Sums up the gradients of every use of a weight, each as soon as the backward pass has it."""

    def __init__(self, model: LanguageModel) -> None:
        self._uses: list[tuple[str, Gradients]] = []
        self._tables: dict[Embedding, Gradients] = {}
        self._recorder = GradientRecorder()
        for path, module in model.named_modules():
            if not isinstance(module, Linear | Embedding):
                continue
            rows, columns = module.weight.shape
            sums = Gradients(int(rows), int(columns))
            self._uses.append((stored_name(model, f"{path}.weight"), sums))
            if isinstance(module, Linear):
                # a parameter of its own: the gradient of a tied one would mix its uses
                own = nn.Parameter(module.weight.detach(), requires_grad=True)
                module.register_parameter("weight", own)
                self._recorder.watch_parameter(own, sums.add)
            else:
                self._tables[module] = sums
                self._recorder.watch_table(module)

    def finish_window(self) -> None:
        """Add the gradients of the rows that were looked up: one sum for a row, however often it was read."""
        by_table: dict[Embedding, list[Lookup]] = {}
        for lookup in self._recorder.take_lookups():
            if lookup.rows.grad is not None:
                by_table.setdefault(lookup.table, []).append(lookup)
        for table, lookups in by_table.items():
            rows, places = torch.unique(torch.cat([x.ids.reshape(-1) for x in lookups]), return_inverse=True)
            gradients = [x.rows.grad.reshape(-1, x.rows.shape[-1]) for x in lookups if x.rows.grad is not None]
            gathered = torch.cat(gradients)
            summed = torch.zeros(len(rows), gathered.shape[1]).index_add_(0, places, gathered)
            self._tables[table].add(summed, rows)

    def curvatures(self, tokens: int) -> dict[str, list[Curvature]]:
        """Of each use that a gradient came to, by the weight's stored name."""
        weights: dict[str, list[Curvature]] = {}
        for name, sums in self._uses:
            curvature = sums.curvature(tokens)
            if curvature is not None:
                weights.setdefault(name, []).append(curvature)
        return weights


def predicted_losses(
    fisher: Fisher, source: Source, candidates: Candidates, progress: Progress = lambda _: None
) -> PredictedLosses:
    """For each unit the loss, in nats a token, that each choice is predicted to cost alone; losses of units add up.

    Some rows of each weight are really quantized. Where a choice says gptq, the data go through the model again, with one
    weight in memory at a time, for the Hessians of its inputs. Units that no data reached are named and get RTN's choices.
    """
    choices = candidates.choices
    planned = {w.name for unit in candidates.units for w in unit.weights}
    known: dict[str, dict[Choice, float]] = {}
    linears: dict[str, float] = {}

    def predict(name: str, factor: Factor | None) -> None:
        losses = WeightLosses(source.checkpoint.tensor(name), fisher.weights[name], factor, signed=candidates.signed)
        known[name] = {c: loss for c in choices if (loss := losses.at(c)) is not None}
        linears[name] = losses.at(REFERENCE) or 0.0

    if any(c.quantizer == "gptq" for c in choices):
        # Other data than the curvature's: on that, GPTQ's error would look up to twice as small as it is.
        differentiated = set(fisher.samples)
        others = [s for s in source.samples if s not in differentiated] or source.samples
        some = source.over(evenly(others, HESSIAN_WINDOWS))
        visit_factors(some, planned & set(fisher.weights), predict, progress)
    for name in [n for n in fisher.weights if n in planned and n not in known]:
        predict(name, None)
    losses = {
        unit.name: unit_losses(unit, choices, lambda name, c: known.get(name, {}).get(c)) for unit in candidates.units
    }
    without = [unit.name for unit in candidates.units if not losses[unit.name]]
    if without:
        progress(
            f"fisher: no data reached {len(without)} units ({without[0]} …); they count as the middle of the others"
        )
    return PredictedLosses(fill_unreached(candidates, losses), linears)


def visit_factors(
    source: Source, names: set[str], work: Callable[[str, Factor], None], progress: Progress = lambda _: None
) -> None:
    """`work` for each of `names` that the data reach, with the factor of its inputs' Hessian."""
    model = source.build()
    visited, done = set[str](), 0

    def visit(name: str, _: Linear, inputs: list[torch.Tensor]) -> None:
        nonlocal done
        if name not in names:
            return
        visited.add(name)
        factor = hessians.of(name, inputs)
        if 10 * done // len(names) != 10 * (done + 1) // len(names):
            progress(f"predicting losses: {100 * (done + 1) // len(names)}%")
        done += 1
        work(name, factor)

    embeddings = embedding_hessians(model, source, names)
    forward = CalibrationForward(model, source, visit=visit)
    hessians = InputHessians(forward, model, embeddings)
    forward.to_head()
    for name in sorted(names - visited):
        factor = hessians.of_embedding(name)
        if factor is not None:
            work(name, factor)
