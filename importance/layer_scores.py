"""LIM and ZD of a model's layers, and the allocator's weights that follow from their order (arXiv 2406.17415)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..calibration.forward import CalibrationForward
from ..calibration.prompts import Prompts
from ..calibration.source import Source
from ..errors import UserError
from ..models.loading import load_original
from ..quant.plan import Unit
from ..runtimes.eager import EagerSession
from ..runtimes.encoder_inputs import Prompt
from ..runtimes.generate import Stream, generate, read_context
from .lim_zd import WEIGHT_RANGE, LimAccumulator, importance_weights, zd

METHODS = ("lim", "zd", "zd-two-sided", "uniform")

_NEW_TOKENS = 32
Layer = tuple[str, int]
"""Stack and index."""

Progress = Callable[[str], None]


def score_layers(
    method: str, source: Source, units: Sequence[Unit], prompts: Prompts, progress: Progress
) -> dict[Layer, float]:
    """LIM or ZD of every layer; none for "uniform". LIM runs the original model, in float32, on the prompts or calls.

    Raises UserError for another method, or LIM without calibration prompts.
    """
    layers = list(dict.fromkeys((w.stack, w.layer) for u in units for w in u.weights if w.layer is not None))
    if method == "uniform":
        return {}
    if method in ("zd", "zd-two-sided"):
        scores: dict[Layer, float] = {}
        progress(f"importance ({method}): {len(layers)} layers")
        for layer in layers:
            names = [w.name for u in units for w in u.weights if (w.stack, w.layer) == layer]
            scores[layer] = zd((source.checkpoint.tensor(n) for n in names), two_sided=method != "zd")
        return scores
    if method != "lim":
        raise UserError(f"--importance {method} is not known to order layers; choose from {', '.join(METHODS)}")
    if not layers:
        raise UserError("--importance lim scores layers, and this model names none; use --importance uniform")
    read: Sequence[Prompt] = prompts.sounds or prompts.tokens
    if not read and not source.calls:
        raise UserError("--importance lim needs --calibration TEXT or --task FILE; without data use --importance zd")
    progress(f"importance (lim): {len(read or source.calls)} calibration prompts through the original model")
    return _lim(source, prompts)


def _lim(source: Source, prompts: Prompts) -> dict[Layer, float]:
    model, generation = source.build(), source.generation
    load_original(model, source.checkpoint)
    accumulators: dict[Layer, LimAccumulator] = {}
    for stack, modules in model.stacks().items():
        for index, layer in enumerate(modules):
            accumulator = accumulators[stack, index] = LimAccumulator()
            layer.register_forward_hook(_observer(accumulator))
    session = EagerSession(model.graphs())
    for graph, inputs in source.calls:
        session.run(graph, {name: value.numpy() for name, value in inputs.items()}, {})
    if source.calls:
        return {layer: accumulator.value() for layer, accumulator in accumulators.items()}
    if generation.task == "embed":
        for tokens in prompts.tokens:  # one at a time: there is no padding to take out
            ids = np.array([tokens], np.int64)
            session.run("encoder", {"input_ids": ids, "encoder_mask": np.ones_like(ids, bool)}, {})
    elif generation.task == "seq2seq":
        read: Sequence[Prompt] = prompts.sounds or prompts.tokens
        for prompt in read:
            list(generate(session, generation, prompt, min(_NEW_TOKENS, generation.max_new_tokens)))
    else:
        for i, text in enumerate(prompts.tokens):
            memory = read_context(session, generation, prompts.contexts[i]) if prompts.contexts else None
            Stream(session, generation, [text[: generation.max_context - 1]], 1, memory).prefill()
    return {layer: accumulator.value() for layer, accumulator in accumulators.items()}


def lim_streamed(source: Source, progress: Progress = lambda _: None) -> dict[Layer, float]:
    """LIM over calibration samples with one module's weights in memory at a time."""
    progress(f"importance (lim): {len(source.samples)} windows, weights read layer by layer")
    model = source.build()
    accumulators: dict[Layer, LimAccumulator] = {}
    forward = CalibrationForward(model, source)
    for stack, modules in model.stacks().items():
        for index, layer in enumerate(modules):
            accumulator = accumulators[stack, index] = LimAccumulator()
            layer.register_forward_hook(_observer(accumulator, forward.rows))
    forward.logits(len(source.samples))
    return {layer: accumulator.value() for layer, accumulator in accumulators.items()}


def _observer(
    accumulator: LimAccumulator, rows: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
) -> Callable[..., None]:
    def hook(_: Any, args: tuple[torch.Tensor, ...], output: Any) -> None:
        accumulator.update(rows(args[0]), rows(output[0] if isinstance(output, tuple) else output))

    return hook


def unit_weights(units: Sequence[Unit], scores: Mapping[Layer, float], method: str) -> dict[str, float]:
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
