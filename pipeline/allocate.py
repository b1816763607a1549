"""Bits for a model under the request's budget: scored, allocated, compared with uniform. Top-level: `scoring`, `quant` enter."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..bundle import Generation
from ..calibration.samples import Sample
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.safetensors_writer import StreamingWriter
from ..device_profiles.profile import load
from ..errors import UserError
from ..importance.fisher_losses import expected_of
from ..importance.score import CalibrationInputs, Scores, score, unit_weights
from ..models.language_model import LanguageModel
from ..models.layers.linear import Embedding, Linear
from ..models.registry import build, stored_name
from ..quant.allocator import Problem, expected_loss, offers, plan_within, reach
from ..quant.frontier import better, uniform
from ..quant.latency import decode_step
from ..quant.overrides import Override
from ..quant.plan import UNQUANTIZED, BitPlan, Budget, Choice, Quantizer, Unit
from ..quant.quantize_checkpoint import METADATA
from ..system.memory import require_available
from ..targets.storage import common_bits, legal_choices, signed_scales
from .baseline import Baseline, SingleTargetPlan, _against
from .request import DEFAULT_BITS, Progress, Request

GATE_LOSS = 1e-6


"""The most that 8 bits may cost a gate or decay of a recurrence for it to have them: in nats a token, as Fisher predicts it."""


def allocate_bits(
    request: Request,
    checkpoint: Checkpoint,
    config: dict[str, Any],
    units: list[Unit],
    other: list[str],
    spec: Generation,
    probes: CalibrationInputs,
    samples: list[Sample],
    quantizer: Quantizer,
    progress: Progress,
) -> tuple[BitPlan, Scores, dict[str, SingleTargetPlan], Problem, Baseline | None]:
    """Refuse an impossible budget first (it costs nothing), then score and allocate, and compare with uniform."""
    model = build(config)
    other_bytes = sum(_bytes(checkpoint, n) for n in other) + _header_bytes(units, checkpoint, other)
    # Gates and decays are small, and what they get wrong stays in the state: 16 bits, unless the user or the data say otherwise.
    gates = _free_gates(units, model.protected_weights(), request.budget.overrides)
    overrides = whole = (*request.budget.overrides, *_kept(gates, UNQUANTIZED))
    step = None
    if request.budget.latency_ms is not None:
        step = decode_step(model, units, load(request.budget.device or "host"), request.formats)

    def problem_for(scores: Scores, targets: tuple[str, ...], overrides: tuple[Override, ...] = whole) -> Problem:
        widths = request.budget.widths or common_bits(targets)
        head = (units, scores.weights, other_bytes, widths, request.budget.groups, overrides, targets, scores.method)
        return Problem(*head, losses=scores.losses, step=step)

    even = Scores("uniform", {}, unit_weights(units, {}, "uniform"))
    budget = _budget(request, problem_for(even, request.formats))
    plan_within(problem_for(even, request.formats), budget)
    if request.budget.importance == "lim" and not samples:
        require_available(
            4 * sum(u.numel for u in units), "LIM runs the original model in float32", "give --importance zd"
        )
    choices = _choices(request, (*overrides, *_kept(gates, 8)), quantizer)
    memory, workers = request.memory_limit, request.workers
    method = request.budget.importance
    if method == "auto" and all(len(offer.options) == 1 for offer in offers(problem_for(even, request.formats))):
        method = "uniform"  # one choice for each unit: there is nothing to weigh
    with workers.running():
        signed = signed_scales(request.formats)
        data = (choices, spec, probes, samples)
        scores = score(method, checkpoint, config, units, *data, memory, workers, signed, progress)
    if scores.losses is not None:  # what GPTQ can have, it gets: it is never the worse
        by_gptq = {u: {c: v for c, v in of.items() if c.quantizer == "gptq"} for u, of in scores.losses.items()}
        losses = {u: by_gptq[u] or of for u, of in scores.losses.items()}
        scores = replace(scores, losses=losses)
        eased = _eased(gates, scores) if 8 in (request.budget.widths or common_bits(request.formats)) else []
        lower = (*request.budget.overrides, *_kept(eased, 8), *_kept(gates, UNQUANTIZED))
        if eased and _holds(problem_for(scores, request.formats, lower), budget):
            overrides = lower
            progress(
                f"{len(eased)} of {len(gates)} gates and decays get 8 bits: that costs each {GATE_LOSS:g} nats at most"
            )
    problem = problem_for(scores, request.formats, overrides)
    made = plan_within(problem, budget)
    loss = expected_loss(made, units)
    alone = {}
    for target in request.formats if len(request.formats) > 1 else ():
        own = scores if signed_scales((target,)) == signed else _with_signed_scales(scores, units)
        ratio = loss / expected_loss(plan_within(problem_for(own, (target,), overrides), budget), units)
        alone[target] = SingleTargetPlan(request.budget.widths or common_bits((target,)), ratio)
    baseline = uniform(problem, budget)
    measured = _against(made, baseline, checkpoint, config, spec, samples, progress)
    made = better(made, baseline, units, None if measured is None else (measured.planned, measured.uniform))
    return made, scores, alone, problem, measured


def _with_signed_scales(scores: Scores, units: Sequence[Unit]) -> Scores:
    """Scores of positive scales as they would be if scales could be negative: losses in the ratio of expected errors."""
    if scores.losses is None:
        return scores
    losses = {
        u.name: {c: v * expected_of(u, c, True) / expected_of(u, c, False) for c, v in scores.losses[u.name].items()}
        for u in units
    }
    return replace(scores, losses=losses)


def _free_gates(units: Sequence[Unit], protected: set[str], overrides: Sequence[Override]) -> list[Unit]:
    """The units of gates and decays that no override of the user's decides."""
    gates = [u for u in units if protected & {w.name for w in u.weights}]
    return [u for u in gates if not any(re.search(o.regex, w.name) for o in overrides for w in u.weights)]


def _eased(gates: Sequence[Unit], scores: Scores) -> list[Unit]:
    """Those that the data reached and to which 8 bits do nothing; other importance than Fisher's has not tried 8 bits."""
    losses = scores.losses or {}
    reached = [u for u in gates if all(w.name in scores.linears for w in u.weights)]
    return [u for u in reached if any(c.bits == 8 and v <= GATE_LOSS for c, v in losses[u.name].items())]


def _holds(problem: Problem, budget: Budget) -> bool:
    """Whether there is a plan: fewer bits for the gates lower what a model can take at most."""
    try:
        plan_within(problem, budget)
    except UserError:
        return False
    return True


def _kept(units: Sequence[Unit], bits: int) -> list[Override]:
    return [Override(f"^{re.escape(w.name)}$", bits) for u in units for w in u.weights]


def _budget(request: Request, problem: Problem) -> Budget:
    """What was asked for; without, the default average, or what comes nearest to it."""
    if request.budget.latency_ms is not None:
        return Budget("latency", float(request.budget.latency_ms), request.budget.device)
    if request.budget.size is not None:
        return Budget("size", float(request.budget.size))
    if request.budget.bits is not None:
        return Budget("bits", float(request.budget.bits))
    low, high = reach(
        problem.units,
        widths=problem.widths,
        groups=problem.groups,
        overrides=problem.overrides,
        targets=problem.targets,
    )
    return Budget("bits", min(max(DEFAULT_BITS, low), high))


def _choices(request: Request, overrides: Sequence[Override], quantizer: Quantizer) -> list[Choice]:
    """Every choice that a unit could be given: for all targets together, for each alone, and by an override."""
    pairs: dict[tuple[int, int], None] = {}
    for targets in (request.formats, *((t,) for t in request.formats)):
        pairs |= dict.fromkeys(
            legal_choices(targets, request.budget.widths or common_bits(targets), request.budget.groups)
        )
        for override in (o for o in overrides if o.bits != UNQUANTIZED):
            groups = request.budget.groups if override.group is None else (override.group,)
            pairs |= dict.fromkeys(legal_choices(targets, (override.bits,), groups))
    by: list[Quantizer] = ["rtn", "gptq"] if quantizer == "gptq" else ["rtn"]
    return [Choice(bits, group, q) for bits, group in pairs for q in by]


def _bytes(checkpoint: Checkpoint, name: str) -> int:
    info = checkpoint.info(name)
    count = 1
    for size in info.shape:
        count *= size
    return count * info.dtype.itemsize


def _header_bytes(units: list[Unit], checkpoint: Checkpoint, other: list[str]) -> int:
    """No fewer bytes than the header of the quantized checkpoint will take: --size means the file."""
    entries = [(n, "F32", checkpoint.info(n).shape) for n in other]
    for w in (w for u in units for w in u.weights):
        entries += [(f"{w.name}.codes", "U8", w.shape), (f"{w.name}.scales", "BF16", w.shape)]
    data = sum(math.prod(shape) * {"F32": 4, "U8": 1, "BF16": 2}[kind] for _, kind, shape in entries)
    return StreamingWriter(Path("header"), entries, METADATA).file_bytes - data


def by_gptq(plan: BitPlan, model: LanguageModel) -> BitPlan:
    """The plan with GPTQ for every weight of a linear or an embedding; a convolution has no Hessian of inputs."""
    kinds = (Linear, Embedding)
    known = {stored_name(model, f"{p}.weight") for p, m in model.named_modules() if isinstance(m, kinds)}
    chosen = {n: replace(e, quantizer="gptq") if n in known else e for n, e in plan.entries.items()}
    return replace(plan, entries=chosen)
