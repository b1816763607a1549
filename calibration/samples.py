"""Calibration data: a text or a task file as samples of tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..bundle import Generation, SpeechSpec, require_tokens
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.prompt import read_prompt
from ..checkpoints.tokenizer import Tokenizer
from ..errors import UserError
from ..system import digest as sha256
from .prompts import paragraphs, read_task, text_ids, text_windows
from .sounds import Sound, sounds_of

MOST_TOKENS = 1 << 15
"""Tokens of one calibration, unless memory allows fewer."""

WINDOW = 512
"""Tokens of a window of text, unless the model takes fewer in one call."""

Call = tuple[str, dict[str, torch.Tensor]]
"""A graph and its inputs by name."""


@dataclass(frozen=True)
class Sample:
    """One piece of calibration data as token ids.

    tokens: what the model reads. decoded: what the decoder of an encoder-decoder is fed, its start token first. context: of
    a model that reads one. sound: in place of tokens, the inputs of an encoder that reads sound. heard: its positions.
    """

    tokens: tuple[int, ...]
    decoded: tuple[int, ...] = ()
    context: tuple[int, ...] = ()
    sound: Sound | None = field(default=None, compare=False)
    heard: int = 0

    @property
    def read(self) -> int:
        """Positions of an encoder, or tokens of a decoder."""
        return self.heard or len(self.tokens)

    @property
    def size(self) -> int:
        return self.read + len(self.decoded) + len(self.context)


def evenly(samples: Sequence[Sample], most: int) -> list[Sample]:
    """At most `most` of the samples, evenly spread."""
    count = min(most, len(samples))
    return [samples[i * len(samples) // count] for i in range(count)]


def digest(samples: Sequence[Sample]) -> str:
    """SHA-256 (hex) of the samples: the same samples give the same codes."""
    text = json.dumps([[s.tokens, s.decoded, s.context] for s in samples], separators=(",", ":"))
    sounds = [("encoder", {n: torch.from_numpy(v) for n, v in s.sound.items()}) for s in samples if s.sound is not None]
    return sha256.of_text(text + digest_calls(sounds) if sounds else text)


def digest_calls(calls: Sequence[Call]) -> str:
    """`digest` of a module's example inputs."""
    total = hashlib.sha256()
    for graph, inputs in calls:
        for name, value in sorted(inputs.items()):
            total.update(f"{graph}\0{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
            total.update(sha256.tensor_bytes(value))
    return total.hexdigest()


def read_samples(
    path: Path, checkpoint: Checkpoint, generation: Generation, longest: int, most_tokens: int = MOST_TOKENS
) -> list[Sample]:
    """Samples of a text file, or of a task file (`.tsv`): prompts with their first answers. About `most_tokens` tokens in all.

    longest: tokens the model's decoder, or encoder of texts, takes in one call. Of a text, an encoder-decoder reads the first half
    of each window and its decoder is fed the second; a model with a context reads the first half as that, a model of embeddings
    paragraphs. Raises UserError for a file that cannot be read or has too little in it, a model without a tokenizer, or tokens
    that the model does not have.
    """
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        raise UserError(f"{checkpoint.source} has no tokenizer, which calibration data need")
    if generation.task == "embed":
        samples = _of_texts(path, tokenizer, generation, longest, most_tokens)
    elif generation.speech is not None:
        samples = _of_sounds(path, tokenizer, generation, generation.speech, longest)
    elif path.suffix == ".tsv":
        samples = _of_task(path, tokenizer, generation, longest)
    else:
        samples = _of_text(path, tokenizer, generation, longest, most_tokens)
    kept: list[Sample] = []
    total = 0
    for sample in samples:
        total += sample.size
        if total > most_tokens and kept:
            break
        require_tokens((*sample.tokens, *sample.decoded), generation.vocab, f"{path}: a sample")
        if generation.context is not None:
            require_tokens(sample.context, generation.context.vocab, f"{path}: a context")
        kept.append(sample)
    if not kept:
        raise UserError(f"{path}: too little text to calibrate on; give a longer one")
    return kept


def _of_sounds(
    path: Path, tokenizer: Tokenizer, generation: Generation, speech: SpeechSpec, longest: int
) -> Iterator[Sample]:
    if path.suffix != ".tsv":
        raise UserError(
            f"{path}: this model reads sound; give --task FILE.tsv, whose lines are 'sound.wav<TAB>what is said'"
        )
    start = () if generation.decoder_start is None else (generation.decoder_start, *generation.forced)
    lead = "" if speech.no_timestamps is None else " "  # Whisper's words begin with it
    for sound, answer in sounds_of(path, read_task(path), speech.sound):
        tokens = tokenizer.encode(lead + answer, special=False)
        mask = sound.get("encoder_mask")
        heard = speech.sound.positions if mask is None else mask.shape[1]
        yield Sample((), (*start, *tokens)[:longest], sound=sound, heard=heard)


def _of_task(path: Path, tokenizer: Tokenizer, generation: Generation, longest: int) -> Iterator[Sample]:
    start = () if generation.decoder_start is None else (generation.decoder_start, *generation.forced)
    task = read_task(path, None, generation.task == "memory")
    for i, prompt in enumerate(task.prompts):
        tokens = read_prompt(tokenizer, prompt, generation.task != "seq2seq").ids
        answer = tokenizer.encode(task.answers[i][0], special=False)
        context = tuple(tokenizer.encode(task.contexts[i], special=False)) if task.contexts else ()
        if generation.task == "seq2seq":
            yield Sample(tuple(tokens)[: generation.max_context - 1], (*start, *answer)[:longest])
        else:
            yield Sample((*tokens, *answer)[:longest], (), context)


def _of_texts(
    path: Path, tokenizer: Tokenizer, generation: Generation, longest: int, most_tokens: int
) -> Iterator[Sample]:
    """Whole texts for a model of embeddings: paragraphs, or of a task file what is asked and what answers it."""
    most = min(WINDOW, longest, generation.max_context)
    if path.suffix != ".tsv":
        for ids in paragraphs(path, tokenizer, generation, max(1, most_tokens // 8)):
            yield Sample(_cut(tokenizer, ids, most))
        return
    task = read_task(path)
    answers = [accepted[0] for accepted in task.answers]
    asked = text_ids(task.prompts, tokenizer, generation, query=True, whose=str(path))
    searched = text_ids(answers, tokenizer, generation, query=False, whose=str(path))
    for pair in zip(asked, searched, strict=True):
        for ids in pair:
            yield Sample(_cut(tokenizer, ids, most))


def _cut(tokenizer: Tokenizer, ids: Sequence[int], most: int) -> tuple[int, ...]:
    """At most `most` ids, with the special tokens behind a text."""
    after = tokenizer.special_tokens()[1] if len(ids) > most else []
    return tuple(ids) if len(ids) <= most else (*ids[: most - len(after)], *after)


def _of_text(
    path: Path, tokenizer: Tokenizer, generation: Generation, longest: int, most_tokens: int
) -> Iterator[Sample]:
    start = () if generation.decoder_start is None else (generation.decoder_start, *generation.forced)
    halves = generation.task in ("seq2seq", "memory")
    length = max(4, min(WINDOW, longest, generation.max_context // 2) * (2 if halves else 1))
    for window in text_windows(path, tokenizer, length, max(1, most_tokens // length)):
        first, second = tuple(window[: len(window) // 2]), tuple(window[len(window) // 2 :])
        if not halves:
            yield Sample(tuple(window))
        elif len(window) >= 4 and generation.task == "seq2seq":
            yield Sample(first, (*start, *second)[:longest])
        elif len(window) >= 4:
            yield Sample(second, (), first)
