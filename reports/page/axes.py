"""Numbers to places on an axis, in per cent, with the marks that a person reads."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, by powers of ten where `log`. label: with its unit."""

    label: str
    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """The place of a value, 0 to 100; outside of the axis its end."""
        if self.log:
            low, high, here = math.log10(self.low), math.log10(self.high), math.log10(max(value, self.low))
        else:
            low, high, here = self.low, self.high, value
        return round(100 * min(1.0, max(0.0, (here - low) / (high - low))), 3)

    @property
    def marks(self) -> list[tuple[float, str]]:
        """(place, text) of about five round numbers; of a long logarithmic axis each power of ten."""
        values = _decades(self.low, self.high) if self.log else _round(self.low, self.high)
        return [(self.at(v), short(v)) for v in values]


def linear(label: str, values: Iterable[float], most: float = 0.0) -> Axis:
    """From 0 to a little more than the largest."""
    high = max([most, *values], default=0.0) or 1.0
    return Axis(label, 0.0, high * 1.05)


def logarithmic(label: str, values: Iterable[float]) -> Axis:
    """Around the positive values, a half or more of a decade wide."""
    known = [v for v in values if v > 0 and math.isfinite(v)] or [1.0]
    low, high = min(known) / 1.4, max(known) * 1.4
    return Axis(label, low, high, log=True)


def short(value: float) -> str:
    """Three digits and a prefix of thousands."""
    for size, prefix in _PREFIXES:
        if abs(value) >= size:
            return f"{value / size:.3g}{prefix}"
    return f"{value:.3g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"


def _round(low: float, high: float) -> list[float]:
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in _STEPS if s * power >= rough * 0.999)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step * 1.0001) + 1)]


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    span = math.log10(high / low)
    parts = (1, 2, 5) if span < 2.2 else (1,)
    every = max(1, round(span / 6))
    values = [part * 10.0**p for p in range(first, last + 1) if p % every == 0 for part in parts]
    return [v for v in values if low <= v <= high]
