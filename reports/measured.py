"""What `profile --device URL` prints: rows of devices as Markdown, JSON or CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from ..measuring.measure import DeviceResult, Energy, MeasuredRow, State
from .sheets import Sheet

_MIB = 1 << 20
_NONE = "not measured"


def measured_json(results: Sequence[DeviceResult]) -> list[dict[str, Any]]:
    return [result.model_dump(mode="json") for result in results]


def measured_text(results: Sequence[DeviceResult], output_format: str) -> str:
    """Results in the format "md", "json" or "csv" (the rows alone)."""
    if output_format == "json":
        return json.dumps(measured_json(results), indent=1)
    if output_format == "csv":
        return _csv(results)
    sheets = [_rates(results), _states(results), _devices(results)]
    missing = [[r.device, test, why] for r in results for test, why in r.not_measured.items()]
    if missing:
        sheets.append(Sheet(["device", "not measured", "why"], missing))
    return "\n\n".join(s.markdown() for s in sheets)


def _timed(result: DeviceResult) -> list[MeasuredRow]:
    """The rows but for answers, which have no time."""
    return [row for row in result.rows if row.answer is None]


def _rates(results: Sequence[DeviceResult]) -> Sheet:
    rows = []
    for result in results:
        for row in _timed(result):
            rate = "no time is told" if row.rate is None else f"{row.rate:.2f} ± {row.deviation or 0.0:.2f}"
            median = "" if row.median is None else f"{row.median:.2f}"
            unit = "" if row.unit == "tokens" else f" {row.unit}/s"
            rows.append(
                [
                    result.device,
                    _runtime(result),
                    row.test,
                    rate + unit,
                    median,
                    str(row.n),
                    _held(row),
                    _energy(row),
                    row.figure,
                ]
            )
    return Sheet(["device", "runtime", "test", "t/s", "median", "n", "sustained t/s", "energy", "figure"], rows)


def _states(results: Sequence[DeviceResult]) -> Sheet:
    rows = [
        [
            result.device,
            row.test,
            _clock(row.before),
            _clock(row.after),
            _heat(row.before),
            _heat(row.after),
            _cool(row),
            _peak(row),
        ]
        for result in results
        for row in _timed(result)
    ]
    head = ["device", "test", "MHz before", "after", "°C before", "after", "cool", "peak resident, MiB"]
    return Sheet(head, rows)


def _devices(results: Sequence[DeviceResult]) -> Sheet:
    rows = []
    for result in results:
        about = result.about
        name = ", ".join(
            part for part in (about.board, about.cpu, f"{about.cores} cores" if about.cores else "") if part
        )
        loads = [_NONE if s is None else f"{s * 1e3:.0f}" for s in (result.load_s, result.load_again_s)]
        settings = "; ".join(f"{setting} ({why})" for setting, why in result.settings.items())
        rows.append([result.device, name, about.system, *loads, _answer(result), settings or "none"])
    return Sheet(["device", "what it is", "system", "first load, ms", "warm load, ms", "answer", "settings"], rows)


def _csv(results: Sequence[DeviceResult]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["device", "runtime", "figure", "test", "unit", "rate", "std", "median", "repeats", "sustained", "settled"]
    writer.writerow([*head, "energy_source", "energy_boundary", "joules_a_unit"])
    for result in results:
        for row in _timed(result):
            held = row.sustained
            start = [
                result.device,
                _runtime(result),
                row.figure,
                row.test,
                row.unit,
                row.rate,
                row.deviation,
                row.median,
                row.n,
            ]
            start += [held.rate, held.settled] if held is not None else ["", ""]
            energies = [e for e in row.energy if isinstance(e.joules, float)] if isinstance(row.energy, tuple) else []
            for energy in energies:
                writer.writerow([*start, energy.source, energy.boundary, energy.joules_a_unit])
            if not energies:
                writer.writerow([*start, _NONE, "", ""])
    return out.getvalue().rstrip("\n")


def _runtime(result: DeviceResult) -> str:
    return f"onnxruntime {result.about.onnxruntime}"


def _energy(row: MeasuredRow) -> str:
    """Joules a unit by source; of a sustained run, where there is one: it is the longer."""
    energies = row.energy if row.sustained is None else row.sustained.energy
    if not isinstance(energies, tuple):
        return _NONE
    return "; ".join(_told(energy) for energy in energies)


def _told(energy: Energy) -> str:
    if isinstance(energy.joules, str) or energy.joules_a_unit is None:
        return f"{energy.source}: {energy.joules}"
    return f"{energy.joules_a_unit:.3g} J ({energy.boundary}: {energy.source})"


def _clock(state: State | None) -> str:
    """Of each cluster."""
    if state is None or isinstance(state.clocks, str):
        return _NONE
    return " / ".join(f"{cluster.mhz:.0f}" for cluster in state.clocks if cluster.mhz is not None) or _NONE


def _heat(state: State | None) -> str:
    """The hottest sensor, and what the system says of throttling."""
    if state is None:
        return _NONE
    parts = [f"{max(state.celsius.values()):.0f}"] if isinstance(state.celsius, dict) and state.celsius else []
    return ", ".join(parts + ([state.throttling] if state.throttling != _NONE else [])) or _NONE


def _cool(row: MeasuredRow) -> str:
    cool, waited = row.cool.get("cool"), row.cool.get("waited_s")
    if not isinstance(cool, bool):
        return _NONE
    return ("yes" if cool else "no") + (
        f", waited {waited:.0f} s" if isinstance(waited, int | float) and waited >= 1 else ""
    )


def _peak(row: MeasuredRow) -> str:
    peak = row.memory.get("peak_resident") if isinstance(row.memory, dict) else None
    return _NONE if peak is None else f"{peak / _MIB:.0f}"


def _held(row: MeasuredRow) -> str:
    """The sustained rate; "" where none was asked for."""
    if row.sustained is None:
        return ""
    settled = "" if row.sustained.settled else ", not settled"
    return f"{row.sustained.rate:.2f} after {row.sustained.seconds:.0f} s{settled}"


def _answer(result: DeviceResult) -> str:
    """How much of this machine's answer the device gave, from the first token on."""
    told = next((row.answer for row in result.rows if row.answer is not None), None)
    here = result.answer_here
    if told is None or here is None:
        return "not asked"
    same = next((n for n, (a, b) in enumerate(zip(told, here, strict=False)) if a != b), min(len(told), len(here)))
    return f"{same} of {max(len(told), len(here))} tokens as here"
