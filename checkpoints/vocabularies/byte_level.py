"""Byte-level BPE: tiktoken's ranks (Llama 3's tokenizer.model, *.tiktoken), Mistral's tekken.json, vocab.json with merges.txt.

A byte is written as one printable character, as GPT-2 has it (Radford et al. 2019); a rank is an id, and what is joined first.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import models

from ...errors import UserError
from ...system.reading import MEBIBYTE, one_line, read_bytes, read_json_object, read_text, shown
from ..gguf_pretokenizers import PRE_TOKENIZERS
from ..tokenizer_checks import MOST_TOKENS, Unfit
from .merges import LONGEST_TOKEN, MOST_MERGES, merges_from_scores
from .vocabulary import LARGEST_FILE, Vocabulary, added, ends_asked

_PLAIN = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHER = [byte for byte in range(256) if byte not in _PLAIN]
_LETTERS = {**{byte: chr(byte) for byte in _PLAIN}, **{byte: chr(256 + i) for i, byte in enumerate(_OTHER)}}
_SPELLING = {chr(byte): letter for byte, letter in _LETTERS.items()}
_TABLE = str.maketrans(_SPELLING)

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d{1,9}[\r\n]")

_MOST_SPECIAL = 1 << 14
_LLAMA3_NAMES = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
)
_LLAMA3 = (*_LLAMA3_NAMES, *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)))
_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
_LLAMA3_IDS, _QWEN_IDS = 128000, 151643

_NFC = {"type": "NFC"}
_GPT2_NAMED = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>")
_QWEN_NAMED = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")
_ROBERTA_NAMED = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "cls_token": "<s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
MERGES_CLASSES = {"GPT2Tokenizer": _GPT2_NAMED, "Qwen2Tokenizer": _QWEN_NAMED, "RobertaTokenizer": _ROBERTA_NAMED}
"""Transformers' class of vocab.json and merges.txt -> the tokens that it names where the files do not."""

_SAME_AS = {
    **dict.fromkeys(("BartTokenizer", "LongformerTokenizer", "LEDTokenizer", "MvpTokenizer"), "RobertaTokenizer"),
    "CodeGenTokenizer": "GPT2Tokenizer",
}


def is_ranks(data: bytes) -> bool:
    """Whether a file that starts so is one of tiktoken's: lines of base64 and a number."""
    return _LINE.match(data) is not None


def read_ranks(file: Path, values: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a file of tiktoken's, Llama 3's or Qwen's. values: tokenizer_config.json. Raises Unfit, UserError."""
    ranks: dict[bytes, int] = {}
    for line in read_bytes(file, LARGEST_FILE).splitlines():
        if line:
            word, _, rank = line.partition(b" ")
            if not rank.isdigit() or len(rank) > 9:
                raise Unfit(f"a line {one_line(line, 60)!r} is not a token in base64 and its rank")
            ranks[_decoded(word)] = int(rank)
    qwen = file.suffix == ".tiktoken"
    tokens = _given_tokens(values, len(ranks)) or _published(file, len(ranks), qwen)
    cut = PRE_TOKENIZERS["qwen2" if qwen else "llama-bpe"].expressions[0]
    named = {"eos_token": "<|endoftext|>"} if qwen else {"bos_token": _LLAMA3[0], "eos_token": _LLAMA3[1]}
    before, after = ends_asked(values, bos=not qwen, eos=False)
    return _of_ranks(file, ranks, 0, tokens, cut, _NFC if qwen else None, named, (before, after))


def _given_tokens(values: Mapping[str, Any], first: int) -> list[str]:
    """Special tokens of added_tokens_decoder behind the ranks; ids between them are reserved, as transformers has it."""
    given = values.get("added_tokens_decoder")
    if not isinstance(given, Mapping) or not given:
        return []
    texts = {int(key): token.get("content") if isinstance(token, Mapping) else token for key, token in given.items()}
    last = max(texts)
    if last - first >= _MOST_SPECIAL:
        raise Unfit(f"added_tokens_decoder has the id {last}, {last - first} above the vocabulary; is it whole?")
    return [str(texts.get(i, f"<|reserved_token_{i}|>")) for i in range(first, last + 1)]


def _published(file: Path, count: int, qwen: bool) -> list[str]:
    """The special tokens of the two families that published files of ranks without them."""
    if count == (_QWEN_IDS if qwen else _LLAMA3_IDS):
        return list(_QWEN if qwen else _LLAMA3)
    raise UserError(
        f"{one_line(file)}: {count} ranks and no special tokens beside them; give a tokenizer_config.json with added_tokens_decoder"
    )


def read_tekken(file: Path, values: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a tekken.json: special tokens come first, then the ranks. Raises Unfit, UserError."""
    content = read_json_object(file, 64 * MEBIBYTE)
    config, entries = content.get("config"), content.get("vocab")
    if not isinstance(config, dict) or not isinstance(entries, list) or not isinstance(config.get("pattern"), str):
        raise Unfit("no config with a pattern, or no vocab; download it again")
    special = content.get("special_tokens")
    if not isinstance(special, list):
        raise UserError(
            f"{one_line(file)}: an old tekken.json, without special_tokens; give the newer file, or the tokenizer.json of "
            "transformers' layout"
        )
    by_rank = {entry.get("rank"): entry.get("token_str") for entry in special if isinstance(entry, dict)}
    texts = [by_rank.get(i) for i in range(len(special))]
    if not all(isinstance(text, str) and 0 < len(text) <= LONGEST_TOKEN for text in texts):
        raise Unfit(f"its {len(special)} special_tokens do not have the ranks from 0 on, each with its token_str")
    count = _integer(config, "default_num_special_tokens", len(texts), _MOST_SPECIAL)
    size = _integer(config, "default_vocab_size", count + len(entries), MOST_TOKENS)
    tokens = [*map(str, texts), *(f"<SPECIAL_{i}>" for i in range(len(texts), count))]
    ranks = {}
    for rank, entry in enumerate(entries[: max(0, size - count)]):
        word = entry.get("token_bytes") if isinstance(entry, dict) else None
        if not isinstance(word, str):
            raise Unfit(f"its entry {rank} of vocab has no token_bytes")
        ranks[_decoded(word)] = rank
    named = {f"{key}_token": text for key, text in _TEKKEN_NAMED.items() if text in tokens}
    ends = ends_asked(values, bos=True, eos=False)
    return _of_ranks(file, ranks, count, tokens, config["pattern"], None, named, ends)


_TEKKEN_NAMED = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"}


def _integer(config: Mapping[str, Any], key: str, default: int, most: int) -> int:
    value = config.get(key, default)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise Unfit(f"{key} is {shown(value, 40)}; 0 to {most} is read")
    return value


def _decoded(word: str | bytes) -> bytes:
    try:
        token = base64.b64decode(word, validate=True)
    except (binascii.Error, ValueError):
        raise Unfit(f"{one_line(word, 40)!r} is no base64") from None
    if not 0 < len(token) <= LONGEST_TOKEN:
        raise Unfit(f"a token of {len(token)} bytes, 1 to {LONGEST_TOKEN} are read")
    return token


def _of_ranks(
    file: Path,
    ranks: Mapping[bytes, int],
    first: int,
    special: list[str],
    expression: str,
    normalizer: dict[str, Any] | None,
    named: Mapping[str, str],
    ends: tuple[tuple[str, ...], tuple[str, ...]],
) -> Vocabulary:
    """first: how many ids lie before the ranks, those of special tokens; else special tokens come behind."""
    if sorted(ranks.values()) != list(range(len(ranks))) or not 0 < len(ranks) + len(special) <= MOST_TOKENS:
        raise Unfit(f"its {len(ranks)} tokens do not have the ranks from 0 on, or are more than {MOST_TOKENS}")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise Unfit("it has no token for one of the 256 bytes")
    pieces = [token.decode("latin-1").translate(_TABLE) for token in sorted(ranks, key=lambda token: ranks[token])]
    merges = merges_from_scores(pieces, range(0, -len(pieces), -1))
    ids = {piece: first + rank for rank, piece in enumerate(pieces)}
    for place, token in enumerate(special):
        if token in ids:
            raise Unfit(f"its special token {one_line(token, 40)!r} is another token too")
        ids[token] = place if first else len(pieces) + place
    parts = {
        "normalizer": normalizer,
        "pre_tokenizer": _split(expression, False),
        "decoder": _BYTES,
        "added_tokens": [added(token) for token in special],
    }
    return Vocabulary(file, models.BPE(ids, merges, ignore_merges=True), parts, named, *ends)


_BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def _split(expression: str, prefix: bool) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, level]}


def read_merges(directory: Path, tokenizer_class: str | None, values: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of vocab.json and merges.txt. Raises Unfit; UserError for a class that cuts a text in a way not known here."""
    kind = _SAME_AS.get(tokenizer_class or "", tokenizer_class)
    file = directory / "vocab.json"
    if kind not in MERGES_CLASSES:
        known = ", ".join(sorted(MERGES_CLASSES))
        raise UserError(
            f"{one_line(file)}: vocab.json and merges.txt of {one_line(kind or 'an unknown class', 40)} (read: {known}); where "
            "transformers is installed, AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes a tokenizer.json"
        )
    vocab = read_json_object(file, LARGEST_FILE)
    ids = set(vocab.values()) if all(isinstance(i, int) and not isinstance(i, bool) for i in vocab.values()) else set()
    if len(vocab) > MOST_TOKENS or len(ids) != len(vocab) or not all(0 <= i < MOST_TOKENS for i in ids):
        raise Unfit(f"its {len(vocab)} tokens do not each have an id of its own below {MOST_TOKENS}")
    if not vocab or max(map(len, vocab)) > LONGEST_TOKEN:
        raise Unfit(f"it has no tokens, or one of more than {LONGEST_TOKEN} characters")
    prefix = values.get("add_prefix_space") is True
    if kind == "Qwen2Tokenizer":
        splitter = _split(PRE_TOKENIZERS["qwen2"].expressions[0], prefix)
    else:
        splitter = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": True}
    parts: dict[str, Any] = {
        "normalizer": _NFC if kind == "Qwen2Tokenizer" else None,
        "pre_tokenizer": splitter,
        "decoder": _BYTES,
        "added_tokens": [],
    }
    before, after = ends_asked(values, bos=False, eos=False)
    if kind == "RobertaTokenizer":
        before, after = ("cls_token",), ("sep_token",)
    return Vocabulary(
        file, models.BPE(vocab, _merges(directory / "merges.txt")), parts, MERGES_CLASSES[kind], before, after
    )


def _merges(file: Path) -> list[tuple[str, str]]:
    """Lines of two pieces each, behind a line with the version."""
    lines = read_text(file, LARGEST_FILE).split("\n")
    if len(lines) > MOST_MERGES:
        raise Unfit(f"{file.name} has {len(lines)} lines, {MOST_MERGES} are read")
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        head, _, tail = line.partition(" ")
        if not head or not tail or " " in tail or len(line) > 2 * LONGEST_TOKEN:
            raise Unfit(f"line {number} of {file.name} is not two pieces: {one_line(line, 60)!r}")
        pairs.append((head, tail))
    return pairs
