"""Vocabularies of GGUF: ids are those of a tokenizer with the steps that the models' own tokenizer.json has."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import tokenizers
from helpers.vocabularies import byte_fallback
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from edgewright.checkpoints.gguf_pretokenizers import PRE_TOKENIZERS
from edgewright.checkpoints.tokenizer import Tokenizer
from edgewright.errors import UserError

# As in the tokenizer.json of Llama 3, Qwen2, Qwen3.5 and of GPT-4o's kin (Phi-4-mini).
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(expression: str) -> pre_tokenizers.PreTokenizer:
    cut = pre_tokenizers.Split(Regex(expression), "isolated", invert=False)
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


STEPS: dict[str, Any] = {
    "llama-bpe": lambda: split(_LLAMA3),
    "qwen2": lambda: split(_QWEN2),
    "qwen35": lambda: split(_QWEN35),
    "gpt-4o": lambda: split(_GPT4O),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}
POOL = [
    *(
        "Hello world",
        "don't I'll WE'VE x'S",
        "  lead",
        " tab\t\tnew\n\n\nline\r\n",
        "1234567 89",
        "áéîöū Straße",
        "日本語",
    ),
    *(
        "한국어 문장",
        "हिन्दी पाठ",
        "العربية",
        "🙂👩‍👩‍👧🏽",
        "a\u0301\u0327b",
        "CamelCaseHTTPServer",
        "foo_bar.baz()",
        "   \n  x",
    ),
    *("½ ² Ⅻ ٣٤", "!!!???...", "\u00a0nbsp\u2003em", "x=1;y+=2^~|`$<>", "<|im_start|>", "<|end|> \n", "[X]"),
]
SPECIAL, ADDED = ["<|im_start|>", "<|end|>"], ["[X]"]


def texts() -> list[str]:
    random_ = random.Random(7)
    return ["".join(random_.choices(POOL, k=random_.randrange(1, 7))) for _ in range(150)]


def trained(name: str) -> tokenizers.Tokenizer:
    """A byte-level BPE of some 500 tokens with the steps of `name`."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    backend.pre_tokenizer, backend.decoder = STEPS[name](), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(texts() * 3, trainer)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    backend.add_tokens([AddedToken(t, normalized=False) for t in ADDED])
    return backend


def metadata(backend: tokenizers.Tokenizer, pre: str | None) -> dict[str, Any]:
    vocab = sorted(backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocab]
    merges = json.loads(backend.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in SPECIAL else 4 if t in ADDED else 1 for t in tokens],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
        "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
    } | ({} if pre is None else {"tokenizer.ggml.pre": pre})


@pytest.mark.parametrize("name", STEPS)
def test_ids_are_those_of_the_models_own_tokenizer(name: str) -> None:
    backend = trained(name)
    mine = Tokenizer.from_gguf(metadata(backend, name))
    for text in texts():
        ids = backend.encode(text, add_special_tokens=False).ids
        assert mine.encode(text, special=False) == ids, text
        assert mine.decode(ids) == backend.decode(ids)


def test_a_whole_token_is_not_merged_where_the_model_says_so() -> None:
    """Llama 3 takes a piece that is a token before it looks for merges that lead to it."""
    found = metadata(trained("gpt-2"), "llama-bpe")
    found["tokenizer.ggml.tokens"].append("Ġquux")
    found["tokenizer.ggml.token_type"].append(1)
    last = len(found["tokenizer.ggml.tokens"]) - 1
    assert Tokenizer.from_gguf(found).encode(" quux", special=False) == [last]
    assert Tokenizer.from_gguf(found | {"tokenizer.ggml.pre": "qwen2"}).encode(" quux", special=False) != [last]


def test_the_token_that_begins_a_text() -> None:
    found = metadata(trained("gpt-2"), "llama-bpe")
    bos = found["tokenizer.ggml.bos_token_id"]
    assert Tokenizer.from_gguf(found).encode("x")[0] == bos
    assert Tokenizer.from_gguf(found | {"tokenizer.ggml.add_bos_token": False}).encode("x")[0] != bos
    assert Tokenizer.from_gguf(found | {"tokenizer.ggml.pre": "qwen2"}).encode("x")[0] != bos


def test_a_file_without_a_name_is_cut_as_llamacpp_does() -> None:
    assert Tokenizer.from_gguf(metadata(trained("gpt-2"), None)).encode("x")
    cuts = PRE_TOKENIZERS["default"].build().pre_tokenize_str("it's 12345, (a+b) 7")
    assert [text.replace("Ġ", " ") for text, _ in cuts] == [
        *("it", "'", "s", " ", "123", "45", ",", " ", "(", "a", "+", "b", ")", " ", "7")
    ]


@pytest.mark.parametrize("name", ["falcon", "deepseek-v3", 3, "x\ny"])
def test_other_cuts_are_refused_by_name(name: Any) -> None:
    found = metadata(trained("gpt-2"), "gpt-2") | {"tokenizer.ggml.pre": name}
    with pytest.raises(UserError, match=r"GGUF: pre-tokenizer .*(falcon|deepseek-v3|3|x)") as caught:
        Tokenizer.from_gguf(found)
    assert "\n" not in str(caught.value)


def test_white_space_behind_the_tokens_of_phi3() -> None:
    found = byte_fallback()
    text = "<bos> he"
    plain = Tokenizer.from_gguf(found).encode(text, special=False)
    stripped = Tokenizer.from_gguf(found | {"general.name": "Phi 3 mini, Phi-3"}).encode(text, special=False)
    assert stripped == [2, *Tokenizer.from_gguf(found).encode("he", special=False)]
    assert len(plain) > len(stripped)
