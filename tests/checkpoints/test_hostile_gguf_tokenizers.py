"""GGUF vocabularies that ask for too much end in one line."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.vocabularies import byte_fallback

from edgewright.checkpoints.tokenizer import Tokenizer
from edgewright.checkpoints.tokenizer_checks import Unfit
from edgewright.checkpoints.vocabularies import merges as merges_module
from edgewright.checkpoints.vocabularies.merges import merges_from_scores
from edgewright.errors import UserError


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokenizer.ggml.tokens": ["k" * 1025]}, "has 1025 characters"),
        ({"tokenizer.ggml.tokens": ["a", 3]}, "no tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": ["a", "\ud800"]}, "does not fit|makes no tokenizer"),
        ({"tokenizer.ggml.token_type": "x"}, "token_type"),
        ({"tokenizer.chat_template": "x" * (1 << 20) + "x"}, "chat template of 1048577"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["a " + "b" * 3000]}, "has 3002 characters"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["a b", 3]}, "no tokenizer.ggml.merges"),
    ],
)
def test_gguf_vocabularies_that_ask_for_too_much(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=f"GGUF: .*({reason})") as caught:
        Tokenizer.from_gguf({**byte_fallback(), **change})
    assert "\n" not in str(caught.value)


def gguf_with(**replaced: Any) -> dict[str, Any]:
    """byte_fallback's metadata with one entry of each list replaced: of the token <pad>."""
    metadata = byte_fallback()
    for key, value in replaced.items():
        metadata[f"tokenizer.ggml.{key}"][0] = value
    return metadata


def test_gguf_entries_of_another_type() -> None:
    for replaced in ({"token_type": "x"}, {"scores": "x"}, {"tokens": "\ud800"}):
        metadata = gguf_with(**replaced)
        if "scores" in replaced:
            metadata["tokenizer.ggml.token_type"][0] = 1
        with pytest.raises(UserError, match="GGUF: "):
            Tokenizer.from_gguf(metadata)


@pytest.mark.parametrize("token", ["$A", "$B:1", "<bos>:x", "a:b"])
def test_gguf_special_tokens_that_look_like_a_template(token: str) -> None:
    metadata = gguf_with(tokens=token)
    metadata["tokenizer.ggml.bos_token_id"] = 0
    with pytest.raises(UserError, match=r"^GGUF: .* cannot be put around a text"):
        Tokenizer.from_gguf(metadata)


def test_merges_of_long_tokens_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = ["a" * n for n in range(1, 65)]
    merges = merges_from_scores(pieces, [0.0] * 64, [1] * 64)
    assert len(merges) == 63 * 64 // 2
    monkeypatch.setattr(merges_module, "MOST_MERGES", 1000)
    with pytest.raises(Unfit, match="more than 1000 merges"):
        merges_from_scores(pieces, [0.0] * 64, [1] * 64)
    monkeypatch.setattr(merges_module, "_MOST_CUTS", 64 * 64)
    with pytest.raises(Unfit, match="the tokens are too long, 64 characters"):
        merges_from_scores(pieces, [0.0] * 64, [1] * 64)
