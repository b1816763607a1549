"""A bundle answers a prompt. What may enter: `bundle`, `tokenizer`, `runtimes`; no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from .bundle import CHECKPOINT, Bundle
from .errors import UserError
from .runtimes.generate import Sampling, generate
from .runtimes.opening import open_session
from .tokenizer import Tokenizer


def answer(
    path: Path,
    prompt: str,
    format: str | None,
    chat: bool | None,
    new_tokens: int | None,
    sampling: Sampling,
    threads: int,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[str]:
    """Pieces of text as they are generated. chat None: the chat template where the tokenizer has one.

    format None: the first target of the bundle. What stands in for its device, if anything does, goes to `progress`.
    Raises UserError for an empty or over-long prompt, a bundle without a tokenizer, or a format it does not hold.
    """
    if not prompt.strip():
        raise UserError("the prompt is empty; give some text")
    bundle = Bundle.open(path)
    spec = bundle.manifest.generation
    if not (path / CHECKPOINT / "tokenizer.json").is_file():
        raise UserError(
            f"{path} has no tokenizer, so it cannot read text; export from a checkpoint with a tokenizer.json"
        )
    tokenizer = Tokenizer.from_dir(path / CHECKPOINT)
    ids = _ids(tokenizer, prompt, chat)
    if max(ids, default=0) >= spec.vocab:
        raise UserError(f"{path}: its tokenizer gives token {max(ids)}, the model has {spec.vocab}; export it again")
    session = open_session(bundle, format or bundle.manifest.targets[0].format, threads)
    if session.stand_in:
        progress(session.how)
    stream = tokenizer.stream()
    for token in generate(session, spec, ids, min(new_tokens or spec.max_new_tokens, spec.max_context - 1), sampling):
        piece = stream.put(token)
        if piece:
            yield piece
    rest = stream.end()
    if rest:
        yield rest


def _ids(tokenizer: Tokenizer, prompt: str, chat: bool | None) -> list[int]:
    text = None if chat is False else tokenizer.apply_chat([{"role": "user", "content": prompt}])
    if text is None:
        if chat:
            raise UserError("--chat: the tokenizer has no chat template; leave --chat out")
        return tokenizer.encode(prompt)
    return tokenizer.encode(text, special=False)  # the template writes its own special tokens
