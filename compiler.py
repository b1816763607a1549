"""The main job, top to bottom: load, plan, quantize, lower, verify, write the bundle. All rooms enter."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .bundle import (
    Bundle,
    Manifest,
    sha256,
)
from .checkpoints.checkpoint import Checkpoint
from .errors import UserError, VerificationFailure
from .exporters.registry import require_kv_cache
from .models.kv_cache import stored_as
from .models.user_module.checkpoint import open_model
from .pipeline.baseline import SingleTargetPlan
from .pipeline.plan import plan
from .pipeline.planned import Planned
from .pipeline.request import Progress, Request
from .pipeline.write_bundle import Cost, _tools, _write
from .quant.plan import BitPlan
from .system.memory import PeakAnonymous, anonymous_bytes, limited, require_available
from .system.reading import one_line
from .system.resumable import ResumableExport
from .targets import libraries
from .verification.report import Report, require, require_placement
from .verification.verify import require_memory, verify

__all__ = ["Cost", "Exported", "Planned", "Request", "SingleTargetPlan", "export", "plan"]


@dataclass
class Exported:
    """A finished export. costs: format -> what its lowering took (measured)."""

    path: Path
    planned: Planned
    manifest: Manifest
    report: Report | None
    peak_anonymous: int
    costs: dict[str, Cost]


def export(
    request: Request, output: Path, check: bool = True, progress: Progress = lambda _: None, strict: bool = False
) -> Exported:
    """Compile a model into a bundle at `output`, which must not exist; it appears when whole.

    check: reload every artefact and compare it with the reference; a mismatch raises VerificationFailure and leaves no
    bundle. strict: so does an op that fell back to another unit. Raises UserError for anything the user can mend.
    """
    _refuse_existing(output)
    for name in request.formats:
        libraries.require(name)  # a missing library is refused before any work
    require_kv_cache(request.formats, request.kv_cache)
    limit, now = request.memory_limit, anonymous_bytes()
    if limit is not None and now >= limit:
        raise UserError(
            f"--memory-limit {limit / 2**30:.2f} GiB is too little: {now / 2**30:.2f} GiB are taken before any work"
        )
    checkpoint = open_model(request.model)
    with limited(request.memory_limit), PeakAnonymous(request.memory_limit) as peak:
        run = ResumableExport(output, _job(request, checkpoint))
        for other in run.others():
            progress(f"{other} is left from another run; remove it if it is not wanted")
        try:
            planned = _plan(request, checkpoint, run, progress)
            stored_as(planned.model.graphs(), request.kv_cache)  # a model without a cache is refused now
            _refuse_too_large(planned, check)
            manifest, costs = _write(planned, request, run, progress)
            report = None
            if check:
                report = verify(run.path, progress=progress)
                _judge(report, output, strict)
                costed = {"costs": {name: asdict(cost) for name, cost in costs.items()}}
                Bundle(run.path, manifest).write_report("export", report.to_json() | costed)
            run.publish()
        except BaseException as error:
            over = peak.over and isinstance(error, KeyboardInterrupt | SystemExit)
            if isinstance(error, VerificationFailure):
                for name in request.formats:  # a target that fails its check is lowered anew
                    run.forget(name)
            kept = run.worth_keeping() and not over
            if kept:
                run.leave()
            else:
                run.discard()
            said: BaseException = error
            if over:
                said = UserError(
                    f"this takes more than --memory-limit {(request.memory_limit or 0) / 2**30:.2f} GiB "
                    f"({peak.bytes / 2**30:.2f} GiB were reached); give more, or ask for one --format at a time"
                )
            elif isinstance(error, OSError):
                said = UserError(f"{output} cannot be written ({one_line(error)})")
            if kept:
                said.add_note(f"what is done is kept in {run.path}: the same command goes on from there")
            if said is error:
                raise
            raise said from error
    return Exported(output, planned, manifest, report, peak.bytes, costs)


def _refuse_too_large(planned: Planned, check: bool) -> None:
    """Refuse before hours of work what memory cannot hold: the lowering of each target, and the check. Raises UserError."""
    stored = {f: planned.true_bytes(f) for f in planned.formats}
    for name, size in stored.items():
        require_available(
            libraries.BACKENDS[name].peak_bytes(size) - anonymous_bytes(),
            f"--format {name}: its library takes memory",
            "leave this target out, or give more",
        )
    if check:
        require_memory(planned.weights, stored, original=False)


def _job(request: Request, checkpoint: Checkpoint) -> dict[str, Any]:
    """All that decides the bytes of a bundle. A file of the request counts by what is in it."""
    job = {key: value for key, value in vars(request).items() if key not in ("plan", "workers")}
    for key in ("calibration", "task"):
        if job[key] is not None and job[key].is_file():
            job[key] = sha256(job[key])
    return {
        "request": json.loads(json.dumps(job, default=str)),
        "plan": request.plan.digest() if request.plan is not None else None,
        "fingerprint": checkpoint.fingerprint(),
        "tools": _tools(request.formats),
    }


def _plan(request: Request, checkpoint: Checkpoint, run: ResumableExport, progress: Progress) -> Planned:
    """The plan, or the one that an earlier run of this job made. Both calibrate with the threads of the first."""
    threads = run.found("threads")
    if threads is None:
        run.finish("threads", {"count": torch.get_num_threads()})
    else:
        progress(f"going on with the unfinished run in {run.path}")
        torch.set_num_threads(int(threads["count"]))
    kept = run.found("plan")
    if kept is not None:
        planned = plan(replace(request, plan=BitPlan.from_json(kept["plan"])), progress, checkpoint)
    else:
        planned = plan(request, progress, checkpoint)
        run.finish("plan", {"plan": planned.plan.to_json()})
    return planned


def _judge(report: Report, output: Path, strict: bool) -> None:
    """Raise VerificationFailure if a target does not match; the report stays beside where the bundle would have been."""
    try:
        require(report)
        if strict:
            require_placement(report)
    except VerificationFailure:
        left = output.with_name(f"{output.name}.verification.json")
        left.write_text(json.dumps(report.to_json(), indent=1) + "\n")
        raise


def _refuse_existing(output: Path) -> None:
    try:
        found = output.exists() or output.is_symlink()
        parent = next((p for p in output.absolute().parents if p.exists()), output)
        usable = parent.is_dir() and os.access(parent, os.W_OK)
    except OSError as error:
        raise UserError(f"{one_line(output)} cannot be made ({error.strerror}); choose another -o") from None
    if found:
        raise UserError(f"{output} exists already; remove it or choose another -o")
    if not usable:
        raise UserError(f"{output} cannot be made ({parent} is no folder to write in); choose another -o")
