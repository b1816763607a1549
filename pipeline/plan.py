"""The model opened and its plan made: tensors checked, layers scored, bits allocated; nothing is written.

All rooms but the compiler may enter.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..bundle import Generation
from ..calibration.memory_estimate import tokens_within, walk_bytes
from ..calibration.prompts import random_contexts, random_prompts, read_task, text_windows
from ..calibration.samples import MOST_TOKENS, Sample, digest, digest_calls, read_samples
from ..checkpoints.checkpoint import Checkpoint
from ..errors import UserError
from ..importance.score import CalibrationInputs
from ..models.language_model import LanguageModel
from ..models.registry import build, shorten
from ..models.user_module.checkpoint import open_model
from ..quant.plan import UNQUANTIZED, BitPlan, Quantizer
from ..quant.units import quantizable_units
from ..system.memory import require_available
from ..system.reading import one_line
from ..targets.storage import signed_scales
from .allocate import allocate_bits, by_gptq
from .baseline import SingleTargetPlan
from .generation import generation_of
from .planned import Planned
from .request import Progress, Request

VERIFY_PROMPTS = 32


TASK = "task.tsv"


CONTEXTS = 8


LONGEST_CONTEXT = 400  # tokens of a random context: several chunks, or two parts where the window is shorter


EXAMPLE_ROWS = 8


def plan(request: Request, progress: Progress = lambda _: None, checkpoint: Checkpoint | None = None) -> Planned:
    """Open the model, check that its tensors are there, score its layers, and allocate bits. Writes nothing.

    checkpoint: the request's model, where it is open already. Raises UserError for anything wrong with the checkpoint, the
    budget or the options.
    """
    checkpoint = checkpoint or open_model(request.model)
    data = request.calibration.file
    request = _with_own_task(request, checkpoint, progress)
    config = checkpoint.config
    if request.num_layers is not None:
        config = shorten(config, request.num_layers)
    model = build(config)
    _expect_tensors(model, checkpoint, request.num_layers is None, progress)
    model.check_lengths()
    units = quantizable_units(model)
    if not units:
        raise UserError(f"{request.model}: no weight can be quantized; the model's layers are narrower than 16")
    planned_names = {w.name for u in units for w in u.weights}
    other = [n for n in _parameters(model) if n not in planned_names]
    generation = generation_of(model, checkpoint, config, request.max_context)
    context = model.context_spec()
    if generation.context is not None and context is not None and generation.context.window < context.window:
        progress(
            f"a context is read in parts of {generation.context.window} tokens, not {context.window}: "
            f"the bundle's context is {generation.max_context}"
        )
    prompts, contexts = _prompts(request, checkpoint, generation)
    examples = _examples(model, generation, prompts)
    samples = _samples(request, data, checkpoint, model, generation)
    probes = CalibrationInputs(prompts if request.calibration.file else [], contexts, examples)
    found: dict[str, Any] = {}
    if request.budget.plan is not None:
        made = request.budget.plan.validate(units)
        _refuse_signed(made, request.formats)
        scores: dict[tuple[str, int], float] = {}
        alone: dict[str, SingleTargetPlan] = {}
    else:
        quantizer = _quantizer(request, data)
        made, importance, alone, problem, baseline = allocate_bits(
            request, checkpoint, config, units, other, generation, probes, samples, quantizer, progress
        )
        scores, found = importance.layers, {"problem": problem, "baseline": baseline, "importance": importance}
        if quantizer == "gptq" and not any(e.quantizer == "gptq" for e in made.entries.values()):
            made = by_gptq(made, model)
    made = _calibrated(made, samples, examples)
    return Planned(
        *(checkpoint, config, model, units, made, other, scores, generation, prompts, request.formats, alone),
        contexts=contexts,
        examples=examples,
        samples=samples,
        **found,
    )


def _quantizer(request: Request, data: Path | None) -> Quantizer:
    """What rounds the weights: GPTQ where the user gave data, unless one is asked for by name."""
    if request.calibration.quantizer != "auto":
        return request.calibration.quantizer
    return "rtn" if data is None else "gptq"


def _refuse_signed(plan: BitPlan, formats: tuple[str, ...]) -> None:
    """Raise UserError for a plan whose scales may be negative where a target does not hold such."""
    name = next((n for n, e in plan.entries.items() if e.signed), None)
    if name is not None and not signed_scales(formats):
        held = next(f for f in formats if not signed_scales((f,)))
        raise UserError(
            f'plan: the scales of {name} may be negative ("signed"), which {held} does not hold; plan for the same --format'
        )


def _samples(
    request: Request, data: Path | None, checkpoint: Checkpoint, model: LanguageModel, spec: Generation
) -> list[Sample]:
    """What GPTQ and the scores calibrate on, within the memory given. Raises UserError where there is too little of either."""
    measured = request.budget.plan is None and request.budget.importance in ("auto", "fisher", "kl")
    if data is None or spec.task == "module" or (request.calibration.quantizer == "rtn" and not measured):
        return []
    decoder = next(g for g in model.graphs() if g.name == "decoder")
    longest = min(decoder.bounds["sequence"][1], spec.max_context)
    found = read_samples(data, checkpoint, spec, longest, MOST_TOKENS)
    widest = max(s.size for s in found)
    if request.memory_limit is not None:
        return read_samples(data, checkpoint, spec, longest, tokens_within(model, request.memory_limit, widest))
    fixed, each = walk_bytes(model, widest)
    require_available(
        fixed + each * sum(s.size for s in found),
        "GPTQ on all these calibration data takes memory",
        "give --memory-limit, which calibrates on fewer, or --quantizer rtn",
    )
    return found


def _calibrated(plan: BitPlan, samples: list[Sample], examples: list[tuple[str, dict[str, torch.Tensor]]]) -> BitPlan:
    """The plan with the digest of the data that its GPTQ weights need. Raises UserError if they are not there or others."""
    if not any(e.quantizer == "gptq" and e.bits != UNQUANTIZED for e in plan.entries.values()):
        return replace(plan, calibration=None)
    if not samples and not examples:
        raise UserError("gptq needs data: give --calibration FILE (a text or a task file), or --quantizer rtn")
    found = digest(samples) if samples else digest_calls(examples)
    if plan.calibration not in (None, found):
        raise UserError("plan: its GPTQ weights were planned on other calibration data; give the same --calibration")
    return replace(plan, calibration=found)


def _with_own_task(request: Request, checkpoint: Checkpoint, progress: Progress) -> Request:
    """A checkpoint's directory may bring its task file, `task.tsv`: better prompts than random ids."""
    own = Path(request.model).expanduser() / TASK  # a factory's name is no such path
    if request.calibration.file or checkpoint.tokenizer is None or not own.is_file():
        return request
    progress(f"prompts from the checkpoint's own {TASK}")
    return replace(request, calibration=replace(request.calibration, task=own))


def _parameters(model: LanguageModel) -> list[str]:
    return [n for n, _ in model.named_parameters(remove_duplicate=False) if n not in model.tied]


def _expect_tensors(model: LanguageModel, checkpoint: Checkpoint, whole: bool, progress: Progress) -> None:
    """Every parameter is there, and nothing is that would be left out in silence; `unused` prefixes are left out aloud."""
    shapes = dict(model.named_parameters(remove_duplicate=False))
    for name in _parameters(model):
        checkpoint.expect(name, tuple(shapes[name].shape))
    if whole:
        # A bias the config does not speak of would vanish from original, reference and artefact alike: no check sees it.
        known = set(shapes) | set(model.tied)
        left = [n for n in checkpoint.names() if n not in known and n.startswith(model.unused)]
        if left:
            progress(f"left out, as no graph here uses them: {len(left)} tensors ({one_line(left[0])} and the like)")
        known |= set(left)
        stray = [n for n in checkpoint.names() if n not in known and not n.endswith(".inv_freq")]
        if stray:
            kind = checkpoint.config.get("model_type")
            raise UserError(
                f"{checkpoint.source}: {len(stray)} tensors have no place in this {kind} (the first: {one_line(stray[0])}); "
                "is config.json the one of these weights?"
            )


def _prompts(request: Request, checkpoint: Checkpoint, spec: Generation) -> tuple[list[list[int]], list[list[int]]]:
    """The prompts that calibrate LIM and that every later `verify` uses: from the task, the text, or random ids.

    With a context for each where the model reads one: the task's, pieces of the text, or random ids.
    """
    tokenizer = checkpoint.tokenizer
    if request.calibration.file and tokenizer is None:
        raise UserError(f"{request.model} has no tokenizer, which --task and --calibration need")
    contexts: list[list[int]] = []
    if request.calibration.task is not None and tokenizer is not None:
        task = read_task(request.calibration.task, VERIFY_PROMPTS, spec.task == "memory")
        prompts = [tokenizer.encode(p) for p in task.prompts]
        contexts = [tokenizer.encode(c, special=False) for c in task.contexts]
    elif request.calibration.text is not None and tokenizer is not None:
        prompts = text_windows(
            request.calibration.text, tokenizer, min(64, max(2, spec.max_context // 2)), VERIFY_PROMPTS
        )
        if spec.context is not None:
            contexts, prompts = prompts, [p[: max(1, len(p) // 4)] for p in prompts]
    elif spec.task == "module" and spec.vocab == 1:
        return [], []
    else:
        prompts = [p[: max(1, spec.max_context - 1)] for p in random_prompts(spec.vocab, VERIFY_PROMPTS)]
        if spec.context is not None:  # one of them in two parts
            prompts = [p[:8] for p in prompts[:CONTEXTS]]
            lengths = [
                spec.context.window + 5 if spec.context.window <= LONGEST_CONTEXT else LONGEST_CONTEXT,
                70,
                9,
                33,
            ]
            contexts = random_contexts(spec.context.vocab, [lengths[i % 4] for i in range(len(prompts))])
        return prompts, contexts
    for prompt in prompts:
        if len(prompt) >= spec.max_context:
            raise UserError(f"a prompt of {len(prompt)} tokens does not fit --max-context {spec.max_context}")
        if max(prompt, default=0) >= spec.vocab:
            raise UserError(
                f"{request.model}: its tokenizer gives token {max(prompt)}, the model has {spec.vocab}; "
                "is the tokenizer of another model?"
            )
    if spec.context is not None and (worst := max((t for c in contexts for t in c), default=0)) >= spec.context.vocab:
        raise UserError(
            f"{request.model}: its tokenizer gives token {worst}, the context's model has {spec.context.vocab}"
        )
    return prompts, contexts


def _examples(
    model: LanguageModel, spec: Generation, prompts: list[list[int]]
) -> list[tuple[str, dict[str, torch.Tensor]]]:
    """What a model without a generate loop is compared on: its own examples, or the prompts in padded batches."""
    if model.task != "module":
        return []
    if own := model.examples():
        return own
    found = []
    for start in range(0, len(prompts), EXAMPLE_ROWS):
        rows = prompts[start : start + EXAMPLE_ROWS]
        ids = torch.full((len(rows), max(map(len, rows))), spec.pad_id, dtype=torch.int64)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, prompt in enumerate(rows):
            ids[row, : len(prompt)], mask[row, : len(prompt)] = torch.tensor(prompt), True
        found.append(("encoder", {"input_ids": ids, "encoder_mask": mask}))
    return found
