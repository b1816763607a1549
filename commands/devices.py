"""`devices evaluate` and `devices calibrate`: how well speeds are predicted, and costs from rows of one's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..device_profiles.calibrate import calibrate
from ..device_profiles.efficiencies import SHIPPED_SOURCE, to_json, user_file
from ..device_profiles.evaluate import HoldOut, predict_rows, summary
from ..device_profiles.profile import make_folder
from ..device_profiles.published_rows import SHIPPED_ROWS, Model, Published, read_models, read_rows
from ..errors import UserError
from ..system.reading import one_line
from ..system.writing import write_file


@dataclass(frozen=True)
class Evaluation:
    """What was predicted, the summary by phase, and a line for each kind of rows that were left out."""

    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    left_out: list[str]


def evaluate(data: Path | None = None, models: Path | None = None, hold_out: str = "architecture") -> Evaluation:
    """Predict every row of a table (default: the one that ships) from the rows that ship and are not held out.

    models: the sizes of models that the shipped table does not have. hold_out: as `predict_rows` has it. Raises UserError.
    """
    known_models = _models(models)
    known, _ = read_rows(SHIPPED_ROWS, known_models)
    rows, left = (known, []) if data is None else read_rows(data, known_models)
    predicted = predict_rows(rows, known, cast(HoldOut, hold_out))
    if not predicted:
        raise UserError(f"no row could be predicted with {hold_out} held out; choose another --hold-out")
    lines = [
        {
            "model": p.row.model,
            "device": p.row.device,
            "runtime": p.row.runtime,
            "unit": p.row.unit,
            "precision": p.row.precision,
            "context": p.row.context,
            "phase": p.phase,
            "measured_tokens_per_s": p.row.tokens_per_second[p.phase],
            "predicted_tokens_per_s": p.rate,
            "interval": [p.rate * p.interval.low, p.rate * p.interval.high],
        }
        for p in predicted
    ]
    return Evaluation(summary(predicted), lines, left)


def recalibrate(data: Path, models: Path | None = None, output: Path | None = None) -> tuple[Path, int]:
    """Fit the costs to the rows that ship and those of a table, and write them where predictions read them.

    Returns the file and the rows of the table that were used. Raises UserError for a table without usable rows.
    """
    known_models = _models(models)
    shipped, _ = read_rows(SHIPPED_ROWS, known_models)
    own, _ = read_rows(data, known_models)
    measured = {_key(r) for r in own}
    rows = [*(r for r in shipped if _key(r) not in measured), *own]
    source = f"{SHIPPED_SOURCE}; and {len(own)} rows of {one_line(data.name, 80)}"
    path = output or user_file()
    make_folder(path)
    write_file(path, to_json(calibrate(rows, source, "calibrated")))
    return path, len(own)


def _key(row: Published) -> tuple[object, ...]:
    return row.model, row.precision, row.device, row.runtime, row.unit, row.context


def _models(path: Path | None) -> dict[str, Model]:
    return read_models() | (read_models(path) if path is not None else {})
