"""The original checkpoint as this product reads it, against transformers: an independent reader and an independent model.

`verify` compares an artefact with a reference that reads the checkpoint as the exporter does, so it cannot see a misreading. Where
transformers is installed and knows the model, both read the same files here, in float32 and in a process of its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import UserError, VerificationFailure
from ..system.memory import available_bytes
from ..system.reading import one_line, read_json_object
from ..system.subprocesses import ChildFailed, Limits, run_child
from .options import Against
from .report import TOLERANCE, Independent

_QUANTIZED = {"quantization_config", "quantization", "compression_config"}
"""Keys of config.json that say so."""

THEIRS = "transformers: "
"""How the child's stages begin in which transformers is at work."""

_PROCESS = 4 << 30
_SECONDS, _SECONDS_PER_WEIGHT = 120.0, 2e-6
"""What loading and what comparing may take; a hostile config must not keep a library busy for ever."""


def compare_reading(
    model: str,
    adapter: str | None,
    weights: int,
    against: Against,
    progress: Callable[[str], None],
    pooling: Sequence[str] = (),
) -> Independent | None:
    """Compare how a model of so many weights is read with transformers, as `--against` says. A line tells why it was not done.

    pooling: as of `models.opening.open_model`. Raises VerificationFailure if they differ or the comparison fails by a fault of
    ours, UserError if "transformers" was asked for and cannot be had.
    """
    if against == "none":
        return None
    reason = _hindrance(model, adapter, weights)
    if reason is None:
        try:
            limits = Limits(12 * weights + _PROCESS, _SECONDS + _SECONDS_PER_WEIGHT * weights)
            job = {"model": model, "pooling": list(pooling)}
            values = run_child("edgewright.verification.transformers_model", job, progress, limits)
            if "fault" in values:
                raise _fault(values["fault"])
            reason = values.get("reason")
            if reason is None:
                return _judged(Independent(**values))
        except ChildFailed as error:
            if not error.killed and not error.stage.startswith(THEIRS):
                raise _fault(one_line(error, 200)) from None
            reason = one_line(error, 200)
    if against == "transformers":
        raise UserError(f"--against transformers: {reason}; leave the option out to go on without")
    progress(f"not compared with transformers: {reason}")
    return None


def _fault(what: str) -> VerificationFailure:
    return VerificationFailure(
        f"the comparison with transformers failed on this side, not on theirs: {what}; that is a fault of this program, "
        "please report it; --against none leaves this check out"
    )


def _judged(found: Independent) -> Independent:
    if found.differs is not None and found.cosine is not None:
        raise VerificationFailure(
            f"the checkpoint is read in another way than by {found.version}: vectors differ by up to "
            f"{found.max_relative_error:.2g} of the largest number (allowed: {TOLERANCE:g}), least cosine {found.cosine:.4f}; the "
            f"first output that differs is that of {found.differs}; --against none leaves this check out"
        )
    if found.differs is not None:
        raise VerificationFailure(
            f"the checkpoint is read in another way than by transformers {found.version}: logits differ by up to "
            f"{found.max_relative_error:.2g} of the largest (allowed: {TOLERANCE:g}), top-1 agreement {found.top1:.1%}; the first "
            f"output that differs is that of {found.differs}; --against none leaves this check out"
        )
    return found


def _hindrance(model: str, adapter: str | None, weights: int) -> str | None:
    """Why this checkpoint cannot be compared here; None if nothing is known to hinder."""
    folder = Path(model).expanduser()
    if importlib.util.find_spec("transformers") is None:
        return "it is not installed (pip install transformers)"
    if adapter is not None:
        return "an adapter is merged into the checkpoint"
    if not folder.is_dir():
        return "it is compared where the model is a directory"
    if (folder / "config.json").is_file() and _QUANTIZED & read_json_object(folder / "config.json").keys():
        return "the checkpoint is quantized already, and transformers may compute it in other arithmetic"
    needed = 8 * weights + (1 << 30)
    if needed > available_bytes():
        free = available_bytes() / 2**30
        return f"two models in float32 take about {needed / 2**30:.1f} GiB, of which {free:.1f} GiB are available"
    return None
