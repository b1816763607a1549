"""Bits for every weight under a budget, exactly.

The allocator minimises the sum over units of the predicted loss: importance * weights * expected relative error, or the losses
that were measured. The budget is bytes of codes and scales, or predicted time of a decode step. A budget that cannot be met is
refused before any weight is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from ..errors import UserError
from ..ops.packing import WIDTHS, period
from ..targets.storage import PER_CHANNEL, legal_choices, legal_group, signed_scales
from ..targets.target import GROUP_SIZES
from .expected_error import expected_error
from .knapsack import Option, solve, undominated
from .latency import PICOSECONDS, DecodeStep
from .overrides import Override, _check_widths
from .plan import UNQUANTIZED, BitPlan, Budget, Choice, Entry, Quantizer, Unit, weight_bytes
from .rtn import effective_group

Losses = Mapping[str, Mapping[Choice, float]]
"""Unit name -> choice -> the predicted loss of the unit at it, in nats a token."""


@dataclass(frozen=True)
class Problem:
    """All that an allocation depends on, but for its budget.

    units: weights that share a choice. scores: unit name -> importance weight > 0. other_bytes: of the checkpoint, not quantized.
    widths: allowed bits (16 = bf16). groups: allowed sizes (0: per channel; 8 bits always are). overrides: the first that
    matches a weight decides its unit. targets: choices are limited to those that all of them hold. losses: where given, they
    replace importance * weights * expected error, and a choice that has none in a unit is not offered to it. step: the decode
    step that a budget of milliseconds is for. Scales may be negative where all targets hold that.
    """

    units: Sequence[Unit]
    scores: Mapping[str, float]
    other_bytes: int = 0
    widths: Sequence[int] = WIDTHS
    groups: Sequence[int] = (32, 64, 128)
    overrides: Sequence[Override] = ()
    targets: Sequence[str] = ()
    method: str = "uniform"
    losses: Losses | None = None
    step: DecodeStep | None = None

    @property
    def numel(self) -> int:
        return sum(unit.numel for unit in self.units)


@dataclass(frozen=True)
class Offer:
    """What one unit may take: every option that its shapes and the targets allow. why: what says so. forced: by an override."""

    options: list[Option]
    why: str
    forced: bool


def allocate(problem: Problem, budget: Budget) -> BitPlan:
    """The plan of least predicted loss within the budget, which is never exceeded.

    Raises UserError for a budget below the floor or above the ceiling (naming both), an override that matches nothing
    or that a target cannot hold, a weight no width fits, a score that is not positive, or a loss that is not finite.
    """
    offered = offers(problem, budget.kind == "latency")
    tables = [undominated(offer.options) for offer in offered]
    return plan_of(problem, offered, solve(tables, capacity(problem, budget, tables)), budget)


def plan_of(problem: Problem, offered: Sequence[Offer], chosen: Sequence[Option], budget: Budget) -> BitPlan:
    """The plan in which each unit takes the option chosen for it."""
    entries: dict[str, Entry] = {}
    for unit, option, offer in zip(problem.units, chosen, offered, strict=True):
        for weight in unit.weights:
            group = _effective(option.choice, weight.shape[1])
            loss = None if problem.losses is None else option.loss * weight.numel / unit.numel
            score = float(problem.scores[unit.name])
            bits, quantizer = option.choice.bits, option.choice.quantizer
            signed = bits != UNQUANTIZED and signed_scales(problem.targets)
            entries[weight.name] = Entry(bits, group, score, offer.why, quantizer, loss, signed)
    total = sum(option.bytes for option in chosen)
    if problem.step is not None and budget.kind == "latency":
        budget = replace(budget, device=problem.step.rates.device)
    return BitPlan(1, problem.method, budget, entries, total * 8 / problem.numel, total)


def reach(problem: Problem) -> tuple[float, float]:
    """The least and the largest average bits that `allocate` can give, scales counted. Raises UserError as it does."""
    low, high = ends([undominated(offer.options) for offer in offers(problem)])
    return _shown(low * 8, problem.numel, 4), _shown(high * 8, problem.numel, 4)


def ends(tables: Sequence[Sequence[Option]]) -> tuple[int, int]:
    """The least and the largest cost of a plan that could be the best of some budget."""
    return sum(rows[0].cost for rows in tables), sum(rows[-1].cost for rows in tables)


def expected_loss(plan: BitPlan, units: Sequence[Unit]) -> float:
    """The sum that the allocator minimised, of a plan that it made: entries' losses, or importance * weights * expected error."""
    total = 0.0
    for weight in (w for unit in units for w in unit.weights):
        entry = plan.entries[weight.name]
        if entry.loss is not None:
            total += entry.loss
        else:
            total += entry.score * weight.numel * expected_error(entry.bits, entry.group_size, entry.signed)
    return total


def offers(problem: Problem, timed: bool = False) -> list[Offer]:
    """What each unit may take; timed: an option costs picoseconds of the decode step, not bytes. Raises UserError."""
    units, overrides, targets = problem.units, problem.overrides, problem.targets
    _check_units(units, problem.scores)
    if timed and problem.step is None:
        raise UserError("a budget of milliseconds is for a decode step on a device; give --device")
    if not problem.widths:
        raise UserError("no bit widths are allowed; give some of 2, 3, 4, 5, 6, 8, 16")
    _check_widths(problem.widths, "widths")
    for group in problem.groups:
        if group not in (PER_CHANNEL, *GROUP_SIZES):
            raise UserError(f"group size {group}; choose from {', '.join(map(str, GROUP_SIZES))} or 0 (per channel)")
    general = [Choice(*pair) for pair in legal_choices(targets, problem.widths, problem.groups)]
    forced = [_forced_choices(override, problem.groups, targets) for override in overrides]
    step = problem.step if timed else None
    used: set[int] = set()
    result = []
    for unit in units:
        names = [weight.name for weight in unit.weights]
        index = next((i for i, o in enumerate(overrides) if any(re.search(o.regex, name) for name in names)), None)
        if index is None:
            choices, why = general, f"importance {problem.scores[unit.name]:.4g}"
        else:
            used.add(index)
            choices, why = forced[index], f"override {overrides[index].regex}"
        fitting = [choice for choice in choices if _fits(choice, unit, targets)]
        if not fitting:
            shapes = ", ".join(f"{w.name} {list(w.shape)}" for w in unit.weights)
            tried = ", ".join(dict.fromkeys(str(choice.bits) for choice in choices))
            raise UserError(f"{shapes}: none of {tried} bits fits the number of inputs; allow 8 or 16 bits for it")
        options = [
            _option(unit, problem.scores[unit.name], choice, loss, signed_scales(targets), step)
            for choice, loss in _with_losses(problem, unit, fitting)
        ]
        result.append(Offer(options, why, index is not None))
    for i, override in enumerate(overrides):
        matches = (re.search(override.regex, weight.name) for unit in units for weight in unit.weights)
        if i not in used and not any(matches):
            example = units[0].weights[0].name
            raise UserError(f"override {override.regex!r} matches no weight; names look like {example}")
    return result


def capacity(problem: Problem, budget: Budget, tables: Sequence[Sequence[Option]]) -> int:
    """What the units may cost together. Raises UserError that names floor and ceiling when no plan is that small or large."""
    floor, ceiling = ends(tables)
    if budget.kind == "latency":
        rest = 0 if problem.step is None else problem.step.rest
        room = math.floor(Fraction(str(budget.value)) * PICOSECONDS) - rest
        low, high = (_shown(end + rest, PICOSECONDS, 6) for end in (floor, ceiling))
        asked, reached = f"a decode step of {budget.value:g} ms", f"from {low} ms to {high} ms (predicted)"
        within = room <= ceiling or budget.value <= high
    else:
        low, high = (_shown(end * 8, problem.numel, 4) for end in (floor, ceiling))
        if budget.kind == "bits":
            room = math.floor(Fraction(str(budget.value)) * problem.numel / 8)
            asked, within = f"{budget.value:g} bits a weight", room <= ceiling or budget.value <= high
        else:
            room = math.floor(budget.value) - problem.other_bytes
            asked, within = f"a size of {math.floor(budget.value)} bytes", room <= ceiling
        reached = (
            f"from {low:g} bits a weight ({floor + problem.other_bytes} bytes with everything unquantized) "
            f"to {high:g} ({ceiling + problem.other_bytes} bytes), scales counted"
        )
    if room < floor:
        raise UserError(f"{asked} is below the floor: the allowed widths and overrides reach {reached}; ask for more")
    if not within:
        raise UserError(f"{asked} is above the ceiling: the allowed widths and overrides reach {reached}; ask for less")
    return room


def _shown(numerator: int, denominator: int, digits: int) -> float:
    """The quotient with so many decimals, rounded up, so that a budget can be typed as it is shown."""
    return float(Fraction(math.ceil(Fraction(numerator * 10**digits, denominator)), 10**digits))


def _check_units(units: Sequence[Unit], scores: Mapping[str, float]) -> None:
    if not units:
        raise UserError("the model has no weights to quantize")
    names = [weight.name for unit in units for weight in unit.weights]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"weight {twice} is in two units; a shared weight belongs to one")
    for unit in units:
        score = scores.get(unit.name)
        if score is None or not (math.isfinite(score) and score > 0):
            raise UserError(f"unit {unit.name} has importance {score}; a positive number is needed")


def _forced_choices(override: Override, groups: Sequence[int], targets: Sequence[str]) -> list[Choice]:
    override.check()
    if override.group is None or override.bits == UNQUANTIZED:
        return [Choice(*pair) for pair in legal_choices(targets, (override.bits,), groups)]
    for target in targets:
        if not legal_group(target, override.bits, override.group):
            raise UserError(
                f"override {override.regex!r}: {target} has no {override.bits}-bit groups of {override.group}; take 0"
            )
    return [Choice(override.bits, override.group)]


def _fits(choice: Choice, unit: Unit, targets: Sequence[str]) -> bool:
    """Whether the unit's shapes pack at this choice and every target runs it."""
    if choice.bits == UNQUANTIZED:
        return True
    for weight in unit.weights:
        if weight.shape[1] % period(choice.bits):
            return False
        group = _effective(choice, weight.shape[1])
        if group != weight.shape[1] and not all(legal_group(target, choice.bits, group) for target in targets):
            return False
    return True


def _with_losses(problem: Problem, unit: Unit, choices: Sequence[Choice]) -> list[tuple[Choice, float | None]]:
    """The choices offered to the unit, with their measured losses where there are any. Raises UserError."""
    if problem.losses is None:
        return [(choice, None) for choice in choices]
    known = problem.losses.get(unit.name, {})
    quantizers: tuple[Quantizer, ...] = ("rtn", "gptq")
    offered: list[tuple[Choice, float | None]] = []
    for choice in (replace(choice, quantizer=by) for choice in choices for by in quantizers):
        loss = known.get(choice)
        if loss is not None:
            if not (math.isfinite(loss) and loss >= 0):
                raise UserError(f"unit {unit.name} has a predicted loss of {loss}; the calibration was not finite")
            offered.append((choice, float(loss)))
    if not offered and all(choice.bits == UNQUANTIZED for choice in choices):
        return [(choices[0], 0.0)]  # not quantized: it loses nothing
    if not offered:
        tried = ", ".join(f"{choice.bits} bits" for choice in choices)
        raise UserError(f"unit {unit.name}: no loss was predicted at {tried}; choose widths that were")
    return offered


def _option(
    unit: Unit, score: float, choice: Choice, loss: float | None, signed: bool, step: DecodeStep | None
) -> Option:
    sized = [(w, _effective(choice, w.shape[1])) for w in unit.weights]
    total = sum(weight_bytes(w, choice.bits, group) for w, group in sized)
    cost = total if step is None else sum(step.picoseconds(w, choice.bits, group) for w, group in sized)
    if loss is None:
        loss = score * sum(w.numel * expected_error(choice.bits, group, signed) for w, group in sized)
    return Option(choice, total, cost, loss)


def _effective(choice: Choice, columns: int) -> int:
    return columns if choice.bits == UNQUANTIZED else effective_group(columns, choice.group_size)
