"""The prompts of a bundle: LIM calibrates on them, and every later `verify` compares on them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..bundle import ContextSpec, Generation, SoundSpec, require_tokens
from ..calibration.batches import padded
from ..calibration.prompts import (
    Prompts,
    paragraphs,
    random_contexts,
    random_prompts,
    read_task,
    text_ids,
    text_windows,
)
from ..calibration.samples import Call
from ..calibration.sounds import SOUNDS, made_up_sounds, sounds_of
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.prompt import read_prompt
from ..checkpoints.tokenizer import Tokenizer
from ..errors import UserError
from ..models.language_model import LanguageModel
from .request import Progress, Request
from .shipped_text import TEXT

TASK = "task.tsv"

LONGEST_CONTEXT = 400
"""Tokens of a random context: several chunks, or two parts where the window is shorter."""

_EXAMPLE_ROWS = 8
_SHORT_PROMPT = 8  # tokens of a random prompt that comes with a context


def with_own_task(request: Request, checkpoint: Checkpoint, progress: Progress) -> Request:
    """`request` with the task file that a checkpoint's directory may hold: its prompts are better than random ids."""
    own = Path(request.model).expanduser() / TASK  # a factory's name is no such path
    data = request.calibration
    if data.task or data.text not in (None, TEXT) or checkpoint.tokenizer is None or not own.is_file():
        return request
    progress(f"prompts from the checkpoint's own {TASK}")
    return replace(request, calibration=replace(request.calibration, task=own))


def read_prompts(request: Request, checkpoint: Checkpoint, generation: Generation) -> Prompts:
    """Prompts of the task, of the text, or of random ids, with a context for each where the model reads one.

    Raises UserError for a file that cannot be read, a model without a tokenizer, or tokens that the model does not have.
    """
    if generation.speech is not None:
        return _sounds(request, generation.speech.sound)
    if request.calibration.file is None:
        return _random(generation, request.calibration.prompts)
    if checkpoint.tokenizer is None:
        raise UserError(f"{request.model} has no tokenizer, which --task and --calibration need")
    prompts = _read(request, checkpoint.tokenizer, generation)
    _check(request.model, prompts, generation)
    return prompts


def _sounds(request: Request, sound: SoundSpec) -> Prompts:
    """The first sounds of a task, or made-up ones."""
    data = request.calibration
    count = max(1, min(data.prompts, SOUNDS))
    if data.task is None:
        return Prompts(sounds=made_up_sounds(sound, count))
    found = [read for read, _ in itertools.islice(sounds_of(data.task, read_task(data.task), sound), count)]
    if not found:
        raise UserError(f"{data.task}: no sound is as short as the {sound.seconds:.3g} s that the model reads at once")
    return Prompts(sounds=found)


def _read(request: Request, tokenizer: Tokenizer, generation: Generation) -> Prompts:
    data = request.calibration
    if generation.task == "embed":
        return Prompts(_texts(request, tokenizer, generation))
    if data.task is not None:
        task = read_task(data.task, data.prompts, generation.task == "memory")
        contexts = [tokenizer.encode(c, special=False) for c in task.contexts]
        continues = generation.task != "seq2seq"
        return Prompts([read_prompt(tokenizer, p, continues).ids for p in task.prompts], contexts)
    assert data.text is not None
    windows = text_windows(data.text, tokenizer, min(64, max(2, generation.max_context // 2)), data.prompts)
    if generation.context is None:
        return Prompts(windows)
    return Prompts([w[: max(1, len(w) // 4)] for w in windows], windows)


def _texts(request: Request, tokenizer: Tokenizer, generation: Generation) -> list[list[int]]:
    """Whole texts for a model of embeddings: paragraphs, or of a task file what is asked."""
    data = request.calibration
    if data.task is not None:
        task = read_task(data.task, data.prompts)
        return text_ids(task.prompts, tokenizer, generation, query=True, whose=f"{request.model}: a prompt")
    assert data.text is not None
    return paragraphs(data.text, tokenizer, generation, data.prompts)


def _random(generation: Generation, count: int) -> Prompts:
    if generation.task == "module" and generation.vocab == 1:
        return Prompts()
    prompts = [p[: max(1, generation.max_context - 1)] for p in random_prompts(generation.vocab, count)]
    if generation.context is None:
        return Prompts(prompts)
    prompts = [p[:_SHORT_PROMPT] for p in prompts[: max(2, count // 4)]]
    return Prompts(prompts, _random_contexts(generation.context, len(prompts)))


def _random_contexts(context: ContextSpec, count: int) -> list[list[int]]:
    """Of several lengths; one of four is read in two parts, or in several chunks."""
    long = context.window + 5 if context.window <= LONGEST_CONTEXT else LONGEST_CONTEXT
    lengths = [long, 70, 9, 33]
    return random_contexts(context.vocab, [lengths[i % 4] for i in range(count)])


def _check(model: str, prompts: Prompts, generation: Generation) -> None:
    for prompt in prompts.tokens:
        if len(prompt) >= generation.max_context and generation.task != "embed":
            raise UserError(f"a prompt of {len(prompt)} tokens does not fit --max-context {generation.max_context}")
        require_tokens(prompt, generation.vocab, f"{model}: a prompt")
    if generation.context is not None:
        for context in prompts.contexts:
            require_tokens(context, generation.context.vocab, f"{model}: a context")


def example_calls(model: LanguageModel, generation: Generation, prompts: Sequence[Sequence[int]]) -> list[Call]:
    """What a model without a generate loop is compared on: its own examples, or the prompts in padded batches."""
    if model.task != "module":
        return []
    if own := model.examples():
        return own
    calls: list[Call] = []
    for start in range(0, len(prompts), _EXAMPLE_ROWS):
        ids, mask = padded(prompts[start : start + _EXAMPLE_ROWS], generation.pad_id)
        calls.append(("encoder", {"input_ids": ids, "encoder_mask": mask}))
    return calls


def sound_calls(prompts: Prompts) -> list[Call]:
    """The sounds as calls of the encoder, which a bundle keeps as its examples."""
    return [("encoder", {name: torch.from_numpy(value) for name, value in s.items()}) for s in prompts.sounds]
