"""What a speech model may say next: suppressed tokens, and the grammar of timestamps (arXiv 2212.04356). No torch is imported.

With timestamps each segment of text stands between two of them: its start, the text, its end, and so on; they never go back.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..bundle import Generation, SpeechSpec
from ..errors import UserError
from ..system.reading import shown
from .generate import TokenRule
from .session import Array

_NEVER = -np.inf


def prefix(speech: SpeechSpec, language: str | None, task: str | None, timestamps: bool) -> tuple[int, ...]:
    """The tokens behind the decoder's start: language and task of a model that has several, and whether times are wanted.

    language: as `SpeechSpec.languages` has it; None is English, or the first. Raises UserError for what the model does not know.
    """
    forced: list[int] = []
    if speech.languages:
        forced.append(language_token(speech, language))
    elif language is not None:
        raise UserError(f"--language {shown(language, 40)}: the model knows one language; leave it out")
    if speech.tasks:
        wanted = task or "transcribe"
        named = {str(name): token for name, token in speech.tasks.items()}
        if wanted not in named:
            raise UserError(f"the model does not {wanted}; it knows: {', '.join(named)}")
        forced.append(named[wanted])
    elif task not in (None, "transcribe"):
        raise UserError(f"--{task}: the model transcribes alone; leave it out")
    if timestamps and speech.no_timestamps is None:
        raise UserError("--timestamps: this model tells no times; leave it out")
    if not timestamps and speech.no_timestamps is not None:
        forced.append(speech.no_timestamps)
    return tuple(forced)


def language_token(speech: SpeechSpec, language: str | None) -> int:
    """The token of a language such as "de". Raises UserError for one that the model does not know."""
    if language is None:
        return speech.languages.get("en", next(iter(speech.languages.values())))
    token = speech.languages.get(language.strip().lower().removeprefix("<|").removesuffix("|>"))
    if token is None:
        known = ", ".join(list(speech.languages)[:12])
        raise UserError(f"--language {shown(language, 40)} is not one of this model's: {known} …; give its code")
    return token


def rule_of(spec: Generation, speech: SpeechSpec, timestamps: bool) -> TokenRule:
    """The rule of an answer with timestamps, or without."""
    start = speech.first_timestamp
    suppressed = np.array(speech.suppress, np.int64)
    first = np.array(speech.begin_suppress, np.int64)
    end = min(spec.eos_ids, default=spec.vocab)
    within = _within(speech)

    def rule(said: Sequence[int], logits: Array) -> Array:
        scores = logits.astype(np.float32, copy=True)
        scores[suppressed] = _NEVER
        if not said:
            scores[first] = _NEVER
        if timestamps and start is not None:
            _timestamps(scores, said, start, end, within)
        return scores

    return rule


def _within(speech: SpeechSpec) -> int | None:
    """How many timestamps lie behind the first that an answer may begin with."""
    if speech.first_within is None:
        return None
    return round(speech.first_within * speech.sound.positions / speech.sound.seconds)


def _timestamps(scores: Array, said: Sequence[int], start: int, end: int, within: int | None) -> None:
    """Forbid in scores [vocab] what the grammar of timestamps does not allow. start: the token of time 0; end: the end token."""
    scores[start - 1] = _NEVER  # what asks for no timestamps is no answer
    last = bool(said) and said[-1] >= start
    before = len(said) < 2 or said[-2] >= start
    if last and before:  # a segment has begun: text
        scores[start:] = _NEVER
    elif last:  # a segment has ended: the next one's start, or the end
        scores[:end] = _NEVER
    times = [token for token in said if token >= start]
    if times:
        scores[start : times[-1] + (0 if last and not before else 1)] = _NEVER
    if not said:
        scores[:start] = _NEVER
        if within is not None:
            scores[start + within + 1 :] = _NEVER
    # where any time is likelier than each word, it is a time
    largest = scores.max()
    if np.isfinite(largest):
        weights = np.exp(scores[start:].astype(np.float64) - largest)
        if np.log(max(weights.sum(), 1e-300)) + largest > scores[:start].max():
            scores[:start] = _NEVER
