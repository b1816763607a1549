"""Exports that are killed and go on."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgewright.bundle import REPORTS
from edgewright.pipeline.request import Request
from helpers.requests import asking

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


class Killed(BaseException):
    """What no `except Exception` sees, and no clean-up follows."""


def contents(bundle: Path) -> dict[str, str]:
    files = (p for p in bundle.rglob("*") if p.is_file() and REPORTS not in p.relative_to(bundle).parts)
    return {p.relative_to(bundle).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def request(example: str, num_layers: int | None = 2, **changes: Any) -> Request:
    """An example with two layers in each stack, which calibrates on its own task."""
    folder = EXAMPLES / example
    asked = asking(str(folder), bits=4.5, importance="zd", task=folder / "task.tsv", max_context=64, **changes)
    return replace(asked, num_layers=num_layers)
