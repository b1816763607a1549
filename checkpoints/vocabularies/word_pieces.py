"""vocab.txt: BERT's word pieces (Devlin et al. 2018), one a line, an id being the line's number."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import models

from ...errors import UserError
from ...system.reading import one_line, read_text
from ..tokenizer_checks import MOST_TOKENS, Unfit
from .merges import LONGEST_TOKEN
from .vocabulary import LARGEST_FILE, Vocabulary

_NAMED = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
_CLASSES = (
    *("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer", "ConvBertTokenizer"),
    *("SqueezeBertTokenizer", "LxmertTokenizer"),
)


def read_word_pieces(file: Path, tokenizer_class: str | None, values: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a vocab.txt. Raises Unfit; UserError for a class that is not BERT's."""
    if tokenizer_class is not None and tokenizer_class not in _CLASSES:
        raise UserError(
            f"{one_line(file)}: a vocab.txt of {one_line(tokenizer_class, 40)}, BERT's word pieces are read; where transformers is "
            "installed, AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes a tokenizer.json"
        )
    lines = read_text(file, LARGEST_FILE).split("\n")
    lines = lines[:-1] if lines[-1] == "" else lines
    if not 0 < len(lines) <= MOST_TOKENS or max(map(len, lines)) > LONGEST_TOKEN:
        raise Unfit(f"it has {len(lines)} lines, up to {MOST_TOKENS} of up to {LONGEST_TOKEN} characters are read")
    vocab = {token: i for i, token in enumerate(lines)}
    unknown = values.get("unk_token", _NAMED["unk_token"])
    unknown = unknown.get("content") if isinstance(unknown, Mapping) else unknown
    if not isinstance(unknown, str) or unknown not in vocab:
        raise Unfit(f"it has no token {one_line(unknown, 40)!r} for what is unknown")
    normalizer = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": _flag(values, "tokenize_chinese_chars", True),
        "strip_accents": _flag(values, "strip_accents", None),
        "lowercase": _flag(values, "do_lower_case", True),
    }
    parts = {
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "added_tokens": [],
    }
    model = models.WordPiece(vocab, unk_token=unknown)
    return Vocabulary(file, model, parts, _NAMED, ("cls_token",), ("sep_token",))


def _flag(values: Mapping[str, Any], key: str, default: bool | None) -> bool | None:
    value = values.get(key, default)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"tokenizer_config.json: {key} is {one_line(value, 40)!r}; true or false is needed")
    return value
