"""SentencePiece vocabularies of translation and summary models: NLLB, M2M100, mBART-50, Marian and Pegasus.

Their ids are not the file's. Fairseq's models put four tokens first and languages last, Pegasus puts tokens of its training
first, and Marian and M2M100 have a second file, vocab.json, that says which id a piece has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import models
from tokenizers.models import Model

from ...errors import UserError
from ...system.reading import one_line, read_json_object
from ..tokenizer_checks import MOST_TOKENS, Unfit
from .languages import M2M100, MBART50, NLLB, WMT21
from .merges import BYTE_PIECES, LONGEST_TOKEN, NORMAL, USER_DEFINED, merges_from_scores
from .sentencepiece_file import BPE, UNIGRAM, added_pieces, charsmap, metaspace, parsed, replace
from .vocabulary import LARGEST_FILE, Vocabulary, added, sequence

_FAIRSEQ = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
_FAIRSEQ_ALL = {**_FAIRSEQ, "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
_MASKS = {"mask_token_sent": "<mask_1>", "mask_token": "<mask_2>"}
_MOST_OFFSET = 4096
_UNREACHED = -1e6
"""Score of one character that only an answer has: far below any piece's, so that no text is cut into such tokens by choice."""

_ONE_SPACE = replace({"Regex": " {2,}"}, " ")
_STRIPPED = replace({"Regex": "^ +| +$"}, "")


# ---- the ids of one file, moved


def _nllb(file: Path, values: Mapping[str, Any]) -> Vocabulary:
    """Four tokens, the pieces, the languages, <mask>. A text has its language before it, in old files behind it."""
    proto = parsed(file)
    if proto.trainer_spec.model_type != BPE:
        raise Unfit("NLLB has BPE, and this is another kind of SentencePiece")
    pieces, scores = _normal(proto, ("<unk>", "<s>", "</s>"))
    first = list(_FAIRSEQ.values())
    behind = _given_languages(values) or [*NLLB, "<mask>"]
    vocab = {text: i for i, text in enumerate(dict.fromkeys((*first, *pieces, *behind)))}
    model = models.BPE(vocab, merges_from_scores(pieces, scores), unk_token="<unk>", fuse_unk=True, byte_fallback=False)
    special = [
        added(text) | ({"lstrip": True, "normalized": True} if text == "<mask>" else {}) for text in (*first, *behind)
    ]
    language = _language(values, "eng_Latn", behind)
    around = ((), ("eos_token", language)) if values.get("legacy_behaviour") is True else ((language,), ("eos_token",))
    return Vocabulary(file, model, _steps_of_library(proto, special, bool(charsmap(proto))), _FAIRSEQ_ALL, *around)


def _given_languages(values: Mapping[str, Any]) -> list[str]:
    """The tokens behind the pieces where added_tokens_decoder lists them, in the order of their ids."""
    given = values.get("added_tokens_decoder")
    if not isinstance(given, Mapping):
        return []
    texts = {int(key): token.get("content") for key, token in given.items() if isinstance(token, Mapping)}
    behind = [str(texts[i]) for i in sorted(texts) if texts[i] not in _FAIRSEQ.values()]
    return behind if set(behind) & set(NLLB) else []


def _mbart50(file: Path, values: Mapping[str, Any]) -> Vocabulary:
    """Four tokens, the pieces, the languages, <mask>. A text has its language before it."""
    proto = parsed(file)
    if proto.trainer_spec.model_type != UNIGRAM:
        raise Unfit("mBART-50 has Unigram, and this is another kind of SentencePiece")
    pieces, scores = _normal(proto, ("<unk>", "<s>", "</s>"))
    rest = [(text, 0.0) for text in (*MBART50, "<mask>")]
    vocab = [*((text, 0.0) for text in _FAIRSEQ.values()), *zip(pieces, scores, strict=True), *rest]
    _require_once(vocab)
    special = [*map(added, (*_FAIRSEQ.values(), *MBART50)), added("<mask>", lstrip=True)]
    language = _language(values, "en_XX", MBART50)
    parts = _steps_of_library(proto, special, True)
    named = {key: text for key, text in _FAIRSEQ_ALL.items() if key != "bos_token"}
    return Vocabulary(file, models.Unigram(vocab, 3, False), parts, named, (language,), ("eos_token",))


def _pegasus(file: Path, values: Mapping[str, Any]) -> Vocabulary:
    """<pad>, </s>, two masks and tokens of the training alone up to `offset` + 2, then the pieces (Zhang et al. 2020)."""
    proto = parsed(file)
    if proto.trainer_spec.model_type != UNIGRAM:
        raise Unfit("Pegasus has Unigram, and this is another kind of SentencePiece")
    offset = values.get("offset", 103)
    if not isinstance(offset, int) or isinstance(offset, bool) or not 2 <= offset <= _MOST_OFFSET:
        raise UserError(f"tokenizer_config.json: offset {one_line(offset, 40)}; 2 to {_MOST_OFFSET} are read")
    for key, text in _MASKS.items():
        given = values.get(key, text)
        if (given.get("content") if isinstance(given, Mapping) else given) != text:
            raise UserError(
                f"tokenizer_config.json: {key} {one_line(given, 40)}; {text} is read, which has an id of its own"
            )
    pieces, scores = _normal(proto, ("<pad>", "</s>"))
    if "<unk>" not in pieces:
        raise Unfit("it has no piece <unk>, as that of Pegasus has")
    first = ["<pad>", "</s>", *_MASKS.values(), *(f"<unk_{i}>" for i in range(2, offset))]
    vocab = [*((text, 0.0 if i < 4 else -100.0) for i, text in enumerate(first)), *zip(pieces, scores, strict=True)]
    _require_once(vocab)
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask_2>"}
    parts = _steps_of_library(proto, [*map(added, first), added("<unk>")], True)
    model = models.Unigram(vocab, len(first) + pieces.index("<unk>"), False)
    return Vocabulary(file, model, parts, named, (), ("eos_token",))


def _normal(proto: Any, first: Sequence[str]) -> tuple[list[str], list[float]]:
    """The pieces behind the first ones, which must be `first`, and their scores."""
    there = [piece.piece for piece in proto.pieces[: len(first)]]
    if there != list(first):
        raise Unfit(f"its first pieces are not {', '.join(first)}, but {one_line(', '.join(there), 80)}")
    rest = proto.pieces[len(first) :]
    return [piece.piece for piece in rest], [float(piece.score) for piece in rest]


def _steps_of_library(proto: Any, special: list[dict[str, Any]], normalizes: bool) -> dict[str, Any]:
    """The steps that transformers' classes over the library have; normalizes: whether runs of spaces become one."""
    steps = [*charsmap(proto), _ONE_SPACE] if normalizes else []
    known = {token["content"] for token in special}
    return {
        "normalizer": sequence(steps, "normalizers"),
        "pre_tokenizer": metaspace("always", split=True),
        "decoder": metaspace("always", split=True),
        "added_tokens": [*special, *(token for token in added_pieces(proto) if token["content"] not in known)],
    }


# ---- ids in a file of their own


def _marian(file: Path, values: Mapping[str, Any]) -> Vocabulary:
    """Pieces of source.spm with the ids of vocab.json, which target.spm's have too; >>fra<< before a text is one token."""
    if values.get("separate_vocabs") is True:
        raise UserError(
            f"{one_line(file)}: two vocabularies, one for what is read and one for what is written (separate_vocabs), which one "
            "tokenizer.json cannot hold; take a model with one"
        )
    ids = _ids(file.parent / "vocab.json", ("<unk>", "</s>"))
    languages = [text for text in ids if text.startswith(">>") and text.endswith("<<")]
    named = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    special = [added(text) for text in named.values() if text in ids]
    tokens = [*special, *(added(text, special=False) for text in languages)]
    return _with_ids(file, ids, tokens, named, ())


def _m2m100(file: Path, values: Mapping[str, Any]) -> Vocabulary:
    """Pieces with the ids of vocab.json, then the languages. A text has its language before it."""
    ids = _ids(file.parent / "vocab.json", tuple(_FAIRSEQ.values()))
    asked = values.get("language_codes", "m2m100")
    codes = {"m2m100": M2M100, "wmt21": WMT21}.get(asked if isinstance(asked, str) else "")
    if codes is None:
        raise UserError(f"tokenizer_config.json: language_codes {one_line(asked, 40)}; m2m100 and wmt21 are read")
    languages = [f"__{code}__" for code in codes]
    for text in languages:
        ids.setdefault(text, len(ids))
    language = f"__{_language(values, 'en', codes)}__"
    tokens = [added(text) for text in (*_FAIRSEQ.values(), *languages)]
    named = {**_FAIRSEQ, "sep_token": "</s>"}
    return _with_ids(file, ids, tokens, named, (language,))


def _ids(file: Path, needed: Sequence[str]) -> dict[str, int]:
    """vocab.json: token -> id, each id from 0 on once."""
    if not file.exists():
        raise Unfit("vocab.json, which says what ids its pieces have, is not beside it; download it too")
    vocab = read_json_object(file, LARGEST_FILE)
    if not 0 < len(vocab) <= MOST_TOKENS or any(isinstance(i, bool) or not isinstance(i, int) for i in vocab.values()):
        raise Unfit(f"vocab.json has {len(vocab)} tokens, 1 to {MOST_TOKENS} are read, each with its id")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise Unfit(f"the {len(vocab)} tokens of vocab.json do not have the ids from 0 on")
    if not all(0 < len(text) <= LONGEST_TOKEN for text in vocab):
        raise Unfit(f"vocab.json has a token of no characters, or of more than {LONGEST_TOKEN}")
    for text in needed:
        if text not in vocab:
            raise Unfit(f"vocab.json has no token {text!r}")
    return {text: vocab[text] for text in sorted(vocab, key=lambda text: vocab[text])}


def _with_ids(
    file: Path, ids: dict[str, int], tokens: list[dict[str, Any]], named: Mapping[str, str], before: tuple[str, ...]
) -> Vocabulary:
    """SentencePiece's cut of a text, with ids from elsewhere. A piece that `ids` has not is left out.

    Characters that no piece has are looked up one by one; transformers looks up a whole run of them, which mostly is unknown.
    """
    proto = parsed(file)
    known = {token["content"] for token in tokens}
    extra = [token for token in added_pieces(proto) if token["content"] in ids and token["content"] not in known]
    spec = proto.normalizer_spec
    tidy = [_STRIPPED, _ONE_SPACE] if spec.remove_extra_whitespaces else []
    scheme = "always" if spec.add_dummy_prefix else "never"
    parts = {
        "normalizer": sequence([*charsmap(proto), *tidy], "normalizers"),
        "pre_tokenizer": metaspace(scheme, split=True),
        "decoder": metaspace(scheme, split=True),
        "added_tokens": [*tokens, *extra],
    }
    return Vocabulary(file, _model(proto, ids), parts, named, before, ("eos_token",))


def _model(proto: Any, ids: dict[str, int]) -> Model:
    pieces = {p.piece: float(p.score) for p in proto.pieces if p.type in (NORMAL, USER_DEFINED) and p.piece in ids}
    if not pieces:
        raise Unfit("vocab.json has none of its pieces; do the files belong together?")
    if proto.trainer_spec.model_type == BPE:
        merges = merges_from_scores(list(pieces), list(pieces.values()))
        return models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=False)
    if proto.trainer_spec.model_type != UNIGRAM:
        raise Unfit("a SentencePiece model of words or characters; BPE and Unigram are read")
    # Of two tokens that are not pieces the longer one is taken.
    scores = [pieces.get(text, _UNREACHED * len(text) + len(text)) for text in ids]
    fallback = bool(proto.trainer_spec.byte_fallback) and ids.keys() >= BYTE_PIECES
    return models.Unigram(list(zip(ids, scores, strict=True)), ids["<unk>"], fallback)


# ---- both


def _language(values: Mapping[str, Any], default: str, known: Sequence[str]) -> str:
    """The language of what is read: src_lang, else the default of transformers' class."""
    language = values.get("src_lang") or default
    if language not in known:
        raise UserError(f"tokenizer_config.json: src_lang {one_line(language, 40)!r} is no language of this model's")
    return str(language)


def _require_once(vocab: Sequence[tuple[str, float]]) -> None:
    if len({text for text, _ in vocab}) != len(vocab):
        raise Unfit("it has a piece that the model adds")


READERS = {
    "NllbTokenizer": _nllb,
    "M2M100Tokenizer": _m2m100,
    "MBart50Tokenizer": _mbart50,
    "MarianTokenizer": _marian,
    "PegasusTokenizer": _pegasus,
}
"""Transformers' class -> what reads its files: of the SentencePiece file and tokenizer_config.json. Raises Unfit, UserError."""
