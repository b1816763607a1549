"""What `devices evaluate` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .tables import table, text


def evaluation_text(summary: Mapping[str, Any], hold_out: str, left_out: list[str]) -> str:
    """For each phase, and in it for each runtime and unit: rows, errors, what the interval holds, choices of a unit."""
    whole = table(
        "phase, runtime, unit",
        "rows",
        "median error",
        "90th percentile",
        "in the 80 % interval",
        "unit within 15 % of the best",
        title=f"Predicted without what is to be predicted: {hold_out} held out",
    )
    for phase, own in summary.items():
        choices = own["choices"]
        chosen = f"{choices['within_15_percent']:.1%} of {choices['runs']}" if choices["runs"] else "-"
        covered = "-" if own["covered"] is None else f"{own['covered']:.1%}"
        errors = f"{own['median_error']:.1%}", f"{own['p90_error']:.1%}"
        whole.add_row(phase, str(own["rows"]), *errors, covered, chosen)
        for name, part in own["by_runtime"].items():
            whole.add_row(f"  {name}", str(part["rows"]), f"{part['median_error']:.1%}", f"{part['p90_error']:.1%}")
    return text(whole, *left_out)
