"""How an export ends: with its bundle, or with what cost time kept for the next run of the same command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..errors import UserError, VerificationFailure
from ..system.hashes import of_file
from ..system.memory import anonymous_bytes, limited
from ..system.memory_peak import PeakAnonymous
from ..system.reading import one_line
from ..system.resumable import ResumableExport
from .request import Progress, Request
from .write_bundle import tool_versions


@dataclass(frozen=True)
class Run:
    """An export under way: its folder, and the peak of anonymous memory so far."""

    folder: ResumableExport
    peak: PeakAnonymous


@contextmanager
def resumable(request: Request, output: Path, checkpoint: Checkpoint, progress: Progress) -> Iterator[Run]:
    """The folder of this export, new or found again. It becomes `output` when the block ends.

    When the block raises, finished work that cost time (codes found by calibration, lowered targets) is kept and the error
    gets a note that says where. A file that cannot be written and a passed --memory-limit become UserError. A target that
    fails its check is lowered anew by the next run.
    """
    _refuse_small_limit(request.memory_limit)
    with limited(request.memory_limit), PeakAnonymous(request.memory_limit) as peak:
        folder = ResumableExport(output, _job(request, checkpoint))
        folder.refuse_rivals()
        for other in folder.others():
            progress(f"{other} is left from another run; remove it if it is not wanted")
        try:
            with folder.temporary_files():
                yield Run(folder, peak)
            folder.publish()
        except BaseException as error:
            over_limit = peak.over and isinstance(error, KeyboardInterrupt | SystemExit)
            if isinstance(error, VerificationFailure):
                for name in request.formats:
                    folder.forget(name)
            keep = folder.worth_keeping(request.formats) and not over_limit
            folder.leave() if keep else folder.discard()
            shown = _explained(error, output, peak if over_limit else None, request.memory_limit)
            if keep:
                shown.add_note(f"what is done is kept in {folder.path}: the same command goes on from there")
            if shown is error:
                raise
            raise shown from error


def _refuse_small_limit(limit: int | None) -> None:
    taken = anonymous_bytes()
    if limit is not None and taken >= limit:
        raise UserError(
            f"--memory-limit {limit / 2**30:.2f} GiB is too little: {taken / 2**30:.2f} GiB are taken before any work"
        )


def _explained(error: BaseException, output: Path, over: PeakAnonymous | None, limit: int | None) -> BaseException:
    """The error as the user is to see it."""
    if over is not None:
        return UserError(
            f"this takes more than --memory-limit {(limit or 0) / 2**30:.2f} GiB "
            f"({over.bytes / 2**30:.2f} GiB were reached); give more, or ask for one --format at a time"
        )
    if isinstance(error, OSError):
        return UserError(f"{output} cannot be written ({one_line(error)})")
    return error


def _job(request: Request, checkpoint: Checkpoint) -> dict[str, Any]:
    """All that decides the bytes of a bundle. A file of the request counts by its contents."""
    budget = {key: value for key, value in vars(request.budget).items() if key != "plan"}
    calibration = dict(vars(request.calibration))
    for key in ("text", "task"):
        if calibration[key] is not None and calibration[key].is_file():
            calibration[key] = of_file(calibration[key])
    asked = {
        "model": request.model,
        "adapter": request.adapter,
        "pooling": request.pooling,
        "budget": budget,
        "calibration": calibration,
        "targets": vars(request.targets),
        "num_layers": request.num_layers,
        "max_context": request.max_context,
        "memory_limit": request.memory_limit,
    }
    return {
        "request": json.loads(json.dumps(asked, default=str)),
        "plan": None if request.budget.plan is None else request.budget.plan.digest(),
        "fingerprint": checkpoint.fingerprint(),
        "tools": tool_versions(request.formats),
    }
