"""The page of one bundle: `profile BUNDLE -o report.html`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..tables import size
from . import device_rows, sections
from .axes import short
from .charts import Sheet, Tile
from .facts import BundlePage, bundle_page
from .plots import context_cost, rooflines, without_roofs
from .render import render

NAV = (
    *(("about", "Bundle"), ("quality", "Quality"), ("bytes", "Bytes"), ("roofline", "Roofline"), ("layers", "Layers")),
    *(("context", "Context"), ("placement", "Placement"), ("devices", "Devices"), ("simulated", "Simulated")),
)


def bundle_html(path: Path, **found: Any) -> str:
    """The page of a bundle, with its kept reports. found: as `facts.bundle_page` takes it. Errors as of that."""
    return page_html(bundle_page(path, **found))


def page_html(page: BundlePage) -> str:
    """The page of what was gathered."""
    m = page.manifest
    found = device_rows.rates(page)
    layer_bars, widths = sections.bytes_by_layer(page)
    placed, not_placed = sections.placement(page)
    prediction = page.prediction or {"assumptions": [], "memory_bytes": {}, "too_small": []}
    missing = page.profiled.not_measured if page.profiled is not None else {}
    values = {
        "title": m.source.rstrip("/").rpartition("/")[2] or page.name,
        "what": "bundle report",
        "lead": f"{_kind(page)}, {m.weights:,} weights at {m.average_bits:.2f} bits, for "
        f"{', '.join(t.format for t in m.targets)}. Bundle: {page.name}.",
        "nav": NAV,
        "assumptions": prediction["assumptions"],
        "tiles": tiles(page, found),
        "about": sections.about(page),
        "targets": sections.targets(page),
        "quality": sections.quality(page),
        "checked_at": page.checked_at,
        "layer_bars": layer_bars,
        "width_legend": [(f"w{bits}", f"{bits} bits", "") for bits in widths],
        "rooflines": rooflines(page),
        "not_roofs": without_roofs(page),
        "calls": _calls(page),
        "layer_times": list(sections.time_by_layer(page)),
        "op_times": sections.time_by_op(page),
        "without_layers": sections.without_layers(page),
        "context_cost": context_cost(page),
        "placement": placed,
        "not_placed": not_placed,
        "ops": sections.ops(page),
        "spans": device_rows.spans(found),
        "rates": device_rows.table(found),
        "rate_notes": device_rows.notes(found),
        "host": device_rows.host(page),
        "memory": device_rows.memory(prediction),
        "not_measured": [f"{t}: not measured on this machine: {why}" for t, why in missing.items()],
        "simulated": sections.simulated(page),
    }
    return render("bundle.html.j2", values)


def tiles(page: BundlePage, found: Sequence[device_rows.Rate]) -> list[Tile]:
    """The few figures that one looks for first."""
    stored = min((page.file_bytes[t.format] for t in page.manifest.targets), default=0)
    least = next((t.format for t in page.manifest.targets if page.file_bytes[t.format] == stored), "")
    chosen = [Tile(size(stored), f"to ship, {least}", "counted")]
    chosen.append(Tile(f"{page.manifest.average_bits:.2f} bits", "a weight, scales counted", "counted"))
    if page.verified is not None:
        passed = sum(t.passed for t in page.verified.targets)
        whole = len(page.verified.targets)
        chosen.append(Tile(f"{passed} of {whole}", f"targets passed '{page.checked_at}'", "measured"))
        if (loss := page.verified.loss) is not None and loss.rms is None:
            chosen.append(Tile(f"{loss.top1:.1%}", "same best token as the original", "measured"))
    best = (device_rows.fastest(found, kind) for kind in ("measured", "predicted"))
    return [*chosen, *(tile for tile in best if tile is not None)]


def _kind(page: BundlePage) -> str:
    words = sections.TASKS[page.manifest.generation.task].partition(":")[0]
    return words[0].upper() + words[1:]


def _calls(page: BundlePage) -> Sheet | None:
    rows = [
        [c.target, c.graph, c.phase, str(c.tokens), short(c.operations), size(c.bytes), f"{c.intensity:.3g}"]
        for c in page.graphs.calls
    ]
    head = ["target", "graph", "call", "tokens", "operations", "bytes read", "operations a byte"]
    return Sheet(head, rows, frozenset({3, 4, 5, 6}), "counted") if rows else None
