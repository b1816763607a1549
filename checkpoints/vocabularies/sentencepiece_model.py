"""SentencePiece's files (tokenizer.model, spiece.model, sentencepiece.bpe.model): pieces with scores, as BPE or Unigram.

A file says how it treats a text; transformers' class says the order of the ids, which tokens have names, and what is put around
a text. https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import models

from ...errors import UserError
from ...system.reading import one_line, read_bytes
from ..tokenizer_checks import MOST_TOKENS, Unfit
from .merges import BYTE_PIECES, CONTROL, LONGEST_TOKEN, SPACE, UNKNOWN, USER_DEFINED, merges_from_scores
from .vocabulary import LARGEST_FILE, Vocabulary, added, ends_asked, sequence

_UNIGRAM, _BPE = 1, 2
_MOST_EXTRA = 4096
_INSTALL = "reading it needs the sentencepiece package: pip install 'edgewright[tokenizers]'"

_MBART_LANGUAGES = (
    *(
        "ar_AR",
        "cs_CZ",
        "de_DE",
        "en_XX",
        "es_XX",
        "et_EE",
        "fi_FI",
        "fr_XX",
        "gu_IN",
        "hi_IN",
        "it_IT",
        "ja_XX",
        "kk_KZ",
    ),
    *("ko_KR", "lt_LT", "lv_LV", "my_MM", "ne_NP", "nl_XX", "ro_RO", "ru_RU", "si_LK", "tr_TR", "vi_VN", "zh_CN"),
)
_FAIRSEQ = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
_CLASSIFIER = {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}

CLASSES = {
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "CodeLlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "GemmaTokenizer": {
        "unk_token": "<unk>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    "T5Tokenizer": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "XLMRobertaTokenizer": {**_FAIRSEQ, **_CLASSIFIER},
    "MBartTokenizer": {**_FAIRSEQ, **_CLASSIFIER},
}
"""Transformers' class -> the tokens that it names where the files do not."""

_SAME_AS = {"MT5Tokenizer": "T5Tokenizer", "CodeLlamaTokenizer": "LlamaTokenizer"}
_KINDS = {
    "LlamaTokenizer": _BPE,
    "GemmaTokenizer": _BPE,
    "T5Tokenizer": _UNIGRAM,
    "XLMRobertaTokenizer": _UNIGRAM,
    "MBartTokenizer": _UNIGRAM,
}


def is_sentencepiece(data: bytes) -> bool:
    """Whether a file that starts so may be SentencePiece's: its first field is the list of pieces."""
    return data[:1] == b"\n"


def read_sentencepiece(file: Path, tokenizer_class: str | None, values: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a file, as `tokenizer_class` orders it. None: no class is known, so the file alone counts.

    values: tokenizer_config.json. Raises UserError for a class whose order of ids is not known here, and without the package;
    Unfit for a file that is none, or too large.
    """
    kind = _SAME_AS.get(tokenizer_class or "", tokenizer_class)
    if kind is not None and kind not in CLASSES:
        known = ", ".join(sorted(CLASSES))
        raise UserError(
            f"{one_line(file)}: a SentencePiece model of {one_line(kind, 40)}, whose ids are not the file's (read: {known}); where "
            "transformers is installed, AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes a tokenizer.json"
        )
    proto = _parsed(file)
    if kind is not None and proto.trainer_spec.model_type != _KINDS[kind]:
        raise Unfit(
            f"{kind} has {'BPE' if _KINDS[kind] == _BPE else 'Unigram'}, and this is another kind of SentencePiece"
        )
    if proto.trainer_spec.model_type == _BPE:
        return _bpe(file, proto, kind, values)
    if proto.trainer_spec.model_type == _UNIGRAM:
        return _unigram(file, proto, kind, values)
    raise Unfit("a SentencePiece model of words or characters; BPE and Unigram are read")


def _parsed(file: Path) -> Any:
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


def _named_by_file(proto: Any) -> dict[str, str]:
    """The named tokens of a file whose class is not known."""
    named = {}
    for key in ("bos", "eos", "unk", "pad"):
        place = getattr(proto.trainer_spec, f"{key}_id")
        if 0 <= place < len(proto.pieces):
            named[f"{key}_token"] = proto.pieces[place].piece
    return named


def _unknown(proto: Any) -> int:
    """The place of the piece for what no piece spells."""
    places = [i for i, piece in enumerate(proto.pieces) if piece.type == UNKNOWN]
    if len(places) != 1:
        raise Unfit(f"it has {len(places)} pieces for what is unknown, one is needed")
    return places[0]


def _added(proto: Any) -> list[dict[str, Any]]:
    """Control pieces and user-defined ones: whole wherever they stand in a text. Runs of the space mark are merged instead."""
    return [
        added(piece.piece, special=piece.type != USER_DEFINED)
        for piece in proto.pieces
        if piece.type in (CONTROL, UNKNOWN) or (piece.type == USER_DEFINED and set(piece.piece) != {SPACE})
    ]


def _charsmap(proto: Any) -> list[dict[str, Any]]:
    """The file's own normalization, such as NFKC."""
    charsmap = proto.normalizer_spec.precompiled_charsmap
    if not charsmap:
        return []
    return [{"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}]


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _metaspace(scheme: str, split: bool) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": split}


def _bpe(file: Path, proto: Any, kind: str | None, values: Mapping[str, Any]) -> Vocabulary:
    pieces = [piece.piece for piece in proto.pieces]
    types = [piece.type for piece in proto.pieces]
    merges = merges_from_scores(pieces, [piece.score for piece in proto.pieces], types)
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(
        vocab,
        merges,
        unk_token=pieces[_unknown(proto)],
        fuse_unk=True,
        byte_fallback=vocab.keys() >= BYTE_PIECES,
    )
    scheme = _prefix_scheme(proto, kind, values)
    spaces = [_replace({"Regex": " {2,}"}, " ")] if proto.normalizer_spec.remove_extra_whitespaces else []
    strip = [{"type": "Strip", "strip_left": True, "strip_right": True}] if spaces else []
    back = [_replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if scheme != "never":
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    steps = [*_charsmap(proto), *strip, *spaces]
    if kind is None:  # a text that starts with a space gets a mark before it, which transformers' classes leave out
        mark = [{"type": "Prepend", "prepend": SPACE}] if scheme != "never" else []
        steps += [*mark, _replace({"String": " "}, SPACE)]
    parts = {
        "normalizer": sequence(steps, "normalizers"),
        "pre_tokenizer": _metaspace(scheme, split=False) if kind is not None else None,
        "decoder": sequence(back, "decoders"),
        "added_tokens": _added(proto),
    }
    named = CLASSES[kind] if kind is not None else _named_by_file(proto)
    before, after = ends_asked(values, bos=kind is not None, eos=False)
    return Vocabulary(file, model, parts, named, before, after)


def _prefix_scheme(proto: Any, kind: str | None, values: Mapping[str, Any]) -> str:
    """Where a text gets the mark of a space: at its start, behind every added token too, or nowhere."""
    asked = values.get("add_prefix_space")
    if not (asked if isinstance(asked, bool) else proto.normalizer_spec.add_dummy_prefix):
        return "never"
    return "first" if kind is not None and not values.get("legacy") else "always"


def _unigram(file: Path, proto: Any, kind: str | None, values: Mapping[str, Any]) -> Vocabulary:
    vocab = [(piece.piece, float(piece.score)) for piece in proto.pieces]
    tokens, unknown = _added(proto), _unknown(proto)
    before: tuple[str, ...] = ("bos_token",)
    after: tuple[str, ...] = ("eos_token",)
    if kind in ("XLMRobertaTokenizer", "MBartTokenizer"):
        if [piece for piece, _ in vocab[:3]] != ["<unk>", "<s>", "</s>"]:
            raise Unfit(f"its first pieces are not <unk>, <s> and </s>, as those of {kind} are")
        unknown = 3
        languages = _MBART_LANGUAGES if kind == "MBartTokenizer" else ()
        last = [*languages, "<mask>"]
        vocab = [*((text, 0.0) for text in _FAIRSEQ.values()), *vocab[3:], *((text, 0.0) for text in last)]
        tokens += [*map(added, ("<pad>", *languages)), added("<mask>", lstrip=True)]
        if kind == "MBartTokenizer":
            language = values.get("src_lang") or "en_XX"
            if language not in languages:
                raise UserError(f"tokenizer_config.json: src_lang {one_line(language, 40)!r} is no language of mBART's")
            before, after = (), ("eos_token", str(language))
    elif kind == "T5Tokenizer":
        extra = [f"<extra_id_{i}>" for i in range(_extra_ids(values) - 1, -1, -1)]
        present = {text for text, _ in vocab}
        vocab += [(text, 0.0) for text in extra if text not in present]
        tokens += map(added, extra)
        before = ()
    else:
        before, after = ends_asked(values, bos=False, eos=False)
    if len({text for text, _ in vocab}) != len(vocab):
        raise Unfit(f"it has a piece that {kind} adds")
    fallback = bool(proto.trainer_spec.byte_fallback) and {text for text, _ in vocab} >= BYTE_PIECES
    scheme = "always" if proto.normalizer_spec.add_dummy_prefix else "never"
    if proto.normalizer_spec.remove_extra_whitespaces:
        split = [{"type": "WhitespaceSplit"}, _metaspace(scheme, split=True)]
    else:
        split = [_metaspace(scheme, split=True)]
    metaspace = _metaspace(scheme, split=True)
    back = [{"type": "ByteFallback"}, metaspace] if fallback else [metaspace]
    parts = {
        "normalizer": sequence(_charsmap(proto), "normalizers"),
        "pre_tokenizer": sequence(split, "pretokenizers"),
        "decoder": sequence(back, "decoders"),
        "added_tokens": tokens,
    }
    named = CLASSES[kind] if kind is not None else _named_by_file(proto)
    return Vocabulary(file, models.Unigram(vocab, unknown, fallback), parts, named, before, after)


def _extra_ids(values: Mapping[str, Any]) -> int:
    """How many sentinels T5 has behind its pieces."""
    count = values.get("extra_ids", 100)
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= _MOST_EXTRA:
        raise UserError(f"tokenizer_config.json: extra_ids {one_line(count, 40)}; 0 to {_MOST_EXTRA} are read")
    return count
