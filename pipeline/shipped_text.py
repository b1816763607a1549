"""The text that ships with the product: language models calibrate on it where the user gives no data; a part is held out."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from ..bundle import Generation
from ..calibration.prompts import paragraphs, text_windows
from ..calibration.samples import Sample
from ..checkpoints.checkpoint import Checkpoint
from ..errors import UserError
from ..system.reading import read_text
from .request import Progress, Request

_FOLDER = Path(__file__).parents[1] / "calibration"
TEXT = _FOLDER / "default.txt"
HELD_OUT = _FOLDER / "held_out.txt"
"""Nothing calibrates on it: what export says of its own quality is measured here."""

_FEWEST_KNOWN = 0.8
"""Share of the text's characters that a tokenizer must give back: T5's lacks Chinese and braces, one of phonemes nearly all."""

_LARGEST = 1 << 20
_WINDOWS, _WINDOW = 4, 256
_TEXTS = 16


def with_shipped_text(request: Request, checkpoint: Checkpoint, generation: Generation, progress: Progress) -> Request:
    """`request` with the text that ships, where it gives no data, wants some, and the tokenizer knows the text.

    A plan that was made on it needs it again.
    """
    data, made = request.calibration, request.budget.plan
    if data.file is not None or not data.shipped or data.quantizer == "rtn":
        return request
    if made is not None and made.calibration is None:
        return request
    if generation.task == "module" or checkpoint.tokenizer is None:
        return request
    unknown = unfamiliar(checkpoint, generation)
    if unknown is not None:
        progress(f"no calibration on the text that ships, as {unknown}; --calibration FILE calibrates on yours")
        return request
    progress(
        "calibration on the text that ships; better: --calibration FILE, a text like the model's own; none: without"
    )
    return replace(request, calibration=replace(data, text=TEXT))


def unfamiliar(checkpoint: Checkpoint, generation: Generation) -> str | None:
    """Why a model cannot be judged on the text that ships, such as a vocabulary of phonemes; None where it can."""
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        return "the model has no tokenizer"
    text = read_text(HELD_OUT, _LARGEST)
    try:
        ids = tokenizer.encode(text, special=False)
        given, back = _letters(text), _letters(tokenizer.decode(ids))
    except UserError as error:
        return str(error)
    known = (given & back).total() / given.total()
    if known < _FEWEST_KNOWN:
        return f"the tokenizer knows {known:.0%} of it"
    vocab = generation.vocab if generation.context is None else min(generation.vocab, generation.context.vocab)
    return f"the model lacks the tokenizer's token {max(ids)}" if max(ids) >= vocab else None


def _letters(text: str) -> Counter[str]:
    """How often each character occurs, but white space; capitals count as small ones, which a tokenizer may make of them."""
    return Counter("".join(text.casefold().split()))


def held_out_samples(checkpoint: Checkpoint, generation: Generation, longest: int) -> list[Sample]:
    """A few short windows of the held-out part; none where the tokenizer does not know it. longest: of the model's one call."""
    tokenizer = checkpoint.tokenizer
    if tokenizer is None or generation.task == "module" or unfamiliar(checkpoint, generation) is not None:
        return []
    if generation.task == "embed":
        texts = paragraphs(HELD_OUT, tokenizer, generation, _TEXTS)
        return [Sample(tuple(ids)) for ids in texts if len(ids) <= longest]
    start = () if generation.decoder_start is None else (generation.decoder_start, *generation.forced)
    length = max(4, min(_WINDOW, longest, generation.max_context // 2))
    windows = text_windows(HELD_OUT, tokenizer, length, _WINDOWS)
    samples = []
    for window in (tuple(w) for w in windows if len(w) >= 4):
        first, second = window[: len(window) // 2], window[len(window) // 2 :]
        if generation.task == "causal":
            samples.append(Sample(window))
        elif generation.task == "seq2seq":
            samples.append(Sample(first, (*start, *second)[:longest]))
        else:
            samples.append(Sample(second, (), first))
    return samples
