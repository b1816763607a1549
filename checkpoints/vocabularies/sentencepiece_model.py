"""SentencePiece's files (tokenizer.model, spiece.model, sentencepiece.bpe.model): pieces with scores, as BPE or Unigram.

A file says how it treats a text; transformers' class says the order of the ids, which tokens have names, and what is put around
a text. https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import models

from ...errors import UserError
from ...system.reading import one_line
from ..tokenizer_checks import Unfit
from .languages import MBART
from .merges import BYTE_PIECES, SPACE, merges_from_scores
from .sentencepiece_file import BPE, UNIGRAM, added_pieces, charsmap, metaspace, parsed, replace, unknown_place
from .translation import READERS
from .vocabulary import Vocabulary, added, ends_asked, sequence

_MOST_EXTRA = 4096

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
    "LlamaTokenizer": BPE,
    "GemmaTokenizer": BPE,
    "T5Tokenizer": UNIGRAM,
    "XLMRobertaTokenizer": UNIGRAM,
    "MBartTokenizer": UNIGRAM,
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
    if kind in READERS:
        return READERS[kind](file, values)
    if kind is not None and kind not in CLASSES:
        known = ", ".join(sorted({*CLASSES, *READERS}))
        raise UserError(
            f"{one_line(file)}: a SentencePiece model of {one_line(kind, 40)}, whose ids are not the file's (read: {known}); where "
            "transformers is installed, AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes a tokenizer.json"
        )
    proto = parsed(file)
    if kind is not None and proto.trainer_spec.model_type != _KINDS[kind]:
        raise Unfit(
            f"{kind} has {'BPE' if _KINDS[kind] == BPE else 'Unigram'}, and this is another kind of SentencePiece"
        )
    if proto.trainer_spec.model_type == BPE:
        return _bpe(file, proto, kind, values)
    if proto.trainer_spec.model_type == UNIGRAM:
        return _unigram(file, proto, kind, values)
    raise Unfit("a SentencePiece model of words or characters; BPE and Unigram are read")


def _named_by_file(proto: Any) -> dict[str, str]:
    """The named tokens of a file whose class is not known."""
    named = {}
    for key in ("bos", "eos", "unk", "pad"):
        place = getattr(proto.trainer_spec, f"{key}_id")
        if 0 <= place < len(proto.pieces):
            named[f"{key}_token"] = proto.pieces[place].piece
    return named


def _bpe(file: Path, proto: Any, kind: str | None, values: Mapping[str, Any]) -> Vocabulary:
    pieces = [piece.piece for piece in proto.pieces]
    types = [piece.type for piece in proto.pieces]
    merges = merges_from_scores(pieces, [piece.score for piece in proto.pieces], types)
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(
        vocab,
        merges,
        unk_token=pieces[unknown_place(proto)],
        fuse_unk=True,
        byte_fallback=vocab.keys() >= BYTE_PIECES,
    )
    scheme = _prefix_scheme(proto, kind, values)
    spaces = [replace({"Regex": " {2,}"}, " ")] if proto.normalizer_spec.remove_extra_whitespaces else []
    strip = [{"type": "Strip", "strip_left": True, "strip_right": True}] if spaces else []
    back = [replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if scheme != "never":
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    steps = [*charsmap(proto), *strip, *spaces]
    if kind is None:  # a text that starts with a space gets a mark before it, which transformers' classes leave out
        mark = [{"type": "Prepend", "prepend": SPACE}] if scheme != "never" else []
        steps += [*mark, replace({"String": " "}, SPACE)]
    parts = {
        "normalizer": sequence(steps, "normalizers"),
        "pre_tokenizer": metaspace(scheme, split=False) if kind is not None else None,
        "decoder": sequence(back, "decoders"),
        "added_tokens": added_pieces(proto),
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
    tokens, unknown = added_pieces(proto), unknown_place(proto)
    before: tuple[str, ...] = ("bos_token",)
    after: tuple[str, ...] = ("eos_token",)
    if kind in ("XLMRobertaTokenizer", "MBartTokenizer"):
        if [piece for piece, _ in vocab[:3]] != ["<unk>", "<s>", "</s>"]:
            raise Unfit(f"its first pieces are not <unk>, <s> and </s>, as those of {kind} are")
        unknown = 3
        languages = MBART if kind == "MBartTokenizer" else ()
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
        split = [{"type": "WhitespaceSplit"}, metaspace(scheme, split=True)]
    else:
        split = [metaspace(scheme, split=True)]
    mark = metaspace(scheme, split=True)
    back = [{"type": "ByteFallback"}, mark] if fallback else [mark]
    parts = {
        "normalizer": sequence(charsmap(proto), "normalizers"),
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
