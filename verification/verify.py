"""A bundle checked in a process of its own, which has limits: its artefacts may be a stranger's. No torch is imported here.

What runs them is native code, which a hostile graph can crash, or keep busy for ever. All comparisons are in one process, so that
model and reference are loaded once; hashes are checked before it is started.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..bundle import Bundle
from ..errors import UserError, VerificationFailure
from ..runtimes.limits import limits_of
from ..system.reading import one_line
from ..system.subprocesses import ChildFailed, Limits, run_child
from .against import compare_reading
from .options import TEXT_WINDOWS, VerifyOptions, chosen_entries
from .report import Report

__all__ = ["TEXT_WINDOWS", "VerifyOptions", "verify"]


def verify(
    path: str | Path,
    options: VerifyOptions | None = None,
    progress: Callable[[str], None] = lambda _: None,
    limits: Limits | None = None,
) -> Report:
    """Check a bundle: hashes, then each artefact reloaded from disk and compared, then the quantization loss.

    limits: what the process may take; None is what the sizes of the bundle's files account for, generously. Raises
    VerificationFailure for a damaged file, and for an artefact that crashes its runtime, does not end or takes more than that;
    UserError for bad options. A comparison that fails is in the report, as is a note for each target that is left out.
    """
    options = options or VerifyOptions()
    bundle = Bundle.open(path)
    entries, _ = chosen_entries(bundle, options.formats)
    progress("checking file hashes")
    bundle.check_files()
    granted = limits or limits_of(bundle, entries, 1 if options.model is None else 2)
    # the user's own module, which has its name on the command line, may lie anywhere that this process looks
    search = [folder for folder in sys.path if folder] if ":" in (options.model or "") else []
    job = {"path": str(bundle.path), "options": options.to_json(), "search": search}
    independent = None
    if options.model is not None:
        weights, pooling = bundle.manifest.weights, bundle.manifest.generation.pooling
        independent = compare_reading(options.model, options.adapter, weights, options.against, progress, pooling)
    try:
        report = Report.from_json(run_child("edgewright.verification.checking", job, progress, granted))
        return replace(report, independent=independent)
    except ChildFailed as error:
        if error.stage:
            raise VerificationFailure(f"{error.stage}: the process {error}") from None
        raise UserError(f"checking {one_line(path)}: the process {error}; close other programs and try again") from None
