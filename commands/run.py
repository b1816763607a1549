"""`run`: the text that a bundle generates for a prompt or a sound. No torch is imported."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpoints.prompt import AS_IT_IS, ChatOptions
from ..errors import UserError
from ..runtimes.answer import Answer, Stops
from ..runtimes.sampling import Sampling
from ..runtimes.session import Array
from ..runtimes.text_generation import OpenBundle, open_bundle
from ..runtimes.transcribe import PLAINLY, SpeechOptions
from ..system.memory import no_more_than_available

Progress = Callable[[str], None]

REASONS = {
    "end": "an end token",
    "limit": "the limit of new tokens (-n)",
    "context": "the context is full",
    "stop": "a stop string or token",
    "unfinished": "it was left",
}
"""`Answer.reason` in words."""


@dataclass(frozen=True)
class RunOptions:
    """The options of `run`; those of `OpenBundle.generate` mean the same there.

    sampling: `Sampling`'s fields that differ from what the model's makers say. seed: None is a random one. answers: how many.
    stops, stop_tokens: texts, and tokens as the tokenizer spells them or by their ids. context: text that a decoder-decoder reads
    first. memory: a file with what it made of one. save_memory: the file that keeps what it makes of `context`. show_prompt: say
    what the model reads. speech: of a sound. check: as of `open_bundle`.
    """

    format: str | None = None
    threads: int = 0
    max_new_tokens: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    answers: int = 1
    stops: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...] = ()
    chat: ChatOptions = AS_IT_IS
    show_prompt: bool = False
    context: str | None = None
    memory: Path | None = None
    save_memory: Path | None = None
    target_language: str | None = None
    speech: SpeechOptions = PLAINLY
    check: bool = True


@dataclass(frozen=True)
class Said:
    """An answer that is being written, and how it is drawn."""

    answer: Answer
    sampling: Sampling

    def to_json(self, text: str) -> dict[str, Any]:
        """text: what was written."""
        answer = self.answer
        drawn = {} if self.sampling.greedy else {"seed": self.sampling.seed}
        return {
            "text": text,
            "tokens": answer.ids,
            "stopped": answer.reason,
            "prompt_tokens": answer.prompt_tokens,
            "new_tokens": len(answer.ids),
            "first_token_seconds": round(answer.first_seconds, 6),
            "tokens_per_second": round(answer.rate, 3),
            **drawn,
        }

    def line(self) -> str:
        """Why it ended, how long it is and how fast it was."""
        answer = self.answer
        rate = f", {answer.rate:.1f} tokens/s" if answer.rate else ""
        seed = "" if self.sampling.greedy else f", seed {self.sampling.seed}"
        return (
            f"stopped by {REASONS[answer.reason]}: {len(answer.ids)} tokens{rate}, "
            f"{answer.prompt_tokens} of prompt in {answer.first_seconds:.2f} s{seed}"
        )


def run_prompt(path: Path, prompt: str, options: RunOptions, progress: Progress = lambda _: None) -> Iterator[Said]:
    """The answers, each to be read before the next; notes go to `progress`.

    Raises UserError for an empty or too long prompt, a bundle that cannot read text, a target that it does not hold, or
    a memory of another model.
    """
    if not prompt.strip():
        raise UserError("the prompt is empty; give some text")
    opened = open_bundle(path, options.format, options.threads, options.check)
    with no_more_than_available(opened.size):
        yield from _answers(opened, prompt, options, progress)


def _answers(opened: OpenBundle, prompt: str, options: RunOptions, progress: Progress) -> Iterator[Said]:
    _check_memory_options(opened, options, progress)
    read = opened.read_prompt(prompt, options.chat)
    for line in read.notes:
        progress(line)
    if options.show_prompt:
        progress(f"the prompt, {len(read.ids)} tokens {read.ids[:64]}{'…' * (len(read.ids) > 64)}:\n{read.text}")
    sampling = _sampling(opened, options, progress)
    stops = Stops(options.stops, opened.token_ids(options.stop_tokens))
    if opened.session.stand_in:
        progress(opened.session.how)
    memory = _memory(opened, options, progress)
    for number in range(options.answers):
        drawn = replace(sampling, seed=(sampling.seed + number) % (1 << 63))
        answer = opened.generate(
            read.ids,
            max_new_tokens=options.max_new_tokens,
            sampling=drawn,
            stops=stops,
            memory=memory,
            target_language=options.target_language,
        )
        yield Said(answer, drawn)


def _sampling(opened: OpenBundle, options: RunOptions, progress: Progress) -> Sampling:
    """The makers' sampling with what the options change. Options that change nothing get a line."""
    makers = opened.default_sampling(secrets.randbits(31) if options.seed is None else options.seed)
    sampling = replace(makers, **options.sampling)
    if sampling.greedy:
        idle = [flag for flag in sampling.idle if flag.removeprefix("--").replace("-", "_") in options.sampling]
        if options.seed is not None:
            idle.append("--seed")
        if idle:
            progress(f"{', '.join(idle)} without effect: the best token is taken (--temperature above 0 draws)")
        if options.answers > 1:
            raise UserError("--answers above 1 would be one answer again and again: give --temperature above 0")
    return sampling


def _check_memory_options(opened: OpenBundle, options: RunOptions, progress: Progress) -> None:
    """Raise UserError for options that the model does not take or that exclude each other."""
    if options.context is None and options.memory is None and options.save_memory is None:
        if opened.bundle.manifest.generation.task == "memory":
            progress("no --context and no --memory: the model answers without the context that it was trained with")
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
