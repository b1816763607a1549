"""The model opened and its plan made: tensors checked, layers scored, bits allocated. Nothing is written."""

from __future__ import annotations

from collections.abc import Sequence

from ..bundle import Generation
from ..calibration.prompts import NO_PROMPTS
from ..calibration.source import Source
from ..checkpoints.checkpoint import Checkpoint
from ..errors import UserError
from ..models.language_model import LanguageModel
from ..models.opening import open_model
from ..quant.plan import BitPlan, Unit
from ..targets.storage import signed_scales
from .allocate import Allocation, allocate_bits
from .calibration_data import data_within_memory, with_calibration
from .generation import generation_of
from .original import open_original
from .planned import Planned
from .prompts import example_calls, read_prompts, sound_calls, with_own_task
from .request import Progress, Request
from .shipped_text import with_shipped_text


def plan(request: Request, progress: Progress = lambda _: None, checkpoint: Checkpoint | None = None) -> Planned:
    """Open the model, check that its tensors are there, score its layers, and allocate bits. Writes nothing.

    checkpoint: the request's model, where it is open already. Raises UserError for anything wrong with the checkpoint, the
    budget or the options.
    """
    checkpoint = checkpoint or open_model(request.model, request.adapter, request.pooling)
    original = open_original(request, checkpoint, progress)
    generation = generation_of(original.model, checkpoint, original.config, request.max_context, progress)
    _report_context(original.model, generation, progress)

    request = with_shipped_text(request, checkpoint, generation, progress)
    prompted = with_own_task(request, checkpoint, progress)  # a task of the checkpoint's own gives prompts alone
    prompts = read_prompts(prompted, checkpoint, generation)
    calls = example_calls(original.model, generation, prompts.tokens)
    request, samples = data_within_memory(request, original, generation, progress)
    source = Source(checkpoint, original.config, generation, samples, calls, request.calibration.part_tokens)

    allocation: Allocation | None = None
    if request.budget.plan is None:
        scored = prompts if prompted.calibration.file else NO_PROMPTS
        allocation = allocate_bits(request, original, source, scored, progress)
        bits = allocation.plan
    else:
        bits = _checked(request.budget.plan, original.units, request.formats)
    return Planned(
        source=source,
        model=original.model,
        units=original.units,
        other=original.other,
        prompts=[list(p) for p in prompts.tokens],
        contexts=[list(c) for c in prompts.contexts],
        examples=calls or sound_calls(prompts),
        formats=request.formats,
        plan=with_calibration(bits, source),
        allocation=allocation,
    )


def _report_context(model: LanguageModel, generation: Generation, progress: Progress) -> None:
    """Say where the bundle reads a context in smaller parts than the model would."""
    layout = model.context_spec()
    if generation.context is not None and layout is not None and generation.context.window < layout.window:
        progress(
            f"a context is read in parts of {generation.context.window} tokens, not {layout.window}: "
            f"the bundle's context is {generation.max_context}"
        )


def _checked(plan: BitPlan, units: Sequence[Unit], formats: tuple[str, ...]) -> BitPlan:
    """The user's plan, its totals computed anew. Raises UserError where it does not fit the model or the targets."""
    plan = plan.validate(units)
    name = next((n for n, e in plan.entries.items() if e.signed), None)
    if name is not None and not signed_scales(formats):
        target = next(f for f in formats if not signed_scales((f,)))
        raise UserError(
            f'plan: the scales of {name} may be negative ("signed"), which {target} does not hold; plan for the same --format'
        )
    return plan
