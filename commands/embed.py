"""`run --embed`: the vectors that a bundle makes of texts. No torch is imported."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..runtimes.session import Array
from ..runtimes.text_generation import OpenBundle, open_bundle
from ..system.memory import no_more_than_available
from ..system.writing import write_file

MOST_TEXTS = 1 << 20
MOST_BYTES = 256 << 20
"""Of a file of texts."""

_TOGETHER = 256
Progress = Callable[[str], None]


@dataclass(frozen=True)
class EmbedOptions:
    """The options of `run --embed`; prompt_name as of `OpenBundle.embed`, check as of `open_bundle`. output: a .npy file."""

    format: str | None = None
    threads: int = 0
    prompt_name: str | None = None
    output: Path | None = None
    check: bool = True


def lines_of(text: str, name: str) -> list[str]:
    """The texts of a file, one a line; empty lines are left out. Raises UserError for none, or too many."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not 0 < len(lines) <= MOST_TEXTS:
        raise UserError(f"{name}: {len(lines)} texts, a line each; give 1 to {MOST_TEXTS}")
    return lines


def run_embed(
    path: Path, texts: Sequence[str], options: EmbedOptions, progress: Progress = lambda _: None
) -> Iterator[str]:
    """A line of JSON for each text: {"tokens": how many were read, "embedding": [numbers]}. With an output no line at all.

    Raises UserError as `OpenBundle.embed` does, and for a file that cannot be written.
    """
    if options.output is not None and options.output.suffix != ".npy":
        raise UserError(f"-o {options.output}: vectors are written as .npy; name the file so")
    opened = open_bundle(path, options.format, options.threads, options.check)
    with no_more_than_available(opened.size):
        ids = opened.encode_texts(texts, options.prompt_name, progress)
        if opened.session.stand_in:
            progress(opened.session.how)
        if options.output is not None:
            vectors = opened.embed_ids(ids)
            write_file(options.output, _npy(vectors))
            progress(f"wrote {options.output}: {vectors.shape[0]} vectors of {vectors.shape[1]} numbers")
            return
        for at in range(0, len(ids), _TOGETHER):
            yield from _lines(opened, ids[at : at + _TOGETHER])


def _lines(opened: OpenBundle, ids: Sequence[Sequence[int]]) -> Iterator[str]:
    for tokens, vector in zip(ids, opened.embed_ids(ids), strict=True):
        yield json.dumps({"tokens": len(tokens), "embedding": _numbers(vector)})


def _npy(vectors: Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, vectors, allow_pickle=False)
    return buffer.getvalue()


def _numbers(vector: Array) -> list[float]:
    """As few digits as tell a float32 from its neighbours."""
    return [float(f"{value:.9g}") for value in vector]
