"""What a plan is compared with: the uniform plan at its budget, and the plan for one target alone."""

from __future__ import annotations

from dataclasses import dataclass

from ..calibration.samples import evenly
from ..calibration.source import Source
from ..importance.divergence import measure_of
from ..importance.kl import measured_kl
from ..quant.plan import BitPlan
from .request import Progress

COMPARED = 8
"""Samples on which plan and uniform are compared."""


@dataclass(frozen=True)
class Baseline:
    """The uniform plan at the same budget: its average bits, and the mean divergence (measured) of the plan and of it."""

    bits: float
    planned: float
    uniform: float


@dataclass(frozen=True)
class SingleTargetPlan:
    """What the plan could be for one target alone, at the same budget: the price of carrying one plan to several.

    widths: those that it stores without a wider container. loss_ratio: the joint plan's predicted loss over that of the plan
    for this target alone; 1 or more.
    """

    widths: tuple[int, ...]
    loss_ratio: float


def compare_with_uniform(plan: BitPlan, even: BitPlan | None, source: Source, progress: Progress) -> Baseline | None:
    """The plan and the uniform one, `even`, measured on some of the data, both rounded to nearest; None without data.

    The scores come from these data, too: a plan that loses even on them is refused.
    """
    if even is None or not source.samples or _widths(plan) == _widths(even):
        return None
    ours, theirs = measured_kl(source.over(evenly(source.samples, COMPARED)), [plan, even])
    taken = "; uniform is taken" if theirs < ours else ""
    measure = measure_of(source.generation.task)
    progress(
        f"mean {measure.name} ({measure.unit}) on {COMPARED} samples, rounded to nearest: {ours:.4g} planned, "
        f"{theirs:.4g} uniform{taken}"
    )
    return Baseline(even.average_bits, ours, theirs)


def _widths(plan: BitPlan) -> dict[str, tuple[int, int]]:
    return {n: (e.bits, e.group_size) for n, e in plan.entries.items()}
