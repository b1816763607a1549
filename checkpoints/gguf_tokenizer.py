"""A tokenizer from the metadata of a GGUF file, which has a vocabulary and no tokenizer.json.

Two kinds: `gpt2` is byte-level BPE with its merges in the file; `llama` is SentencePiece BPE, whose pieces have scores from
which the merges follow. Keys are llama.cpp's `tokenizer.ggml.*`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from ..errors import UserError
from ..system.reading import one_line

_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6
_SPACE = "▁"
_WAY_OUT = "give the safetensors checkpoint instead"
_BYTE_PIECES = {f"<0x{byte:02X}>" for byte in range(256)}


def build(metadata: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any], set[int]]:
    """The library's tokenizer, the settings (named tokens, chat template), and the ids that end generation.

    Raises UserError if the vocabulary is missing, inconsistent, or of a kind not known here.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _texts(metadata, "tokens")
    if len(set(tokens)) != len(tokens):
        raise UserError(f"GGUF: tokenizer.ggml.tokens holds one token twice; {_WAY_OUT}")
    types = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise UserError(f"GGUF: tokenizer.ggml.token_type does not fit the {len(tokens)} tokens; {_WAY_OUT}")
    try:
        if kind == "gpt2":
            backend = _byte_level(metadata, tokens)
        elif kind == "llama":
            backend = _sentencepiece(metadata, tokens, types)
        else:
            raise UserError(f"GGUF: tokenizer model {one_line(kind, 40)!r} (known: gpt2, llama); {_WAY_OUT}")
        spelled = [(_respell(t) if kind == "llama" else t, k) for t, k in zip(tokens, types)]
        for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
            backend.add_tokens([AddedToken(t, normalized=False, special=special) for t, k in spelled if k == wanted])
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"GGUF: the vocabulary makes no tokenizer ({one_line(error, 120)}); {_WAY_OUT}") from None
    settings = _settings(metadata, tokens)
    _add_template(backend, metadata, settings, default_bos=kind == "llama")
    eos = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    return backend, settings, {i for i in eos if isinstance(i, int) and 0 <= i < len(tokens)}


def _texts(metadata: Mapping[str, Any], key: str) -> list[str]:
    texts = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(texts, list) or not texts or not isinstance(texts[0], str):
        raise UserError(f"GGUF: no tokenizer.ggml.{key}, so there is no tokenizer in it; {_WAY_OUT}")
    return texts


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> tokenizers.Tokenizer:
    merges = [tuple(line.split(" ", 1)) for line in _texts(metadata, "merges")]
    pairs = [(m[0], m[1]) for m in merges if len(m) == 2]
    if len(pairs) != len(merges):
        raise UserError(f"GGUF: a line of tokenizer.ggml.merges is not two pieces; {_WAY_OUT}")
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    pre = metadata.get("tokenizer.ggml.pre", "default")
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), split])
    elif pre in ("default", "gpt-2", "gpt2"):
        backend.pre_tokenizer = split
    else:
        raise UserError(f"GGUF: pre-tokenizer {one_line(pre, 40)!r} (known: smollm, gpt-2, default); {_WAY_OUT}")
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
            byte_fallback=vocab.keys() >= _BYTE_PIECES,
        )
    )
    to_mark = normalizers.Replace(" ", _SPACE)
    back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), to_mark])
        backend.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)])
    else:
        backend.normalizer = to_mark
        backend.decoder = decoders.Sequence(back)
    return backend


def _respell(token: str) -> str:
    """A run of spaces as the space mark: in the model's text spaces are replaced, in GGUF's pieces they are not."""
    return _SPACE * len(token) if token and not token.strip(" ") else token


def merges_from_scores(pieces: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """BPE merges that join as SentencePiece does: first the pair whose joined piece has the highest score.

    A piece of n characters gives a merge for each of its n - 1 cuts whose halves are pieces too. Runs of the space mark are
    user-defined. SentencePiece matches these before all else, the longest first, so their merges come first.
    """
    vocab = {piece: i for i, piece in enumerate(pieces) if types[i] in (_NORMAL, _USER_DEFINED)}
    runs = [i for piece, i in vocab.items() if types[i] == _USER_DEFINED and set(piece) == {_SPACE}]
    runs.sort(key=lambda i: -len(pieces[i]))
    normal = [i for i in vocab.values() if types[i] == _NORMAL]
    normal.sort(key=lambda i: -scores[i])  # stable: equal scores keep the file's order
    merges: list[tuple[str, str]] = []
    for i in runs + normal:
        piece = pieces[i]
        cuts = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        pairs = [(vocab[head], vocab[tail]) for head, tail in cuts if head in vocab and tail in vocab]
        merges.extend((pieces[head], pieces[tail]) for head, tail in sorted(pairs))
    return merges


def _settings(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for key, name in (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token"), ("unknown", "unk_token")):
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token, int):
            if not 0 <= token < len(tokens):
                raise UserError(f"GGUF: {key}_token_id {token} is beyond the {len(tokens)} tokens; {_WAY_OUT}")
            settings[name] = tokens[token]
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
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
    if used:
        if any(backend.token_to_id(token) is None for token in used.values()):
            raise UserError(f"GGUF: the bos or eos token is not in the vocabulary; {_WAY_OUT}")
        backend.post_processor = processors.TemplateProcessing(
            single=[*([used["bos_token"]] if "bos_token" in used else []), "$A"]
            + ([used["eos_token"]] if "eos_token" in used else []),
            special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(used.values())],
        )
