"""SentencePiece's files as they stand: pieces checked, and the steps around a model that a file asks for."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...system.reading import one_line, read_bytes
from ..tokenizer_checks import MOST_TOKENS, Unfit
from .merges import CONTROL, LONGEST_TOKEN, SPACE, UNKNOWN, USER_DEFINED
from .vocabulary import LARGEST_FILE, added

UNIGRAM, BPE = 1, 2
"""Kinds of models, numbered as in SentencePiece's files."""

_INSTALL = "reading it needs the sentencepiece package: pip install 'edgewright[tokenizers]'"


def parsed(file: Path) -> Any:
    """The file's message, its pieces counted and measured."""
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise UserError(f"{one_line(file)}: {_INSTALL} ({one_line(error, 80)})") from None
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(read_bytes(file, LARGEST_FILE))
    except DecodeError:
        raise Unfit("not a SentencePiece model; download it again") from None
    if not 0 < len(proto.pieces) <= MOST_TOKENS:
        raise Unfit(f"it has {len(proto.pieces)} pieces, 1 to {MOST_TOKENS} are read")
    seen = set()
    for piece in proto.pieces:
        text = piece.piece
        if not text or len(text) > LONGEST_TOKEN or text in seen:
            wrong = "twice" if text in seen else f"of {len(text)} characters, 1 to {LONGEST_TOKEN} are read"
            raise Unfit(f"it has a piece {one_line(text, 40)!r} {wrong}")
        if not math.isfinite(piece.score):
            raise Unfit(f"its piece {one_line(text, 40)!r} has a score of {piece.score}")
        seen.add(text)
    if proto.trainer_spec.treat_whitespace_as_suffix:
        raise Unfit("it puts the mark of a space behind a word (treat_whitespace_as_suffix), which is not read")
    if not proto.normalizer_spec.escape_whitespaces:
        raise Unfit("it keeps spaces as they are (escape_whitespaces is off), which is not read")
    return proto


def unknown_place(proto: Any) -> int:
    """The place of the piece for what no piece spells."""
    places = [i for i, piece in enumerate(proto.pieces) if piece.type == UNKNOWN]
    if len(places) != 1:
        raise Unfit(f"it has {len(places)} pieces for what is unknown, one is needed")
    return places[0]


def added_pieces(proto: Any) -> list[dict[str, Any]]:
    """Control pieces and user-defined ones: whole wherever they stand in a text. Runs of the space mark are merged instead."""
    return [
        added(piece.piece, special=piece.type != USER_DEFINED)
        for piece in proto.pieces
        if piece.type in (CONTROL, UNKNOWN) or (piece.type == USER_DEFINED and set(piece.piece) != {SPACE})
    ]


def charsmap(proto: Any) -> list[dict[str, Any]]:
    """The file's own normalization, such as NFKC."""
    charsmap = proto.normalizer_spec.precompiled_charsmap
    if not charsmap:
        return []
    return [{"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}]


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def metaspace(scheme: str, split: bool) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": split}
