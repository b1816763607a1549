"""`compare`: bundles side by side, by what their manifests and their last reports say. Nothing is run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..bundle import REPORTS, Bundle
from ..errors import UserError
from ..system.reading import MEBIBYTE, one_line, read_json_object

_LARGEST = 64 * MEBIBYTE

Number = Annotated[float, Field(allow_inf_nan=False)]
Nodes = dict[str, dict[str, Annotated[int, Field(ge=0)]]]


class _Read(BaseModel):
    """A part of a report that is read; the rest of it is passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _Agreement(_Read):
    max_relative_error: Number
    mean_kl: Number
    top1: Number
    rms: Number | None = None


class _Text(_Read):
    perplexity: Number
    mean_kl: Number
    top1: Number


class _Placement(_Read):
    accelerated: Nodes = {}
    host: Nodes = {}
    fallback: Nodes = {}
    known: bool = True


class _Checked(_Read):
    format: str
    passed: bool
    activations: str
    lowering: _Agreement
    shipped: _Agreement
    placement: _Placement
    how: str = ""
    task_accuracy: Number | None = None
    text: _Text | None = None


class _Verified(_Read):
    targets: list[_Checked]
    quantization: _Agreement | None = None
    task_size: int = 0
    original_task_accuracy: Number | None = None
    original_text: _Text | None = None


class _Row(_Read):
    test: str
    median: Number


class _Measured(_Read):
    rows: list[_Row]
    kind: str = "measured"


class _Profiled(_Read):
    targets: dict[str, _Measured]


Kind = TypeVar("Kind", bound=_Read)


def compare(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """A row for each target of each bundle: bytes, quality, speed and placement; None where no report says it.

    Raises UserError for what is no bundle, and for a damaged report.
    """
    return [row for path in paths for row in _rows(Bundle.open(path))]


def _rows(bundle: Bundle) -> list[dict[str, Any]]:
    verified, profiled = _report(bundle, "verify", _Verified), _report(bundle, "profile", _Profiled)
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
        }
        if verified is not None and (target := checked.get(entry.format)) is not None:
            placed = target.placement
            parts = {"accelerated": placed.accelerated, "host": placed.host, "fallback": placed.fallback}
            row |= {
                "verified": target.passed,
                "lowering": target.lowering.model_dump(),
                "shipped": target.shipped.model_dump(),
                "activations": target.activations,
                "quantization": verified.quantization.model_dump() if verified.quantization is not None else None,
                "placement": {k: sum(sum(ops.values()) for ops in g.values()) for k, g in parts.items()}
                if placed.known
                else None,
                "computed_by": target.how,
                "task_accuracy": target.task_accuracy,
                "original_task_accuracy": verified.original_task_accuracy,
                "text": target.text.model_dump() if target.text is not None else None,
            }
        if profiled is not None and (measured := profiled.targets.get(entry.format)) is not None:
            row |= {"speed": {r.test: r.median for r in measured.rows}, "speed_kind": measured.kind}
        rows.append(row)
    return rows


def _report(bundle: Bundle, name: str, kind: type[Kind]) -> Kind | None:
    """A report in the bundle; None where there is none. A stranger may have written it."""
    file = bundle.path / REPORTS / f"{name}.json"
    if not file.is_file():
        return None
    try:
        return kind.model_validate(read_json_object(file, _LARGEST))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}: {one_line(where, 120)}: {one_line(first['msg'], 120)}; run '{name}' again") from None
