"""How well costs fitted to published rows predict rows that they have not seen: by architecture, by device, by the choice of
unit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from .efficiencies import TAILS, WIDEST, Efficiencies, Interval, fit_efficiencies, interval_of
from .published_rows import Published
from .work import TERMS, Phase

HoldOut = Literal["architecture", "device", "device-but-one-model", "nothing"]

GOOD_CHOICE = 1.15
"""A unit is well chosen if the best one is at most this many times as fast."""

_LEAST_CALIBRATION = 3  # of a model that a device is calibrated with


@dataclass(frozen=True)
class Predicted:
    """A row, its rate as predicted without it, and the interval that should hold the true one four times out of five."""

    row: Published
    phase: Phase
    rate: float
    interval: Interval

    @property
    def error(self) -> float:
        """Of the rate, relative: 0.1 is 10 % too fast."""
        return self.rate / self.row.tokens_per_second[self.phase] - 1

    @property
    def covered(self) -> bool:
        ratio = self.row.tokens_per_second[self.phase] / self.rate
        return self.interval.low <= ratio <= self.interval.high


def predict_rows(rows: Sequence[Published], known: Sequence[Published], hold_out: HoldOut) -> list[Predicted]:
    """Every rate of `rows`, predicted from those of the `known` rows that are not held out.

    hold_out: for "architecture", no model of a row's architecture is known; for "device", no row of its device; for
    "device-but-one-model", each model of a device in turn is known there, and predicts the others of the units it was run on.
    """
    if hold_out == "architecture":
        return _held_out(rows, known, lambda r: r.group, TAILS["architecture"])
    if hold_out == "device":
        return _held_out(rows, known, lambda r: r.device, TAILS["device"])
    if hold_out == "nothing":
        fitted = fit_efficiencies(known)
        return list(_predict(fitted, rows))
    result: list[Predicted] = []
    for device in sorted({r.device for r in rows}):
        own = [r for r in known if r.device == device] or [r for r in rows if r.device == device]
        others = [r for r in known if r.device != device]
        for group in sorted({r.group for r in own}):
            calibration = [r for r in own if r.group == group]
            if len(calibration) < _LEAST_CALIBRATION:
                continue
            covered = {r.key for r in calibration}
            asked = [r for r in rows if r.device == device and r.group != group and r.key in covered]
            result += _predict(fit_efficiencies([*others, *calibration]), asked)
    return result


def _held_out(
    rows: Sequence[Published], known: Sequence[Published], part: Callable[[Published], str], tail: float
) -> list[Predicted]:
    result: list[Predicted] = []
    for name in sorted({part(r) for r in rows}):
        fitted = fit_efficiencies([r for r in known if part(r) != name])
        result += _predict(fitted, [r for r in rows if part(r) == name])
    residuals: dict[tuple[str, str, Phase], list[tuple[str, float]]] = defaultdict(list)
    for p in result:
        residuals[(*p.row.key, p.phase)].append((part(p.row), float(-np.log1p(p.error))))
    # The interval of a row comes from the others' residuals: its own would cover itself.
    return [_with_interval(p, residuals, part(p.row), tail) for p in result]


def _with_interval(
    predicted: Predicted, residuals: dict[tuple[str, str, Phase], list[tuple[str, float]]], own: str, tail: float
) -> Predicted:
    others = [e for name, e in residuals[(*predicted.row.key, predicted.phase)] if name != own]
    pooled = [e for (_, _, phase), all_ in residuals.items() for n, e in all_ if phase == predicted.phase and n != own]
    return replace(predicted, interval=interval_of(others, pooled, tail))


def _predict(fitted: Efficiencies, rows: Iterable[Published]) -> Iterable[Predicted]:
    for row in rows:
        for phase in TERMS:
            if phase not in row.tokens_per_second or not fitted.has(row.runtime, row.unit, phase):
                continue
            prediction = fitted.predict(row.work[phase], row.runtime, row.unit, row.device, row.kind)
            yield Predicted(row, phase, 1 / prediction.seconds, prediction.interval)


def summary(predicted: Sequence[Predicted]) -> dict[str, Any]:
    """By phase: rows, median and 90th percentile of the absolute error, share covered by the interval, and its width as a factor.

    The share and the width are None where nothing was held out that would give an interval. "choices" counts the (model,
    device, context) measured on several units, and the share of them whose predicted best unit is within 15 % of the best."""
    result: dict[str, Any] = {}
    for phase in TERMS:
        own = [p for p in predicted if p.phase == phase]
        if not own:
            continue
        errors = np.abs([p.error for p in own])
        told = any(p.interval != WIDEST for p in own)
        result[phase] = {
            "rows": len(own),
            "median_error": float(np.median(errors)),
            "p90_error": float(np.quantile(errors, 0.9)),
            "covered": float(np.mean([p.covered for p in own])) if told else None,
            "interval_factor": float(np.median([p.interval.high / p.interval.low for p in own])) if told else None,
            "choices": _choices(own),
            "by_runtime": {
                f"{runtime} {unit}": {
                    "rows": len(errors),
                    "median_error": float(np.median(errors)),
                    "p90_error": float(np.quantile(errors, 0.9)),
                }
                for (runtime, unit), errors in _by_runtime(own).items()
            },
        }
    return result


def _by_runtime(predicted: Sequence[Predicted]) -> dict[tuple[str, str], list[float]]:
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    for p in predicted:
        errors[p.row.key].append(abs(p.error))
    return dict(sorted(errors.items()))


def _choices(predicted: Sequence[Predicted]) -> dict[str, float]:
    """How often the unit predicted to be the fastest is within 15 % of the fastest, over what was measured on several units."""
    runs: dict[tuple[str, str, int], list[Predicted]] = defaultdict(list)
    for p in predicted:
        runs[(p.row.model, p.row.device, p.row.context)].append(p)
    good = several = 0
    for run in runs.values():
        if len({p.row.unit for p in run}) < 2:
            continue
        chosen = max(run, key=lambda p: p.rate).row.unit
        best = max(p.row.tokens_per_second[p.phase] for p in run)
        reached = max(p.row.tokens_per_second[p.phase] for p in run if p.row.unit == chosen)
        several += 1
        good += reached >= best / GOOD_CHOICE
    return {"runs": several, "within_15_percent": good / several if several else 1.0}
