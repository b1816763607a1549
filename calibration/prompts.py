"""Text files as token prompts: calibration text, text to be scored, and task files.

A task file is TSV: a prompt, a tab, and the accepted answers separated by ` | `. For a model that reads a context a line
begins with that context and a tab.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..bundle import Generation, require_tokens
from ..checkpoints.tokenizer import Tokenizer
from ..errors import UserError
from ..runtimes.session import Array
from ..system.reading import MEBIBYTE, read_text

_LIMIT = 256 * MEBIBYTE

WINDOW = 512
"""Tokens of a window of text to be scored, unless the model takes fewer."""


@dataclass(frozen=True)
class Prompts:
    """Prompts as token ids, with a context for each where the model reads one; or sounds, of a model that reads those."""

    tokens: Sequence[Sequence[int]] = ()
    contexts: Sequence[Sequence[int]] = ()
    sounds: Sequence[Mapping[str, Array]] = ()


NO_PROMPTS = Prompts()


@dataclass(frozen=True)
class Task:
    """Prompts with their accepted answers, and the context of each where the file has them."""

    prompts: list[str]
    answers: list[list[str]]
    contexts: list[str] = field(default_factory=list)


def read_task(path: Path, limit: int | None = None, contexts: bool = False) -> Task:
    """Read a task file. Raises UserError naming the first line that is not `prompt<TAB>answer | answer`.

    contexts: a line is `context<TAB>prompt<TAB>answer | answer`, for a model that reads one.
    """
    form = "context<TAB>prompt<TAB>answer | answer" if contexts else "prompt<TAB>answer | answer"
    task = Task([], [])
    for number, line in enumerate(read_text(path, _LIMIT).splitlines(), 1):
        if not line.strip():
            continue
        *before, prompt, rest = line.split("\t") if line.count("\t") == 1 + contexts else ("", "")
        accepted = [a.strip() for a in rest.split(" | ") if a.strip()]
        if not prompt.strip() or not accepted or not all(c.strip() for c in before):
            raise UserError(f"{path}: line {number} is not '{form}'")
        task.prompts.append(prompt.strip())
        task.answers.append(accepted)
        task.contexts.extend(c.strip() for c in before)
        if limit is not None and len(task.prompts) >= limit:
            break
    if not task.prompts:
        raise UserError(f"{path}: no prompts in it; a line is '{form}'")
    return task


def text_windows(path: Path, tokenizer: Tokenizer, length: int, count: int) -> list[list[int]]:
    """Up to `count` consecutive windows of `length` tokens from the start of a text file, the last one maybe shorter.

    Each begins with the tokenizer's begin-of-text token where it has one: Gemma computes nonsense without it.
    """
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    pieces = _pieces(path, tokenizer, max(1, length - len(start)), count)
    windows = [w for w in (start + piece for piece in pieces) if len(w) > 1]
    if not windows:
        total = sum(map(len, pieces))
        raise UserError(f"{path}: too little text; {length} tokens a window are wanted, there are {total}")
    return windows


def paragraphs(path: Path, tokenizer: Tokenizer, generation: Generation, count: int) -> list[list[int]]:
    """Up to `count` paragraphs of a text file, of a file of one paragraph its lines, each as an "embed" model reads what is
    searched. Raises UserError for a file without text, or a tokenizer that is not the model's."""
    text = read_text(path, _LIMIT)
    parts = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    parts = [part for part in parts if part] if len(parts) > 1 else text.splitlines()
    texts = [part for part in dict.fromkeys(parts) if part.strip()][:count]
    if not texts:
        raise UserError(f"{path}: no text in it; paragraphs are wanted, an empty line between them")
    return text_ids(texts, tokenizer, generation, query=False, whose=str(path))


def text_ids(
    texts: Sequence[str], tokenizer: Tokenizer, generation: Generation, query: bool, whose: str
) -> list[list[int]]:
    """Texts as an "embed" model reads what is asked (query) or what is searched: with the prompt for it, cut to what it takes.

    whose: what an error names. Raises UserError for tokens that the model does not have.
    """
    spec = generation.embedding
    assert spec is not None
    prompt = spec.role(query)
    encoded = [tokenizer.encode_within(spec.prepared(text, prompt), generation.max_context)[0] for text in texts]
    for ids in encoded:
        require_tokens(ids, generation.vocab, whose)
    return encoded


def _pieces(path: Path, tokenizer: Tokenizer, length: int, count: int) -> list[list[int]]:
    """Up to `count` consecutive pieces of `length` tokens, the last one maybe shorter, no special tokens among them."""
    text = read_text(path, _LIMIT)
    # A token is at least about a byte: far more text than the pieces need is not encoded.
    ids = tokenizer.encode(text[: length * count * 16], special=False)
    return [ids[i : i + length] for i in range(0, len(ids), length)][:count]


@dataclass(frozen=True)
class Passage:
    """A window of text as a model reads it, in token ids.

    scored: the tokens whose likelihood counts. prompt: what stands before them, of an encoder-decoder what its encoder reads.
    context: what a "memory" task reads first; there the prompt may be empty.
    """

    scored: tuple[int, ...]
    prompt: tuple[int, ...] = ()
    context: tuple[int, ...] = ()


def text_passages(path: Path, tokenizer: Tokenizer, generation: Generation, count: int) -> list[Passage]:
    """Up to `count` consecutive windows of WINDOW tokens, or of what the context allows, from the start of a text file.

    A decoder-only model is scored on all but a window's first token. An encoder-decoder reads a window's first half with the
    special tokens of a prompt and is scored on the second; a model with a context reads the first half, one part of it at
    most, and is scored on the rest. Raises UserError for too little text or a tokenizer that is not the model's.
    """
    if generation.task == "seq2seq":
        before, after = tokenizer.special_tokens()
        half = min(WINDOW // 2, generation.max_context - len(before) - len(after))
        sizes = (half, min(WINDOW // 2, generation.max_context))
    elif generation.context is not None:
        before, after = [], []
        half = min(WINDOW // 2, generation.context.window, generation.max_context // 2)
        rows = min(generation.context.rows, len(generation.context.tokens) or half + 1)
        sizes = (half, min(WINDOW // 2, generation.max_context - len(generation.context.prefix) - rows))
    else:
        windows = text_windows(path, tokenizer, max(2, min(WINDOW, generation.max_context - 1)), count)
        return _checked(path, generation, [Passage(tuple(w[1:]), (w[0],)) for w in windows])
    if min(sizes) < 2:
        raise UserError(
            f"a context of {generation.max_context} tokens holds no window of text; export with a larger one"
        )
    passages = []
    for ids in _pieces(path, tokenizer, sum(sizes), count):
        first = min(sizes[0], len(ids) // 2)
        read, scored = (*before, *ids[:first], *after), tuple(ids[first:][: sizes[1]])
        if first and len(scored) > 1:
            passages.append(Passage(scored, read) if generation.context is None else Passage(scored, (), read))
    if not passages:
        raise UserError(f"{path}: too little text; {sum(sizes)} tokens a window are wanted, at least 3")
    return _checked(path, generation, passages)


def _checked(path: Path, generation: Generation, passages: list[Passage]) -> list[Passage]:
    vocab = generation.vocab if generation.context is None else min(generation.vocab, generation.context.vocab)
    for passage in passages:
        require_tokens((*passage.scored, *passage.prompt, *passage.context), vocab, str(path))
    return passages


def random_prompts(vocab: int, count: int, seed: int = 0) -> list[list[int]]:
    """`count` prompts of 4 to 24 random token ids: enough to compare arithmetic where there is no text."""
    rng = random.Random(seed)
    low = min(4, vocab - 1)
    return [[rng.randrange(low, vocab) for _ in range(rng.randint(4, 24))] for _ in range(count)]


def random_contexts(vocab: int, lengths: Sequence[int], seed: int = 1) -> list[list[int]]:
    """Contexts of random token ids, one of each length."""
    rng = random.Random(seed)
    low = min(4, vocab - 1)
    return [[rng.randrange(low, vocab) for _ in range(length)] for length in lengths]
