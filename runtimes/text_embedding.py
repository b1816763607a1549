"""Texts as vectors over any `Session` of an "embed" bundle. No torch is imported."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..bundle import Generation, require_tokens
from ..errors import UserError
from .session import Array, Session

ROWS = 16
"""Texts that are read together at most: the rows that a TensorRT engine takes."""

_SCORES = 1 << 22
"""Attention scores of a head that are held at once: of longer texts fewer are read together."""


def embed_tokens(session: Session, spec: Generation, texts: Sequence[Sequence[int]]) -> Array:
    """The vectors float32 [n, D] of texts of token ids. Texts of like length are read together, padded to the longest.

    Raises UserError for a text that is empty, too long, or has tokens that the model does not.
    """
    assert spec.embedding is not None
    for text in texts:
        require_tokens(text, spec.vocab, "a text")
        if len(text) > spec.max_context:
            raise UserError(f"a text has {len(text)} tokens, the model reads at most {spec.max_context}")
    vectors = np.zeros((len(texts), spec.embedding.size), np.float32)
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    at = 0
    while at < len(order):
        longest = len(texts[order[at]])
        rows = order[at : at + max(1, min(ROWS, _SCORES // longest**2))]
        ids = np.full((len(rows), longest), spec.pad_id, np.int64)
        mask = np.zeros((len(rows), longest), bool)
        for row, place in enumerate(rows):
            ids[row, : len(texts[place])], mask[row, : len(texts[place])] = texts[place], True
        vectors[rows] = session.run("encoder", {"input_ids": ids, "encoder_mask": mask}, {})["sentence_embedding"]
        at += len(rows)
    return vectors


def similarities(asked: Array, searched: Array, kind: str) -> Array:
    """[n, m] of vectors [n, D] and [m, D]: larger is more similar. kind: as `bundle.EmbeddingSpec.similarity`."""
    a, b = asked.astype(np.float64), searched.astype(np.float64)
    if kind in ("euclidean", "manhattan"):
        apart: Array = np.stack([np.linalg.norm(b - row, 1 if kind == "manhattan" else 2, -1) for row in a])
        return -apart
    if kind == "cosine":
        a, b = (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-30) for x in (a, b))
    products: Array = a @ b.T
    return products
