"""What a unit's terms cost, fitted to measured rows.

Seconds of a token = the sum of its terms, each times a cost. For each runtime and unit, the logarithm of a cost is a mean, plus
deviations of the device's kind, of the device, and of the format of weights and activations. Deviations are shrunk to nothing,
so that a device without rows has its kind's costs, and a format without rows the runtime's. The loss is soft-L1 on log
residuals: damped Gauss-Newton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .work import TERMS, Phase, Work

NOISE = 0.08
"""Of the log of a rate between two measurements of one thing."""

SPREAD = {"mean": 1.5, "kind": 0.5, "device": 0.5, "format": 0.3}
"""Standard deviations of the log of a cost, by what it deviates for; those of the mean are about `REFERENCE`."""

REFERENCE: dict[Phase, dict[str, float]] = {
    "decode": {
        "weights": 25e-12,
        "cache": 40e-12,
        "attention": 20e-12,
        "layers": 20e-6,
        "fixed": 500e-6,
        "recurrent": 50e-6,
        "experts": 100e-6,
    },
    "prefill": {
        "products": 1e-12,
        "attention": 1e-12,
        "weights": 25e-12,
        "layers": 50e-6,
        "recurrent": 20e-6,
        "experts": 1e-12,
    },
}
"""Seconds a term that a fit starts at, of an ordinary phone's GPU."""

_FASTER = {"cpu": 0.3, "gpu": 1.0, "npu": 5.0}  # operations of a prefill, beside the reference
REFERENCE_BANDWIDTH = 80e9
"""Bytes a second of memory that costs by the byte are given for."""
_BY_BANDWIDTH = ("weights", "cache")
_STEPS = 80

Floats = npt.NDArray[np.float64]


class Sample(Protocol):
    """A measured row: its device, the device's kind, and by phase the work and the rate."""

    @property
    def device(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def work(self) -> Any: ...
    @property
    def tokens_per_second(self) -> Any: ...


@dataclass(frozen=True)
class Costs:
    """The costs of one runtime's unit in one phase.

    log_costs: term -> log of the seconds at a bandwidth of 80 GB/s. deviations: "kind:phone", "device:NAME" or
    "format:int4/int8" -> term -> what is added. n: rows it was fitted to."""

    phase: Phase
    log_costs: dict[str, float]
    deviations: dict[str, dict[str, float]]
    n: int

    def seconds(self, work: Work, device: str, kind: str, bandwidth: float | None) -> dict[str, float]:
        """Seconds of one token by term. bandwidth: of the device's memory, bytes/s, where it is known."""
        keys = (f"kind:{kind}", f"device:{device}", f"format:{work.format}")
        parts = {}
        for term, mean in self.log_costs.items():
            log_cost = mean + sum(self.deviations.get(key, {}).get(term, 0.0) for key in keys)
            faster = (bandwidth or REFERENCE_BANDWIDTH) / REFERENCE_BANDWIDTH if term in _BY_BANDWIDTH else 1.0
            parts[term] = work.terms.get(term, 0.0) * float(np.exp(log_cost)) / faster
        return parts

    def knows(self, device: str) -> bool:
        """Whether rows of this device were among those fitted."""
        return f"device:{device}" in self.deviations


def fit(phase: Phase, unit: str, rows: Sequence[Sample], bandwidths: dict[str, float]) -> Costs:
    """The costs of one runtime's unit in one phase, from rows that all have a rate in it.

    bandwidths: device -> bytes/s, of those where it is known.
    """
    terms = TERMS[phase]
    reference = np.array([REFERENCE[phase][term] for term in terms])
    if phase == "prefill":
        quick = np.array([term in ("products", "attention", "experts") for term in terms])
        reference = np.where(quick, reference / _FASTER.get(unit, 1.0), reference)
    amounts = np.array([[row.work[phase].terms.get(term, 0.0) for term in terms] for row in rows]) * reference
    faster = np.array([bandwidths.get(row.device, REFERENCE_BANDWIDTH) / REFERENCE_BANDWIDTH for row in rows])
    for column, term in enumerate(terms):
        if term in _BY_BANDWIDTH:
            amounts[:, column] /= faster
    measured = -np.log([row.tokens_per_second[phase] for row in rows])
    labels = [("mean", f"kind:{r.kind}", f"device:{r.device}", f"format:{r.work[phase].format}") for r in rows]
    names = list(dict.fromkeys(name for label in labels for name in label))
    member = np.array([[names.index(name) for name in label] for label in labels])  # [rows, 4]
    spread = np.repeat([SPREAD[name.partition(":")[0]] for name in names], len(terms))
    logs = _minimize(amounts, measured, member, spread, len(names))
    table = {name: dict(zip(terms, map(float, logs[i]))) for i, name in enumerate(names)}
    mean = table.pop("mean")
    log_costs = {term: mean[term] + float(np.log(reference[i])) for i, term in enumerate(terms)}
    return Costs(phase, log_costs, table, len(rows))


def _minimize(amounts: Floats, measured: Floats, member: npt.NDArray[Any], spread: Floats, names: int) -> Floats:
    """The deviations [names, terms] with the least soft-L1 loss of the rows and the least squares of themselves."""
    count, terms = amounts.shape
    columns = member[:, :, None] * terms + np.arange(terms)  # [rows, 4, terms]
    index = np.arange(count)[:, None, None]

    def parts(logs: Floats) -> tuple[Floats, Floats]:
        each = amounts * np.exp(logs.reshape(names, terms)[member].sum(1))
        return each, each.sum(1)

    def loss(logs: Floats) -> float:
        error = (np.log(parts(logs)[1]) - measured) / NOISE
        return float((2 * (np.sqrt(1 + error**2) - 1)).sum() + ((logs / spread) ** 2).sum())

    logs = np.zeros(names * terms)
    damping, now = 1e-2, loss(logs)
    for _ in range(_STEPS):
        each, total = parts(logs)
        error = (np.log(total) - measured) / NOISE
        weight = 1 / np.sqrt(1 + error**2)
        slopes = np.zeros((count, names * terms))
        np.add.at(slopes, (index, columns), (each / total[:, None] / NOISE)[:, None, :])
        curvature = (slopes * weight[:, None]).T @ slopes + np.diag(1 / spread**2)
        gradient = (slopes * weight[:, None]).T @ error + logs / spread**2
        step = np.linalg.solve(curvature + damping * np.diag(np.diag(curvature)), -gradient)
        step = np.clip(step, -1, 1)
        new = loss(logs + step)
        if new >= now:
            damping *= 4
            if damping > 1e8:
                break
            continue
        logs, damping = logs + step, max(damping / 3, 1e-6)
        now, last = new, now
        if last - now < 1e-6 * last:
            break
    return logs.reshape(names, terms)
