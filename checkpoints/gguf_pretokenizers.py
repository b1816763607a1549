"""How byte-level vocabularies of GGUF files cut a text before they merge, by the name in `tokenizer.ggml.pre`.

A file has the name alone. The expressions are those of the models' own tokenizer.json where it is known, else of llama.cpp
(llama-vocab.cpp).
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

from ..errors import UserError
from ..system.reading import shown

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_BEHIND = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_BEHIND}"
_QWEN2 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_BEHIND}"
_QWEN35 = (
    rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+ENDINGS|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*ENDINGS"
    r"|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = _CASED.replace("ENDINGS", f"{_ENDINGS}?").replace("DIGITS", r"\p{N}{1,3}")
_TEKKEN = _CASED.replace("ENDINGS", "").replace("DIGITS", r"\p{N}")
_DIGITS = r"\p{N}"


@dataclass(frozen=True)
class PreTokenizer:
    """Expressions that cut a text one after the other: what matches is a piece, and what lies between is too.

    whole: a piece that is a token by itself is not merged. bos: the token that a text starts with is put before it.
    """

    expressions: tuple[str, ...]
    whole: bool = False
    bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The library's pre-tokenizer."""
        cuts = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in self.expressions]
        return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_KINDS = {
    "llama-bpe": PreTokenizer((_LLAMA3,), whole=True, bos=True),
    "dbrx": PreTokenizer((_LLAMA3,)),
    "qwen2": PreTokenizer((_QWEN2,)),
    "qwen35": PreTokenizer((_QWEN35,)),
    "smollm": PreTokenizer((_DIGITS, _GPT2)),
    "gpt-2": PreTokenizer((_GPT2,)),
    "gpt-4o": PreTokenizer((_GPT4O,)),
    "tekken": PreTokenizer((_TEKKEN,), whole=True, bos=True),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}
_SAME_AS = {
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "lfm2", "pixtral", "midm-2.0"),
    "dbrx": ("smaug-bpe",),
    "qwen2": ("deepseek-r1-qwen", "kormo", "stablelm2", "hunyuan"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "gpt-2": ("gpt2", "phi-2", "mpt", "olmo", "jais", "gigachat", "mellum", "granite-docling"),
    "gpt-4o": ("llama4", "kanana2"),
}
PRE_TOKENIZERS = _KINDS | {name: _KINDS[kind] for kind, names in _SAME_AS.items() for name in names}
"""The value of `tokenizer.ggml.pre` -> how it cuts."""


def pre_tokenizer(name: object) -> PreTokenizer:
    """That of a name. Raises UserError for an unknown one: cut in another way a text has other ids."""
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(_KINDS))
        raise UserError(
            f"GGUF: pre-tokenizer {shown(name, 40)} (known: {known} and their kin); give the safetensors checkpoint instead"
        )
    return PRE_TOKENIZERS[name]
