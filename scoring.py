"""Layer scores of a real model: ZD from its weights, LIM from calibration prompts. Top-level: `quant`, `models`, `runtimes` enter.

LIM runs the original model in float32; ZD reads each weight once from the mapped file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .bundle import Generation
from .checkpoint import Checkpoint
from .errors import UserError
from .models.loading import load_original
from .quant.importance import WEIGHT_RANGE, LimAccumulator, importance_weights, zd
from .quant.plan import Unit
from .runtimes.eager import EagerSession
from .runtimes.generate import Stream, generate, read_context

METHODS = ("zd", "zd-two-sided", "lim", "uniform")
Layer = tuple[str, int]
_NEW_TOKENS = 32


@dataclass(frozen=True)
class Probes:
    """What calibrates: prompts, a context for each where the model reads one, or (graph, inputs) where it has no loop."""

    prompts: Sequence[Sequence[int]]
    contexts: Sequence[Sequence[int]] = ()
    examples: Sequence[tuple[str, dict[str, torch.Tensor]]] = ()


def score_layers(
    method: str,
    model: Any,
    checkpoint: Checkpoint,
    units: Sequence[Unit],
    probes: Probes,
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
        raise UserError(f"--importance {method} is not known; choose from {', '.join(METHODS)}")
    if not layers:
        raise UserError("--importance lim scores layers, and this model names none; use --importance uniform")
    if not probes.prompts and not probes.examples:
        raise UserError("--importance lim needs --calibration TEXT or --task FILE; without data use --importance zd")
    progress(
        f"importance (lim): {len(probes.prompts or probes.examples)} calibration prompts through the original model"
    )
    return _lim(model, checkpoint, probes, spec)


def _lim(model: Any, checkpoint: Checkpoint, probes: Probes, spec: Generation) -> dict[Layer, float]:
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


def _observer(accumulator: LimAccumulator) -> Callable[..., None]:
    def hook(_: Any, args: tuple[torch.Tensor, ...], output: Any) -> None:
        accumulator.update(args[0], output[0] if isinstance(output, tuple) else output)

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
