"""`run`: the text that a bundle generates for a prompt or a sound. No torch is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..runtimes.generate import Sampling
from ..runtimes.session import Array
from ..runtimes.text_generation import GREEDY, OpenBundle, SpokenText, open_bundle
from ..runtimes.transcribe import PLAINLY, SpeechOptions
from ..system.memory import no_more_than_available

Progress = Callable[[str], None]


@dataclass(frozen=True)
class RunOptions:
    """The options of `run`; those of `OpenBundle.generate` mean the same there.

    context: text that a decoder-decoder reads first. memory: a file with what it made of one. save_memory: the file that
    keeps what it makes of `context`. speech: of a sound. check: as of `open_bundle`.
    """

    format: str | None = None
    threads: int = 0
    max_new_tokens: int | None = None
    sampling: Sampling = GREEDY
    chat: bool | None = None
    context: str | None = None
    memory: Path | None = None
    save_memory: Path | None = None
    target_language: str | None = None
    speech: SpeechOptions = PLAINLY
    check: bool = True


def run_prompt(path: Path, prompt: str, options: RunOptions, progress: Progress = lambda _: None) -> Iterator[str]:
    """Pieces of text as they are generated; notes go to `progress`.

    Raises UserError for an empty or too long prompt, a bundle that cannot read text, a target that it does not hold, or
    a memory of another model.
    """
    if not prompt.strip():
        raise UserError("the prompt is empty; give some text")
    opened = open_bundle(path, options.format, options.threads, options.check)
    with no_more_than_available(_size(opened)):
        yield from _answer(opened, prompt, options, progress)


def run_sound(path: Path, sound: Path, options: RunOptions, progress: Progress = lambda _: None) -> Iterator[str]:
    """Pieces of what is said in a sound file, as they are found; with timestamps a line for each segment.

    Raises UserError for a bundle that reads no sound, a file that is none, and options that go with a prompt.
    """
    opened = open_bundle(path, options.format, options.threads, options.check)
    for given, flag in ((options.context, "--context"), (options.memory, "--memory"), (options.chat, "--chat")):
        if given:
            raise UserError(f"{flag} goes with a prompt; leave it out with --audio")
    if options.target_language is not None:
        raise UserError("--target-language goes with a prompt; of a sound, say --language or --translate")
    with no_more_than_available(_size(opened)):
        pieces = opened.transcribe(
            sound, options.speech, max_new_tokens=options.max_new_tokens, sampling=options.sampling
        )
        yield from _lines(pieces) if options.speech.timestamps else _joined(pieces)


def _lines(pieces: Iterator[SpokenText]) -> Iterator[str]:
    """A line for each segment, without the last line's end."""
    for i, piece in enumerate(pieces):
        yield f"{chr(10) if i else ''}[{_clock(piece.start)} --> {_clock(piece.end)}] {piece.text.strip()}"


def _clock(seconds: float) -> str:
    """Hours where there are any, minutes, seconds and hundredths."""
    hundredths = round(seconds * 100)
    minutes, rest = divmod(hundredths, 6000)
    hours, minutes = divmod(minutes, 60)
    return f"{f'{hours}:' if hours else ''}{minutes:02d}:{rest // 100:02d}.{rest % 100:02d}"


def _joined(pieces: Iterator[SpokenText]) -> Iterator[str]:
    """The text without its leading space; a space between windows where the tokenizer writes none at a text's beginning."""
    last = ""
    for piece in pieces:
        text = piece.text if last else piece.text.lstrip()
        gap = bool(last and text) and last[-1].isascii() and not last[-1].isspace() and not text[0].isspace()
        yield (" " if gap else "") + text
        last = text or last


def _answer(opened: OpenBundle, prompt: str, options: RunOptions, progress: Progress) -> Iterator[str]:
    _check_memory_options(opened, options)
    ids = opened.encode_prompt(prompt, options.chat)
    if opened.session.stand_in:
        progress(opened.session.how)
    memory = _memory(opened, options, progress)
    yield from opened.generate(
        ids,
        max_new_tokens=options.max_new_tokens,
        sampling=options.sampling,
        memory=memory,
        target_language=options.target_language,
    )


def _size(opened: OpenBundle) -> int:
    """Bytes of the target's files."""
    files = [opened.bundle.path / name for name in opened.bundle.target(opened.format).files]
    return sum(file.stat().st_size for file in files if file.is_file())


def _check_memory_options(opened: OpenBundle, options: RunOptions) -> None:
    """Raise UserError for options that the model does not take or that exclude each other."""
    if options.context is None and options.memory is None and options.save_memory is None:
        return
    opened.require_context_reader()
    if options.context is not None and options.memory is not None:
        raise UserError("--context makes the memory and --memory brings one; give one of them")
    if options.save_memory is not None and options.context is None:
        raise UserError("--save-memory keeps what was made of a context; give --context FILE")


def _memory(opened: OpenBundle, options: RunOptions, progress: Progress) -> Array | None:
    """The memory [1, rows, hidden] that the options ask for, read from a context or from a file."""
    if options.memory is not None:
        return opened.load_memory(options.memory)
    if options.context is None:
        return None
    ids = opened.encode_context(options.context)
    parts = -(-len(ids) // opened.require_context_reader().window)
    progress(f"reading a context of {len(ids)} tokens" + (f" in {parts} parts" if parts > 1 else ""))
    memory = opened.read_context(ids)
    if options.save_memory is not None:
        opened.save_memory(options.save_memory, memory)
        progress(f"wrote {options.save_memory}: {memory.shape[1]} rows of memory")
    return memory
