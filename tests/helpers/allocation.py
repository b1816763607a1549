"""Allocations as tests write them: in one line, a problem's fields and a budget side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgewright.quant.allocator import Problem, allocate
from edgewright.quant.plan import BitPlan, Budget, Unit


def allocated(
    units: Sequence[Unit],
    scores: Mapping[str, float],
    *,
    bits: float | None = None,
    size: int | None = None,
    latency_ms: float | None = None,
    **problem: Any,
) -> BitPlan:
    """The plan of `Problem(units, scores, **problem)` within the one budget that is given."""
    return allocate(Problem(units, scores, **problem), Budget.of(bits, size, latency_ms))
