"""Every rate of a bundle or a model, device by device: measured here, measured behind links, predicted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..tables import size
from .axes import logarithmic, short
from .charts import Sheet, Span, Spans, Tile
from .facts import BundlePage


@dataclass(frozen=True)
class Rate:
    """Units a second of one test. low, high: an interval of 80 % if predicted, else one standard deviation; None: none is known.

    kind: one of `charts.KINDS`. rate None: an emulated device tells no time.
    """

    device: str
    target: str
    runs_on: str
    test: str
    unit: str
    rate: float | None
    low: float | None
    high: float | None
    kind: str
    note: str
    energy: str
    repeats: str = ""


def rates(page: BundlePage) -> list[Rate]:
    """All of them: this machine first, then devices behind links, then predictions."""
    return [*_here(page), *_linked(page), *(predicted(page.prediction) if page.prediction is not None else ())]


def _here(page: BundlePage) -> Iterator[Rate]:
    for target, measured in page.profiled.targets.items() if page.profiled is not None else ():
        kind = measured.kind.replace("_", "-")
        for row in measured.rows:
            unit = "tokens" if row.test[:2] in ("pp", "tg") else "calls"
            unit = "s of sound" if row.test.startswith("seconds of sound") else unit
            ends = (max(0.0, row.median - row.std), row.median + row.std)
            count = measured.host.threads
            where = f"{count} thread{'s' * (count > 1)}" if isinstance(count, int) else "all cores"
            yield Rate(
                device=measured.host.cpu,
                target=target,
                runs_on=f"CPU, {where}",
                test=row.test,
                unit=unit,
                rate=row.median,
                low=ends[0],
                high=ends[1],
                kind=kind,
                note="",
                energy="not measured",
                repeats=str(row.repeats or ""),
            )


def _linked(page: BundlePage) -> Iterator[Rate]:
    for result in page.devices.devices if page.devices is not None else ():
        name = ", ".join(part for part in (result.about.board, result.about.cpu) if part) or result.device
        for row in (r for r in result.rows if r.answer is None):
            ends: tuple[float | None, float | None] = (None, None)
            if row.median is not None and row.deviation is not None:
                ends = (max(0.0, row.median - row.deviation), row.median + row.deviation)
            energies = row.energy if isinstance(row.energy, tuple) else ()
            told = [f"{e.joules_a_unit:.3g} J ({e.boundary})" for e in energies if e.joules_a_unit is not None]
            yield Rate(
                device=f"{result.device}: {name}",
                target="onnx",
                runs_on=f"onnxruntime {result.about.onnxruntime}",
                test=row.test,
                unit=row.unit,
                rate=row.median,
                low=ends[0],
                high=ends[1],
                kind=row.figure,
                note="",
                energy="; ".join(told) or "not measured",
                repeats=str(row.n or ""),
            )


def predicted(prediction: Mapping[str, Any]) -> Iterator[Rate]:
    """Of the JSON form of a prediction."""
    for row in prediction["rows"]:
        joules = row["joules_per_token"]
        energy = "not known" if joules is None else f"{joules:.3g} J ({row['energy_boundary']})"
        note = row["note"] + (f"; unit chosen: {row['reason']}" if row["reason"] else "")
        yield Rate(
            device=row["device"],
            target=row["target"],
            runs_on=row["unit"],
            test=row["test"],
            unit="tokens",
            rate=row["tokens_per_s"],
            low=row["tokens_per_s_low"],
            high=row["tokens_per_s_high"],
            kind="predicted",
            note=note,
            energy=energy,
        )


def spans(found: list[Rate]) -> list[tuple[str, Spans]]:
    """For each test the devices side by side, the fastest first."""
    charts = []
    for test in dict.fromkeys(r.test for r in found):
        timed = [r for r in found if r.test == test and r.rate]
        if not timed:
            continue
        ends = [v for r in timed for v in (r.rate, r.low, r.high) if v]
        axis = logarithmic(f"{timed[0].unit} a second", ends)
        rows = [
            Span(
                label=r.device,
                note=f"{r.target}, {r.runs_on}",
                at=axis.at(r.rate or 0.0),
                low=None if not r.low else axis.at(r.low),
                high=None if not r.high else axis.at(r.high),
                kind=r.kind,
                value=_rate(r.rate),
            )
            for r in sorted(timed, key=lambda r: -(r.rate or 0.0))
        ]
        charts.append((test, Spans(axis, rows)))
    return charts


def fastest(found: Sequence[Rate], kind: str) -> Tile | None:
    """The highest rate of decoding among those of a kind, with its interval where it is predicted; None without any."""
    decode = [r for r in found if r.kind == kind and r.rate and r.test.startswith("tg")]
    if not decode:
        return None
    best = max(decode, key=lambda r: r.rate or 0.0)
    ends = f", {short(best.low or 0)} to {short(best.high or 0)}" if kind == "predicted" else ""
    return Tile(f"{short(best.rate or 0)} tokens/s", f"{best.test} on {best.device}{ends}", kind)


def memory(prediction: Mapping[str, Any]) -> Sheet | None:
    """Bytes that each target takes, and the devices that have fewer; None where nothing was predicted."""
    rows = [[target, size(held)] for target, held in prediction["memory_bytes"].items()]
    rows += [["does not fit", line] for line in prediction["too_small"]]
    return Sheet(["target", "at least"], rows, frozenset({1}), "predicted") if rows else None


def notes(found: list[Rate]) -> list[str]:
    """What the rows rest on, each said once."""
    return list(dict.fromkeys(f"{r.target} on {r.device}: {r.note}" for r in found if r.note and r.kind == "predicted"))


def table(found: list[Rate]) -> Sheet:
    """Every row, with how its figures were obtained."""
    rows = []
    for r in found:
        between = "" if r.low is None or r.high is None else f"{_rate(r.low)} to {_rate(r.high)}"
        told = "no time is told" if r.rate is None else f"{_rate(r.rate)} {r.unit}/s"
        rows.append([r.device, r.target, r.runs_on, r.test, told, between, r.repeats, r.energy, r.kind])
    head = ["device", "target", "runs on", "test", "rate", "interval", "runs", "energy of a token", "figure"]
    return Sheet(head, rows, frozenset({4, 5, 6, 7}))


def host(page: BundlePage) -> Sheet | None:
    """Load times and memory on this machine; None where nothing was measured."""
    if page.profiled is None or not page.profiled.targets:
        return None
    rows = []
    for target, m in page.profiled.targets.items():
        loads = ["" if s is None else f"{s * 1e3:.0f} ms" for s in (m.load_first_s, m.load_warm_s)]
        held = [m.memory.peak_resident, m.memory.anonymous_after_load, m.memory.anonymous_after_run]
        rows.append([target, m.host.cpu, *loads, *(size(n) if n else "" for n in held)])
    head = ["target", "machine", "first load", "warm load", "peak resident", "anonymous, loaded", "anonymous, after"]
    return Sheet(head, rows, frozenset(range(2, 7)), "measured")


def _rate(rate: float | None) -> str:
    if rate is None:
        return ""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
