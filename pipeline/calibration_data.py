"""The data that GPTQ and the scores calibrate on, and the plan's record of them."""

from __future__ import annotations

from dataclasses import replace

from ..bundle import Generation
from ..calibration.memory_estimate import gptq_bytes, tokens_within
from ..calibration.samples import Sample, digest, digest_calls, read_samples
from ..calibration.source import Source
from ..errors import UserError
from ..models.language_model import LanguageModel
from ..quant.plan import UNQUANTIZED, BitPlan, Quantizer
from ..system.memory import require_available
from .original import Original
from .request import Progress, Request
from .shipped_text import TEXT


def quantizer_of(request: Request) -> Quantizer:
    """What rounds the weights: GPTQ where the user gave data, unless one is asked for by name."""
    if request.calibration.quantizer != "auto":
        return request.calibration.quantizer
    return "rtn" if request.calibration.file is None else "gptq"


def calibration_samples(request: Request, original: Original, generation: Generation) -> list[Sample]:
    """Samples of the user's data, as many as the memory allows; none where nothing would read them.

    Raises UserError where there is too little data or memory.
    """
    data, model = request.calibration, original.model
    measured = request.budget.plan is None and request.budget.importance in ("auto", "fisher", "kl")
    if data.file is None or generation.task == "module" or (data.quantizer == "rtn" and not measured):
        return []
    longest = min(most_tokens(model), generation.max_context)
    samples = read_samples(data.file, original.checkpoint, generation, longest, data.tokens)
    widest = max(s.size for s in samples)
    if request.memory_limit is not None:
        tokens = tokens_within(model, request.memory_limit, widest, data.tokens)
        return read_samples(data.file, original.checkpoint, generation, longest, tokens)
    fixed, each = gptq_bytes(model, widest)
    require_available(
        fixed + each * sum(s.size for s in samples),
        "GPTQ on all these calibration data takes memory",
        "give --memory-limit, which calibrates on fewer, or --quantizer rtn",
    )
    return samples


def most_tokens(model: LanguageModel) -> int:
    """Tokens that the model takes in one call."""
    name, length = ("encoder", "source") if model.task == "embed" else ("decoder", "sequence")
    return next(g for g in model.graphs() if g.name == name).bounds[length][1]


def data_within_memory(
    request: Request, original: Original, generation: Generation, progress: Progress
) -> tuple[Request, list[Sample]]:
    """`calibration_samples`, and the request: without the text that ships where memory is too short for that.

    Raises UserError as `calibration_samples` does where the user gave the data, or a plan that was made on them.
    """
    try:
        return request, calibration_samples(request, original, generation)
    except UserError as error:
        if request.calibration.text != TEXT or request.budget.plan is not None:
            raise
        progress(f"no calibration: {error}")
        return replace(request, calibration=replace(request.calibration, text=None, shipped=False)), []


def with_calibration(plan: BitPlan, source: Source) -> BitPlan:
    """The plan with the digest of the data that its GPTQ weights need.

    Raises UserError if there are no data, or other data than those the plan was made on.
    """
    if not any(e.quantizer == "gptq" and e.bits != UNQUANTIZED for e in plan.entries.values()):
        return replace(plan, calibration=None)
    if not source.samples and not source.calls:
        raise UserError("gptq needs data: give --calibration FILE (a text or a task file), or --quantizer rtn")
    calibration = digest(source.samples) if source.samples else digest_calls(source.calls)
    if plan.calibration not in (None, calibration):
        raise UserError("plan: its GPTQ weights were planned on other calibration data; give the same --calibration")
    return replace(plan, calibration=calibration)
