"""What tokenizer.json asks of the library, checked before the library does it: steps, lengths, and how much they make of a text.

A chain of 20 normalizers that each write two characters for one makes a million of each character, and the library has no limit.
So a file's steps are bounded one by one, and the product of what they can do is kept and held against each text.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..system.reading import one_line

MOST_TOKENS = 1 << 22
"""Tokens of a vocabulary, and what its ids are below."""

MOST_BYTES = 1 << 27
"""Bytes that a text may become on its way to the model, or tokens on their way to a text; each takes some 35 of memory."""

_MOST_GROWTH = 1 << 16
_MOST_DECODED = 64
_MOST_STEPS, _DEEPEST = 64, 8
_LONGEST_STRING = 1 << 13
_LONGEST_CHARSMAP = 8 << 20
_LONGEST_ADDED = 1 << 16
_MOST_PIECES, _MOST_COPIES = 64, 4

_GROWTH = {"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11, "Lowercase": 1.5, "BertNormalizer": 8, "Bert": 8}
"""The most bytes that a step makes of one byte of UTF-8: Unicode's FAQ on normalization, and İ in lower case."""

_UNIT = re.compile(r"(?:\\[sdwnrt.']|[^\\\[\](){}|^$*+?]|\[[^\[\]]+\])([*+?]|\{(\d+),?\d*\}|)")
"""A class of characters in a regular expression, once or repeated."""

_CHOICE = re.compile(r"[*+{|]|(?<!\()\?|\(\?~|\\g")
_GROUP_REPEATED = re.compile(r"\)[*+{?]")


class Unfit(Exception):
    """What a tokenizer asks for that no tokenizer needs."""


@dataclass(frozen=True)
class Limits:
    """What a tokenizer may make of texts.

    growth: bytes that reach the model for a byte of text. decoded: bytes of text for a byte of the tokens. regex: whether regular
    expressions of the file run on a text, which may take any time. slow_load: whether they run on added tokens already.
    """

    growth: float = 1.0
    decoded: float = 1.0
    regex: bool = False
    slow_load: bool = False

    def grown(self, text: str) -> float:
        """Bytes that `text` may become. Raises UserError if they are too many."""
        size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
        if size * self.growth > MOST_BYTES:
            most = int(MOST_BYTES / self.growth)
            raise UserError(
                f"a text of {size} bytes is too long for this tokenizer, which takes {most}; give less text"
            )
        return size * self.growth


def check(parts: Mapping[str, Any]) -> Limits:
    """The limits of tokenizer.json's `parts`, which are all but its model. Raises Unfit.

    What is malformed passes: the library refuses it.
    """
    normalizer, splitter = _steps(parts, "normalizer"), _steps(parts, "pre_tokenizer")
    decoder = _steps(parts, "decoder")
    normalized = math.prod(map(_growth, normalizer))
    growth = normalized * math.prod(map(_growth, splitter))
    if growth > _MOST_GROWTH:
        raise Unfit(f"its steps may make {growth:.3g} bytes of one, at most {_MOST_GROWTH} are allowed")
    decoded = math.prod(map(_decoded, decoder))
    if decoded > _MOST_DECODED:
        raise Unfit(f"its decoder may make {decoded:.3g} bytes of one, at most {_MOST_DECODED} are allowed")
    for regex in filter(None, map(_regex, decoder)):
        if len(_CHOICE.findall(regex)) > 1 or _GROUP_REPEATED.search(regex):
            raise Unfit(f"its decoder has the regular expression {one_line(regex, 40)!r}, which may take any time")
    for step in _steps(parts, "post_processor"):
        _check_template(step)
    slow = any(_regex(step) is not None for step in normalizer)
    normalizes = _check_added_tokens(parts.get("added_tokens"), normalized)
    any_regex = slow or any(_regex(step) is not None for step in splitter)
    return Limits(growth, decoded, any_regex, slow and normalizes)


def _steps(parts: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The steps of a part, each a JSON object, those within sequences too."""
    steps = []
    for step, depth in _walk(parts.get(name), 0):
        steps.append(step)
        if len(steps) > _MOST_STEPS or depth > _DEEPEST:
            raise Unfit(f"its {name} has more than {_MOST_STEPS} steps, or more than {_DEEPEST} within each other")
        pattern = step.get("pattern")
        for key, value in [*step.items(), *(pattern.items() if isinstance(pattern, dict) else ())]:
            most = _LONGEST_CHARSMAP if key == "precompiled_charsmap" else _LONGEST_STRING
            if isinstance(value, str) and len(value) > most:
                raise Unfit(f"its {name} has a string of {len(value)} characters, at most {most} are allowed")
    return steps


def _walk(part: Any, depth: int) -> Iterator[tuple[dict[str, Any], int]]:
    if not isinstance(part, dict):
        return
    yield part, depth
    for value in part.values():
        for inner in value if isinstance(value, list) else ():
            yield from _walk(inner, depth + 1)


def _growth(step: Mapping[str, Any]) -> float:
    """The most bytes that a normalizer or pre-tokenizer makes of a byte. Files of old versions have no `type`."""
    if "pattern" in step and "content" in step:
        return _replaced(step)
    if "prepend" in step:
        return 1 + _bytes(step["prepend"])  # once for each piece between added tokens
    if "precompiled_charsmap" in step:
        return _longest_mapping(step["precompiled_charsmap"])
    kind = step.get("type")
    if kind == "Metaspace":
        return 1 + _bytes(step.get("replacement"))
    if kind == "ByteLevel":
        return 3 if step.get("add_prefix_space") else 2
    return _GROWTH.get(kind, 1) if isinstance(kind, str) else 8


def _decoded(step: Mapping[str, Any]) -> float:
    """The most bytes that a decoder makes of a byte of its tokens."""
    if "pattern" in step and "content" in step:
        return _replaced(step)
    kind = step.get("type")
    if "suffix" in step or kind == "CTC":
        return 2 if "" in (step.get("suffix"), step.get("word_delimiter_token")) else 1
    return {"ByteLevel": 3, "WordPiece": 2}.get(kind, 1) if isinstance(kind, str) else 3


def _replaced(step: Mapping[str, Any]) -> float:
    content, regex = _bytes(step["content"]), _regex(step)
    shortest = _bytes(step["pattern"].get("String")) if regex is None else _shortest(regex)
    return max(1.0, content / shortest) if shortest else 1 + 2 * content  # before each character, and at the end


def _shortest(regex: str) -> int:
    """Of a regular expression without groups and choices, the fewest characters that it matches; of another one, 0."""
    units = list(_UNIT.finditer(regex))
    if "".join(unit[0] for unit in units) != regex:
        return 0
    return sum({"": 1, "+": 1, "*": 0, "?": 0}.get(unit[1], int(unit[2] or 0)) for unit in units)


def _longest_mapping(charsmap: Any) -> float:
    """The longest string that SentencePiece's map has for a character: a trie, its size before it, then strings with a NUL each."""
    if not isinstance(charsmap, str):
        return 1
    try:
        data = base64.b64decode(charsmap)
    except (binascii.Error, ValueError):
        return max(1, len(charsmap))
    strings = data[4 + int.from_bytes(data[:4], "little") :]
    return max(1, max(map(len, strings.split(b"\0"))))


def _regex(step: Mapping[str, Any]) -> str | None:
    """The regular expression of a step; None where it has none."""
    pattern = step.get("pattern")
    if not isinstance(pattern, dict) or "String" in pattern:
        return None
    return str(pattern.get("Regex"))


def _check_template(step: Mapping[str, Any]) -> None:
    """A post-processor may put the text in a few times, and a few tokens around it."""
    tokens = step.get("special_tokens")
    named = tokens.values() if isinstance(tokens, dict) else ()
    lists = [token.get(key) for token in named if isinstance(token, dict) for key in ("ids", "tokens")]
    templates = [pieces for key in ("single", "pair") if isinstance(pieces := step.get(key), list)]
    if any(isinstance(ids, list) and len(ids) > _MOST_PIECES for ids in [*lists, *templates]):
        raise Unfit(f"its post_processor adds more than {_MOST_PIECES} tokens")
    for pieces in templates:
        if sum(isinstance(piece, dict) and "Sequence" in piece for piece in pieces) > _MOST_COPIES:
            raise Unfit(f"its post_processor repeats the text more than {_MOST_COPIES} times")


def _check_added_tokens(tokens: Any, growth: float) -> bool:
    """Whether any of them goes through the normalizer when the file is loaded."""
    normalizes = False
    if not isinstance(tokens, list):
        return normalizes
    if len(tokens) > MOST_TOKENS:
        raise Unfit(f"it has {len(tokens)} added tokens, at most {MOST_TOKENS} are allowed")
    for token in tokens:
        if isinstance(token, dict) and token.get("normalized"):
            normalizes = True
            if _bytes(token.get("content")) * growth > _LONGEST_ADDED:
                raise Unfit(f"its added token {token.get('id')} may become more than {_LONGEST_ADDED} bytes")
    return normalizes


def _bytes(text: Any) -> int:
    return len(text.encode("utf-8", "surrogatepass")) if isinstance(text, str) else 0
