"""`run --audio`: what is said in a sound file. No torch is imported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..checkpoints.prompt import AS_IT_IS, ChatOptions
from ..errors import UserError
from ..runtimes.text_generation import SpokenText, open_bundle
from ..system.memory import no_more_than_available
from .run import RunOptions


def run_sound(path: Path, sound: Path, options: RunOptions) -> Iterator[SpokenText]:
    """What is said in a sound file, as it is found.

    Raises UserError for a bundle that reads no sound, a file that is none, and options that go with a prompt.
    """
    _refuse_options_of_prompts(options)
    opened = open_bundle(path, options.format, options.threads, options.check)
    with no_more_than_available(opened.size):
        sampling = replace(opened.default_sampling(options.seed or 0), **options.sampling)
        yield from opened.transcribe(sound, options.speech, max_new_tokens=options.max_new_tokens, sampling=sampling)


def _refuse_options_of_prompts(options: RunOptions) -> None:
    """Raise UserError for the first option that a sound has no use for."""
    given = {
        "--context": options.context is not None,
        "--memory": options.memory is not None,
        "--save-memory": options.save_memory is not None,
        "--stop": bool(options.stops),
        "--stop-token": bool(options.stop_tokens),
        "--answers": options.answers != 1,
        "--show-prompt": options.show_prompt,
        "--chat and what belongs to it": options.chat not in (AS_IT_IS, ChatOptions(use=False)),
        "--target-language (of a sound: --language or --translate)": options.target_language is not None,
    }
    for flag, there in given.items():
        if there:
            raise UserError(f"{flag} goes with a prompt; leave it out with --audio")


def text_of(pieces: Iterable[SpokenText], timestamps: bool) -> Iterator[str]:
    """What is printed: the text as it goes on, or with timestamps a line for each segment."""
    return _lines(pieces) if timestamps else _joined(pieces)


def json_of(pieces: Iterable[SpokenText]) -> dict[str, Any]:
    """The segments, times in seconds."""
    return {"segments": [asdict(piece) for piece in pieces]}


def _lines(pieces: Iterable[SpokenText]) -> Iterator[str]:
    """A line for each segment, without the last line's end."""
    for i, piece in enumerate(pieces):
        yield f"{chr(10) if i else ''}[{_clock(piece.start)} --> {_clock(piece.end)}] {piece.text.strip()}"


def _clock(seconds: float) -> str:
    """Hours where there are any, minutes, seconds and hundredths."""
    hundredths = round(seconds * 100)
    minutes, rest = divmod(hundredths, 6000)
    hours, minutes = divmod(minutes, 60)
    return f"{f'{hours}:' if hours else ''}{minutes:02d}:{rest // 100:02d}.{rest % 100:02d}"


def _joined(pieces: Iterable[SpokenText]) -> Iterator[str]:
    """The text without its leading space; a space between windows where the tokenizer writes none at a text's beginning."""
    last = ""
    for piece in pieces:
        text = piece.text if last else piece.text.lstrip()
        gap = bool(last and text) and last[-1].isascii() and not last[-1].isspace() and not text[0].isspace()
        yield (" " if gap else "") + text
        last = text or last
