"""The costs of every runtime and unit that rows are known of, and predictions from them, each with an 80 % interval.

They ship in one file, `data/efficiencies.json`, made by `devices calibrate`; a user's own file takes its place.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import UserError
from ..system.reading import MEBIBYTE, one_line, read_text
from .cost_fit import Costs, fit
from .profile import ComputeUnit, user_folder
from .published_rows import Published, published_devices
from .work import TERMS, Phase, Work

SHIPPED = Path(__file__).parent / "data" / "efficiencies.json"
SHIPPED_SOURCE = "qai-hub-models 0.65.0 (BSD-3), published speeds of language models"
_SIZE_LIMIT = 4 * MEBIBYTE

TAILS = {"architecture": 0.06, "device": 0.03}
"""Quantiles that hold four of five rates of what was held out. Rows of one architecture, and of one device, err alike, so they lie
outside of the nominal 0.1."""

_LEAST = 20  # residuals that have quantiles of their own

FALLS_BACK: dict[tuple[str, str], tuple[str, ...]] = {("geniex_llamacpp", "npu"): ("experts",)}
"""Runtime and unit -> terms that it has no kernels for: the CPU computes a model that has them."""

Positive = Annotated[float, Field(gt=0, lt=1e9, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Interval(_Strict):
    """Factors on a predicted rate between which the true one lies four times out of five."""

    low: Positive
    high: Positive

    def wider(self, factor: float) -> Interval:
        """Both ends further out by a factor."""
        return Interval(low=self.low / factor, high=self.high * factor)


OWN_RUNTIME = "onnxruntime"
"""The runtime of the costs that `devices measure --models` fits to this machine."""

WIDEST = Interval(low=0.4, high=2.5)
"""Where nothing was held out that would tell."""


class Entry(_Strict):
    """The costs of one runtime's unit in one phase.

    version: of the runtime, or of the table that has its rows. costs: seconds a term at 80 GB/s. spread: term -> standard
    deviation of its log over the devices. deviations: as `Costs` has them. known, unseen: intervals for a device with rows, and
    for another."""

    runtime: Annotated[str, Field(min_length=1, max_length=80)]
    version: Annotated[str, Field(max_length=80)]
    unit: Literal["cpu", "gpu", "npu"]
    phase: Literal["decode", "prefill"]
    n: Annotated[int, Field(ge=1)]
    source: Annotated[str, Field(max_length=1000)]
    costs: dict[str, Positive]
    spread: dict[str, Annotated[float, Field(ge=0, lt=100)]]
    deviations: dict[str, dict[str, Annotated[float, Field(gt=-50, lt=50)]]]
    known: Interval
    unseen: Interval

    @property
    def fitted(self) -> Costs:
        logs = {term: float(np.log(cost)) for term, cost in self.costs.items()}
        return Costs(self.phase, logs, {k: dict(v) for k, v in self.deviations.items()}, self.n)


class _File(_Strict):
    version: Literal[1]
    entries: Annotated[tuple[Entry, ...], Field(strict=False, max_length=1000)]


@dataclass(frozen=True)
class Prediction:
    """Seconds of one token, their parts by term, the interval of the rate, and whether rows of the device were fitted."""

    seconds: float
    parts: dict[str, float]
    interval: Interval
    seen: bool


@dataclass(frozen=True)
class Efficiencies:
    """Costs by (runtime, unit, phase). intervals: those of devices with rows and of others. bandwidths: of the devices, bytes/s.

    peaks: (device, unit) -> the device's kind, and the peak rate that units of this kind are compared by.
    """

    costs: dict[tuple[str, str, Phase], Costs]
    bandwidths: dict[str, float]
    intervals: dict[tuple[str, str, Phase], tuple[Interval, Interval]]
    peaks: dict[tuple[str, str], tuple[str, float]] = field(default_factory=dict)

    def has(self, runtime: str, unit: str, phase: Phase) -> bool:
        """Whether there are costs of this runtime on this unit."""
        return (runtime, unit, phase) in self.costs

    def predict(
        self, work: Work, runtime: str, unit: str, device: str, kind: str, bandwidth: float | None = None
    ) -> Prediction:
        """One token. bandwidth: of the device, for one that has no profile. Raises UserError for a runtime and unit without
        rows."""
        key = (runtime, unit, work.phase)
        if key not in self.costs:
            known = ", ".join(sorted({f"{r} on {u}" for r, u, _ in self.costs}))
            raise UserError(f"no rows of {runtime} on {unit} are known; known: {known}")
        costs, reach = self.costs[key], bandwidth or self.bandwidths.get(device)
        parts, seen = costs.seconds(work, device, kind, reach), costs.knows(device)
        if any(work.terms.get(term) for term in FALLS_BACK.get((runtime, unit), ())):
            slower = self.costs.get((runtime, "cpu", work.phase))
            on_cpu = slower.seconds(work, device, kind, reach) if slower is not None else parts
            parts = max(parts, on_cpu, key=lambda p: sum(p.values()))
        familiar, unfamiliar = self.intervals.get(key, (WIDEST, WIDEST))
        return Prediction(sum(parts.values()), parts, familiar if seen else unfamiliar, seen)


def fit_efficiencies(rows: Sequence[Published]) -> Efficiencies:
    """The costs of every runtime and unit in the rows, without intervals."""
    groups: dict[tuple[str, str, Phase], list[Published]] = defaultdict(list)
    for row in rows:
        for phase in TERMS:
            if phase in row.tokens_per_second:
                groups[(row.runtime, row.unit, phase)].append(row)
    bandwidths = known_bandwidths()
    return Efficiencies({key: fit(key[2], key[1], own, bandwidths) for key, own in groups.items()}, bandwidths, {})


def known_bandwidths() -> dict[str, float]:
    """Device -> bytes/s of its main memory, of those whose profile has it."""
    return {p.name: p.memory.bandwidth.value for p in published_devices().values() if p.memory.bandwidth is not None}


def peak_of(unit: ComputeUnit) -> float | None:
    """The peak that a unit's kind is compared by: int8 of an NPU, else float32; None where it is not known."""
    if unit.peak is None:
        return None
    rate = unit.peak.int8 if unit.kind == "npu" else unit.peak.fp32
    return None if rate is None else rate.value


def _known_peaks() -> dict[tuple[str, str], tuple[str, float]]:
    return {
        (p.name, unit.kind): (p.kind, peak)
        for p in published_devices().values()
        for unit in p.units
        if (peak := peak_of(unit)) is not None
    }


def interval_of(residuals: Sequence[float], pooled: Sequence[float], tail: float) -> Interval:
    """From log(true rate / predicted rate) of rows held out; those of all runtimes where these are few. tail: the lower
    quantile."""
    taken = residuals if len(residuals) >= _LEAST else pooled
    if len(taken) < _LEAST:
        return WIDEST
    low, high = np.exp(np.quantile(taken, [tail, 1 - tail])).tolist()
    return Interval(low=min(low, 1.0), high=max(high, 1.0))


def to_json(entries: Sequence[Entry]) -> str:
    """The file's text; numbers have five digits."""

    def short(value: object) -> object:
        if isinstance(value, float):
            return float(f"{value:.5g}")
        if isinstance(value, dict):
            return {k: short(v) for k, v in value.items()}
        return value

    return json.dumps({"version": 1, "entries": [short(e.model_dump()) for e in entries]}, indent=1) + "\n"


def user_file() -> Path:
    """Where `devices calibrate` keeps a user's own costs. Raises UserError."""
    return user_folder().parent / "efficiencies.json"


def load_efficiencies(path: Path | None = None) -> Efficiencies:
    """The costs in a file; without one, the user's, or those that ship. Raises UserError for a file that is none."""
    if path is None:
        own = user_file()
        path = own if own.exists() else SHIPPED
    return _loaded(path, os.stat(path).st_mtime_ns if path.exists() else 0)


def read_entries(path: Path | None = None) -> tuple[Entry, ...]:
    """What a file holds; without one, the user's, or that which ships. Raises UserError for a file that is none."""
    if path is None:
        own = user_file()
        path = own if own.exists() else SHIPPED
    text = read_text(path, _SIZE_LIMIT)
    try:
        return _File.model_validate_json(text).entries
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = one_line(".".join(map(str, first["loc"])), 100)
        raise UserError(
            f"{one_line(path)}: no costs that `devices calibrate` wrote ({where}: {one_line(first['msg'], 100)}); run it again"
        ) from None


@lru_cache(maxsize=4)
def _loaded(path: Path, _changed: int) -> Efficiencies:
    entries = read_entries(path)
    return Efficiencies(
        {(e.runtime, e.unit, e.phase): e.fitted for e in entries},
        known_bandwidths(),
        {(e.runtime, e.unit, e.phase): (e.known, e.unseen) for e in entries},
        _known_peaks(),
    )
