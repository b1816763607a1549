"""What a reader of this room gives: a vocabulary and the steps around it, as tokenizer.json would hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers.models import Model

from ...system.reading import MEBIBYTE

LARGEST_FILE = 32 * MEBIBYTE
"""Bytes of a file that has a vocabulary: those that are published have some 20 MB at most."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's parts, not yet checked.

    Attributes:
        file: where it was read from.
        model: the library's model.
        parts: all other parts as tokenizer.json has them, added_tokens among them.
        named: key -> text of each token that the settings name unless they say otherwise, such as bos_token.
        before, after: what is put around a text: a key of a named token, left out where there is none, or a token itself.
    """

    file: Path
    model: Model
    parts: Mapping[str, Any]
    named: Mapping[str, str] = field(default_factory=dict)
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


def added(text: str, special: bool = True, **flags: bool) -> dict[str, Any]:
    """An entry of tokenizer.json's added_tokens, without its id."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"content": text, **plain, **flags, "special": special}


def ends_asked(values: Mapping[str, Any], bos: bool, eos: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """`before` and `after` as add_bos_token and add_eos_token of tokenizer_config.json say; bos, eos: where they do not say."""
    before = values.get("add_bos_token")
    after = values.get("add_eos_token")
    return (
        ("bos_token",) if (bos if before is None else before is True) else (),
        ("eos_token",) if (eos if after is None else after is True) else (),
    )


def sequence(steps: list[dict[str, Any]], key: str) -> dict[str, Any] | None:
    """Steps as one part of tokenizer.json; key: what a sequence calls them, such as "normalizers"."""
    return steps[0] if len(steps) == 1 else {"type": "Sequence", key: steps} if steps else None
