"""A bundle answers a prompt, from a context where its model reads one. No torch enters.

What may enter: `bundle`, `tokenizer`, `runtimes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from ..bundle import CHECKPOINT, Bundle
from ..checkpoints.tokenizer import Tokenizer
from ..errors import UserError
from ..runtimes.generate import Sampling, generate, read_context
from ..runtimes.registry import open_session
from ..runtimes.session import Array
from ..system.reading import one_line


def answer(
    path: Path,
    prompt: str,
    format: str | None,
    chat: bool | None,
    new_tokens: int | None,
    sampling: Sampling,
    threads: int,
    progress: Callable[[str], None] = lambda _: None,
    context: str | None = None,
    memory: Path | None = None,
    save_memory: Path | None = None,
) -> Iterator[str]:
    """Pieces of text as they are generated. chat None: the chat template where the tokenizer has one.

    format None: the first target of the bundle. What stands in for its device, if anything does, goes to `progress`. context:
    text that a "memory" model reads first; memory: a file that holds what it made of one, save_memory: where to keep it.
    Raises UserError for an empty or over-long prompt, a bundle without a tokenizer, a format it does not hold, or a memory
    of another model.
    """
    if not prompt.strip():
        raise UserError("the prompt is empty; give some text")
    bundle = Bundle.open(path)
    spec = bundle.manifest.generation
    if spec.task == "module":
        raise UserError(f"{path} holds a module, which answers no prompt; 'edgewright verify' runs it on its examples")
    if spec.task != "memory" and (context is not None or memory is not None or save_memory is not None):
        raise UserError(f"{path}: this model keeps no memory of a context; give all of it as the prompt")
    if context is not None and memory is not None:
        raise UserError("--context makes the memory and --memory brings one; give one of them")
    if save_memory is not None and context is None:
        raise UserError("--save-memory keeps what was made of a context; give --context FILE")
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
    rows = None
    if memory is not None:
        rows = read_memory(memory, bundle)
    elif context is not None:
        read = tokenizer.encode(context, special=False)
        if spec.context is not None and max(read, default=0) >= spec.context.vocab:
            raise UserError(
                f"{path}: its tokenizer gives token {max(read)}, the context's model has {spec.context.vocab}"
            )
        parts = -(-len(read) // spec.context.window) if spec.context is not None else 1
        progress(f"reading a context of {len(read)} tokens" + (f" in {parts} parts" if parts > 1 else ""))
        rows = read_context(session, spec, read)
        if save_memory is not None:
            write_memory(save_memory, rows, bundle)
            progress(f"wrote {save_memory}: {rows.shape[1]} rows of memory")
    stream = tokenizer.stream()
    most = min(new_tokens or spec.max_new_tokens, spec.max_context - 1)
    for token in generate(session, spec, ids, most, sampling, rows):
        piece = stream.put(token)
        if piece:
            yield piece
    rest = stream.end()
    if rest:
        yield rest


def write_memory(path: Path, rows: Array, bundle: Bundle) -> None:
    """Keep the memory [1, rows, hidden] of a context for later questions. Raises UserError if the disk refuses."""
    made_by = {"edgewright.memory": bundle.manifest.source_fingerprint, "plan": _plan(bundle)}
    temporary = path.with_name(f".{path.name}.partial")
    try:
        safetensors.numpy.save_file({"memory": np.ascontiguousarray(rows, np.float32)}, temporary, made_by)
        temporary.replace(path)
    except Exception as error:  # the library's and the file system's errors share no base
        raise UserError(f"{path} cannot be written ({one_line(error, 80)})") from None


def read_memory(path: Path, bundle: Bundle) -> Array:
    """The memory a file keeps. Raises UserError if it is damaged, of another model, or of other weights of it."""
    context = bundle.manifest.generation.context
    assert context is not None
    try:
        with safetensors.safe_open(path, "np") as file:
            made_by: dict[str, str] = file.metadata() or {}
            rows: Array = file.get_tensor("memory")
    except Exception as error:
        raise UserError(
            f"{one_line(path)} is no memory of a context ({one_line(error, 80)}); make one with --save-memory"
        ) from None
    if made_by != {"edgewright.memory": bundle.manifest.source_fingerprint, "plan": _plan(bundle)}:
        raise UserError(f"{path} was made by another model, or by other weights of this one; read the context again")
    if rows.ndim != 3 or rows.shape[0] != 1 or rows.shape[2] != context.hidden or rows.dtype != np.float32:
        raise UserError(f"{path}: a memory of shape {list(rows.shape)} does not fit this model; read the context again")
    return rows


def _plan(bundle: Bundle) -> str:
    """What tells the weights of a bundle from those of the same model at other bits."""
    return bundle.manifest.files[f"{CHECKPOINT}/model.safetensors"]


def _ids(tokenizer: Tokenizer, prompt: str, chat: bool | None) -> list[int]:
    text = None if chat is False else tokenizer.apply_chat([{"role": "user", "content": prompt}])
    if text is None:
        if chat:
            raise UserError("--chat: the tokenizer has no chat template; leave --chat out")
        return tokenizer.encode(prompt)
    return tokenizer.encode(text, special=False)  # the template writes its own special tokens
