"""How much each part of a model matters, by any method. Top-level: calibration, sensitivity, divergence, `quant`, `models` enter.

ZD reads each weight once from the mapped file; LIM runs the original model; these two order layers. The Fisher information
and the measured divergence give, for each unit and choice of bits, what it costs in nats a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..bundle import Generation
from ..calibration.forward import CalibrationForward
from ..calibration.samples import Sample, evenly
from ..checkpoints.checkpoint import Checkpoint
from ..errors import UserError
from ..models.language_model import LanguageModel
from ..models.loading import load_original
from ..models.registry import build
from ..quant.plan import Choice, Unit
from ..runtimes.eager import EagerSession
from ..runtimes.generate import Stream, generate, read_context
from ..system.memory import available_bytes
from ..system.workers import ONE, Workers
from .fisher import fisher, fisher_bytes, predicted_losses
from .fisher_losses import expected_of, extrapolated, relative_error
from .kl import kl_of_each
from .lim_zd import WEIGHT_RANGE, LimAccumulator, importance_weights, zd

METHODS = ("auto", "fisher", "kl", "lim", "zd", "zd-two-sided", "uniform")
MEASURED = ("fisher", "kl")
"""Methods that give a loss for every unit and choice."""

REFERENCE = Choice(4, 64)
"""The choice at which units are compared in tables: any weight can have it."""

KL_CHOICE = Choice(3, 64)
"""The low width of `kl`: low enough to stand out of the arithmetic's noise, high enough that the loss is still quadratic."""

CHECKED_SHARE = 0.1
"""Units with more than this share of the predicted loss are measured too."""

_MOST_SCALED = 4.0
_KL_WINDOWS = 4
_NEW_TOKENS = 32
Layer = tuple[str, int]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class CalibrationInputs:
    """What calibrates: prompts, a context for each where the model reads one, or (graph, inputs) where it has no loop."""

    prompts: Sequence[Sequence[int]]
    contexts: Sequence[Sequence[int]] = ()
    examples: Sequence[tuple[str, dict[str, torch.Tensor]]] = ()


@dataclass(frozen=True)
class Scores:
    """Importance by one method, the one that was asked for or that `auto` chose.

    layers: (stack, layer) -> LIM or ZD; of a measured method the layer's loss at the reference choice in nats a token. weights:
    unit name -> the allocator's positive weight. losses: unit name -> choice -> predicted loss, of the measured methods alone.
    units: unit name -> loss at the reference choice; linears: the same of each weight by its stored name, of `fisher` alone.
    """

    method: str
    layers: dict[Layer, float]
    weights: dict[str, float]
    losses: dict[str, dict[Choice, float]] | None = None
    units: dict[str, float] = field(default_factory=dict)
    linears: dict[str, float] = field(default_factory=dict)


def choose(
    method: str,
    model: LanguageModel,
    spec: Generation,
    samples: Sequence[Sample],
    memory: int | None = None,
    progress: Progress = lambda _: None,
) -> str:
    """The method that `auto` stands for with these data and this memory; any other as it is. Says what it chose and why.

    memory: bytes the run may take, None for what the system has. Raises UserError for an unknown method, and for fisher by name
    where it does not fit.
    """
    if method not in METHODS:
        raise UserError(f"--importance {method} is not known; choose from {', '.join(METHODS)}")
    if method not in ("auto", "fisher"):
        return method
    if not samples or spec.task == "module":
        if method == "fisher":  # refused by `score`, as for `kl`
            return method
        progress("importance: zd, from the weights alone, as there are no calibration data for it")
        return "zd"
    needed, available = fisher_bytes(model, samples), available_bytes() if memory is None else memory
    if needed > available:
        said = f"fisher would take about {needed / 2**30:.1f} GiB of the {available / 2**30:.1f} there are"
        if method == "fisher":
            raise UserError(f"--importance {said}; give --importance lim, or more memory")
        progress(f"importance: lim, as {said}")
        return "lim"
    if method == "fisher":
        return method
    progress(f"importance: fisher, as there are calibration data and its {needed / 2**30:.1f} GiB fit")
    return "fisher"


def score(
    method: str,
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    units: Sequence[Unit],
    choices: Sequence[Choice],
    spec: Generation,
    probes: CalibrationInputs,
    samples: Sequence[Sample] = (),
    memory: int | None = None,
    workers: Workers = ONE,
    signed: bool = False,
    progress: Progress = lambda _: None,
) -> Scores:
    """Importance of all units by `method`; models are built as needed.

    config: what `build` takes. choices: those that losses are wanted for. probes: what LIM runs on as long as the model fits
    `memory` (bytes; None: what the system has); samples: what everything else runs on. workers: of `kl`. signed:
    whether scales may be negative.
    Raises UserError for an unknown method, or one whose data are not there.
    """
    built = dict(config)
    method = choose(method, build(built), spec, samples, memory, progress)
    if method not in MEASURED:
        fits = 4 * sum(u.numel for u in units) <= (available_bytes() if memory is None else memory)
        if method == "lim" and samples and not fits:
            layers = lim_streamed(checkpoint, built, spec, samples, progress)
        else:
            layers = score_layers(method, build(built), checkpoint, units, probes, spec, progress)
        return Scores(method, layers, unit_weights(units, layers, method))
    if not samples or spec.task == "module":
        raise UserError(f"--importance {method} needs --calibration TEXT or --task FILE, and a model that has logits")
    wanted = list(dict.fromkeys([REFERENCE, *choices]))
    if method == "fisher":
        found = fisher(build(built), checkpoint, spec, samples, progress)
        losses = predicted_losses(found, checkpoint, built, spec, samples, (), units, wanted, signed, progress)
        found.weights.clear()
        losses = _checked(checkpoint, built, spec, samples, units, losses, signed, progress)
        layers, linears = _by_layer(units, losses), dict(found.linears)
    else:
        losses, layers = _by_divergence(checkpoint, built, spec, samples, units, wanted, workers, signed, progress)
        linears = {}
    reference = {name: of[REFERENCE] for name, of in losses.items()}
    weights = {u.name: max(reference[u.name] / expected_of(u, REFERENCE, signed), 1e-300) for u in units}
    return Scores(method, layers, weights, losses, reference, linears)


def _by_layer(units: Sequence[Unit], losses: Mapping[str, Mapping[Choice, float]]) -> dict[Layer, float]:
    layers: dict[Layer, float] = {}
    for unit in units:
        first = unit.weights[0]
        if first.layer is not None:
            key = (first.stack, first.layer)
            layers[key] = layers.get(key, 0.0) + losses[unit.name][REFERENCE]
    return layers


def _checked(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    spec: Generation,
    samples: Sequence[Sample],
    units: Sequence[Unit],
    losses: dict[str, dict[Choice, float]],
    signed: bool,
    progress: Progress,
) -> dict[str, dict[Choice, float]]:
    """`losses` with RTN's of the costliest units scaled to what they measure at the reference choice.

    A large error is no longer small: the quadratic form says two or three times too much of a tied embedding, and whatever
    holds most of the total misleads the allocator most. GPTQ leaves little of such an error, and its losses stay.
    """
    total = sum(of[REFERENCE] for of in losses.values())
    costly = [u for u in units if losses[u.name][REFERENCE] > CHECKED_SHARE * total > 0.0]
    if not costly:
        return losses
    progress(f"importance (fisher): {len(costly)} of the costliest units are measured alone")
    parts = [{w.name: (REFERENCE.bits, REFERENCE.group_size, signed) for w in u.weights} for u in costly]
    measured = kl_of_each(checkpoint, config, parts, spec, evenly(samples, _KL_WINDOWS))
    checked = dict(losses)
    for unit, kl in zip(costly, measured, strict=True):
        ratio = min(_MOST_SCALED, max(1.0 / _MOST_SCALED, kl / losses[unit.name][REFERENCE]))
        checked[unit.name] = {c: v * (ratio if c.quantizer == "rtn" else 1.0) for c, v in losses[unit.name].items()}
    return checked


def _by_divergence(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    spec: Generation,
    samples: Sequence[Sample],
    units: Sequence[Unit],
    choices: Sequence[Choice],
    workers: Workers,
    signed: bool,
    progress: Progress,
) -> tuple[dict[str, dict[Choice, float]], dict[Layer, float]]:
    """Measured losses of units and layers, each lowered alone; other choices in the ratio of expected errors."""
    by_layer: dict[Layer, list[Unit]] = {}
    for unit in units:
        first = unit.weights[0]
        if first.layer is not None:
            by_layer.setdefault((first.stack, first.layer), []).append(unit)
    low = (KL_CHOICE.bits, KL_CHOICE.group_size, signed)
    parts = [{w.name: low for w in unit.weights} for unit in units]
    parts += [{w.name: low for unit in of for w in unit.weights} for of in by_layer.values()]
    few = evenly(samples, _KL_WINDOWS)
    progress(f"importance (kl): {len(parts)} times {sum(s.size for s in few)} tokens through the model")
    found = kl_of_each(checkpoint, config, parts, spec, few, workers, progress)
    by_rtn = [c for c in choices if c.quantizer == "rtn"]
    losses = {
        u.name: extrapolated(u, by_rtn, KL_CHOICE, loss, signed)
        for u, loss in zip(units, found[: len(units)], strict=True)
    }
    ratio = relative_error(REFERENCE, 1024, signed) / relative_error(KL_CHOICE, 1024, signed)
    layers = {key: loss * ratio for key, loss in zip(by_layer, found[len(units) :], strict=True)}
    return losses, layers


def lim_streamed(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    spec: Generation,
    samples: Sequence[Sample],
    progress: Progress = lambda _: None,
) -> dict[Layer, float]:
    """LIM over calibration samples with one module's weights in memory at a time."""
    progress(f"importance (lim): {len(samples)} windows, weights read layer by layer")
    model = build(config)
    accumulators: dict[Layer, LimAccumulator] = {}
    forward = CalibrationForward(model, checkpoint, spec, samples)
    for stack, modules in model.stacks().items():
        for index, layer in enumerate(modules):
            accumulator = accumulators[stack, index] = LimAccumulator()
            layer.register_forward_hook(_observer(accumulator, forward.rows))
    forward.logits(len(samples))
    return {layer: accumulator.value() for layer, accumulator in accumulators.items()}


def score_layers(
    method: str,
    model: LanguageModel,
    checkpoint: Checkpoint,
    units: Sequence[Unit],
    probes: CalibrationInputs,
    spec: Generation,
    progress: Callable[[str], None],
) -> dict[Layer, float]:
    """LIM or ZD of every (stack, layer). `model` is filled with the original weights for LIM, untouched for ZD.

    Raises UserError for an unknown method, or LIM without calibration prompts.
    """
    layers = list(dict.fromkeys((w.stack, w.layer) for u in units for w in u.weights if w.layer is not None))
    if method == "uniform":
        return {}
    if method in ("zd", "zd-two-sided"):
        scores: dict[Layer, float] = {}
        progress(f"importance ({method}): {len(layers)} layers")
        for layer in layers:
            names = [w.name for u in units for w in u.weights if (w.stack, w.layer) == layer]
            scores[layer] = zd((checkpoint.tensor(n) for n in names), two_sided=method != "zd")
        return scores
    if method != "lim":
        raise UserError(f"--importance {method} is not known to order layers; choose from {', '.join(METHODS)}")
    if not layers:
        raise UserError("--importance lim scores layers, and this model names none; use --importance uniform")
    if not probes.prompts and not probes.examples:
        raise UserError("--importance lim needs --calibration TEXT or --task FILE; without data use --importance zd")
    progress(
        f"importance (lim): {len(probes.prompts or probes.examples)} calibration prompts through the original model"
    )
    return _lim(model, checkpoint, probes, spec)


def _lim(
    model: LanguageModel, checkpoint: Checkpoint, probes: CalibrationInputs, spec: Generation
) -> dict[Layer, float]:
    load_original(model, checkpoint)
    accumulators: dict[Layer, LimAccumulator] = {}
    hooks = []
    for stack, modules in model.stacks().items():
        for index, layer in enumerate(modules):
            accumulator = accumulators[stack, index] = LimAccumulator()
            hooks.append(layer.register_forward_hook(_observer(accumulator)))
    session = EagerSession(model.graphs())
    try:
        for graph, inputs in probes.examples:
            session.run(graph, {name: value.numpy() for name, value in inputs.items()}, {})
        for i, prompt in enumerate(
            probes.prompts if not probes.examples else ()
        ):  # one at a time: no padding to take out
            memory = read_context(session, spec, probes.contexts[i]) if probes.contexts else None
            if spec.task != "seq2seq":
                Stream(session, spec, [prompt[: spec.max_context - 1]], 1, memory).prefill()
            else:
                list(generate(session, spec, prompt, min(_NEW_TOKENS, spec.max_new_tokens)))
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: accumulator.value() for layer, accumulator in accumulators.items()}


def _observer(
    accumulator: LimAccumulator, rows: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
) -> Callable[..., None]:
    def hook(_: Any, args: tuple[torch.Tensor, ...], output: Any) -> None:
        accumulator.update(rows(args[0]), rows(output[0] if isinstance(output, tuple) else output))

    return hook


def unit_weights(units: Sequence[Unit], scores: dict[Layer, float], method: str) -> dict[str, float]:
    """The allocator's weight of each unit: its layer's, log-linear in rank over all stacks together.

    Embedding and head belong to no layer and get the middle weight; `uniform` weighs all units alike.
    """
    middle = math.sqrt(WEIGHT_RANGE)
    if not scores:
        return {u.name: middle for u in units}
    order = list(scores)
    by_index = {i: scores[layer] for i, layer in enumerate(order)}
    weights = importance_weights(by_index, "lim" if method == "lim" else "zd")
    by_layer = {layer: weights[i] for i, layer in enumerate(order)}

    def of(unit: Unit) -> float:
        first = unit.weights[0]
        return middle if first.layer is None else by_layer[first.stack, first.layer]

    return {u.name: of(u) for u in units}
