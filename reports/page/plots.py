"""The plots of a bundle's page: the roofline with the graphs on it, and the cost against the context's length."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .axes import Axis, linear, logarithmic, short
from .charts import Plot, Point, Series, on
from .facts import BundlePage, Call, Curve, Reached, Roof

_ENDLESS = "memory alone"
_WIDE = 8.0
"""Costs that differ by more are drawn by powers of ten."""

TONES = 6
"""Series of one plot that have a colour of their own in the style sheet."""


def rooflines(page: BundlePage) -> list[tuple[str, Plot, list[str]]]:
    """(device, plot, notes) of each device with a unit of which a bandwidth is known. Without a peak its roof has no end.

    The graphs' calls stand on the highest roof of the unit that they run on, the most that it could do; measured and predicted
    rates stand where they are.
    """
    found = []
    for device in dict.fromkeys(roof.device for roof in page.roofs):
        roofs = [r for r in page.roofs if r.device == device]
        whole = [r for r in roofs if r.bandwidth is not None]
        reached = [
            r for r in page.graphs.reached if r.device == device or (device == "host" and r.figure == "measured")
        ]
        used = {row["unit"] for row in page.prediction["rows"] if row["device"] == device} if page.prediction else set()
        chosen = [r for r in whole if r.kind in used or not used]
        if chosen:
            found.append(
                (_called(device, chosen), _roofline(device, chosen, page.graphs.calls, reached), _sources(chosen))
            )
    return found


def _called(device: str, roofs: Sequence[Roof]) -> str:
    return f"this machine, {roofs[0].unit}" if device == "host" else device


def without_roofs(page: BundlePage) -> list[str]:
    """A line for each device that has no plot, which says what its profile lacks."""
    lines = []
    for device in dict.fromkeys(roof.device for roof in page.roofs):
        roofs = [r for r in page.roofs if r.device == device]
        if not any(r.bandwidth is not None for r in roofs):
            lines.append(f"{device}: the bandwidth of its memory is not known, so there is no roof")
    if page.profiled is not None and page.profiled.targets and not any(r.device == "host" for r in page.roofs):
        lines.append("this machine: no roof is known; 'edgewright devices measure' finds it")
    return lines


def _roofline(device: str, roofs: Sequence[Roof], calls: Sequence[Call], reached: Sequence[Reached]) -> Plot:
    intensities = [c.intensity for c in calls] + [r.intensity for r in reached]
    ridges = [peak / r.bandwidth[0] for r in roofs if r.bandwidth for peak, _ in r.peaks.values()]
    ends = {r.kind: dict(r.peaks) or {_ENDLESS: (math.inf, "")} for r in roofs}
    x = logarithmic("operations a byte", [*intensities, *ridges])
    tops = [peak for r in roofs for peak, _ in r.peaks.values()] or [_bound(roofs, x.high)]
    lows = [_bound(roofs, c.intensity) for c in calls] + [r.low for r in reached] + [r.rate for r in reached]
    y = logarithmic("operations a second", [*tops, *lows])
    series = [_roof_line(r, name, peak, x, y) for r in roofs for name, (peak, _) in ends[r.kind].items()]
    graphs: dict[tuple[str, str], list[Point]] = {}
    for call in calls:
        bound = _bound(roofs, call.intensity)
        tip = (
            f"{call.graph}, {call.phase} of {call.tokens} token{'s' * (call.tokens > 1)}, {call.target}: "
            f"{call.intensity:.3g} operations a byte ({short(call.operations)} operations, {short(call.bytes)}B); "
            f"at most {short(bound)} operations a second here"
        )
        graphs.setdefault((call.graph, call.phase), []).append(on(x, y, (call.intensity, bound), None, tip))
    for i, ((graph, phase), points) in enumerate(graphs.items()):
        series.append(Series(f"{graph}, {phase}: its bound", f"t{i % TONES}", "counted", "points", points))
    for kind in dict.fromkeys(r.figure for r in reached):
        points = [
            on(
                x,
                y,
                (r.intensity, r.rate),
                (r.low, r.high),
                f"{r.target} {r.test}: {short(r.rate)} operations a second",
            )
            for r in reached
            if r.figure == kind
        ]
        series.append(Series(f"rate, {kind}", "rate", kind, "points", points))
    return Plot(x, y, series, f"Roofline of {device}: what bounds each graph, and what it reaches")


def _roof_line(roof: Roof, name: str, peak: float, x: Axis, y: Axis) -> Series:
    """The memory's slope up to the peak of a type, then the peak."""
    assert roof.bandwidth is not None
    bandwidth = roof.bandwidth[0]
    start = max(x.low, y.low / bandwidth)
    edge = min(max(peak / bandwidth, start), x.high, y.high / bandwidth)
    ends = [start, edge, *([x.high] if math.isfinite(peak) else [])]
    points = [on(x, y, (at, min(peak, at * bandwidth)), None, "") for at in ends]
    most = f", {short(peak)}" if math.isfinite(peak) else ""
    return Series(f"roof of the {roof.kind}, {name}{most}", "roof", "", "line", points)


def _bound(roofs: Sequence[Roof], intensity: float) -> float:
    """Operations a second under the highest roof."""
    found = []
    for r in roofs:
        assert r.bandwidth is not None
        peaks = [peak for peak, _ in r.peaks.values()] or [math.inf]
        found.append(min(max(peaks), intensity * r.bandwidth[0]))
    return max(found)


def _sources(roofs: Sequence[Roof]) -> list[str]:
    lines = []
    for r in roofs:
        assert r.bandwidth is not None
        told = [f"{kind} {short(peak)} operations/s ({source})" for kind, (peak, source) in r.peaks.items()]
        peaks = ", ".join(told) or "the peak of its arithmetic is not known"
        lines.append(f"{r.unit} ({r.kind}): memory {short(r.bandwidth[0])}B/s ({r.bandwidth[1]}), {peaks}")
    return lines


def context_cost(page: BundlePage) -> Plot | None:
    """Milliseconds of a token against what comes before it: predicted with its interval, and what was measured here."""
    curves, measured = page.graphs.curves, _measured_costs(page)
    if not curves and not measured:
        return None
    lengths = [float(n) for c in curves for n, *_ in c.points] + [n for _, n, *_ in measured]
    x = linear(page_axis(page), lengths)
    ends = [ms for c in curves for _, *those in c.points for ms in those] + [
        ms for _, _, *those in measured for ms in those
    ]
    wide = min(ends) > 0 and max(ends) / min(ends) > _WIDE
    y = logarithmic("ms a token", ends) if wide else linear("ms a token", ends)
    series = [_curve(c, i, x, y) for i, c in enumerate(curves)]
    for i, target in enumerate(dict.fromkeys(t for t, *_ in measured)):
        points = [
            on(x, y, (n, ms), (low, high), f"{target} on this machine: {ms:.3g} ms behind {n:.0f} tokens")
            for t, n, ms, low, high in measured
            if t == target
        ]
        series.append(Series(f"{target}, this machine", f"t{(len(curves) + i) % TONES}", "measured", "points", points))
    return Plot(x, y, series, "Milliseconds of a token against the length of the context")


def page_axis(page: BundlePage) -> str:
    """What the tokens before a token are."""
    task = page.manifest.generation.task
    return {"seq2seq": "tokens of the source", "embed": "tokens of the text"}.get(task, "tokens before it")


def _curve(curve: Curve, number: int, x: Axis, y: Axis) -> Series:
    points = [
        on(
            *(x, y, (float(n), ms), (low, high)),
            f"{curve.target} on {curve.device}: {ms:.3g} ms ({low:.3g} to {high:.3g}) behind {n} tokens",
        )
        for n, ms, low, high in curve.points
    ]
    return Series(f"{curve.target} on {curve.device} ({curve.unit})", f"t{number % TONES}", "predicted", "band", points)


def _measured_costs(page: BundlePage) -> list[tuple[str, float, float, float, float]]:
    """(target, tokens before, ms, low, high) of the rows of decode steps. A deviation counts up to three quarters of the rate."""
    found = []
    for target, measured in page.profiled.targets.items() if page.profiled is not None else ():
        for row in measured.rows:
            if row.test.startswith("tg") and row.median:
                depth = row.test.rpartition("@ d")[2] if "@ d" in row.test else "0"
                ends = (1e3 / (row.median + row.std), 1e3 / max(row.median - row.std, row.median / 4))
                if depth.isdecimal() and len(depth) < 9:
                    found.append((target, float(depth), 1e3 / row.median, *ends))
    return found
