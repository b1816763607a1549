"""The units of a model, the choices that each could take, and what a choice is expected to cost without data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..quant.expected_error import expected_error
from ..quant.plan import UNQUANTIZED, Choice, Unit
from ..quant.rtn import effective_group
from ..targets.storage import PER_CHANNEL

Losses = dict[str, dict[Choice, float]]
"""Unit name -> choice -> loss in nats a token."""


@dataclass(frozen=True)
class Candidates:
    """What losses are wanted for. signed: whether scales may be negative."""

    units: Sequence[Unit]
    choices: Sequence[Choice]
    signed: bool = False


def unit_losses(
    unit: Unit, choices: Iterable[Choice], at: Callable[[str, Choice], float | None]
) -> dict[Choice, float]:
    """The loss of a unit at each choice that all its weights have one for. at: (weight's name, choice) -> its loss."""
    losses: dict[Choice, float] = {}
    for choice in choices:
        parts = [at(w.name, choice) for w in unit.weights]
        if all(p is not None for p in parts):
            losses[choice] = sum(p for p in parts if p is not None)
    return losses


def relative_error(choice: Choice, columns: int, signed: bool) -> float:
    """The expected relative squared error of `choice` on a weight of `columns` inputs, from the table."""
    group = PER_CHANNEL if choice.bits == UNQUANTIZED else effective_group(columns, choice.group_size)
    return expected_error(choice.bits, group, signed)


def expected_of(unit: Unit, choice: Choice, signed: bool) -> float:
    """The expected relative squared error of `choice` times weights, summed over the unit."""
    return sum(w.numel * relative_error(choice, w.shape[1], signed) for w in unit.weights)


def extrapolated(unit: Unit, choices: Iterable[Choice], at: Choice, loss: float, signed: bool) -> dict[Choice, float]:
    """The losses of a unit from its `loss` at one choice, in the ratio of expected errors."""
    base = expected_of(unit, at, signed)
    return {choice: loss * expected_of(unit, choice, signed) / base for choice in choices}


def fill_unreached(candidates: Candidates, losses: Mapping[str, Mapping[Choice, float]]) -> Losses:
    """`losses` with those of units that no data reached: for each weight the median of all others, RTN alone."""
    choices, signed = candidates.choices, candidates.signed
    rates = []
    for unit in candidates.units:
        known = losses.get(unit.name)
        reference = next((c for c in choices if known and c in known and c.bits != UNQUANTIZED), None)
        if known and reference is not None:
            rates.append(known[reference] / expected_of(unit, reference, signed))
    middle = sorted(rates)[len(rates) // 2] if rates else 1.0
    filled = {name: dict(of) for name, of in losses.items()}
    for unit in candidates.units:
        if not filled.get(unit.name):
            filled[unit.name] = {
                c: middle * expected_of(unit, c, signed)
                for c in choices
                if c.quantizer == "rtn" or c.bits == UNQUANTIZED
            }
    return filled
