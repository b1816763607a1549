"""The parts that a tokenizer.json is made of, and which of them a platform's client has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..system.reading import MEBIBYTE, one_line, read_json_object

_LARGEST = 256 * MEBIBYTE


@dataclass(frozen=True)
class TokenizerParts:
    """model: its kind. steps: normalizers, pre-tokenizers and decoders as `room:Kind`, sequences taken apart."""

    model: str
    steps: tuple[str, ...]


def read_parts(file: Path) -> TokenizerParts:
    """The parts of a tokenizer.json. Raises UserError if it is none."""
    whole = read_json_object(file, _LARGEST)
    model = whole.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if not isinstance(kind, str):
        raise UserError(
            f"{one_line(file)}: its model has no type; export again from a checkpoint with a newer tokenizer"
        )
    steps: dict[str, None] = {}
    for room in ("normalizer", "pre_tokenizer", "decoder"):
        steps |= dict.fromkeys(f"{room}:{_named(step)}" for step in _steps(whole.get(room)))
    return TokenizerParts(kind, tuple(steps))


def require_known(parts: TokenizerParts, models: frozenset[str], steps: frozenset[str], platform: str) -> None:
    """Raise UserError unless a client has all of a tokenizer's parts."""
    unknown = [parts.model] if parts.model not in models else [s for s in parts.steps if s not in steps]
    if unknown:
        raise UserError(
            f"--platform {platform}: its tokenizer has no {one_line(unknown[0], 60)} (it has {', '.join(sorted(models))}); "
            "choose another platform, or give the client token ids with --no-tokenizer"
        )


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(part, dict):
        return
    inner = [value for key, value in part.items() if key in ("normalizers", "pretokenizers", "decoders")]
    if inner:
        for value in inner[0] if isinstance(inner[0], list) else ():
            yield from _steps(value)
    else:
        yield part


def _named(step: dict[str, Any]) -> str:
    """The kind of a step; of one with a pattern, whether that is a regular expression."""
    pattern = step.get("pattern")
    kind = str(step.get("type"))
    return f"{kind}/Regex" if isinstance(pattern, dict) and "Regex" in pattern else kind
