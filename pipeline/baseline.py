"""What a plan is compared with: the uniform plan at its budget, and the plan for one target alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..bundle import Generation
from ..calibration.samples import Sample, evenly
from ..checkpoints.checkpoint import Checkpoint
from ..importance.kl import measured_kl
from ..quant.plan import BitPlan
from .request import Progress

COMPARED = 8


"""Samples on which plan and uniform are compared."""


@dataclass(frozen=True)
class Baseline:
    """The uniform plan at the same budget: its average bits, and the mean KL (nats, measured) of the plan and of it."""

    bits: float
    planned: float
    uniform: float


@dataclass(frozen=True)
class SingleTargetPlan:
    """What the plan could be for one target alone, at the same budget: the price of carrying one plan to several.

    widths: those it stores whole. loss_ratio: the joint plan's expected loss (importance * weights * expected relative
    error, predicted) over that of the plan for this target alone; 1 or more.
    """

    widths: tuple[int, ...]
    loss_ratio: float


def _against(
    plan: BitPlan,
    even: BitPlan | None,
    checkpoint: Checkpoint,
    config: dict[str, Any],
    spec: Generation,
    samples: list[Sample],
    progress: Progress,
) -> Baseline | None:
    """The plan and the uniform one measured on some of the data, both rounded to nearest; None where there are no data.

    Data that the scores come from: a plan that loses on these is no plan.
    """
    if even is None or not samples or _widths(plan) == _widths(even):
        return None
    ours, theirs = measured_kl(checkpoint, config, [plan, even], spec, evenly(samples, COMPARED))
    taken = "; uniform is taken" if theirs < ours else ""
    progress(f"mean KL on {COMPARED} samples, rounded to nearest: {ours:.4f} planned, {theirs:.4f} uniform{taken}")
    return Baseline(even.average_bits, ours, theirs)


def _widths(plan: BitPlan) -> dict[str, tuple[int, int]]:
    return {n: (e.bits, e.group_size) for n, e in plan.entries.items()}
