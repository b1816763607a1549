"""Vectors of texts beside those that they should be: cosines, the order of similar pairs, the nearest text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..bundle import Generation
from ..errors import UserError
from ..runtimes.session import Array, Session
from ..runtimes.text_embedding import embed_tokens, similarities


@dataclass(frozen=True)
class Similarity:
    """One session's vectors of some texts beside another's.

    cosine, worst: of the two vectors of a text, the mean and the least. spearman: correlation of the ranks of all pairs of texts
    by their cosine. nearest: the share of texts whose nearest other text is the same. texts: how many.
    """

    cosine: float
    worst: float
    spearman: float
    nearest: float
    texts: int


def similarity_of(expected: Array, actual: Array) -> Similarity:
    """Of vectors [n, D]. What is not finite counts as opposite. Raises UserError if the expected ones are not finite."""
    if not np.isfinite(expected).all():
        raise UserError("the reference's vectors are not finite; the checkpoint is broken or overflows float32")
    if not np.isfinite(actual).all():
        return Similarity(-1.0, -1.0, -1.0, 0.0, len(expected))
    a, b = _unit(expected), _unit(actual)
    cosines = (a * b).sum(-1)
    count, pairs = len(a), np.triu_indices(len(a), 1)
    own, theirs = a @ a.T, b @ b.T
    spearman, nearest = 1.0, 1.0
    if count > 2:
        spearman = _correlation(_ranks(own[pairs]), _ranks(theirs[pairs]))
        for square in (own, theirs):
            np.fill_diagonal(square, -2.0)
        nearest = float((own.argmax(-1) == theirs.argmax(-1)).mean())
    return Similarity(float(cosines.mean()), float(cosines.min()), spearman, nearest, count)


def score_texts(
    base: Session, candidates: Sequence[Session], spec: Generation, texts: Sequence[Sequence[int]]
) -> list[Similarity]:
    """Each candidate on texts of token ids, beside the base. Raises UserError for a base whose vectors are not finite."""
    wanted = embed_tokens(base, spec, texts)
    return [similarity_of(wanted, embed_tokens(candidate, spec, texts)) for candidate in candidates]


def recall(
    session: Session,
    spec: Generation,
    asked: Sequence[Sequence[int]],
    searched: Sequence[Sequence[int]],
    right: Sequence[set[int]],
) -> float:
    """The share of what is asked whose most similar text, among those that are searched, is one of the right ones.

    right: for each that is asked, places in `searched`.
    """
    assert spec.embedding is not None
    vectors = embed_tokens(session, spec, asked), embed_tokens(session, spec, searched)
    best = similarities(*vectors, spec.embedding.similarity).argmax(-1)
    return sum(int(place) in places for place, places in zip(best, right, strict=True)) / len(asked)


def _unit(vectors: Array) -> Array:
    wide = vectors.astype(np.float64)
    unit: Array = wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-30)
    return unit


def _ranks(values: Array) -> Array:
    """The rank of each value; equal ones share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Array = (last - (counts - 1) / 2)[place]
    return ranks


def _correlation(x: Array, y: Array) -> float:
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / size if size else 1.0
