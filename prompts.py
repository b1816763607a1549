"""Text files into token prompts: calibration text and task files. What may enter: `tokenizer`.

A task file is TSV: a prompt, a tab, and the accepted answers separated by ` | `; where the answers lie in a context, that
comes first in the line, and a tab.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .errors import UserError
from .tokenizer import Tokenizer
from .untrusted import MEBIBYTE, read_text

_LIMIT = 256 * MEBIBYTE


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
    text = read_text(path, _LIMIT)
    # A token is at least about a byte; reading far more text than the windows need would be waste.
    ids = tokenizer.encode(text[: length * count * 16], special=False)
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    step = max(1, length - len(start))
    windows = [start + ids[i : i + step] for i in range(0, len(ids), step)][:count]
    if not windows or len(windows[0]) < 2:
        raise UserError(f"{path}: too little text; {length} tokens a window are wanted, there are {len(ids)}")
    return [w for w in windows if len(w) > 1]


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
