"""Edgewright's tokenizer against transformers': ids, decoding whole and streamed, named tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from edgewright.checkpoints.tokenizer import Tokenizer


def streamed(ours: Tokenizer, ids: Sequence[int]) -> str:
    """The text of `ids`, token by token."""
    stream = ours.stream()
    return "".join(map(stream.put, ids)) + stream.end()


def assert_like(ours: Tokenizer, theirs: Any, texts: Iterable[str], trimmed: bool = False) -> None:
    """Both give the same ids of each text, with special tokens and without, and the same text of its ids.

    trimmed: transformers' class trims what it decodes, so spaces at both ends do not count.
    """
    for text in texts:
        for special in (True, False):
            assert ours.encode(text, special) == theirs(text, add_special_tokens=special)["input_ids"], text
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        whole = theirs.decode(ids, skip_special_tokens=True)
        decoded = [ours.decode(ids), streamed(ours, ids)]
        assert [each.strip(" ") if trimmed else each for each in decoded] == [whole] * 2, text
    named = (theirs.bos_token_id, theirs.pad_token_id, theirs.unk_token_id)
    assert (ours.bos_id, ours.pad_id, ours.unk_id) == named
    assert theirs.eos_token_id is None or theirs.eos_token_id in ours.eos_ids
