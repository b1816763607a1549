"""Tokenizers of every kind of model and step that `embed` lets through, and texts over Unicode, for the clients' own tokenizers."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from functools import cache
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from edgewright.apps.traces import TEXTS

from .apps import ROOT

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
QWEN35 = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"\s\p{L}", r"\s\p{L}\p{M}")
CORPUS = [*TEXTS[:-2], *(ROOT / "docs" / "guide.md").read_text().splitlines()[:150]]
ADDED = [
    AddedToken("<end>", special=True, normalized=False),
    AddedToken("<tool>", lstrip=True, rstrip=True, normalized=False),
    AddedToken("whole", single_word=True, normalized=True),
    AddedToken("<e", normalized=False),
    AddedToken("a b", normalized=True),
]


def trained(model: Any, trainer: Any, size: int = 700, **parts: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(
        CORPUS, trainer(vocab_size=size, show_progress=False, special_tokens=["<unk>", "<s>"])
    )
    tokenizer.add_tokens(ADDED)
    return tokenizer


def bpe(**parts: Any) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(
        models.BPE(),
        lambda **o: trainers.BpeTrainer(initial_alphabet=alphabet, **o),
        decoder=decoders.ByteLevel(),
        **parts,
    )


def split(pattern: str, **options: Any) -> Any:
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False, **options)])


def bytes_of_vocabulary(tokenizer: Tokenizer) -> Tokenizer:
    """With `<0x..>` tokens, which stand for what the vocabulary has not."""
    whole = json.loads(tokenizer.to_str())
    vocab = whole["model"]["vocab"]
    for byte in range(256):
        name = f"<0x{byte:02X}>"
        if isinstance(vocab, dict):
            vocab[name] = len(vocab) + len(ADDED)
        else:
            vocab.append([name, -20.0])
    whole["model"]["byte_fallback"] = True
    for token in whole["added_tokens"]:
        if not isinstance(vocab, dict) and token["content"] not in ("<unk>", "<s>"):
            token["id"] += 256
    return Tokenizer.from_str(json.dumps(whole))


def llama2() -> Tokenizer:
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    words = pre_tokenizers.Metaspace(prepend_scheme="never")  # for training alone: Llama has none
    tokenizer = trained(
        models.BPE(unk_token="<unk>", fuse_unk=True),
        trainers.BpeTrainer,
        normalizer=normalizer,
        pre_tokenizer=words,
        decoder=decoder,
    )
    whole = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
    return bytes_of_vocabulary(Tokenizer.from_str(json.dumps(whole)))


def gemma() -> Tokenizer:
    words = pre_tokenizers.Split(" ", "merged_with_previous")
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    normalizer = normalizers.Replace(" ", "▁")
    tokenizer = trained(
        models.BPE(unk_token="<unk>", fuse_unk=True),
        trainers.BpeTrainer,
        normalizer=normalizer,
        pre_tokenizer=words,
        decoder=decoder,
    )
    return bytes_of_vocabulary(tokenizer)


def unigram(scheme: str) -> Tokenizer:
    space = {"replacement": "▁", "prepend_scheme": scheme}
    return trained(
        models.Unigram(),
        lambda **o: trainers.UnigramTrainer(unk_token="<unk>", **o),
        pre_tokenizer=pre_tokenizers.Metaspace(**space),
        decoder=decoders.Metaspace(**space),
    )


def words_and_signs() -> Tokenizer:
    steps = [
        pre_tokenizers.Metaspace(prepend_scheme="first"),
        pre_tokenizers.Punctuation("contiguous"),
        pre_tokenizers.Digits(False),
    ]
    return trained(
        models.BPE(unk_token="<unk>"),
        trainers.BpeTrainer,
        pre_tokenizer=pre_tokenizers.Sequence(steps),
        decoder=decoders.Metaspace(prepend_scheme="first"),
    )


def word_level() -> Tokenizer:
    tokenizer = trained(
        models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer, pre_tokenizer=pre_tokenizers.WhitespaceSplit()
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <s>", special_tokens=[("<s>", 1)])
    return tokenizer


def word_piece(**options: Any) -> Tokenizer:
    return trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer,
        normalizer=normalizers.BertNormalizer(**options),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(cleanup=options.get("lowercase", True)),
    )


WORD_PIECES: dict[str, Callable[[], Tokenizer]] = {
    "word piece": word_piece,
    "word piece cased": lambda: word_piece(lowercase=False, handle_chinese_chars=False),
    "word piece dirty": lambda: word_piece(clean_text=False, strip_accents=False),
}

KINDS: dict[str, Callable[[], Tokenizer]] = {
    "dolphin": lambda: Tokenizer.from_file(str(ROOT / "examples" / "dolphin-packages" / "tokenizer.json")),
    "gemma": gemma,
    "gpt2": lambda: bpe(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "llama2": llama2,
    "llama3": lambda: bpe(pre_tokenizer=split(LLAMA3)),
    "qwen2": lambda: bpe(pre_tokenizer=split(QWEN2), normalizer=normalizers.NFC()),
    "qwen3.5": lambda: bpe(pre_tokenizer=split(QWEN35), normalizer=normalizers.NFC()),
    "smollm2": lambda: bpe(
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    ),
    "unigram always": lambda: unigram("always"),
    "unigram bytes": lambda: bytes_of_vocabulary(unigram("first")),
    "unigram never": lambda: unigram("never"),
    "word level": word_level,
    "words and signs": words_and_signs,
}

PIECES = [
    "<end>",
    " <tool> ",
    "whole",
    "wholes",
    "a b",
    "<e",
    "e\u0301",
    "½²",
    "\r\n",
    "  ",
    "'s",
    "'LL",
    "123456",
    "한국",
    "각",
    "ａ",
    "İ",
    "\u0344",
]
CHARS = st.characters(exclude_categories=("Cs", "Cn", "Co"))
SOME = st.lists(
    st.one_of(st.text(CHARS, max_size=12), st.sampled_from(PIECES), st.sampled_from(CORPUS)), max_size=5
).map("".join)


def same_unicode(text: str) -> bool:
    """Whether the library's NFC, whose tables are of an older Unicode, is Python's: it orders the newest marks otherwise."""
    return bool(normalizers.NFC().normalize_str(text) == unicodedata.normalize("NFC", text))


@cache
def made(kind: str) -> Tokenizer:
    return (KINDS | WORD_PIECES)[kind]()


@cache
def texts() -> tuple[str, ...]:
    """Over Unicode, the same ones each time."""
    found: list[str] = []

    @settings(
        max_examples=20,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(SOME, min_size=20, max_size=20))
    def collect(some: list[str]) -> None:
        found.extend(filter(same_unicode, some))

    collect()
    assert len(found) > 300
    return (*found, *TEXTS)
