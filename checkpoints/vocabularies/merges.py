"""BPE merges of vocabularies that have none: of SentencePiece's scores, and of tiktoken's ranks."""

from __future__ import annotations

from collections.abc import Sequence

from ..tokenizer_checks import Unfit

LONGEST_TOKEN = 1024
"""Characters of a token: published vocabularies have runs of 256."""

MOST_MERGES = 1 << 23

_MOST_CUTS = 1 << 28
"""Characters that looking for merges may copy: each token is cut at each of its characters."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Kinds of pieces, numbered as in SentencePiece's files and in GGUF."""

SPACE = "▁"
"""What SentencePiece writes for a space."""

BYTE_PIECES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
"""Pieces for the bytes of characters that have none."""


def merges_from_scores(
    pieces: Sequence[str], scores: Sequence[float], types: Sequence[int] | None = None
) -> list[tuple[str, str]]:
    """BPE merges that join as SentencePiece does: first the pair whose joined piece has the highest score.

    A piece of n characters gives a merge for each of its n - 1 cuts whose halves are pieces too. Runs of the space mark are
    user-defined. SentencePiece matches these before all else, the longest first, so their merges come first. types: kinds of the
    pieces; without them all are normal. Raises Unfit for pieces of more characters, and for more merges, than a vocabulary of
    words has.
    """
    if sum(len(piece) ** 2 for piece in pieces) > _MOST_CUTS:
        raise Unfit(f"the tokens are too long, {max(map(len, pieces))} characters one of them")
    kinds = types or [NORMAL] * len(pieces)
    vocab = {piece: i for i, piece in enumerate(pieces) if kinds[i] in (NORMAL, USER_DEFINED)}
    runs = [i for piece, i in vocab.items() if kinds[i] == USER_DEFINED and set(piece) == {SPACE}]
    runs.sort(key=lambda i: -len(pieces[i]))
    normal = [i for i in vocab.values() if kinds[i] == NORMAL]
    normal.sort(key=lambda i: -scores[i])  # stable: equal scores keep the file's order
    merges: list[tuple[str, str]] = []
    for i in runs + normal:
        piece = pieces[i]
        cuts = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        pairs = [(vocab[head], vocab[tail]) for head, tail in cuts if head in vocab and tail in vocab]
        merges.extend((pieces[head], pieces[tail]) for head, tail in sorted(pairs))
        if len(merges) > MOST_MERGES:
            raise Unfit(f"the tokens make more than {MOST_MERGES} merges")
    return merges
