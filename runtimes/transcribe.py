"""A sound of any length as text, window by window. No torch is imported.

A sound of one window needs no timestamps. A longer one is read by those of a model that tells them: the next window begins where
the last whole segment ended (arXiv 2212.04356). A model without them gets windows that end where it is quiet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..audio.features import encoder_inputs
from ..audio.files import Samples
from ..bundle import Generation, SoundSpec, SpeechSpec
from ..errors import UserError
from .generate import Stream, generate
from .sampling import GREEDY, Sampling
from .session import Session
from .speech_rules import prefix, rule_of

QUIET = 0.2
"""Of a window, at its end: the share in which a quiet place is looked for."""

_PIECE = 0.02
"""Seconds whose loudness is compared."""


@dataclass(frozen=True)
class SpeechOptions:
    """How a sound is written down.

    language: of the speech, as the model names it ("en"); None is English, or of a model with several what it hears. task:
    "transcribe", or "translate" to English. timestamps: whether segments have times.
    """

    language: str | None = None
    task: str | None = None
    timestamps: bool = False


PLAINLY = SpeechOptions()


@dataclass(frozen=True)
class Segment:
    """A piece of what was said. start, end: seconds; tokens: of the text alone."""

    start: float
    end: float
    tokens: tuple[int, ...]


def transcribe(
    session: Session,
    spec: Generation,
    samples: Samples,
    options: SpeechOptions = PLAINLY,
    new_tokens: int | None = None,
    sampling: Sampling = GREEDY,
) -> Iterator[Segment]:
    """Segments of what is said in samples [n], one channel at the model's rate, as they are found.

    new_tokens: of a window at most; None is the model's limit. Raises UserError for a model that reads no sound, and a language or
    task that it does not know.
    """
    speech = require_speech(spec)
    sound, most = speech.sound, new_tokens or spec.max_new_tokens
    prefix(speech, options.language, options.task, options.timestamps)  # refuses what the model does not know
    timed = speech.first_timestamp is not None and (options.timestamps or len(samples) > sound.window)
    if options.language is None and len(speech.languages) > 1:
        language: str | None = heard_language(session, spec, samples)
    else:
        language = options.language
    asked = spec.model_copy(update={"forced": prefix(speech, language, options.task, timed)})
    rule = rule_of(asked, speech, timed)
    at, end = 0, len(samples) / sound.rate
    while at < len(samples):
        window = samples[at : at + sound.window]
        if not timed and at + len(window) < len(samples):
            window = window[: quiet_end(sound, window)]
        limit = most if speech.tokens_a_second is None else _limit(speech, window, most)
        said = list(generate(session, asked, encoder_inputs(sound, window), limit, sampling, rule=rule))
        start = at / sound.rate
        if timed:
            segments, read = segments_of(speech, said, len(window))
        else:
            segments, read = [Segment(0.0, len(window) / sound.rate, tuple(said))], len(window)
        for segment in segments:
            # a model may hear an end in the silence that fills its window
            yield Segment(min(start + segment.start, end), min(start + segment.end, end), segment.tokens)
        at += read


def require_speech(spec: Generation) -> SpeechSpec:
    """How the model writes sound down. Raises UserError for a model of text."""
    if spec.speech is None:
        raise UserError("this bundle's model reads text, not sound; give --prompt")
    return spec.speech


def heard_language(session: Session, spec: Generation, samples: Samples) -> str:
    """The language that the model finds likeliest in the first window."""
    speech = require_speech(spec)
    asked = spec.model_copy(update={"forced": ()})
    stream = Stream(session, asked, [encoder_inputs(speech.sound, samples)], 1)
    logits = stream.prefill()[0, -1]
    return max(speech.languages, key=lambda name: float(logits[speech.languages[name]]))


def segments_of(speech: SpeechSpec, said: Sequence[int], samples: int) -> tuple[list[Segment], int]:
    """The segments of a window of so many samples by the timestamps among its tokens, and how many samples are read with them.

    Two timestamps side by side end a segment and begin the next. What follows the last such pair may have been cut by the
    window's end, so it is read again; unless a single timestamp ends the window, which says that nothing follows.
    """
    start, sound = speech.first_timestamp, speech.sound
    assert start is not None
    seconds = sound.seconds / sound.positions  # of a position
    times = [token >= start for token in said]
    ends_alone = times[-2:] == [False, True]
    cuts = [i for i in range(1, len(said)) if times[i - 1] and times[i]]

    def text(tokens: Sequence[int]) -> tuple[int, ...]:
        return tuple(token for token in tokens if token < start)

    def segment(tokens: Sequence[int], end: int) -> Segment:
        return Segment((tokens[0] - start) * seconds, (end - start) * seconds, text(tokens))

    if not cuts:
        last = next((token for token in reversed(said) if token > start), None)
        length = samples / sound.rate if last is None else (last - start) * seconds
        return [Segment(0.0, length, text(said))], samples
    segments, begin = [], 0
    for cut in cuts:
        segments.append(segment(said[begin:cut], said[cut - 1]))
        begin = cut
    if ends_alone:
        segments.append(segment(said[begin:], said[-1]))
        return segments, samples
    read = (said[cuts[-1] - 1] - start) * sound.window // sound.positions
    return segments, min(samples, read) or samples  # a window that ends where it began would be read for ever


def quiet_end(sound: SoundSpec, window: Samples) -> int:
    """Where to cut a window that is followed by more: in the middle of the quietest place near its end."""
    piece = max(1, int(_PIECE * sound.rate))
    first = len(window) - int(QUIET * len(window))
    count = (len(window) - first) // piece
    if count < 2:
        return len(window)
    tail = window[first : first + count * piece].astype(np.float64).reshape(count, piece)
    quietest = int((tail**2).mean(1).argmin())
    return first + quietest * piece + piece // 2


def _limit(speech: SpeechSpec, window: Samples, most: int) -> int:
    assert speech.tokens_a_second is not None
    return max(1, min(most, int(speech.tokens_a_second * len(window) / speech.sound.rate) + 1))
