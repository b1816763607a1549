"""Every artefact of a new bundle against its reference, before the bundle appears."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict

from ..bundle import Bundle, Manifest
from ..checkpoints.checkpoint import Checkpoint
from ..errors import UserError, VerificationFailure
from ..models.language_model import LanguageModel
from ..runtimes.session import sized
from ..system.memory import anonymous_bytes, limited, require_available
from ..system.resumable import ResumableExport
from ..targets.registry import TARGETS
from ..verification import against
from ..verification.checking import require_memory, verify_here
from ..verification.report import Independent, Report, require, require_placement
from .planned import Planned
from .request import Progress, Request
from .rounding_loss import RoundingLoss
from .write_bundle import Cost

_TABLE_COPIES = 3
"""Sines and cosines while they are made: the angles, the values, and what goes to the file."""


def refuse_too_large(planned: Planned, request: Request) -> None:
    """Refuse before hours of work what memory cannot hold: the lowering of each target, and the check. Raises UserError."""
    stored = {name: planned.true_bytes(name) for name in planned.formats}
    for name, size in stored.items():
        require_available(
            TARGETS[name].peak_bytes(size) - anonymous_bytes(),
            f"--format {name}: its library takes memory",
            "leave this target out, or give more",
        )
        context = planned.generation.max_context
        require_available(
            context_bytes(planned.model, context, TARGETS[name].holds_caches),
            f"--format {name}: a context of {context} tokens takes memory",
            "give a smaller --max-context",
        )
    if request.checks.verify:
        require_memory(planned.weights, stored, original=False)


def compare_reading(request: Request, checkpoint: Checkpoint, progress: Progress) -> Independent | None:
    """The checkpoint as it is read here against transformers, as `request.checks.against` says; None if it was not compared.

    In a process of its own that is not counted in the export's memory. Raises VerificationFailure if they differ, UserError if
    "transformers" was asked for and cannot be had.
    """
    asked = request.checks.against
    if asked == "auto" and not request.checks.verify:
        return None
    if request.num_layers is not None:
        if asked != "transformers":
            return None
        raise UserError("--against compares whole models; leave it or --num-layers out")
    weights = sum(math.prod(checkpoint.info(name).shape) for name in checkpoint.names())
    with limited(request.memory_limit):
        found = against.compare_reading(request.model, request.adapter, weights, asked, progress, request.pooling)
    if found is not None:
        progress(found.text)
    return found


def context_bytes(model: LanguageModel, context: int, caches: bool) -> int:
    """About what lowering takes for a context of so many tokens: tables of rotations; where the program holds them, its caches."""
    rotary = max((b.numel() for name, b in model.named_buffers() if name.endswith("inv_freq")), default=0)
    tables = _TABLE_COPIES * 2 * 4 * rotary * context
    if not caches:
        return tables
    sizes = {"batch": 1, "capacity": context, "source": context}
    states = {s.name: s for g in model.graphs() for s in g.states}
    return tables + sum(s.dtype.itemsize * math.prod(sized(s.shape, sizes)) for s in states.values())


def check_bundle(
    request: Request,
    run: ResumableExport,
    manifest: Manifest,
    costs: Mapping[str, Cost],
    quality: RoundingLoss | None,
    progress: Progress,
) -> Report | None:
    """Reload and compare as `request.checks` says; the report goes into the bundle, and with it costs and quality.

    Raises VerificationFailure for a target that does not match its reference. The report then stays beside where the bundle
    would have been.
    """
    if not request.checks.verify:
        return None
    report = verify_here(run.path, progress=progress)
    try:
        require(report)
        if request.checks.strict_placement:
            require_placement(report)
    except VerificationFailure:
        file = run.output.with_name(f"{run.output.name}.verification.json")
        file.write_text(json.dumps(report.to_json(), indent=1) + "\n")
        raise
    found = {"costs": {name: asdict(cost) for name, cost in costs.items()}}
    rounding = {"quality": None if quality is None else asdict(quality)}
    Bundle(run.path, manifest).write_report("export", report.to_json() | found | rounding)
    return report
