"""What `profile --device NAME` prints: predicted rates with their intervals, energy, memory."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from typing import Any

from .tables import size, table, text


def prediction_text(result: Mapping[str, Any], output_format: str) -> str:
    """A prediction in the format "md", "json" or "csv"."""
    if output_format == "json":
        return json.dumps(result, indent=1)
    if output_format == "csv":
        return _csv(result)
    whole = table(
        *("device", "target", "unit", "test", "tokens/s", "80 % interval", "seconds", "J/token", "bound by"),
        left=("target", "unit", "test", "bound by"),
        title=f"PREDICTED, {result['model']} at {result['bits']:.2f} bits",
    )
    for row in result["rows"]:
        bound = max(row["parts"], key=lambda name: row["parts"][name])
        interval = f"{_short(row['tokens_per_s_low'])} to {_short(row['tokens_per_s_high'])}"
        energy = "not known"
        if row["joules_per_token"] is not None:
            energy = f"{row['joules_per_token']:.3g} ({row['energy_boundary']})"
        cells = row["device"], row["target"], row["unit"], row["test"], _short(row["tokens_per_s"]), interval
        whole.add_row(*cells, f"{row['seconds']:.3g}", energy, bound)
    memory = "memory of weights and states, at least: " + ", ".join(
        f"{t} {size(n)}" for t, n in result["memory_bytes"].items()
    )
    small = [f"does not fit: {line}" for line in result["too_small"]]
    reasons = sorted({row["reason"] for row in result["rows"] if row["reason"]})
    notes = sorted({row["note"].partition(";")[0] for row in result["rows"]})
    return text(whole, memory, *small, *(f"unit chosen: {r}" for r in reasons[:8]), *notes, *result["assumptions"])


def _short(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _csv(result: Mapping[str, Any]) -> str:
    out = io.StringIO()
    columns = ["device", "target", "unit", "test", "tokens_per_s", "tokens_per_s_low", "tokens_per_s_high", "seconds"]
    columns += ["joules_per_token", "energy_boundary", "rows_of_this_device", "reason", "note"]
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "kind": "predicted"} for row in result["rows"])
    return out.getvalue().rstrip("\n")
