"""Predicted time and energy of a call on a device: the device's own costs where it was measured, else those of its like.

A target whose runtime has no published rows on a unit takes the costs of one that has, and its interval is wider for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from .cost_fit import REFERENCE_BANDWIDTH
from .efficiencies import OWN_RUNTIME, Efficiencies, load_efficiencies, peak_of
from .profile import ComputeUnit, DeviceProfile
from .work import Phase, Work

UnitKind = Literal["cpu", "gpu", "npu"]


@dataclass(frozen=True)
class StandIn:
    """The runtime whose costs a target takes. wider: on both ends of the interval. note: for a person."""

    runtime: str
    format: str
    wider: float
    note: str


_LLAMA_CPP = "llama.cpp's published rows on this unit stand in for {}"
STAND_INS: dict[tuple[str, UnitKind], StandIn] = {
    ("onnx", "cpu"): StandIn("geniex_llamacpp", "q4_0/int8", 1.3, _LLAMA_CPP.format("ONNX Runtime's")),
    ("executorch", "cpu"): StandIn("geniex_llamacpp", "q4_0/int8", 1.3, _LLAMA_CPP.format("XNNPACK's")),
    ("coreml", "cpu"): StandIn("geniex_llamacpp", "q4_0/int8", 1.5, _LLAMA_CPP.format("Core ML's")),
    ("coreml", "gpu"): StandIn("geniex_llamacpp", "q4_0/int8", 1.5, _LLAMA_CPP.format("Core ML's")),
    ("coreml", "npu"): StandIn(
        "geniex_qairt", "int4-channel/int16", 1.6, "Qualcomm's published rows on an NPU stand in for Core ML's"
    ),
    ("tensorrt", "gpu"): StandIn("geniex_llamacpp", "q4_0/int8", 1.5, _LLAMA_CPP.format("TensorRT's")),
    ("qnn", "npu"): StandIn("geniex_qairt", "int4-channel/int16", 1.0, "Qualcomm's published rows"),
}
"""Target and unit -> where its costs come from."""

_LIKE = {"tablet": "phone", "gpu": "laptop", "host": "laptop", "npu": "board", "browser": "laptop"}
"""Kinds of device without rows -> the kind whose costs they take."""

_BY_PEAK = ("products", "attention")

_LEAST_WEIGHTS, _SMALL = 100e6, 1.5
"""Bytes below which no model has rows, and how much wider an interval then is: far larger models tell what a layer costs."""


@dataclass(frozen=True)
class Energy:
    """Joules of a call. boundary: what they count, from the supply rail out to the wall."""

    joules: float
    boundary: str


@dataclass(frozen=True)
class Predicted:
    """Seconds of a call on a unit of a device, with an 80 % interval. parts: seconds by term. energy: None where no power is
    known."""

    device: str
    unit: UnitKind
    seconds: float
    low: float
    high: float
    parts: dict[str, float]
    energy: Energy | None
    seen: bool
    note: str


def units_of(target: str, device: DeviceProfile) -> list[ComputeUnit]:
    """The units of the device that can run a target and of which costs are known; [] if it is not known to run it."""
    entry = device.target(target)
    if entry is None:
        return []
    allowed = {entry.unit} if entry.unit is not None else {"cpu", "gpu", "npu"}
    return [unit for unit in device.units if unit.kind in allowed and (target, unit.kind) in STAND_INS]


def fitted_here(target: str, unit: UnitKind, device: str, phase: Phase) -> bool:
    """Whether `devices measure --models` fitted costs of this target to that very device."""
    own = load_efficiencies().costs.get((OWN_RUNTIME, unit, phase)) if target == "onnx" else None
    return own is not None and own.knows(device)


def predict(work: Work, calls: float, target: str, unit: ComputeUnit, device: DeviceProfile) -> Predicted:
    """`calls` times the work of one token.

    target, unit: one of `units_of`. Raises UserError for a faulty file of costs.
    """
    known = load_efficiencies()
    stand_in = STAND_INS[(target, unit.kind)]
    if fitted_here(target, unit.kind, device.name, work.phase):
        stand_in = StandIn(OWN_RUNTIME, work.format, 1.0, "costs that `devices measure --models` fitted here")
    weights, _, activations = stand_in.format.partition("/")
    asked = replace(work, weight_format=weights, activations=activations)
    kind = device.kind if stand_in.runtime == OWN_RUNTIME else _LIKE.get(device.kind, device.kind)
    memory = device.memory.bandwidth
    bandwidth = memory.value if memory is not None else None
    if stand_in.runtime == OWN_RUNTIME:  # fitted to this one machine, whatever its memory reaches
        bandwidth = REFERENCE_BANDWIDTH
    one = known.predict(asked, stand_in.runtime, unit.kind, device.name, kind, bandwidth)
    parts = one.parts
    if not one.seen:
        parts = _by_peak(known, asked, stand_in.runtime, unit, parts)
    seconds = calls * sum(parts.values())
    small = stand_in.runtime != OWN_RUNTIME and work.terms["weights"] * work.tokens < _LEAST_WEIGHTS
    interval = one.interval.wider(stand_in.wider * (_SMALL if small else 1.0))
    power = unit.power
    energy = Energy(seconds * power.watts.value, power.boundary) if power is not None else None
    whose = "rows of this device" if one.seen else f"no rows of this device: costs of a {kind}"
    whose += "; smaller than any model with rows" if small else ""
    parts = {name: calls * part for name, part in parts.items()}
    low, high = seconds / interval.high, seconds / interval.low
    return Predicted(device.name, unit.kind, seconds, low, high, parts, energy, one.seen, f"{stand_in.note}; {whose}")


def _by_peak(
    known: Efficiencies, work: Work, runtime: str, unit: ComputeUnit, parts: Mapping[str, float]
) -> dict[str, float]:
    """Arithmetic at the share of its peak that measured devices reach, where this unit's peak is known."""
    own = peak_of(unit)
    key: tuple[str, str, Phase] = (runtime, unit.kind, work.phase)
    if own is None:
        return dict(parts)
    costs = known.costs[key]
    scaled = dict(parts)
    shares: list[float] = []
    for (device, kind), (of, peak) in known.peaks.items():
        if kind != unit.kind or not costs.knows(device):
            continue
        theirs = costs.seconds(work, device, of, None)
        shares += [float(np.log(theirs[t] * peak / (parts[t] * own))) for t in _BY_PEAK if theirs.get(t)]
    if shares:
        factor = float(np.exp(np.median(shares)))
        for term in _BY_PEAK:
            if term in scaled:
                scaled[term] *= factor
    return scaled
