"""Which file of a folder has the vocabulary where there is no tokenizer.json, and which of transformers' classes reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...system.reading import open_regular, read_json_object
from ..tokenizer_backend import refusing
from ..tokenizer_checks import Unfit
from .byte_level import is_ranks, read_merges, read_ranks, read_tekken
from .sentencepiece_model import is_sentencepiece, read_sentencepiece
from .vocabulary import Vocabulary
from .word_pieces import read_word_pieces

_PIECES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "source.spm")
_GENERIC = ("PreTrainedTokenizer", "TokenizersBackend", "SentencePieceBackend", "PythonBackend")

_BY_TYPE = {
    "LlamaTokenizer": ("llama", "mistral", "mixtral", "ministral", "phi3"),
    "GemmaTokenizer": ("gemma", "gemma2", "gemma3", "gemma3_text", "gemma4", "gemma4_text", "t5gemma", "t5gemma2"),
    "T5Tokenizer": ("t5", "mt5", "umt5"),
    "XLMRobertaTokenizer": ("xlm-roberta",),
    "MBartTokenizer": ("mbart",),
    "M2M100Tokenizer": ("m2m_100",),
    "MarianTokenizer": ("marian",),
    "PegasusTokenizer": ("pegasus",),
    "RobertaTokenizer": ("bart", "roberta"),
    "GPT2Tokenizer": ("gpt2",),
    "Qwen2Tokenizer": ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "qwen3_5_text"),
    "BertTokenizer": ("bert", "distilbert", "electra"),
}
_CLASS_OF = {kind: name for name, kinds in _BY_TYPE.items() for kind in kinds}

_NEVER_OWN = ("qwen2", "qwen3_5", "qwen3_5_moe", "phi3")
"""Model types whose tokenizer_class transformers does not heed."""


def has_vocabulary(directory: Path) -> bool:
    """Whether a folder has a file of any kind that a tokenizer is read from."""
    return (directory / "tokenizer.json").exists() or _file(directory) is not None


def tokenizer_class(directory: Path, values: Mapping[str, Any]) -> str | None:
    """The name of transformers' class, without "Fast": of tokenizer_config.json (`values`), else of config.json; None: unknown."""
    config = read_json_object(file) if (file := directory / "config.json").exists() else {}
    kind = config.get("model_type")
    by_type = _CLASS_OF.get(kind) if isinstance(kind, str) else None
    if by_type == "M2M100Tokenizer" and not (directory / "vocab.json").exists():  # NLLB is of the same model type
        by_type = "NllbTokenizer"
    if by_type is None and (directory / "params.json").is_file():  # Mistral's own layout and Meta's
        by_type = "LlamaTokenizer"
    for name in (values.get("tokenizer_class"), config.get("tokenizer_class")):
        plain = name.removesuffix("Fast") if isinstance(name, str) else ""
        if plain and plain not in _GENERIC:
            return by_type if by_type is not None and kind in _NEVER_OWN else plain
    return by_type


def read_vocabulary(directory: Path, values: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a folder without tokenizer.json. values: its tokenizer_config.json.

    Raises UserError if there is none, or it is corrupt, too large, or of a kind that is not read.
    """
    file = _file(directory)
    if file is None:
        raise UserError(
            f"{directory}: no tokenizer.json, and no other file with a vocabulary (tokenizer.model, spiece.model, tekken.json, "
            "*.tiktoken, source.spm, vocab.json with merges.txt, vocab.txt); download it too"
        )
    with refusing(file):
        return _read(file, tokenizer_class(directory, values), values)


def _read(file: Path, name: str | None, values: Mapping[str, Any]) -> Vocabulary:
    if file.name == "tekken.json":
        return read_tekken(file, values)
    if file.name == "vocab.json":
        return read_merges(file.parent, name, values)
    if file.name == "vocab.txt":
        return read_word_pieces(file, name, values)
    with open_regular(file) as opened:
        start = opened.read(2048)
    if is_ranks(start):
        return read_ranks(file, values)
    if is_sentencepiece(start):
        return read_sentencepiece(file, name, values)
    raise Unfit("neither a SentencePiece model nor tiktoken's ranks; download it again")


def _file(directory: Path) -> Path | None:
    """The file with the vocabulary; of two, the one that says more."""
    if (tekken := directory / "tekken.json").exists():
        return tekken
    versions = sorted(directory.glob("tokenizer.model.v*"))
    for file in (*(directory / name for name in _PIECES), *versions, *sorted(directory.glob("*.tiktoken"))):
        if file.exists():
            return file
    if (directory / "vocab.json").exists() and (directory / "merges.txt").exists():
        return directory / "vocab.json"
    return directory / "vocab.txt" if (directory / "vocab.txt").exists() else None
