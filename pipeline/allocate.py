"""Bits for a model under the request's budget: scored, allocated, compared with uniform."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..calibration.prompts import Prompts
from ..calibration.source import Source
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.safetensors_writer import StreamingWriter
from ..device_profiles.profile import load
from ..errors import UserError
from ..importance.candidates import Candidates, expected_of
from ..importance.layer_scores import unit_weights
from ..importance.score import ScoreOptions, Scores, score
from ..models.language_model import LanguageModel
from ..models.layers.linear import Embedding, Linear
from ..models.registry import stored_name
from ..quant.allocator import Problem, allocate, expected_loss, offers, reach
from ..quant.frontier import better, uniform
from ..quant.latency import DecodeStep, PredictedRates, decode_step
from ..quant.overrides import Override
from ..quant.plan import UNQUANTIZED, BitPlan, Budget, Choice, Quantizer, Unit
from ..quant.prediction import memory_bytes
from ..quant.quantize_checkpoint import METADATA
from ..system.memory import require_available
from ..targets.storage import common_bits, legal_choices, signed_scales
from .baseline import Baseline, SingleTargetPlan, compare_with_uniform
from .calibration_data import quantizer_of
from .generation import DEFAULT_CONTEXT
from .original import Original
from .request import DEFAULT_BITS, Progress, Request

_TRIES = 40

GATE_LOSS = 1e-6
"""The most that 8 bits may cost a gate or decay of a recurrence for it to have them: in nats a token, as Fisher predicts it."""


@dataclass(frozen=True)
class Allocation:
    """A plan and what it was made from. alone: for each of several targets. baseline: where there are data to measure on."""

    plan: BitPlan
    scores: Scores
    problem: Problem
    alone: dict[str, SingleTargetPlan] = field(default_factory=dict)
    baseline: Baseline | None = None


def allocate_bits(
    request: Request, original: Original, source: Source, prompts: Prompts, progress: Progress
) -> Allocation:
    """Score the units, allocate bits and compare with uniform. prompts: what LIM runs on.

    An impossible budget is refused first, as that costs nothing. Raises UserError.
    """
    units, quantizer = original.units, quantizer_of(request)
    setting = _Setting.of(request, original)
    # Gates and decays are small, and their errors stay in the state: 16 bits, unless the user or the data say otherwise.
    gates = _free_gates(units, original.model.protected_weights(), request.budget.overrides)
    overrides = (*request.budget.overrides, *_kept(gates, UNQUANTIZED))

    unscored = setting.problem(Scores("uniform", {}, unit_weights(units, {}, "uniform")), request.formats, overrides)
    context = min(original.model.max_context, request.max_context or DEFAULT_CONTEXT)
    memory = request.budget.memory
    if memory is not None:
        budget = _within_memory(memory, setting, original, unscored, context)
    else:
        budget = _budget(request, unscored)
    allocate(unscored, budget)
    if request.budget.importance == "lim" and not source.samples:
        require_available(
            4 * sum(u.numel for u in units), "LIM runs the original model in float32", "give --importance zd"
        )
    choices = _choices(request, (*overrides, *_kept(gates, 8)), quantizer)
    scores = _score(request, unscored, source, choices, prompts, progress)
    if scores.losses is not None:
        scores = _by_gptq_where_possible(scores)
        overrides = _ease_gates(setting, gates, scores, overrides, budget, progress)
    problem = setting.problem(scores, request.formats, overrides)
    if memory is not None:
        budget = _within_memory(memory, setting, original, problem, context)
    plan = allocate(problem, budget)
    alone = _alone(setting, scores, overrides, plan, budget)

    even = uniform(problem, budget)
    baseline = compare_with_uniform(plan, even, source, progress)
    plan = better(plan, even, units, None if baseline is None else (baseline.planned, baseline.uniform))
    if quantizer == "gptq" and not any(e.quantizer == "gptq" for e in plan.entries.values()):
        plan = by_gptq(plan, original.model)
    return Allocation(plan, scores, problem, alone, baseline)


@dataclass(frozen=True)
class _Setting:
    """What all problems of one request share. step: for a budget of milliseconds."""

    request: Request
    units: list[Unit]
    other_bytes: int
    step: DecodeStep | None

    @staticmethod
    def of(request: Request, original: Original) -> _Setting:
        units, checkpoint, other = original.units, original.checkpoint, original.other
        other_bytes = sum(_bytes(checkpoint, n) for n in other) + _header_bytes(units, checkpoint, other)
        step = None
        asked = request.budget
        if asked.latency_ms is not None or asked.joules is not None:
            device = load(asked.device or "host")
            step = decode_step(original.model, units, device, request.formats, sure=asked.sure)
        return _Setting(request, units, other_bytes, step)

    def problem(self, scores: Scores, targets: tuple[str, ...], overrides: Sequence[Override]) -> Problem:
        budget = self.request.budget
        return Problem(
            self.units,
            scores.weights,
            self.other_bytes,
            widths=budget.widths or common_bits(targets),
            groups=budget.groups,
            overrides=overrides,
            targets=targets,
            method=scores.method,
            losses=scores.losses,
            step=self.step,
        )


def _budget(request: Request, problem: Problem) -> Budget:
    """The request's; without one, the default average or what comes nearest to it."""
    asked = request.budget
    if asked.latency_ms is not None:
        return Budget.of(latency_ms=asked.latency_ms, device=asked.device)
    if asked.joules is not None:
        return Budget.of(latency_ms=_milliseconds_of(asked.joules, problem), device=asked.device)
    if asked.size is not None:
        return Budget.of(size=asked.size)
    if asked.bits is not None:
        return Budget.of(bits=asked.bits)
    low, high = reach(problem)
    return Budget.of(bits=min(max(DEFAULT_BITS, low), high))


def _milliseconds_of(joules: float, problem: Problem) -> float:
    """The time of a decode step that takes so much energy: power times time. Raises UserError where the power is not known."""
    rates = problem.step.rates if problem.step is not None else None
    if not isinstance(rates, PredictedRates) or rates.watts is None:
        name = rates.device if rates is not None else "the device"
        raise UserError(f"the power of {name} is not known, so no energy of a step is; give --latency or --size")
    return float(f"{joules / rates.watts * 1e3:.6g}")


def _within_memory(limit: int, setting: _Setting, original: Original, problem: Problem, context: int) -> Budget:
    """The size whose plan takes at most `limit` bytes of weights and states in every target. Raises UserError if none does."""
    size, least = limit, reach(problem)[0]
    for _ in range(_TRIES):
        budget = Budget.of(size=size)
        try:
            plan = allocate(problem, budget)
        except UserError:
            floor, ceiling = (allocate(problem, Budget.of(bits=b)) for b in reach(problem))
            if size >= ceiling.total_bytes + setting.other_bytes:
                plan, budget = ceiling, Budget.of(bits=reach(problem)[1])
            else:
                needed = _memory(original, setting, floor, context)
                raise UserError(
                    f"{limit} bytes of memory at a context of {context} are too few: {least:g} bits a weight take {needed}; "
                    "give more, or a shorter --max-context"
                ) from None
        taken = _memory(original, setting, plan, context)
        if taken <= limit:
            return budget
        size -= max(taken - limit, limit // 1000)
    raise UserError(f"no plan was found that takes {limit} bytes of memory at a context of {context}; give --size")


def _memory(original: Original, setting: _Setting, plan: BitPlan, context: int) -> int:
    targets = setting.request.formats
    return max(memory_bytes(original.model, setting.units, plan, targets, context, 4).values())


def _choices(request: Request, overrides: Sequence[Override], quantizer: Quantizer) -> list[Choice]:
    """Every choice that a unit could be given: for all targets together, for each alone, and by an override."""
    asked = request.budget
    pairs: dict[tuple[int, int], None] = {}
    for targets in (request.formats, *((t,) for t in request.formats)):
        pairs |= dict.fromkeys(legal_choices(targets, asked.widths or common_bits(targets), asked.groups))
        for override in (o for o in overrides if o.bits != UNQUANTIZED):
            groups = asked.groups if override.group is None else (override.group,)
            pairs |= dict.fromkeys(legal_choices(targets, (override.bits,), groups))
    quantizers: list[Quantizer] = ["rtn", "gptq"] if quantizer == "gptq" else ["rtn"]
    return [Choice(bits, group, q) for bits, group in pairs for q in quantizers]


def _score(
    request: Request,
    unscored: Problem,
    source: Source,
    choices: Sequence[Choice],
    prompts: Prompts,
    progress: Progress,
) -> Scores:
    method = request.budget.importance
    if method == "auto" and all(len(offer.options) == 1 for offer in offers(unscored)):
        method = "uniform"  # one choice for each unit: there is nothing to weigh
    options = ScoreOptions(method, request.memory_limit, request.workers, request.calibration.fisher_windows)
    candidates = Candidates(unscored.units, choices, signed_scales(request.formats))
    with request.workers.running():
        return score(options, source, candidates, prompts, progress)


def _by_gptq_where_possible(scores: Scores) -> Scores:
    """The losses by GPTQ alone of each unit that has such: GPTQ is never worse."""
    assert scores.losses is not None
    by_gptq = {u: {c: v for c, v in of.items() if c.quantizer == "gptq"} for u, of in scores.losses.items()}
    return replace(scores, losses={u: by_gptq[u] or of for u, of in scores.losses.items()})


def _ease_gates(
    setting: _Setting,
    gates: Sequence[Unit],
    scores: Scores,
    overrides: Sequence[Override],
    budget: Budget,
    progress: Progress,
) -> tuple[Override, ...]:
    """`overrides`, with 8 bits for the gates that lose nothing by them, if the budget can still be met then."""
    request = setting.request
    eased = _eased(gates, scores) if 8 in (request.budget.widths or common_bits(request.formats)) else []
    lower = (*request.budget.overrides, *_kept(eased, 8), *_kept(gates, UNQUANTIZED))
    if not eased or not _holds(setting.problem(scores, request.formats, lower), budget):
        return tuple(overrides)
    progress(f"{len(eased)} of {len(gates)} gates and decays get 8 bits: that costs each {GATE_LOSS:g} nats at most")
    return lower


def _alone(
    setting: _Setting, scores: Scores, overrides: Sequence[Override], plan: BitPlan, budget: Budget
) -> dict[str, SingleTargetPlan]:
    """For each of several targets the plan that it could have alone."""
    request, units = setting.request, setting.units
    loss = expected_loss(plan, units)
    signed = signed_scales(request.formats)
    alone = {}
    for target in request.formats if len(request.formats) > 1 else ():
        own = scores if signed_scales((target,)) == signed else _with_signed_scales(scores, units)
        ratio = loss / expected_loss(allocate(setting.problem(own, (target,), overrides), budget), units)
        alone[target] = SingleTargetPlan(request.budget.widths or common_bits((target,)), ratio)
    return alone


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
    """Those that the data reached and that lose nothing at 8 bits. Only Fisher's scores say so."""
    losses = scores.losses or {}
    reached = [u for u in gates if all(w.name in scores.linears for w in u.weights)]
    return [u for u in reached if any(c.bits == 8 and v <= GATE_LOSS for c, v in losses[u.name].items())]


def _holds(problem: Problem, budget: Budget) -> bool:
    """Whether there is a plan: with fewer bits for the gates a budget may be above the ceiling."""
    try:
        allocate(problem, budget)
    except UserError:
        return False
    return True


def _kept(units: Sequence[Unit], bits: int) -> list[Override]:
    return [Override(f"^{re.escape(w.name)}$", bits) for u in units for w in u.weights]


def _bytes(checkpoint: Checkpoint, name: str) -> int:
    info = checkpoint.info(name)
    return math.prod(info.shape) * info.dtype.itemsize


def _header_bytes(units: Sequence[Unit], checkpoint: Checkpoint, other: Sequence[str]) -> int:
    """At least the bytes of the quantized checkpoint's header: --size means the file."""
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
