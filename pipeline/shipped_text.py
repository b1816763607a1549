"""The text that ships with the product: language models calibrate on it where the user gives no data; a part is held out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..bundle import Generation
from ..calibration.prompts import text_windows
from ..calibration.samples import Sample
from ..checkpoints.checkpoint import Checkpoint
from ..errors import UserError
from ..system.reading import read_text
from .request import Progress, Request

_FOLDER = Path(__file__).parents[1] / "calibration"
TEXT = _FOLDER / "default.txt"
HELD_OUT = _FOLDER / "held_out.txt"
"""Nothing calibrates on it: what export says of its own quality is measured here."""

_MOST_UNKNOWN = 0.02
_FEWEST_TOKENS = 1 / 24
"""Tokens a character: a tokenizer that knows fewer drops what it does not know."""

_LARGEST = 1 << 20
_WINDOWS, _WINDOW = 4, 256


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
        progress(f"no calibration: {unknown} of the text that ships; --calibration FILE calibrates on yours")
        return request
    progress(
        "calibration on the text that ships; better: --calibration FILE, a text like the model's own; none: without"
    )
    return replace(request, calibration=replace(data, text=TEXT))


def unfamiliar(checkpoint: Checkpoint, generation: Generation) -> str | None:
    """Why a model cannot be judged on the text that ships, such as a vocabulary of phonemes; None where it can."""
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        return "there is no tokenizer that could make tokens"
    text = read_text(HELD_OUT, _LARGEST)
    try:
        ids = tokenizer.encode(text, special=False)
    except UserError:
        return "the tokenizer makes nothing"
    if len(ids) < len(text) * _FEWEST_TOKENS:
        return f"the tokenizer makes {len(ids)} tokens of {len(text)} characters"
    unknown = ids.count(tokenizer.unk_id) / len(ids) if tokenizer.unk_id is not None else 0.0
    if unknown > _MOST_UNKNOWN:
        return f"the tokenizer does not know {unknown:.0%}"
    vocab = generation.vocab if generation.context is None else min(generation.vocab, generation.context.vocab)
    return f"the model lacks token {max(ids)}" if max(ids) >= vocab else None


def held_out_samples(checkpoint: Checkpoint, generation: Generation, longest: int) -> list[Sample]:
    """A few short windows of the held-out part; none where the tokenizer does not know it. longest: of the model's one call."""
    tokenizer = checkpoint.tokenizer
    if tokenizer is None or generation.task == "module" or unfamiliar(checkpoint, generation) is not None:
        return []
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
