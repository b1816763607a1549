"""The costs of every runtime and unit that rows are known of, and predictions from them, each with an 80 % interval.

They live in one file, `data/efficiencies.json`, made by `devices calibrate`; a user's file takes its place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import UserError
from .cost_fit import Costs, fit
from .published_rows import Published, published_devices
from .work import TERMS, Phase, Work

_LEAST = 20  # residuals that have quantiles of their own
_WIDEST = (0.4, 2.5)
TAILS = {"architecture": 0.06, "device": 0.03}
"""Quantiles that hold four of five rates of what was held out. Rows of one architecture, and of one device, err alike, so they lie
outside of the nominal 0.1; RESULTS.md has what they cover."""

FALLS_BACK: dict[tuple[str, str], tuple[str, ...]] = {("geniex_llamacpp", "npu"): ("experts",)}
"""Runtime and unit -> terms that it has no kernels for: the CPU computes a model that has them."""


@dataclass(frozen=True)
class Interval:
    """Factors on a predicted rate between which the true one lies four times out of five."""

    low: float
    high: float


@dataclass(frozen=True)
class Prediction:
    """Seconds of one token, their parts by term, and the interval of the rate."""

    seconds: float
    parts: dict[str, float]
    interval: Interval
    seen: bool


@dataclass(frozen=True)
class Efficiencies:
    """Costs by (runtime, unit, phase), and intervals by the same and whether the device's rows were fitted."""

    costs: dict[tuple[str, str, Phase], Costs]
    intervals: dict[tuple[str, str, Phase, bool], Interval] = field(default_factory=dict)
    bandwidths: dict[str, float] = field(default_factory=dict)

    def has(self, runtime: str, unit: str, phase: Phase) -> bool:
        return (runtime, unit, phase) in self.costs

    def predict(self, work: Work, runtime: str, unit: str, device: str, kind: str) -> Prediction:
        """One token. Raises UserError for a runtime and unit without rows."""
        if not self.has(runtime, unit, work.phase):
            known = ", ".join(sorted({f"{r} on {u}" for r, u, _ in self.costs}))
            raise UserError(f"no rows of {runtime} on {unit} are known; known: {known}")
        costs = self.costs[(runtime, unit, work.phase)]
        parts = costs.seconds(work, device, kind, self.bandwidths.get(device))
        seen = costs.knows(device)
        if any(work.terms.get(term) for term in FALLS_BACK.get((runtime, unit), ())):
            slower = self.costs.get((runtime, "cpu", work.phase))
            on_cpu = slower.seconds(work, device, kind, self.bandwidths.get(device)) if slower is not None else parts
            parts = max(parts, on_cpu, key=lambda p: sum(p.values()))
        interval = self.intervals.get((runtime, unit, work.phase, seen), Interval(*_WIDEST))
        return Prediction(sum(parts.values()), parts, interval, seen)


def fit_efficiencies(rows: Sequence[Published]) -> Efficiencies:
    """The costs of every runtime and unit in the rows, without intervals."""
    bandwidths = {
        p.name: p.memory.bandwidth.value for p in published_devices().values() if p.memory.bandwidth is not None
    }
    groups: dict[tuple[str, str, Phase], list[Published]] = defaultdict(list)
    for row in rows:
        for phase in TERMS:
            if phase in row.tokens_per_second:
                groups[(row.runtime, row.unit, phase)].append(row)
    costs = {key: fit(key[2], key[1], own, bandwidths) for key, own in groups.items()}
    return Efficiencies(costs, bandwidths=bandwidths)


def intervals(residuals: Sequence[float], pooled: Sequence[float], tail: float) -> Interval:
    """From log(true rate / predicted rate) of rows held out; those of all runtimes where these are few. tail: the lower quantile."""
    taken = residuals if len(residuals) >= _LEAST else pooled
    if len(taken) < _LEAST:
        return Interval(*_WIDEST)
    low, high = np.exp(np.quantile(taken, [tail, 1 - tail])).tolist()
    return Interval(low, high)
