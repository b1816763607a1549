"""`compare`: bundles side by side, by what their manifests and their last reports say. Nothing is run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..measuring.kept_reports import Profiled, kept_report, last_check


def compare(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """A row for each target of each bundle: bytes, quality, speed and placement; None where no report says it.

    Raises UserError for what is no bundle, and for a damaged report.
    """
    return [row for path in paths for row in _rows(Bundle.open(path))]


def _rows(bundle: Bundle) -> list[dict[str, Any]]:
    (verified, _), profiled = last_check(bundle), kept_report(bundle, "profile", Profiled)
    checked = {t.format: t for t in verified.targets} if verified is not None else {}
    manifest, rows = bundle.manifest, []
    for entry in manifest.targets:
        files = [bundle.path / f for f in entry.files]
        row: dict[str, Any] = {
            "bundle": str(bundle.path),
            "model": manifest.source,
            "model_type": manifest.model_type,
            "bits": manifest.average_bits,
            "target": entry.format,
            "weight_bytes": entry.stored_bytes,
            "file_bytes": sum(f.stat().st_size for f in files if f.is_file()),
            "verified": None,
            "quantization": None,
            "placement": None,
            "task_accuracy": None,
            "original_task_accuracy": None,
            "text": None,
            "speed": {},
            "speed_kind": None,
            "speed_on": None,
        }
        if verified is not None and (target := checked.get(entry.format)) is not None:
            placed = target.placement
            parts = {"accelerated": placed.accelerated, "host": placed.host, "fallback": placed.fallback}
            row |= {
                "verified": target.passed,
                "lowering": target.lowering.model_dump(),
                "shipped": target.shipped.model_dump(),
                "activations": target.activations,
                "quantization": None if (loss := verified.loss) is None else loss.model_dump(),
                "placement": {k: sum(sum(ops.values()) for ops in g.values()) for k, g in parts.items()}
                if placed.known
                else None,
                "computed_by": target.how,
                "task_accuracy": target.task_accuracy,
                "original_task_accuracy": verified.original_task_accuracy,
                "text": target.text.model_dump() if target.text is not None else None,
            }
        if profiled is not None and (measured := profiled.targets.get(entry.format)) is not None:
            row |= {
                "speed": {r.test: r.median for r in measured.rows},
                "speed_kind": measured.kind,
                "speed_on": measured.host.cpu,
            }
        rows.append(row)
    return rows
