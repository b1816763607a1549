"""Requests as tests write them: in one line, whatever group an option belongs to."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from edgewright.pipeline.request import BudgetOptions, CalibrationOptions, CheckOptions, Request, TargetOptions

GROUPS = {
    "budget": BudgetOptions,
    "calibration": CalibrationOptions,
    "targets": TargetOptions,
    "checks": CheckOptions,
}


SMALL = CalibrationOptions(shipped=False, tokens=600, fisher_windows=6)
"""A few hundred tokens where a user's run takes 32,768: the same path in seconds."""


def asking(model: str, formats: tuple[str, ...] = ("onnx",), **options: Any) -> Request:
    """A `Request` with the options of all groups side by side, which calibrates on little data."""
    return changed(Request(model, calibration=SMALL), formats=formats, **{"against": "none"} | options)


def changed(request: Request, **options: Any) -> Request:
    """`request` with other options, each put into its group."""
    for name, group in GROUPS.items():
        own = {f.name: options.pop(f.name) for f in fields(group) if f.name in options}
        request = replace(request, **{name: replace(getattr(request, name), **own)})
    return replace(request, **options)
