"""A tokenizer from the metadata of a GGUF file, which has a vocabulary and no tokenizer.json.

Two kinds: `gpt2` is byte-level BPE with its merges in the file, cut as `gguf_pretokenizers` says; `llama` is SentencePiece BPE,
whose pieces have scores from which the merges follow. Keys are llama.cpp's `tokenizer.ggml.*`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from ..errors import UserError
from ..system.reading import MEBIBYTE, one_line
from .gguf_pretokenizers import PreTokenizer, pre_tokenizer
from .tokenizer_backend import from_library, put_around
from .tokenizer_checks import MOST_TOKENS, Limits
from .vocabularies.merges import (
    BYTE_PIECES,
    CONTROL,
    LONGEST_TOKEN,
    MOST_MERGES,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    merges_from_scores,
)

_LIMITS = Limits(growth=12.0, decoded=3.0)
"""A space becomes a mark of three bytes, and one is put in front; a byte that is no UTF-8 becomes U+FFFD."""

_WAY_OUT = "give the safetensors checkpoint instead"


def build(metadata: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any], set[int], Limits]:
    """The library's tokenizer, the settings (named tokens, chat template), the ids that end generation, and the limits.

    Raises UserError if the vocabulary is missing, inconsistent, or of a kind not known here.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _texts(metadata, "tokens", MOST_TOKENS, LONGEST_TOKEN)
    if len(set(tokens)) != len(tokens):
        raise UserError(f"GGUF: tokenizer.ggml.tokens holds one token twice; {_WAY_OUT}")
    types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens) or not all(isinstance(kind, int) for kind in types):
        raise UserError(f"GGUF: tokenizer.ggml.token_type does not fit the {len(tokens)} tokens; {_WAY_OUT}")
    try:
        if kind == "gpt2":
            cut = pre_tokenizer(metadata.get("tokenizer.ggml.pre", "default"))
            backend, bos = _byte_level(metadata, tokens, cut), cut.bos
        elif kind == "llama":
            backend, bos = _sentencepiece(metadata, tokens, types), True
        else:
            raise UserError(f"GGUF: tokenizer model {one_line(kind, 40)!r} (known: gpt2, llama); {_WAY_OUT}")
        spelled = [(_respell(t) if kind == "llama" else t, k) for t, k in zip(tokens, types)]
        strips = _strips(metadata.get("general.name"))
        for wanted, special in ((CONTROL, True), (UNKNOWN, True), (USER_DEFINED, False)):
            texts = [t for t, k in spelled if k == wanted]
            backend.add_tokens([AddedToken(t, normalized=False, special=special, rstrip=strips(t)) for t in texts])
        settings = _settings(metadata, tokens)
        _add_template(backend, metadata, settings, default_bos=bos)
    except BaseException as error:
        if not from_library(error):
            raise
        raise UserError(f"GGUF: the vocabulary makes no tokenizer ({one_line(error, 120)}); {_WAY_OUT}") from None
    eos = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    return backend, settings, {i for i in eos if isinstance(i, int) and 0 <= i < len(tokens)}, _LIMITS


def _strips(model: object) -> Callable[[str], bool]:
    """Whether white space behind an added token belongs to it. A file does not say; llama.cpp knows it of Phi-3 by its name."""
    phi3 = isinstance(model, str) and ("phi-3" in model.lower() or "phi3" in model.lower())
    return lambda token: phi3 and token not in ("<unk>", "<s>", "<|endoftext|>")


def _texts(metadata: Mapping[str, Any], key: str, most: int, longest: int) -> list[str]:
    """A list of at most `most` strings of at most `longest` characters each. Raises UserError."""
    texts = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"GGUF: no tokenizer.ggml.{key}, so there is no tokenizer in it; {_WAY_OUT}")
    if len(texts) > most:
        raise UserError(f"GGUF: tokenizer.ggml.{key} has {len(texts)} entries, at most {most} are read; {_WAY_OUT}")
    if (length := max(map(len, texts))) > longest:
        raise UserError(
            f"GGUF: an entry of tokenizer.ggml.{key} has {length} characters, {longest} are read; {_WAY_OUT}"
        )
    return texts


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], cut: PreTokenizer) -> tokenizers.Tokenizer:
    merges = [tuple(line.split(" ", 1)) for line in _texts(metadata, "merges", MOST_MERGES, 2 * LONGEST_TOKEN)]
    pairs = [(m[0], m[1]) for m in merges if len(m) == 2]
    if len(pairs) != len(merges):
        raise UserError(f"GGUF: a line of tokenizer.ggml.merges is not two pieces; {_WAY_OUT}")
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, pairs, ignore_merges=cut.whole))
    backend.pre_tokenizer = cut.build()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise UserError(f"GGUF: tokenizer.ggml.scores does not fit the {len(tokens)} tokens; {_WAY_OUT}")
    pieces = [_respell(token) for token in tokens]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab,
            merges_from_scores(pieces, scores, types),
            unk_token=pieces[unknown] if isinstance(unknown, int) and 0 <= unknown < len(pieces) else None,
            fuse_unk=True,
            byte_fallback=vocab.keys() >= BYTE_PIECES,
        )
    )
    to_mark = normalizers.Replace(" ", SPACE)
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), to_mark])
        backend.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)])
    else:
        backend.normalizer = to_mark
        backend.decoder = decoders.Sequence(back)
    return backend


def _respell(token: str) -> str:
    """A run of spaces as the space mark: in the model's text spaces are replaced, in GGUF's pieces they are not."""
    return SPACE * len(token) if token and not token.strip(" ") else token


def _settings(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for key, name in (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token"), ("unknown", "unk_token")):
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token, int):
            if not 0 <= token < len(tokens):
                raise UserError(f"GGUF: {key}_token_id {token} is beyond the {len(tokens)} tokens; {_WAY_OUT}")
            settings[name] = tokens[token]
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        if len(template) > MEBIBYTE:
            raise UserError(f"GGUF: a chat template of {len(template)} characters, {MEBIBYTE} are read; {_WAY_OUT}")
        settings["chat_template"] = template
    return settings


def _add_template(
    backend: tokenizers.Tokenizer, metadata: Mapping[str, Any], settings: Mapping[str, Any], default_bos: bool
) -> None:
    """Let `encode` add bos and eos as the file says. default_bos: where it does not say, as llama.cpp has it."""
    used = {
        key: settings[key]
        for key, default in (("bos_token", default_bos), ("eos_token", False))
        if metadata.get(f"tokenizer.ggml.add_{key}", default) and key in settings
    }
    put_around(
        backend,
        [used[key] for key in ("bos_token",) if key in used],
        [used[key] for key in ("eos_token",) if key in used],
    )
