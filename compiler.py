"""The main job, top to bottom: load, plan, quantize, lower, verify, publish."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .bundle import Manifest
from .checkpoints.checkpoint import Checkpoint
from .errors import UserError
from .models.kv_cache import stored_as
from .models.opening import open_model
from .pipeline.check import check_bundle, compare_reading, refuse_too_large
from .pipeline.plan import plan
from .pipeline.planned import Planned
from .pipeline.quantize import quantize
from .pipeline.request import Progress, Request
from .pipeline.resume import resumable
from .pipeline.rounding_loss import RoundingLoss, rounding_loss
from .pipeline.write_bundle import Cost, lower_targets, write_bundle
from .quant.plan import BitPlan
from .system.reading import one_line
from .system.resumable import ResumableExport
from .targets.registry import require, require_choices, require_kv_cache
from .verification.report import Independent, Report

__all__ = ["Cost", "Exported", "Planned", "Request", "export", "plan"]


@dataclass(frozen=True)
class Exported:
    """A finished export. costs: what lowering each target took, measured. peak_anonymous: bytes, children counted.

    independent: the checkpoint's reading compared with transformers, None where it was not. quality: what the codes cost.
    """

    path: Path
    planned: Planned
    manifest: Manifest
    report: Report | None
    peak_anonymous: int
    costs: dict[str, Cost]
    independent: Independent | None
    quality: RoundingLoss | None = None


def export(request: Request, output: Path, progress: Progress = lambda _: None) -> Exported:
    """Compile a model into a bundle at `output`, which must not exist; it appears when it is whole.

    Raises UserError for anything the user can mend, VerificationFailure where `request.checks` finds a mismatch. What cost
    time is then kept beside `output`, and the same call goes on from there (`pipeline.resume`).
    """
    _refuse_existing(output)
    for name in request.formats:
        require(name)  # a missing library is refused before any work
    require_kv_cache(request.formats, request.targets.kv_cache)
    require_choices(request.targets.own)
    checkpoint = open_model(request.model, request.adapter, request.pooling)
    independent = compare_reading(request, checkpoint, progress)
    with resumable(request, output, checkpoint, progress) as run:
        planned = _plan(request, checkpoint, run.folder, progress)
        refuse_too_large(planned, request)
        planned = quantize(planned, request, run.folder, progress)
        quality = rounding_loss(planned, request, run.folder, progress)
        lowered = lower_targets(planned, request, run.folder, progress)
        manifest = write_bundle(planned, request, run.folder, lowered, progress)
        costs = {name: target.cost for name, target in lowered.items()}
        report = check_bundle(request, run.folder, manifest, costs, quality, progress)
    return Exported(output, planned, manifest, report, run.peak.bytes, costs, independent, quality)


def _plan(request: Request, checkpoint: Checkpoint, run: ResumableExport, progress: Progress) -> Planned:
    """The plan, or the one that an earlier run of this job made. Both calibrate with the threads of the first."""
    threads = run.finished("threads")
    if threads is None:
        run.finish("threads", {"count": torch.get_num_threads()})
    else:
        progress(f"going on with the unfinished run in {run.path}")
        torch.set_num_threads(int(threads["count"]))
    kept = run.finished("plan")
    if kept is not None:
        request = replace(request, budget=replace(request.budget, plan=BitPlan.from_json(kept["plan"])))
    planned = plan(request, progress, checkpoint)
    if kept is None:
        run.finish("plan", {"plan": planned.plan.to_json()})
    stored_as(planned.model.graphs(), request.targets.kv_cache)  # refuses a model without a cache
    return planned


def _refuse_existing(output: Path) -> None:
    try:
        exists = output.exists() or output.is_symlink()
        parent = next((p for p in output.absolute().parents if p.exists()), output)
        usable = parent.is_dir() and os.access(parent, os.W_OK)
    except OSError as error:
        raise UserError(f"{one_line(output)} cannot be made ({error.strerror}); choose another -o") from None
    if exists:
        raise UserError(f"{output} exists already; remove it or choose another -o")
    if not usable:
        raise UserError(f"{output} cannot be made ({parent} is no folder to write in); choose another -o")
