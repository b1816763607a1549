"""The Fisher information of a model's weights by one backward pass over data. Top-level: calibration, models, quant enter.

For each window of the data the model's log-likelihood of tokens drawn from its own distribution is differentiated: the mean
square of that gradient is the Fisher information, whatever the true next tokens are. One window is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..bundle import Generation
from ..calibration.backward import GradientSession, backward_bytes
from ..calibration.embedding_hessians import embedding_hessians
from ..calibration.forward import CalibrationForward
from ..calibration.hessians import InputHessians
from ..calibration.samples import Call, Sample, evenly
from ..checkpoints.checkpoint import Checkpoint
from ..errors import UserError
from ..models.language_model import LanguageModel
from ..models.layers.linear import Embedding, Linear
from ..models.loading import load_original
from ..models.registry import build, stored_name
from ..quant.hessian import Factor
from ..quant.plan import Choice, Unit
from ..runtimes.logits import torch_log_softmax
from .fisher_losses import Curvature, Gradients, WeightLosses, fill_unreached, unit_losses

POSITIONS = 256
"""Of a window, the most positions whose tokens are drawn: the logits of a large vocabulary are what takes memory."""

WINDOWS = 32
"""Windows of the backward pass at most; each gives one gradient of every weight."""

HESSIAN_WINDOWS = 16
"""Windows that the Hessians for GPTQ's predicted losses are of; GPTQ itself sees all."""

_SEED = 5
Progress = Callable[[str], None]


@dataclass
class Fisher:
    """What the backward pass gives. weights: stored name -> the curvature of each of its uses. tokens: drawn.

    linears: stored name -> its loss at four bits in groups of 64, filled in when losses are predicted.
    """

    weights: dict[str, list[Curvature]]
    tokens: int
    linears: dict[str, float] = field(default_factory=dict)


def fisher(
    model: LanguageModel,
    checkpoint: Checkpoint,
    spec: Generation,
    samples: Sequence[Sample],
    progress: Progress = lambda _: None,
) -> Fisher:
    """The curvature of every linear and embedding. `model` is filled with the original weights, and of no use afterwards.

    Raises UserError for a model without logits, or one whose logits are not finite on the data.
    """
    load_original(model, checkpoint)
    watch = _Watch(model)
    chosen = evenly(samples, WINDOWS)
    generator = torch.Generator().manual_seed(_SEED)
    tokens = 0
    for i, sample in enumerate(chosen):
        if i % 8 == 0:
            progress(f"fisher: window {i + 1} of {len(chosen)}")
        session = GradientSession(model.graphs())
        tokens += _differentiate(CalibrationForward(model, checkpoint, spec, [sample], session=session), generator)
        watch.finish_window()
    return watch.result(tokens)


def _differentiate(forward: CalibrationForward, generator: torch.Generator) -> int:
    """The gradient of one window's log-likelihood of drawn tokens, to the hooks of `_Watch`; the number of those tokens."""
    found, real = forward.logits(POSITIONS)
    logits = torch.as_tensor(found)[torch.as_tensor(real)]
    if not bool(torch.isfinite(logits).all()):
        raise UserError("the model's logits are not finite on the calibration data; use --importance zd")
    likelihood = torch_log_softmax(logits)
    drawn = torch.multinomial(likelihood.detach().exp(), 1, generator=generator)
    likelihood.gather(1, drawn).sum().backward()  # type: ignore[no-untyped-call]
    return len(logits)


def fisher_bytes(model: LanguageModel, samples: Sequence[Sample]) -> int:
    """About the memory that `fisher` takes: weights, a matrix over the inputs of each, and one window's activations."""
    weights, curvatures, largest = 0, 0, 0
    for module in model.modules():
        own = sum(p.numel() for p in module.parameters(recurse=False))
        weights, largest = weights + own, max(largest, own)
        if isinstance(module, Linear | Embedding):
            rows, columns = module.weight.shape
            curvatures += rows + columns * columns
    window = max((s.size for s in samples), default=0)
    return int(4 * (weights + curvatures + largest)) + backward_bytes(model, window, window, POSITIONS)


class _Watch:
    """Takes the gradient of every use of a weight as soon as the backward pass has it, and frees it."""

    def __init__(self, model: LanguageModel) -> None:
        self._uses: list[tuple[str, Gradients]] = []
        self._looked_up: list[tuple[Gradients, torch.Tensor, torch.Tensor]] = []
        for path, module in model.named_modules():
            if not isinstance(module, Linear | Embedding):
                continue
            name = f"{path}.weight"
            rows, columns = module.weight.shape
            sums = Gradients(int(rows), int(columns))
            self._uses.append((stored_name(model, name), sums))
            if isinstance(module, Linear):
                # a parameter of its own: the gradient of a tied one would mix its uses
                own = nn.Parameter(module.weight.detach(), requires_grad=True)
                module.register_parameter("weight", own)
                own.register_post_accumulate_grad_hook(_taken(sums))  # type: ignore[no-untyped-call]
            else:
                module.register_forward_hook(self._embedding_hook(sums))

    def _embedding_hook(self, sums: Gradients) -> Callable[..., torch.Tensor]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            leaf = output.detach().requires_grad_()
            self._looked_up.append((sums, args[0], leaf))
            return leaf

        return hook

    def finish_window(self) -> None:
        """Add up the gradients of the rows that were looked up; a row's all together, however often it was."""
        by_use: dict[int, tuple[Gradients, list[torch.Tensor], list[torch.Tensor]]] = {}
        for sums, ids, leaf in self._looked_up:
            if leaf.grad is not None:
                entry = by_use.setdefault(id(sums), (sums, [], []))
                entry[1].append(ids.reshape(-1))
                entry[2].append(leaf.grad.reshape(-1, leaf.shape[-1]))
        for sums, ids_of, gradients in by_use.values():
            rows, places = torch.unique(torch.cat(ids_of), return_inverse=True)
            gathered = torch.cat(gradients)
            sums.add(torch.zeros(len(rows), gathered.shape[1]).index_add_(0, places, gathered), rows)
        self._looked_up.clear()

    def result(self, tokens: int) -> Fisher:
        found = Fisher({}, tokens)
        for name, sums in self._uses:
            made = sums.curvature(tokens)
            if made is not None:
                found.weights.setdefault(name, []).append(made)
        return found


def _taken(sums: Gradients) -> Callable[[torch.Tensor], None]:
    def hook(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            sums.add(parameter.grad)
            parameter.grad = None

    return hook


def predicted_losses(
    found: Fisher,
    checkpoint: Checkpoint,
    config: dict[str, Any],
    spec: Generation,
    samples: Sequence[Sample],
    calls: Sequence[Call],
    units: Sequence[Unit],
    choices: Sequence[Choice],
    signed: bool = False,
    progress: Progress = lambda _: None,
) -> dict[str, dict[Choice, float]]:
    """For each unit the loss, in nats a token, that each of `choices` is predicted to cost alone; losses of units add up.

    Some rows of each weight are really quantized. Where a choice says gptq, the data go through the model again, a weight in
    memory at a time, for the Hessians of its inputs. Units that no data reached are said aloud and get RTN's choices.
    """
    planned = {w.name for unit in units for w in unit.weights}
    known: dict[str, dict[Choice, float]] = {}

    def work(name: str, made: Factor | None) -> None:
        losses = WeightLosses(checkpoint.tensor(name), found.weights[name], made, signed=signed)
        known[name] = {c: loss for c in choices if (loss := losses.at(c)) is not None}
        found.linears[name] = losses.at(Choice(4, 64)) or 0.0

    if any(c.quantizer == "gptq" for c in choices):
        _walk_hessians(checkpoint, config, spec, samples, calls, planned & set(found.weights), work, progress)
    for name in [n for n in found.weights if n in planned and n not in known]:
        work(name, None)
    losses = {unit.name: unit_losses(unit, choices, lambda name, c: known.get(name, {}).get(c)) for unit in units}
    without = [unit.name for unit in units if not losses[unit.name]]
    if without:
        progress(
            f"fisher: no data reached {len(without)} units ({without[0]} …); they count as the middle of the others"
        )
    return fill_unreached(units, choices, losses, signed)


def _walk_hessians(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    spec: Generation,
    samples: Sequence[Sample],
    calls: Sequence[Call],
    names: set[str],
    work: Callable[[str, Factor], None],
    progress: Progress,
) -> None:
    """`work` for each of `names` that the data reach, with the factor of its inputs' Hessian."""
    model = build(config)
    seen, done = set[str](), 0

    def visit(name: str, _: Linear, inputs: list[torch.Tensor]) -> None:
        nonlocal done
        if name not in names:
            return
        seen.add(name)
        made = hessians.of(name, inputs)
        if 10 * done // len(names) != 10 * (done + 1) // len(names):
            progress(f"predicting losses: {100 * (done + 1) // len(names)}%")
        done += 1
        work(name, made)

    # Data that the curvature is not of: on its own data GPTQ's error looks up to twice as small as it is.
    differentiated = set(evenly(samples, WINDOWS))
    apart = [s for s in samples if s not in differentiated] or samples
    some = evenly(apart, HESSIAN_WINDOWS)
    embeddings = embedding_hessians(model, checkpoint, spec, some, names)
    forward = CalibrationForward(model, checkpoint, spec, some, calls, visit=visit)
    hessians = InputHessians(forward, model, embeddings)
    forward.to_head()
    for name in sorted(names - seen):
        made = hessians.of_embedding(name)
        if made is not None:
            work(name, made)
